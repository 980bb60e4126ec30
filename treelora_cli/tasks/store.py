"""Writing prepared tasks: one folder, replaced as a whole or not at all.

The same tasks give the same bytes. Two processes that prepare one folder take turns, and the
second finds its work done.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from treelora_cli.conversation import Conversation
from treelora_cli.errors import DataError, UsageError
from treelora_cli.tasks.catalog import lookup
from treelora_cli.tasks.hub import PREFIX
from treelora_cli.tasks.inspect import duplicates
from treelora_cli.tasks.problems import count_reasons
from treelora_cli.tasks.quarantine import FOLDER as QUARANTINE
from treelora_cli.tasks.quarantine import quarantine_lines
from treelora_cli.tasks.read_prepared import FORMAT, INDEX_FILE, read_index
from treelora_cli.tasks.source import Loaded
from treelora_cli.tasks.types import SPLITS, Row

log = logging.getLogger("treelora")

_MANIFEST = "MANIFEST.json"
# JSON allows these raw, but many readers take them for ends of lines.
_LINE_ENDS = {ord(char): f"\\u{ord(char):04x}" for char in "\x85\u2028\u2029"}

Lengths = Mapping[str, Mapping[str, Mapping[str, int]]]


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of the output folder.

    Attributes:
        status: ``written``, ``replaced`` or ``unchanged``.
        entries: the index entry of each task.
        changes: for ``replaced``, which tasks were added, changed or dropped.
    """

    status: str
    entries: dict[str, dict[str, Any]]
    changes: tuple[str, ...] = ()


def store(
    loaded: Sequence[Loaded],
    out: Path,
    sources: Sequence[Path | str],
    tokenizer: str | None = None,
    lengths: Lengths | None = None,
    *,
    quarantine: bool = False,
) -> Stored:
    """Write tasks to a folder; afterwards it holds these tasks and no others.

    A folder with the same content is left alone; an older prepared folder is replaced as a
    whole. Anything else in the way is refused.

    Args:
        loaded: the tasks.
        out: the folder to write.
        sources: the folders, files or data sets they were read from.
        tokenizer: the model whose tokenizer measured ``lengths``.
        lengths: percentiles of tokens by task name.
        quarantine: write the rows that were left out to ``quarantine/TASK.jsonl``.

    Raises:
        UsageError: ``out`` holds something that was not prepared, or a source itself.
    """
    files: dict[str, bytes] = {}
    entries: dict[str, dict[str, Any]] = {}
    for one in sorted(loaded, key=lambda item: item.task.name):
        name = one.task.name
        if name.casefold() == QUARANTINE:
            raise UsageError(f"a prepared task cannot be called {name!r}", "rename it")
        parts = {split: jsonl(one.task.splits[split]) for split in SPLITS}
        files |= {f"{name}/{split}.jsonl": data for split, data in parts.items()}
        entries[name] = _entry(one, parts)
        if quarantine and one.bad_rows:
            files[f"{QUARANTINE}/{name}.jsonl"] = quarantine_lines(one.bad_rows, sources)
        if lengths is not None:
            entries[name]["tokens"] = lengths[name]
    index: dict[str, Any] = {"format": FORMAT, "tasks": entries}
    if tokenizer is not None:
        index["tokenizer"] = tokenizer
    files[INDEX_FILE] = (json.dumps(index, ensure_ascii=False, indent=2) + "\n").encode()
    with _alone(out):
        check_out(out, sources)
        if _same(out, files):
            return Stored("unchanged", entries)
        before = read_index(out)["tasks"] if (out / INDEX_FILE).exists() else None
        _write(out, files)
    if before is None:
        return Stored("written", entries)
    return Stored("replaced", entries, tuple(_changes(before, entries)))


def jsonl(rows: Sequence[Row]) -> bytes:
    """Return rows as JSON lines in UTF-8, text as it is but for line separators.

    A conversation carries its turns beside the transcript of them.
    """
    lines = (json.dumps(_document(row), ensure_ascii=False) for row in rows)
    return "".join(f"{line.translate(_LINE_ENDS)}\n" for line in lines).encode("utf-8")


def _document(row: Row) -> dict[str, Any]:
    document: dict[str, Any] = {"prompt": row.prompt, "answer": row.answer}
    if isinstance(row.prompt, Conversation):
        document["turns"] = [{"role": turn.role, "content": turn.text} for turn in row.prompt.turns]
    return document


