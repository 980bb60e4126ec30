"""Runs that answer with more than LoRA: stored, scored again, exported, planned, refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support import make_checkpoint, toy_arguments, toy_rows, write_task
from transformers import AutoModelForCausalLM

from treelora_cli.engine.adapters import WEIGHTS_FILE, load_adapter
from treelora_cli.engine.opening import start_method
from treelora_cli.methods.base import build_method
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.snapshot import WEIGHTS, lora_of
from treelora_cli.recipe import LoraSection, MethodSection, ModelSection, Recipe
from treelora_cli.rundir.layout import RunDir

TASKS = ("alpha", "beta", "gamma")
FAST = ["--set", "optim.lr=0.1", "--epochs", "1", "--set", "eval.before=false"]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, tasks and a finished seqft run over them, moved far enough to answer otherwise."""
    folder = tmp_path_factory.mktemp("more")
    make_checkpoint(folder / "model")
    for kind, name in enumerate(TASKS):
        rows = {
            "train": toy_rows(kind, 12),
            "eval": toy_rows(kind, 4, 12),
            "test": toy_rows(kind, 3, 16),
        }
        write_task(folder / "data", name, rows)
    return folder


@pytest.fixture
def run(treelora, place: Path) -> Path:
    if not (place / "run").exists():
        outcome = treelora(*arguments(place, place / "run"))
        assert outcome.code == 0, outcome
    return place / "run"


def arguments(place: Path, run: Path, *more: str, method: str = "seqft") -> list[str]:
    asked = ",".join(TASKS)
    head = toy_arguments(place / "model", place / "data", run, asked, "--method", method)
    return [*head, *FAST, *more]


def folder_of(run: Path, name: str) -> Path:
    return run / "tasks" / f"{TASKS.index(name):03d}-{name}"


def said(file: Path) -> list[str]:
    return [json.loads(line)["prediction"] for line in file.read_text().splitlines()]


def test_each_task_stores_its_weights(run: Path, place: Path) -> None:
    bare = AutoModelForCausalLM.from_pretrained(place / "model")
    found = [load_file(folder_of(run, name) / WEIGHTS_FILE) for name in TASKS]
    for weights in found:
        assert weights.keys() == {WEIGHTS + name for name, _ in bare.named_parameters()}
    keys = list(found[0])
    assert all(not torch.equal(found[0][key], found[1][key]) for key in keys)
    document = json.loads((folder_of(run, "beta") / "task.json").read_text())
    assert document["answers_with"] == ["adapter", WEIGHTS_FILE]
    assert document["trainable_parameters"] == sum(p.numel() for p in bare.parameters())


def test_zero_shot_and_features_are_of_the_base_as_it_came(
    treelora, run: Path, place: Path, tmp_path: Path
) -> None:
    """In the second and third task the weights have moved; what the base says has not."""
    other = tmp_path / "seqlora"
    assert treelora(*arguments(place, other, method="seqlora")).code == 0
    for name in TASKS:
        base = [next((one / "predictions").glob(f"{name}*")) for one in (run, other)]
        assert said(base[0]) == said(base[1])
        features = [folder_of(one, name) / "features.safetensors" for one in (run, other)]
        assert features[0].read_bytes() == features[1].read_bytes()
    trained = next((folder_of(run, "gamma") / "predictions").glob("gamma*"))
    assert said(trained) != said(next((run / "predictions").glob("gamma*")))


@pytest.mark.parametrize("adapter", ["latest", "own", "task:alpha", "task:beta"])
def test_a_run_is_scored_again_by_whose_weights_are_asked_for(
    treelora, run: Path, tmp_path: Path, adapter: str
) -> None:
    again = tmp_path / "again"
    shutil.copytree(run, again)
    (again / "scores.json").unlink()
    for folder in again.glob("tasks/*/predictions"):
        shutil.rmtree(folder)
    outcome = treelora("eval", again, "--adapter", adapter)
    assert outcome.code == 0, outcome
    cells = json.loads((again / "scores.json").read_text())["cells"]
    known = {
        (cell["after"], cell["task"]): cell
        for cell in json.loads((run / "scores.json").read_text())["cells"]
    }
    assert len(cells) == len(TASKS)
    for cell in cells:
        answering = {"latest": "gamma", "own": cell["task"]}.get(adapter, adapter[5:])
        assert cell["after"] == answering
        mine = next((folder_of(again, answering) / "predictions").glob(f"{cell['task']}*"))
        if (answering, cell["task"]) in known:
            theirs = known[answering, cell["task"]]
            assert (cell["score"], cell["adapter_hash"]) == (
                theirs["score"],
                theirs["adapter_hash"],
            )
            first = next((folder_of(run, answering) / "predictions").glob(f"{cell['task']}*"))
            assert said(mine) == said(first)


