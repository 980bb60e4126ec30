"""Write finished tasks' adapters as plain PEFT folders, in whatever form the run keeps them.

Where more than LoRA was trained, the folder also has ``weights.safetensors``: base weights under
their names in the base after ``weights.``, a method's own parameters after ``part.``.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from treelora_cli.engine.adapters import (
    WEIGHTS_FILE,
    Place,
    load_adapter,
    load_config,
    trained_places,
    write_adapter,
)
from treelora_cli.engine.plan import pick
from treelora_cli.errors import RunDirError, UsageError
from treelora_cli.models.snapshot import is_more, lora_of
from treelora_cli.rundir.files import ensure_dir, sibling
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.merged import read_merged
from treelora_cli.rundir.storage import storage_errors
from treelora_cli.rundir.tensors import save_tensors

logger = logging.getLogger("treelora")


@dataclass(frozen=True)
class Exported:
    """One task's adapter as a PEFT folder.

    Attributes:
        task: whose adapter it is.
        path: the folder.
        members: the tasks that the adapter answers for; more than this one if it was merged.
        more: tensors beside it that answer with it.
    """

    task: str
    path: Path
    members: tuple[str, ...]
    more: int = 0


def export_adapters(path: Path, names: Sequence[str] | None, out: Path) -> list[Exported]:
    """Write adapters to ``out/TASK``, each loadable by ``peft.PeftModel.from_pretrained``.

    Args:
        path: the run directory; it is only read.
        names: the tasks; empty: the latest; None: all.
        out: where the folders are made.

    Returns:
        What was written, in stream order.

    Raises:
        UsageError: an unknown task, a folder that exists already, or one inside the run.
        RunDirError: the run is missing or damaged, or nothing is trained yet.
    """
    run = RunDir.open(path)
    trained = trained_places(run)
    if not trained:
        raise RunDirError(f"{path} has no trained task yet", "train one with train-stream")
    wanted = None if names is None else list(names) or [trained[-1][1]]
    chosen = pick([name for _, name in trained], wanted, "task")
    places = [place for place in trained if place[1] in chosen]
    _check_free(run, out, chosen)
    ensure_dir(out)
    written = [_export(run, place, out / place[1]) for place in places]
    if any(one.more for one in written):
        logger.warning(
            "%s does not answer by LoRA alone: what else was trained is in %s beside the adapter",
            run.info.method, WEIGHTS_FILE,
        )  # fmt: skip
    elif run.info.extra.get("answer") == "more":
        logger.warning("%s does more to answer than the adapter does alone", run.info.method)
    return written


def _check_free(run: RunDir, out: Path, names: Sequence[str]) -> None:
    if out.resolve().is_relative_to(run.path.resolve()):
        raise UsageError(f"{out} is inside the run directory", "give a folder outside of it")
    for name in names:
        if os.path.lexists(out / name):
            raise UsageError(
                f"{out / name} exists already, and nothing is overwritten",
                "give another folder with --out, or remove that one",
            )


def _export(run: RunDir, place: Place, target: Path) -> Exported:
    """Write one folder under a temporary name first, so that no half of one is ever there."""
    index, name = place
    whole = load_adapter(run, index, name)
    more = {key: value for key, value in whole.items() if is_more(key)}
    temporary = sibling(target, "tmp")
    try:
        with storage_errors(target):
            write_adapter(temporary, load_config(run, index, name), lora_of(whole))
            if more:
                save_tensors(temporary / WEIGHTS_FILE, more)
            temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    names = [entry["name"] for entry in run.info.tasks]
    members = next(
        (group.members for group in read_merged(run) if index in group.members), (index,)
    )
    return Exported(name, target, tuple(names[member] for member in members), len(more))
