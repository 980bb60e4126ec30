"""Several methods and seeds on one stream: ordinary run directories in one parent folder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from treelora_cli.errors import UsageError
from treelora_cli.methods import registry
from treelora_cli.rundir.atomic import ensure_dir, write_json

FORMAT = 1
SWEEP_FILE = "sweep.json"


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    method: str
    seed: int
    path: Path


def plan_sweep(parent: Path, methods: Sequence[str], seeds: Sequence[int]) -> list[SweepRun]:
    """Return the runs of a sweep, seed by seed, so that every method is seen early.

    Raises:
        UsageError: an unknown method, one named twice, or a seed named twice.
    """
    known = registry()
    for method in methods:
        known.get(method)
    for what, given in (("method", methods), ("seed", seeds)):
        if not given:
            raise UsageError(f"a sweep needs at least one {what}", "--methods A,B --seeds 1,2,3")
        if len(set(given)) != len(given):
            raise UsageError(f"a {what} is named twice", "name each once")
    return [
        SweepRun(method, seed, parent / f"{method}-seed{seed}")
        for seed in seeds
        for method in methods
    ]


def note_sweep(parent: Path, runs: Sequence[SweepRun]) -> None:
    """Write down which runs belong to the sweep, beside any that are there already.

    Raises:
        UsageError: the folder is itself a run directory.
        RunDirError: it cannot be written to.
    """
    if (parent / "run.json").exists():
        raise UsageError(
            f"{parent} is a run directory, not a folder for a sweep", "give another --run-dir"
        )
    ensure_dir(parent)
    present = {path.parent.name for path in parent.glob("*/run.json")}
    names = sorted(present | {run.path.name for run in runs})
    write_json(parent / SWEEP_FILE, {"format": FORMAT, "runs": names})
