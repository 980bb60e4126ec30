"""What a report says about one run, as plain data: every format is made from this and no file."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

SYNTHETIC = "built-in, synthetic"
"""How everything that ships with the package is marked wherever it is named."""


JOINT = "joint"
"""The mode of a run that trains all its tasks at once."""


@dataclass(frozen=True, slots=True)
class LossPoint:
    """The training loss at one optimizer step.

    Attributes:
        step: counted from 1 within the task.
        loss: the task loss, without penalty.
    """

    step: int
    loss: float


@dataclass(frozen=True, slots=True)
class RoutedScores:
    """The numbers of a run whose adapters were chosen by the looks of each prompt.

    Attributes:
        adapter: in which way, as scores.json names it: ``route[:THRESHOLD][:stripped]``.
        op: overall performance.
        bwt: backward transfer, the TreeLoRA paper's sign; None unless its history was scored.
        bwt_lopez_paz: backward transfer, Lopez-Paz & Ranzato's sign.
    """

    adapter: str
    op: float
    bwt: float | None
    bwt_lopez_paz: float | None


@dataclass(frozen=True, slots=True)
class TaskReport:
    """One task of the stream; None where something was not measured or not recorded.

    Attributes:
        name: the task's name.
        status: ``pending``, ``training``, ``trained`` or ``finished``.
        metric: how its answers are scored.
        language: ``en``, ``de``, ``zh``, ``code`` or ``und``.
        synthetic: True for generated data.
        label: the name, with a mark where the data are synthetic.
        own: score just after the task was learned, R[j][j].
        final: score after the last learned task, R[N][j].
        zero_shot: score before any training.
        chance: what guessing would score.
        rows: test rows behind the scores.
        train_seconds: wall-clock seconds of training.
        evaluate_seconds: wall-clock seconds of evaluation.
        steps: optimizer steps.
        trainable_parameters: numbers that training could change.
        loss: the loss curve; thinned to a few hundred points.
    """

    name: str
    status: str = "pending"
    metric: str | None = None
    language: str | None = None
    synthetic: bool = False
    label: str = ""
    own: float | None = None
    final: float | None = None
    zero_shot: float | None = None
    chance: float | None = None
    rows: int | None = None
    train_seconds: float | None = None
    evaluate_seconds: float | None = None
    steps: int | None = None
    trainable_parameters: int | None = None
    loss: tuple[LossPoint, ...] = ()

    @property
    def change(self) -> float | None:
        """Final minus own score; negative is forgetting."""
        return None if self.own is None or self.final is None else self.final - self.own


DIFFERENCE, OWN = "difference", "own"
"""What a task's own part of the weight change is; see :class:`Evidence`."""
Pairs = tuple[tuple[float | None, ...], ...]
"""A number of every two tasks, symmetric; None where one of them changed nothing."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What each task added to the weights, and how what two tasks added meets.

    What the numbers are: ``treelora_cli.models.evidence``.

    Attributes:
        part: what a task's own part is: ``difference`` of the weights after it and before it, or
            the ``own`` adapter's change.
        threshold: above how many root mean squares an entry counts as changed.
        entries: the entries of all adapted modules.
        places: the tasks that were compared, by their place in the stream, from 0.
        names: their names.
        notes: which tasks or weights are not in the numbers, and why.
        norm: Frobenius norm of each task's part.
        nuclear: its nuclear norm, summed over the modules.
        density: the share of its entries that count as changed.
        collision: the share of entries that count in both; the density on the diagonal.
        cosine: the cosine of the two parts.
        overlap: how far both read the same inputs.
    """

    part: str
    threshold: float
    entries: int
    places: tuple[int, ...]
    names: tuple[str, ...]
    notes: tuple[str, ...]
    norm: tuple[float, ...]
    nuclear: tuple[float, ...]
    density: tuple[float, ...]
    collision: Pairs
    cosine: Pairs
    overlap: Pairs

    def pairs(self, key: str) -> list[tuple[int, int, float]]:
        """Return a number of every two tasks i > j (places in ``names``) that have one."""
        rows: Pairs = getattr(self, key)
        cells = [(i, j, rows[i][j]) for i in range(len(rows)) for j in range(i)]
        return [(i, j, value) for i, j, value in cells if value is not None]

    def mean(self, key: str) -> float | None:
        """Return a number's mean over tasks or over pairs of tasks; of the cosine its size's."""
        if key in ("norm", "nuclear", "density"):
            values = list(getattr(self, key))
        else:
            values = [abs(value) for _, _, value in self.pairs(key)]
        return fmean(values) if values else None


