from __future__ import annotations

import json
import math
import os
import stat
import threading
from unittest import mock

import pytest
from report_fixtures import cell, make_cells, make_run, names_for, score, tree_document

from treelora_cli.errors import RunDirError
from treelora_cli.report.collect import collect
from treelora_cli.report.losses import MOST_POINTS, loss_curves, thin
from treelora_cli.report.model import LossPoint
from treelora_cli.rundir.atomic import commit_dir, write_json
from treelora_cli.rundir.events import EventLog
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.scores import Scores


def edit(path, change):
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def test_a_finished_run(tmp_path):
    report = collect(make_run(tmp_path / "run", tasks=3))
    assert report.method == "treelora"
    assert report.model == "meta-llama/Llama-3.2-1B-Instruct"
    assert (report.status, report.seed, report.mode) == ("finished", 1234, "latest")
    assert report.learned == 3
    assert not report.synthetic
    assert report.missing == ()
    R = [[score(i, j) for j in range(3)] for i in range(3)]
    assert report.op == pytest.approx(sum(R[2]) / 3)
    assert report.bwt == pytest.approx(sum(R[j][j] - R[2][j] for j in range(3)) / 3)
    forward = [R[j - 1][j] - score(-1, j) for j in (1, 2)]
    assert report.fwt == pytest.approx(sum(forward) / 2)
    task = report.tasks[0]
    assert (task.own, task.final, task.zero_shot) == (R[0][0], R[2][0], score(-1, 0))
    assert task.change == pytest.approx(R[2][0] - R[0][0])
    assert (task.rows, task.steps, task.trainable_parameters) == (200, 40, 851_968)
    assert (task.metric, task.language, task.chance) == ("accuracy", "zh", 0.3333)
    assert report.train_seconds == pytest.approx(61.25 * 3 + 3)
    assert report.total_seconds == pytest.approx(61.25 * 3 + 3 + 31.5)
    assert report.tree["tasks"] == names_for(3)
    assert report.recipe.startswith("method:\n  name: treelora\n")
    assert report.command.startswith("treelora train-stream --tasks C-STANCE,FOMC,MeetingBank")
    assert report.versions["torch"] == "2.13.0"
    assert len(task.loss) == 40


def test_built_in_things_are_marked(tmp_path):
    report = collect(make_run(tmp_path / "run", builtin=True, model="tiny"))
    assert report.synthetic
    assert report.model == "tiny (built-in, synthetic)"
    assert report.tasks[0].label == "C-STANCE (built-in, synthetic)"


def test_generated_data_of_ones_own_are_not_called_built_in(tmp_path):
    run = make_run(tmp_path / "run")
    edit(run / "tasks" / "000-C-STANCE" / "task.json", lambda task: task.update(synthetic=True))
    report = collect(run)
    assert report.synthetic
    assert report.tasks[0].label == "C-STANCE (synthetic)"
    assert report.tasks[1].label == "FOMC"


def test_a_run_in_training_reports_what_is_finished(tmp_path):
    report = collect(make_run(tmp_path / "run", tasks=5, learned=2))
    assert (report.status, report.learned) == ("running", 2)
    assert [task.status for task in report.tasks] == [
        "finished",
        "finished",
        "training",
        "pending",
        "pending",
    ]
    assert report.op == pytest.approx((score(1, 0) + score(1, 1)) / 2)
    assert len(report.op_curve) == 2
    assert report.tasks[2].own is None
    assert report.tasks[2].zero_shot is not None
    assert report.tasks[2].steps == 40, "the last step logged"


def test_a_task_under_evaluation_does_not_empty_the_numbers(tmp_path):
    names = names_for(3)
    cells = [c for c in make_cells(names, 2) if c.after != names[1] or c.task == names[0]]
    run = make_run(tmp_path / "run", learned=2, cells=cells)
    edit(run / "run.json", lambda info: info["tasks"][1].update(status="trained"))
    assert collect(run).learned == 1
    assert collect(run).op == score(0, 0)
    edit(run / "run.json", lambda info: info["tasks"][1].update(status="finished"))
    assert collect(run).learned == 2
    assert collect(run).op is None