def _entry(one: Loaded, parts: Mapping[str, bytes]) -> dict[str, Any]:
    task = one.task
    info = lookup(task.name)
    return {
        "metric": task.metric,
        "reading": task.reading,
        "language": task.language,
        "labels": list(task.labels) if task.labels is not None else None,
        "separator": task.separator,
        "max_answer_tokens": task.max_answer_tokens,
        "default_epochs": info.epochs if info is not None else None,
        "synthetic": task.synthetic,
        "layout": one.layout,
        "mapped": one.mapped,
        "source": task.source,
        "fingerprint": task.fingerprint,
        "files": {
            split: {"rows": len(task.splits[split]), "sha256": hashlib.sha256(data).hexdigest()}
            for split, data in parts.items()
        },
        "duplicates": duplicates(task),
        "bad_rows": count_reasons(one.bad_rows),
    }


def check_out(out: Path, sources: Sequence[Path | str]) -> None:
    """Refuse an output folder that holds a source or anything that was not prepared.

    Raises:
        UsageError: see above; the message names what is in the way.
    """
    here = out.resolve()
    for source in sources:
        there = Path(str(source).removeprefix(PREFIX)).resolve()
        # A hub id may look like a path below the output folder.
        if there.exists() and (here == there or here in there.parents):
            raise UsageError(
                f"--out {out} would replace the source {source}", "give another folder"
            )
    if not out.exists():
        return
    hint = "give another folder, or remove this one yourself"
    if not out.is_dir():
        raise UsageError(f"--out {out}: found a file, expected a folder", hint)
    present = [path for path in sorted(out.rglob("*")) if not path.is_dir()]
    if not present:
        return
    if not (out / INDEX_FILE).exists():
        raise UsageError(f"--out {out}: found {present[0].name}, which is not prepared data", hint)
    try:
        tasks = read_index(out)["tasks"]
    except DataError as error:
        raise UsageError(f"--out {out}: {error.message}", hint) from error
    own = {out / INDEX_FILE, out / _MANIFEST}
    own |= {out / name / f"{split}.jsonl" for name in tasks for split in SPLITS}
    own |= {out / QUARANTINE / f"{name}.jsonl" for name in tasks}
    for path in present:
        if path not in own:
            raise UsageError(f"--out {out}: found {path.relative_to(out)} among the data", hint)


def _same(out: Path, files: Mapping[str, bytes]) -> bool:
    if not (out / _MANIFEST).is_file():
        return False
    present = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    return present == {*files, _MANIFEST} and all(
        (out / name).read_bytes() == data for name, data in files.items()
    )


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Hold the right to write ``out`` on this machine, and clear what dead writers left of it."""
    from filelock import FileLock, Timeout

    identity = f"{os.getuid()}\n{out.resolve()}".encode()
    name = f"treelora-prepare-{hashlib.sha256(identity).hexdigest()[:24]}.lock"
    lock = FileLock(Path(tempfile.gettempdir()) / name)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.warning("another process is preparing %s; waiting for it", out)
        lock.acquire()
    try:
        _clear_leftovers(out)
        yield
    finally:
        lock.release()


def _clear_leftovers(out: Path) -> None:
    from treelora_cli.rundir.atomic import discard
    from treelora_cli.rundir.files import LEFTOVER

    if not out.parent.is_dir():
        return
    for path in sorted(out.parent.glob(".*")):
        match = LEFTOVER.fullmatch(path.name)
        if match is None or match["name"] != out.name:
            continue
        if match["kind"] == "old" and not out.exists():
            path.rename(out)
        else:
            discard(path)


def _write(out: Path, files: Mapping[str, bytes]) -> None:
    from treelora_cli.rundir.atomic import commit_dir

    with commit_dir(out) as temporary:
        for name, data in files.items():
            path = temporary / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)


def _changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """Say what replacing did, task by task."""
    changes: list[str] = []
    for name in sorted({*before, *after}):
        if name not in after:
            changes.append(f"{name} dropped")
        elif name not in before:
            changes.append(f"{name} added")
        elif _identity(before[name]) != _identity(after[name]):
            changes.append(f"{name} changed")
    return changes


def _identity(entry: Any) -> Any:
    return entry.get("fingerprint") if isinstance(entry, dict) else None
