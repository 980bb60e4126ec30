"""Whole streams on a tiny model: the same bytes however a run came about."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from brute import brute_force_arm
from support import ROOT, run_command, toy_arguments, toy_rows, write_task

from treelora_cli.rundir import checkpoints, faults
from treelora_cli.rundir.events import read_events
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.lock import RunLock
from treelora_cli.tree.serial import from_document

TASKS = "alpha,beta,gamma"
TOYS = ("alpha", "beta", "gamma", "delta")


def results(run: Path) -> dict[str, str]:
    """Hashes of what must not depend on how the run came about."""
    files = [run / "scores.json", run / "tree" / "tree.json", *run.glob("tasks/*/adapter/*")]
    files += [*run.glob("tree/history/*/*"), *run.glob("tasks/*/predictions/*")]
    kept = sorted(file for file in files if file.exists())
    assert kept
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest() for file in kept
    }


@pytest.fixture(scope="module")
def reference(tmp_path_factory, tiny_model: Path, toy_data: Path) -> Path:
    """An uninterrupted run over three tasks, made by the real command."""
    run = tmp_path_factory.mktemp("reference") / "run"
    done = run_command(*toy_arguments(tiny_model, toy_data, run, TASKS))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run)
    return run


def test_same_seed_same_bytes(treelora, reference, tiny_model, toy_data, tmp_path) -> None:
    outcome = treelora(*toy_arguments(tiny_model, toy_data, tmp_path / "run", TASKS))
    assert outcome.code == 0, outcome
    assert results(tmp_path / "run") == results(reference)


def test_another_seed_gives_other_bytes(treelora, reference, tiny_model, toy_data, tmp_path):
    arguments = toy_arguments(tiny_model, toy_data, tmp_path / "run", "alpha", "--seed", "5")
    assert treelora(*arguments).code == 0
    adapter = "tasks/000-alpha/adapter/adapter_model.safetensors"
    assert (tmp_path / "run" / adapter).read_bytes() != (reference / adapter).read_bytes()


def test_an_optimizer_that_is_carried_on(treelora, tiny_model, toy_data, tmp_path) -> None:
    """Its moments change what the second task learns, and an extended run reads them back."""
    carry = ["--method", "treelora-official", "--set", "eval.when=last"]
    carry += ["--set", "optim.carry=true"]
    new, whole, run = tmp_path / "new", tmp_path / "whole", tmp_path / "run"
    assert treelora(*toy_arguments(tiny_model, toy_data, new, "alpha,beta", *carry[:4])).code == 0
    assert treelora(*toy_arguments(tiny_model, toy_data, whole, "alpha,beta", *carry)).code == 0
    assert treelora(*toy_arguments(tiny_model, toy_data, run, "alpha", *carry)).code == 0
    # What the first task's evaluation leaves is not that of a run whose last task is the second.
    assert treelora("train-stream", "--run-dir", run, "--tasks", "beta").code == 0
    adapter = "tasks/{}/adapter/adapter_model.safetensors"
    first, second = adapter.format("000-alpha"), adapter.format("001-beta")
    assert (whole / first).read_bytes() == (new / first).read_bytes()
    assert (whole / second).read_bytes() != (new / second).read_bytes()
    assert (run / second).read_bytes() == (whole / second).read_bytes()
    state = "tasks/001-beta/optimizer.safetensors"
    assert (run / state).read_bytes() == (whole / state).read_bytes()
    assert not list(new.glob("tasks/*/optimizer.safetensors"))


def test_a_method_that_refuses_the_model_leaves_no_run(
    treelora, tiny_model, toy_data, tmp_path
) -> None:
    run = tmp_path / "run"
    arguments = toy_arguments(tiny_model, toy_data, run, "alpha", "--method", "treelora-official")
    outcome = treelora(*arguments, "--set", "lora.targets=[q_proj,down_proj]")
    assert outcome.code == 2
    assert "down_proj" in outcome.err
    assert not run.exists()


def test_extending_equals_doing_all_at_once(treelora, reference, tiny_model, toy_data, tmp_path):
    run = tmp_path / "run"
    assert treelora(*toy_arguments(tiny_model, toy_data, run, "alpha")).code == 0
    assert treelora("train-stream", "--run-dir", run, "--tasks", "beta").code == 0
    assert treelora("train-stream", "--run-dir", run, "--tasks", "alpha,gamma").code == 0
    assert results(run) == results(reference)
    again = treelora("train-stream", "--run-dir", run)
    assert again.code == 0
    assert "nothing to do" in again.err
    assert results(run) == results(reference)


class Stop(BaseException):
    """Stands for a kill inside this process."""


@pytest.mark.parametrize(
    ("method", "more"),
    [
        ("treelora", []),
        ("treelora", ["--set", "method.start=group", "--set", "method.signature=query"]),
        ("treelora", ["--set", "method.start=fresh", "--set", "method.signature=gradient"]),
        ("seqlora", []),
        ("per-task", []),
        ("treelora-official", []),
        ("treelora-official", ["--set", "optim.carry=true"]),
        ("joint", ["--set", "optim.epochs={alpha: 1, beta: 3}"]),
    ],
)
def test_stopped_at_any_step_and_resumed(
    treelora, monkeypatch, tiny_model, toy_data, tmp_path, method, more
) -> None:
    """Stop before steps 1, 4, 7, ... of the stream; every stop is a crash without a goodbye."""
    arguments = ["--method", method, "--set", "eval.when=last", *more]
    whole = tmp_path / "whole"
    assert treelora(*toy_arguments(tiny_model, toy_data, whole, "alpha,beta", *arguments)).code == 0
    run = tmp_path / "run"
    real, count, stops = faults.hit, 0, set(range(0, 40, 3))

    def hit(point: str) -> None:
        nonlocal count
        if point == "step":
            count += 1
            if count in stops:
                raise Stop
        real(point)

    monkeypatch.setattr(faults, "hit", hit)
    for _ in range(20):
        try:
            assert (
                treelora(*toy_arguments(tiny_model, toy_data, run, "alpha,beta", *arguments)).code
                == 0
            )
            break
        except Stop:
            continue
    assert count > 12  # it really was stopped and repeated steps
    assert results(run) == results(whole)


@pytest.mark.parametrize(
    "fault", ["step:kill9:9", "eval.batch:kill9:4", "atomic.manifest-written:kill9:3"]
)
def test_killed_and_resumed(reference, tiny_model, toy_data, tmp_path, fault) -> None:
    run = tmp_path / "run"
    arguments = toy_arguments(tiny_model, toy_data, run, TASKS)
    killed = run_command(*arguments, TREELORA_FAULT=fault)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    done = run_command(*arguments)
    assert done.returncode == 0, done.stderr
    assert results(run) == results(reference)


def test_checkpoints_of_a_finished_task_never_outrank_the_next_ones(
    treelora, monkeypatch, reference, tiny_model, toy_data, tmp_path
) -> None:
    """A kill after a task's commit leaves its checkpoints; the next task has lower step numbers."""
    run = tmp_path / "run"
    arguments = toy_arguments(tiny_model, toy_data, run, TASKS)
    real = faults.hit
    commits = 0

    def hit(point: str) -> None:
        nonlocal commits
        if point == "step" and (run / "tasks" / "000-alpha").exists():
            commits += 1
            if commits == 4:  # beta has saved its step 2 by now
                raise Stop
        real(point)

    kept = checkpoints.clear
    monkeypatch.setattr(checkpoints, "clear", lambda run_dir: (_ for _ in ()).throw(Stop()))
    with pytest.raises(Stop):
        treelora(*arguments)
    assert checkpoints.steps(RunDir.open(run)) == [2, 4]
    monkeypatch.setattr(checkpoints, "clear", kept)
    monkeypatch.setattr(faults, "hit", hit)
    with pytest.raises(Stop):
        treelora(*arguments)
    assert checkpoints.steps(RunDir.open(run)) == [2]
    assert "resumed beta after step 2" in treelora(*arguments).err
    assert results(run) == results(reference)


