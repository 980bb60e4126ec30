"""Which run directories the paths of a command line stand for."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from treelora_cli.errors import RunDirError
from treelora_cli.rundir.jsonfile import read_json
from treelora_cli.rundir.storage import storage_errors

SWEEP_JSON = "sweep.json"
log = logging.getLogger("treelora")


@dataclass(frozen=True, slots=True)
class Selection:
    """The runs to report on.

    Attributes:
        runs: run directories, each once, in the order given; those of a folder by name.
        from_folder: True where any of the paths was a folder of runs.
    """

    runs: tuple[Path, ...]
    from_folder: bool


def select(paths: Sequence[Path]) -> Selection:
    """Take run directories as they are and folders of runs apart.

    Args:
        paths: what the user named.

    Raises:
        RunDirError: a folder is no run and holds none, or cannot be read.
    """
    chosen: dict[str, Path] = {}
    from_folder = False
    for path in paths:
        inside = _children(path)
        from_folder = from_folder or inside is not None
        for run in [path] if inside is None else inside:
            chosen.setdefault(os.path.realpath(run), run)
    return Selection(tuple(chosen.values()), from_folder)


def _children(path: Path) -> list[Path] | None:
    """The runs of a folder; None for a path that :class:`RunDir` itself judges."""
    if not path.is_dir() or _is_run(path):
        return None
    with storage_errors(path, "read"):
        names = sorted((entry.name for entry in path.iterdir()), key=_in_order)
    found = [path / name for name in names if not name.startswith(".") and _is_run(path / name)]
    if not found:
        raise RunDirError(
            f"{path} is neither a run directory nor a folder of runs: no run.json is in it or in "
            "a folder in it",
            "give a folder that `treelora train-stream` wrote, or one that holds such folders",
        )
    _say_what_is_missing(path, {run.name for run in found})
    return found


def _is_run(path: Path) -> bool:
    return os.path.lexists(path / "run.json")


def _in_order(name: str) -> tuple[list[tuple[bool, int, str]], str]:
    """Sort seed2 before seed10; the name itself settles 1 and 01."""
    parts = re.findall(r"[0-9]+|[^0-9]+", name)
    return [(not p.isdecimal(), int(p) if p.isdecimal() else 0, p) for p in parts], name


def _say_what_is_missing(path: Path, found: set[str]) -> None:
    """The list of a sweep tells which runs have not begun; the report does without it."""
    if not os.path.lexists(path / SWEEP_JSON):
        return
    try:
        planned = read_json(path / SWEEP_JSON).get("runs")
    except RunDirError as error:
        log.warning("%s", error.message)
        return
    names = [name for name in planned if isinstance(name, str)] if isinstance(planned, list) else []
    waiting = [name for name in names if name not in found]
    if waiting:
        log.warning("%s: not begun yet: %s", path, ", ".join(map(ascii, waiting)))
