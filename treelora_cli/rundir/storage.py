"""Say what went wrong with a disk in terms of a path, a cause and a way out."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from treelora_cli.errors import EnvironmentProblem, RunDirError, TreeloraError

_FULL = {errno.ENOSPC, errno.EDQUOT}
_DENIED = {errno.EACCES, errno.EPERM, errno.EROFS}
_DEVICE = _FULL | _DENIED | {errno.EIO, errno.EFBIG}


def free_bytes(path: Path) -> int | None:
    """Return the free bytes of the file system that holds ``path``, or None if unknown.

    Args:
        path: a file or folder; where it does not exist, its nearest existing ancestor counts.
    """
    for place in (path, *path.parents):
        try:
            return shutil.disk_usage(place).free
        except OSError:
            continue
    return None


def explain(error: OSError, path: Path, doing: str = "write") -> TreeloraError:
    """Turn an OSError into an error with a hint.

    Args:
        error: what the operating system said.
        path: the file or folder in question.
        doing: the verb of the message.

    Returns:
        An EnvironmentProblem for a full disk or quota, a RunDirError otherwise.
    """
    if error.errno in _FULL:
        free = free_bytes(path.parent)
        room = "an unknown number of" if free is None else f"{free:,}"
        what = "the disk is full" if error.errno == errno.ENOSPC else "the disk quota is used up"
        return EnvironmentProblem(
            f"cannot {doing} {path}: {what} ({room} bytes free)",
            "free some space and run the same command again; what was saved before is intact",
        )
    reason = error.strerror or type(error).__name__
    if error.errno in _DENIED:
        hint = "check the permissions of the folder, or choose another one"
    elif error.errno == errno.ELOOP:
        reason, hint = "it is a symbolic link", "links inside a run directory are not followed"
    elif error.errno == errno.ENOENT:
        hint = "check the path; was the folder moved or removed meanwhile?"
    elif error.errno == errno.EIO:
        hint = "the disk or the network share reports a fault; check it, then run again"
    else:
        hint = "run the same command again once the cause is gone"
    return RunDirError(f"cannot {doing} {path}: {reason}", hint)


@contextmanager
def storage_errors(path: Path, doing: str = "write") -> Iterator[None]:
    """Raise every OSError of the body as the error that ``explain`` makes of it."""
    try:
        yield
    except OSError as error:
        raise explain(error, path, doing) from error


def device_problem(error: BaseException, path: Path) -> TreeloraError | None:
    """Return the error to show if ``error`` comes from the device, else None.

    For code run between our own steps (a library saving a file): there a missing file is the
    caller's mistake, but a full disk is not. safetensors wraps the operating system's error in
    its own class and keeps only the number, in the text.
    """
    if isinstance(error, OSError) and error.errno in _DEVICE:
        return explain(error, path)
    if type(error).__name__ == "SafetensorError":
        for number in sorted(_DEVICE):
            if f"os error {number})" in str(error):
                return explain(OSError(number, str(error)), path)
    return None