def test_ctrl_c_saves_and_says_how_to_go_on(reference, tiny_model, toy_data, tmp_path) -> None:
    run = tmp_path / "run"
    arguments = toy_arguments(tiny_model, toy_data, run, TASKS)
    stopped = run_command(*arguments, TREELORA_FAULT="step:int:9")
    assert stopped.returncode == 130, stopped.stderr
    assert "the state is saved" in stopped.stderr
    assert f"treelora train-stream --run-dir {run}" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert RunDir.open(run).info.status == "interrupted"
    assert read_events(run / "events.jsonl")[-1]["kind"] == "interrupted"
    resumed = run_command("train-stream", "--run-dir", str(run))
    assert resumed.returncode == 0, resumed.stderr
    assert "resumed beta after step 3" in resumed.stderr
    assert results(run) == results(reference)


def test_term_during_evaluation(tiny_model, toy_data, tmp_path) -> None:
    arguments = toy_arguments(tiny_model, toy_data, tmp_path / "run", TASKS)
    stopped = run_command(*arguments, TREELORA_FAULT="eval.batch:term:2")
    assert stopped.returncode == 143, stopped.stderr
    assert "go on with" in stopped.stderr


def test_events_tell_the_story(reference) -> None:
    events = read_events(reference / "events.jsonl")
    kinds = [event["kind"] for event in events]
    assert kinds[0] == "run_started"
    assert kinds[-1] == "run_finished"
    assert kinds.count("step") == 18
    steps = [event for event in events if event["kind"] == "step"]
    assert [event["step"] for event in steps] == [1, 2, 3, 4, 5, 6] * 3
    assert all(event["penalty"] is None for event in steps[:6])
    # The ramp starts at 0, so the first step of a task has a penalty of exactly 0; after a quarter
    # of the task the group is fixed, and thresholding takes the penalty's place.
    for later in (steps[6:12], steps[12:]):
        assert later[0]["penalty"] == 0
        assert later[1]["penalty"] > 0
        assert all("arms" not in event and event["penalty"] is None for event in later[2:])
    assert {event["arms"][0] for event in steps[12:14]} <= {0, 1}


