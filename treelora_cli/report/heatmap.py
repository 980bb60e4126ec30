"""R as a picture: one square per score, the zero-shot row above, the diagonal framed."""

from __future__ import annotations

from markupsafe import Markup

from treelora_cli.report.grid import (
    HEAD,
    LEGEND,
    Size,
    column_head,
    dot,
    frame,
    hole,
    label_width,
    legend,
    row_label,
    square,
)
from treelora_cli.report.model import RunReport
from treelora_cli.report.svg import element, picture
from treelora_cli.report.words import percent

_GAP = 8


def heatmap(report: RunReport) -> Markup:
    """Return the picture; numbers are scores times 100.

    Args:
        report: a run with at least one task.
    """
    size = _size(report)
    zero_shot = any(task.zero_shot is not None for task in report.tasks)
    top = HEAD + (size.height + _GAP if zero_shot else 0)
    bottom = top + size.height * max(1, len(report.matrix))
    width = max(size.label + size.width * len(report.tasks) + 2, 340)
    parts = _column_heads(report, size)
    if zero_shot:
        parts.append(row_label("zero shot", HEAD, size))
        for j, task in enumerate(report.tasks):
            tip = f"zero shot, {task.name}: {percent(task.zero_shot)}"
            parts.append(_cell(task.zero_shot, j, HEAD, size, tip, needed=True))
    parts += _rows(report, top, size)
    parts += [
        frame(size.label + i * size.width, top + i * size.height, size)
        for i in range(len(report.matrix))
    ]
    parts.append(legend(size.label, bottom + 22))
    label = f"Scores of {len(report.tasks)} tasks after each of {len(report.matrix)} tasks"
    return picture(width, bottom + LEGEND, label, *parts, growth=0)


def _size(report: RunReport) -> Size:
    tasks = len(report.tasks)
    label = label_width([task.name for task in report.tasks])
    if tasks <= 12:
        return Size(46, 30, 1, label)
    if tasks <= 20:
        return Size(40, 26, 1, label)
    if tasks <= 28:
        return Size(28, 22, 0, label)
    return Size(20, 18, 0, label)


def _column_heads(report: RunReport, size: Size) -> list[Markup]:
    parts = [
        element("text", "score on task", x=size.label + 2, y=12, class_="axis"),
        element("text", "after task", x=size.label - 10, y=HEAD - 8, class_="axis end"),
    ]
    for j, task in enumerate(report.tasks):
        parts.append(column_head(task.name, j + 1, size.label + size.width * j, size))
    return parts


def _rows(report: RunReport, top: float, size: Size) -> list[Markup]:
    parts = []
    for i, row in enumerate(report.matrix):
        y = top + i * size.height
        parts.append(row_label(report.tasks[i].name, y, size, i + 1))
        for j, score in enumerate(row):
            tip = f"after {report.tasks[i].name}, {report.tasks[j].name}: {percent(score)}"
            parts.append(_cell(score, j, y, size, tip, needed=j <= i))
    return parts


def _cell(score: float | None, j: int, y: float, size: Size, tip: str, *, needed: bool) -> Markup:
    x = size.label + j * size.width
    if score is None:
        return hole(x, y, size, tip) if needed else dot(x, y, size)
    return square(x, y, size, percent(score, size.digits), tip, score)
