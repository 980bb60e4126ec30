"""Line pictures: OP_n of runs or groups of runs, and the training loss along the stream."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from markupsafe import Markup

from treelora_cli.report.groups import Group
from treelora_cli.report.model import RunReport, TaskReport
from treelora_cli.report.svg import Scale, element, nice_ticks, picture, text_width, tick_text
from treelora_cli.report.words import percent

STYLES = 8
"""Lines differ in colour, dash and marker; after this many they start anew."""

NARROW, WIDE = 400, 940
"""Widths of a picture beside another and of one across the page, in pixels."""

_HEIGHT = 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 14, 14, 36


@dataclass(frozen=True, slots=True)
class OpCurve:
    """One line of the OP picture, times 100.

    Attributes:
        name: what the line is called.
        length: OP_1 … OP_length.
        points: (n, OP_n, standard deviation) where OP_n was measured; 0.0 for a single run.
    """

    name: str
    length: int
    points: tuple[tuple[int, float, float], ...]


def run_curves(reports: Sequence[RunReport], names: Sequence[str]) -> list[OpCurve]:
    """Return the line of each run.

    Args:
        reports: the runs.
        names: what each is called, in the same order.
    """
    curves = []
    for report, name in zip(reports, names, strict=True):
        measured = enumerate(report.op_curve, start=1)
        points = tuple((n, 100 * op, 0.0) for n, op in measured if op is not None)
        curves.append(OpCurve(name, len(report.op_curve), points))
    return curves


def group_curves(groups: Sequence[Group]) -> list[OpCurve]:
    """Return the line of the mean of each group, with the deviation of its runs."""
    curves = []
    for group in groups:
        values = group.op_curve()
        points = tuple(
            (n, 100 * value.mean, 100 * (value.std or 0.0))
            for n, value in enumerate(values, start=1)
            if value is not None
        )
        curves.append(OpCurve(group.title, len(values), points))
    return curves


def op_curves(curves: Sequence[OpCurve], width: int = NARROW, only: str = "") -> Markup | None:
    """Return OP_n against n; None before a second task or a score.

    A line with deviations has a band of one of them to either side, and bars at its points.

    Args:
        curves: the lines.
        width: pixels.
        only: as in :func:`treelora_cli.report.svg.picture`.
    """
    known = [op + part for c in curves for _, op, std in c.points for part in (-std, std)]
    last = max(curve.length for curve in curves)
    if not known or last < 2:
        return None
    ticks = nice_ticks(max(0.0, min(known) - 2), min(100.0, max(known) + 2))
    x = Scale(1, last, _LEFT + 10, width - _RIGHT - 10)
    y = Scale(ticks[0], ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    parts = _y_axis(ticks, y, width, [tick_text(tick) for tick in ticks])
    step = max(1, -(-last // (width // 36)))
    for n in range(1, last + 1):
        if (n - 1) % step == 0:
            parts.append(_below(str(n), x(n)))
    middle = (_LEFT + width - _RIGHT) / 2
    parts.append(element("text", "tasks learned", x=middle, y=_HEIGHT - 4, class_="axis mid"))
    for position, curve in enumerate(curves):
        parts += _deviation(curve, position % STYLES, x, y)
    for position, curve in enumerate(curves):
        parts += _op_line(curve, position % STYLES, x, y)
    label = f"OP after each task for {', '.join(curve.name for curve in curves)}"
    return picture(width, _HEIGHT, label, *parts, growth=1.2, only=only)


def _op_line(curve: OpCurve, style: int, x: Scale, y: Scale) -> list[Markup]:
    parts = [_line([(x(n), y(op)) for n, op, _ in curve.points], f"line s{style}")]
    for n, op, std in curve.points:
        deviation = f" ± {percent(std / 100)}" if std else ""
        tip = f"{curve.name}, OP after {n}: {percent(op / 100)}{deviation}"
        parts.append(marker(x(n), y(op), style, tip))
    return parts


def _deviation(curve: OpCurve, style: int, x: Scale, y: Scale) -> list[Markup]:
    """The band of a line and the bars at its points; scores end at 0 and 100, so do these."""
    if not any(std for _, _, std in curve.points):
        return []
    ends = [(x(n), y(min(100.0, op + std)), y(max(0.0, op - std))) for n, op, std in curve.points]
    outline = [(at, high) for at, high, _ in ends] + [(at, low) for at, _, low in ends[::-1]]
    corners = " ".join(f"{at:.1f},{height:.1f}" for at, height in outline)
    parts = [element("polygon", points=corners, class_=f"spread s{style}")]
    for at, high, low in ends:
        beam = f"M{at - 4:.1f} {high:.1f}h8M{at - 4:.1f} {low:.1f}h8M{at:.1f} {high:.1f}V{low:.1f}"
        parts.append(element("path", d=beam, class_=f"bar s{style}"))
    return parts


def marker(x: float, y: float, style: int, tip: str = "") -> Markup:
    """The point of one line style, a different shape for each of four."""
    r = 3.6
    shapes = (
        element("circle", cx=x, cy=y, r=r),
        element("rect", x=x - r, y=y - r, width=2 * r, height=2 * r),
        element("path", d=f"M{x:.2f} {y - 4.6:.2f}l4.6 8h-9.2z"),
        element("path", d=f"M{x:.2f} {y - 5:.2f}l5 5l-5 5l-5 -5z"),
    )
    title = [element("title", tip)] if tip else []
    return element("g", *title, shapes[style % len(shapes)], class_=f"marker s{style}")


def key(style: int) -> Markup:
    """A sample of one line style for the legend."""
    line = element("line", x1=0, y1=8, x2=34, y2=8, class_=f"line s{style}")
    sample = element(
        "svg", line, marker(17, 8, style), width=34, height=16, class_="key", aria_hidden="true"
    )
    return sample


def loss_curve(tasks: Sequence[TaskReport], width: int = WIDE, only: str = "") -> Markup | None:
    """Return the training loss along the whole stream; None when no step was recorded.

    Args:
        tasks: the tasks in order; each that has a curve takes a stretch as long as its steps.
        width: pixels.
        only: as in :func:`treelora_cli.report.svg.picture`.
    """
    drawn = [(n, task) for n, task in enumerate(tasks, start=1) if task.loss]
    if not drawn:
        return None
    length = sum(task.loss[-1].step for _, task in drawn)
    height = _loss_height([point.loss for _, task in drawn for point in task.loss])
    x = Scale(0, length, _LEFT, width - _RIGHT)
    y = height.scale
    parts: list[Markup] = []
    lines: list[Markup] = []
    start = 0
    for (number, task), shown in zip(drawn, _above(drawn, x), strict=True):
        end = start + task.loss[-1].step
        parts += _stretch(number, shown, task.name, (x(start), x(end)))
        lines.append(
            _line([(x(start + p.step), height(p.loss)) for p in task.loss], "line s0 thin")
        )
        start = end
    parts += _y_axis(height.ticks, y, width, height.texts)
    parts += [_below(tick_text(tick), x(tick)) for tick in _inside(length, width)]
    middle = (_LEFT + width - _RIGHT) / 2
    axis = element("text", height.axis, x=middle, y=_HEIGHT - 4, class_="axis mid")
    label = f"Training loss over {length} steps of {len(drawn)} tasks"
    return picture(width, _HEIGHT, label, *parts, *lines, axis, only=only)


@dataclass(frozen=True, slots=True)
class _LossHeight:
    """How a loss becomes a height: straight, or by its logarithm from ``floor`` up."""

    scale: Scale
    ticks: list[float]
    texts: list[str]
    axis: str
    floor: float | None = None

    def __call__(self, loss: float) -> float:
        if self.floor is None:
            return self.scale(loss)
        return self.scale(math.log10(max(loss, self.floor)))


def _loss_height(losses: Sequence[float]) -> _LossHeight:
    """A logarithmic scale where a straight one would press most of the curve to the ground."""
    low, high = _HEIGHT - _BOTTOM, _TOP + 12
    if max(losses) <= 20 * median(losses) or min(losses) < 0:
        ticks = nice_ticks(min(0.0, *losses), max(losses))
        texts = [tick_text(tick) for tick in ticks]
        return _LossHeight(Scale(ticks[0], ticks[-1], low, high), ticks, texts, "optimizer steps")
    top = math.ceil(math.log10(max(losses)) - 1e-9)
    bottom = max(top - 5, math.floor(math.log10(max(min(losses), 1e-300))))
    exponents = range(min(bottom, top - 1), top + 1)
    return _LossHeight(
        scale=Scale(exponents[0], exponents[-1], low, high),
        ticks=[float(exponent) for exponent in exponents],
        texts=[tick_text(10.0**exponent) for exponent in exponents],
        axis="optimizer steps; the loss is on a logarithmic scale",
        floor=10.0 ** exponents[0],
    )


def _inside(length: int, width: int) -> list[float]:
    ticks = nice_ticks(0, length, width // 110)
    return [tick for tick in ticks if tick <= length and tick == int(tick)]


def _stretch(number: int, shown: str, name: str, box: tuple[float, float]) -> list[Markup]:
    """The background of one task, every second one shaded, and what fits above it."""
    left, right = box
    parts = [
        element(
            "rect",
            element("title", f"{number} {name}"),
            x=left,
            y=_TOP + 2,
            width=right - left,
            height=_HEIGHT - _BOTTOM - _TOP - 2,
            class_="clear" if number % 2 else "band",
        )
    ]
    if shown:
        middle = (left + right) / 2
        parts.append(element("text", shown, x=middle, y=_TOP - 2, class_="axis mid"))
    return parts


def _above(drawn: Sequence[tuple[int, TaskReport]], x: Scale) -> list[str]:
    """What stands above each stretch: names where all fit, else numbers where they fit."""
    rooms = [x(task.loss[-1].step) - x(0) for _, task in drawn]
    full = [f"{number} {task.name}" for number, task in drawn]
    if all(text_width(text, 11) + 4 <= room for text, room in zip(full, rooms, strict=True)):
        return full
    numbers = [str(number) for number, _ in drawn]
    return [
        text if text_width(text, 11) <= room else ""
        for text, room in zip(numbers, rooms, strict=True)
    ]


def _y_axis(ticks: Sequence[float], y: Scale, width: float, texts: Sequence[str]) -> list[Markup]:
    parts = []
    for tick, text in zip(ticks, texts, strict=True):
        parts.append(
            element("line", x1=_LEFT, x2=width - _RIGHT, y1=y(tick), y2=y(tick), class_="grid")
        )
        parts.append(element("text", text, x=_LEFT - 7, y=y(tick) + 4, class_="axis end"))
    return parts


def _below(text: str, x: float) -> Markup:
    return element("text", text, x=x, y=_HEIGHT - _BOTTOM + 15, class_="axis mid")


def _line(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    return element(
        "polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=class_
    )
