"""How the evidence per pair of tasks is written: its words, its numbers, its tables.

What the numbers are and where they come from: ``treelora_cli.models.evidence``.
"""

from __future__ import annotations

from collections.abc import Sequence

from treelora_cli.report.groups import Group, Spread, spread
from treelora_cli.report.model import DIFFERENCE, OWN, Evidence
from treelora_cli.report.words import NOT_MEASURED, count

TASK_KEYS = ("density", "norm", "nuclear")
"""The numbers of a task."""

PAIR_KEYS = ("collision", "overlap", "cosine")
"""The numbers of a pair of tasks."""

TITLE = "What each task added to the weights"

EVIDENCE_HEADS = {
    "density": "density, %",
    "norm": "norm",
    "nuclear": "nuclear norm",
    "collision": "collision, %",
    "overlap": "input overlap",
    "cosine": "cosine",
}
"""What each number is called in tables."""

MEANINGS = {
    "density": "share of the entries of ΔW that count as changed",
    "norm": "Frobenius norm of ΔW",
    "nuclear": "sum of the singular values of ΔW, over the modules",
    "collision": "share of the entries that count as changed in both",
    "overlap": "|U Vᵀ|² / (|U Uᵀ| |V Vᵀ|), U and V the two ΔW: 0 where no input is read by both, "
    "1 where both read the same inputs alike",
    "cosine": "<U, V> / (|U| |V|), U and V the two ΔW: 0 where they are orthogonal",
}
"""What each number means, in one line."""

MEANS_TITLE = "What the tasks added to the weights"
MEANS_MEANING = "Means over tasks (density and norms) and over pairs of tasks (the others)."
MEAN_HEADS = EVIDENCE_HEADS | {"cosine": "|cosine|"}
"""What the mean of each number is called: of the cosine it is that of its size."""

_PARTS = {
    DIFFERENCE: "ΔW of a task is the weight change after it less that after the task before it",
    OWN: "ΔW of a task is the weight change that its own adapter makes",
}


def compared(evidence: Evidence) -> str:
    """What is compared, in one or two sentences."""
    said = f"{_PARTS[evidence.part]}, over {count(evidence.entries)} entries of the adapted modules"
    return f"{said}. {counted(evidence)}"


def counted(evidence: Evidence) -> str:
    """Which entries count as changed."""
    if not evidence.threshold:
        return "An entry counts as changed where it is not 0."
    said = (
        f"An entry counts as changed above {evidence.threshold:g} of the root mean square of its "
        "task’s ΔW"
    )
    left = 100 * evidence.threshold**2
    if left < 100:
        said += f": those below hold less than {left:.3g} % of its squared norm"
    return f"{said}."


def figure_title(key: str) -> str:
    """The title of the picture of a number of two tasks."""
    name, comma, unit = EVIDENCE_HEADS[key].partition(",")
    return f"{name.capitalize()} of two tasks{comma}{unit}"


def sentence(key: str) -> str:
    """What a number means, with a capital and a full stop."""
    text = MEANINGS[key]
    return f"{text[0].upper()}{text[1:]}."


def shown(key: str, value: float | None) -> str:
    """A number as printed: a share in percent with three digits, the cosine with its sign."""
    if value is None:
        return NOT_MEASURED
    if key in ("density", "collision"):
        return _share(100 * value)
    if key in ("norm", "nuclear"):
        return f"{value:#.4g}" if value < 1000 else f"{value:,.0f}"
    text = f"{value:+.3f}" if key == "cosine" else f"{value:.3f}"
    # Rounding leaves a sign that says nothing.
    return text if float(text) else "0.000"


def _share(percent: float) -> str:
    if 0 < percent < 0.001:
        return "<0.001"
    return f"{percent:.1f}" if percent >= 10 else f"{percent:.3g}"


def task_rows(evidence: Evidence) -> list[tuple[int, str, list[str]]]:
    """One row for each task: its number in the stream, its name, the numbers of TASK_KEYS."""
    columns = [getattr(evidence, key) for key in TASK_KEYS]
    return [
        (
            place + 1,
            name,
            [shown(key, column[i]) for key, column in zip(TASK_KEYS, columns, strict=True)],
        )
        for i, (place, name) in enumerate(zip(evidence.places, evidence.names, strict=True))
    ]


def means_line(evidence: Evidence) -> str:
    """The means over tasks and over pairs, in one line."""
    tasks = ", ".join(_named_mean(evidence, key) for key in TASK_KEYS)
    if len(evidence.names) < 2:
        return f"Mean over tasks: {tasks}."
    pairs = ", ".join(_named_mean(evidence, key) for key in PAIR_KEYS)
    return f"Mean over tasks: {tasks}; over pairs: {pairs}."


def _named_mean(evidence: Evidence, key: str) -> str:
    name, comma, unit = MEAN_HEADS[key].partition(", ")
    return f"{name} {_mean_shown(key, evidence.mean(key))}{' ' if comma else ''}{unit}"


def _mean_shown(key: str, value: float | None) -> str:
    return shown(key, value).lstrip("+")


def means(group: Group) -> dict[str, Spread | None]:
    """The means over tasks or pairs of a group's runs, over its seeds; empty without evidence."""
    known = [run.evidence for run in group.counted if run.evidence and run.evidence.names]
    if not known:
        return {}
    return {key: spread(one.mean(key) for one in known) for key in (*TASK_KEYS, *PAIR_KEYS)}


def means_cells(group: Group) -> list[str]:
    """A group's means as printed, what ΔW is and then as MEAN_HEADS; empty without evidence."""
    found = means(group)
    cells = [_plus_minus(key, value) for key, value in found.items()]
    return [_part(group), *cells] if found else []


def means_rows(groups: Sequence[Group]) -> list[tuple[Group, list[str]]]:
    """The groups that have evidence, each with its means as printed."""
    rows = [(group, means_cells(group)) for group in groups]
    return [(group, cells) for group, cells in rows if cells]


def _part(group: Group) -> str:
    parts = {run.evidence.part for run in group.counted if run.evidence is not None}
    return ", ".join(sorted(parts))


def _plus_minus(key: str, value: Spread | None) -> str:
    if value is None:
        return NOT_MEASURED
    mean = _mean_shown(key, value.mean)
    return mean if value.std is None else f"{mean} ± {_mean_shown(key, value.std)}"
