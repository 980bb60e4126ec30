"""The real task data, where they stand beside the checkout: nothing is lost or changed."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from treelora_cli.tasks.catalog import KNOWN
from treelora_cli.tasks.inspect import duplicates
from treelora_cli.tasks.layouts import detect
from treelora_cli.tasks.load import available, load_found, load_tasks
from treelora_cli.tasks.metrics import constant_score, score
from treelora_cli.tasks.store import store
from treelora_cli.tasks.types import SPLITS

pytestmark = pytest.mark.realdata

TRACE = [
    "C-STANCE",
    "FOMC",
    "MeetingBank",
    "Py150",
    "ScienceQA",
    "NumGLUE-cm",
    "NumGLUE-ds",
    "20Minuten",
]
ON_DISK = {"trace": {"eval": "eval"}, "cl_benchmark": {"eval": "dev"}}


@pytest.mark.parametrize(("layout", "count"), [("trace", 8), ("cl_benchmark", 14)])
def test_rows_are_those_of_the_files(real_data: Path, layout: str, count: int) -> None:
    manifest = json.loads((real_data / "manifest.json").read_text("utf-8"))
    found = detect(real_data / layout)
    assert len(found.tasks) == count
    assert found.layouts == (layout,)
    for loaded in load_found(found, list(found.tasks)):
        task = loaded.task
        assert loaded.notes == (), "a known task needs no guess"
        folder = f"{layout}/{found.tasks[task.name].place.rstrip('/')}"
        for split in SPLITS:
            name = ON_DISK[layout].get(split, split)
            listed = manifest[folder][name]
            raw = (real_data / folder / f"{name}.json").read_bytes()
            assert hashlib.sha256(raw).hexdigest() == listed["sha256"], "the data have changed"
            assert len(task.splits[split]) == listed["rows"]
            for row, source in zip(task.splits[split], json.loads(raw), strict=True):
                text = source.get("prompt", source.get("sentence"))
                assert row.answer == source.get("answer", source.get("label"))
                assert text in row.prompt
                assert layout != "trace" or text == row.prompt
        if task.labels is not None:
            answers = {row.answer for row in task.splits["train"]}
            assert answers == set(task.labels), "labels occur in the train rows, and only they"
        assert task.labels == KNOWN[task.name].labels
        assert set(duplicates(task).values()) == {0}


def test_prepared_real_data_are_the_same_to_the_byte(real_data: Path, tmp_path: Path) -> None:
    for layout in ("trace", "cl_benchmark"):
        source, out = real_data / layout, tmp_path / layout
        loaded = load_found(detect(source), available(source))
        assert store(loaded, out, [source]).status == "written"
        assert store(loaded, out, [source]).status == "unchanged"
        before = [one.task for one in loaded]
        after = load_tasks([task.name for task in before], out)
        assert after == before
        for one, other in zip(before, after, strict=True):
            for split in SPLITS:
                texts = [(row.prompt.encode(), row.answer.encode()) for row in one.splits[split]]
                assert texts == [
                    (r.prompt.encode(), r.answer.encode()) for r in other.splits[split]
                ]


def test_the_right_answers_score_best(real_data: Path) -> None:
    for task in load_tasks(TRACE, real_data / "trace"):
        rows = task.splits["test"][:40]
        right = score(task, [row.answer for row in rows], rows)
        wrong = score(task, [row.answer for row in rows[1:] + rows[:1]], rows)
        # SARI counts 0/0 as 0, so even the reference itself stays a little below 1.
        assert right["score"] == 1 if task.metric != "sari" else right["score"] > 0.9
        assert right["score"] > wrong["score"]
        assert all(0 <= value <= 1 for value in wrong.values())


def test_chance_on_real_data(real_data: Path) -> None:
    fomc, meetings, science = load_tasks(["FOMC", "MeetingBank", "ScienceQA"], real_data / "trace")
    answers = [row.answer for row in fomc.splits["test"]]
    assert constant_score(fomc, "test") == answers.count("C") / len(answers)
    assert constant_score(meetings, "test") is None
    letters = [row.answer[0] for row in science.splits["test"]]
    assert constant_score(science, "test") == letters.count("B") / len(letters)


def test_cl_prompts_name_neither_task_nor_data_set(real_data: Path) -> None:
    for task in load_tasks(["SST-2", "MNLI", "COPA"], real_data / "cl_benchmark"):
        for row in task.splits["train"]:
            assert not row.prompt.startswith("Task:")
            assert "Dataset:" not in row.prompt
            assert row.prompt.endswith("\nAnswer:")
    yelp = load_tasks(["yelp"], real_data / "cl_benchmark")[0]
    head = "What is the sentiment of the following paragraph? Choose one from the option.\n"
    options = "Option: very negative, negative, neutral, positive, very positive \n"
    assert all(row.prompt.startswith(head + options + "Text:") for row in yelp.splits["test"])
    assert any("\\n" in row.prompt for row in yelp.splits["train"]), "literal \\n stays"
