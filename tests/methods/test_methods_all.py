"""What holds for every method: it acts on a second task, resumes exactly, and is no other one."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from support import toy_arguments

from treelora_cli.methods import registry
from treelora_cli.methods.base import EFFECT
from treelora_cli.rundir import faults
from treelora_cli.rundir.events import read_events

NAMES = sorted(registry().names())
TASKS = "alpha,beta"
# What a stream of six steps a task needs so that a method has something to do in it.
SETTINGS: dict[str, list[str]] = {
    # At 1e-3 both tasks still learn the same: to answer at all. Nothing conflicts.
    "gem": ["optim.lr=5e-3"],
    "agem": ["optim.lr=5e-3"],
    # Every single answer takes that many steps on that many rows.
    "mbpa": ["method.steps=2", "method.neighbours=4"],
}


class Stop(BaseException):
    """Stands for a kill inside this process."""


def arguments(name: str, model: Path, data: Path, run: Path) -> list[str]:
    sets = [part for pair in SETTINGS.get(name, []) for part in ("--set", pair)]
    return toy_arguments(model, data, run, TASKS, "--method", name, *sets)


def left_behind(run: Path) -> dict[str, str]:
    """Hashes of everything that must not depend on how a run came about."""
    files = [run / "scores.json", *run.glob("tasks/*/predictions/*"), *run.glob("tree/history/*/*")]
    files += [*run.glob("tasks/*/adapter/*"), *run.glob("tasks/*/*.safetensors")]
    assert files
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(files)
        if file.exists()
    }


def weights_of(run: Path) -> str:
    """One hash of what the last task left: its adapter and what belongs to it."""
    folder = sorted(run.glob("tasks/*"))[-1]
    files = [folder / "adapter" / "adapter_model.safetensors", folder / "weights.safetensors"]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes() if file.exists() else b"-")
    return digest.hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_every_method(
    treelora, monkeypatch, tmp_path_factory, tiny_model, toy_data, tmp_path, name: str
) -> None:
    whole = tmp_path / "whole"
    done = treelora(*arguments(name, tiny_model, toy_data, whole))
    assert done.code == 0, done
    acts_on_the_second_task(name, whole)
    is_not_another_method(name, whole, tmp_path_factory.getbasetemp().parent / "weights")
    scored_again_from_disk(treelora, name, whole, tmp_path / "again")

    run = tmp_path / "run"
    stop_at = {3, 9}  # in the middle of the first task and of the second
    real, count = faults.hit, 0

    def hit(point: str) -> None:
        nonlocal count
        if point == "step":
            count += 1
            if count in stop_at:
                raise Stop
        real(point)

    monkeypatch.setattr(faults, "hit", hit)
    for _ in range(3):
        try:
            assert treelora(*arguments(name, tiny_model, toy_data, run)).code == 0
            break
        except Stop:
            continue
    assert not registry().get(name).trains or count > 9
    assert left_behind(run) == left_behind(whole)


def acts_on_the_second_task(name: str, run: Path) -> None:
    """A penalty or an effect above zero, where the method says that it has one."""
    if not registry().get(name).needs & {"penalty", "gradients"}:
        return
    steps = [
        event
        for event in read_events(run / "events.jsonl")
        if event["kind"] == "step" and event["task"] == "beta"
    ]
    acted = [event.get("penalty") or event.get(EFFECT) or 0 for event in steps]
    # A readback is a list of numbers, whether of one or of several.
    sizes = [abs(x) for found in acted for x in (found if isinstance(found, list) else [found])]
    assert max(sizes) > 0, steps


def is_not_another_method(name: str, run: Path, shared: Path) -> None:
    """Whichever of two equal methods comes later finds the other's hash, in whatever process."""
    shared.mkdir(exist_ok=True)
    mine = weights_of(run)
    (shared / name).write_text(mine, encoding="ascii")
    others = {file.name: file.read_text(encoding="ascii") for file in shared.iterdir()}
    same = [other for other, found in others.items() if found == mine and other != name]
    assert not same, f"{name} leaves the same bytes as {same}"


def scored_again_from_disk(treelora, name: str, run: Path, again: Path) -> None:
    """A fresh process that has only the run directory answers as the stream did."""
    mode = json.loads((run / "run.json").read_text(encoding="utf-8"))["mode"]
    adapter = {"joint": "latest"}.get(mode, mode)
    shutil.copytree(run, again)
    before = json.loads((again / "scores.json").read_text(encoding="utf-8"))
    (again / "scores.json").unlink()
    outcome = treelora("eval", again, "--adapter", adapter)
    assert outcome.code == 0, outcome
    after = json.loads((again / "scores.json").read_text(encoding="utf-8"))
    key = ("after", "task", "adapter", "score", "adapter_hash")
    known = [{k: cell[k] for k in key} for cell in before["cells"]]
    found = [{k: cell[k] for k in key} for cell in after["cells"]]
    assert found
    assert all(cell in known for cell in found), (found, known)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_method_on_an_encoder_decoder(treelora, tiny_t5, toy_data, tmp_path, name) -> None:
    """It trains, acts and answers from disk there too, or refuses in one line."""
    run = tmp_path / "run"
    more = ["--set", "lora.targets=[q,v]"] if name == "treelora-official" else []
    outcome = treelora(*arguments(name, tiny_t5, toy_data, run), *more)
    if outcome.code == 2:
        assert "error:" in outcome.err
        assert not run.exists()
        return
    assert outcome.code == 0, outcome
    acts_on_the_second_task(name, run)
    scored_again_from_disk(treelora, name, run, tmp_path / "again")


@pytest.mark.parametrize("name", ["l2p", "dualprompt", "sapt"])
def test_packed_rows_have_no_prompts_of_their_own(
    treelora, tiny_model, toy_data, tmp_path, name
) -> None:
    run = tmp_path / "run"
    packed = ["--set", "optim.packing=true"]
    outcome = treelora(*arguments(name, tiny_model, toy_data, run), *packed)
    assert outcome.code == 2
    assert "optim.packing" in outcome.err
    assert not run.exists()
