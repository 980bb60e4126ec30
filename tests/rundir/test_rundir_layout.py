"""Opening, making and naming: every wrong folder gets one clear error."""

from __future__ import annotations

import json
import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest

from treelora_cli.errors import RunDirError
from treelora_cli.rundir import atomic
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.runinfo import RunInfo


def info(*tasks: str) -> RunInfo:
    made = RunInfo(
        method="treelora",
        model="../models/qwen",
        base_fingerprint="0" * 64,
        builtin_base=False,
        builtin_data=True,
        seed=3,
        versions={"torch": "2.13"},
    )
    for name in tasks:
        made.add_task(name, "accuracy")
    return made


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    made = RunDir.create(tmp_path / "run", info("A", "own"), recipe="seed: 3\n")
    for index, name in enumerate(("A", "own")):
        with atomic.commit_dir(made.task_dir(index, name)) as folder:
            atomic.write_json(folder / "task.json", {"index": index, "name": name, "steps": 4})
    return made


def test_paths():
    run = RunDir("run")
    assert run.tree_history(7, "A") == Path("run/tree/history/007-A")
    assert run.tree_json == Path("run/tree/tree.json")
    assert run.checkpoint_dir(120) == Path("run/checkpoint/step-00000120")
    assert run.checkpoint_current == Path("run/checkpoint/current")
    assert [run.events.name, run.scores.name, run.lock.name, run.recipe_yaml.name] == [
        "events.jsonl",
        "scores.json",
        "lock",
        "recipe.yaml",
    ]


# --- opening


def test_open_gives_back_what_was_created(run):
    opened = RunDir.open(run.path)
    assert opened.info == run.info
    assert opened.info.tasks[1] == {
        "name": "own",
        "index": 1,
        "metric": "accuracy",
        "status": "pending",
    }
    opened.info.tasks[0]["status"] = "finished"
    opened.info.status = "interrupted"
    opened.info.extra["note"] = {"a": [1]}
    opened.save_info()
    again = RunDir.open(str(run.path))
    assert again.info == opened.info
    assert [entry["name"] for entry in again.finished_tasks()] == ["A"]
    assert run.recipe_yaml.read_text() == "seed: 3\n"


def test_a_link_to_the_run_directory_itself_is_fine(run, tmp_path):
    (tmp_path / "link").symlink_to(run.path)
    assert RunDir.open(tmp_path / "link").read_task(0)["steps"] == 4
    assert RunDir.open(tmp_path / "link").sweep() == []


def edit(run: RunDir, **changes: object) -> None:
    doc = json.loads(run.run_json.read_text())
    doc.update(changes)
    run.run_json.write_text(json.dumps({k: v for k, v in doc.items() if v != "absent"}))


TASK = {"name": "A", "index": 0, "metric": "accuracy", "status": "pending"}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"format_version": "absent"}, "names no format version"),
        ({"format_version": "1"}, "names no format version"),
        ({"format_version": True}, "names no format version"),
        ({"format_version": 2}, "created by a newer version of treelora"),
        ({"format_version": 0}, "has run format 0"),
        ({"method": "absent"}, "'method' is missing"),
        ({"seed": True}, "'seed' is no int"),
        ({"builtin_base": 1}, "'builtin_base' is no bool"),
        ({"status": "done"}, "the status 'done' is none of"),
        ({"versions": {"torch": 2}}, "no text"),
        ({"tasks": {}}, "'tasks' is no list"),
        ({"tasks": ["A"]}, "task 0: it does not have index, metric, name, status"),
        ({"tasks": [{**TASK, "name": "../x"}]}, "'../x' cannot be a task name"),
        ({"tasks": [{**TASK, "name": ["x"]}]}, "cannot be a task name"),
        ({"tasks": [{**TASK, "index": 1}]}, "its index is 1"),
        ({"tasks": [{**TASK, "index": False}]}, "its index is False"),
        ({"tasks": [{**TASK, "metric": None}]}, "its metric is no text"),
        ({"tasks": [{**TASK, "status": "ready"}]}, "the status 'ready' is none of"),
        ({"tasks": [TASK, {**TASK, "index": 1}]}, "occurs twice"),
    ],
)
def test_a_wrong_run_json_is_one_error(run, changes, reason):
    edit(run, **changes)
    with pytest.raises(RunDirError, match=reason) as caught:
        RunDir.open(run.path)
    assert caught.value.exit_code == 4
    assert caught.value.hint
    assert str(run.path) in caught.value.message


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[]", b'{"a":' * 50_000, b"\x80\x04K\x01."])
def test_a_damaged_run_json_is_one_error(run, data):
    run.run_json.write_bytes(data)
    with pytest.raises(RunDirError, match=r"run\.json"):
        RunDir.open(run.path)


