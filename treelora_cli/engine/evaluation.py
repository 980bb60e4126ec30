"""Score adapters on tasks: generate, measure, keep the answers, store the cell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from treelora_cli.engine.signals import StopFlag
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import Encoder, encoder_for
from treelora_cli.models.forward import DECODING, generate
from treelora_cli.recipe import DataSection
from treelora_cli.rundir import faults
from treelora_cli.rundir.atomic import write_file
from treelora_cli.rundir.jsonfile import dump_json
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.scores import Cell, Scores
from treelora_cli.tasks.metrics import score
from treelora_cli.tasks.types import Task

BASE = "base"
Emit = Callable[[str, dict[str, Any]], None]


def build_encoder(adapted: AdaptedModel, data: DataSection) -> Encoder:
    """Return the encoder for the rows of a recipe.

    Raises:
        UsageError: prompt and answer together exceed the model's positions, or the tokenizer has
            no chat template and the recipe asks for it.
    """
    return encoder_for(adapted.backbone.tokenizer, data, adapted.backbone.positions)


@dataclass(frozen=True)
class Asked:
    """One cell of the score matrix that is wanted.

    Attributes:
        after: the last task trained, None for zero shot.
        task: what is asked.
        adapter: ``base``, ``latest``, ``own`` or ``task:NAME``.
        adapter_hash: identifies the weights that answer.
        place: index and name of the task whose folder keeps the answers; None: the run's own.
        split: which rows are asked.
    """

    after: str | None
    task: Task
    adapter: str
    adapter_hash: str
    place: tuple[int, str] | None = None
    split: str = "test"


@dataclass
class Evaluator:
    """Evaluates the live adapter and keeps the cells.

    Attributes:
        adapted: the model.
        data: lengths of prompts and answers.
        batch_size: prompts a batch.
        run: the run directory; its lock is held.
        scores: the run's cells.
        limited: True if rows were cut by ``--limit``.
        emit: told of every new cell.
        stop: checked before every batch.
    """

    adapted: AdaptedModel
    data: DataSection
    batch_size: int
    run: RunDir
    scores: Scores
    limited: bool
    emit: Emit
    stop: StopFlag

    def cell(self, asked: Asked) -> Cell:
        """Return a cell, computed unless the same adapter has answered the same rows before.

        Raises:
            Interrupted: a signal came; cells that were finished are kept.
        """
        rows = asked.task.splits[asked.split]
        empty = self._cell(asked, len(rows), 0.0, {})
        known = self.scores.get(empty.key)
        if known is not None and known.adapter_hash == asked.adapter_hash:
            return known
        predictions = self._answers(asked, [row.prompt for row in rows])
        readings = score(asked.task, predictions, rows)
        cell = self._cell(asked, len(rows), readings["score"], readings)
        self._keep_answers(asked, predictions)
        self.scores.put(cell)
        self.scores.save(self.run.scores)
        self.emit(
            "evaluated",
            {
                "after": asked.after,
                "task": asked.task.name,
                "adapter": asked.adapter,
                "metric": asked.task.metric,
                "score": cell.score,
                "rows": cell.rows,
            },
        )
        return cell

    def _cell(self, asked: Asked, rows: int, value: float, readings: dict[str, float]) -> Cell:
        return Cell(
            after=asked.after,
            task=asked.task.name,
            adapter=asked.adapter,
            split=asked.split,
            rows=rows,
            limited=self.limited,
            decoding=DECODING,
            metric=asked.task.metric,
            score=value,
            scores=readings,
            adapter_hash=asked.adapter_hash,
        )

    def _answers(self, asked: Asked, prompts: list[str]) -> list[str]:
        encoder = build_encoder(self.adapted, self.data)

        def before_batch() -> None:
            faults.hit("eval.batch")
            self.stop.raise_if_set(f"stopped while evaluating {asked.task.name}")

        # One more than the answer's tokens: the end token is generated too.
        longest = min(asked.task.max_answer_tokens, self.data.max_answer_tokens) + 1
        if asked.adapter == BASE:
            with self.adapted.peft.disable_adapter():
                return generate(
                    self.adapted, encoder, prompts, longest, self.batch_size, before_batch
                )
        return generate(self.adapted, encoder, prompts, longest, self.batch_size, before_batch)

    def _keep_answers(self, asked: Asked, predictions: list[str]) -> None:
        path = self.run.predictions(asked.place, asked.task.name, asked.adapter, asked.split)
        if self.limited:
            path = path.with_suffix(f".limit-{len(predictions)}.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = asked.task.splits[asked.split]
        lines = [
            dump_json(
                {"row": n, "prompt": row.prompt, "answer": row.answer, "prediction": said},
                indent=None,
            )
            for n, (row, said) in enumerate(zip(rows, predictions, strict=True))
        ]
        write_file(path, b"".join(lines))
