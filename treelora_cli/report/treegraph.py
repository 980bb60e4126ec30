"""The gradient tree in the languages of graph tools: Graphviz and Mermaid."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Json = Mapping[str, Any]


def dot(tree: Json, about: Sequence[str]) -> str:
    """Return a Graphviz graph, the root at the left.

    Args:
        tree: a document that :func:`treelora_cli.report.treedoc.read_tree` has checked.
        about: lines above the drawing.
    """
    lines = [
        'graph "gradient tree" {',
        f'  graph [rankdir=LR, labelloc=t, fontname="sans-serif", label={_dot_lines(about)}];',
        '  node [fontname="sans-serif"];',
    ]
    for node in tree["nodes"]:
        shape = "ellipse" if node["children"] else "box"
        lines.append(f"  n{node['id']} [shape={shape}, label={_dot_lines(_label(tree, node))}];")
    lines += [f"  n{parent} -- n{child};" for parent, child in _edges(tree)]
    return "\n".join([*lines, "}"]) + "\n"


def mermaid(tree: Json, about: Sequence[str]) -> str:
    """Return a Mermaid flowchart, the root at the left.

    Args:
        tree: a document that :func:`treelora_cli.report.treedoc.read_tree` has checked.
        about: the first of these stands above the drawing, the others in comments.
    """
    # JSON text is YAML too, and the heading of a Mermaid file is YAML.
    heading = json.dumps(about[0], ensure_ascii=False)
    lines = ["---", f"title: {heading}", "---", "flowchart LR"]
    lines += [f"  %% {_mermaid_text(line)}" for line in about[1:]]
    for node in tree["nodes"]:
        label = "<br>".join(map(_mermaid_text, _label(tree, node)))
        begin, end = ("([", "])") if node["children"] else ("[", "]")
        lines.append(f'  n{node["id"]}{begin}"{label}"{end}')
    lines += [f"  n{parent} --- n{child}" for parent, child in _edges(tree)]
    return "\n".join(lines) + "\n"


def _label(tree: Json, node: Json) -> list[str]:
    """The lines on a node: a leaf's tasks with their place in the stream, a group's cut."""
    if not node["children"]:
        return [f"{index + 1} {tree['tasks'][index]}" for index in node["tasks"]]
    threshold = node.get("threshold")
    cut = "by task order" if threshold is None else f"at {threshold:.3g}"
    block = "" if node.get("block") is None else f"block {node['block']} {cut}"
    return [line for line in (f"{len(node['tasks'])} tasks", block) if line]


def _edges(tree: Json) -> list[tuple[int, int]]:
    return [(node["id"], child) for node in tree["nodes"] for child in node["children"]]


def _dot_lines(lines: Iterable[str]) -> str:
    return '"' + "\\n".join(map(_dot_text, lines)) + '"'


def _dot_text(text: str) -> str:
    r"""Text for within quotes: Graphviz reads ``\N`` and ``&lt;`` there."""
    return text.replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"')


def _mermaid_text(text: str) -> str:
    """Text for within quotes: all but letters, digits and harmless signs by number."""
    return re.sub(r"[^\w .,:|()/=+-]", lambda found: f"#{ord(found[0])};", text)
