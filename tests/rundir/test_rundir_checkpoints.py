"""Checkpoints: stopped anywhere, a valid one is found and the next run ends the same."""

from __future__ import annotations

import logging
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
from rundir_trace import trace

from treelora_cli.errors import DivergedError, EnvironmentProblem, RunDirError
from treelora_cli.rundir import checkpoints
from treelora_cli.rundir.files import LEFTOVER
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.runinfo import RunInfo


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    info = RunInfo("treelora", "built-in", "0" * 64, True, True, seed=0)
    return RunDir.create(tmp_path / "run", info)


def state(step: int) -> dict[str, torch.Tensor]:
    return {"lora": torch.full((4, 4), float(step)), "rng": torch.arange(5, dtype=torch.uint8)}


def save(run: RunDir, step: int) -> None:
    checkpoints.save(run, step, state(step), {"task": 0, "position": step * 8})


def newest_step(run: RunDir) -> int | None:
    found = checkpoints.newest(run)
    if found is None:
        return None
    assert torch.equal(found.tensors["lora"], state(found.step)["lora"])
    assert found.meta == {"task": 0, "position": found.step * 8}
    return found.step


def build(path: Path, *steps: int) -> RunDir:
    info = RunInfo("treelora", "built-in", "0" * 64, True, True, seed=0)
    run = RunDir.create(path, info)
    for step in steps:
        save(run, step)
    return run


def test_save_and_find_again(run):
    assert checkpoints.newest(run) is None
    save(run, 120)
    assert (run.checkpoints / "step-00000120").is_dir()
    assert run.checkpoint_current.read_text() == "step-00000120\n"
    assert newest_step(run) == 120
    for step in (240, 360, 99_999_999, 100_000_000):
        save(run, step)
    assert checkpoints.steps(run) == [99_999_999, 100_000_000]
    assert newest_step(run) == 100_000_000
    checkpoints.clear(run)
    assert checkpoints.newest(run) is None
    assert not run.checkpoints.exists()
    checkpoints.clear(run)


def test_other_names_are_not_checkpoints(run):
    save(run, 5)
    for name in (
        "xstep-00000009",
        "step-00000009x",
        "step-9",
        "step-00000009.tmp",
        "step--0000009",
    ):
        shutil.copytree(run.checkpoint_dir(5), run.checkpoints / name)
    assert checkpoints.steps(run) == [5]


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[tuple[int, ...], RunDir]:
    """Runs that nobody stopped, by the steps they saved."""
    folder = tmp_path_factory.mktemp("saved")
    return {steps: build(folder / str(len(steps)), *steps) for steps in ((1, 2), (1, 2, 3))}


@pytest.fixture
def two(tmp_path, saved) -> RunDir:
    """A run of its own for the test, with steps 1 and 2 saved."""
    return RunDir.open(shutil.copytree(saved[1, 2].path, tmp_path / "two"))


def _passages(steps: tuple[int, ...], last: int) -> list[tuple[str, int]]:
    """What a save passes, recorded so that the tests below cover every step there is."""
    with tempfile.TemporaryDirectory() as folder:
        run = build(Path(folder) / "run", *steps)
        return trace(lambda: save(run, last))


SAVE_THIRD = _passages((1, 2), 3)
SAVE_AGAIN = _passages((1, 2), 2)


def test_every_step_of_a_save_has_a_point():
    points = [point for point, _ in SAVE_THIRD]
    order = [
        "atomic.tmp-made",
        "file.tmp-written",  # the tensors
        "checkpoint.tensors-written",
        "checkpoint.state-written",
        "atomic.manifest-written",
        "atomic.synced",
        "atomic.renamed",
        "checkpoint.committed",
        "checkpoint.current-written",
        "atomic.doomed",
        "checkpoint.pruned",
    ]
    assert [points.index(point) for point in order] == sorted(points.index(p) for p in order)
    assert points.count("file.replaced") == 4  # tensors, state, manifest, current
    assert len(SAVE_THIRD) >= 32
    assert ("atomic.moved-aside", 1) in SAVE_AGAIN


@pytest.mark.parametrize(("point", "nth"), SAVE_THIRD)
def test_kill_while_saving(two, saved, in_child, snapshot, point, nth):
    assert in_child(lambda: save(two, 3), f"{point}:kill9:{nth}") == -signal.SIGKILL
    committed = SAVE_THIRD.index(("atomic.renamed", 1))
    expected = 3 if SAVE_THIRD.index((point, nth)) >= committed else 2
    assert newest_step(two) == expected
    two.sweep()
    assert newest_step(two) == expected
    assert not [path for path in two.path.rglob(".*") if LEFTOVER.fullmatch(path.name)]
    save(two, 3)
    assert snapshot(two.path) == snapshot(saved[1, 2, 3].path)


@pytest.mark.parametrize(("point", "nth"), SAVE_AGAIN)
def test_kill_while_saving_the_same_step_again(two, saved, in_child, snapshot, point, nth):
    assert in_child(lambda: save(two, 2), f"{point}:kill9:{nth}") == -signal.SIGKILL
    two.sweep()
    assert newest_step(two) == 2
    save(two, 2)
    assert snapshot(two.path) == snapshot(saved[1, 2].path)


