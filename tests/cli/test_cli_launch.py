"""One of several processes ends at once, with its exit code and all that it said."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from support import ROOT

from treelora_cli.cli.launch import _first_failed

SAYS_WHEN_TAKEN_DOWN = """
import atexit, sys
atexit.register(lambda: sys.stderr.write("taken down"))
from treelora_cli.cli.app import main
main()
"""


def run(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", SAYS_WHEN_TAKEN_DOWN, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **more},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "code"), [(("recipes",), 0), (("tree", "show", "nowhere"), 4), (("--odd",), 2)]
)
def test_a_launched_process_is_not_taken_down_at_leisure(arguments, code) -> None:
    """Threads of gloo's would meet a Python that is half gone."""
    alone = run(*arguments)
    launched = run(*arguments, RANK="0", WORLD_SIZE="2")
    assert "taken down" in alone.stderr
    assert "taken down" not in launched.stderr
    assert launched.stdout == alone.stdout
    assert (alone.returncode, launched.returncode) == (code, code)


@pytest.mark.parametrize(
    ("codes", "cause"),
    [
        ([None, 0], None),
        ([6, -9], 1),
        ([None, -9], 1),
        ([6, 5, 6], 1),
        ([2, 2], 0),
        ([6, 6], 0),
        ([5, -9], 1),
    ],
)
def test_the_cause_is_told_from_those_that_noticed(codes: list[int | None], cause: int) -> None:
    assert _first_failed(codes) == cause
