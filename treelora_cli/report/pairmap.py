"""A number of every two tasks as a picture: the triangle below the diagonal, a square per pair."""

from __future__ import annotations

from markupsafe import Markup

from treelora_cli.report.evidence import EVIDENCE_HEADS, shown
from treelora_cli.report.grid import (
    HEAD,
    LEGEND,
    Size,
    column_head,
    hole,
    label_width,
    legend,
    row_label,
    square,
)
from treelora_cli.report.model import Evidence
from treelora_cli.report.svg import element, picture

_ENDS = {"collision": ("0", "100"), "overlap": ("0", "1"), "cosine": ("0", "±1")}


def pairmap(evidence: Evidence, key: str) -> Markup | None:
    """Return the picture of one number; None where there is no pair.

    Args:
        evidence: the numbers of a run.
        key: ``collision``, ``overlap`` or ``cosine``; the cosine's colour is that of its size.
    """
    tasks = len(evidence.names)
    if tasks < 2:
        return None
    size = _size(evidence)
    parts = [element("text", "with task", x=size.label + 2, y=12, class_="axis")]
    for j in range(tasks - 1):
        x = size.label + j * size.width
        parts.append(column_head(evidence.names[j], evidence.places[j] + 1, x, size))
    for i in range(1, tasks):
        y = HEAD + (i - 1) * size.height
        parts.append(row_label(evidence.names[i], y, size, evidence.places[i] + 1))
        parts += [_cell(evidence, key, i, j, size) for j in range(i)]
    bottom = HEAD + (tasks - 1) * size.height
    parts.append(legend(size.label, bottom + 22, *_ENDS[key]))
    width = max(size.label + size.width * (tasks - 1) + 2, 340)
    label = f"{EVIDENCE_HEADS[key]} of every two of {tasks} tasks"
    return picture(width, bottom + LEGEND, label, *parts, growth=0)


def _size(evidence: Evidence) -> Size:
    """Squares as small as their numbers allow, so that two pictures of eight tasks fit abreast."""
    tasks = len(evidence.names)
    label = label_width(evidence.names)
    if tasks <= 20:
        return Size(40, 28, 2, label)
    if tasks <= 28:
        return Size(28, 22, 1, label)
    return Size(20, 18, 0, label)


def _cell(evidence: Evidence, key: str, i: int, j: int, size: Size) -> Markup:
    x, y = size.label + j * size.width, HEAD + (i - 1) * size.height
    value = getattr(evidence, key)[i][j]
    tip = f"{evidence.names[i]} and {evidence.names[j]}: {EVIDENCE_HEADS[key]} {shown(key, value)}"
    if value is None:
        return hole(x, y, size, tip)
    if key == "collision":
        chance = evidence.density[i] * evidence.density[j]
        tip += f"; {shown(key, chance)} if the places were independent"
    return square(x, y, size, _ink(key, value, size.digits), tip, abs(value))


def _ink(key: str, value: float, digits: int) -> str:
    """The number with the digits that fit; the picture's reader points at it for all of them."""
    if key == "collision":
        return f"{100 * value:.{max(0, digits - 1)}f}"
    text = f"{value:.{max(1, digits)}f}"
    return text if float(text) else text.lstrip("-")
