"""scores.json: the same cells are the same bytes."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora_cli.errors import RunDirError
from treelora_cli.rundir.names import NAME
from treelora_cli.rundir.scores import Cell, Scores

CELL = Cell(
    after="A",
    task="B",
    adapter="latest",
    split="test",
    rows=100,
    limited=False,
    decoding="greedy",
    metric="accuracy",
    score=1 / 3,
    scores={"accuracy": 1 / 3, "f1": 0.25},
    adapter_hash="0" * 64,
)

finite = st.floats(allow_nan=False, allow_infinity=False)
names = st.from_regex(NAME, fullmatch=True)
cells = st.builds(
    Cell,
    after=st.none() | names,
    task=names,
    adapter=st.sampled_from(["latest", "own", "route", "base", "task:own"]),
    split=st.sampled_from(["eval", "test"]),
    rows=st.integers(0, 10**6),
    limited=st.booleans(),
    decoding=st.text(max_size=10),
    metric=st.text(max_size=10),
    score=finite,
    scores=st.dictionaries(st.text(max_size=5), finite, max_size=3),
    adapter_hash=st.text("0123456789abcdef", max_size=64),
    code=st.integers(1, 9),
)


@settings(max_examples=50, deadline=None)
@given(st.lists(cells, max_size=8), st.randoms(use_true_random=False))
def test_round_trip_whatever_the_order(tmp_path_factory, some, random):
    unique = list({cell.key: cell for cell in some}.values())
    folder = tmp_path_factory.mktemp("scores")
    Scores(unique).save(folder / "a.json")
    random.shuffle(unique)
    Scores(unique).save(folder / "b.json")
    assert (folder / "a.json").read_bytes() == (folder / "b.json").read_bytes()
    loaded = Scores.load(folder / "a.json")
    assert {cell.key: cell for cell in loaded.cells} == {cell.key: cell for cell in unique}
    loaded.save(folder / "b.json")
    assert (folder / "a.json").read_bytes() == (folder / "b.json").read_bytes()


def test_cells_from_before_the_code_was_kept_are_of_version_1(tmp_path):
    path = tmp_path / "scores.json"
    Scores([replace(CELL, code=7), replace(CELL, task="C", code=1)]).save(path)
    doc = json.loads(path.read_text())
    assert [cell["code"] for cell in doc["cells"]] == [7, 1]
    del doc["cells"][0]["code"]
    path.write_text(json.dumps(doc))
    assert [cell.code for cell in Scores.load(path).cells] == [1, 1]


@pytest.mark.parametrize(
    ("change", "same"),
    [
        ({"after": "C", "adapter": "own", "score": 0.1}, True),
        ({"after": None}, True),
        ({"adapter_hash": "1"}, False),
        ({"task": "C"}, False),
        ({"split": "eval"}, False),
        ({"rows": 99}, False),
        ({"limited": True}, False),
        ({"decoding": "likelihood"}, False),
        ({"code": 2}, False),
    ],
)
def test_the_same_answers_are_found_under_any_key(change, same):
    assert Scores([CELL]).same_answers(replace(CELL, **change)) == (CELL if same else None)


def test_order_is_by_key_and_zero_shot_comes_first():
    afters = ["B", None, "A", "a"]
    scores = Scores(replace(CELL, after=after) for after in afters)
    assert [cell.after for cell in scores.cells] == [None, "A", "B", "a"]


def test_put_replaces_the_same_key_only():
    scores = Scores([CELL])
    scores.put(replace(CELL, score=0.5, adapter_hash="1"))
    scores.put(replace(CELL, rows=10, limited=True))
    assert len(scores.cells) == 2
    found = scores.get(CELL.key)
    assert found is not None
    assert found.score == 0.5
    assert scores.get(("A", "B", "own", "test", 100, False, "greedy")) is None


@pytest.mark.parametrize(
    "change",
    [
        {"after": "C"},
        {"task": "C"},
        {"adapter": "own"},
        {"split": "eval"},
        {"rows": 99},
        {"limited": True},
        {"decoding": "beam 4"},
    ],
)
def test_every_part_of_the_key_counts(change):
    assert len(Scores([CELL, replace(CELL, **change)]).cells) == 2


def test_floats_are_kept_in_full_and_integers_become_floats(tmp_path):
    path = tmp_path / "scores.json"
    Scores([CELL, replace(CELL, task="C", score=1, scores={"accuracy": 1})]).save(path)
    text = path.read_text()
    assert "0.3333333333333333" in text
    assert '"score": 1.0' in text
    assert "time" not in text
    assert str(tmp_path) not in text


@pytest.mark.parametrize(
    "change",
    [
        {"score": float("nan")},
        {"score": True},
        {"scores": {"f1": float("inf")}},
        {"scores": []},
        {"task": "../x"},
        {"after": ""},
        {"rows": -1},
        {"rows": True},
        {"limited": 0},
        {"split": None},
        {"code": "1"},
        {"code": True},
    ],
)
def test_a_wrong_cell_is_refused_on_both_sides(tmp_path, change):
    with pytest.raises(ValueError, match=r"is no|no finite|neither"):
        Scores([replace(CELL, **change)])
    path = tmp_path / "scores.json"
    Scores([CELL]).save(path)
    doc = json.loads(path.read_text())
    doc["cells"][0].update(change)
    path.write_text(json.dumps(doc))
    with pytest.raises(RunDirError, match=r"scores\.json is damaged") as caught:
        Scores.load(path)
    assert "treelora eval" in caught.value.hint or "original file" in caught.value.hint


@pytest.mark.parametrize(
    ("doc", "reason"),
    [
        ({}, "names no format"),
        ({"format": 1}, "no cells"),
        ({"format": 2, "cells": []}, "created by a newer version"),
        ({"format": 1, "cells": [1]}, "cell 0 does not have the fields"),
        ({"format": 1, "cells": [{"task": "A"}]}, "cell 0 does not have the fields"),
    ],
)
def test_a_damaged_file_is_one_error(tmp_path, doc, reason):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(doc))
    with pytest.raises(RunDirError, match=reason):
        Scores.load(path)


def test_a_missing_file_has_no_cells_and_a_dangling_link_is_refused(tmp_path):
    assert Scores.load(tmp_path / "scores.json").cells == []
    (tmp_path / "scores.json").symlink_to(tmp_path / "none")
    with pytest.raises(RunDirError, match="symbolic link"):
        Scores.load(tmp_path / "scores.json")
