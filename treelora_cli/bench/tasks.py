"""Step time, task start and memory of ``treelora`` against the number of earlier tasks."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import replace

import torch

from treelora_cli.bench.arms import PlainLoop
from treelora_cli.bench.document import Column, Row, Table
from treelora_cli.bench.machine import resident_bytes
from treelora_cli.bench.memory import fits, learn_one, remember_many
from treelora_cli.bench.part import Part, Plan, Say
from treelora_cli.bench.shapes import build
from treelora_cli.bench.step import COLUMNS, OPTIM, Bench, benches, measured, time_method
from treelora_cli.methods.base import TaskMemory
from treelora_cli.models.adapted import AdaptedModel

METHOD = "treelora"
ABOUT = f"A step of {METHOD} and what it holds in memory, as the number of earlier tasks grows"
COUNTS = (1, 10, 100, 1_000, 10_000)
QUICK = (1, 10, 100)
MB = 1e6

CPU_NOTE = (
    "Host memory is the growth of the resident set while the stored signatures are read and the "
    "steps are timed; on a CPU it is the device's as well, so that the two cannot be told apart."
)
CUDA_NOTE = (
    "Device memory is torch.cuda.max_memory_allocated over the timed steps, both arms' models "
    "included; host memory is the growth of the resident set."
)


def run(plan: Plan, say: Say) -> Sequence[Table]:
    """Time steps with more and more earlier tasks."""
    bench = benches(plan)[0]
    bench = replace(bench, pairs=plan.times(100, 8), limit=20.0)
    examples = bench.rows.examples(bench.shape.vocab, plan.seed)
    plain = PlainLoop(build(bench.shape, plan.device, plan.seed), examples, OPTIM)
    adapted = build(bench.shape, plan.device, plan.seed)
    _, memory = learn_one(METHOD, adapted, examples, OPTIM, plan.seed)
    rows: list[Row] = []
    notes = [_shape_note(memory), CUDA_NOTE if plan.cuda else CPU_NOTE]
    for count in QUICK if plan.quick else COUNTS:
        if not fits(memory, count):
            notes.append(f"{count:,} tasks do not fit into this machine's memory.")
            continue
        say(f"tasks: {count:,} earlier tasks")
        rows.append(_row(plan, bench, plain, adapted, memory, count))
    return [_table(plan, bench, rows, notes)]


def _shape_note(memory: TaskMemory) -> str:
    if memory.tree is None:
        raise RuntimeError(f"{METHOD} left no tree")
    tensors = memory.tree.tensors
    values, blocks = tensors["values"], len(tensors["widths"])
    return (
        f"A signature has {values.shape[1]:,} entries in {blocks} blocks ({values.nbytes:,} bytes)."
    )


def _row(
    plan: Plan,
    bench: Bench,
    plain: PlainLoop,
    adapted: AdaptedModel,
    memory: TaskMemory,
    count: int,
) -> Row:
    gc.collect()
    before = resident_bytes()
    method = remember_many(METHOD, adapted, memory, count, plan.seed)
    if plan.cuda:
        torch.cuda.reset_peak_memory_stats(plan.device)
    timed = time_method(plan, bench, plain, method, adapted, count)
    gc.collect()
    after = resident_bytes()
    grown = None if before is None or after is None else (after - before) / MB
    device = torch.cuda.max_memory_allocated(plan.device) / MB if plan.cuda else None
    return {
        "earlier": count,
        **measured(timed.comparison),
        "slowest_ms": 1000 * timed.slowest,
        "start_ms": 1000 * timed.start,
        "host_mb": grown,
        "device_mb": device,
    }


def _table(plan: Plan, bench: Bench, rows: list[Row], notes: list[str]) -> Table:
    columns = [
        Column("earlier tasks", ("earlier",)),
        *COLUMNS,
        Column("slowest step ms", ("slowest_ms",), 1),
        Column("task start ms", ("start_ms",), 0),
        Column("host MB", ("host_mb",), 0),
    ]
    if plan.cuda:
        columns.append(Column("device MB", ("device_mb",), 0))
    title = f"{METHOD}, {bench.shape}, {bench.rows}, {plan.device.type}"
    return Table("tasks", title, tuple(columns), rows, tuple(notes))


PART = Part("tasks", ABOUT, run)
