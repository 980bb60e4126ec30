"""Read a tree document and check what its readers rely on; torch is not needed."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from treelora_cli.errors import RunDirError
from treelora_cli.report.words import clean, clean_document, marked
from treelora_cli.rundir.jsonfile import read_json
from treelora_cli.rundir.runinfo import RunInfo

FORMAT = 1
Json = dict[str, Any]


def read_tree(path: Path) -> Json | None:
    """Read a tree document, its text cleaned; None where there is no such file.

    Raises:
        RunDirError: the document is damaged or of a newer format.
    """
    if not os.path.lexists(path):
        return None
    document = clean_document(read_json(path))
    assert isinstance(document, dict)
    version = document.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise RunDirError(
            f"{path} was created by a newer version of treelora (format {version})",
            "upgrade treelora",
        )
    wrong = problem(document)
    if wrong:
        raise RunDirError(f"{path} is damaged: {wrong}", "put the original file back")
    return document


def caption(info: RunInfo, document: Json) -> str:
    """One line that says whose tree this is and what it was made from."""
    return "; ".join(facts(info, document))


def facts(info: RunInfo, document: Json) -> list[str]:
    """Whose tree this is, what it was made from and how it was split, one text for each."""
    tasks = document["tasks"]
    who = marked(
        f"{clean(info.method)} on {marked(clean(info.model), info.builtin_base)}",
        info.builtin_data and not info.builtin_base,
    )
    found = [f"{who}, after {tasks[-1]} ({len(tasks)} task{'s' * (len(tasks) != 1)})"]
    signature = document.get("signature")
    if isinstance(signature, dict) and signature.get("kind"):
        blocks = signature.get("blocks")
        over = f" over {blocks} blocks" if blocks != 1 else ""
        found.append(f"signature {signature['kind']}{over}")
    if document.get("split"):
        found.append(f"split {document['split']}, block rule {document.get('block_rule')}")
    return found


def problem(document: Json) -> str:
    """Say what is wrong with a tree document; empty if nothing is."""
    tasks, nodes = document.get("tasks"), document.get("nodes")
    if not isinstance(tasks, list) or not all(isinstance(name, str) for name in tasks):
        return "it has no list of task names"
    if not tasks or not isinstance(nodes, list) or not nodes:
        return "it has no nodes"
    for position, node in enumerate(nodes):
        wrong = _node_problem(node, position, len(nodes), len(tasks))
        if wrong:
            return f"node {position}: {wrong}"
    children = sorted(child for node in nodes for child in node["children"])
    return "" if children == list(range(1, len(nodes))) else "a node has no parent, or two"


def _node_problem(node: Any, position: int, nodes: int, tasks: int) -> str:
    """Children come after their parent, so that links cannot make a cycle."""
    if not isinstance(node, dict):
        return "it is not an object"
    parent, children = node.get("parent"), node.get("children")
    numbers = [node.get(key) for key in ("threshold", "radius") if node.get(key) is not None]
    described = {"split", "block", "threshold"} <= set(node) and "radius" in node
    checks = {
        "its id is not its position": node.get("id") == position,
        "its parent does not stand before it": position == 0 or _are_within([parent], 0, position),
        "its children do not stand after it": _are_within(children, position + 1, nodes),
        "its tasks are not in the list": _are_within(node.get("tasks"), 0, tasks),
        "it has no task": bool(node.get("tasks")),
        "its depth is no count": _is_count(node.get("depth")),
        "a number of it is none": all(map(_is_finite, numbers)),
        "it does not say what split it": not children or described,
    }
    return next((wrong for wrong, holds in checks.items() if not holds), "")


def _are_within(values: Any, low: int, high: int) -> bool:
    return isinstance(values, list) and all(_is_count(v) and low <= v < high for v in values)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