@pytest.mark.parametrize(("point", "nth"), SAVE_THIRD)
def test_full_disk_while_saving(two, saved, arm, snapshot, point, nth):
    arm(f"{point}:enospc:{nth}")
    with pytest.raises(EnvironmentProblem, match="bytes free") as caught:
        save(two, 3)
    assert str(two.path) in caught.value.message
    committed = SAVE_THIRD.index(("atomic.renamed", 1))
    assert newest_step(two) == (3 if SAVE_THIRD.index((point, nth)) >= committed else 2)
    assert 2 in checkpoints.steps(two)
    two.sweep()
    save(two, 3)
    assert snapshot(two.path) == snapshot(saved[1, 2, 3].path)


def test_kill_while_clearing_leaves_all_or_nothing(run, in_child):
    save(run, 1)
    save(run, 2)
    for point in ("atomic.doomed", "checkpoint.cleared"):
        assert in_child(lambda: checkpoints.clear(run), f"{point}:kill9") == -signal.SIGKILL
        assert checkpoints.newest(run) is None
        run.sweep()
        assert sorted(path.name for path in run.path.iterdir()) == ["run.json"]
        save(run, 2)


def damage(folder: Path, how: str) -> str:
    """Damage a checkpoint; return what the warning must name."""
    tensors = folder / checkpoints.TENSORS
    data = tensors.read_bytes()
    if how == "cut":
        tensors.write_bytes(data[: len(data) // 2])
    elif how == "flipped":
        tensors.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "no manifest":
        (folder / "MANIFEST.json").unlink()
        return "MANIFEST.json"
    elif how == "state gone":
        (folder / checkpoints.STATE).unlink()
        return checkpoints.STATE
    elif how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
        return "MANIFEST.json"
    elif how == "link":
        folder.rename(folder.with_name("elsewhere"))
        folder.symlink_to(folder.with_name("elsewhere"))
        return "symbolic link"
    elif how == "file":
        shutil.rmtree(folder)
        folder.write_text("x")
        return folder.name
    elif how == "another step":
        shutil.rmtree(folder)
        shutil.copytree(folder.with_name("step-00000002"), folder)
        return "not the state of step 3"
    return checkpoints.TENSORS


HOW = ["cut", "flipped", "no manifest", "state gone", "empty", "link", "file", "another step"]


@pytest.mark.parametrize("how", HOW)
def test_a_damaged_newest_is_passed_over_and_stays(run, caplog, how):
    save(run, 2)
    save(run, 3)
    named = damage(run.checkpoint_dir(3), how)
    with caplog.at_level(logging.WARNING, "treelora"):
        assert newest_step(run) == 2
    assert "checkpoint of step 3 passed over" in caplog.text
    assert named in caplog.text
    assert "step-00000003" in caplog.text
    assert "using step-00000002 instead" in caplog.text
    assert run.checkpoint_dir(3).exists()


def test_when_all_are_damaged_there_is_none_and_each_is_named(run, caplog):
    save(run, 2)
    save(run, 3)
    damage(run.checkpoint_dir(2), "cut")
    damage(run.checkpoint_dir(3), "flipped")
    assert checkpoints.newest(run) is None
    assert "step 2 passed over" in caplog.text
    assert "step 3 passed over" in caplog.text
    assert "using no checkpoint instead" in caplog.text
    assert checkpoints.steps(run) == [2, 3]


def test_not_finite_weights_are_neither_saved_nor_resumed_from(run, caplog):
    save(run, 1)
    broken = {"lora": torch.tensor([float("nan")])}
    with pytest.raises(DivergedError, match="'lora'"):
        checkpoints.save(run, 2, broken, {})
    assert checkpoints.steps(run) == [1]
    checkpoints.save(run, 2, broken, {}, finite=False)
    assert newest_step(run) == 1
    assert "'lora' holds NaN" in caplog.text
    found = checkpoints.newest(run, finite=False)
    assert found is not None
    assert found.step == 2


def test_retention_keeps_two_whole_ones_and_what_is_newer(run):
    save(run, 1)
    save(run, 2)
    damage(run.checkpoint_dir(2), "cut")
    save(run, 3)
    assert checkpoints.steps(run) == [1, 2, 3]
    save(run, 4)
    assert checkpoints.steps(run) == [3, 4]


@pytest.mark.parametrize("text", [b"", b"\xff\xfe", b"/etc/passwd", b"step-00000009\n", b"x" * 999])
def test_the_pointer_is_not_trusted(run, caplog, text):
    save(run, 1)
    run.checkpoint_current.write_bytes(text)
    assert newest_step(run) == 1
    assert "checkpoint/current" in caplog.text


def test_a_pointer_that_is_a_link_is_not_followed(run, caplog):
    save(run, 1)
    run.checkpoint_current.unlink()
    run.checkpoint_current.symlink_to("/etc/passwd")
    assert newest_step(run) == 1
    assert "symbolic link" in caplog.text


def test_a_run_directory_that_has_gone_is_not_made_again(run):
    save(run, 1)
    shutil.rmtree(run.path)
    with pytest.raises(RunDirError, match="no longer a run directory"):
        save(run, 2)
    assert not run.path.exists()
