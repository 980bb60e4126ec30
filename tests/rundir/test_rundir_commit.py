"""A unit's writer stopped at any step leaves the unit before or the unit after."""

from __future__ import annotations

import errno
import os
import shutil
import signal
from pathlib import Path

import pytest
from rundir_trace import FILE_STEPS, trace

from treelora_cli.errors import EnvironmentProblem, RunDirError
from treelora_cli.rundir import atomic, faults
from treelora_cli.rundir.files import LEFTOVER, sibling
from treelora_cli.rundir.manifest import MANIFEST, verify

MANIFEST_STEPS = [(point, 1) for point in FILE_STEPS]
NEW_STEPS = [
    ("atomic.tmp-made", 1),
    ("atomic.tmp-written", 1),
    *MANIFEST_STEPS,
    ("atomic.manifest-written", 1),
    ("atomic.synced", 1),
    ("atomic.renamed", 1),
    ("atomic.folder-synced", 1),
]
REPLACE_STEPS = [
    *NEW_STEPS[:-2],
    ("atomic.moved-aside", 1),
    *NEW_STEPS[-2:],
    ("atomic.doomed", 1),
    ("atomic.old-removed", 1),
]
DONE_DIR = {"atomic.renamed", "atomic.folder-synced", "atomic.doomed", "atomic.old-removed"}


def write_unit(target: Path, text: str) -> None:
    with atomic.commit_dir(target) as folder:
        (folder / "a.txt").write_text(text)
        (folder / "sub").mkdir()
        (folder / "sub" / "b.bytes").write_bytes(text.encode() * 1000)


def read_text(target: Path) -> str | None:
    if atomic.committed(target) is None:
        return None
    return atomic.read_unit(target, lambda folder: (folder / "a.txt").read_text())


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if LEFTOVER.fullmatch(path.name)]


@pytest.fixture(scope="module")
def never_stopped(tmp_path_factory, snapshot) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("never_stopped")
    write_unit(folder / "unit", "new")
    return snapshot(folder)


@pytest.mark.parametrize(("point", "nth"), NEW_STEPS)
def test_kill_while_committing_a_new_unit(tmp_path, in_child, snapshot, never_stopped, point, nth):
    target = tmp_path / "unit"
    code = in_child(lambda: write_unit(target, "new"), f"{point}:kill9:{nth}")
    assert code == -signal.SIGKILL
    after = "new" if point in DONE_DIR else None
    assert read_text(target) == after
    atomic.sweep(tmp_path)
    assert leftovers(tmp_path) == []
    assert read_text(target) == after
    check_rerun(tmp_path, snapshot, never_stopped)


@pytest.mark.parametrize(("point", "nth"), REPLACE_STEPS)
def test_kill_while_replacing_a_unit(tmp_path, in_child, snapshot, never_stopped, point, nth):
    target = tmp_path / "unit"
    write_unit(target, "old")
    code = in_child(lambda: write_unit(target, "new"), f"{point}:kill9:{nth}")
    assert code == -signal.SIGKILL
    after = "new" if point in DONE_DIR else "old"
    assert read_text(target) == after
    atomic.sweep(tmp_path)
    assert leftovers(tmp_path) == []
    verify(target)
    assert read_text(target) == after
    check_rerun(tmp_path, snapshot, never_stopped)


@pytest.mark.parametrize("point", ["atomic.moved-aside", "atomic.doomed"])
def test_rerun_needs_no_sweep_first(tmp_path, in_child, snapshot, never_stopped, point):
    target = tmp_path / "unit"
    write_unit(target, "old")
    in_child(lambda: write_unit(target, "new"), f"{point}:kill9")
    write_unit(target, "new")
    atomic.sweep(tmp_path)
    check_rerun(tmp_path, snapshot, never_stopped)


def check_rerun(folder: Path, snapshot, expected: dict[str, bytes]) -> None:
    """Doing it again ends in the bytes of a run that nobody stopped."""
    write_unit(folder / "unit", "new")
    assert snapshot(folder) == expected
    assert leftovers(folder) == []


