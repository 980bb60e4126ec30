"""The report as a JSON document; scores are 0-1, a number that was not measured is null."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from treelora_cli.report.model import RunReport, TaskReport

Json = dict[str, Any]


def document(reports: Sequence[RunReport]) -> Json:
    """Return the document: one run is an object, several are ``{"runs": [...]}``."""
    runs = [_run(report) for report in reports]
    return runs[0] if len(runs) == 1 else {"runs": runs}


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
        "limited_cells": report.limited_cells,
        "limited_matrix": [list(row) for row in report.limited_matrix] or None,
        "tree": report.tree,
        "recipe": report.recipe or None,
        "versions": report.versions,
        "command": report.command,
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
