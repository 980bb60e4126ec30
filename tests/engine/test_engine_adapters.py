"""Adapters on disk: the same bits whichever form they are kept in, and clear words where not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from engine_stored import NAMES, add_task, new_run, partly, random_adapter, same_bits, whole_run

from treelora_cli.engine import adapters
from treelora_cli.engine.adapters import load_adapter, load_adapters, recommit, snapshot_hash
from treelora_cli.errors import RunDirError
from treelora_cli.models.snapshot import mean_snapshot
from treelora_cli.rundir.atomic import commit_dir, write_json
from treelora_cli.rundir.manifest import verify
from treelora_cli.rundir.tensors import save_tensors


def chain(path: Path, count: int, share: float = 0.2):
    """Each task differs from the mean of the two before in a part of its entries."""
    found = [random_adapter(0)]
    references: dict[str, list[int]] = {}
    for index in range(1, count):
        members = [index - 2, index - 1][-min(index, 2) :]
        found.append(partly(mean_snapshot([found[m] for m in members]), index, share))
        references[NAMES[index]] = members
    return whole_run(path, found, **references), found


def task_json(run, index: int) -> dict:
    return json.loads((run.task_dir(index, NAMES[index]) / "task.json").read_text())


def test_a_chain_of_differences_comes_back_bit_for_bit(tmp_path) -> None:
    run, found = chain(tmp_path / "run", 6)
    for index, snapshot in enumerate(found):
        assert same_bits(load_adapter(run, index, NAMES[index]), snapshot)
        storage = task_json(run, index)["storage"]
        assert storage["form"] == ("delta" if index else "dense")
        folder = run.task_dir(index, NAMES[index])
        assert (folder / "adapter").exists() == (index == 0)
        if index:
            file = folder / "delta.safetensors"
            mean = mean_snapshot([found[m] for m in storage["reference"]])
            equal = sum(int((snapshot[key] == mean[key]).sum()) for key in mean)
            assert storage["entries_equal"] == equal
            assert storage["entries"] == sum(value.numel() for value in mean.values())
            assert storage["delta_bytes"] == file.stat().st_size < storage["dense_bytes"]
            assert storage["reference_hash"] == snapshot_hash(mean)


def test_a_long_chain_is_read_once_each(tmp_path, monkeypatch) -> None:
    """Two references a task would double the work at every link without a memo."""
    run, found = chain(tmp_path / "run", 8)
    reads: list[Path] = []
    real = adapters.load_tensors
    monkeypatch.setattr(adapters, "load_tensors", lambda path: reads.append(path) or real(path))
    asked: list[int] = []
    known = adapters.storage_of
    monkeypatch.setattr(
        adapters, "storage_of", lambda run, *place: asked.append(place[0]) or known(run, *place)
    )
    assert same_bits(load_adapter(run, 7, NAMES[7]), found[7])
    assert len(reads) == 8
    assert len(asked) <= 2 * 8
    reads.clear()
    places = [(index, NAMES[index]) for index in (6, 0, 3)]
    loaded = load_adapters(run, places)
    assert all(same_bits(one, found[i]) for one, (i, _) in zip(loaded, places, strict=True))
    assert len(reads) == 7


def test_a_difference_that_is_not_smaller_is_stored_dense(tmp_path) -> None:
    base = random_adapter(0)
    run = whole_run(tmp_path / "run", [base, partly(base, 1, 1.0)], beta=[0])
    storage = task_json(run, 1)["storage"]
    assert storage["form"] == "dense"
    assert storage["entries_equal"] == 0
    assert storage["delta_bytes"] >= storage["dense_bytes"]
    assert not (run.task_dir(1, "beta") / "delta.safetensors").exists()
    assert (run.task_dir(1, "beta") / "adapter" / "adapter_config.json").exists()


def test_form_dense_never_stores_differences(tmp_path) -> None:
    run = new_run(tmp_path / "run", 2)
    base = random_adapter(0)
    add_task(run, 0, base)
    add_task(run, 1, base, [0], form="dense")
    assert task_json(run, 1)["storage"]["form"] == "dense"
    assert (run.task_dir(1, "beta") / "adapter").is_dir()


def test_a_missing_reference_names_both_tasks(tmp_path) -> None:
    run, _ = chain(tmp_path / "run", 3)
    shutil.rmtree(run.task_dir(0, "alpha"))
    for index in (1, 2):
        stored = rf"{NAMES[index]} is stored as its difference from that of alpha, but .* missing"
        with pytest.raises(RunDirError, match=stored):
            load_adapter(run, index, NAMES[index])


def test_a_changed_reference_names_both_tasks(tmp_path) -> None:
    """Changed together with its manifest, so that only its content tells."""
    run, found = chain(tmp_path / "run", 2)
    shutil.rmtree(run.task_dir(0, "alpha"))
    add_task(run, 0, partly(found[0], 9, 0.1))
    with pytest.raises(
        RunDirError, match=r"beta .* its difference from that of alpha, which is an"
    ):
        load_adapter(run, 1, "beta")


@pytest.mark.parametrize("reference", [[1], [2], [-1], [], "0", None])
def test_a_reference_that_is_not_earlier_is_refused(tmp_path, reference) -> None:
    run, _ = chain(tmp_path / "run", 3)
    folder = run.task_dir(1, "beta")
    document = task_json(run, 1)
    document["storage"]["reference"] = reference
    write_json(folder / "task.json", document)
    with pytest.raises(RunDirError, match="reference"):
        load_adapter(run, 1, "beta")


def test_a_damaged_difference_is_refused(tmp_path) -> None:
    run, _ = chain(tmp_path / "run", 2)
    folder = run.task_dir(1, "beta")
    data = bytearray((folder / "delta.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "delta.safetensors").write_bytes(data)
    with pytest.raises(RunDirError, match=r"delta\.safetensors was changed"):
        load_adapter(run, 1, "beta")
    document = task_json(run, 1)
    with commit_dir(folder) as again:
        save_tensors(again / "delta.safetensors", {"other.values": torch.zeros(2)})
        write_json(again / "task.json", document)
    with pytest.raises(RunDirError, match=r"delta.safetensors is damaged: 'other.values'"):
        load_adapter(run, 1, "beta")


def test_committed_again_all_but_the_adapter_stays(tmp_path) -> None:
    run, found = chain(tmp_path / "run", 3)
    folder = run.task_dir(2, "gamma")
    before = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    recommit(run, 2, "gamma", found[2], {"more": 1})
    verify(folder)
    after = {path.name: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert same_bits(load_adapter(run, 2, "gamma"), found[2])
    assert set(after) == set(before) - {"delta.safetensors"} | {"adapter_model.safetensors"}
    for same in ("method.safetensors", "adapter_config.json", "alpha.latest.test.jsonl"):
        assert after[same] == before[same]
    document = task_json(run, 2)
    assert (document["more"], document["steps"]) == (1, 4)
    assert document["storage"]["form"] == "dense"
    # Answers come and go beside the manifest, before and after.
    (folder / "predictions" / "alpha.latest.test.jsonl").write_text("other\n")
    verify(folder)


def test_answers_are_copied_where_links_are_not_known(tmp_path, monkeypatch) -> None:
    run, found = chain(tmp_path / "run", 2)

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(1, "no links here")

    monkeypatch.setattr("treelora_cli.rundir.atomic.os.link", refuse)
    recommit(run, 1, "beta", found[1], {})
    kept = run.predictions((1, "beta"), "alpha", "latest", "test")
    assert kept.read_text() == "answers of beta\n"
