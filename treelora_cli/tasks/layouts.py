"""Finding tasks in a folder and saying which layout each has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from treelora_cli.errors import DataError
from treelora_cli.tasks.jsonrows import first_fields
from treelora_cli.tasks.read_cl import INSTRUCTIONS_FILE, LABELS_FILE
from treelora_cli.tasks.read_plain import columns_of
from treelora_cli.tasks.read_prepared import INDEX_FILE, find_prepared
from treelora_cli.tasks.source import CL_BENCHMARK, PLAIN, TRACE, WHOLE, TaskSource
from treelora_cli.tasks.types import SPLITS

_SPLIT_NAMES = {
    "train": ("train",),
    "eval": ("eval", "dev", "valid", "validation", "val"),
    "test": ("test",),
}
_SUFFIXES = (".json", ".jsonl")


@dataclass(frozen=True, slots=True)
class Found:
    """What a folder holds.

    Attributes:
        root: the folder.
        tasks: the tasks by name, in alphabetical order.
        ignored: what was passed over, and why.
    """

    root: Path
    tasks: dict[str, TaskSource]
    ignored: dict[str, str]

    @property
    def layouts(self) -> tuple[str, ...]:
        """The distinct layouts of the tasks."""
        return tuple(sorted({source.layout for source in self.tasks.values()}))


def detect(path: Path) -> Found:
    """Find every task in a data folder.

    Known are TRACE folders, the O-LoRA benchmark, plain JSON or JSON lines, and what
    ``treelora prepare`` wrote; layouts may stand side by side in one folder.

    Raises:
        DataError: no such folder, no task in it, or two tasks of one name.
    """
    if not path.is_dir():
        there = "a file" if path.exists() else "nothing"
        raise DataError(f"{path}: found {there}, expected a data folder", "give the folder")
    if (path / INDEX_FILE).exists():
        return Found(path, find_prepared(path), {})
    if _task_folder(path, path) is not None:
        hint = f"give the folder above it and the name: --tasks {path.resolve().name}"
        raise DataError(f"{path}: the folder of one task, expected a folder of tasks", hint)
    found = _scan(path)
    if not found.tasks:
        raise DataError(f"{path}: no task found", _hint_for_empty(path, found))
    return found


def _scan(path: Path) -> Found:
    tasks: dict[str, TaskSource] = {}
    ignored: dict[str, str] = {}
    for candidate, source in _candidates(path):
        place = candidate.relative_to(path).as_posix()
        if isinstance(source, str):
            ignored[place] = source
        elif source.name in tasks:
            raise DataError(
                f"{path}: two tasks are called {source.name!r}: "
                f"{tasks[source.name].place} and {source.place}",
                "rename one of them or keep them in different folders",
            )
        else:
            tasks[source.name] = source
    return Found(path, dict(sorted(tasks.items())), ignored)


def _candidates(path: Path) -> Iterator[tuple[Path, TaskSource | str]]:
    """Yield every entry with the task it holds or the reason it was passed over."""
    for entry in sorted(path.iterdir()):
        if entry.name.startswith(".") or entry.name == INSTRUCTIONS_FILE:
            continue
        if not entry.is_dir():
            yield entry, _single_file(entry)
            continue
        source = _task_folder(entry, path)
        if source is not None:
            yield entry, source
            continue
        inner = [
            (sub, found)
            for sub in sorted(entry.iterdir())
            if sub.is_dir() and (found := _task_folder(sub, path)) is not None
        ]
        groups = [pair for pair in inner if pair[1].layout == CL_BENCHMARK]
        if groups:
            yield from groups
        else:
            yield entry, "no train file in it"


def _task_folder(folder: Path, root: Path) -> TaskSource | None:
    """Return the task of a folder that has a training file, else None."""
    files: dict[str, Path] = {}
    for split, names in _SPLIT_NAMES.items():
        for name in names:
            for suffix in _SUFFIXES:
                if split not in files and (folder / f"{name}{suffix}").exists():
                    files[split] = folder / f"{name}{suffix}"
    if "train" not in files:
        return None
    place = folder.relative_to(root).as_posix() + "/"
    layout = _folder_layout(folder, files)
    return TaskSource(folder.name, layout, files, place)


def _folder_layout(folder: Path, files: dict[str, Path]) -> str:
    fields = first_fields(files["train"])
    if (folder / LABELS_FILE).exists() and (fields is None or "sentence" in fields):
        return CL_BENCHMARK
    as_trace = all(folder / f"{split}.json" in files.values() for split in SPLITS)
    if as_trace and (fields is None or {"prompt", "answer"} & set(fields)):
        return TRACE
    return PLAIN


def _single_file(path: Path) -> TaskSource | str:
    if path.suffix not in _SUFFIXES:
        return "not a .json or .jsonl file"
    fields = first_fields(path)
    if fields is not None and columns_of(list(fields)) is None:
        return f"no known pair of columns: {', '.join(map(repr, list(fields)[:8]))}"
    if fields is None and path.suffix == ".json":
        return "no rows in it"
    return TaskSource(path.stem, PLAIN, {WHOLE: path}, path.name)


def _hint_for_empty(path: Path, found: Found) -> str:
    """Point at the folder below that was probably meant."""
    below = [sub for sub in sorted(path.iterdir()) if sub.is_dir() and sub.name[0] != "."]
    counts = {sub: len(_scan(sub).tasks) for sub in below if _task_folder(sub, path) is None}
    full = [f"{sub} ({count} task{'s' * (count > 1)})" for sub, count in counts.items() if count]
    if full:
        return f"there are tasks in {' and in '.join(full)}: give such a folder"
    if found.ignored:
        reasons = [f"{name} ({why})" for name, why in list(found.ignored.items())[:4]]
        return f"passed over: {'; '.join(reasons)}"
    return "expected <TASK>/train.json and so on, <GROUP>/<TASK>/train.json, or <TASK>.jsonl"
