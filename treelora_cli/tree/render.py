"""The tree as coloured text, from its JSON document alone (neither torch nor numpy is needed)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.text import Text
from rich.tree import Tree

# Names of a group are listed up to this many characters; the rest is counted.
_NAMES_WIDTH = 60

_DEPTH_STYLES = ("cyan", "magenta", "blue", "yellow")


def render(tree_doc: Mapping[str, Any], extra: Mapping[str, str] | None = None) -> Tree:
    """Return a text tree: groups with their cut and radius, leaves with the task's name.

    Args:
        tree_doc: a document as ``serial.to_document`` makes it.
        extra: a short text to show beside a task, by task name (pulls, scores, …).
    """
    names: list[str] = [str(name) for name in tree_doc["tasks"]]
    nodes: list[Mapping[str, Any]] = tree_doc["nodes"]
    notes = extra or {}
    root = Tree(_label(nodes[0], names, notes))
    branches = {0: root}
    # Pre-order: every parent has its branch before its children are met.
    for node in nodes[1:]:
        parent = branches[int(node["parent"])]
        depth = int(node["depth"]) - 1
        style = f"dim {_DEPTH_STYLES[depth % len(_DEPTH_STYLES)]}"
        parent.guide_style = style
        branches[int(node["id"])] = parent.add(_label(node, names, notes), guide_style=style)
    return root


def names_in_short(names: list[str], width: int = _NAMES_WIDTH) -> str:
    """Return ``A, B, C`` or, where that is longer than ``width``, ``A, B and 7 more``."""
    whole = ", ".join(names)
    if len(whole) <= width or len(names) < 3:
        return whole
    shown = 1
    while len(", ".join(names[: shown + 1])) <= width:
        shown += 1
    return f"{', '.join(names[:shown])} and {len(names) - shown} more"


def _label(node: Mapping[str, Any], names: list[str], notes: Mapping[str, str]) -> Text:
    tasks = [names[task] for task in node["tasks"]]
    if not node["children"]:
        # A tree of bounded depth may end in a leaf of several tasks.
        shown = "".join(f"  {notes[task]}" for task in tasks if task in notes)
        return Text.assemble((", ".join(tasks), "bold green"), shown)
    depth = int(node["depth"])
    facts = f"depth {depth}, {_cut(node)}, radius {_number(node['radius'])}"
    return Text.assemble(
        (f"{len(tasks)} tasks", f"bold {_DEPTH_STYLES[depth % len(_DEPTH_STYLES)]}"),
        f" ({names_in_short(tasks)})  ",
        (facts, "dim"),
    )


def _cut(node: Mapping[str, Any]) -> str:
    if node["threshold"] is None:
        return f"block {node['block']} by task order"
    return f"block {node['block']} at {_number(node['threshold'])}"


def _number(value: float) -> str:
    return f"{value:.3g}"
