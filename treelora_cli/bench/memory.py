"""Methods that have learned tasks already: one by training, thousands by synthetic signatures."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from treelora_cli.bench.arms import begin, new_method, task_context
from treelora_cli.bench.machine import free_bytes
from treelora_cli.bench.shapes import SameRows
from treelora_cli.engine.forwards import Forwards
from treelora_cli.methods.base import Method, StoredTask, TaskMemory, TreeRecord
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import Example
from treelora_cli.models.snapshot import Snapshot
from treelora_cli.recipe import OptimSection
from treelora_cli.tree.nodes import GradientTree, Group
from treelora_cli.tree.serial import to_document
from treelora_cli.tree.signatures import SignatureBank

SPREAD = 0.25
"""Standard deviation of a synthetic signature about the trained one, in units of its own."""

_CHUNK = 256


def learn_one(
    name: str, adapted: AdaptedModel, examples: Sequence[Example], optim: OptimSection, seed: int
) -> tuple[Method, TaskMemory]:
    """Train one task of two steps; return the method, which remembers it, and what it stored.

    Raises:
        UsageError: the method does not fit the model.
    """
    method = new_method(name, adapted, seed)
    plan = SameRows(len(examples), 2)
    pad = adapted.backbone.tokenizer.pad_token_id
    forwards = Forwards(examples, plan, optim, pad)
    trainer = begin(method, adapted, task_context(0, forwards, seed, adapted), forwards, optim)
    trainer.advance()
    trainer.advance()
    trainer.drain()
    adapted.peft.eval()
    memory, answer = method.end_task(trainer.task), adapted.answer()
    method.install([StoredTask(0, trainer.task.name, memory, lambda: answer)])
    return method, memory


def remember_many(
    name: str, adapted: AdaptedModel, one: TaskMemory, count: int, seed: int
) -> Method:
    """Return the method with many earlier tasks, read back as from a run directory.

    Their signatures are the trained one's with noise and stand in a balanced tree; every task has
    the live adapter.

    Args:
        name: a method whose tasks leave a tree.
        adapted: the model.
        one: what the method stored of a task it trained.
        count: how many tasks.
        seed: of the noise.

    Raises:
        ValueError: the method stores no tree.
    """
    if one.tree is None:
        raise ValueError(f"{name} stores no tree")
    method = new_method(name, adapted, seed)
    values = synthetic_values(one.tree.tensors["values"][0], count, seed, adapted.device)
    snapshot = adapted.snapshot()
    method.restore(list(_stored(one, values, lambda: snapshot)))
    return method


def fits(one: TaskMemory, count: int) -> bool:
    """Whether so many synthetic tasks fit into free host memory, with the copies made of them."""
    free = free_bytes()
    if one.tree is None or free is None:
        return True
    return 4 * count * one.tree.tensors["values"].nbytes < free


def synthetic_values(centre: Tensor, count: int, seed: int, device: torch.device) -> Tensor:
    """Return signatures, float32 [count, F] on the host: the centre's entries with noise.

    Args:
        centre: [F].
        count: how many.
        seed: of the noise.
        device: where the noise is drawn.
    """
    generator = torch.Generator(device).manual_seed(seed)
    around = centre.to(device)
    scale = SPREAD * float(centre.std())
    values = torch.empty(count, len(centre))
    for start in range(0, count, _CHUNK):
        part = values[start : start + _CHUNK]
        noise = torch.randn(part.shape, generator=generator, device=device)
        part.copy_(around + scale * noise)
    return values


def _stored(
    one: TaskMemory, values: Tensor, adapter: Callable[[], Snapshot]
) -> Iterator[StoredTask]:
    """Give the tasks; the last one's document has the tree over all, the others' is not used."""
    record = one.tree
    if record is None:
        raise ValueError("without a tree there are no signatures to make more of")
    names = [f"synthetic-{number}" for number in range(len(values))]
    for number, name in enumerate(names):
        tensors = record.tensors | {"values": values[number : number + 1]}
        last = number == len(names) - 1
        document = _document(record, names) if last else record.document
        memory = TaskMemory(one.tensors, one.info, TreeRecord(document, tensors))
        yield StoredTask(number, name, memory, adapter)


def _document(record: TreeRecord, names: Sequence[str]) -> dict[str, Any]:
    widths = tuple(record.tensors["widths"].tolist())
    shown = SignatureBank(
        tuple(names),
        torch.zeros(1, 1).expand(len(names), sum(widths)),
        widths,
        torch.zeros(1, 1).expand(len(names), len(widths)),
    )
    return to_document(balanced_tree(len(names)), shown)


def balanced_tree(count: int) -> GradientTree:
    """Return a tree that halves the tasks by their order, as a good split of equal tasks would.

    Args:
        count: how many tasks, at least one.
    """
    return GradientTree(_halved(range(count)), "principal", "spread")


def _halved(tasks: range) -> Group:
    if len(tasks) == 1:
        return Group(tuple(tasks))
    half = (len(tasks) + 1) // 2
    sides = (_halved(tasks[:half]), _halved(tasks[half:]))
    return Group(tuple(tasks), sides, "index", 0, None, 1.0, 0.5, 0.0)
