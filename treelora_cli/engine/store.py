"""Write a finished task into the run directory and read it back: adapter, tree, what is stored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, overload

from torch import Tensor

from treelora_cli.engine.adapters import (
    STORAGE,
    Place,
    load_adapter,
    make_reference,
    save_adapter,
    snapshot_hash,
    store_adapter,
)
from treelora_cli.methods.base import StoredTask, TaskMemory, TreeRecord
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.rundir import atomic
from treelora_cli.rundir.jsonfile import read_json
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.manifest import verify
from treelora_cli.rundir.tensors import load_tensors, save_tensors

__all__ = [
    "load_adapter",
    "load_optimizer",
    "load_stored",
    "save_adapter",
    "save_task",
    "snapshot_hash",
]

METHOD_FILE = "method.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
FEATURES_FILE = "features.safetensors"
SIGNATURES_FILE = "signatures.safetensors"


def save_task(
    run: RunDir,
    adapted: AdaptedModel,
    document: dict[str, Any],
    memory: TaskMemory,
    optimizer: dict[str, Tensor],
    form: Literal["dense", "delta"] = "dense",
    features: Mapping[str, Tensor] | None = None,
) -> None:
    """Commit a finished task: its tree first, then the task itself, then the current tree.

    The task's folder is what makes it finished; a tree without its task is written again.

    Args:
        run: the run directory; its lock is held.
        adapted: the live adapter is stored.
        document: the content of task.json, with ``index`` and ``name``.
        memory: what the method keeps.
        optimizer: its state, where the next task goes on with it; otherwise empty.
        form: ``delta`` stores what differs from the adapters that the method refers to, if that is
            smaller.
        features: what the router needs to know of the task's prompts, if anything.
    """
    index, name = int(document["index"]), str(document["name"])
    if memory.tree is not None:
        with atomic.commit_dir(run.tree_history(index, name)) as folder:
            atomic.write_json(folder / "tree.json", memory.tree.document)
            save_tensors(folder / SIGNATURES_FILE, memory.tree.tensors)
    reference = make_reference(run, memory.reference) if form == "delta" else None
    with atomic.commit_dir(run.task_dir(index, name)) as folder:
        answer = adapted.answer()
        stored = store_adapter(folder, adapted.config_document(answer), answer, reference)
        if memory.tensors:
            save_tensors(folder / METHOD_FILE, memory.tensors)
        if optimizer:
            save_tensors(folder / OPTIMIZER_FILE, optimizer)
        if features:
            save_tensors(folder / FEATURES_FILE, features)
        atomic.write_json(folder / "task.json", {**memory.info, **document, STORAGE: stored})
    if memory.tree is not None:
        atomic.write_json(run.tree_json, memory.tree.document)


def load_optimizer(run: RunDir, index: int, name: str) -> dict[str, Tensor]:
    """Read the optimizer's state at the end of a task of a run that carries it on.

    Raises:
        RunDirError: it is missing or not as it was written.
    """
    folder = run.task_dir(index, name)
    verify(folder)
    return load_tensors(folder / OPTIMIZER_FILE)


def load_stored(run: RunDir, index: int, name: str) -> StoredTask:
    """Read back what the method stored of a finished task.

    Raises:
        RunDirError: a file is missing or not as it was written.
    """
    folder = run.task_dir(index, name)
    verify(folder)
    extra = folder / METHOD_FILE
    tensors: dict[str, Tensor] = load_tensors(extra) if extra.exists() else {}
    info = read_json(folder / "task.json")
    memory = TaskMemory(tensors, info, _load_tree(run, index, name))
    return StoredTask(index, name, memory, partial(load_adapter, run, index, name))


class Finished(Sequence[StoredTask]):
    """Finished tasks in stream order, each read from the run when it is first looked at.

    Args:
        run: the run directory.
        places: index and name of the tasks.
    """

    def __init__(self, run: RunDir, places: Sequence[Place]) -> None:
        self._run = run
        self._places = list(places)
        self._read: dict[int, StoredTask] = {}

    def __len__(self) -> int:
        """Return the number of tasks."""
        return len(self._places)

    @overload
    def __getitem__(self, at: int) -> StoredTask: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[StoredTask]: ...
    def __getitem__(self, at: int | slice) -> StoredTask | Sequence[StoredTask]:
        """Return a task, or some of them.

        Raises:
            RunDirError: a file is missing or not as it was written.
        """
        if isinstance(at, slice):
            return Finished(self._run, self._places[at])
        number = range(len(self))[at]
        if number not in self._read:
            self._read[number] = load_stored(self._run, *self._places[number])
        return self._read[number]


def _load_tree(run: RunDir, index: int, name: str) -> TreeRecord | None:
    folder = run.tree_history(index, name)
    if not folder.exists():
        return None
    verify(folder)
    return TreeRecord(read_json(folder / "tree.json"), load_tensors(folder / SIGNATURES_FILE))
