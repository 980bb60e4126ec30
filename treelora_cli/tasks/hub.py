"""Data sets that the ``datasets`` library loads: a hub id, or a folder it can read."""

from __future__ import annotations

import errno
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treelora_cli.errors import DataError, EnvironmentProblem, TreeloraError, UsageError
from treelora_cli.tasks.arrowrows import rows_of
from treelora_cli.tasks.problems import Problems
from treelora_cli.tasks.tables import Table

PREFIX = "hf:"
_FORM = "hf:ORG/NAME[@REVISION][:CONFIG], or hf:./FOLDER"
_HUB_ID = re.compile(r"[A-Za-z0-9_.-]+(/[A-Za-z0-9_.-]+)?")
_SAVED = ("dataset_dict.json", "state.json")
_BATCH = 1000


@dataclass(frozen=True, slots=True)
class DatasetId:
    """A data set as the user named it.

    Attributes:
        path: hub id or folder.
        revision: branch, tag or commit on the hub, or None.
        config: which of its configurations, or None.
        local: True for a folder.
    """

    path: str
    revision: str | None = None
    config: str | None = None
    local: bool = False

    def __str__(self) -> str:
        """Return the text that names it."""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{self.path}{revision}{f':{self.config}' if self.config else ''}"

    @property
    def name(self) -> str:
        """The task's name: the last part of the id, and the configuration if one is named."""
        last = Path(self.path).resolve().name if self.local else self.path.rpartition("/")[2]
        return f"{last}-{self.config}" if self.config else last


def is_saved(folder: Path) -> bool:
    """Say whether a folder was written by the library's ``save_to_disk``."""
    return any((folder / name).is_file() for name in _SAVED)


def parse_id(text: str) -> DatasetId:
    """Read ``hf:ORG/NAME[@REVISION][:CONFIG]`` or ``hf:FOLDER[:CONFIG]``.

    Raises:
        UsageError: another form, or a revision of a folder.
        DataError: a folder that does not exist.
    """
    body = text.removeprefix(PREFIX)
    if Path(body).expanduser().is_dir() and body:
        return DatasetId(str(Path(body).expanduser()), local=True)
    rest, _, config = body.partition(":")
    path, at, revision = rest.partition("@")
    folder = Path(path).expanduser()
    is_path = path.startswith((".", "/", "~"))
    if path and (is_path or folder.is_dir()):
        if not folder.is_dir():
            raise DataError(f"{text}: no such folder {path}", "give a folder or a hub id")
        if at:
            raise UsageError(f"{text}: a folder has no revision", f"the form is {_FORM}")
        return DatasetId(str(folder), config=config or None, local=True)
    if not _HUB_ID.fullmatch(path) or (at and not revision):
        raise UsageError(f"{text!r} names no data set", f"the form is {_FORM}")
    return DatasetId(path, revision or None, config or None)


def load_splits(source: DatasetId, problems: Problems) -> tuple[dict[str, Table], str]:
    """Load every split of a data set.

    Downloads are kept in the library's cache; ``HF_HUB_OFFLINE`` is respected by the library, and
    code of the data set's own is never run.

    Args:
        source: the data set.
        problems: takes rows whose class number has no name.

    Returns:
        Tables by the splits' own names, and the commit that was read, if it can be told.

    Raises:
        DataError: it cannot be found, reached or read; one line with the library's reason.
        EnvironmentProblem: the library is not installed, or the disk is full.
    """
    datasets = _library()
    try:
        found = _load(datasets, source)
        if not isinstance(found, dict):
            found = {str(found.split or "train"): found}
        splits = {name: _table(split, source, name, problems) for name, split in found.items()}
        return splits, _commit(next(iter(found.values()), None))
    except (TreeloraError, MemoryError):
        raise
    except Exception as error:
        # The library lets errors of many others through: hub, Arrow, pandas, fsspec, ...
        raise _explained(source, error) from error


def _library() -> Any:
    try:
        import datasets
    except ImportError as error:
        raise EnvironmentProblem(
            "hub data sets need the package datasets, which is not installed",
            "pip install 'treelora[datasets]'",
        ) from error
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    return datasets


def _load(datasets: Any, source: DatasetId) -> Any:
    if source.local and is_saved(Path(source.path)):
        return datasets.load_from_disk(source.path)
    return datasets.load_dataset(source.path, source.config, revision=source.revision)


def _table(split: Any, source: DatasetId, name: str, problems: Problems) -> Table:
    classes = {
        column: tuple(feature.names)
        for column, feature in split.features.items()
        if hasattr(feature, "names") and hasattr(feature, "str2int")
    }
    batches = (batch.to_pylist() for batch in split.with_format("arrow").iter(_BATCH))
    place = f"{source} {name}"
    return Table(place, rows_of(batches, place, classes, problems), classes)


def _commit(split: Any) -> str:
    """Return the commit in the addresses that the library notes for what it downloaded."""
    noted = getattr(getattr(split, "info", None), "download_checksums", None) or {}
    found = {match[1] for url in noted if (match := re.search(r"@([0-9a-f]{40})/", str(url)))}
    return found.pop() if len(found) == 1 else ""


def _explained(source: DatasetId, error: Exception) -> TreeloraError:
    reason = next(iter((str(error).strip() or type(error).__name__).splitlines()))
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return EnvironmentProblem(f"{source}: the disk is full", "free some space, or set HF_HOME")
    return DataError(f"{source}: cannot be loaded: {reason[:300]}", _hint(error, reason))


_HINTS = (
    (
        r"OfflineModeIsEnabled",
        "HF_HUB_OFFLINE is set and the data set is not in the cache: unset it, or give a folder",
    ),
    (
        r"gated|Unauthorized|\b40[13]\b|private",
        "log in with `hf auth login` (or set HF_TOKEN) and accept the terms on its page",
    ),
    (r"ConnectionError|couldn't reach", "check the network, or give a folder that holds the data"),
    (r"Config name is missing|BuilderConfig", f"name a configuration: {_FORM}"),
    (r"scripts are no longer", "code of a data set's own is never run: convert it to Parquet"),
    (r"NotFound|doesn't exist|\b404\b", f"check the id, the revision and your access: {_FORM}"),
)


def _hint(error: Exception, reason: str) -> str:
    kinds = [kind.__name__ for kind in type(error).__mro__]
    story = f"{' '.join(kinds)} {type(error.__cause__).__name__} {reason}"
    found = (hint for pattern, hint in _HINTS if re.search(pattern, story, re.I))
    return next(found, f"the form is {_FORM}")
