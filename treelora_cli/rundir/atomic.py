"""The commit protocol of the run directory, for files and for whole folders ("units").

A folder is filled under a temporary sibling name, flushed, given a manifest, flushed and
renamed. A rename cannot replace a folder that holds files, so an existing unit is first set
aside as ``.NAME.old-…``: if the process dies before the new one is in place, ``committed``
still finds the old one there and ``sweep`` puts it back. A folder is removed by renaming it to
``.NAME.del-…`` first, so that no half-removed folder ever carries a name that is read.
"""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from treelora_cli.errors import RunDirError
from treelora_cli.rundir import faults
from treelora_cli.rundir.files import (
    LEFTOVER,
    active,
    ensure_dir,
    new_file,
    sibling,
    sync_file,
    write_file,
    write_json,
)
from treelora_cli.rundir.manifest import MANIFEST, verify, write_manifest
from treelora_cli.rundir.storage import device_problem, explain, storage_errors

__all__ = [
    "commit_dir",
    "committed",
    "discard",
    "ensure_dir",
    "new_file",
    "read_unit",
    "sweep",
    "write_file",
    "write_json",
]

log = logging.getLogger("treelora")

T = TypeVar("T")

_READ_TRIES = 10


@contextmanager
def commit_dir(target: Path, *, beside: str = "") -> Iterator[Path]:
    """Give the body an empty temporary folder to fill; then make it the folder at ``target``.

    An existing folder at ``target`` is replaced as a whole: what it holds beside the new files
    is gone. Missing parents are created. If the body or a step fails, the temporary folder is
    removed and ``target`` is as it was (or wholly new, if only the last flush failed).

    Args:
        target: where the unit is to be.
        beside: a folder in the unit that no manifest lists, such as its predictions; where the
            existing unit has it, the new one gets it too, still not listed.

    Yields:
        The temporary folder, a sibling of ``target``.

    Raises:
        EnvironmentProblem: the disk is full.
        RunDirError: another failure of the file system, or the body left a link or a pickle.
    """
    ensure_dir(target.parent)
    temporary, aside = sibling(target, "tmp"), sibling(target, "old")
    active.update((temporary, aside))
    try:
        with storage_errors(temporary, "create"):
            temporary.mkdir()
            faults.hit("atomic.tmp-made")
        yield temporary
        with storage_errors(target):
            faults.hit("atomic.tmp-written")
            write_manifest(temporary)
            faults.hit("atomic.manifest-written")
            if beside and (target / beside).is_dir():
                shutil.copytree(target / beside, temporary / beside, copy_function=_link)
            _sync_tree(temporary)
            faults.hit("atomic.synced")
            _put_in_place(temporary, target, aside)
    except BaseException as error:
        _roll_back(temporary, target, aside)
        problem = device_problem(error, target)
        if problem is not None:
            raise problem from error
        raise
    finally:
        active.difference_update((temporary, aside))


def _put_in_place(temporary: Path, target: Path, aside: Path) -> None:
    replacing = os.path.lexists(target)
    if replacing:
        target.rename(aside)
        faults.hit("atomic.moved-aside")
    temporary.rename(target)
    faults.hit("atomic.renamed")
    sync_file(target.parent)
    faults.hit("atomic.folder-synced")
    if replacing:
        discard(aside)
        faults.hit("atomic.old-removed")


def _link(source: str, target: str) -> None:
    """Let a file have a second name; where the file system knows none, copy it."""
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        shutil.copyfile(source, target, follow_symlinks=False)


def _roll_back(temporary: Path, target: Path, aside: Path) -> None:
    with suppress(OSError):
        if os.path.lexists(aside):
            if os.path.lexists(target):
                discard(aside)
            else:
                aside.rename(target)
    with suppress(OSError):
        discard(temporary)


def _sync_tree(folder: Path) -> None:
    for place, _, names in os.walk(folder):
        for name in names:
            sync_file(Path(place, name))
        sync_file(Path(place))


def discard(path: Path) -> None:
    """Remove a file or folder so that a kill leaves it whole or out of every reader's sight.

    What cannot be removed after it is out of sight is left for ``sweep``, with a log warning.

    Raises:
        OSError: it cannot be renamed.
    """
    if not os.path.lexists(path):
        return
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    match = LEFTOVER.fullmatch(path.name)
    doomed = path
    if match is None or match["kind"] != "del":
        doomed = sibling(path.with_name(match["name"]) if match else path, "del")
        path.rename(doomed)
        faults.hit("atomic.doomed")
    try:
        shutil.rmtree(doomed)
    except OSError as error:
        log.warning("%s could not be removed: %s", doomed, error.strerror or error)


def committed(target: Path) -> Path | None:
    """Return where the unit ``target`` is now, or None if there is none.

    That is ``target`` itself, or, for the moment in which it is being replaced (or after a
    kill in that moment), the old unit set aside.
    """
    for _ in range(3):
        if os.path.lexists(target):
            return target
        for place in _set_aside(target):
            return place
    return None


def _set_aside(target: Path) -> Iterator[Path]:
    with suppress(FileNotFoundError), os.scandir(target.parent) as entries:
        for entry in sorted(entries, key=lambda found: found.name):
            match = LEFTOVER.fullmatch(entry.name)
            if match and match["kind"] == "old" and match["name"] == target.name:
                yield Path(entry.path)


def read_unit(target: Path, read: Callable[[Path], T]) -> T:
    """Verify the unit ``target`` and return what ``read`` makes of its folder.

    If the folder is replaced by a writer meanwhile, both are done again with the new one.

    Args:
        target: the unit.
        read: called with the verified folder.

    Raises:
        RunDirError: the unit is missing or not what its manifest says.
    """
    for attempt in range(_READ_TRIES):
        place = committed(target) or target
        before = _identity(place)
        problem: RunDirError | OSError | None = None
        try:
            verify(place)
            result = read(place)
        except (RunDirError, OSError) as error:
            problem = error
        if _identity(place) != before or (before is None and attempt < _READ_TRIES // 2):
            continue
        if problem is None:
            return result
        if isinstance(problem, OSError):
            raise explain(problem, place, "read") from problem
        raise problem
    raise RunDirError(
        f"{target} was replaced again and again while it was read", "run the command again"
    )


def _identity(unit: Path) -> tuple[int, int, int] | None:
    """Return what differs between two units at one path, or None if there is none.

    The folder's own inode would not do: its number is free for the next folder at once.
    """
    with suppress(OSError):
        status = (unit / MANIFEST).lstat()
        return status.st_ino, status.st_mtime_ns, status.st_ctime_ns
    return None


def sweep(parent: Path) -> list[Path]:
    """Clean one folder of what dead writers left, and put back what they had set aside.

    Only the owner of the run's lock may call this: whatever is in flight here and not this
    process's own is taken for dead. Folders below are not visited.

    Args:
        parent: the folder; it may be missing.

    Returns:
        The leftovers dealt with, sorted.

    Raises:
        RunDirError: a leftover can be neither removed nor put back.
    """
    if not parent.is_dir():
        return []
    with storage_errors(parent, "read"):
        names = sorted(path.name for path in parent.iterdir())
    found = []
    for name in names:
        match = LEFTOVER.fullmatch(name)
        path = parent / name
        if match is None or path in active:
            continue
        with storage_errors(path, "remove"):
            target = parent / match["name"]
            if match["kind"] == "old" and not os.path.lexists(target):
                path.rename(target)
                sync_file(parent)
                log.warning("%s was being replaced when a run died; it is back", target)
            else:
                discard(path)
        found.append(path)
    return found
