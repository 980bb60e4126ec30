"""What the gradient tree costs to build, extend and search, and what the search gains."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from treelora_cli.bench.document import Column, Row, Table
from treelora_cli.bench.machine import free_bytes
from treelora_cli.bench.part import Part, Plan, Say
from treelora_cli.bench.smooth import GAMMA, bank_of, smooth_values
from treelora_cli.bench.timing import repeated
from treelora_cli.tree.build import build_tree, update_tree
from treelora_cli.tree.penalty import PathTargets
from treelora_cli.tree.scopes import DEFAULT_C, make_search
from treelora_cli.tree.search import FlatSearch, RandomSearch, Search, TreeSearch
from treelora_cli.tree.synthetic import SmoothTree, play, regret, smooth_tree, steps_until

ABOUT = (
    "The gradient tree over smooth synthetic signatures, on the host: what building, adding a "
    "task, beginning one and a step cost, and how soon the search finds the nearest tasks"
)
BLOCKS, ENTRIES = 8, 32_768
COUNTS = (64, 256, 1_024, 10_000)
REBUILD = "auto"
ADDED = 5
"""Tasks added one by one; the first makes room for the others, as happens now and then."""
LIMIT = 60.0
"""Seconds a build may be expected to take; beyond it a size is left out, and said so."""

GAMES = (64, 256, 1_024)
C = 2.0
SEEDS = 6
NOISE = 0.1
STEPS = 1_000

T = TypeVar("T")


def run(plan: Plan, say: Say) -> Sequence[Table]:
    """Time the tree at every size, then let the searches play."""
    return [_costs(plan, say), _games(plan, say)]


def _costs(plan: Plan, say: Say) -> Table:
    rows: list[Row] = []
    notes = [
        f"Signatures of {ENTRIES:,} entries in {BLOCKS} blocks, gamma {GAMMA}. Adding a task: bank "
        f"and tree, with tree.rebuild={REBUILD} (with always it is built anew). A step: choose, "
        "compare, learn, fetch the target; its mean holds first visits of large groups, whose "
        "means are worked out then. All distances: what search=exhaustive looks at in every "
        "step instead."
    ]
    expected = 0.0
    for count in (16, 64) if plan.quick else COUNTS:
        if rows:
            expected = (
                float(rows[-1]["build_s"] or 0) * (count / int(rows[-1]["tasks"] or 1)) ** 1.2
            )
        free = free_bytes()
        if expected > LIMIT or (free is not None and 16 * count * ENTRIES * 2 > free):
            notes.append(
                f"{count:,} tasks were left out: too large for this machine's memory, or building "
                f"was expected to take {expected:,.0f} s."
            )
            continue
        say(f"tree: {count:,} tasks")
        rows.append(_cost(plan, count))
    columns = (
        Column("tasks", ("tasks",)),
        Column("depth", ("depth",)),
        Column("build s", ("build_s",), 3),
        Column("add a task ms", ("insert_ms",), 1),
        Column("begin a task ms", ("start_ms",), 1),
        Column("step µs, median", ("step_us",), 0),
        Column("mean", ("step_mean_us",), 0),
        Column("all distances µs", ("exhaustive_us",), 0),
    )
    return Table("cost", "Cost of the tree", columns, rows, tuple(notes))


def _cost(plan: Plan, count: int) -> Row:
    values = smooth_values(count, ENTRIES, plan.seed)
    bank = bank_of(values[:-ADDED], BLOCKS)
    times = plan.times(3 if count <= 1_024 else 1, 1)
    tree, build = _timed(lambda: build_tree(bank), times)
    inserts = []
    for signature in values[-ADDED:]:
        began = time.perf_counter()
        bank = bank.add(f"added-{len(bank)}", signature, torch.ones(BLOCKS))
        tree = update_tree(tree, bank, rebuild=REBUILD)
        inserts.append(time.perf_counter() - began)
    search, start = _timed(
        lambda: (make_search("tree", tree, bank), PathTargets(tree, bank)), times
    )
    noise = torch.randn(ENTRIES, generator=torch.Generator().manual_seed(plan.seed))
    query = values[count // 2] + GAMMA**tree.depth * noise
    scales = bank.scales()

    def step() -> None:
        arms = search[0].choose(lambda: bank.scaled_distances(query, scales))
        xis: list[float] = bank.pull(query, arms, scales).tolist()
        search[0].update(arms, xis)
        search[1].of_arms(arms)

    steps = repeated(step, 50 if plan.quick else 500)
    looks = repeated(lambda: bank.scaled_distances(query, scales), 5, limit=5.0)
    return {
        "tasks": count,
        "depth": tree.depth,
        "build_s": build,
        "insert_ms": 1e3 * statistics.median(inserts),
        "start_ms": 1e3 * start,
        "step_us": 1e6 * statistics.median(steps),
        "step_mean_us": 1e6 * statistics.mean(steps),
        "exhaustive_us": 1e6 * statistics.median(looks),
    }


def _timed(work: Callable[[], T], times: int) -> tuple[T, float]:
    """Return what the work gave and the median of its seconds."""
    found: list[T] = []
    seconds = []
    for _ in range(times):
        began = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - began)
        found[:] = [result]
    return found[0], statistics.median(seconds)


def _games(plan: Plan, say: Say) -> Table:
    steps = 200 if plan.quick else STEPS
    seeds = range(plan.seed, plan.seed + plan.times(SEEDS, 2))
    rows: list[Row] = []
    for count in (16, 64) if plan.quick else GAMES:
        say(f"tree: searches over {count:,} tasks")
        for kind, c in (("tree", C), ("tree", DEFAULT_C), ("flat", C), ("random", C)):
            rows.append(_game(count, kind, c, steps, seeds))
    columns = (
        Column("tasks", ("tasks",)),
        Column("search", ("search",)),
        Column("c", ("c",), 1),
        Column("regret after 100 steps", ("regret_100",), 1),
        Column(f"after {steps:,}", ("regret",), 1),
        Column("steps until 90 % right", ("settled",), 0),
    )
    notes = (
        f"Synthetic: an arm's worth is the sum of offsets on its path, which shrink by {GAMMA} a "
        f"level; delta is the spread of a node's leaves; medians of {len(seeds)} seeds. A pull's "
        f"noise is {NOISE:.0%} of the range of the worths, and regret counts that range as 1. "
        "Right are the best 5 % of the arms; steps until nine in ten of the next 50 pulls are "
        "right, – stands for never (in half of the seeds or more).",
    )
    return Table("regret", "Searches on smooth trees", columns, rows, notes)


def _game(count: int, kind: str, c: float, steps: int, seeds: range) -> Row:
    early, late, soon = [], [], []
    for seed in seeds:
        found = smooth_tree(seed, count, GAMMA)
        arms = play(_search(kind, found, c, seed), found.values, NOISE, steps, seed)
        early.append(regret(arms[:100], found.values))
        late.append(regret(arms, found.values))
        settled = steps_until(arms, found.best())
        soon.append(math.inf if settled is None else settled)
    middle = statistics.median(soon)
    return {
        "tasks": count,
        "search": kind,
        "c": None if kind == "random" else c,
        "regret_100": statistics.median(early),
        "regret": statistics.median(late),
        "settled": None if middle == math.inf else int(middle),
    }


def _search(kind: str, found: SmoothTree, c: float, seed: int) -> Search:
    if kind == "flat":
        return FlatSearch(len(found.values), c)
    if kind == "random":
        return RandomSearch(len(found.values), seed)
    return TreeSearch(found.tree, c, found.deltas)


PART = Part("tree", ABOUT, run)
