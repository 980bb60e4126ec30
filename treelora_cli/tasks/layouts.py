"""Finding tasks in a folder and saying which layout each has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from treelora_cli.errors import DataError
from treelora_cli.tasks.columns import Columns, columns_of
from treelora_cli.tasks.hub import PREFIX, DatasetId, is_saved, parse_id
from treelora_cli.tasks.read_cl import INSTRUCTIONS_FILE, LABELS_FILE
from treelora_cli.tasks.read_prepared import INDEX_FILE, find_prepared
from treelora_cli.tasks.source import (
    CL_BENCHMARK,
    DATASET,
    PLAIN,
    SPLIT_NAMES,
    TRACE,
    WHOLE,
    TaskSource,
)
from treelora_cli.tasks.tables import JSON_SUFFIXES, SUFFIXES, peek_columns
from treelora_cli.tasks.types import SPLITS


@dataclass(frozen=True, slots=True)
class Found:
    """What a place of data holds.

    Attributes:
        root: the folder, file or data set, as it was named.
        tasks: the tasks by name, in alphabetical order.
        ignored: what was passed over, and why.
    """

    root: str
    tasks: dict[str, TaskSource]
    ignored: dict[str, str]

    @property
    def layouts(self) -> tuple[str, ...]:
        """The distinct layouts of the tasks."""
        return tuple(sorted({source.layout for source in self.tasks.values()}))


def detect(data: Path | str, columns: Columns | None = None) -> Found:
    """Find every task in a data folder, a file or a data set of the ``datasets`` library.

    Known are TRACE folders, the O-LoRA benchmark, tables (JSON, JSON lines, CSV, TSV, Parquet,
    Arrow), folders of ``save_to_disk`` and what ``treelora prepare`` wrote; layouts may stand side
    by side in one folder. One file, or ``hf:ORG/NAME``, is one task named after it.

    Args:
        data: the place.
        columns: the columns of prompt and answer in tables; None: found by their names.

    Raises:
        DataError: nothing there, no task in it, or two tasks of one name.
        UsageError: a text after ``hf:`` that names no data set.
    """
    if str(data).startswith(PREFIX):
        return _one_dataset(parse_id(str(data)), str(data), columns)
    path = Path(data)
    if not path.is_dir():
        return _one_file(path, columns)
    if (path / INDEX_FILE).exists():
        return Found(str(path), find_prepared(path), {})
    if is_saved(path):
        return _one_dataset(DatasetId(str(path), local=True), str(path), columns)
    if _task_folder(path, path, columns) is not None:
        hint = f"give the folder above it and the name: --tasks {path.resolve().name}"
        raise DataError(f"{path}: the folder of one task, expected a folder of tasks", hint)
    found = _scan(path, columns)
    if not found.tasks:
        raise DataError(f"{path}: no task found", _hint_for_empty(path, found))
    return found


def detect_all(places: Sequence[Path | str], columns: Columns | None = None) -> Found:
    """Find the tasks of several places as one.

    Raises:
        DataError: as ``detect``, or two places have a task of the same name.
        UsageError: as ``detect``.
    """
    tasks: dict[str, TaskSource] = {}
    ignored: dict[str, str] = {}
    for place in places:
        found = detect(place, columns)
        for name in tasks.keys() & found.tasks.keys():
            raise DataError(
                f"two tasks are called {name!r}: one in {place}, one in a source before it",
                "give the sources one by one, or name other tasks",
            )
        tasks |= found.tasks
        ignored |= found.ignored
    return Found(", ".join(map(str, places)), dict(sorted(tasks.items())), ignored)


def _one_dataset(dataset: DatasetId, said: str, columns: Columns | None) -> Found:
    place = f"{dataset.name}/" if dataset.local else str(dataset)
    source = TaskSource(dataset.name, DATASET, {}, place, columns, dataset)
    return Found(said, {dataset.name: source}, {})


def _one_file(path: Path, columns: Columns | None) -> Found:
    known = f"{', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}"
    if not path.exists():
        hint = f"give a folder, a file ({known}) or {PREFIX}ORG/NAME"
        raise DataError(f"{path}: found nothing, expected data", hint)
    if not path.is_file():
        raise DataError(f"{path}: not a regular file", f"give a folder or a file ({known})")
    if path.suffix.lower() not in SUFFIXES:
        raise DataError(f"{path}: not a format that is read", f"expected {known}")
    source = TaskSource(path.stem, PLAIN, {WHOLE: path}, path.name, columns)
    return Found(str(path), {path.stem: source}, {})


def _scan(path: Path, columns: Columns | None) -> Found:
    tasks: dict[str, TaskSource] = {}
    ignored: dict[str, str] = {}
    for candidate, source in _candidates(path, columns):
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
    return Found(str(path), dict(sorted(tasks.items())), ignored)


def _candidates(path: Path, columns: Columns | None) -> Iterator[tuple[Path, TaskSource | str]]:
    """Yield every entry with the task it holds or the reason it was passed over."""
    for entry in sorted(path.iterdir()):
        if entry.name.startswith(".") or entry.name == INSTRUCTIONS_FILE:
            continue
        if not entry.is_dir():
            yield entry, _single_file(entry, columns)
            continue
        source = _task_folder(entry, path, columns)
        if source is not None:
            yield entry, source
            continue
        inner = [
            (sub, found)
            for sub in sorted(entry.iterdir())
            if sub.is_dir() and (found := _task_folder(sub, path, columns)) is not None
        ]
        groups = [pair for pair in inner if pair[1].layout == CL_BENCHMARK]
        if groups:
            yield from groups
        else:
            yield entry, "no train file in it"


def _task_folder(folder: Path, root: Path, columns: Columns | None) -> TaskSource | None:
    """Return the task of a folder that has a training file, else None."""
    place = folder.relative_to(root).as_posix() + "/"
    if is_saved(folder):
        dataset = DatasetId(str(folder), local=True)
        return TaskSource(folder.name, DATASET, {}, place, columns, dataset)
    files: dict[str, Path] = {}
    for split, names in SPLIT_NAMES.items():
        for name in names:
            for suffix in SUFFIXES:
                if split not in files and (folder / f"{name}{suffix}").exists():
                    files[split] = folder / f"{name}{suffix}"
    if "train" not in files:
        return None
    layout = _folder_layout(folder, files)
    return TaskSource(folder.name, layout, files, place, columns if layout == PLAIN else None)


def _folder_layout(folder: Path, files: dict[str, Path]) -> str:
    if any(path.suffix not in JSON_SUFFIXES for path in files.values()):
        return PLAIN
    names = peek_columns(files["train"])
    if (folder / LABELS_FILE).exists() and (names is None or "sentence" in names):
        return CL_BENCHMARK
    as_trace = all(folder / f"{split}.json" in files.values() for split in SPLITS)
    if as_trace and (names is None or {"prompt", "answer"} & set(names)):
        return TRACE
    return PLAIN


def _single_file(path: Path, columns: Columns | None) -> TaskSource | str:
    if path.suffix.lower() not in SUFFIXES:
        return f"not one of {', '.join(SUFFIXES)}"
    names = peek_columns(path)
    known = columns is not None and names is not None and set(columns.needed) <= set(names)
    if names is not None and not known and columns_of(names) is None:
        return f"no known pair of columns: {', '.join(map(repr, names[:8]))}"
    if names is None and path.suffix == ".json":
        return "no rows in it"
    return TaskSource(path.stem, PLAIN, {WHOLE: path}, path.name, columns)


def _hint_for_empty(path: Path, found: Found) -> str:
    """Point at the folder below that was probably meant."""
    below = [sub for sub in sorted(path.iterdir()) if sub.is_dir() and sub.name[0] != "."]
    counts = {
        sub: len(_scan(sub, None).tasks) for sub in below if _task_folder(sub, path, None) is None
    }
    full = [f"{sub} ({count} task{'s' * (count > 1)})" for sub, count in counts.items() if count]
    if full:
        return f"there are tasks in {' and in '.join(full)}: give such a folder"
    if found.ignored:
        reasons = [f"{name} ({why})" for name, why in list(found.ignored.items())[:4]]
        return f"passed over: {'; '.join(reasons)}"
    return "expected <TASK>/train.json and so on, <GROUP>/<TASK>/train.json, or <TASK>.jsonl"
