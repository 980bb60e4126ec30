"""The sum of adapters: what a task starts from, what answers after it, what a run can be asked."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from sums_support import learn, move, start, task
from support import TOY_SETTINGS, toy_arguments
from transformers import AutoModelForCausalLM

from treelora_cli.engine.plan import resolve_recipe
from treelora_cli.engine.stream import run_stream
from treelora_cli.methods.base import StreamContext
from treelora_cli.methods.inclora import IncLora
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.snapshot import rank_of
from treelora_cli.rundir.tensors import load_tensors

TASKS = ("alpha", "beta", "gamma")


def test_every_task_starts_from_a_drawn_anew_and_b_zero(tiny_model: Path) -> None:
    method = start(IncLora, tiny_model)
    starts = []
    for index in range(3):
        method.begin_task(task(index))
        starts.append(method.model.snapshot())
        method.begin_task(task(index))
        again = method.model.snapshot()
        assert all(again[key].equal(starts[-1][key]) for key in again)
        learn(method, index)
    for key, value in starts[0].items():
        if ".lora_B." in key:
            assert not any(one[key].any() for one in starts)
        else:
            assert not value.equal(starts[1][key])
            assert not starts[1][key].equal(starts[2][key])


def test_the_sum_of_all_tasks_is_frozen_under_the_live_adapter(tiny_model: Path) -> None:
    method = start(IncLora, tiny_model)
    assert method.model.past is None
    owns = []
    for index in range(3):
        stored, own = learn(method, index)
        owns.append(own)
        past = method.model.past
        assert past is not None
        assert rank_of(past) == 3 * (index + 1)
        for key in own:
            dim = 0 if ".lora_A." in key else 1
            assert past[key].equal(torch.cat([one[key] for one in owns], dim))
            assert stored.adapter()[key].equal(past[key])
        assert not any(value.any() for key, value in method.model.snapshot().items() if "B" in key)
    assert [pair.A.shape[0] for pair in method.past] == [6] * len(method.live)
    assert all(a.module == b.module for a, b in zip(method.past, method.live, strict=True))


def test_a_method_that_only_started_answers_as_the_stream_did(tiny_model: Path) -> None:
    method = start(IncLora, tiny_model)
    ids = torch.tensor([[5, 9, 40, 7, 11]])
    stored = [learn(method, index)[0] for index in range(2)]
    said = method.model.peft(input_ids=ids).logits
    fresh = start(IncLora, tiny_model)
    fresh.install(stored)
    torch.testing.assert_close(fresh.model.peft(input_ids=ids).logits, said, rtol=0, atol=0)
    fresh.install(stored[:1])
    assert not fresh.model.peft(input_ids=ids).logits.equal(said)


class WithPart(IncLora):
    """Trains a parameter of its own beside the sum."""

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        super().start(stream, model)
        self.part = model.add_part("own", torch.zeros(4))


def test_what_is_trained_beside_the_sum_is_the_last_tasks(tiny_model: Path) -> None:
    method = start(WithPart, tiny_model)
    stored = []
    for index in range(2):
        with torch.no_grad():
            method.part += index + 1
        stored.append(learn(method, index)[0])
    fresh = start(WithPart, tiny_model)
    for count, expected in ((2, 3.0), (1, 1.0)):
        fresh.install(stored[:count])
        assert fresh.part.tolist() == [expected] * 4
        assert fresh.model.past is not None
        assert rank_of(fresh.model.past) == 3 * count
        assert "part.own" not in fresh.model.past
        move(fresh.model, 9)


@pytest.fixture(scope="module")
def trained(tiny_model: Path, toy_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose adapters say different things."""
    run = tmp_path_factory.mktemp("sums") / "run"
    flags = {
        "model": {"name": str(tiny_model)},
        "data": {"path": str(toy_data)},
        "stream": {"tasks": list(TASKS)},
        "method": {"name": "inclora"},
    }
    recipe = resolve_recipe(run, None, [*TOY_SETTINGS, "optim.lr=0.03"], flags)
    run_stream(recipe, run, lambda event: None)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def said(run: Path, after: str, name: str, adapter: str) -> list[dict]:
    (folder,) = run.glob(f"tasks/*-{after}")
    file = folder / "predictions" / f"{name}.{adapter.replace(':', '=')}.test.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def predictions(rows: list[dict]) -> list[str]:
    return [row["prediction"] for row in rows]


def test_every_way_to_ask_a_sum_run_says_what_the_stream_said(treelora, run: Path) -> None:
    """The stream answered by the sum under the live adapter; asked by name, it stands beside it."""
    streamed = {
        (after, name): predictions(said(run, after, name, "latest"))
        for number, after in enumerate(TASKS)
        for name in TASKS[: number + 1]
    }
    assert streamed["alpha", "alpha"] != streamed["beta", "alpha"] != streamed["gamma", "alpha"]
    by_each = {}
    for adapter in ("latest", "own", *(f"task:{name}" for name in TASKS), "route"):
        # Otherwise what the stream said would be taken over, not said again.
        (run / "scores.json").unlink()
        outcome = treelora("eval", run, "--adapter", adapter)
        assert outcome.code == 0, outcome
        for name in TASKS:
            after = {"own": name, "latest": "gamma", "route": "gamma"}.get(adapter, adapter[5:])
            rows = said(run, after, name, adapter)
            if adapter == "route":
                expected = [by_each[f"task:{row['routed']}", name][row["row"]] for row in rows]
                assert predictions(rows) == expected
                continue
            by_each[adapter, name] = predictions(rows)
            if (after, name) in streamed:
                assert by_each[adapter, name] == streamed[after, name]
    assert by_each["task:alpha", "gamma"] != by_each["task:gamma", "gamma"]


def test_an_exported_sum_needs_peft_alone(treelora, run: Path, tiny_model: Path, tmp_path) -> None:
    assert treelora("export", run, "--all", "--out", tmp_path / "out").code == 0
    method = start(IncLora, tiny_model, rank=4, alpha=32)
    ids = torch.tensor([[5, 9, 40, 7, 11]])
    for number, name in enumerate(TASKS, start=1):
        base = AutoModelForCausalLM.from_pretrained(tiny_model)
        plain = PeftModel.from_pretrained(base, tmp_path / "out" / name).eval()
        config = plain.peft_config["default"]
        assert (config.r, config.lora_alpha) == (4 * number, 32 * number)
        folder = run / "tasks" / f"{number - 1:03d}-{name}" / "adapter"
        method.model.stand_on(load_tensors(folder / "adapter_model.safetensors"))
        expected = method.model.peft(input_ids=ids).logits
        torch.testing.assert_close(plain(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_sums_of_different_ranks_are_not_merged(
    treelora, run: Path, tiny_model: Path, toy_data: Path, tmp_path: Path
) -> None:
    for way in (["--to", "2"], ["--curve"]):
        refused = treelora("merge", run, *way)
        assert refused.code == 2
        assert "inclora does not answer with one adapter of a fixed rank" in refused.err
    budget = ["--method", "inclora", "--set", "storage.max_adapters=2"]
    refused = treelora(*toy_arguments(tiny_model, toy_data, tmp_path / "new", "alpha", *budget))
    assert refused.code == 2
    assert "inclora answers with an adapter whose rank grows" in refused.err
    assert not (tmp_path / "new").exists()
