"""Compare what the tasks of a run added to the weights; needs torch, and reads every adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from treelora_cli.engine.adapters import Place, load_adapter, load_config, trained_places
from treelora_cli.models.evidence import THRESHOLD, Adapter, Change, added, evidence
from treelora_cli.models.snapshot import is_more, lora_of
from treelora_cli.report.model import DIFFERENCE, JOINT, OWN, Evidence, Pairs
from treelora_cli.report.words import clean
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.merged import read_merged

Progress = Callable[[str, int, int], None]
"""Told what has been done, how often, and how often it will be."""

_OWN_MODES = ("own", "route")
_AT_ONCE = "all tasks were learned at once: none has a part of its own"
_NO_LORA = "there is no LoRA adapter to compare"
_NO_CHANGE = "no LoRA adapter of the run changes anything"
_MORE = "what was trained beside LoRA is not in it"


def measure(run_path: Path, threshold: float | None, progress: Progress) -> Evidence:
    """Compare the parts of a run's finished tasks.

    Where one adapter goes on from task to task, or all tasks' adapters are summed, a task's part
    is the weight change after it less that after the task before it. Where each task answers with
    its own adapter, it is that adapter's change.

    Args:
        run_path: the run directory.
        threshold: in root mean squares of a part's entries; None: the default.
        progress: told how far it is.

    Returns:
        The numbers, of no task where there is nothing to compare; the notes say why.

    Raises:
        RunDirError: an adapter is missing or damaged.
    """
    run = RunDir.open(run_path)
    mode = run.info.extra.get("mode")
    part = OWN if mode in _OWN_MODES else DIFFERENCE
    marks = THRESHOLD if threshold is None else threshold
    if mode == JOINT:
        return _nothing(part, marks, [_AT_ONCE])
    places, notes = _comparable(run, part)
    changes, more = _changes(run, places, part, progress)
    notes += [_MORE] if more else []
    if not any(changes):
        return _nothing(part, marks, [*notes, _NO_LORA])
    found = evidence(
        changes, marks, progress=lambda done, of: progress("modules compared", done, of)
    )
    if not any(found.norm.tolist()):
        return _nothing(part, marks, [*notes, _NO_CHANGE])
    return Evidence(
        part=part,
        threshold=marks,
        entries=found.entries,
        places=tuple(index for index, _ in places),
        names=tuple(clean(name) for _, name in places),
        notes=tuple(notes),
        norm=tuple(found.norm.tolist()),
        nuclear=tuple(found.nuclear.tolist()),
        density=tuple(found.density.tolist()),
        collision=_pairs(found.collision),
        cosine=_pairs(found.cosine),
        overlap=_pairs(found.overlap),
    )


def _comparable(run: RunDir, part: str) -> tuple[list[Place], list[str]]:
    """Return the tasks whose own part can be told, and a note on the others.

    A merged adapter is no task's own; nor can the task after it be told from the difference.
    """
    merged = {member for group in read_merged(run) for member in group.members}
    trained = trained_places(run)
    needed = {index: {index} for index, _ in trained}
    if part == DIFFERENCE:
        needed = {index: {index, index - 1} for index, _ in trained}
    places = [place for place in trained if not needed[place[0]] & merged]
    left_out = [clean(name) for index, name in trained if needed[index] & merged]
    if not left_out:
        return places, []
    why = "their adapter was merged with another task's"
    if part == DIFFERENCE:
        why = "their adapter or that of the task before was merged with another task's"
    return places, [f"left out: {', '.join(left_out)} ({why})"]


def _changes(
    run: RunDir, places: Sequence[Place], part: str, progress: Progress
) -> tuple[list[Change], bool]:
    """Return what each task changed, and whether any adapter holds more than LoRA.

    No more than two adapters are in memory at a time, beside the parts themselves.
    """
    names = [entry["name"] for entry in run.info.tasks]
    changes: list[Change] = []
    more = False
    loaded: dict[int, Adapter] = {}
    for done, (index, name) in enumerate(places):
        progress("adapters read", done, len(places))
        before = None
        if part == DIFFERENCE and index > 0:
            before = loaded.get(index - 1) or _adapter(run, index - 1, names[index - 1])
        after = _adapter(run, index, name)
        more = more or any(is_more(key) for key in after.tensors)
        changes.append(added(after, before))
        loaded = {index: after}
    progress("adapters read", len(places), len(places))
    return changes, more


def _adapter(run: RunDir, index: int, name: str) -> Adapter:
    tensors = load_adapter(run, index, name)
    if not lora_of(tensors):
        return Adapter(tensors, 1.0)
    config = load_config(run, index, name)
    return Adapter(tensors, config["lora_alpha"] / config["r"])


def _nothing(part: str, threshold: float, notes: Sequence[str]) -> Evidence:
    return Evidence(part, threshold, 0, (), (), tuple(notes), (), (), (), (), (), ())


def _pairs(numbers: Tensor) -> Pairs:
    return tuple(
        tuple(None if math.isnan(value) else value for value in row) for row in numbers.tolist()
    )
