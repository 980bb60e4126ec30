"""One writer at a time, and the second is told who the first is."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from treelora_cli.errors import BusyError, EnvironmentProblem, RunDirError
from treelora_cli.rundir.lock import RunLock

HOLD = """
import sys, time
from treelora_cli.rundir.lock import RunLock
with RunLock(sys.argv[1], command="treelora train-stream --tasks A") as lock:
    if len(sys.argv) > 2:
        lock.note(sys.argv[2])
    print("held", flush=True)
    sys.stdin.read()
"""


class Holder:
    """Another process that holds the lock until it is told to stop or is killed."""

    def __init__(self, run_dir: Path, *note: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", HOLD, str(run_dir), *note],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        )
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "held\n"

    def stop(self) -> None:
        self.process.communicate()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder


@pytest.fixture
def holder(run_dir: Path) -> Iterator[Holder]:
    other = Holder(run_dir, "waiting for task names on standard input")
    yield other
    other.kill()


def test_the_second_writer_is_told_about_the_first_at_once(run_dir, holder):
    start = time.monotonic()
    with pytest.raises(BusyError) as caught, RunLock(run_dir):
        pass
    assert time.monotonic() - start < 1
    message = caught.value.message
    for part in (
        str(run_dir),
        f"process {holder.process.pid} on {socket.gethostname()}",
        "treelora train-stream --tasks A",
        f"since {time.strftime('%Y-', time.gmtime())}",
        "waiting for task names",
    ):
        assert part in message
    assert caught.value.exit_code == 5
    assert caught.value.hint
    before = (run_dir / "lock").read_bytes()
    assert json.loads(before)["pid"] == holder.process.pid
    holder.stop()
    assert not (run_dir / "lock").exists()
    with RunLock(run_dir):
        assert json.loads((run_dir / "lock").read_text())["pid"] == os.getpid()


def test_the_lock_of_a_killed_process_is_taken(run_dir, holder):
    holder.kill()
    assert (run_dir / "lock").exists()
    with RunLock(run_dir, command="the next one") as lock:
        written = json.loads((run_dir / "lock").read_text())
        assert (written["pid"], written["command"]) == (os.getpid(), "the next one")
        assert lock.path == run_dir
    assert not (run_dir / "lock").exists()


def test_of_twenty_starters_one_wins(run_dir):
    """Each reports to a pipe; the winner holds on until all have reported."""
    report_out, report_in = os.pipe()
    hold_out, hold_in = os.pipe()
    children = []
    for _ in range(20):
        child = os.fork()
        if child == 0:
            os.close(hold_in)
            word = b"?"
            try:
                start = time.monotonic()
                with RunLock(run_dir):
                    os.write(report_in, b"W")
                    os.read(hold_out, 1)
                    os._exit(0)
            except BusyError:
                word = b"B" if time.monotonic() - start < 5 else b"S"
            finally:
                os.write(report_in, word)
                os._exit(0)
        children.append(child)
    words = b""
    while len(words) < 20:
        words += os.read(report_out, 20)
    for end in (hold_in, hold_out, report_in, report_out):
        os.close(end)
    for child in children:
        os.waitpid(child, 0)
    assert sorted(words) == sorted(b"W" + b"B" * 19)
    with RunLock(run_dir):
        pass


def test_a_dead_holders_note_is_not_believed_while_a_new_one_starts(run_dir):
    """The OS lock is held, but the note is still that of a process that is no more."""
    with RunLock(run_dir):
        gone = subprocess.Popen([sys.executable, "-c", ""])
        gone.wait()
        note = json.loads((run_dir / "lock").read_text())
        note.update(pid=gone.pid, command="the dead one")
        (run_dir / "lock").write_text(json.dumps(note))
        with pytest.raises(BusyError, match="another process") as caught, RunLock(run_dir):
            pass
        assert "the dead one" not in caught.value.message


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", '{"pid": 1}', '{"pid": "x", "host": "h", "command": "c", "since": "s"}'],
)
def test_a_damaged_note_does_no_harm(run_dir, text):
    with RunLock(run_dir):
        (run_dir / "lock").write_text(text)
        with pytest.raises(BusyError, match="in use by another process"), RunLock(run_dir):
            pass
    (run_dir / "lock").write_text(text)
    with RunLock(run_dir):
        pass


def test_the_same_process_cannot_take_it_twice(run_dir):
    with RunLock(run_dir), pytest.raises(BusyError, match=f"process {os.getpid()} "):
        RunLock(run_dir).__enter__()


def test_a_forked_child_leaves_its_parents_lock_alone(run_dir, in_child):
    with RunLock(run_dir) as lock:
        assert in_child(lock.release) == 0
        assert (run_dir / "lock").exists()
        with pytest.raises(BusyError), RunLock(run_dir):
            pass


def test_release_follows_an_error_and_may_be_repeated(run_dir):
    lock = RunLock(run_dir)
    with pytest.raises(KeyError), lock:
        raise KeyError
    lock.release()
    assert not (run_dir / "lock").exists()
    with RunLock(run_dir):
        pass


def test_a_missing_folder(tmp_path):
    with pytest.raises(RunDirError, match="no run directory"), RunLock(tmp_path / "none"):
        pass
    assert not (tmp_path / "none").exists()
    with RunLock(tmp_path / "a" / "b", create=True):
        assert (tmp_path / "a" / "b" / "lock").exists()


def test_a_folder_that_cannot_be_written_to(in_child):
    """As another user where the tests run as root, for whom nothing is read-only."""

    def as_nobody() -> None:
        if os.getuid() == 0:
            os.setgroups([])
            os.setuid(65534)
        with (
            pytest.raises(RunDirError, match=r"cannot write to .*denied") as caught,
            RunLock(place),
        ):
            pass
        assert caught.value.exit_code == 4
        assert "permissions" in caught.value.hint

    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        place = Path(folder) / "run"
        place.mkdir()
        place.chmod(0o555)
        assert in_child(as_nobody) == 0
        assert list(place.iterdir()) == []


def test_a_full_disk_gives_the_lock_back(run_dir, arm):
    arm("file.tmp-opened:enospc")
    lock = RunLock(run_dir)
    with pytest.raises(EnvironmentProblem, match="the disk is full"):
        lock.__enter__()
    with RunLock(run_dir):
        pass


def test_killed_between_lock_and_note(run_dir, in_child):
    def take() -> None:
        RunLock(run_dir).__enter__()

    assert in_child(take, "file.tmp-opened:kill9") == -signal.SIGKILL
    with RunLock(run_dir):
        pass


def test_no_torch_is_needed(run_dir):
    code = (
        "import sys\n"
        "from treelora_cli.rundir import atomic, checkpoints, events, faults, layout, lock\n"
        "from treelora_cli.rundir import manifest, names, scores, tensors\n"
        "print(sorted({'torch', 'transformers', 'safetensors', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
    )
    assert done.stdout == "[]\n"
