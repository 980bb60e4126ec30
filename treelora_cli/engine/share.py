"""Each process's share of a step: its own rows, and as many forward passes as all others make."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from treelora_cli.engine.forwards import Forwards
from treelora_cli.engine.world import World
from treelora_cli.errors import EnvironmentProblem
from treelora_cli.models.encode import Batch, Example


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward pass.

    Attributes:
        batch: on the host.
        counts: False for a pass that only keeps step with the other processes; its loss counts 0.
    """

    batch: Batch
    counts: bool = True


@dataclass(frozen=True, slots=True)
class StepShare:
    """What one process reads in one optimizer step.

    Attributes:
        passes: at least one, as many as every other process makes.
        answer_tokens: those of the whole step, over all processes.
        tokens: real tokens of the whole step.
    """

    passes: list[Pass]
    answer_tokens: int
    tokens: int

    def to(self, device: torch.device) -> StepShare:
        """Return the share with its batches on a device."""
        on_device = [replace(one, batch=one.batch.to(device)) for one in self.passes]
        return replace(self, passes=on_device)


def share_of(forwards: Forwards, step: int, world: World) -> StepShare:
    """Return a process's share of a step.

    A step's rows go to the processes in turn. Gradients are reduced in every pass, so all must
    make equally many: where one has fewer, its first pass is made again and counts nothing.

    Args:
        forwards: the task's batches.
        step: from 0, over all epochs.
        world: the processes.
    """
    if world.alone:
        batches = forwards.of(step)
        return StepShare(
            [Pass(batch) for batch in batches],
            sum(batch.answer_tokens for batch in batches),
            sum(batch.tokens for batch in batches),
        )
    rows = [forwards.examples[row] for row in forwards.plan.rows(step)]
    parts = [rows[rank :: world.size] for rank in range(world.size)]
    most = max(forwards.passes(part) for part in parts if part)
    mine = parts[world.rank]
    passes = [Pass(batch) for batch in forwards.batches(mine)] if mine else []
    idle = Pass(passes[0].batch if passes else forwards.batches(rows[:1])[0], counts=False)
    passes += [idle] * (most - len(passes))
    return StepShare(passes, sum(map(_answer_tokens, rows)), sum(len(row.tokens) for row in rows))


def _answer_tokens(row: Example) -> int:
    return len(row.tokens) - row.answer_start


def check_shares(forwards: Forwards, world: World) -> None:
    """Check, on the first step's rows, that each process has rows of its own and none is missing.

    Raises:
        EnvironmentProblem: two processes would read the same rows, or some would be read by none.
    """
    if world.alone:
        return
    rows = forwards.plan.rows(0)
    found: list[Sequence[int]] = world.gather(rows[world.rank :: world.size])
    if sorted(row for part in found for row in part) != sorted(rows):
        raise EnvironmentProblem(
            "the processes do not share out the rows of a step: are they of the same run?",
            "start all of them with the same command",
        )