def test_the_hash_of_what_answers_counts_the_weights(run: Path) -> None:
    cells = json.loads((run / "scores.json").read_text())["cells"]
    hashes = {cell["after"]: cell["adapter_hash"] for cell in cells}
    assert len(set(hashes.values())) == 1 + len(TASKS)
    adapters = [lora_of(load_adapter(RunDir.open(run), n, name)) for n, name in enumerate(TASKS)]
    assert all(torch.equal(adapters[0][key], one[key]) for one in adapters for key in one)


def test_weights_that_are_missing_or_changed_are_noticed(
    treelora, run: Path, tmp_path: Path
) -> None:
    for number, damage in enumerate((Path.unlink, change)):
        broken = tmp_path / str(number)
        shutil.copytree(run, broken)
        damage(folder_of(broken, "beta") / WEIGHTS_FILE)
        outcome = treelora("eval", broken, "--adapter", "task:beta", "--split", "eval")
        assert outcome.code == 4, outcome
        assert WEIGHTS_FILE in outcome.err
        assert treelora("eval", broken, "--adapter", "latest", "--split", "eval").code == 0


def change(file: Path) -> None:
    weights = load_file(file)
    next(iter(weights.values())).add_(1)
    save_file(weights, file)


def test_an_exported_folder_and_the_weights_beside_it_are_the_model(
    treelora, run: Path, place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = treelora("export", run, "--task", "beta", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome
    assert f"what else was trained is in {WEIGHTS_FILE}" in caplog.text
    folder = tmp_path / "out" / "beta"
    assert (folder / WEIGHTS_FILE).is_file()
    base = AutoModelForCausalLM.from_pretrained(place / "model")
    weights = {
        key.removeprefix(WEIGHTS): value for key, value in load_file(folder / WEIGHTS_FILE).items()
    }
    assert not base.load_state_dict(weights, strict=False).unexpected_keys
    loaded = PeftModel.from_pretrained(base, folder)
    recipe = Recipe(lora=LoraSection(rank=4), method=MethodSection(name="seqft"))
    backbone = load_backbone(ModelSection(name=str(place / "model"), device="cpu"))
    model = AdaptedModel(backbone, recipe.lora, 0)
    start_method(build_method(recipe), recipe, model)
    model.restore(load_adapter(RunDir.open(run), 1, "beta"))
    ids = torch.tensor([[5, 9, 30, 7, 200, 11]])
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model.peft(input_ids=ids).logits)
    assert treelora("export", run, "--task", "beta", "--out", tmp_path / "out").code == 2


def test_a_plan_counts_what_is_trained_and_stored(treelora, run: Path, place: Path) -> None:
    fresh = arguments(place, place / "fresh", "--dry-run", "--json")
    plan = json.loads(treelora(*fresh).out)
    entries = sum(
        p.numel() for p in AutoModelForCausalLM.from_pretrained(place / "model").parameters()
    )
    assert plan["parameters"] == plan["trainable_parameters"] == entries
    assert plan["memory_bytes"] > 16 * entries
    folders = [folder_of(run, name) for name in TASKS]
    kept = [
        file.stat().st_size
        for folder in folders
        for file in (folder / WEIGHTS_FILE, folder / "adapter" / "adapter_model.safetensors")
    ]
    checkpoints = 2 * 12 * entries
    headers = 6 * 8192
    assert 0 <= sum(kept) + checkpoints - plan["disk_bytes"] + 8192 < headers
    lora = json.loads(
        treelora(*arguments(place, place / "fresh", "--dry-run", "--json", method="seqlora")).out
    )
    assert lora["disk_bytes"] < plan["disk_bytes"] / 5
    more = plan["memory_bytes"] - lora["memory_bytes"]
    assert more == 12 * (entries - lora["trainable_parameters"])
    done = json.loads(treelora(*arguments(place, run, "--dry-run", "--json")).out)
    assert done["disk_bytes"] < plan["disk_bytes"] - sum(kept) + headers


def test_a_sum_grows_in_a_plan(treelora, place: Path) -> None:
    plans = {
        name: json.loads(
            treelora(*arguments(place, place / "fresh", "--dry-run", "--json", method=name)).out
        )
        for name in ("inclora", "seqlora")
    }
    one = 4 * plans["seqlora"]["trainable_parameters"]
    assert plans["inclora"]["disk_bytes"] - plans["seqlora"]["disk_bytes"] == (1 + 2) * one


def test_what_more_than_lora_cannot_do_is_refused(treelora, run: Path, place: Path) -> None:
    outcome = treelora("eval", run, "--adapter", "route")
    assert outcome.code == 2, outcome
    assert "seqft answers with more than LoRA" in outcome.err
    outcome = treelora(*arguments(place, place / "fresh", "--set", "storage.max_adapters=2"))
    assert outcome.code == 2, outcome
    assert not (place / "fresh").exists()