@pytest.mark.parametrize(("point", "nth"), REPLACE_STEPS)
@pytest.mark.parametrize(("action", "kind"), [("enospc", EnvironmentProblem), ("eio", RunDirError)])
def test_device_failure_while_replacing_a_unit(tmp_path, arm, point, nth, action, kind):
    target = tmp_path / "unit"
    write_unit(target, "old")
    arm(f"{point}:{action}:{nth}")
    with pytest.raises(kind) as caught:
        write_unit(target, "new")
    assert str(tmp_path) in caught.value.message
    assert "injected" not in caught.value.hint
    assert read_text(target) == ("new" if point in DONE_DIR else "old")
    # Only what was already half gone may stay, and the next start clears that.
    assert len(leftovers(tmp_path)) == (1 if point == "atomic.doomed" else 0)
    atomic.sweep(tmp_path)
    assert leftovers(tmp_path) == []


def test_commit_steps_are_complete(tmp_path):
    target = tmp_path / "unit"
    assert trace(lambda: write_unit(target, "1")) == NEW_STEPS
    assert trace(lambda: write_unit(target, "2")) == REPLACE_STEPS


def test_every_system_call_that_changes_something_is_followed_by_a_point(tmp_path, monkeypatch):
    log: list[str] = []

    def watch(module, name):
        original = getattr(module, name)

        def call(*args, **kwargs):
            if log[-1:] != [name] or name != "fsync":  # a run of fsyncs is one step
                log.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, call)

    for name in ("fsync", "replace", "rename", "mkdir", "rmdir", "unlink"):
        watch(os, name)
    monkeypatch.setattr(shutil, "rmtree", lambda path: log.append("rmtree"))
    monkeypatch.setattr(faults, "hit", lambda point: log.append(f"@{point}"))
    for text in ("1", "2"):
        with atomic.commit_dir(tmp_path / "unit") as folder:
            atomic.write_file(folder / "a.txt", text)
    calls = [i for i, entry in enumerate(log) if not entry.startswith("@")]
    assert {log[i] for i in calls} >= {"fsync", "replace", "rename", "mkdir", "rmtree"}
    bare = [log[i : i + 2] for i in calls if not log[i + 1 : i + 2] or log[i + 1][0] != "@"]
    assert bare == []


def test_files_and_folders_are_flushed_before_the_rename(tmp_path, monkeypatch):
    log: list[tuple[str, str]] = []
    fsync, rename = os.fsync, os.rename

    def watched_fsync(descriptor):
        log.append(("fsync", Path(os.readlink(f"/proc/self/fd/{descriptor}")).name))
        fsync(descriptor)

    def watched_rename(source, goal):
        log.append(("rename", Path(goal).name))
        rename(source, goal)

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "rename", watched_rename)
    write_unit(tmp_path / "unit", "1")
    at = log.index(("rename", "unit"))
    flushed = {name for kind, name in log[:at] if kind == "fsync"}
    assert {"a.txt", "b.bytes", "sub", MANIFEST} <= flushed
    assert any(name.startswith(".unit.tmp-") for name in flushed)
    assert ("fsync", tmp_path.name) in log[at:]


def test_exception_in_the_body_leaves_nothing(tmp_path):
    target = tmp_path / "deep" / "unit"
    with pytest.raises(KeyboardInterrupt), atomic.commit_dir(target) as folder:
        (folder / "a").write_text("1")
        raise KeyboardInterrupt
    assert list(target.parent.iterdir()) == []


def test_full_disk_in_the_body_is_named_and_other_errors_pass(tmp_path):
    target = tmp_path / "unit"
    with pytest.raises(EnvironmentProblem, match="the disk is full"), atomic.commit_dir(target):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError), atomic.commit_dir(target):
        raise FileNotFoundError("the model folder")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("trick", ["link", "pickle", "fifo"])
