"""The report as a JSON document; scores are 0-1, a number that was not measured is null."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from treelora_cli.report.evidence import PAIR_KEYS, TASK_KEYS, means
from treelora_cli.report.groups import Group, Spread, grouped
from treelora_cli.report.metrics import DEFINITIONS
from treelora_cli.report.model import Evidence, RunReport, TaskReport

Json = dict[str, Any]


def document(reports: Sequence[RunReport], listed: bool = False) -> Json:
    """Return the document: one run is an object, several are ``{"runs": […], "groups": […]}``.

    Args:
        reports: the runs.
        listed: give a single run as a list too, so that the form does not hang on their number.
    """
    runs = [_run(report) for report in reports]
    if len(runs) == 1 and not listed:
        return runs[0]
    return {"runs": runs, "groups": [_group(group) for group in grouped(reports)]}


def _group(group: Group) -> Json:
    first = group.first
    return {
        "name": group.name,
        "method": first.method,
        "model": first.model,
        "synthetic": group.synthetic,
        "adapter_mode": first.mode,
        "tasks_learned": first.learned,
        "n": group.n,
        "seeds": [run.seed for run in group.counted],
        "runs": [run.path for run in group.counted],
        "left_out": [run.path for run in group.left_out],
        **{key: _spread(group.number(key)) for key in DEFINITIONS},
        "op_curve": [_spread(value) for value in group.op_curve()],
        "tasks": [
            {"name": name, "final": _spread(final)} for name, final in group.finals().items()
        ],
        "evidence": {key: _spread(value) for key, value in means(group).items()} or None,
    }


def _spread(value: Spread | None) -> Json | None:
    """The sample standard deviation of one run is null."""
    return None if value is None else {"mean": value.mean, "std": value.std, "n": value.n}


def _run(report: RunReport) -> Json:
    return {
        "run": report.path,
        "status": report.status,
        "method": report.method,
        "model": report.model,
        "synthetic": report.synthetic,
        "builtin_base": report.builtin_base,
        "builtin_data": report.builtin_data,
        "seed": report.seed,
        "adapter_mode": report.mode,
        "decoding": report.decoding,
        "tasks_learned": report.learned,
        "op": report.op,
        "bwt": report.bwt,
        "bwt_lopez_paz": report.bwt_lopez_paz,
        "forgetting": report.forgetting,
        "fwt": report.fwt,
        "op_curve": list(report.op_curve),
        "matrix": [list(row) for row in report.matrix],
        "tasks": [_task(task) for task in report.tasks],
        "seconds": {
            "train": report.train_seconds,
            "evaluate": report.evaluate_seconds,
            "total": report.total_seconds,
        },
        "missing": [{"after": after, "task": task} for after, task in report.missing],
        "merged": [{"tasks": list(tasks), "error": error} for tasks, error in report.merged],
        "routed": [asdict(way) for way in report.routed],
        "limited_cells": report.limited_cells,
        "limited_matrix": [list(row) for row in report.limited_matrix] or None,
        "evidence": None if report.evidence is None else _evidence(report.evidence),
        "tree": report.tree,
        "recipe": report.recipe or None,
        "versions": report.versions,
        "command": report.command,
    }


def _evidence(evidence: Evidence) -> Json:
    """Shares are 0-1 and matrices symmetric; the mean of the cosine is that of its size."""
    return {
        "part": evidence.part,
        "threshold": evidence.threshold,
        "entries": evidence.entries,
        "notes": list(evidence.notes),
        "tasks": list(evidence.names),
        **{key: list(getattr(evidence, key)) for key in TASK_KEYS},
        **{key: [list(row) for row in getattr(evidence, key)] for key in PAIR_KEYS},
        "mean": {key: evidence.mean(key) for key in (*TASK_KEYS, *PAIR_KEYS)},
    }


def _task(task: TaskReport) -> Json:
    return {
        "name": task.name,
        "status": task.status,
        "metric": task.metric,
        "language": task.language,
        "synthetic": task.synthetic,
        "own": task.own,
        "final": task.final,
        "zero_shot": task.zero_shot,
        "chance": task.chance,
        "rows": task.rows,
        "steps": task.steps,
        "trainable_parameters": task.trainable_parameters,
        "seconds": {"train": task.train_seconds, "evaluate": task.evaluate_seconds},
        "loss": [[point.step, point.loss] for point in task.loss],
    }