def test_nothing_learned_yet(tmp_path):
    report = collect(make_run(tmp_path / "run", learned=0))
    assert (report.learned, report.matrix, report.op, report.bwt) == (0, (), None, None)


def test_missing_cells_are_listed_and_never_zero(tmp_path):
    names = names_for(3)
    cells = [
        c
        for c in make_cells(names, 3)
        if (c.after, c.task) not in {(names[2], names[0]), (None, names[1])}
    ]
    report = collect(make_run(tmp_path / "run", cells=cells))
    assert report.missing == (("zero shot", "FOMC"), ("after MeetingBank", "C-STANCE"))
    assert (report.op, report.bwt, report.forgetting, report.fwt) == (None,) * 4
    assert report.op_curve[:2] == pytest.approx((score(0, 0), (score(1, 0) + score(1, 1)) / 2))


def test_only_the_last_row_measured_gives_op_alone(tmp_path):
    """What a joint method leaves."""
    names = names_for(3)
    cells = [cell(names[2], name, 0.5) for name in names]
    report = collect(make_run(tmp_path / "run", method="joint", cells=cells))
    assert report.op == 0.5
    assert (report.bwt, report.forgetting, report.fwt) == (None, None, None)


def test_own_mode(tmp_path):
    cells = [c for c in make_cells(names_for(3), 3, "own") if c.after is not None]
    report = collect(make_run(tmp_path / "run", method="per-task", mode="own", cells=cells))
    assert report.mode == "own"
    assert report.bwt == 0
    assert report.op == pytest.approx(sum(score(j, j) for j in range(3)) / 3)
    assert report.fwt is None
    assert report.missing == ()


def test_limited_cells_are_counted_apart(tmp_path):
    names = names_for(2)
    cells = [cell(names[0], names[0], 0.9, limited=True, rows=8)]
    report = collect(make_run(tmp_path / "run", tasks=2, cells=cells))
    assert report.limited_cells == 1
    assert report.op is None
    assert report.op_curve == (None, None)
    assert report.tasks[0].own is None
    assert report.limited_matrix == ((0.9, None), (None, None))
    assert report.at_a_glance().matrix == report.limited_matrix


def test_limited_cells_are_not_shown_beside_full_ones(tmp_path):
    names = names_for(2)
    cells = [cell(names[0], names[0], 0.9), cell(names[0], names[0], 0.8, limited=True, rows=8)]
    report = collect(make_run(tmp_path / "run", tasks=2, cells=cells))
    assert report.limited_matrix == ()
    assert report.at_a_glance() is None


def test_the_runs_decoding_counts(tmp_path):
    names = names_for(1)
    cells = [cell(names[0], names[0], 0.9), cell(names[0], names[0], 0.4, decoding="sample")]
    run = make_run(tmp_path / "run", tasks=1, cells=cells, extra={"decoding": "sample"})
    assert collect(run).op == 0.4
    assert collect(run).decoding == "sample"


def test_times_of_the_log_complete_those_of_the_task(tmp_path):
    run = make_run(tmp_path / "run", tasks=1)
    EventLog(run / "events.jsonl").append(
        "task_finished", task="C-STANCE", seconds={"evaluate": 99.5}
    )
    task = collect(run).tasks[0]
    assert (task.train_seconds, task.evaluate_seconds) == (61.25, 99.5)


def test_a_repeated_step_counts_once(tmp_path):
    events = [
        {"kind": "step", "task": "a", "step": 1, "loss": 3.0},
        {"kind": "step", "task": "a", "step": 2, "loss": 2.0},
        {"kind": "resumed"},
        {"kind": "step", "task": "a", "step": 2, "loss": 2.5},
        {"kind": "step", "task": "a", "step": 3, "loss": None},
        {"kind": "step", "task": "b", "step": 1, "loss": 1},
        {"kind": "evaluated", "task": "b", "step": 1, "loss": 9},
    ]
    curves = loss_curves(events)
    assert curves["a"] == (LossPoint(1, 3.0), LossPoint(2, 2.5))
    assert curves["b"] == (LossPoint(1, 1.0),)


