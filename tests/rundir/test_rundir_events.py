"""The event log survives a torn line."""

from __future__ import annotations

import logging
import math
import signal
from datetime import datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora_cli.errors import EnvironmentProblem, RunDirError
from treelora_cli.rundir.events import EventLog, read_events


@pytest.fixture
def path(tmp_path):
    return tmp_path / "events.jsonl"


def steps(path) -> list[int]:
    return [event["step"] for event in read_events(path)]


def test_append_and_read(path):
    log = EventLog(path)
    written = log.append("step", task="A", step=1, loss=0.5, arms=[0, 2], xi=None)
    log.append("task_finished", sync=True, seconds={"train": 1.5})
    first, second = read_events(path)
    assert first == written
    assert {key: first[key] for key in ("kind", "task", "step", "loss", "arms", "xi")} == {
        "kind": "step",
        "task": "A",
        "step": 1,
        "loss": 0.5,
        "arms": [0, 2],
        "xi": None,
    }
    assert datetime.fromisoformat(first["time"]).utcoffset() is not None
    assert (second["kind"], second["seconds"]) == ("task_finished", {"train": 1.5})
    assert path.read_bytes().count(b"\n") == 2


def test_only_a_synced_event_is_flushed(path, monkeypatch):
    flushed: list[int] = []
    monkeypatch.setattr("os.fsync", flushed.append)
    EventLog(path).append("step", step=1)
    assert flushed == []
    EventLog(path).append("task_finished", sync=True)
    assert len(flushed) == 1


def test_a_missing_log_is_empty(path):
    assert read_events(path) == []


def test_not_finite_numbers_become_null(path):
    EventLog(path).append("step", loss=math.nan, lr={"a": [math.inf, 1.0]})
    [event] = read_events(path)
    assert (event["loss"], event["lr"]) == (None, {"a": [None, 1.0]})
    with pytest.raises(TypeError, match="object"):
        EventLog(path).append("step", loss=object())
    assert len(read_events(path)) == 1


def test_a_line_cut_anywhere_is_dropped_and_the_next_starts_afresh(path, caplog):
    log = EventLog(path)
    for step in (1, 2):
        log.append("step", step=step, text="é\u2028🤖")
    data = path.read_bytes()
    start = data.index(b"\n") + 1
    for cut in range(start + 1, len(data)):
        path.write_bytes(data[:cut])
        caplog.clear()
        whole = [1, 2] if cut == len(data) - 1 else [1]
        with caplog.at_level(logging.WARNING, "treelora"):
            assert steps(path) == whole
        assert ("line 2" in caplog.text) == (whole == [1])
        EventLog(path).append("step", step=3)
        assert steps(path) == [*whole, 3]
        assert path.read_bytes().startswith(data[:cut] + b"\n")


@pytest.mark.parametrize(("point", "seen"), [("events.opened", [0]), ("events.appended", [0, 1])])
def test_kill_while_appending(path, in_child, point, seen):
    def append() -> None:
        log = EventLog(path)
        for step in range(3):
            log.append("step", step=step)

    assert in_child(append, f"{point}:kill9:2") == -signal.SIGKILL
    assert steps(path) == seen
    EventLog(path).append("step", step=9)
    assert steps(path) == [*seen, 9]


def test_full_disk_while_appending(path, arm):
    log = EventLog(path)
    log.append("step", step=0)
    arm("events.opened:enospc")
    with pytest.raises(EnvironmentProblem, match=r"events\.jsonl: the disk is full"):
        log.append("step", step=1)
    log.append("step", step=2)
    assert steps(path) == [0, 2]


def test_a_half_written_line_is_closed_by_the_same_writer(path, monkeypatch):
    import os

    log = EventLog(path)
    log.append("step", step=0)
    write = os.write

    def half(descriptor, data):
        monkeypatch.setattr(os, "write", write)
        write(descriptor, data[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", half)
    with pytest.raises(EnvironmentProblem):
        log.append("step", step=1)
    log.append("step", step=2)
    assert steps(path) == [0, 2]


@pytest.mark.parametrize(
    "line", [b"[]", b"{}", b'{"kind": 3}', b"\xff\xfe", b"NaN", b'{"a":' * 9999]
)
def test_lines_that_are_no_events_are_left_out(path, line):
    EventLog(path).append("step", step=1)
    with path.open("ab") as stream:
        stream.write(line + b"\n")
    EventLog(path).append("step", step=2)
    assert steps(path) == [1, 2]


def test_a_link_is_not_followed(path, tmp_path):
    (tmp_path / "real").write_text("")
    path.symlink_to(tmp_path / "real")
    with pytest.raises(RunDirError, match="symbolic link"):
        EventLog(path).append("step")
    with pytest.raises(RunDirError, match="symbolic link"):
        read_events(path)
    assert (tmp_path / "real").read_text() == ""


def test_a_folder_that_has_gone_is_named(tmp_path):
    with pytest.raises(RunDirError, match=r"gone.events\.jsonl") as caught:
        EventLog(tmp_path / "gone" / "events.jsonl").append("step")
    assert "moved or removed" in caught.value.hint


@settings(deadline=None)
@given(st.dictionaries(st.text(min_size=1), st.text(st.characters()), max_size=3))
def test_any_text_comes_back(tmp_path_factory, fields):
    path = tmp_path_factory.mktemp("events") / "events.jsonl"
    EventLog(path).append("step", data=fields)
    [event] = read_events(path)
    assert event["data"] == fields
