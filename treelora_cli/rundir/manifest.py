"""MANIFEST.json: the size and SHA-256 of every file of a unit, written last, checked on reading."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import Any

from treelora_cli.errors import RunDirError
from treelora_cli.rundir.files import write_json
from treelora_cli.rundir.jsonfile import read_json
from treelora_cli.rundir.storage import storage_errors

MANIFEST = "MANIFEST.json"
FORMAT = 1
PICKLES = frozenset({".bin", ".ckpt", ".joblib", ".pickle", ".pkl", ".pt", ".pth"})
"""Endings of files that can run code when loaded; a unit never holds one."""

_HINT = (
    "restore the folder from a copy; or remove it, so that what it held is made again where "
    "that is possible"
)


def list_files(folder: Path) -> list[str]:
    """Return the files of a unit, as sorted POSIX paths relative to it, without the manifest.

    Args:
        folder: the unit.

    Raises:
        RunDirError: something in it is a link, a device, a pickle, or cannot be read.
    """
    found: list[str] = []
    with storage_errors(folder, "read"):
        pending = [folder]
        while pending:
            with os.scandir(pending.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        pending.append(Path(entry.path))
                    else:
                        _check_entry(entry)
                        found.append(Path(entry.path).relative_to(folder).as_posix())
    return sorted(name for name in found if name != MANIFEST)


def write_manifest(folder: Path) -> None:
    """Write MANIFEST.json for the files that the folder holds now.

    Args:
        folder: the unit; the bytes written are a function of its files alone.

    Raises:
        RunDirError: a file is unreadable, a link or a pickle. EnvironmentProblem: disk full.
    """
    files: dict[str, dict[str, int | str]] = {}
    for name in list_files(folder):
        path = folder / name
        with storage_errors(path, "read"):
            files[name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    write_json(folder / MANIFEST, {"format": FORMAT, "files": files})


def read_manifest(folder: Path) -> dict[str, tuple[int, str]]:
    """Return (bytes, SHA-256) by relative path.

    Raises:
        RunDirError: the manifest is missing, damaged, of another format, or names a path that
            leaves the folder.
    """
    path = folder / MANIFEST
    if not path.exists() and not path.is_symlink():
        raise RunDirError(f"{folder} has no {MANIFEST}, so it was never finished", _HINT)
    doc = read_json(path)
    version = doc.get("format")
    if isinstance(version, bool) or not isinstance(version, int) or version < 1:
        raise RunDirError(f"{path} is damaged: it names no format", _HINT)
    if version > FORMAT:
        raise RunDirError(
            f"{path} was created by a newer version of treelora (format {version}; this one "
            f"knows {FORMAT})",
            "upgrade treelora",
        )
    files = doc.get("files")
    if not isinstance(files, dict) or set(doc) != {"format", "files"}:
        raise RunDirError(f"{path} is damaged: it lists no files, or more than files", _HINT)
    return {name: _entry(path, name, value) for name, value in files.items()}


def verify(folder: Path, *, hashes: bool = True) -> None:
    """Check that a unit is whole: every file present, of the right size and content.

    Files that the manifest does not list (predictions come later) are allowed; links and
    pickles are not.

    Args:
        folder: the unit.
        hashes: also compare SHA-256; False compares sizes only.

    Raises:
        RunDirError: names the first file that is wrong, and how to mend it.
    """
    if folder.is_symlink():
        raise RunDirError(f"{folder} is a symbolic link", "put the folder itself in its place")
    if not folder.is_dir():
        raise RunDirError(f"{folder} is missing", _HINT)
    present = set(list_files(folder))
    for name, (size, digest) in sorted(read_manifest(folder).items()):
        path = folder / name
        if name not in present:
            raise RunDirError(f"{path} is missing", _HINT)
        with storage_errors(path, "read"):
            actual = path.stat().st_size
            if actual != size:
                raise RunDirError(f"{path} has {actual:,} bytes instead of {size:,}", _HINT)
            if hashes and _sha256(path) != digest:
                raise RunDirError(f"{path} was changed: its SHA-256 is not the recorded one", _HINT)


def _check_entry(entry: os.DirEntry[str]) -> None:
    path = Path(entry.path)
    if entry.is_symlink():
        raise RunDirError(
            f"{path} is a symbolic link", "put the file itself in its place, or remove the link"
        )
    if not entry.is_file(follow_symlinks=False):
        raise RunDirError(f"{path} is not a regular file", "remove it")
    if path.suffix.lower() in PICKLES:
        raise RunDirError(
            f"{path} may hold a pickle, which can run code when it is loaded",
            "remove it; weights are only ever stored as .safetensors",
        )


def _entry(path: Path, name: str, value: Any) -> tuple[int, str]:
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\0" in name or "\\" in name or ".." in parts:
        raise RunDirError(f"{path} is damaged: {name!r} is not a file of its folder", _HINT)
    fields = value if isinstance(value, dict) and set(value) == {"bytes", "sha256"} else {}
    size, digest = fields.get("bytes"), fields.get("sha256")
    if isinstance(size, bool) or not isinstance(size, int) or not isinstance(digest, str):
        raise RunDirError(f"{path} is damaged: no size and SHA-256 for {name!r}", _HINT)
    return size, digest


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
