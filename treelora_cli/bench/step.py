"""One optimizer step of every method beside plain PEFT LoRA."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from treelora_cli.bench.arms import PlainLoop, begin, task_context
from treelora_cli.bench.document import Column, Row, Table
from treelora_cli.bench.memory import fits, learn_one, remember_many
from treelora_cli.bench.part import Part, Plan, Say
from treelora_cli.bench.shapes import LLAMA_1B, SMALL, TINY, Rows, SameRows, Shape, build
from treelora_cli.bench.timing import Comparison, alternate, compare, waiter
from treelora_cli.engine.forwards import Forwards
from treelora_cli.errors import UsageError
from treelora_cli.methods import registry
from treelora_cli.methods.base import Method
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.recipe import OptimSection

ABOUT = (
    "One optimizer step through the engine, of every method with its default settings, over the "
    "same step of plain PEFT LoRA on the same weights and rows"
)

OPTIM = OptimSection()
MANY = 10_000
WARMUP = 5


@dataclass(frozen=True, slots=True)
class Bench:
    """A shape at which steps are timed.

    Attributes:
        key: its name in the JSON document.
        shape: the model.
        rows: the rows of a step.
        pairs: how many pairs are timed.
        steps: steps a timed chunk.
        limit: seconds a row of the table may take.
    """

    key: str
    shape: Shape
    rows: Rows
    pairs: int
    steps: int
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Timed:
    """A method's steps, timed beside plain ones.

    Attributes:
        comparison: plain first, the method second; seconds a step.
        slowest: the method's slowest timed chunk, seconds a step.
        start: seconds to begin the task.
    """

    comparison: Comparison
    slowest: float
    start: float


def benches(plan: Plan) -> list[Bench]:
    """Return the shapes to time at: a short step that shows overhead, and a real one."""
    if plan.quick:
        return [Bench("short", TINY, Rows(1, 24, 8), plan.times(8, 8), 1)]
    if plan.cuda:
        pairs = plan.times(40, 40)
        short, real = Rows(1, 24, 8), Rows(8, 480, 32)
        return [Bench("short", LLAMA_1B, short, pairs, 10), Bench("real", LLAMA_1B, real, pairs, 5)]
    # Two hundred real steps of every method take an hour: they are timed where asked for.
    limit = None if plan.repeat else 15.0
    return [
        Bench("short", SMALL, Rows(1, 24, 8), plan.times(200, 8), 1),
        Bench("real", SMALL, Rows(4, 112, 16), plan.times(200, 8), 1, limit),
    ]


def time_method(
    plan: Plan, bench: Bench, plain: PlainLoop, method: Method, adapted: AdaptedModel, index: int
) -> Timed:
    """Time a method's steps beside plain ones.

    Args:
        plan: seed and device.
        bench: rows and how often.
        plain: the other arm, on its own copy of the weights.
        method: holds ``index`` earlier tasks.
        adapted: the model the method has met.
        index: the task's place in the stream.
    """
    examples = bench.rows.examples(bench.shape.vocab, plan.seed)
    steps = (WARMUP + bench.pairs) * bench.steps
    pad = adapted.backbone.tokenizer.pad_token_id
    rows = SameRows(len(examples), steps)
    forwards = Forwards(examples, rows, OPTIM, pad, plan.device.type)
    task = task_context(index, forwards, plan.seed, adapted)
    began = time.perf_counter()
    trainer = begin(method, adapted, task, forwards, OPTIM)
    start = time.perf_counter() - began
    first, second = alternate(
        plain.step,
        trainer.advance,
        bench.pairs,
        warmup=WARMUP,
        steps=bench.steps,
        wait=waiter(plan.device),
        limit=bench.limit,
    )
    trainer.drain()
    return Timed(compare(first, second, plan.seed), max(second), start)


def measured(comparison: Comparison) -> Row:
    """Return the entries of a row that every comparison of steps has."""
    return {
        "plain_ms": 1000 * comparison.first,
        "method_ms": 1000 * comparison.second,
        "ratio": comparison.ratio,
        "ratio_low": comparison.low,
        "ratio_high": comparison.high,
        "pairs": comparison.pairs,
    }


COLUMNS = (
    Column("plain ms", ("plain_ms",), 2),
    Column("method ms", ("method_ms",), 2),
    Column("ratio", ("ratio", "ratio_low", "ratio_high"), 3),
    Column("pairs", ("pairs",)),
)


def run(plan: Plan, say: Say) -> Sequence[Table]:
    """Time every method at every shape."""
    known = registry()
    names = list(plan.methods) if plan.methods is not None else known.names()
    names = [name for name in names if known.get(name).trains]
    return [_table(plan, bench, names, say) for bench in benches(plan)]


def _table(plan: Plan, bench: Bench, names: Sequence[str], say: Say) -> Table:
    examples = bench.rows.examples(bench.shape.vocab, plan.seed)
    plain = PlainLoop(build(bench.shape, plan.device, plan.seed), examples, OPTIM)
    rows: list[Row] = []
    notes: list[str] = []
    for name in names:
        try:
            rows += _rows(plan, bench, plain, name, say)
        except UsageError as error:
            notes.append(f"{name} does not fit: {error.message}.")
    columns = (Column("method", ("method",)), Column("earlier tasks", ("earlier",)), *COLUMNS)
    title = f"{bench.shape}, {bench.rows}, {plan.device.type}"
    return Table(bench.key, title, columns, rows, tuple(notes))


def _rows(plan: Plan, bench: Bench, plain: PlainLoop, name: str, say: Say) -> list[Row]:
    adapted = build(bench.shape, plan.device, plan.seed, registry().get(name).build)
    examples = bench.rows.examples(bench.shape.vocab, plan.seed)
    method, memory = learn_one(name, adapted, examples, OPTIM, plan.seed)
    found: list[Row] = []
    keeps = memory.tree is not None or bool(memory.tensors)
    say(f"step: {name}, {bench.rows}")
    timed = time_method(plan, bench, plain, method, adapted, 1)
    found.append({"method": name, "earlier": 1 if keeps else None, **measured(timed.comparison)})
    many = 200 if plan.quick else MANY
    if memory.tree is not None and fits(memory, many):
        say(f"step: {name}, {bench.rows}, {many:,} earlier tasks")
        method = remember_many(name, adapted, memory, many, plan.seed)
        timed = time_method(plan, bench, plain, method, adapted, many)
        found.append({"method": name, "earlier": many, **measured(timed.comparison)})
    return found


PART = Part("step", ABOUT, run)
