"""Answer rows through adapters that differ from row to row, each answer computed once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, TypeVar

from treelora_cli.engine.adapters import Place, load_adapters
from treelora_cli.engine.evaluation import BASE, ROUND_BATCHES, Asked, Evaluator, Notes, Way
from treelora_cli.engine.routes import Sent, Traffic
from treelora_cli.engine.store import snapshot_hash
from treelora_cli.models.adapted import MOST_BESIDE
from treelora_cli.models.snapshot import Snapshot
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.scores import Cell
from treelora_cli.tasks.types import Task

T = TypeVar("T")


class Shelf:
    """The adapters of finished tasks by what identifies them; few are in memory at a time.

    Tasks that were merged share an adapter, and its identity.

    Args:
        run: the run directory.
        places: index and name of the tasks.

    Attributes:
        places: as given.
        identities: of each task's adapter, in the order of ``places``.
        base: the identity of the base.

    Raises:
        RunDirError: a file is missing or not as it was written.
    """

    def __init__(self, run: RunDir, places: Sequence[Place]) -> None:
        self._run = run
        self._at: dict[str, Place] = {}
        self.places = list(places)
        self.base = run.info.base_fingerprint
        self.identities: list[str] = []
        for some in _few(places):
            for place, snapshot in zip(some, load_adapters(run, some), strict=True):
                self.identities.append(snapshot_hash(snapshot))
                self._at.setdefault(self.identities[-1], place)

    def take(self, identities: Sequence[str]) -> list[Snapshot]:
        """Return adapters, at most ``MOST_BESIDE``."""
        return load_adapters(self._run, [self._at[identity] for identity in identities])


@dataclass(frozen=True)
class RoutedCell:
    """A cell whose rows are answered by different adapters.

    Attributes:
        asked: the cell; its ``adapter_hash`` identifies all that decides the answers.
        adapters: the identity of each row's adapter, or that of the base.
        notes: what each row's line of answers says besides.
    """

    asked: Asked
    adapters: Sequence[str]
    notes: Notes


def routed_cell(
    traffic: Traffic, shelf: Shelf, learned: int, task: Task, sent: Sent, split: str
) -> RoutedCell:
    """Return the cell of a task whose rows were routed among the first tasks.

    Args:
        traffic: routed them.
        shelf: the adapters of all tasks that it knows.
        learned: how many tasks they were routed among.
        task: whose rows.
        sent: where they go.
        split: which rows.
    """
    place = shelf.places[learned - 1]
    identity = traffic.identity(learned, shelf.identities)
    asked = Asked(place[1], task, traffic.adapter, identity, place, split)
    indices = sent.indices.tolist()
    # An index of -1 is the base.
    answering = [*shelf.identities, shelf.base]
    called = [*traffic.names, BASE]
    notes = [
        {"routed": called[index], "confidence": round(confidence, 6)}
        for index, confidence in zip(indices, sent.confidence.tolist(), strict=True)
    ]
    return RoutedCell(asked, [answering[index] for index in indices], notes)


class Row(NamedTuple):
    """One question to one adapter."""

    adapter: str
    task: str
    number: int


@dataclass
class _Round:
    """Cells that wait for answers, and the questions that are open."""

    cells: list[tuple[int, RoutedCell, Cell]] = field(default_factory=list)
    open: dict[Row, str] = field(default_factory=dict)


class RoutedEvaluator:
    """Evaluates cells of many adapters.

    What an adapter has answered before, in whatever cell of the run, is not computed again.

    Args:
        evaluator: answers, scores and keeps.
        shelf: the adapters.
        split: the rows of all cells that are asked.
    """

    def __init__(self, evaluator: Evaluator, shelf: Shelf, split: str) -> None:
        self._evaluator = evaluator
        self._shelf = shelf
        self._split = split
        self._said: dict[Row, str] = {}
        self._looked_up: set[tuple[str, str]] = set()

    def cells(self, asked: Sequence[RoutedCell]) -> list[Cell]:
        """Return cells in the order asked; those of one task best stand together.

        Raises:
            Interrupted: a signal came; cells that were finished are kept.
        """
        found: dict[int, Cell] = {}
        rounds: dict[Way, _Round] = {}
        most = ROUND_BATCHES * self._evaluator.plan.batch_size
        for number, one in enumerate(asked):
            way = self._evaluator.way(one.asked.task)
            wanted = self._evaluator.unmeasured(one.asked, way.decoding)
            known = self._evaluator.known(one.asked, wanted)
            if known is not None:
                found[number] = known
                continue
            waiting = rounds.setdefault(way, _Round())
            waiting.cells.append((number, one, wanted))
            waiting.open |= self._unanswered(one, wanted)
            if not waiting.open or len(waiting.open) >= most:
                found |= self._finish(way, rounds.pop(way))
        for way, waiting in rounds.items():
            found |= self._finish(way, waiting)
        return [found[number] for number in range(len(asked))]

    def remember(self, one: RoutedCell) -> None:
        """Take over the answers of a cell, if it is stored."""
        way = self._evaluator.way(one.asked.task)
        wanted = self._evaluator.unmeasured(one.asked, way.decoding)
        said = self._evaluator.stored_answers(wanted) or ()
        for number, (adapter, text) in enumerate(zip(one.adapters, said, strict=False)):
            self._said[Row(adapter, wanted.task, number)] = text

    def _unanswered(self, one: RoutedCell, wanted: Cell) -> dict[Row, str]:
        prompts = one.asked.prompts
        for adapter in dict.fromkeys(one.adapters):
            self._look_up(replace(wanted, adapter_hash=adapter))
        rows = (Row(adapter, wanted.task, n) for n, adapter in enumerate(one.adapters))
        return {row: prompts[row.number] for row in rows if row not in self._said}

    def _look_up(self, wanted: Cell) -> None:
        """Take over what an adapter said when it was asked all rows of a task."""
        if (wanted.adapter_hash, wanted.task) in self._looked_up:
            return
        self._looked_up.add((wanted.adapter_hash, wanted.task))
        for number, text in enumerate(self._evaluator.stored_answers(wanted) or ()):
            self._said[Row(wanted.adapter_hash, wanted.task, number)] = text

    def _finish(self, way: Way, waiting: _Round) -> dict[int, Cell]:
        """Answer what is open, then score the cells."""
        self._answer(way, waiting.open)
        found = {}
        for number, one, wanted in waiting.cells:
            answers = [self._said[Row(a, wanted.task, n)] for n, a in enumerate(one.adapters)]
            found[number] = self._evaluator.measure(one.asked, wanted, answers, one.notes)
        return found

    def _answer(self, way: Way, questions: dict[Row, str]) -> None:
        """Ask in as many turns as it takes to have no more adapters at once than fit."""
        adapters = list(dict.fromkeys(row.adapter for row in questions))
        for some in _few(adapters):
            rows = [row for row in questions if row.adapter in some]
            loaded = [adapter for adapter in some if adapter != self._shelf.base]
            with self._evaluator.adapted.beside(self._shelf.take(loaded)) as slots:
                names = dict(zip(loaded, slots, strict=True))
                prompts = [questions[row] for row in rows]
                answering = [names.get(row.adapter) for row in rows]
                for batch in self._evaluator.batches(way, prompts, answering):
                    self._said.update({rows[at]: text for at, text in batch.items()})


def _few(items: Sequence[T]) -> Iterator[Sequence[T]]:
    """Yield the items in parts of as many as there may be adapters beside the live one."""
    return (items[at : at + MOST_BESIDE] for at in range(0, len(items), MOST_BESIDE))