def test_scores_hold_the_matrix_and_what_fwt_needs(reference) -> None:
    cells = json.loads((reference / "scores.json").read_text())["cells"]
    found = {(cell["after"], cell["task"], cell["adapter"]) for cell in cells}
    names = TASKS.split(",")
    expected = {(None, name, "base") for name in names}
    expected |= {(names[j - 1], names[j], "latest") for j in (1, 2)}
    expected |= {(names[i], names[j], "latest") for i in range(3) for j in range(i + 1)}
    assert found == expected
    assert all(cell["rows"] == 6 and not cell["limited"] for cell in cells)


def test_limited_cells_are_marked(treelora, tiny_model, toy_data, tmp_path) -> None:
    run = tmp_path / "run"
    assert (
        treelora(*toy_arguments(tiny_model, toy_data, run, "alpha,beta", "--limit", "4")).code == 0
    )
    cells = json.loads((run / "scores.json").read_text())["cells"]
    assert all(cell["limited"] and cell["rows"] == 4 for cell in cells)
    report = json.loads(treelora("report", run, "--json").out)
    assert report["op"] is None


def test_json_events_only_on_stdout(treelora, tiny_model, toy_data, tmp_path) -> None:
    arguments = toy_arguments(tiny_model, toy_data, tmp_path / "run", "alpha", "--json")
    outcome = treelora(*arguments)
    events = [json.loads(line) for line in outcome.out.splitlines()]
    assert {event["schema_version"] for event in events} == {1}
    assert events[0]["kind"] == "run_started"
    assert events[-1]["kind"] == "run_finished"


def test_divergence_stops_before_the_weights_change(treelora, tiny_model, toy_data, tmp_path):
    run = tmp_path / "run"
    arguments = toy_arguments(tiny_model, toy_data, run, "alpha,beta")
    outcome = treelora(*arguments, "--set", "optim.lr=1e30", "--set", "optim.grad_clip=0")
    assert outcome.code == 7, outcome
    assert "at step" in outcome.err
    assert RunDir.open(run).info.status == "failed"
    assert not list(run.glob("tasks/001*"))


def test_other_settings_or_order_are_refused(treelora, reference, tiny_model, toy_data) -> None:
    before = results(reference)
    outcome = treelora("train-stream", "--run-dir", reference, "--set", "optim.lr=5e-3")
    assert outcome.code == 2
    assert "optim.lr: 0.001 -> 0.005" in outcome.err
    outcome = treelora("train-stream", "--run-dir", reference, "--tasks", "beta,alpha")
    assert outcome.code == 2
    assert "order" in outcome.err
    assert results(reference) == before


def test_changed_rows_are_refused(treelora, reference, tmp_path, tiny_model) -> None:
    for kind, name in enumerate(("alpha", "beta", "gamma")):
        rows = {
            "train": toy_rows(kind, 11),
            "eval": toy_rows(kind, 4, 12),
            "test": toy_rows(kind, 6, 16),
        }
        write_task(tmp_path / "data", name, rows)
    outcome = treelora("train-stream", "--run-dir", reference, "--data", tmp_path / "data",
                       "--model", tiny_model, "--tasks", "alpha")  # fmt: skip
    assert outcome.code == 3
    assert "rows of task alpha" in outcome.err


