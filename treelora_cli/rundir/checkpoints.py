"""Checkpoints of the task in flight: committed as a whole, verified before they are believed."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from treelora_cli.errors import RunDirError
from treelora_cli.rundir import faults
from treelora_cli.rundir.atomic import commit_dir, discard, write_file, write_json
from treelora_cli.rundir.jsonfile import read_bytes, read_json
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.manifest import verify
from treelora_cli.rundir.storage import storage_errors
from treelora_cli.rundir.tensors import load_tensors, save_tensors

if TYPE_CHECKING:
    from torch import Tensor

KEEP = 2
TENSORS = "tensors.safetensors"
STATE = "state.json"
_STEP = re.compile(r"step-([0-9]{8,})")

log = logging.getLogger("treelora")


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        step: optimizer steps done in the task in flight.
        path: its folder.
        tensors: CPU tensors by name, as given to ``save``.
        meta: the JSON object given to ``save``.
    """

    step: int
    path: Path
    tensors: dict[str, Tensor]
    meta: dict[str, Any]


def save(
    run: RunDir,
    step: int,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
    *,
    finite: bool = True,
) -> Path:
    """Commit a checkpoint, make it the current one, and remove all but the two newest.

    Args:
        run: the run directory; the caller holds its lock.
        step: optimizer steps done; an existing checkpoint of that step is replaced.
        tensors: any tensors by name.
        meta: a JSON object.
        finite: refuse NaN and infinities.

    Returns:
        The checkpoint's folder.

    Raises:
        DivergedError: a tensor is not finite; nothing changes.
        EnvironmentProblem: the disk is full; what was saved before is intact.
        RunDirError: another failure of the file system.
    """
    if not run.run_json.exists():
        raise RunDirError(
            f"{run.path} is no longer a run directory: run.json is gone",
            "was it moved or removed while the run was going on? put it back and run again",
        )
    target = run.checkpoint_dir(step)
    with commit_dir(target) as folder:
        save_tensors(folder / TENSORS, tensors, finite=finite)
        faults.hit("checkpoint.tensors-written")
        write_json(folder / STATE, {"step": step, "meta": dict(meta)})
        faults.hit("checkpoint.state-written")
    with storage_errors(target):
        faults.hit("checkpoint.committed")
        write_file(run.checkpoint_current, target.name + "\n")
        faults.hit("checkpoint.current-written")
        _prune(run)
        faults.hit("checkpoint.pruned")
    return target


def steps(run: RunDir) -> list[int]:
    """Return the steps of the checkpoints that are there, valid or not, oldest first."""
    if not run.checkpoints.is_dir():
        return []
    with storage_errors(run.checkpoints, "read"):
        matches = [_STEP.fullmatch(path.name) for path in run.checkpoints.iterdir()]
        found = {int(match[1]) for match in matches if match}
    return sorted(step for step in found if os.path.lexists(run.checkpoint_dir(step)))


def newest(run: RunDir, *, finite: bool = True) -> Checkpoint | None:
    """Return the newest checkpoint that is whole, or None if there is none.

    One that is damaged is passed over with a log warning that says what is wrong with it; it
    stays where it is. The folders decide, not ``current``: a kill may come between the two.

    Args:
        run: the run directory.
        finite: take NaN and infinities for damage.
    """
    found = None
    for step in reversed(steps(run)):
        try:
            found = _read(run.checkpoint_dir(step), step, finite)
            break
        except RunDirError as error:
            log.warning("checkpoint of step %d passed over: %s", step, error.message)
    _compare_with_current(run, found)
    return found


def clear(run: RunDir) -> None:
    """Remove all checkpoints at once: the task in flight is finished.

    Raises:
        RunDirError: they cannot be removed.
    """
    with storage_errors(run.checkpoints, "remove"):
        discard(run.checkpoints)
        faults.hit("checkpoint.cleared")


def _read(folder: Path, step: int, finite: bool) -> Checkpoint:
    verify(folder)
    state = read_json(folder / STATE)
    meta = state.get("meta")
    if state.get("step") != step or not isinstance(meta, dict):
        raise RunDirError(f"{folder / STATE} is not the state of step {step}", "remove the folder")
    tensors = load_tensors(folder / TENSORS, finite=finite)
    return Checkpoint(step=step, path=folder, tensors=tensors, meta=meta)


def _prune(run: RunDir) -> None:
    """Remove what is older than the second newest whole checkpoint.

    Sizes are enough here: content is compared where a checkpoint is read, and hashing gigabytes
    again at every save would cost as much as saving them.
    """
    whole = 0
    for step in reversed(steps(run)):
        folder = run.checkpoint_dir(step)
        if whole >= KEEP:
            discard(folder)
            continue
        try:
            verify(folder, hashes=False)
            whole += 1
        except RunDirError as error:
            log.warning("checkpoint of step %d is no use: %s", step, error.message)


def _compare_with_current(run: RunDir, found: Checkpoint | None) -> None:
    if not os.path.lexists(run.checkpoint_current):
        return
    try:
        named = read_bytes(run.checkpoint_current, 200).decode("ascii").strip()
    except (RunDirError, ValueError) as error:
        log.warning("%s cannot be read: %s", run.checkpoint_current, error)
        return
    match = _STEP.fullmatch(named)
    if match is None:
        log.warning("%s does not name a checkpoint", run.checkpoint_current)
    elif found is None or int(match[1]) > found.step:
        instead = "no checkpoint" if found is None else found.path.name
        log.warning("%s names %s; using %s instead", run.checkpoint_current, named, instead)
