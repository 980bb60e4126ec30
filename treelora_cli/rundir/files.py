"""Write one file so that a kill leaves the old content or the new, never a part."""

from __future__ import annotations

import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from treelora_cli.rundir import faults
from treelora_cli.rundir.jsonfile import dump_json
from treelora_cli.rundir.storage import device_problem, storage_errors

LEFTOVER = re.compile(r"\.(?P<name>.+)\.(?P<kind>tmp|old|del)-[0-9]+-[0-9a-f]{8}", re.DOTALL)
"""Names of things in flight: ``tmp`` being written, ``old`` set aside, ``del`` being removed."""

active: set[Path] = set()
"""Temporary files and folders that this process is writing now; ``sweep`` leaves them alone."""


def sibling(target: Path, kind: str) -> Path:
    """Return a fresh hidden name beside ``target`` that LEFTOVER matches."""
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def sync_file(path: Path) -> None:
    """Flush a file or folder to the device."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def ensure_dir(path: Path) -> None:
    """Create a folder and its missing ancestors, and flush their entries.

    Raises:
        RunDirError: it cannot be created. EnvironmentProblem: the disk is full.
    """
    with storage_errors(path, "create the folder"):
        missing = []
        place = path
        while not place.is_dir() and place != place.parent:
            missing.append(place)
            place = place.parent
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
            sync_file(folder.parent)


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Give the body a temporary path to write; then make it the file at ``path``.

    The parent folder must exist. If the body or a step fails, ``path`` is as it was (unless
    only the last flush failed) and the temporary file is gone.

    Yields:
        A path in the same folder that does not exist yet.

    Raises:
        EnvironmentProblem: the disk is full.
        RunDirError: another failure of the file system.
    """
    temporary = sibling(path, "tmp")
    # In a folder that is being filled nothing counts before its own commit, which flushes all.
    flush = active.isdisjoint(path.parents)
    active.add(temporary)
    try:
        yield temporary
        with storage_errors(path):
            faults.hit("file.tmp-written")
            if flush:
                sync_file(temporary)
            faults.hit("file.synced")
            temporary.replace(path)
            faults.hit("file.replaced")
            if flush:
                sync_file(path.parent)
            faults.hit("file.folder-synced")
    except BaseException as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        problem = device_problem(error, path)
        if problem is not None:
            raise problem from error
        raise
    finally:
        active.discard(temporary)


def write_file(path: Path, data: bytes | str) -> None:
    """Replace a file's content atomically and flush it to the device.

    Args:
        path: the file; its folder must exist. A symbolic link is replaced, not followed.
        data: the content; text is encoded as UTF-8.

    Raises:
        EnvironmentProblem: the disk is full.
        RunDirError: another failure of the file system.
    """
    body = data.encode("utf-8", "backslashreplace") if isinstance(data, str) else data
    with new_file(path) as temporary, storage_errors(path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        with os.fdopen(os.open(temporary, flags, 0o666), "wb") as stream:
            faults.hit("file.tmp-opened")
            # Two halves only so that a test can stop between them.
            stream.write(body[: len(body) // 2])
            stream.flush()
            faults.hit("file.half-written")
            stream.write(body[len(body) // 2 :])


def write_json(path: Path, doc: object) -> None:
    """Replace a file atomically by ``doc`` as JSON: sorted keys, indent 2, a final newline.

    Raises:
        ValueError: a number is NaN or infinite, or something is not JSON.
        EnvironmentProblem: the disk is full.
        RunDirError: another failure of the file system.
    """
    try:
        data = dump_json(doc)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    write_file(path, data)
