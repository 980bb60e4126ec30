"""Runs that differ only in their seed, taken together: mean and sample standard deviation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

from treelora_cli.report.metrics import DEFINITIONS
from treelora_cli.report.model import RunReport
from treelora_cli.report.words import HEADS, NOT_DEFINED, NOT_MEASURED, percent, signed

MOST_DIFFERENCES = 3
"""So many settings tell groups of one method apart in their names; further ones are counted."""


@dataclass(frozen=True, slots=True)
class Spread:
    """A number over several seeds.

    Attributes:
        mean: the mean of the runs that have it.
        std: their sample standard deviation (n - 1 in the denominator); None for one run.
        n: how many runs have it.
    """

    mean: float
    std: float | None
    n: int


@dataclass(frozen=True, slots=True)
class Group:
    """Runs of one method under the same settings.

    Attributes:
        name: the method, with the settings that tell it from other groups of the same method.
        runs: all of them, in the order given.
        counted: those that enter the numbers: one for each seed, as far along as any.
    """

    name: str
    runs: tuple[RunReport, ...]
    counted: tuple[RunReport, ...]

    @property
    def first(self) -> RunReport:
        """A run that stands for what all share: method, model, adapter mode, tasks."""
        return self.counted[0]

    @property
    def left_out(self) -> list[RunReport]:
        """The runs that do not enter the numbers."""
        counted = {id(run) for run in self.counted}
        return [run for run in self.runs if id(run) not in counted]

    @property
    def n(self) -> int:
        """How many runs enter the numbers."""
        return len(self.counted)

    @property
    def title(self) -> str:
        """The name with the number of runs."""
        return f"{self.name} (n = {self.n})"

    @property
    def synthetic(self) -> bool:
        """True when the model or any task is built in or generated."""
        return any(run.synthetic for run in self.runs)

    def number(self, key: str) -> Spread | None:
        """One of the numbers of :data:`treelora_cli.report.metrics.DEFINITIONS`."""
        return spread(getattr(run, key) for run in self.counted)

    def finals(self) -> dict[str, Spread | None]:
        """The final score on each task, by its name."""
        return {
            task.name: spread(run.tasks[j].final for run in self.counted)
            for j, task in enumerate(self.first.tasks)
        }

    def op_curve(self) -> tuple[Spread | None, ...]:
        """OP_1 … OP_N."""
        return tuple(
            spread(run.op_curve[n] for run in self.counted) for n in range(self.first.learned)
        )


def spread(values: Iterable[float | None]) -> Spread | None:
    """Mean and sample standard deviation of the values that are there; None without any."""
    known = [value for value in values if value is not None]
    if not known:
        return None
    return Spread(fmean(known), stdev(known) if len(known) > 1 else None, len(known))


def grouped(reports: Sequence[RunReport]) -> list[Group]:
    """Group runs that differ only in their seed, in the order of their first run."""
    found: dict[tuple[str, tuple[tuple[str, str], ...]], list[RunReport]] = {}
    for report in reports:
        key = (report.origin, tuple(sorted(report.settings.items())))
        found.setdefault(key, []).append(report)
    members = list(found.values())
    names = _names([runs[0] for runs in members])
    return [
        Group(name, tuple(runs), _counted(runs)) for name, runs in zip(names, members, strict=True)
    ]


def repeated(groups: Sequence[Group]) -> bool:
    """True where any group holds more than one run: only then do groups say more than runs."""
    return any(len(group.runs) > 1 for group in groups)


def _counted(runs: Sequence[RunReport]) -> tuple[RunReport, ...]:
    """A run that is not as far would shift the mean; a seed run twice is one observation."""
    furthest = max(run.learned for run in runs)
    seeds: set[int] = set()
    counted = []
    for run in runs:
        if run.learned < furthest or run.seed in seeds:
            continue
        counted.append(run)
        if run.seed is not None:
            seeds.add(run.seed)
    return tuple(counted)


def _names(firsts: Sequence[RunReport]) -> list[str]:
    methods = Counter(run.method for run in firsts)
    names = []
    for run in firsts:
        others = [other for other in firsts if other.method == run.method]
        differences = _differences(run, others) if methods[run.method] > 1 else ""
        names.append(f"{run.method} ({differences})" if differences else run.method)
    times = Counter(names)
    return [
        name if times[name] == 1 else f"{name} #{position}"
        for position, name in enumerate(names, start=1)
    ]


def _differences(run: RunReport, others: Sequence[RunReport]) -> str:
    """The settings of a run in which not all others agree with it; sections only where needed."""
    keys = [
        key
        for key in dict.fromkeys(key for other in others for key in other.settings)
        if len({other.settings.get(key) for other in others}) > 1
    ]
    ends = Counter(key.rpartition(".")[2] for key in keys)
    differing = []
    for key in keys:
        end = key.rpartition(".")[2]
        name = end if ends[end] == 1 else key
        differing.append(f"{name}={run.settings.get(key, NOT_MEASURED)}")
    if len({other.model for other in others}) > 1:
        differing.insert(0, run.model)
    shown = differing[:MOST_DIFFERENCES]
    if len(differing) > len(shown):
        shown.append(f"{len(differing) - len(shown)} more")
    return ", ".join(shown)


def plus_minus(value: Spread | None, digits: int = 2, *, sign: bool = False) -> str:
    """Write ``54.77 ± 1.23``, times 100; one run has no deviation."""
    if value is None:
        return NOT_MEASURED
    mean = signed(value.mean, digits) if sign else percent(value.mean, digits)
    return mean if value.std is None else f"{mean} ± {percent(value.std, digits)}"


def printed(group: Group, digits: int = 2) -> dict[str, str]:
    """The numbers of a group as printed, by key."""
    shown = {key: plus_minus(group.number(key), digits, sign=key != "op") for key in HEADS}
    return dict.fromkeys(HEADS, NOT_DEFINED) | {"op": shown["op"]} if group.first.joint else shown


def final_rows(groups: Sequence[Group]) -> list[tuple[str, list[Spread | None]]]:
    """Each task any group has, with its final score in each; tasks in order of appearance."""
    labels = {task.name: task.label for group in groups for task in group.first.tasks}
    finals = [group.finals() for group in groups]
    return [(label, [scores.get(name) for scores in finals]) for name, label in labels.items()]


def explained(groups: Sequence[Group]) -> str:
    """One line that says what stands before and behind ±."""
    counts = sorted({group.n for group in groups})
    seeds = f"n = {counts[0]}" if len(counts) == 1 else "n as given"
    return (
        f"mean ± sample standard deviation (n - 1) over runs that differ only in the seed, {seeds}"
    )


def group_notices(groups: Sequence[Group]) -> list[str]:
    """Which runs do not enter the numbers of their group, and which numbers lack runs."""
    found = []
    for group in groups:
        behind = [run.path for run in group.runs if run.learned < group.first.learned]
        if behind:
            found.append(f"{group.name}: not as far as the others, left out: {', '.join(behind)}")
        twice = [run.path for run in group.left_out if run.path not in behind]
        if twice:
            found.append(
                f"{group.name}: a seed that is there already, left out: {', '.join(twice)}"
            )
        for key in DEFINITIONS:
            number = group.number(key)
            if number is not None and number.n < group.n:
                found.append(f"{group.name}: {HEADS[key]} covers {number.n} of {group.n} runs")
    return found
