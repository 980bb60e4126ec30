"""``ablation``: what each switch of a method is worth, on real tasks, at one budget.

Every setting and seed is an ordinary run directory, so an interrupted ablation goes on where it
stopped, and a second process given the same folder takes the runs that the first has not begun.
Only what OP and BWT need is scored: each task when it is learned, and all of them at the end.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treelora_cli.bench.document import Column, Row, Table
from treelora_cli.bench.part import Part, Plan, Say
from treelora_cli.engine.plan import resolve_recipe
from treelora_cli.engine.stream import run_stream
from treelora_cli.errors import BusyError, UsageError, did_you_mean
from treelora_cli.recipe import read_yaml
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.scores import Cell, Scores

DEFAULT = "default"
SHIPPED = Path(__file__).with_suffix(".yaml")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one run scored.

    Attributes:
        setting: the setting's name.
        seed: the run's seed.
        op: mean final score over the tasks, 0-100.
        bwt: mean of (score when learned - final score), 0-100; positive is forgetting.
        learned: mean score when learned, 0-100.
        seconds: training time.
    """

    setting: str
    seed: int
    op: float
    bwt: float
    learned: float
    seconds: float


def read_settings(path: Path, only: Sequence[str] | None) -> dict[str, list[str]]:
    """Return the settings of a file by name, in its order.

    Args:
        path: YAML, name: list of ``key=value``.
        only: names to keep; None keeps all.

    Raises:
        UsageError: the file is missing or not of that form, or a name is unknown.
    """
    if not path.is_file():
        raise UsageError(f"settings file {path} does not exist", "see treelora bench --help")
    document = read_yaml(path.read_text(encoding="utf-8"), str(path))
    for name, pairs in document.items():
        if not isinstance(pairs, list) or not all(isinstance(pair, str) for pair in pairs):
            raise UsageError(
                f"{path}: setting {name!r} is not a list of key=value texts", "e.g. [optim.lr=1e-3]"
            )
    for name in only or []:
        if name not in document:
            raise UsageError(f"{path} has no setting {name!r}", did_you_mean(name, list(document)))
    return {name: pairs for name, pairs in document.items() if not only or name in only}


def run_settings(settings: dict[str, list[str]], plan: Plan, say: Say) -> list[Outcome]:
    """Train and score what is missing, seed by seed; return what is finished.

    Args:
        settings: ``key=value`` texts by name.
        plan: recipe, seeds, split, folder, model and data.
        say: told of every run.
    """
    outcomes = []
    for seed in plan.seeds:
        for name, pairs in settings.items():
            path = plan.folder / f"{name}-seed{seed}"
            try:
                _run(path, pairs, seed, plan, say)
            except BusyError:
                say(f"{path.name}: another process is at it")
                continue
            outcomes.append(outcome(path, name, seed, plan.split))
    return outcomes


def _run(path: Path, pairs: list[str], seed: int, plan: Plan, say: Say) -> None:
    flags: dict[str, Any] = {
        "model": {"name": plan.model},
        "data": {"path": str(plan.data)},
        "stream": {"seed": seed},
        "eval": {"when": "ends", "split": plan.split, "zero_shot": False, "before": False},
    }
    known = (path / "run.json").exists()
    if known and RunDir.open(path).info.status == "finished":
        return
    say(f"{path.name}: {'goes on' if known else 'begins'}")
    recipe = resolve_recipe(path, None if known else plan.recipe, [] if known else pairs, flags)
    run_stream(recipe, path, lambda event: None)


def outcome(path: Path, setting: str, seed: int, split: str) -> Outcome:
    """Read what a finished run scored.

    Args:
        path: the run directory.
        setting: the setting's name.
        seed: the run's seed.
        split: whose cells are read.
    """
    run = RunDir.open(path)
    names = [str(entry["name"]) for entry in run.info.tasks]
    cells = [cell for cell in Scores.load(run.scores).cells if cell.split == split]
    last = [_score(cells, names[-1], name) for name in names]
    first = [_score(cells, name, name) for name in names]
    if run.info.extra.get("mode") == "own":
        last = first
    seconds = [run.read_task(entry["index"])["seconds"]["train"] for entry in run.info.tasks]
    return Outcome(
        setting,
        seed,
        100 * statistics.fmean(last),
        100 * statistics.fmean(a - b for a, b in zip(first, last, strict=True)),
        100 * statistics.fmean(first),
        sum(seconds),
    )


def _score(cells: Sequence[Cell], after: str, task: str) -> float:
    found = [c.score for c in cells if (c.after, c.task) == (after, task) and c.adapter != "base"]
    return found[0] if found else math.nan


def rows(outcomes: Sequence[Outcome], settings: dict[str, list[str]]) -> list[Row]:
    """Return a row a setting: means over seeds, standard errors, and the paired gain over default.

    Args:
        outcomes: finished runs.
        settings: in the order of the rows.
    """
    found: list[Row] = []
    base = {one.seed: one for one in outcomes if one.setting == DEFAULT}
    for name, pairs in settings.items():
        mine = [one for one in outcomes if one.setting == name]
        if not mine:
            continue
        gains = [one.op - base[one.seed].op for one in mine if one.seed in base]
        found.append(
            {
                "setting": name,
                "switch": " ".join(pairs) or "-",
                "seeds": len(mine),
                **_summary("op", [one.op for one in mine]),
                **_summary("bwt", [one.bwt for one in mine]),
                **_summary("learned", [one.learned for one in mine]),
                **_summary("op_gain", gains if name != DEFAULT else []),
                "train_s": statistics.median(one.seconds for one in mine),
            }
        )
    return found


def _summary(key: str, values: Sequence[float]) -> Row:
    """Return mean and standard error of the mean (n - 1), as number and as text."""
    if not values:
        return {key: None, f"{key}_se": None, f"{key}_text": None}
    mean = statistics.fmean(values)
    if len(values) == 1:
        return {key: mean, f"{key}_se": None, f"{key}_text": f"{mean:.1f}"}
    error = statistics.stdev(values) / math.sqrt(len(values))
    return {key: mean, f"{key}_se": error, f"{key}_text": f"{mean:.1f} ± {error:.1f}"}


def run(plan: Plan, say: Say) -> list[Table]:
    """Run the settings and return the table.

    Raises:
        UsageError: no model, data or folder was given.
    """
    if plan.model is None or plan.data is None:
        raise UsageError(
            "ablation trains on real tasks: it needs --model and --data",
            "treelora bench ablation --model BASE --data DIR --folder ablation",
        )
    settings = read_settings(plan.settings or SHIPPED, plan.only)
    outcomes = run_settings(settings, plan, say)
    seeds = ", ".join(map(str, plan.seeds))
    table = Table(
        "ablation",
        f"recipe {plan.recipe}, {plan.split} split, seeds {seeds}",
        (
            Column("setting", ("setting",)),
            Column("switch", ("switch",)),
            Column("seeds", ("seeds",)),
            Column("OP", ("op_text",)),
            Column("BWT", ("bwt_text",)),
            Column("when learned", ("learned_text",)),
            Column("OP − default", ("op_gain_text",)),
            Column("training s", ("train_s",), 0),
        ),
        rows(outcomes, settings),
        (
            "Scores × 100: mean ± standard error over seeds. BWT has the TreeLoRA paper's sign: "
            "positive is forgetting. OP − default is taken seed by seed.",
        ),
    )
    return [table]


PART = Part("ablation", "each switch alone, from the default, on real tasks", run)
