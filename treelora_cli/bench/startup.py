"""How long commands take from the shell's point of view: whole processes, wall time."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import treelora_cli
from treelora_cli.bench.document import Column, Row, Table
from treelora_cli.bench.part import Part, Plan, Say
from treelora_cli.bench.smooth import bank_of, smooth_values
from treelora_cli.bench.timing import repeated
from treelora_cli.engine.environment import versions
from treelora_cli.errors import EnvironmentProblem
from treelora_cli.rundir.atomic import commit_dir, write_json
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.runinfo import RunInfo
from treelora_cli.tree.build import build_tree
from treelora_cli.tree.serial import to_document

ABOUT = "Wall time of fresh processes"
TASKS = 100


def synthetic_run(path: Path, tasks: int, seed: int) -> RunDir:
    """Write a run directory with a tree over synthetic tasks, as a stream leaves it.

    Args:
        path: a new folder.
        tasks: finished tasks.
        seed: of the signatures.
    """
    bank = bank_of(smooth_values(tasks, 64, seed), 8)
    info = RunInfo(
        method="treelora",
        model="synthetic",
        base_fingerprint="synthetic",
        builtin_base=True,
        builtin_data=True,
        seed=seed,
        versions=versions(),
        status="finished",
        extra={"mode": "latest", "command": [], "data": {}},
    )
    for name in bank.names:
        info.add_task(name, "accuracy")["status"] = "finished"
    run = RunDir.create(path, info, recipe="method:\n  name: treelora\n")
    document = to_document(build_tree(bank), bank, "lora_a", "A")
    with commit_dir(run.tree_history(tasks - 1, bank.names[-1])) as folder:
        write_json(folder / "tree.json", document)
    write_json(run.tree_json, document)
    return run


def call(arguments: Sequence[str]) -> None:
    """Run a Python process to its end.

    Args:
        arguments: of the interpreter.

    Raises:
        EnvironmentProblem: it failed.
    """
    root = str(Path(treelora_cli.__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(  # noqa: S603 - our own interpreter with our own arguments
        [sys.executable, *arguments],
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        text=True,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or ["nothing was said"]
        raise EnvironmentProblem(
            f"{' '.join(arguments)} ended with exit code {done.returncode}: {said[0]}",
            "does this command work by itself?",
        )


def run(plan: Plan, say: Say) -> Sequence[Table]:
    """Time commands, the bare interpreter beside them."""
    times = plan.times(7, 1)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run"
        synthetic_run(path, TASKS, plan.seed)
        commands = {
            "python -c pass": ["-c", "pass"],
            "treelora --help": ["-m", "treelora_cli", "--help"],
            f"treelora tree show, {TASKS} tasks": ["-m", "treelora_cli", "tree", "show", str(path)],
            "treelora methods": ["-m", "treelora_cli", "methods"],
        }
        for title, arguments in commands.items():
            say(f"startup: {title}")
            if not plan.quick:
                call(arguments)  # so that files are in the page cache
            seconds = repeated(partial(call, arguments), times)
            rows.append(
                {
                    "command": title,
                    "seconds": statistics.median(seconds),
                    "fastest": min(seconds),
                    "slowest": max(seconds),
                    "times": times,
                }
            )
    columns = (
        Column("command", ("command",)),
        Column("seconds [fastest, slowest]", ("seconds", "fastest", "slowest"), 2),
        Column("times", ("times",)),
    )
    return [Table("startup", "Commands", columns, rows)]


PART = Part("startup", ABOUT, run)