def test_a_long_curve_is_averaged():
    points = [LossPoint(step, float(step % 2)) for step in range(1, 10_001)]
    short = thin(points)
    assert len(short) <= MOST_POINTS
    assert short[-1].step == 10_000
    assert math.isclose(sum(point.loss for point in short) / len(short), 0.5, abs_tol=1e-2)


def test_reading_leaves_no_trace_and_needs_no_right_to_write(tmp_path):
    run = make_run(tmp_path / "run")
    places = [run, *run.rglob("*")]
    before = {place: place.stat().st_mtime_ns for place in places}
    for place in places:
        place.chmod(stat.S_IRUSR | (stat.S_IXUSR if place.is_dir() else 0))
    try:
        assert collect(run).learned == 3
    finally:
        for place in places:
            place.chmod(0o755 if place.is_dir() else 0o644)
    assert {place: place.stat().st_mtime_ns for place in [run, *run.rglob("*")]} == before


def test_a_task_folder_set_aside_is_still_read(tmp_path):
    run = make_run(tmp_path / "run", tasks=1)
    os.replace(run / "tasks" / "000-C-STANCE", run / "tasks" / ".000-C-STANCE.old-1-0123abcd")
    assert collect(run).tasks[0].steps == 40


@pytest.mark.parametrize("name", ["run.json", "scores.json", "tree/tree.json"])
def test_damage_is_named(tmp_path, name):
    run = make_run(tmp_path / "run")
    (run / name).write_text("{ not json")
    with pytest.raises(RunDirError, match=name.replace(".", r"\.")):
        collect(run)


def test_no_run_directory(tmp_path):
    with pytest.raises(RunDirError):
        collect(tmp_path)


def test_optional_files_may_be_absent(tmp_path):
    run = make_run(tmp_path / "run", tree=False)
    for name in ("events.jsonl", "recipe.yaml", "scores.json"):
        (run / name).unlink()
    edit(run / "run.json", lambda info: [info.pop(key) for key in ("mode", "command")])
    report = collect(run)
    assert (report.tree, report.recipe, report.command) == (None, "", None)
    assert (report.mode, report.op, report.decoding) == ("latest", None, None)
    assert len(report.missing) == 2 + 2 + 3 + 3


def test_odd_values_in_the_files_do_no_harm(tmp_path):
    run = make_run(tmp_path / "run", tasks=1, extra={"mode": 3, "command": {"x": 1}})
    edit(
        run / "tasks" / "000-C-STANCE" / "task.json",
        lambda task: task.update(seconds="soon", chance=True, steps=1.5, language=["en"]),
    )
    task = collect(run).tasks[0]
    assert (task.train_seconds, task.chance, task.language) == (None, None, None)


def test_open_gives_the_same_tasks(tmp_path):
    run = make_run(tmp_path / "run")
    assert [t.name for t in collect(run).tasks] == [e["name"] for e in RunDir.open(run).info.tasks]


def test_reading_while_another_process_writes(tmp_path):
    """What is read is one state or the next, never an error."""
    path = make_run(tmp_path / "run", tasks=3)
    run = RunDir.open(path)
    cells = make_cells(names_for(3), 3)
    stop = threading.Event()

    def write() -> None:
        log = EventLog(run.events)
        while not stop.is_set():
            Scores(cells[: len(cells) - 2]).save(run.scores)
            Scores(cells).save(run.scores)
            log.append("step", task="FOMC", step=1, loss=1.0)
            write_json(run.tree_json, tree_document(names_for(3)))
            run.save_info()
            with commit_dir(run.task_dir(0, "C-STANCE")) as place:
                write_json(place / "task.json", {"steps": 40})

    with mock.patch("os.fsync"):
        writer = threading.Thread(target=write)
        writer.start()
        try:
            for _ in range(25):
                report = collect(path)
                assert report.tasks[0].steps == 40
                assert report.tree["tasks"] == names_for(3)
        finally:
            stop.set()
            writer.join()
