"""All tasks at once: one adapter, a last row, no stream."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import toy_arguments

from treelora_cli.engine.batches import BatchPlan, UnionPlan
from treelora_cli.report.scoring import Scored, score
from treelora_cli.rundir.events import read_events
from treelora_cli.rundir.layout import RunDir

TASKS = ["alpha", "beta", "gamma"]


@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 4)), min_size=1, max_size=5),
    st.integers(1, 12),
    st.integers(0, 99),
)
def test_every_row_occurs_as_often_as_its_task_has_epochs(
    tasks: list[tuple[int, int]], batch: int, seed: int
) -> None:
    rows, epochs = zip(*tasks, strict=True)
    plan = UnionPlan(rows, batch, epochs, seed)
    assert plan.steps == sum(BatchPlan(n, batch, e, seed).steps for n, e in tasks)
    steps = [plan.rows(step) for step in range(plan.steps)]
    assert all(1 <= len(chosen) <= batch for chosen in steps)
    seen = sorted(row for chosen in steps for row in chosen)
    expected, start = [], 0
    for n, e in tasks:
        expected += [row for row in range(start, start + n) for _ in range(e)]
        start += n
    assert seen == expected
    assert {plan.epoch_of(step) for step in range(plan.steps)} == {0}
    again = UnionPlan(rows, batch, epochs, seed)
    assert [again.rows(step) for step in reversed(range(plan.steps))] == steps[::-1]


def test_the_union_is_shuffled_across_tasks() -> None:
    plan = UnionPlan([40, 40], 8, [1, 1], 3)
    mixed = [{row // 40 for row in plan.rows(step)} for step in range(plan.steps)]
    assert mixed.count({0, 1}) > 7
    assert plan.rows(0) != UnionPlan([40, 40], 8, [1, 1], 4).rows(0)


@pytest.fixture(scope="module")
def joint(tmp_path_factory, tiny_model: Path, toy_data: Path) -> Path:
    from support import run_command

    run = tmp_path_factory.mktemp("joint") / "run"
    epochs = "optim.epochs={alpha: 1, beta: 2, gamma: 2}"
    more = ["--method", "joint", "--set", epochs]
    done = run_command(*toy_arguments(tiny_model, toy_data, run, ",".join(TASKS), *more))
    assert done.returncode == 0, done.stderr
    assert "3 tasks at once" in done.stderr
    return run


def test_one_adapter_and_as_many_steps_as_the_stream(joint: Path) -> None:
    assert [path.name for path in joint.glob("tasks/*")] == ["002-gamma"]
    document = json.loads((joint / "tasks" / "002-gamma" / "task.json").read_text())
    assert document["steps"] == 3 + 6 + 6
    assert [one["name"] for one in document["members"]] == TASKS
    assert [one["epochs"] for one in document["members"]] == [1, 2, 2]
    steps = [event for event in read_events(joint / "events.jsonl") if event["kind"] == "step"]
    assert [event["step"] for event in steps] == list(range(1, 16))
    info = RunDir.open(joint).info
    assert {entry["status"] for entry in info.tasks} == {"finished"}
    cells = json.loads((joint / "scores.json").read_text())["cells"]
    latest = [cell for cell in cells if cell["adapter"] == "latest"]
    assert sorted((cell["after"], cell["task"]) for cell in latest) == [
        ("gamma", name) for name in TASKS
    ]


def test_only_op_is_defined(treelora, joint: Path) -> None:
    report = json.loads(treelora("report", joint, "--json").out)
    assert report["adapter_mode"] == "joint"
    last = report["matrix"][-1]
    assert report["op"] == pytest.approx(sum(last) / 3)
    assert [report[key] for key in ("bwt", "bwt_lopez_paz", "forgetting", "fwt")] == [None] * 4
    assert report["missing"] == []
    assert report["matrix"][:2] == [[None] * 3] * 2
    assert [one["final"] for one in report["tasks"]] == last
    assert [one["own"] for one in report["tasks"]] == [None] * 3
    assert all(one["chance"] is not None for one in report["tasks"])
    text = treelora("report", joint).out
    assert "not defined" in text
    assert text.count("n/a") >= 4
    assert "Not measured" not in text


def test_one_task_alone_has_no_bwt_either(treelora, tiny_model, toy_data, tmp_path) -> None:
    run = tmp_path / "run"
    assert (
        treelora(*toy_arguments(tiny_model, toy_data, run, "alpha", "--method", "joint")).code == 0
    )
    report = json.loads(treelora("report", run, "--json").out)
    assert report["op"] is not None
    assert report["bwt"] is None


def test_before_its_evaluation_everything_is_learned_and_nothing_measured() -> None:
    def scored(status: str) -> Scored:
        return score([{"name": name, "status": status} for name in TASKS], [], "joint", None)

    assert scored("training").learned == 0
    assert scored("training").missing() == []
    assert scored("trained").learned == 3
    assert scored("trained").missing() == [("after gamma", name) for name in TASKS]


def test_no_task_can_be_added(treelora, joint: Path) -> None:
    outcome = treelora("train-stream", "--run-dir", joint, "--tasks", "delta")
    assert outcome.code == 2
    assert "delta cannot be added" in outcome.err
    assert "--run-dir" in outcome.err
    again = treelora("train-stream", "--run-dir", joint)
    assert again.code == 0
    assert "nothing to do" in again.err


def test_it_cannot_wait_for_tasks(treelora, tiny_model, toy_data, tmp_path) -> None:
    run = tmp_path / "run"
    outcome = treelora(*toy_arguments(tiny_model, toy_data, run, "-", "--method", "joint"))
    assert outcome.code == 2
    assert "cannot wait for more" in outcome.err
    assert not run.exists()


def test_eval_asks_every_task_of_the_one_adapter(treelora, joint: Path) -> None:
    cells = json.loads(treelora("eval", joint, "--json").out)["cells"]
    assert [cell["task"] for cell in cells] == TASKS
    assert {cell["adapter_hash"] for cell in cells} == {cells[0]["adapter_hash"]}
    outcome = treelora("eval", joint, "--adapter", "own")
    assert outcome.code == 2
    assert "trained at once" in outcome.err


def test_markdown_shows_the_one_row_there_is(treelora, joint: Path) -> None:
    lines = treelora("report", joint, "--format", "md").out.splitlines()
    rows = [line for line in lines if line.startswith(("| 1 alpha |", "| 2 beta", "| 3 gamma"))]
    assert len(rows) == 1
    assert rows[0].startswith("| 3 gamma |")