@dataclass(frozen=True, slots=True)
class RunReport:
    """One run; None where a number needs a cell that was not measured.

    Attributes:
        path: the run directory as the user gave it.
        title: a short name of the run for tables and legends.
        status: ``running``, ``finished``, ``interrupted`` or ``failed``.
        method: the method's name.
        model: the backbone as the user gave it, with a mark where it is the built-in one.
        builtin_base: the backbone is the one that ships with the package.
        builtin_data: the tasks are the ones that ship with the package.
        seed: the run's seed.
        mode: the adapter mode of every number in this report.
        decoding: how answers were generated; None without cells.
        tasks: all tasks of the stream, in order.
        learned: how many of them the numbers cover (N).
        matrix: N rows of one score per task of the stream.
        op_curve: OP_1 … OP_N.
        op: overall performance.
        bwt: backward transfer, the TreeLoRA paper's sign.
        bwt_lopez_paz: backward transfer, Lopez-Paz & Ranzato's sign.
        forgetting: Chaudhry's forgetting.
        fwt: forward transfer.
        missing: places (after, task) of cells that a number needs and that were not measured.
        limited_cells: cells made with ``--limit``, which enter no number.
        limited_matrix: as matrix, from those cells; only where matrix has no score at all.
        train_seconds: sum over the tasks.
        evaluate_seconds: sum over the tasks.
        tree: the tree document, None for a method without a tree.
        recipe: the resolved recipe as text.
        versions: package versions.
        command: the command line that repeats the run.
        settings: what the recipe sets, by dotted name, without the seed.
        origin: what the run learned from and how it answers, as text to compare.
        merged: the merged adapters: the tasks that each answers for, and its last merge's error.
        routed: the same numbers where no task is named, for every way of routing that was scored.
        evidence: what the tasks added to the weights; None where it was not asked for.
    """

    path: str
    title: str
    status: str
    method: str
    model: str
    builtin_base: bool
    builtin_data: bool
    seed: int | None
    mode: str
    decoding: str | None
    tasks: tuple[TaskReport, ...]
    learned: int
    matrix: tuple[tuple[float | None, ...], ...]
    op_curve: tuple[float | None, ...]
    op: float | None
    bwt: float | None
    bwt_lopez_paz: float | None
    forgetting: float | None
    fwt: float | None
    missing: tuple[tuple[str, str], ...] = ()
    limited_cells: int = 0
    limited_matrix: tuple[tuple[float | None, ...], ...] = ()
    train_seconds: float | None = None
    evaluate_seconds: float | None = None
    tree: dict[str, Any] | None = None
    recipe: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    command: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    origin: str = ""
    merged: tuple[tuple[tuple[str, ...], float | None], ...] = ()
    routed: tuple[RoutedScores, ...] = ()
    evidence: Evidence | None = None

    @property
    def synthetic(self) -> bool:
        """True when the model or any task is built in or generated."""
        return self.builtin_base or self.builtin_data or any(t.synthetic for t in self.tasks)

    @property
    def joint(self) -> bool:
        """True where all tasks were learned at once: R has a last row and no others."""
        return self.mode == JOINT

    def at_a_glance(self) -> RunReport | None:
        """The same run with the scores of few rows in the matrix, to look at; None without."""
        if not self.limited_matrix:
            return None
        tasks = tuple(replace(task, zero_shot=None) for task in self.tasks)
        return replace(self, matrix=self.limited_matrix, tasks=tasks)

    @property
    def total_seconds(self) -> float | None:
        """Training and evaluation together; None when neither was recorded."""
        known = [s for s in (self.train_seconds, self.evaluate_seconds) if s is not None]
        return sum(known) if known else None

    @property
    def trainable_parameters(self) -> int | None:
        """The most that any one task trained."""
        counts = [t.trainable_parameters for t in self.tasks if t.trainable_parameters is not None]
        return max(counts, default=None)
