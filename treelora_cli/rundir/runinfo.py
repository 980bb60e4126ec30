"""run.json: what a run is, and how far it has come."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypedDict

from treelora_cli.errors import RunDirError
from treelora_cli.rundir.jsonfile import read_json
from treelora_cli.rundir.names import is_task_name

FORMAT_VERSION = 1
STATUSES = ("running", "finished", "interrupted", "failed")
TASK_STATUSES = ("pending", "training", "trained", "finished")


class TaskEntry(TypedDict):
    """One task of the stream as run.json records it.

    ``status``: ``pending``, ``training`` (begun), ``trained`` (its folder is committed) or
    ``finished`` (tree and evaluation done too).
    """

    name: str
    index: int
    metric: str
    status: str


@dataclass
class RunInfo:
    """The content of run.json.

    Attributes:
        method: the method's name.
        model: the base model as the user gave it.
        base_fingerprint: identifies the base model's weights.
        builtin_base: True for the built-in tiny model.
        builtin_data: True for the built-in synthetic tasks.
        seed: the run's seed.
        versions: package versions by name.
        tasks: the stream, in order; ``tasks[i]["index"] == i``.
        status: ``running``, ``finished``, ``interrupted`` or ``failed``.
        format_version: the format of the run directory.
        extra: further JSON values, by a key that is none of the above; kept as they are.
    """

    method: str
    model: str
    base_fingerprint: str
    builtin_base: bool
    builtin_data: bool
    seed: int
    versions: dict[str, str] = field(default_factory=dict)
    tasks: list[TaskEntry] = field(default_factory=list)
    status: str = "running"
    format_version: int = FORMAT_VERSION
    extra: dict[str, Any] = field(default_factory=dict)

    def task(self, name: str) -> TaskEntry | None:
        """Return the entry of the task with that name, or None."""
        return next((entry for entry in self.tasks if entry["name"] == name), None)

    def add_task(self, name: str, metric: str) -> TaskEntry:
        """Append a pending task and return its entry.

        Raises:
            ValueError: the run has a task of that name.
        """
        if self.task(name) is not None:
            raise ValueError(f"the run has a task {name!r} already")
        entry = TaskEntry(name=name, index=len(self.tasks), metric=metric, status="pending")
        self.tasks.append(entry)
        return entry

    def to_json(self) -> dict[str, Any]:
        """Return the document that run.json holds.

        Raises:
            ValueError: a field does not have the value that a reader would accept.
        """
        doc = {name: getattr(self, name) for name in sorted(_FIELDS - {"extra"})}
        doc = {**self.extra, **doc}
        problem = _problem(doc)
        if problem:
            raise ValueError(f"run.json: {problem}")
        return doc


_FIELDS = {entry.name for entry in fields(RunInfo)}
_TYPES: dict[str, type] = {
    "method": str,
    "model": str,
    "base_fingerprint": str,
    "builtin_base": bool,
    "builtin_data": bool,
    "seed": int,
    "versions": dict,
    "tasks": list,
    "status": str,
}


def read_info(path: Path) -> RunInfo:
    """Read run.json.

    Raises:
        RunDirError: missing, damaged, or of another format version.
    """
    doc = read_json(path)
    version = doc.get("format_version")
    if isinstance(version, bool) or not isinstance(version, int):
        raise _damaged(path, "it names no format version")
    if version > FORMAT_VERSION:
        raise RunDirError(
            f"{path.parent} was created by a newer version of treelora (run format {version}; "
            f"this one knows {FORMAT_VERSION})",
            "upgrade treelora",
        )
    if version < FORMAT_VERSION:
        raise RunDirError(
            f"{path.parent} has run format {version}; this version of treelora reads "
            f"{FORMAT_VERSION}",
            "use the version that made it, or start a new run",
        )
    problem = _problem(doc)
    if problem:
        raise _damaged(path, problem)
    known = {name: value for name, value in doc.items() if name in _FIELDS - {"extra"}}
    extra = {name: value for name, value in doc.items() if name not in known}
    return RunInfo(**known, extra=extra)


def _problem(doc: dict[str, Any]) -> str:
    """Say what is wrong with the document; empty if nothing is."""
    for name, kind in _TYPES.items():
        if name not in doc:
            return f"{name!r} is missing"
        value = doc[name]
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            return f"{name!r} is no {kind.__name__}"
    if doc["status"] not in STATUSES:
        return f"the status {doc['status']!r} is none of {', '.join(STATUSES)}"
    if not all(isinstance(version, str) for version in doc["versions"].values()):
        return "'versions' holds something that is no text"
    names = set()
    for index, entry in enumerate(doc["tasks"]):
        problem = _task_problem(index, entry)
        if problem:
            return f"task {index}: {problem}"
        names.add(entry["name"])
    return "" if len(names) == len(doc["tasks"]) else "a task name occurs twice"


def _task_problem(index: int, entry: Any) -> str:
    if not isinstance(entry, dict) or not set(entry) >= TaskEntry.__required_keys__:
        return f"it does not have {', '.join(sorted(TaskEntry.__required_keys__))}"
    if not is_task_name(entry["name"]):
        return f"{entry['name']!r} cannot be a task name"
    if entry["index"] != index or isinstance(entry["index"], bool):
        return f"its index is {entry['index']!r}"
    if not isinstance(entry["metric"], str):
        return "its metric is no text"
    if entry["status"] not in TASK_STATUSES:
        return f"the status {entry['status']!r} is none of {', '.join(TASK_STATUSES)}"
    return ""


def _damaged(path: Path, reason: str) -> RunDirError:
    return RunDirError(f"{path} is damaged: {reason}", "restore it from a copy, or start a new run")
