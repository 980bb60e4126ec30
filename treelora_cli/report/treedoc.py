"""Read a tree document and check what its readers rely on; torch is not needed."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from treelora_cli.errors import RunDirError
from treelora_cli.report.words import clean_document
from treelora_cli.rundir.jsonfile import read_json

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


def problem(document: Json) -> str:
    """Say what is wrong with a tree document; empty if nothing is."""
    tasks, nodes = document.get("tasks"), document.get("nodes")
    if not isinstance(tasks, list) or not all(isinstance(name, str) for name in tasks):
        return "it has no list of task names"
    if not isinstance(nodes, list) or not nodes:
        return "it has no nodes"
    for position, node in enumerate(nodes):
        wrong = _node_problem(node, position, len(nodes), len(tasks))
        if wrong:
            return f"node {position}: {wrong}"
    children = sorted(child for node in nodes for child in node["children"])
    return "" if children == list(range(1, len(nodes))) else "a node has no parent, or two"


def _node_problem(node: Any, position: int, nodes: int, tasks: int) -> str:
    """Children come after their parent, so that links cannot make a cycle."""
    if not isinstance(node, dict) or node.get("id") != position:
        return "its id is not its position"
    parent = node.get("parent")
    if position > 0 and not (_is_count(parent) and parent < position):
        return "its parent does not stand before it"
    if not _are_within(node.get("children"), position + 1, nodes):
        return "its children do not stand after it"
    if not _are_within(node.get("tasks"), 0, tasks) or not node["tasks"]:
        return "its tasks are not in the list"
    if not _is_count(node.get("depth")):
        return "its depth is no count"
    numbers = (node.get(key) for key in ("threshold", "radius"))
    if not all(number is None or _is_finite(number) for number in numbers):
        return "a number of it is none"
    if node["children"] and not (
        {"split", "block", "threshold"} <= set(node) and _is_finite(node.get("radius"))
    ):
        return "it does not say what split it"
    return ""


def _are_within(values: Any, low: int, high: int) -> bool:
    return isinstance(values, list) and all(_is_count(v) and low <= v < high for v in values)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
