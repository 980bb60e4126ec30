"""How text and numbers are written in every format."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from treelora_cli.report.model import SYNTHETIC, RoutedScores, RunReport

NOT_MEASURED = "—"
NOT_DEFINED = "n/a"
LIMITED = "Scores on the few rows of --limit: to look at, they enter no number"

HEADS = {
    "op": "OP",
    "bwt": "BWT",
    "bwt_lopez_paz": "BWT (LP)",
    "forgetting": "Forgetting",
    "fwt": "FWT",
}
"""What each number is called in tables."""

# C0 and C1 controls (escape sequences start with one), the characters that turn the reading
# direction, the separators that only some readers break lines at, and lone surrogates.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ufffe\uffff"
    "\ud800-\udfff]"
)
_ESCAPE_SEQUENCE = re.compile(
    "(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b\\][^\x07\x1b]*(?:\x07|\x1b\\\\)"
)


def clean(text: str) -> str:
    """Take out escape sequences and control characters; a line break becomes a space.

    Names and answers come from data and models: printed as they are, they could rewrite the
    terminal, or fail to encode.
    """
    return " ".join(clean_lines(text).split())


def clean_lines(text: str) -> str:
    """Like :func:`clean`, but lines and the spaces within them stay."""
    unified = text.replace("\r\n", "\n").replace("\r", "\n").replace("\t", "    ")
    return _UNPRINTABLE.sub("", _ESCAPE_SEQUENCE.sub("", unified))


def clean_document(value: object) -> object:
    """Apply :func:`clean` to every string of a JSON document."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, list):
        return [clean_document(item) for item in value]
    if isinstance(value, dict):
        return {clean(str(key)): clean_document(item) for key, item in value.items()}
    return value


def marked(name: str, synthetic: bool, note: str = SYNTHETIC) -> str:
    """A name, and behind it what must be known about where it comes from."""
    return f"{name} ({note})" if synthetic else name


def percent(value: float | None, digits: int = 2) -> str:
    """A score as the field prints it, times 100: 0.5477 -> ``54.77``."""
    if value is None:
        return NOT_MEASURED
    text = f"{100 * value:.{digits}f}"
    # A loss of less than half of the last digit would read "-0.00".
    return text.lstrip("-") if float(text) == 0 else text


def signed(value: float | None, digits: int = 2) -> str:
    """A difference of scores times 100, with its sign."""
    text = percent(value, digits)
    return f"+{text}" if value is not None and float(text) > 0 else text


def values(report: RunReport) -> dict[str, str]:
    """The five numbers as printed, by key; a difference carries its sign."""
    if report.joint:
        return dict.fromkeys(HEADS, NOT_DEFINED) | {"op": percent(report.op)}
    return {
        "op": percent(report.op),
        "bwt": signed(report.bwt),
        "bwt_lopez_paz": signed(report.bwt_lopez_paz),
        "forgetting": signed(report.forgetting),
        "fwt": signed(report.fwt),
    }


def duration(seconds: float | None) -> str:
    """Seconds in the two largest units that matter: ``42.0 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds is None:
        return NOT_MEASURED
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def count(number: int | None) -> str:
    """A whole number with its thousands apart."""
    return NOT_MEASURED if number is None else f"{number:,}"


def covers(report: RunReport) -> str:
    """Which tasks the numbers cover: ``after all 8 tasks`` or ``after 3 of 8 tasks``."""
    total = len(report.tasks)
    if report.learned == total:
        return "after 1 task" if total == 1 else f"after all {total} tasks"
    return f"after {report.learned} of {total} tasks"


def heading(report: RunReport) -> str:
    """The title line of one run."""
    return marked(
        f"{report.method} on {report.model}", report.synthetic and not report.builtin_base
    )


def legends(reports: Sequence[RunReport]) -> list[str]:
    """A short and unique name for each run: its method where that tells them apart."""
    methods = Counter(report.method for report in reports)
    names = [
        report.method if methods[report.method] == 1 else f"{report.method} ({report.title})"
        for report in reports
    ]
    repeated = Counter(names)
    return [
        name if repeated[name] == 1 else f"{name} #{position}"
        for position, name in enumerate(names, start=1)
    ]


def finals(reports: Sequence[RunReport]) -> list[tuple[str, list[float | None]]]:
    """Each task any run has, with its final score in each run; tasks in order of appearance."""
    labels = {task.name: task.label for report in reports for task in report.tasks}
    by_run = [{task.name: task.final for task in report.tasks} for report in reports]
    return [(label, [scores.get(name) for scores in by_run]) for name, label in labels.items()]


def missing_lines(report: RunReport, most: int = 12) -> list[str]:
    """What was not measured, one line per row of R; the rest of a long list is counted."""
    grouped: dict[str, list[str]] = {}
    for after, task in report.missing:
        grouped.setdefault(after, []).append(task)
    lines = [
        f"{after}: {', '.join(tasks[:most])}"
        + (f" and {len(tasks) - most} more" * (len(tasks) > most))
        for after, tasks in grouped.items()
    ]
    if len(lines) > most:
        return [*lines[:most], f"and {len(lines) - most} more rows"]
    return lines


def notices(reports: Sequence[RunReport]) -> list[str]:
    """What a reader must know before comparing or quoting the numbers."""
    found: list[str] = []
    for report, name in zip(reports, legends(reports), strict=True):
        prefix = f"{name}: " if len(reports) > 1 else ""
        if report.status != "finished":
            found.append(
                f"{prefix}this run is not finished ({report.status}); numbers are {covers(report)}"
            )
        if report.joint:
            found.append(
                f"{prefix}all tasks were learned at once: BWT, forgetting and FWT are not defined "
                f"({NOT_DEFINED})"
            )
        if report.merged:
            found.append(f"{prefix}{_merged(report)}")
        found += [f"{prefix}{_routed(way)}" for way in report.routed]
        if report.limited_cells:
            many = (
                "1 score was"
                if report.limited_cells == 1
                else f"{report.limited_cells} scores were"
            )
            found.append(f"{prefix}{many} made with --limit; such scores enter no number")
    return found + _differences(reports)


def _merged(report: RunReport) -> str:
    """Which tasks share an adapter, and how far their weights moved when the last one came in."""
    shared = [
        " + ".join(tasks) + ("" if error is None else f" (error {error:.2g})")
        for tasks, error in report.merged
    ]
    return f"with own or route these tasks answer through one merged adapter: {'; '.join(shared)}"


def _routed(way: RoutedScores) -> str:
    """The numbers where each prompt is answered by the adapter of the task it looks like."""
    numbers = f"OP {percent(way.op)}"
    if way.bwt is not None:
        numbers += f", BWT {signed(way.bwt)}"
    return f"with {way.adapter}, where no task is named: {numbers}"


def _differences(reports: Sequence[RunReport]) -> list[str]:
    """In what the compared runs differ, where that makes their numbers hard to compare."""
    sides: dict[str, set[object]] = {
        "tasks or their order": {tuple(task.name for task in run.tasks) for run in reports},
        "number of tasks learned so far": {run.learned for run in reports},
        "model": {run.model for run in reports},
        "adapter mode": {run.mode for run in reports},
        "decoding": {run.decoding for run in reports if run.decoding is not None},
        "test rows": {tuple(task.rows for task in run.tasks) for run in reports},
    }
    differing = [what for what, values in sides.items() if len(values) > 1]
    return [f"the runs differ in: {', '.join(differing)}"] if differing else []
