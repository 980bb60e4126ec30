"""Score adapters on tasks: answer, measure, keep the answers, store the cell."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from treelora_cli.engine.shortage import evaluation_hint, explaining_shortage
from treelora_cli.engine.signals import StopFlag
from treelora_cli.engine.world import ALONE, World
from treelora_cli.models.adapted import MOST_BESIDE, AdaptedModel
from treelora_cli.models.encode import Encoder, encoder_for
from treelora_cli.models.generate import DECODING, Adapters, generate_batches
from treelora_cli.models.likelihood import choose_batches
from treelora_cli.models.snapshot import Snapshot
from treelora_cli.models.spread import ALL, Spread
from treelora_cli.recipe import DataSection, EvalSection
from treelora_cli.rundir import faults
from treelora_cli.rundir.atomic import write_file
from treelora_cli.rundir.jsonfile import dump_json, parse_object
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.scores import Cell, Scores
from treelora_cli.tasks.metrics import score
from treelora_cli.tasks.types import Task

EVALUATION_VERSION = 1
"""Counted up when prompts, decoding or metrics change; older cells are then computed again."""

BASE = "base"
LIKELIHOOD = "likelihood"
ROUND_BATCHES = 8
"""Tasks share batches until they fill so many; more would gain little and lose more to Ctrl-C."""

Emit = Callable[[str, dict[str, Any]], None]
Notes = Sequence[dict[str, Any]]

logger = logging.getLogger("treelora")


def build_encoder(adapted: AdaptedModel, data: DataSection) -> Encoder:
    """Return the encoder for the rows of a recipe.

    Raises:
        UsageError: prompt and answer together exceed the model's positions, or the tokenizer has
            no chat template and the recipe asks for it.
    """
    backbone = adapted.backbone
    return encoder_for(backbone.tokenizer, data, backbone.positions, encodes=backbone.encodes)


def has_labels(task: Task) -> bool:
    """Tell whether the whole answer is one of a closed set, so that labels can be compared."""
    return bool(task.labels) and task.reading == "whole"


def say_open_tasks(scoring: str, tasks: Iterable[Task]) -> None:
    """Say which tasks are generated although likelihood was asked for."""
    names = [task.name for task in tasks if not has_labels(task)]
    if scoring == LIKELIHOOD and names:
        logger.warning("no closed set of labels, answers are generated: %s", ", ".join(names))


@dataclass(frozen=True)
class Asked:
    """One cell of the score matrix that is wanted.

    Attributes:
        after: the last task trained, None for zero shot.
        task: what is asked.
        adapter: ``base``, ``latest``, ``own``, ``task:NAME``, or ``route`` in one of its ways.
        adapter_hash: identifies the weights that answer, and what chooses among them.
        place: index and name of the task whose folder keeps the answers; None: the run's own.
        split: which rows are asked.
        snapshot: the weights that answer; None: the live adapter, or none at all for ``base``.
    """

    after: str | None
    task: Task
    adapter: str
    adapter_hash: str
    place: tuple[int, str] | None = None
    split: str = "test"
    snapshot: Snapshot | None = field(default=None, repr=False)

    @property
    def prompts(self) -> list[str]:
        """The prompts of the rows that are asked."""
        return [row.prompt for row in self.task.splits[self.split]]


class Way(NamedTuple):
    """How rows are answered; those of equal ways may share batches.

    Attributes:
        decoding: ``greedy`` or ``likelihood``.
        longest: the most tokens generated; 0 where labels are compared.
        labels: what is compared.
        separator: the text before a label.
    """

    decoding: str
    longest: int
    labels: tuple[str, ...] = ()
    separator: str = ""


def _as_they_are(task: Task, prompts: Sequence[str]) -> list[str]:
    return list(prompts)


class Wanted(NamedTuple):
    """A cell to be computed: its place among those asked, and itself, not measured yet."""

    number: int
    asked: Asked
    cell: Cell


@dataclass
class Evaluator:
    """Evaluates adapters and keeps the cells.

    Answers are never computed twice: whatever cell of the run has the same weights, task, rows,
    decoding and code version gives its readings and its answers. The base and the fingerprint of
    each task are the same for all cells of a run, for both are checked whenever it is opened.

    Several processes do all of this together: each answers its part of the batches, all have the
    same cells, and the first looks into the run directory and writes.

    Attributes:
        adapted: the model.
        data: lengths of prompts and answers.
        plan: batches and scoring.
        run: the run directory; its lock is held.
        scores: the run's cells.
        limited: True if rows were cut by ``--limit``.
        emit: told of every new cell.
        stop: checked before every batch.
        questions: what a task's prompts are asked as; the base is asked them as they are.
        world: the processes that evaluate together.
        spread: how batches are shared out among them; by itself every process answers all.
    """

    adapted: AdaptedModel
    data: DataSection
    plan: EvalSection
    run: RunDir
    scores: Scores
    limited: bool
    emit: Emit
    stop: StopFlag
    questions: Callable[[Task, Sequence[str]], list[str]] = _as_they_are
    world: World = ALONE
    spread: Spread = ALL

    def cell(self, asked: Asked) -> Cell:
        """Return one cell; see :meth:`cells`."""
        return self.cells([asked])[0]

    def cells(self, asked: Iterable[Asked]) -> list[Cell]:
        """Return cells, computed unless the same adapter has answered the same rows before.

        Small tasks share batches, whichever adapters answer them.

        Args:
            asked: read one by one, so that only the adapters in work need to be in memory.

        Raises:
            Interrupted: a signal came; cells that were finished are kept.
        """
        found: dict[int, Cell] = {}
        waiting: dict[Way, list[Wanted]] = {}
        for number, one in enumerate(asked):
            way = self.way(one.task)
            wanted = self.unmeasured(one, way.decoding)
            known = self.known(one, wanted)
            if known is not None:
                found[number] = known
                continue
            group = waiting.setdefault(way, [])
            if group and not self._has_room(group, one):
                found |= self._answer(way, group)
                group.clear()
            group.append(Wanted(number, one, wanted))
        for way, group in waiting.items():
            found |= self._answer(way, group)
        return [found[number] for number in sorted(found)]

    def way(self, task: Task) -> Way:
        """Return how a task's rows are answered."""
        if self.plan.scoring == LIKELIHOOD and has_labels(task):
            return Way(LIKELIHOOD, 0, task.labels or (), task.separator)
        # One more than the answer's tokens: the end token is generated too.
        return Way(DECODING, min(task.max_answer_tokens, self.data.max_answer_tokens) + 1)

    def unmeasured(self, asked: Asked, decoding: str) -> Cell:
        """Return the cell that is asked for, without its score."""
        return Cell(
            after=asked.after,
            task=asked.task.name,
            adapter=asked.adapter,
            split=asked.split,
            rows=len(asked.task.splits[asked.split]),
            limited=self.limited,
            decoding=decoding,
            metric=asked.task.metric,
            score=0.0,
            scores={},
            adapter_hash=asked.adapter_hash,
            code=EVALUATION_VERSION,
        )

    def known(self, asked: Asked, wanted: Cell) -> Cell | None:
        """Return and keep the cell if its answers are there, under its own key or another one."""
        known = self.scores.get(wanted.key)
        if known is not None and known.source == wanted.source:
            return known
        same = self.scores.same_answers(wanted)
        answers = None if same is None else self._stored_lines(same)
        if same is None or answers is None:
            return None
        cell = replace(wanted, score=same.score, scores=same.scores)
        self._keep(asked, cell, answers)
        return cell

    def stored_answers(self, wanted: Cell) -> list[str] | None:
        """Return the answers of a cell with the same source, by row; None where there is none."""
        same = self.scores.same_answers(wanted)
        lines = None if same is None else self._stored_lines(same)
        if lines is None:
            return None
        try:
            said = [parse_object(line)["prediction"] for line in lines.splitlines()]
        except (ValueError, KeyError):
            return None
        return said if len(said) == wanted.rows else None

    def _stored_lines(self, cell: Cell) -> bytes | None:
        path = self._path(cell, self._place(cell.after))
        return self.world.agree(lambda: path.read_bytes() if path.is_file() else None)

    def _has_room(self, group: Sequence[Wanted], one: Asked) -> bool:
        rows = sum(wanted.cell.rows for wanted in group) + len(one.task.splits[one.split])
        return rows <= ROUND_BATCHES * self.plan.batch_size and len(group) < MOST_BESIDE

    def _answer(self, way: Way, group: Sequence[Wanted]) -> dict[int, Cell]:
        """Compute the cells of a group; each is kept as soon as its last row is answered."""
        owners = [(w, row) for w in range(len(group)) for row in range(group[w].cell.rows)]
        said: list[dict[int, str]] = [{} for _ in group]
        found = {}
        snapshots = {
            wanted.asked.adapter_hash: wanted.asked.snapshot
            for wanted in group
            if wanted.asked.snapshot is not None
        }
        prompts = [prompt for wanted in group for prompt in self.asks(wanted.asked)]
        alone = all(wanted.asked.adapter == BASE for wanted in group)
        with ExitStack() as stack:
            if alone:
                stack.enter_context(self.adapted.as_base())
            names = stack.enter_context(self.adapted.beside(list(snapshots.values())))
            slots = dict(zip(snapshots, names, strict=True))
            answering = None if alone else self._answering(group, slots)
            for batch in self.batches(way, prompts, answering):
                for index, text in batch.items():
                    at, row = owners[index]
                    said[at][row] = text
                for at in sorted({owners[index][0] for index in batch}):
                    wanted = group[at]
                    if len(said[at]) == wanted.cell.rows:
                        answers = [said[at][row] for row in range(wanted.cell.rows)]
                        found[wanted.number] = self.measure(wanted.asked, wanted.cell, answers)
        return found

    def asks(self, asked: Asked) -> list[str]:
        """Return the prompts of a cell as they are asked."""
        if asked.adapter == BASE:
            return asked.prompts
        return self.questions(asked.task, asked.prompts)

    def _answering(self, group: Sequence[Wanted], slots: dict[str, str]) -> Adapters | None:
        """Return who answers each row of a group; None: the live adapter answers all."""
        names: list[str | None] = []
        for wanted in group:
            asked = wanted.asked
            live = None if asked.adapter == BASE else self.adapted.live
            name = live if asked.snapshot is None else slots[asked.adapter_hash]
            names += [name] * wanted.cell.rows
        return None if set(names) == {self.adapted.live} else names

    def batches(
        self, way: Way, prompts: list[str], adapters: Adapters | None
    ) -> Iterator[dict[int, str]]:
        """Yield answers by the prompts' numbers: a batch, or one of every process, at a time.

        Args:
            way: how the prompts are answered.
            prompts: the texts.
            adapters: who answers each, a slot of ``AdaptedModel.beside``; None: the base alone;
                None for all: the live adapter answers.

        Raises:
            Interrupted: a signal came.
            EnvironmentProblem: memory ran out.
        """
        if self.spread.size == 1:
            yield from self._own_batches(way, prompts, adapters)
            return
        for mine in self._own_batches(way, prompts, adapters):
            yield {at: text for part in self.world.gather(mine) for at, text in part.items()}

    def _own_batches(
        self, way: Way, prompts: list[str], adapters: Adapters | None
    ) -> Iterator[dict[int, str]]:
        """Yield the answers of this process's batches."""
        encoder = build_encoder(self.adapted, self.data)

        def before_batch() -> None:
            faults.hit("eval.batch")
            self.stop.raise_if_set("stopped while evaluating")

        size, tokens = self.plan.batch_size, self.plan.batch_tokens
        with explaining_shortage("answering", partial(evaluation_hint, self.plan)):
            if way.decoding == LIKELIHOOD:
                yield from choose_batches(
                    self.adapted, encoder, prompts, way.labels, way.separator, size, before_batch,
                    batch_tokens=tokens, adapters=adapters, spread=self.spread,
                )  # fmt: skip
            else:
                yield from generate_batches(
                    self.adapted, encoder, prompts, way.longest, size, before_batch,
                    batch_tokens=tokens, adapters=adapters, spread=self.spread,
                )  # fmt: skip

    def measure(
        self, asked: Asked, cell: Cell, answers: list[str], notes: Notes | None = None
    ) -> Cell:
        """Score answers and keep them with their cell.

        Args:
            asked: what was asked.
            cell: as :meth:`unmeasured` gives it.
            answers: one per row.
            notes: what each row's line of answers says besides.
        """
        rows = asked.task.splits[asked.split]
        readings = score(asked.task, answers, rows)
        cell = replace(cell, score=readings["score"], scores=readings)
        lines = [
            dump_json(
                {"row": n, "prompt": row.prompt, "answer": row.answer, "prediction": said}
                | (notes[n] if notes else {}),
                indent=None,
            )
            for n, (row, said) in enumerate(zip(rows, answers, strict=True))
        ]
        self._keep(asked, cell, b"".join(lines))
        return cell

    def _keep(self, asked: Asked, cell: Cell, answers: bytes) -> None:
        """Write the answers, then the cell that they belong to, and tell of it."""
        self.scores.put(cell)
        if not self.world.first:
            return
        path = self._path(cell, asked.place)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, answers)
        self.scores.save(self.run.scores)
        told = ("after", "task", "adapter", "metric", "score", "rows")
        self.emit("evaluated", {name: asdict(cell)[name] for name in told})

    def _place(self, after: str | None) -> tuple[int, str] | None:
        """Return index and name of the task that a cell came after."""
        entry = None if after is None else self.run.info.task(after)
        return None if entry is None else (entry["index"], entry["name"])

    def _path(self, cell: Cell, place: tuple[int, str] | None) -> Path:
        path = self.run.predictions(place, cell.task, cell.adapter, cell.split)
        marks = [cell.decoding] if cell.decoding != DECODING else []
        marks += [f"limit-{cell.rows}"] if cell.limited else []
        return path.with_suffix("".join(f".{mark}" for mark in [*marks, "jsonl"]))
