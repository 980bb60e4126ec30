"""The engine's data path beside the papers' loop, over rows of real lengths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from treelora_cli.bench.arms import RowLoop, begin, new_method, task_context
from treelora_cli.bench.document import Column, Row, Table
from treelora_cli.bench.lengths import ROWS, lengths_for
from treelora_cli.bench.part import Part, Plan, Say
from treelora_cli.bench.shapes import LLAMA_1B, TINY, Shape, build, random_examples
from treelora_cli.bench.timing import alternate, compare, waiter
from treelora_cli.engine.batches import RowPlan
from treelora_cli.engine.forwards import Forwards
from treelora_cli.engine.training import TaskTrainer
from treelora_cli.models.encode import Example
from treelora_cli.recipe import OptimSection

ABOUT = (
    "Training over rows of TRACE's lengths through the engine, beside the papers' loop: a row a "
    "forward pass, logits over the whole prompt, gradients accumulated to the same optimizer step"
)

WIDE = Shape(256, 4, 8, 8, 704, 32_000)
METHOD = "seqlora"
"""Plain sequential training: what is compared is the data path, not a method."""


@dataclass(frozen=True, slots=True)
class Load:
    """What is trained on.

    Attributes:
        shape: the model.
        rows: rows a task, all in one optimizer step.
        passes: how often all tasks are trained on.
    """

    shape: Shape
    rows: int
    passes: int


def load(plan: Plan) -> Load:
    """Return shape and size for a device."""
    if plan.quick:
        return Load(TINY, 2, plan.times(1, 1))
    if plan.cuda:
        return Load(LLAMA_1B, ROWS, plan.times(6, 1))
    return Load(WIDE, ROWS, plan.times(1, 1))


class TaskPlan(RowPlan):
    """A task's rows in each step, task after task: a stream never mixes them in a step.

    Args:
        sizes: rows of each task; they are numbered through.
        passes: how often every task has its step.
    """

    def __init__(self, sizes: Sequence[int], passes: int) -> None:
        self.steps_per_epoch = len(sizes)
        self.steps = len(sizes) * passes
        numbers = iter(range(sum(sizes)))
        self._tasks = [[next(numbers) for _ in range(size)] for size in sizes]

    def rows(self, step: int) -> list[int]:
        """Return the rows of the step's task."""
        return self._tasks[step % len(self._tasks)]


def arms(
    plan: Plan, shape: Shape, examples: Sequence[Example], rows: RowPlan
) -> tuple[RowLoop, TaskTrainer]:
    """Return the papers' loop and the engine's trainer, on copies of the same weights.

    Args:
        plan: device and seed.
        shape: the model.
        examples: the rows.
        rows: which of them each step sees, in both.
    """
    optim = OptimSection()
    papers = RowLoop(build(shape, plan.device, plan.seed), examples, rows, optim)
    adapted = build(shape, plan.device, plan.seed)
    pad = adapted.backbone.tokenizer.pad_token_id
    forwards = Forwards(examples, rows, optim, pad, plan.device.type)
    method = new_method(METHOD, adapted, plan.seed)
    task = task_context(0, forwards, plan.seed, adapted)
    return papers, begin(method, adapted, task, forwards, optim)


def padding(forwards: Forwards, steps: Sequence[int]) -> float:
    """Return the share of padding among all positions that some steps compute."""
    batches = [batch for step in steps for batch in forwards.of(step)]
    real = sum(batch.tokens for batch in batches)
    return 1 - real / sum(batch.input_ids.numel() for batch in batches)


