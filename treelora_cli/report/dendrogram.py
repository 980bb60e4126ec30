"""The gradient tree as a picture: the root at the left, one row per leaf."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from treelora_cli.report.svg import element, picture, shorten, text_width

_ROW, _TOP, _LEFT, _LABEL, _DEPTH_ROOM = 24, 4, 14, 180, 200
_MARGIN, _LINE, _WIDE_STEP = 16, 18, 84.0

# A file of its own has no page to take colours from; these are the report's on white paper.
_STYLE = """
text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif;
  fill: #1b2430; }
.title { font-size: 13px; font-weight: 600; }
.axis, .note { font-size: 11px; fill: #5a6675; }
.branch { fill: none; stroke: #5a6675; stroke-width: 1.4; }
.leader { stroke: #e2dfd6; stroke-width: 1.2; stroke-dasharray: 2 3; }
.node { fill: #ffffff; stroke: #17698f; stroke-width: 2; }
.leaf { fill: #17698f; }
"""


@dataclass(frozen=True, slots=True)
class _Drawing:
    """The elements of a picture and its size in pixels."""

    width: float
    height: float
    label: str
    parts: list[Markup]


@dataclass(frozen=True, slots=True)
class _Placed:
    """One node and where it is drawn."""

    x: float
    y: float
    children: tuple[int, ...]
    caption: str
    tip: str


def dendrogram(tree: Mapping[str, Any]) -> Markup:
    """Return the picture of a tree document, to stand in a page.

    Args:
        tree: a document that :func:`treelora_cli.report.treedoc.read_tree` has checked.
    """
    drawn = _draw(tree)
    growth = float(drawn.width <= 400)
    return picture(drawn.width, drawn.height, drawn.label, *drawn.parts, growth=growth)


def standalone(tree: Mapping[str, Any], about: Sequence[str]) -> str:
    """Return the picture as an SVG file of its own, on a light ground.

    Args:
        tree: a document that :func:`treelora_cli.report.treedoc.read_tree` has checked.
        about: lines above the tree, the first one its title.
    """
    # Nothing limits the width of a file, so there is room for the block of every split.
    drawn = _draw(tree, step=_WIDE_STEP)
    room = [text_width(line, 13) for line in about]
    head = _MARGIN + _LINE * len(about)
    width = max(drawn.width, *room) + 2 * _MARGIN
    height = drawn.height + head + 2 * _MARGIN
    lines = [
        element(
            "text", line, x=_MARGIN, y=_MARGIN + 12 + _LINE * n, class_="note" if n else "title"
        )
        for n, line in enumerate(about)
    ]
    body = element("g", *drawn.parts, transform=f"translate({_MARGIN} {_MARGIN + head})")
    svg = element(
        "svg",
        element("title", about[0]),
        element("desc", drawn.label),
        element("style", _STYLE),
        element("rect", width="100%", height="100%", fill="#ffffff"),
        *lines,
        body,
        xmlns="http://www.w3.org/2000/svg",
        width=width,
        height=height,
        viewBox=f"0 0 {width:.2f} {height:.2f}",
    )
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{svg}\n'


def _draw(tree: Mapping[str, Any], step: float | None = None) -> _Drawing:
    """Draw a tree, ``step`` pixels from a node to its children; by its depth where None."""
    nodes: list[dict[str, Any]] = tree["nodes"]
    deepest = max(int(node["depth"]) for node in nodes)
    if step is None:
        step = min(_WIDE_STEP, max(26.0, _DEPTH_ROOM / max(1, deepest)))
    edge = _LEFT + step * deepest
    names: list[str] = tree["tasks"]
    placed = _place(nodes, names, step)
    parts: list[Markup] = []
    for node in placed:
        parts += [_elbow(node, placed[child]) for child in node.children]
    for node in placed:
        parts += _inner(node, step) if node.children else _leaf(node, edge)
    leaves = sum(not node.children for node in placed)
    label = f"Gradient tree of {len(names)} tasks: {leaves} leaves, depth {deepest}"
    return _Drawing(edge + _LABEL, 2 * _TOP + _ROW * leaves, label, parts)


def _place(nodes: Sequence[dict[str, Any]], names: Sequence[str], step: float) -> list[_Placed]:
    heights: dict[int, float] = {}
    leaves = [position for position, node in enumerate(nodes) if not node["children"]]
    for row, position in enumerate(leaves):
        heights[position] = _TOP + _ROW * (row + 0.5)
    # Children have higher ids than their parent, so going backwards meets them first.
    for position in range(len(nodes) - 1, -1, -1):
        children = nodes[position]["children"]
        if children:
            heights[position] = sum(heights[child] for child in children) / len(children)
    return [
        _Placed(
            x=_LEFT + step * node["depth"],
            y=heights[position],
            children=tuple(node["children"]),
            caption=_caption(node, names),
            tip=_tip(node, names),
        )
        for position, node in enumerate(nodes)
    ]


def _members(node: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [f"{index + 1} {names[index]}" for index in node["tasks"]]


def _caption(node: Mapping[str, Any], names: Sequence[str]) -> str:
    if not node["children"]:
        return ", ".join(_members(node, names))
    block = node.get("block")
    return str(node.get("split") or "") if block is None else f"block {block}"


def _tip(node: Mapping[str, Any], names: Sequence[str]) -> str:
    facts = [", ".join(_members(node, names)), f"depth {node['depth']}"]
    for key, head in (
        ("split", "split by"),
        ("block", "at block"),
        ("threshold", "threshold"),
        ("radius", "radius"),
        ("spread", "spread"),
    ):
        value = node.get(key)
        if value is not None and value != "":
            facts.append(f"{head} {value:.4g}" if isinstance(value, float) else f"{head} {value}")
    return "; ".join(facts)


def _elbow(parent: _Placed, child: _Placed) -> Markup:
    return element(
        "path", d=f"M{parent.x:.1f} {parent.y:.1f}V{child.y:.1f}H{child.x:.1f}", class_="branch"
    )


def _inner(node: _Placed, step: float) -> list[Markup]:
    dot = element("circle", element("title", node.tip), cx=node.x, cy=node.y, r=4, class_="node")
    if step < 56:
        return [dot]
    return [dot, element("text", node.caption, x=node.x + 8, y=node.y + 4, class_="axis")]


def _leaf(node: _Placed, edge: float) -> list[Markup]:
    title = element("title", node.tip)
    parts = [element("circle", title, cx=node.x, cy=node.y, r=3.4, class_="leaf")]
    if edge > node.x:
        ends = {"x1": node.x + 5, "x2": edge + 4, "y1": node.y, "y2": node.y}
        parts.append(element("line", **ends, class_="leader"))
    text = shorten(node.caption, _LABEL - 14)
    parts.append(element("text", title, text, x=edge + 10, y=node.y + 4, class_="label"))
    return parts
