"""What a part of the benchmark is, and how a run of it is bounded."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from treelora_cli.bench.document import Table

Say = Callable[[str], None]
"""Told, in a line, what is being measured now."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How to measure.

    Attributes:
        device: where models live.
        quick: smallest shapes and a few repetitions: a first look, not a result.
        seed: of weights, tokens, signatures and the bootstrap.
        repeat: repetitions of every measurement, in place of a part's own number.
        methods: the methods of ``step``; None: all.
        data: the user's own tasks, for the lengths of ``data`` and ``eval`` (None: those of TRACE
            that come along), and to train ``ablation`` on.
        model: hub id or folder of the tokenizer that those lengths are counted with, and of the
            base of ``ablation``.
        recipe: what ``ablation`` trains by.
        seeds: of the runs of ``ablation``.
        split: what ``ablation`` is scored on, ``eval`` or ``test``.
        folder: where ``ablation`` keeps its runs.
        settings: the settings of ``ablation``; None: those that come along.
        only: names of the settings that are run; None: all.
    """

    device: torch.device
    quick: bool = False
    seed: int = 0
    repeat: int | None = None
    methods: tuple[str, ...] | None = None
    data: Path | None = None
    model: str | None = None
    recipe: str = "trace-small"
    seeds: tuple[int, ...] = (1, 2, 3)
    split: str = "eval"
    folder: Path = Path("ablation")
    settings: Path | None = None
    only: tuple[str, ...] | None = None

    @property
    def cuda(self) -> bool:
        """Whether models live on a CUDA device."""
        return self.device.type == "cuda"

    def times(self, usual: int, quick: int) -> int:
        """Return how often to measure."""
        if self.repeat is not None:
            return self.repeat
        return quick if self.quick else usual


@dataclass(frozen=True, slots=True)
class Part:
    """One part: a question and the measurement that answers it.

    Attributes:
        name: as written on the command line.
        about: what is compared with what, for the reader of the tables.
        run: measures; returns the tables.
    """

    name: str
    about: str
    run: Callable[[Plan, Say], Sequence[Table]]
