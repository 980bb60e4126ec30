"""What training will take of memory, estimated before anything is loaded, and what there is."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from treelora_cli.engine.forwards import pass_tokens
from treelora_cli.models.encode import Encoder
from treelora_cli.models.outline import Outline
from treelora_cli.recipe import Recipe
from treelora_cli.tasks.types import Task

SHARING = "fsdp2"
"""The engine under which each process of a machine holds a part of the base."""
LOOKED_AT = 16
"""Rows of a task, those of most characters, of which the longest in tokens is taken."""


@dataclass(frozen=True)
class Need:
    """Memory of training in one process, in bytes.

    What a method holds of earlier tasks is not in it. For most it is no more than an adapter a
    task, which is little beside a base, and only the method knows.

    Attributes:
        state: base, adapter, gradients and Adam's moments; exact, but for a base that is shared
            out over the processes.
        activations: what a forward pass keeps for its backward pass; a soft bound, see
            ``models.footprint``.
        logits: of the positions where answers are predicted, with their gradient.
    """

    state: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.state + self.activations + self.logits


@dataclass(frozen=True)
class Group:
    """The processes that train together.

    Attributes:
        size: how many there are.
        here: how many of them are on this machine.
    """

    size: int = 1
    here: int = 1

    @classmethod
    def launched(cls) -> Group:
        """Return the group as a launcher left it in the environment; one process where none did."""
        # torchrun and --nproc say the first of these, deepspeed's launcher the other.
        return cls(_told("WORLD_SIZE"), _told("LOCAL_WORLD_SIZE", "LOCAL_SIZE"))


def training_need(sizes: Outline, recipe: Recipe, longest: int, group: Group | None = None) -> Need:
    """Estimate what training takes.

    Args:
        sizes: of the model.
        recipe: the run's.
        longest: tokens of the longest training row, as cut.
        group: the processes that train together; None: as they were launched.
    """
    group = group or Group.launched()
    optim, rows = recipe.optim, pass_rows(sizes, recipe, longest, group)
    answer = min(recipe.data.max_answer_tokens, longest) + 1
    kept = sizes.layers.activation_bytes(
        rows * longest,
        longest,
        sizes.itemsize,
        dropout=recipe.lora.dropout > 0,
        checkpointing=optim.gradient_checkpointing,
    )
    state = sizes.training_bytes
    if recipe.processes.engine == SHARING and group.here > 1:
        # Its part of the base, and a layer that is gathered.
        part = sizes.base_bytes // group.here + sizes.base_bytes // sizes.layers.layers
        state -= max(0, sizes.base_bytes - part)
    return Need(state, kept, rows * answer * len(sizes.tokenizer) * 4 * 2)


def pass_rows(sizes: Outline, recipe: Recipe, longest: int, group: Group | None = None) -> int:
    """Return the most rows of a forward pass that are all as long as the longest.

    Of several processes each has its share of a step's rows.
    """
    optim = recipe.optim
    group = group or Group.launched()
    limit = pass_tokens(optim, torch.device(sizes.device).type) or longest * optim.batch_size
    share = -(-optim.batch_size // group.size)
    return min(optim.micro_batch_size, share, max(1, limit // longest))


def sharers(device: str, group: Group | None = None) -> int:
    """Return how many processes take their memory from the same place; each has a GPU of its own.

    They are counted as if none shared anything. In truth the host holds a base once for all where
    torch maps it from its file, which it does if the file has the dtype that is asked for.
    """
    return 1 if device.startswith("cuda") else (group or Group.launched()).here


def _told(*names: str) -> int:
    """Return a number of processes that a launcher left in the environment; 1 where none did."""
    said = (os.environ.get(name, "") for name in names)
    return next((max(1, int(text)) for text in said if text.isdecimal()), 1)


def free_memory(device: str, group: Group | None = None) -> int | None:
    """Return the bytes that are free where a model would live; None where nobody says.

    On the host it is what Linux calls available, or less where a container has a limit; and of
    that an equal share for each of the processes that were launched together here.
    """
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    known = [room for room in (_container_room(), _available()) if room is not None]
    return min(known) // sharers(device, group) if known else None


def _available() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(found[0]) * 1024 if found else None


def _container_room(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Return what a container may still take: its limit less what is used and not a cache."""
    try:
        limit = int((folder / "memory.max").read_text(encoding="ascii"))
        used = int((folder / "memory.current").read_text(encoding="ascii"))
        stat = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):  # no such file, or "max": no limit
        return None
    cache = [int(line.split()[1]) for line in stat if line.startswith("inactive_file ")]
    return max(0, limit - used + sum(cache))


def own_memory(device: str) -> int:
    """Return the bytes that this process has taken of it."""
    if device.startswith("cuda"):
        return int(torch.cuda.memory_reserved(torch.device(device)))
    try:
        pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    except OSError:
        return 0
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def longest_row(tasks: Sequence[Task], encoder: Encoder) -> int:
    """Return the tokens of the longest training row, as cut; most often exactly.

    A row is tokenised only if it is among its task's longest in characters.
    """
    longest = 1
    for task in tasks:
        rows = sorted(task.splits["train"], key=lambda row: -len(row.prompt) - len(row.answer))
        for row in rows[:LOOKED_AT]:
            example = encoder.example(row.prompt, row.answer, task.separator)
            longest = max(longest, len(example.tokens))
    return longest


def size(count: int) -> str:
    """Return bytes as people read them."""
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:,.1f} {unit}"
        value /= 1024
    return f"{value:,.1f} GiB"
