"""R as a picture: one square per score, the zero-shot row above, the diagonal framed."""

from __future__ import annotations

from dataclasses import dataclass

from markupsafe import Markup

from treelora_cli.report.model import RunReport
from treelora_cli.report.ramp import STEPS, level
from treelora_cli.report.svg import element, picture, shorten, text_width
from treelora_cli.report.words import NOT_MEASURED, percent

_NAME = 124.0
_HEAD = 40
_GAP = 8
_LEGEND = 46


@dataclass(frozen=True, slots=True)
class _Size:
    """Pixels of one cell and of the names before it, and the digits that fit behind the point."""

    width: int
    height: int
    digits: int
    label: float


def heatmap(report: RunReport) -> Markup:
    """Return the picture; numbers are scores times 100.

    Args:
        report: a run with at least one task.
    """
    size = _size(report)
    zero_shot = any(task.zero_shot is not None for task in report.tasks)
    top = _HEAD + (size.height + _GAP if zero_shot else 0)
    bottom = top + size.height * max(1, len(report.matrix))
    width = max(size.label + size.width * len(report.tasks) + 2, 340)
    parts = _column_heads(report, size)
    if zero_shot:
        parts.append(_row_label("zero shot", _HEAD, size))
        for j, task in enumerate(report.tasks):
            tip = f"zero shot, {task.name}: {percent(task.zero_shot)}"
            parts.append(_cell(task.zero_shot, j, _HEAD, size, tip, needed=True))
    parts += _rows(report, top, size)
    parts += _diagonal(report, top, size)
    parts.append(_legend(size.label, bottom + 22))
    label = f"Scores of {len(report.tasks)} tasks after each of {len(report.matrix)} tasks"
    return picture(width, bottom + _LEGEND, label, *parts, growth=0)


def _size(report: RunReport) -> _Size:
    tasks = len(report.tasks)
    longest = max(text_width(shorten(task.name, _NAME)) for task in report.tasks)
    label = max(74.0, 32 + longest)
    if tasks <= 12:
        return _Size(46, 30, 1, label)
    if tasks <= 20:
        return _Size(40, 26, 1, label)
    if tasks <= 28:
        return _Size(28, 22, 0, label)
    return _Size(20, 18, 0, label)


def _column_heads(report: RunReport, size: _Size) -> list[Markup]:
    parts = [
        element("text", "score on task", x=size.label + 2, y=12, class_="axis"),
        element("text", "after task", x=size.label - 10, y=_HEAD - 8, class_="axis end"),
    ]
    for j, task in enumerate(report.tasks):
        x = size.label + size.width * (j + 0.5)
        head = (element("title", task.name), str(j + 1))
        parts.append(element("text", *head, x=x, y=_HEAD - 8, class_="head mid"))
    return parts


def _rows(report: RunReport, top: float, size: _Size) -> list[Markup]:
    parts = []
    for i, row in enumerate(report.matrix):
        y = top + i * size.height
        parts.append(_row_label(report.tasks[i].name, y, size, i + 1))
        for j, score in enumerate(row):
            tip = f"after {report.tasks[i].name}, {report.tasks[j].name}: {percent(score)}"
            parts.append(_cell(score, j, y, size, tip, needed=j <= i))
    return parts


def _row_label(name: str, y: float, size: _Size, number: int | None = None) -> Markup:
    middle = y + size.height / 2 + 4
    short = shorten(name, _NAME)
    parts: list[str] = [element("title", name), short]
    if number is not None:
        parts.append(element("tspan", f" {number}", class_="head"))
    return element("text", *parts, x=size.label - 10, y=middle, class_="label end")


def _cell(score: float | None, j: int, y: float, size: _Size, tip: str, *, needed: bool) -> Markup:
    x = size.label + j * size.width
    place = {"x": x + 1, "y": y + 1, "width": size.width - 2, "height": size.height - 2, "rx": 3}
    center = {"x": x + size.width / 2, "y": y + size.height / 2 + 4}
    if score is None:
        if not needed:
            return element("circle", cx=center["x"], cy=center["y"] - 4, r=1.2, class_="dot")
        box = element("rect", **place, class_="hole")
        return element("g", element("title", tip), box, _ink(NOT_MEASURED, center, "muted mid"))
    step = level(score)
    small = "small " if size.width < 28 else ""
    text = _ink(percent(score, size.digits), center, f"{small}cell mid i{step}")
    return element("g", element("title", tip), element("rect", **place, class_=f"h{step}"), text)


def _ink(text: str, place: dict[str, float], class_: str) -> Markup:
    return element("text", text, x=place["x"], y=place["y"], class_=class_)


def _diagonal(report: RunReport, top: float, size: _Size) -> list[Markup]:
    """Frames last, so that no neighbour paints over them."""
    return [
        element(
            "rect",
            x=size.label + i * size.width,
            y=top + i * size.height,
            width=size.width,
            height=size.height,
            rx=4,
            class_="frame",
        )
        for i in range(len(report.matrix))
    ]


def _legend(x: float, y: float) -> Markup:
    width = 6
    swatches = [
        element("rect", x=x + step * width, y=y, width=width, height=8, class_=f"crisp h{step}")
        for step in range(STEPS + 1)
    ]
    end = x + (STEPS + 1) * width
    return element(
        "g",
        element("text", "0", x=x - 8, y=y + 9, class_="axis end"),
        *swatches,
        element("text", "100", x=end + 6, y=y + 9, class_="axis"),
    )
