"""What each task kept: from the score when learned to the score now, beside zero shot."""

from __future__ import annotations

from markupsafe import Markup

from treelora_cli.report.model import RunReport, TaskReport
from treelora_cli.report.svg import Scale, element, picture, shorten
from treelora_cli.report.words import percent, signed

_WIDTH, _LABEL, _RIGHT, _TOP, _ROW = 400, 128, 50, 26, 24
_BOTTOM = 26


def kept(report: RunReport) -> Markup | None:
    """Return the picture of all learned tasks; None when no score of any was measured."""
    tasks = [
        (number, task)
        for number, task in enumerate(report.tasks[: report.learned], start=1)
        if task.own is not None or task.final is not None
    ]
    if not tasks:
        return None
    x = Scale(0, 100, _LABEL, _WIDTH - _RIGHT)
    bottom = _TOP + _ROW * len(tasks)
    parts = []
    for tick in (0, 25, 50, 75, 100):
        parts.append(element("line", x1=x(tick), x2=x(tick), y1=_TOP - 4, y2=bottom, class_="grid"))
        parts.append(element("text", str(tick), x=x(tick), y=bottom + 14, class_="axis mid"))
    parts.append(element("text", "change", x=_WIDTH - 2, y=_TOP - 10, class_="axis end"))
    for position, (number, task) in enumerate(tasks):
        parts += _row(number, task, _TOP + _ROW * (position + 0.5), x)
    label = "Score when learned and score now of each task"
    return picture(_WIDTH, bottom + _BOTTOM, label, *parts, growth=1.15)


def _row(number: int, task: TaskReport, y: float, x: Scale) -> list[Markup]:
    name = element("tspan", f"{number} ", class_="head")
    title = element("title", _tip(task))
    parts = [
        element(
            "text",
            title,
            shorten(task.name, _LABEL - 36),
            " ",
            name,
            x=_LABEL - 12,
            y=y + 4,
            class_="label end",
        )
    ]
    for value, class_, reach in ((task.chance, "chance", 4), (task.zero_shot, "zero", 7)):
        if value is not None:
            at = x(100 * value)
            parts.append(element("line", x1=at, x2=at, y1=y - reach, y2=y + reach, class_=class_))
    worse = task.change is not None and task.change < 0
    if task.own is not None and task.final is not None:
        ends = {"x1": x(100 * task.own), "x2": x(100 * task.final)}
        parts.append(element("line", **ends, y1=y, y2=y, class_="lost" if worse else "gained"))
    if task.own is not None:
        parts.append(element("circle", cx=x(100 * task.own), cy=y, r=4.4, class_="own"))
    if task.final is not None:
        parts.append(element("circle", cx=x(100 * task.final), cy=y, r=4.4, class_="final"))
    change = signed(task.change, 1)
    class_ = "label end lostink" if worse else "label end"
    parts.append(element("text", change, x=_WIDTH - 2, y=y + 4, class_=class_))
    return parts


def _tip(task: TaskReport) -> str:
    return (
        f"{task.name}: learned {percent(task.own)}, now {percent(task.final)}, "
        f"zero shot {percent(task.zero_shot)}, chance {percent(task.chance)}"
    )