def test_commit_refuses_links_pickles_and_devices(tmp_path, trick):
    target = tmp_path / "unit"
    with pytest.raises(RunDirError), atomic.commit_dir(target) as folder:
        if trick == "link":
            (folder / "x").symlink_to("/etc/passwd")
        elif trick == "pickle":
            (folder / "adapter_model.BIN").write_bytes(b"x")
        else:
            os.mkfifo(folder / "x")
    assert list(tmp_path.iterdir()) == []


def test_sweep_leaves_what_this_process_writes_and_other_names(tmp_path):
    for name in (".lock", ".hidden", ".x.tmp", ".x.tmp-1-zzzzzzzz", "x.tmp-1-00000000", "run.json"):
        (tmp_path / name).write_text("keep")
    with atomic.commit_dir(tmp_path / "unit") as folder:
        (folder / "a").write_text("1")
        (tmp_path / ".dead.tmp-1-0123abcd").mkdir()
        assert atomic.sweep(tmp_path) == [tmp_path / ".dead.tmp-1-0123abcd"]
    verify(tmp_path / "unit")
    assert len(list(tmp_path.iterdir())) == 7


def test_sweep_of_a_missing_folder_finds_nothing(tmp_path):
    assert atomic.sweep(tmp_path / "none") == []


def test_half_removed_folder_is_never_restored(tmp_path, in_child):
    target = tmp_path / "unit"
    write_unit(target, "old")
    assert in_child(lambda: atomic.discard(target), "atomic.doomed:kill9") == -signal.SIGKILL
    [doomed] = leftovers(tmp_path)
    (tmp_path / doomed / MANIFEST).unlink()
    assert atomic.committed(target) is None
    atomic.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_removed_is_no_failure(tmp_path, monkeypatch, caplog):
    target = tmp_path / "unit"
    write_unit(target, "old")

    def refuse(path):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(shutil, "rmtree", refuse)
        write_unit(target, "new")
    assert read_text(target) == "new"
    assert "could not be removed" in caplog.text
    assert len(atomic.sweep(tmp_path)) == 1


def test_reader_never_sees_a_torn_unit_while_it_is_replaced(tmp_path):
    target = tmp_path / "unit"
    write_unit(target, "0")
    child = os.fork()
    if child == 0:
        try:
            for i in range(60):
                write_unit(target, str(i))
        finally:
            os._exit(0)
    reads = 0
    while os.waitpid(child, os.WNOHANG) == (0, 0):

        def both(folder: Path) -> tuple[str, bytes]:
            return (folder / "a.txt").read_text(), (folder / "sub" / "b.bytes").read_bytes()

        text, body = atomic.read_unit(target, both)
        assert body == text.encode() * 1000
        reads += 1
    assert reads > 20


def test_sibling_names_are_leftovers_of_their_target(tmp_path):
    for name in ("x", ".hidden", "a.tmp-1-01234567", "newline\n", "000-é"):
        for kind in ("tmp", "old", "del"):
            match = LEFTOVER.fullmatch(sibling(tmp_path / name, kind).name)
            assert match is not None
            assert (match["name"], match["kind"]) == (name, kind)


@pytest.mark.skipif(os.getuid() != 0, reason="mounting a tmpfs needs root")
def test_real_full_disk(tmp_path, in_child):
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    disk = tmp_path / "disk"
    disk.mkdir()
    if libc.mount(b"none", str(disk).encode(), b"tmpfs", 0, b"size=64k") != 0:
        pytest.skip("mounting is not allowed here")
    try:
        target = disk / "unit"
        write_unit(target, "a")
        with pytest.raises(EnvironmentProblem, match=r"[0-9,]+ bytes free"):
            write_unit(target, "b" * 100)
        assert read_text(target) == "a"
        assert leftovers(disk) == []
        with pytest.raises(EnvironmentProblem, match=r"big\.json"):
            atomic.write_file(disk / "big.json", b"x" * 100_000)
        assert leftovers(disk) == []
    finally:
        libc.umount(str(disk).encode())
