"""Write a finished task into the run directory and read it back: adapter, tree, what is stored."""

from __future__ import annotations

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from treelora_cli.errors import RunDirError
from treelora_cli.methods.base import StoredTask, TaskMemory, TreeRecord
from treelora_cli.models.adapted import AdaptedModel, Snapshot
from treelora_cli.rundir import atomic
from treelora_cli.rundir.jsonfile import read_json
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.manifest import verify
from treelora_cli.rundir.tensors import load_tensors, save_tensors

CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
METHOD_FILE = "method.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
SIGNATURES_FILE = "signatures.safetensors"


def snapshot_hash(snapshot: Snapshot) -> str:
    """Identify an adapter by SHA-256 over its keys, shapes and float32 bytes."""
    digest = hashlib.sha256()
    for key in sorted(snapshot):
        value = snapshot[key].contiguous()
        digest.update(f"{key}:{tuple(value.shape)}:{value.dtype}".encode())
        digest.update(value.numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"


def save_adapter(folder: Path, adapted: AdaptedModel, snapshot: Snapshot) -> None:
    """Write an adapter as PEFT does, then read it back and compare.

    The folder loads with ``peft.PeftModel.from_pretrained(base, folder)`` alone.

    Raises:
        RunDirError: what was read back is not what was written, or a value is not finite.
    """
    folder.mkdir(parents=True)
    atomic.write_json(folder / CONFIG_FILE, adapted.config_document())
    path = folder / ADAPTER_FILE
    save_tensors(path, snapshot)
    again = load_tensors(path)
    same = again.keys() == snapshot.keys() and all(
        again[key].equal(value) for key, value in snapshot.items()
    )
    if not same:
        raise RunDirError(f"{path} does not read back as written", "check the disk")


def save_task(
    run: RunDir,
    adapted: AdaptedModel,
    document: dict[str, Any],
    memory: TaskMemory,
    optimizer: dict[str, Tensor],
) -> None:
    """Commit a finished task: its tree first, then the task itself, then the current tree.

    The task's folder is what makes it finished; a tree without its task is written again.

    Args:
        run: the run directory; its lock is held.
        adapted: the live adapter is stored.
        document: the content of task.json, with ``index`` and ``name``.
        memory: what the method keeps.
        optimizer: its state, where the next task goes on with it; otherwise empty.
    """
    index, name = int(document["index"]), str(document["name"])
    if memory.tree is not None:
        with atomic.commit_dir(run.tree_history(index, name)) as folder:
            atomic.write_json(folder / "tree.json", memory.tree.document)
            save_tensors(folder / SIGNATURES_FILE, memory.tree.tensors)
    with atomic.commit_dir(run.task_dir(index, name)) as folder:
        save_adapter(folder / "adapter", adapted, adapted.snapshot())
        if memory.tensors:
            save_tensors(folder / METHOD_FILE, memory.tensors)
        if optimizer:
            save_tensors(folder / OPTIMIZER_FILE, optimizer)
        atomic.write_json(folder / "task.json", {**memory.info, **document})
    if memory.tree is not None:
        atomic.write_json(run.tree_json, memory.tree.document)


def load_adapter(run: RunDir, index: int, name: str) -> Snapshot:
    """Read a finished task's adapter, verified against its manifest.

    Raises:
        RunDirError: a file is missing or not as it was written.
    """
    folder = run.task_dir(index, name)
    verify(folder)
    return load_tensors(folder / "adapter" / ADAPTER_FILE)


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


def _load_tree(run: RunDir, index: int, name: str) -> TreeRecord | None:
    folder = run.tree_history(index, name)
    if not folder.exists():
        return None
    verify(folder)
    return TreeRecord(read_json(folder / "tree.json"), load_tensors(folder / SIGNATURES_FILE))