def run(plan: Plan, say: Say) -> Sequence[Table]:
    """Train over the rows in both ways, an optimizer step of each in turn."""
    lengths, size = lengths_for(plan.data, plan.model), load(plan)
    examples = random_examples(lengths.take(size.rows), size.shape.vocab, plan.seed)
    names = list(lengths.tasks)
    counts = [len(pairs[: size.rows]) for pairs in lengths.tasks.values()]
    # A device is warmed up with a whole pass; a processor needs none.
    warmup = len(names) if plan.cuda else 0
    rows = TaskPlan(counts, size.passes + bool(warmup))
    papers, trainer = arms(plan, size.shape, examples, rows)
    say(f"data: {len(examples)} rows, {rows.steps - warmup} optimizer steps in both ways")
    first, second = alternate(
        papers.step, trainer.advance, rows.steps - warmup, warmup=warmup, wait=waiter(plan.device)
    )
    trainer.drain()
    tokens = [sum(len(examples[row].tokens) for row in rows.rows(at)) for at in range(len(names))]
    found: list[Row] = []
    for at, name in enumerate(names):
        times = first[at :: len(names)], second[at :: len(names)]
        share = padding(trainer.forwards, [at])
        speeds = _speeds(tokens[at], *times, plan.seed)
        found.append({"task": name, "rows": counts[at], **speeds, "padding": share})
    whole = _passes(first, len(names)), _passes(second, len(names))
    share = padding(trainer.forwards, range(len(names)))
    speeds = _speeds(sum(tokens), *whole, plan.seed) | _memory(plan, papers, trainer)
    found.append({"task": "all", "rows": len(examples), **speeds, "padding": share})
    return [_table(plan, size, found, lengths.about)]


def _passes(seconds: Sequence[float], steps: int) -> list[float]:
    return [sum(seconds[at : at + steps]) for at in range(0, len(seconds), steps)]


def _speeds(tokens: int, first: Sequence[float], second: Sequence[float], seed: int) -> Row:
    """Return tokens a second of both ways, and how many times faster the second is."""
    found = compare(second, first, seed)
    return {
        "tokens": tokens,
        "papers_tokens_s": tokens / found.second,
        "engine_tokens_s": tokens / found.first,
        "speedup": found.ratio,
        "speedup_low": found.low,
        "speedup_high": found.high,
        "passes": found.pairs,
    }


def _memory(plan: Plan, papers: RowLoop, trainer: TaskTrainer) -> Row:
    """Return the peak device memory of one more pass in both ways, where it is known."""
    if not plan.cuda:
        return {}
    peaks = []
    trainer.step = papers.number = 0
    for work in (papers.step, trainer.advance):
        torch.cuda.reset_peak_memory_stats(plan.device)
        for _ in range(trainer.plan.steps_per_epoch):
            work()
        peaks.append(torch.cuda.max_memory_allocated(plan.device) / 1e6)
    trainer.drain()
    return {"papers_mb": peaks[0], "engine_mb": peaks[1]}


def _table(plan: Plan, size: Load, rows: list[Row], about: str) -> Table:
    columns = [
        Column("task", ("task",)),
        Column("rows", ("rows",)),
        Column("tokens", ("tokens",)),
        Column("papers' loop tokens/s", ("papers_tokens_s",), 0),
        Column("engine tokens/s", ("engine_tokens_s",), 0),
        Column("times faster", ("speedup", "speedup_low", "speedup_high"), 2),
        Column("passes", ("passes",)),
        Column("padding", ("padding",), 3),
    ]
    if plan.cuda:
        columns += [
            Column("papers' loop peak MB", ("papers_mb",), 0),
            Column("engine peak MB", ("engine_mb",), 0),
        ]
    notes = [
        f"Lengths: {about}. Tokens are random; one optimizer step a task, of all its rows. Padding "
        "is the engine's, a share of the positions computed; the papers' loop has none.",
        f"The output layer has {head_share(size.shape):.0%} of the multiplications of a token; the "
        "larger that share, the more is saved where logits are computed at answers alone.",
    ]
    if plan.cuda:
        notes.append("Both arms' models are held in either peak.")
    return Table("data", f"{size.shape}, {plan.device.type}", tuple(columns), rows, tuple(notes))


def head_share(shape: Shape) -> float:
    """Return the output layer's share of a token's multiplications (attention scores left out)."""
    head = shape.hidden * shape.vocab
    keys = shape.hidden * shape.kv_heads // shape.heads
    layer = 2 * shape.hidden**2 + 2 * shape.hidden * keys + 3 * shape.hidden * shape.intermediate
    return head / (head + shape.layers * layer)


PART = Part("data", ABOUT, run)
