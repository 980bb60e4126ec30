"""The processes that train together: torch's process group, joined as a launcher set it up.

``torchrun``, ``deepspeed`` and our own ``--nproc`` all tell a process who it is by the same
variables of its environment. Without them a process is alone, and nothing here costs anything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from treelora_cli.errors import EnvironmentProblem
from treelora_cli.models.spread import ALL, Spread

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long the others wait while the first process scores or writes; a dead one is noticed."""
TRAINING = timedelta(minutes=30)
"""How long a process waits for the others within a step."""


@dataclass(frozen=True)
class World:
    """The process group as one of its processes sees it.

    Attributes:
        rank: its number, from 0.
        size: how many processes there are.
        local_rank: its number on its machine, which is that of its accelerator.
        quiet: gloo's group for waiting and for small Python values; None alone.
        sharded: whether the base is shared out: every process then makes all forward passes that
            another one makes.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    quiet: Any = None
    sharded: bool = False

    @property
    def first(self) -> bool:
        """Whether this process writes, scores and speaks."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    def under(self, engine: str) -> World:
        """Return the world as it is under an engine of the recipe."""
        return replace(self, sharded=engine == "fsdp2" and not self.alone)

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum of all processes' values, in place; the same bits everywhere."""
        if not self.alone:
            with noticing():
                dist.all_reduce(values)
        return values

    @property
    def spread(self) -> Spread:
        """How methods' own work on rows, and answering, is spread over the processes."""
        return ALL if self.sharded else Spread(self.rank, self.size, self.sum)

    def largest(self, value: int) -> int:
        """Return the largest of all processes' numbers; the host waits for them."""
        if self.alone:
            return value
        found = torch.tensor(value)
        with noticing():
            dist.all_reduce(found, dist.ReduceOp.MAX, group=self.quiet)
        return int(found)

    def gather(self, value: Any) -> list[Any]:
        """Return every process's value, by rank."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.size
        with noticing():
            dist.all_gather_object(found, value, group=self.quiet)
        return found

    def agree(self, find: Callable[[], T]) -> T:
        """Return what the first process finds; the others do not look."""
        found: list[Any] = [find() if self.first else None]
        if not self.alone:
            with noticing():
                dist.broadcast_object_list(found, src=0, group=self.quiet)
        agreed: T = found[0]
        return agreed

    def wait(self) -> None:
        """Wait until all processes are here."""
        if not self.alone:
            with noticing():
                dist.barrier(group=self.quiet)


ALONE = World()


@contextmanager
def noticing() -> Iterator[None]:
    """Turn a broken process group into one line.

    Raises:
        EnvironmentProblem: another process has ended or cannot be reached.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise  # a RuntimeError too, but of this process alone
    except (RuntimeError, dist.DistError) as error:
        # torch puts the place in its own sources first, in brackets; last what its authors guess.
        said = str(error).partition("\n")[0].rpartition("cc:")[2].partition("]")[2].strip()
        said = said.partition(". ")[0]
        raise EnvironmentProblem(
            "another process of the group has ended or cannot be reached"
            + (f" ({said[:120]})" if said else ""),
            "see what it said; the same command goes on from what is stored",
        ) from None


@contextmanager
def joined(expected: int | None = None) -> Iterator[World]:
    """Join the process group that the launcher made, if one did; leave it at the end.

    Args:
        expected: how many processes were asked for; None: as many as there are.

    Raises:
        EnvironmentProblem: the group is not as large as was asked for, or cannot be made.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if expected is not None and size != expected:
        raise EnvironmentProblem(
            f"{expected} processes were asked for, but the launcher started {size}",
            "give --nproc alone, or start with torchrun and without --nproc",
        )
    if size == 1:
        yield ALONE
        return
    local = int(os.environ.get("LOCAL_RANK", "0"))
    cuda = torch.cuda.is_available()
    if cuda:
        if local >= torch.cuda.device_count():
            raise EnvironmentProblem(
                f"process {local} of this machine has no GPU: there are "
                f"{torch.cuda.device_count()}",
                "start as many processes as there are GPUs",
            )
        torch.cuda.set_device(local)
    with noticing():
        dist.init_process_group("cuda:nccl,cpu:gloo" if cuda else "gloo", timeout=TRAINING)
    try:
        with noticing():
            quiet = dist.new_group(backend="gloo", timeout=PATIENCE)
        world = World(dist.get_rank(), dist.get_world_size(), local, quiet)
        _check(world, size)
        yield world
    finally:
        dist.destroy_process_group()


def _check(world: World, size: int) -> None:
    """Check that every process is another one and knows as many as there are.

    Launchers exist that start one process, or give all of them the same rank, without a word.

    Raises:
        EnvironmentProblem: that is not so.
    """
    found = world.gather((world.rank, world.size, os.getpid(), os.uname().nodename))
    ranks = sorted(rank for rank, *_ in found)
    processes = {(pid, node) for *_, pid, node in found}
    if world.size != size or ranks != list(range(size)) or len(processes) != size:
        raise EnvironmentProblem(
            f"the process group is not what the launcher announced: {size} processes announced, "
            f"ranks {ranks}, {len(processes)} of them apart",
            "start with torchrun, deepspeed or --nproc",
        )
