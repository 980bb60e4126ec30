"""A file's writer stopped at any step leaves the old content or the new."""

from __future__ import annotations

import errno
import os
import signal
from pathlib import Path

import pytest
from rundir_trace import FILE_STEPS, trace

from treelora_cli.errors import EnvironmentProblem, RunDirError
from treelora_cli.rundir import atomic
from treelora_cli.rundir.files import LEFTOVER

DONE_FILE = {"file.replaced", "file.folder-synced"}


def leftovers(folder):
    return [path.name for path in folder.iterdir() if LEFTOVER.fullmatch(path.name)]


@pytest.mark.parametrize("point", FILE_STEPS)
@pytest.mark.parametrize("before", [None, b"old"], ids=["new", "replacing"])
def test_kill_while_writing_a_file(tmp_path, in_child, point, before):
    path = tmp_path / "x.json"
    if before is not None:
        path.write_bytes(before)
    code = in_child(lambda: atomic.write_file(path, b"the new one"), f"{point}:kill9")
    assert code == -signal.SIGKILL
    now = path.read_bytes() if path.exists() else None
    assert now == (b"the new one" if point in DONE_FILE else before)
    atomic.sweep(tmp_path)
    assert leftovers(tmp_path) == []
    assert (path.read_bytes() if path.exists() else None) == now
    atomic.write_file(path, b"the new one")
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.json"]
    assert path.read_bytes() == b"the new one"


@pytest.mark.parametrize("point", FILE_STEPS)
@pytest.mark.parametrize(("action", "kind"), [("enospc", EnvironmentProblem), ("eio", RunDirError)])
def test_device_failure_while_writing_a_file(tmp_path, arm, point, action, kind):
    path = tmp_path / "x.json"
    path.write_bytes(b"old")
    arm(f"{point}:{action}")
    with pytest.raises(kind) as caught:
        atomic.write_file(path, b"new")
    assert str(path) in caught.value.message
    assert caught.value.hint
    if action == "enospc":
        assert "bytes free" in caught.value.message
        assert caught.value.exit_code == 6
    assert path.read_bytes() == (b"new" if point in DONE_FILE else b"old")
    assert leftovers(tmp_path) == []


def test_file_steps_are_complete(tmp_path):
    passed = trace(lambda: atomic.write_file(tmp_path / "x", b"1"))
    assert passed == [(point, 1) for point in FILE_STEPS]


def test_write_file_replaces_a_link_and_leaves_its_target(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    link = tmp_path / "x"
    link.symlink_to(outside)
    atomic.write_file(link, "new")
    assert outside.read_text() == "untouched"
    assert not link.is_symlink()


def test_write_file_text_with_a_lone_surrogate_is_written(tmp_path):
    atomic.write_file(tmp_path / "x", "a\ud800b é")
    assert (tmp_path / "x").read_bytes() == b"a\\ud800b \xc3\xa9"


@pytest.fixture
def flushed(monkeypatch) -> list[Path]:
    """The files and folders flushed so far."""
    found: list[Path] = []
    fsync = os.fsync

    def watched(descriptor):
        found.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", watched)
    return found


def test_a_file_is_flushed_and_then_its_folder(tmp_path, flushed):
    atomic.write_file(tmp_path / "x", "1")
    assert [path.name.split(".tmp-")[0] for path in flushed] == [".x", tmp_path.name]


def test_new_folders_are_flushed_into_their_parents(tmp_path, flushed):
    atomic.ensure_dir(tmp_path / "a" / "b")
    assert flushed == [tmp_path, tmp_path / "a"]
    atomic.ensure_dir(tmp_path / "a" / "b")
    assert len(flushed) == 2


@pytest.mark.parametrize("trap", ["link", "file"])
def test_a_temporary_name_that_is_taken_is_not_written_to(tmp_path, monkeypatch, trap):
    outside = tmp_path / "outside"
    outside.write_text("untouched")
    planted = tmp_path / f".x.tmp-{os.getpid()}-0123abcd"
    monkeypatch.setattr("secrets.token_hex", lambda size: "0123abcd")
    if trap == "link":
        planted.symlink_to(outside)
    else:
        planted.hardlink_to(outside)
    with pytest.raises(RunDirError, match="File exists"):
        atomic.write_file(tmp_path / "x", "new")
    assert outside.read_text() == "untouched"
    assert not (tmp_path / "x").exists()


def test_write_file_keeps_to_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        atomic.write_file(tmp_path / "x", "1")
    finally:
        os.umask(old)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o640


def test_write_file_into_a_missing_folder_says_so(tmp_path):
    with pytest.raises(RunDirError, match="No such file") as caught:
        atomic.write_file(tmp_path / "gone" / "x", "1")
    assert "moved or removed" in caught.value.hint


def test_write_json_is_sorted_readable_and_strict(tmp_path):
    path = tmp_path / "x.json"
    atomic.write_json(path, {"b": 1, "a": "é"})
    assert path.read_bytes() == '{\n  "a": "é",\n  "b": 1\n}\n'.encode()
    with pytest.raises(ValueError, match=r"x\.json"):
        atomic.write_json(path, {"a": float("nan")})
    assert b"\xc3" in path.read_bytes()


def test_quota_counts_as_full_and_a_denied_write_does_not(tmp_path, monkeypatch):
    def refuse(number):
        def sync(descriptor):
            raise OSError(number, os.strerror(number))

        return sync

    monkeypatch.setattr(os, "fsync", refuse(errno.EDQUOT))
    with pytest.raises(EnvironmentProblem, match="quota"):
        atomic.write_file(tmp_path / "x", "1")
    monkeypatch.setattr(os, "fsync", refuse(errno.EROFS))
    with pytest.raises(RunDirError, match="Read-only") as caught:
        atomic.write_file(tmp_path / "x", "1")
    assert "permissions" in caught.value.hint
    assert list(tmp_path.iterdir()) == []
