"""Help for tests that stop real processes at named points."""

from __future__ import annotations

import os
import signal
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest

from treelora_cli.rundir import faults

Work = Callable[[], object]


def _in_child(work: Work, fault: str = "") -> int:
    """Run ``work`` in a forked child; return its exit code, or minus the signal that ended it."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            for number in (signal.SIGHUP, signal.SIGTERM):  # nohup and test runners change these
                signal.signal(number, signal.SIG_DFL)
            if fault:
                os.environ[faults.ENVIRONMENT] = fault
            faults.reset()
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.fixture
def in_child() -> Callable[..., int]:
    return _in_child


def _snapshot(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too, by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink()
    }


@pytest.fixture(scope="session")
def snapshot() -> Callable[[Path], dict[str, bytes]]:
    return _snapshot


@pytest.fixture
def arm(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make this process fail at a point, once."""

    def set_fault(spec: str) -> None:
        faults.reset()
        monkeypatch.setenv(faults.ENVIRONMENT, spec)

    return set_fault