def test_what_is_no_run_directory(tmp_path):
    with pytest.raises(RunDirError, match="there is no run directory") as caught:
        RunDir.open(tmp_path / "none")
    assert "train-stream" in caught.value.hint
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunDirError, match="is a file"):
        RunDir.open(tmp_path / "file")
    with pytest.raises(RunDirError, match=r"has no run\.json"):
        RunDir.open(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["run.json", "recipe.yaml", "events.jsonl", "scores.json", "tasks", "tree", "checkpoint"],
)
def test_an_entry_that_is_a_link_is_refused(run, tmp_path, name):
    place = run.path / name
    if place.exists():
        place.rename(tmp_path / "outside")
    place.symlink_to(tmp_path / "outside")
    with pytest.raises(RunDirError, match=f"{name} is a symbolic link"):
        RunDir.open(run.path)


def test_a_run_that_may_not_be_read(run, in_child):
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        place = Path(folder) / "run"
        shutil.copytree(run.path, place)
        place.chmod(0)

        def as_nobody() -> None:
            if os.getuid() == 0:
                os.setgroups([])
                os.setuid(65534)
            for path in (place, place / "inner"):
                with pytest.raises(RunDirError, match="denied"):
                    RunDir.open(path)

        assert in_child(as_nobody) == 0
        place.chmod(0o755)


def test_info_that_no_reader_would_accept_is_not_written(run):
    before = run.run_json.read_bytes()
    run.info.status = "done"
    with pytest.raises(ValueError, match="'done'"):
        run.save_info()
    assert run.run_json.read_bytes() == before
    with pytest.raises(ValueError, match="already"):
        run.info.add_task("A", "accuracy")


# --- creating


def test_create_refuses_a_run_and_a_folder_in_use(run, tmp_path):
    with pytest.raises(RunDirError, match="holds a run already"):
        RunDir.create(run.path, info())
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(RunDirError, match="not empty") as caught:
        RunDir.create(tmp_path, info())
    assert "empty folder" in caught.value.hint


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("point", ["file.half-written", "file.synced", "file.replaced"])
def test_kill_while_creating(tmp_path, in_child, snapshot, point, nth):
    def create(name: str) -> RunDir:
        return RunDir.create(tmp_path / name, info("A"), recipe="seed: 3\n")

    assert in_child(lambda: create("run"), f"{point}:kill9:{nth}") == -signal.SIGKILL
    if (point, nth) == ("file.replaced", 2):
        assert RunDir.open(tmp_path / "run").info == info("A")
    else:
        with pytest.raises(RunDirError, match=r"has no run\.json"):
            RunDir.open(tmp_path / "run")
        create("run")
    assert snapshot(tmp_path / "run") == snapshot(create("other").path)


# --- tasks


def test_read_task(run):
    assert run.read_task(1) == {"index": 1, "name": "own", "steps": 4}
    for index in (2, -1):
        with pytest.raises(RunDirError, match=f"has no task {index}"):
            run.read_task(index)


def test_read_task_refuses_what_was_changed_swapped_or_lost(run, tmp_path):
    a, b = run.task_dir(0, "A"), run.task_dir(1, "own")
    a.rename(tmp_path / "x")
    b.rename(a)
    (tmp_path / "x").rename(b)
    with pytest.raises(RunDirError, match="holds task 1 'own', not 0 'A'"):
        run.read_task(0)
    (a / "task.json").write_text("{}")
    with pytest.raises(RunDirError, match=r"task\.json has 2 bytes"):
        run.read_task(0)
    shutil.rmtree(a)
    with pytest.raises(RunDirError, match="is missing"):
        run.read_task(0)


def test_a_task_is_readable_while_it_is_being_replaced(run, in_child):
    def replace() -> None:
        with atomic.commit_dir(run.task_dir(0, "A")) as folder:
            atomic.write_json(folder / "task.json", {"index": 0, "name": "A", "steps": 5})

    assert in_child(replace, "atomic.moved-aside:kill9") == -signal.SIGKILL
    assert not run.task_dir(0, "A").exists()
    assert run.read_task(0)["steps"] == 4
    assert len(run.sweep()) == 2
    assert run.read_task(0)["steps"] == 4
    replace()
    assert run.read_task(0)["steps"] == 5


def test_sweep_goes_everywhere_in_the_run_and_nowhere_else(run, tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    places = [run.path, run.tasks, run.task_dir(0, "A"), run.task_dir(0, "A") / "predictions"]
    places += [run.tree, run.tree / "history", run.checkpoints, run.path / "predictions", outside]
    for place in places:
        place.mkdir(parents=True, exist_ok=True)
        (place / ".x.tmp-1-0123abcd").write_text("x")
    (run.tasks / "002-C").symlink_to(outside)
    found = run.sweep()
    assert set(found) == {place / ".x.tmp-1-0123abcd" for place in places[:-1]}
    assert [path.name for path in outside.iterdir()] == [".x.tmp-1-0123abcd"]
