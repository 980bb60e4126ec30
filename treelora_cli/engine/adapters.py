"""A task's adapter on disk: whole, as its difference from earlier ones, or merged with others'.

- dense: ``adapter/``, as PEFT writes it;
- delta: ``delta.safetensors`` and ``adapter_config.json``: which entries differ from the mean
  adapter of earlier tasks, and their values (``models.difference``); the reference's indices and
  hash are in task.json;
- merged: nothing in the task's folder; one adapter answers for several tasks (``rundir.merged``);
- weights: no adapter, where there is no LoRA in what was trained.

Whichever it is, :func:`load_adapter` returns the same tensors, bit for bit for the first two. What
answers beside LoRA (base weights, a method's own parameters) is in ``weights.safetensors`` and is
read with it.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from treelora_cli.errors import RunDirError, UsageError
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.difference import decode, encode
from treelora_cli.models.snapshot import Snapshot, is_more, lora_of, mean_snapshot
from treelora_cli.rundir import atomic
from treelora_cli.rundir.jsonfile import read_json
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.manifest import read_manifest, verify
from treelora_cli.rundir.merged import Merged, read_merged
from treelora_cli.rundir.tensors import load_tensors, save_tensors

ADAPTER = "adapter"
CONFIG_FILE = "adapter_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
DELTA_FILE = "delta.safetensors"
WEIGHTS_FILE = "weights.safetensors"
TASK_FILE = "task.json"
STORAGE = "storage"
PREDICTIONS = "predictions"

Place = tuple[int, str]
"""Index and name of a task in the stream."""

_PUT_BACK = "put it back from a copy, or start a new run directory"


@dataclass(frozen=True)
class Reference:
    """Earlier tasks and the mean of their adapters, which a later one may be stored against."""

    members: tuple[int, ...]
    mean: Snapshot

    @property
    def digest(self) -> str:
        """Identifies the mean."""
        return snapshot_hash(self.mean)


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
    write_adapter(folder, adapted.config_document(), snapshot)


def write_adapter(folder: Path, config: Mapping[str, Any], snapshot: Snapshot) -> None:
    """As :func:`save_adapter`, with the content of adapter_config.json given."""
    folder.mkdir(parents=True)
    atomic.write_json(folder / CONFIG_FILE, config)
    path = folder / ADAPTER_FILE
    save_tensors(path, snapshot)
    _check_same(path, load_tensors(path), snapshot)


def store_adapter(
    folder: Path, config: Mapping[str, Any], snapshot: Snapshot, reference: Reference | None
) -> dict[str, Any]:
    """Write an adapter into a task's folder, as a difference where that is smaller.

    Args:
        folder: the folder being filled.
        config: the content of adapter_config.json.
        snapshot: the adapter.
        reference: what it may be stored against; None: store it dense.

    Returns:
        What task.json says of it under ``storage``.

    Raises:
        RunDirError: what was read back is not what was written, or a value is not finite.
    """
    more = {key: value for key, value in snapshot.items() if is_more(key)}
    snapshot = lora_of(snapshot)
    if more:
        save_tensors(folder / WEIGHTS_FILE, more)
        _check_same(folder / WEIGHTS_FILE, load_tensors(folder / WEIGHTS_FILE), more)
        reference = None
    if not snapshot:
        return {"form": "weights"}
    write_adapter(folder / ADAPTER, config, snapshot)
    dense_bytes = (folder / ADAPTER / ADAPTER_FILE).stat().st_size
    if reference is None:
        return {"form": "dense", "dense_bytes": dense_bytes}
    difference = encode(snapshot, reference.mean)
    path = folder / DELTA_FILE
    save_tensors(path, difference.tensors)
    facts = {
        "form": "delta",
        "reference": list(reference.members),
        "reference_hash": reference.digest,
        "entries": difference.entries,
        "entries_equal": difference.equal,
        "dense_bytes": dense_bytes,
        "delta_bytes": path.stat().st_size,
    }
    if path.stat().st_size >= dense_bytes:
        path.unlink()
        return facts | {"form": "dense"}
    _check_same(path, _decoded(path, load_tensors(path), reference.mean), snapshot)
    shutil.rmtree(folder / ADAPTER)
    atomic.write_json(folder / CONFIG_FILE, config)
    return facts


def _check_same(path: Path, again: Snapshot, snapshot: Snapshot) -> None:
    """Compare bits: 0.0 and -0.0 are equal numbers, but not the same adapter."""
    same = again.keys() == snapshot.keys() and all(
        again[key].shape == value.shape
        and torch.equal(again[key].view(torch.int32), value.contiguous().view(torch.int32))
        for key, value in snapshot.items()
    )
    if not same:
        raise RunDirError(f"{path} does not read back as written", "check the disk")


def _decoded(path: Path, tensors: Snapshot, mean: Snapshot) -> Snapshot:
    try:
        return decode(tensors, mean)
    except ValueError as error:
        raise RunDirError(f"{path} is damaged: {error}", _PUT_BACK) from None


def load_adapter(run: RunDir, index: int, name: str) -> Snapshot:
    """Return the adapter that answers for a finished task, verified against its manifest.

    Raises:
        RunDirError: a file is missing or not as it was written; or the task is stored as a
            difference from a task whose adapter is missing or another one now.
    """
    return load_adapters(run, [(index, name)])[0]


def load_adapters(run: RunDir, places: Sequence[Place]) -> list[Snapshot]:
    """Return the adapters that answer for finished tasks; see :func:`load_adapter`.

    What several of them are built from is read once.
    """
    while True:
        groups = read_merged(run)
        try:
            return _Reader(run, groups).read(places)
        except RunDirError:
            if read_merged(run) == groups:
                raise
            # A writer has merged adapters between the two lines above.


def trained_places(run: RunDir) -> list[Place]:
    """Return index and name of every task whose folder is committed, in stream order."""
    places = [(entry["index"], entry["name"]) for entry in run.info.tasks]
    return [place for place in places if atomic.committed(run.task_dir(*place)) is not None]


def since(run: RunDir, place: Place) -> Place:
    """Return the task after which a task's own adapter became what it is now.

    That is the task itself, or the one after which its adapter was merged.
    """
    for group in read_merged(run):
        if place[0] in group.members:
            return group.after, run.info.tasks[group.after]["name"]
    return place


def load_config(run: RunDir, index: int, name: str) -> dict[str, Any]:
    """Return the content of a finished task's adapter_config.json.

    Raises:
        RunDirError: it is missing or damaged.
        UsageError: the task has no adapter, since whole weights alone were trained.
    """
    folder = run.task_dir(index, name)
    for group in read_merged(run):
        if index in group.members:
            folder = run.merged_dir(group.unit)
    for place in (folder / ADAPTER / CONFIG_FILE, folder / CONFIG_FILE):
        if place.exists():
            return read_json(place)
    if storage_of(run, index, name).get("form") == "weights":
        raise UsageError(
            f"task {name} has no adapter: its method trains weights of the base itself",
            f"they are in {folder / WEIGHTS_FILE}, under their names in the base",
        )
    raise RunDirError(f"{folder} holds no {CONFIG_FILE}", _PUT_BACK)


def storage_of(run: RunDir, index: int, name: str) -> dict[str, Any]:
    """Return what a task's task.json says of how its adapter is stored.

    Raises:
        RunDirError: the task's folder is missing or damaged.
    """
    place = atomic.committed(run.task_dir(index, name)) or run.task_dir(index, name)
    found = read_json(place / TASK_FILE).get(STORAGE, {"form": "dense"})
    return found if isinstance(found, dict) else {}


def make_reference(run: RunDir, members: Sequence[int]) -> Reference | None:
    """Return the mean adapter of earlier tasks; None for no tasks."""
    names = [entry["name"] for entry in run.info.tasks]
    adapters = [load_adapter(run, member, names[member]) for member in members]
    return Reference(tuple(members), mean_snapshot(adapters)) if adapters else None


def recommit(
    run: RunDir, index: int, name: str, adapter: Snapshot | None, facts: Mapping[str, Any]
) -> None:
    """Commit a task's folder again with its adapter dense, or without; all else stays.

    Args:
        run: the run directory; its lock is held.
        index: the task's place in the stream.
        name: its name.
        adapter: to be stored dense; None: the folder is left without an adapter.
        facts: put over the content of task.json.

    Raises:
        RunDirError: the folder is missing or not as it was written.
    """
    target = run.task_dir(index, name)
    verify(target)
    config = load_config(run, index, name)
    with atomic.commit_dir(target, beside=PREDICTIONS) as folder:
        for file in read_manifest(target):
            if file in (TASK_FILE, DELTA_FILE, CONFIG_FILE) or file.startswith(f"{ADAPTER}/"):
                continue
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(target / file, folder / file, follow_symlinks=False)
        storage: dict[str, Any] = {}
        if adapter is not None:
            storage = {STORAGE: store_adapter(folder, config, adapter, None)}
        document = read_json(target / TASK_FILE)
        atomic.write_json(folder / TASK_FILE, {**document, **storage, **facts})


def _read_whole(folder: Path) -> Snapshot:
    """Read a task's tensors: an adapter, weights, or both.

    Where there are no weights a missing adapter is an error, for the folder may just be exchanged:
    the reader then looks again.
    """
    adapter, weights = folder / ADAPTER / ADAPTER_FILE, folder / WEIGHTS_FILE
    more = load_tensors(weights) if weights.exists() else {}
    return more if more and not adapter.exists() else load_tensors(adapter) | more


class _Reader:
    """Reads tasks' adapters and whatever they are built from."""

    def __init__(self, run: RunDir, groups: Sequence[Merged]) -> None:
        self._run = run
        self._names = [entry["name"] for entry in run.info.tasks]
        self._units = {member: group.unit for group in groups for member in group.members}

    def read(self, places: Sequence[Place]) -> list[Snapshot]:
        """Rebuild what the adapters are built from, in stream order; drop it after its last use."""
        for index, name in places:
            if self._names[index : index + 1] != [name]:
                raise RunDirError(f"{self._run.path} has no task {name} at {index}", _PUT_BACK)
        wanted = {index for index, _ in places}
        references = self._references(wanted)
        last_user = {m: user for user in sorted(references) for m in references[user]}
        built: dict[int, Snapshot] = {}
        for task in sorted(references):
            members = references[task]
            built[task] = self._rebuilt(task, built) if members else self._whole(task)
            for member in set(members) - wanted:
                if last_user[member] == task:
                    del built[member]
        return [built[index] for index, _ in places]

    def _references(self, wanted: Iterable[int]) -> dict[int, tuple[int, ...]]:
        """Return the tasks that adapters are built from, each with those it refers to itself."""
        found: dict[int, tuple[int, ...]] = {}
        pending = list(wanted)
        while pending:
            task = pending.pop()
            if task not in found:
                found[task] = self._members(task)
                pending += found[task]
        return found

    def _members(self, task: int) -> tuple[int, ...]:
        """Return the tasks whose mean a task's adapter is stored against; none: it is whole."""
        if task in self._units:
            return ()
        name = self._names[task]
        storage = storage_of(self._run, task, name)
        if storage.get("form") != "delta":
            return ()
        members = storage.get("reference")
        if not isinstance(members, list) or not members:
            raise RunDirError(f"task.json of {name} names no reference", _PUT_BACK)
        if not all(type(member) is int and 0 <= member < task for member in members):
            raise RunDirError(
                f"task.json of {name} names a reference that is not earlier", _PUT_BACK
            )
        for member in members:
            folder = self._run.task_dir(member, self._names[member])
            if member not in self._units and atomic.committed(folder) is None:
                raise RunDirError(
                    f"the adapter of task {name} is stored as its difference from that of "
                    f"{self._names[member]}, but {folder} is missing",
                    _PUT_BACK,
                )
        return tuple(members)

    def _whole(self, task: int) -> Snapshot:
        folder = self._run.task_dir(task, self._names[task])
        if task in self._units:
            folder = self._run.merged_dir(self._units[task])
        return atomic.read_unit(folder, _read_whole)

    def _rebuilt(self, task: int, built: Mapping[int, Snapshot]) -> Snapshot:
        name = self._names[task]
        storage = storage_of(self._run, task, name)
        mean = mean_snapshot([built[member] for member in storage["reference"]])
        if snapshot_hash(mean) != storage.get("reference_hash"):
            others = ", ".join(self._names[member] for member in storage["reference"])
            raise RunDirError(
                f"the adapter of task {name} is stored as its difference from that of {others}, "
                "which is another one now",
                f"put the folder of {others} back from a copy, or start a new run directory",
            )
        folder = self._run.task_dir(task, name)
        path = folder / DELTA_FILE
        return atomic.read_unit(
            folder, lambda place: _decoded(path, load_tensors(place / DELTA_FILE), mean)
        )