def test_a_second_writer_is_told_who_is_first(treelora, reference) -> None:
    code = (
        "import sys, time\nfrom pathlib import Path\n"
        "from treelora_cli.rundir.lock import RunLock\n"
        "with RunLock(Path(sys.argv[1]), command='the first'):\n"
        "    print('locked', flush=True)\n    time.sleep(60)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(reference)],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline().strip() == "locked"
        for arguments in (["train-stream", "--run-dir", reference], ["eval", reference]):
            began = time.monotonic()
            outcome = treelora(*arguments)
            assert outcome.code == 5, outcome
            assert f"process {holder.pid}" in outcome.err
            assert time.monotonic() - began < 20
        assert treelora("tree", "show", reference).code == 0
    finally:
        holder.kill()
        holder.wait()
    with RunLock(reference):
        pass


def test_a_damaged_adapter_is_refused(treelora, tiny_model, toy_data, tmp_path) -> None:
    run = tmp_path / "run"
    assert treelora(*toy_arguments(tiny_model, toy_data, run, "alpha")).code == 0
    file = run / "tasks" / "000-alpha" / "adapter" / "adapter_model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    for arguments in (["eval", run], ["train-stream", "--run-dir", run, "--tasks", "beta"]):
        outcome = treelora(*arguments)
        assert outcome.code == 4, outcome
        assert "adapter_model.safetensors" in outcome.err
        assert "Traceback" not in outcome.err


def test_eval_own_latest_and_one_task(treelora, reference, tmp_path) -> None:
    reference = Path(shutil.copytree(reference, tmp_path / "run"))  # new cells are stored
    own = json.loads(treelora("eval", reference, "--adapter", "own", "--json").out)["cells"]
    assert [(cell["after"], cell["task"]) for cell in own] == [(n, n) for n in TASKS.split(",")]
    before = {cell["task"]: cell["score"] for cell in own}
    matrix = json.loads((reference / "scores.json").read_text())["cells"]
    diagonal = {
        cell["task"]: cell["score"]
        for cell in matrix
        if cell["adapter"] == "latest" and cell["after"] == cell["task"]
    }
    assert before == diagonal  # a task's own adapter is the one that answered just after it
    one = treelora("eval", reference, "--adapter", "task:beta", "--tasks", "gamma", "--json")
    cell = json.loads(one.out)["cells"][0]
    assert (cell["after"], cell["task"], cell["adapter"]) == ("beta", "gamma", "task:beta")
    just_before = next(
        c for c in matrix if (c["after"], c["task"], c["adapter"]) == ("beta", "gamma", "latest")
    )
    assert cell["score"] == just_before["score"]
    assert cell["adapter_hash"] == just_before["adapter_hash"]


def test_the_logged_arms_of_a_real_run_are_those_of_equation_2(
    treelora, tiny_model, toy_data, tmp_path
) -> None:
    """Replay every (arm, xi) of events.jsonl through a brute-force Eq. 2 on the stored trees."""
    run = tmp_path / "run"
    arguments = toy_arguments(tiny_model, toy_data, run, "alpha,beta,gamma,delta")
    more = ["--epochs", "6", "--set", "eval.when=none", "--set", "optim.lr=5e-3"]
    more += ["--set", "bandit.delta=median", "--set", "method.form=subgradient"]
    assert treelora(*arguments, *more).code == 0
    steps = [event for event in read_events(run / "events.jsonl") if event["kind"] == "step"]
    checked = 0
    for index, name in enumerate(("alpha", "beta", "gamma", "delta")):
        mine = [event for event in steps if event["task"] == name]
        assert len(mine) == 18
        if index == 0:
            assert all("arms" not in event for event in mine)
            continue
        before = run / "tree" / "history" / f"{index - 1:03d}-{TOYS[index - 1]}" / "tree.json"
        tree = from_document(json.loads(before.read_text()))
        deltas = [node.median for node in tree.nodes]
        log: list[tuple[int, float]] = []
        for event in mine:
            # Chosen when the step before has ended, from feedback older than that.
            assert event["arms"] == [brute_force_arm(tree, deltas, log[:-1], 1.0)]
            log.append((event["arms"][0], event["xi"][0]))
            checked += 1
        record = json.loads((run / "tasks" / f"{index:03d}-{name}" / "task.json").read_text())
        pulls = record["bandit"][0]["pulls"]
        assert pulls == [sum(arm == k for arm, _ in log) for k in range(index)]
    assert checked == 54
