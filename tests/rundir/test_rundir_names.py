"""Task names become folder names; fault points are found by name."""

from __future__ import annotations

import signal
import string
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from treelora_cli.errors import UsageError
from treelora_cli.rundir import faults
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.names import NAME, check_task_name, is_task_name


@pytest.mark.parametrize(
    "name",
    (
        *("../x", "/etc/x", "a/b", ".", "..", "", "t\0", "a b", " a", "a ", "-a", "_a", ".a"),
        *("+a", "a" * 65, "\u202ea", "é", "a\n", "a\\b", "١", "a:b", "a*"),
    ),
)
def test_wrong_task_names(name):
    with pytest.raises(UsageError) as caught:
        check_task_name(name)
    assert caught.value.exit_code == 2
    assert "64" in caught.value.hint


@pytest.mark.parametrize("name", ["own", "C-STANCE", "20Minuten", "NumGLUE-cm", "a.b_c+d", "0"])
def test_right_task_names(name):
    assert check_task_name(name) == name


ALPHABET = string.ascii_letters + string.digits + "._+-"


@settings(deadline=None)
@given(st.text(max_size=70) | st.text(ALPHABET, max_size=70) | st.from_regex(NAME, fullmatch=True))
@example("a" * 64)
def test_a_name_is_accepted_if_and_only_if_it_is_made_of_the_alphabet(name):
    right = 0 < len(name) <= 64 and set(name) <= set(ALPHABET) and name[0] not in "._+-"
    assert is_task_name(name) == right


@settings(deadline=None)
@given(st.from_regex(NAME, fullmatch=True), st.integers(0, 2000))
def test_a_task_folder_is_one_plain_folder_below_tasks(name, index):
    place = RunDir("run").task_dir(index, name)
    assert place.parent == Path("run/tasks")
    assert len(place.name) < 128
    number, _, rest = place.name.partition("-")
    assert (int(number), rest) == (index, name)


ADAPTERS = st.sampled_from(["latest", "own", "route", "base"]) | st.from_regex(
    f"task:{NAME}", fullmatch=True
)
CELLS = st.tuples(st.from_regex(NAME, fullmatch=True), ADAPTERS, st.sampled_from(["eval", "test"]))


@settings(deadline=None)
@given(CELLS, CELLS)
@example(("a", "task:b.c", "test"), ("a.task", "task:c", "test"))
@example(("x", "own", "test"), ("x.latest", "own", "test"))
def test_predictions_of_two_cells_never_share_a_file(first, second):
    run = RunDir("run")
    paths = [run.predictions((0, "A"), *cell) for cell in (first, second)]
    assert (paths[0] == paths[1]) == (first == second)
    assert paths[0].parent == Path("run/tasks/000-A/predictions")
    assert run.predictions(None, *first).parent == Path("run/predictions")
    assert len(paths[0].name) < 200


def test_every_action_does_what_it_says(in_child, monkeypatch, arm):
    ends = {"kill9": -signal.SIGKILL, "term": -signal.SIGTERM, "hup": -signal.SIGHUP, "exit": 99}
    for action, code in ends.items():
        assert in_child(lambda: faults.hit("here"), f"here:{action}") == code
        assert in_child(lambda: faults.hit("there"), f"here:{action}") == 0
    arm("here:int")
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            faults.hit("here")
    finally:
        signal.signal(signal.SIGINT, handler)
    arm("here:eio:3")
    faults.hit("here")
    faults.hit("here")
    with pytest.raises(OSError, match="injected at here"):
        faults.hit("here")
    faults.hit("here")
    slept: list[float] = []
    monkeypatch.setattr(faults.time, "sleep", slept.append)
    arm("here:sleep")
    faults.hit("here")
    assert slept == [60.0]
    for spec in ("here", "here:crash", ":kill9", "here:kill9:x"):
        arm(spec)
        with pytest.raises(ValueError, match="TREELORA_FAULT"):
            faults.hit("here")
    monkeypatch.delenv("TREELORA_FAULT")
    faults.hit("here")
