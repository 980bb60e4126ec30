"""Line pictures: OP_n of one or several runs, and the training loss along the stream."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from treelora_cli.report.model import RunReport, TaskReport
from treelora_cli.report.svg import Scale, element, nice_ticks, picture, shorten, tick_text
from treelora_cli.report.words import percent

STYLES = 8
"""Lines differ in colour, dash and marker; after this many they start anew."""

_WIDTH, _HEIGHT = 440, 250
_LOSS_WIDTH, _LOSS_HEIGHT = 920, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 14, 14, 36


def op_curves(reports: Sequence[RunReport], names: Sequence[str]) -> Markup | None:
    """Return OP_n against n, one line per run; None when no OP was measured.

    Args:
        reports: the runs.
        names: what each is called, in the same order.
    """
    known = [100 * op for report in reports for op in report.op_curve if op is not None]
    if not known:
        return None
    ticks = nice_ticks(max(0.0, min(known) - 2), min(100.0, max(known) + 2))
    last = max(len(report.op_curve) for report in reports)
    x = Scale(1, last, _LEFT + 10, _WIDTH - _RIGHT - 10)
    y = Scale(ticks[0], ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    parts = _y_axis(ticks, y, _WIDTH)
    step = max(1, -(-last // 12))
    for n in range(1, last + 1):
        if (n - 1) % step == 0:
            parts.append(_below(str(n), x(n), _HEIGHT))
    middle = (_LEFT + _WIDTH - _RIGHT) / 2
    parts.append(element("text", "tasks learned", x=middle, y=_HEIGHT - 4, class_="axis mid"))
    for position, (report, name) in enumerate(zip(reports, names, strict=True)):
        parts += _op_line(report, name, position % STYLES, x, y)
    label = f"OP after each task for {', '.join(names)}"
    return picture(_WIDTH, _HEIGHT, label, *parts)


def _op_line(report: RunReport, name: str, style: int, x: Scale, y: Scale) -> list[Markup]:
    points = [(n, 100 * op) for n, op in enumerate(report.op_curve, start=1) if op is not None]
    parts = [_line([(x(n), y(op)) for n, op in points], f"line s{style}")]
    for n, op in points:
        tip = f"{name}, OP after {n}: {percent(op / 100)}"
        parts.append(marker(x(n), y(op), style, tip))
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


def loss_curve(tasks: Sequence[TaskReport]) -> Markup | None:
    """Return the training loss along the whole stream; None when no step was recorded.

    Args:
        tasks: the tasks in order; each that has a curve takes a stretch as long as its steps.
    """
    drawn = [(n, task) for n, task in enumerate(tasks, start=1) if task.loss]
    if not drawn:
        return None
    length = sum(task.loss[-1].step for _, task in drawn)
    ticks = nice_ticks(0, max(point.loss for _, task in drawn for point in task.loss), 4)
    x = Scale(0, length, _LEFT, _LOSS_WIDTH - _RIGHT)
    y = Scale(ticks[0], ticks[-1], _LOSS_HEIGHT - _BOTTOM, _TOP + 12)
    parts: list[Markup] = []
    lines: list[Markup] = []
    start = 0
    for position, (number, task) in enumerate(drawn):
        end = start + task.loss[-1].step
        parts += _stretch(number, task.name, x(start), x(end), position % 2 == 1)
        lines.append(_line([(x(start + p.step), y(p.loss)) for p in task.loss], "line s0 thin"))
        start = end
    parts += _y_axis(ticks, y, _LOSS_WIDTH)
    parts += [_below(tick_text(tick), x(tick), _LOSS_HEIGHT) for tick in _inside(length)]
    middle = (_LEFT + _LOSS_WIDTH - _RIGHT) / 2
    axis = element("text", "optimizer steps", x=middle, y=_LOSS_HEIGHT - 4, class_="axis mid")
    label = f"Training loss over {length} steps of {len(drawn)} tasks"
    return picture(_LOSS_WIDTH, _LOSS_HEIGHT, label, *parts, *lines, axis, fluid=False)


def _inside(length: int) -> list[float]:
    ticks = nice_ticks(0, length, 8)
    return [tick for tick in ticks if tick <= length and tick == int(tick)]


def _stretch(number: int, name: str, left: float, right: float, shaded: bool) -> list[Markup]:
    """The background of one task, with as much of its name as fits above."""
    room = int((right - left) / 6.6)
    shown = f"{number} {name}" if len(name) + 3 <= room else ""
    if not shown and room >= 8:
        shown = f"{number} {shorten(name, room - 3)}"
    if not shown and room >= 2:
        shown = str(number)
    box = element(
        "rect",
        element("title", f"{number} {name}"),
        x=left,
        y=_TOP + 2,
        width=right - left,
        height=_LOSS_HEIGHT - _BOTTOM - _TOP - 2,
        class_="band" if shaded else "clear",
    )
    text = element("text", shown, x=(left + right) / 2, y=_TOP, class_="axis mid")
    return [box, text] if shown else [box]


def _y_axis(ticks: Sequence[float], y: Scale, width: float) -> list[Markup]:
    parts = []
    for tick in ticks:
        parts.append(
            element("line", x1=_LEFT, x2=width - _RIGHT, y1=y(tick), y2=y(tick), class_="grid")
        )
        text = tick_text(tick)
        parts.append(element("text", text, x=_LEFT - 7, y=y(tick) + 4, class_="axis end"))
    return parts


def _below(text: str, x: float, height: float) -> Markup:
    return element("text", text, x=x, y=height - _BOTTOM + 15, class_="axis mid")


def _line(points: Sequence[tuple[float, float]], class_: str) -> Markup:
    return element("polyline", points=" ".join(f"{x:.1f},{y:.1f}" for x, y in points), class_=class_)
