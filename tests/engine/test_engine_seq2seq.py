"""Whole streams on a tiny T5: trained, stopped, resumed, scored and routed like any other base."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from support import toy_arguments
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from treelora_cli.rundir import faults
from treelora_cli.rundir.events import read_events

TASKS = "alpha,beta"


class Stop(BaseException):
    """Stands for a kill inside this process."""


def results(run: Path) -> dict[str, str]:
    """Hashes of what must not depend on how the run came about."""
    files = [run / "scores.json", *run.glob("tasks/*/adapter/*"), *run.glob("tree/history/*/*")]
    files += [*run.glob("tasks/*/predictions/*"), *run.glob("tasks/*/features.safetensors")]
    return {
        str(file.relative_to(run)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(file for file in files if file.exists())
    }


@pytest.mark.parametrize("method", ["seqlora", "treelora"])
def test_stopped_and_resumed_gives_the_same_bytes(
    treelora, monkeypatch, tiny_t5: Path, toy_data: Path, tmp_path: Path, method: str
) -> None:
    """T5 has dropout of its own: the random state must come back as well."""
    more = ["--method", method, "--set", "optim.micro_batch_size=3"]
    whole, run = tmp_path / "whole", tmp_path / "run"
    outcome = treelora(*toy_arguments(tiny_t5, toy_data, whole, TASKS, *more))
    assert outcome.code == 0, outcome
    real, count, stops = faults.hit, 0, {4, 8, 11}

    def hit(point: str) -> None:
        nonlocal count
        if point == "step":
            count += 1
            if count in stops:
                raise Stop
        real(point)

    monkeypatch.setattr(faults, "hit", hit)
    for _ in stops:
        with pytest.raises(Stop):
            treelora(*toy_arguments(tiny_t5, toy_data, run, TASKS, *more))
    outcome = treelora(*toy_arguments(tiny_t5, toy_data, run, TASKS, *more))
    assert outcome.code == 0, outcome
    assert count > 12
    assert results(run) == results(whole)
    assert len(results(run)) > 8
    losses = [event["loss"] for event in read_events(whole / "events.jsonl") if "loss" in event]
    assert losses[5] < losses[0], "it learns"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_t5: Path, toy_data: Path) -> Path:
    """A run scored by likelihood where there are labels."""
    from support import run_command

    run = tmp_path_factory.mktemp("t5-run") / "run"
    scored = ["--method", "treelora", "--set", "eval.scoring=likelihood"]
    done = run_command(*toy_arguments(tiny_t5, toy_data, run, "alpha,beta,gamma", *scored))
    assert done.returncode == 0, done.stderr
    return run


def test_the_adapter_answers_with_plain_peft(finished: Path, tiny_t5: Path) -> None:
    """What is stored loads beside the base with PEFT alone, and gives the answers on record."""
    folder = finished / "tasks" / "002-gamma"
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["task_type"] == "SEQ_2_SEQ_LM"
    base = AutoModelForSeq2SeqLM.from_pretrained(tiny_t5)
    model = PeftModel.from_pretrained(base, folder / "adapter").eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_t5)
    (file,) = [path for path in folder.glob("predictions/*") if "gamma" in path.name]
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(lines) == 6
    for line in lines:
        ids = tokenizer(line["prompt"], return_tensors="pt").input_ids[:, -97:]
        losses = {}
        for label in ("红", "蓝"):
            labels = tokenizer(label, return_tensors="pt").input_ids
            with torch.no_grad():
                losses[label] = float(model(input_ids=ids, labels=labels).loss) * labels.numel()
        assert line["prediction"] == min(losses, key=lambda label: losses[label])


@pytest.mark.parametrize("scoring", ["greedy", "likelihood"])
def test_scored_again_and_routed(treelora, finished: Path, scoring: str) -> None:
    for adapter in ("own", "latest", "route", "task:beta"):
        outcome = treelora("eval", finished, "--adapter", adapter, "--scoring", scoring, "--json")
        assert outcome.code == 0, outcome
        cells = json.loads(outcome.out)["cells"]
        assert {cell["task"] for cell in cells} == {"alpha", "beta", "gamma"}
        assert {cell["decoding"] for cell in cells} == {scoring}


def test_report_tree_and_export(treelora, finished: Path, tmp_path: Path) -> None:
    assert treelora("tree", "show", finished).code == 0
    assert treelora("report", finished, "--json").code == 0
    outcome = treelora("export", finished, "--all", "--out", tmp_path / "out")
    assert outcome.code == 0, outcome
    assert len(list((tmp_path / "out").rglob("adapter_model.safetensors"))) == 3


def test_dry_run_counts_both_sides(treelora, tiny_t5: Path, toy_data: Path, tmp_path: Path) -> None:
    arguments = toy_arguments(tiny_t5, toy_data, tmp_path / "run", TASKS, "--dry-run", "--json")
    outcome = treelora(*arguments)
    assert outcome.code == 0, outcome
    document = json.loads(outcome.out)
    # q and v of two encoder layers, and of the decoder's two own and two crossed attentions.
    assert document["trainable_parameters"] == 6 * 2 * 2 * 4 * 32
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_is_refused_in_one_line(
    treelora, tiny_t5: Path, toy_data: Path, tmp_path: Path
) -> None:
    for setting in ("optim.packing=true", "data.format=chat"):
        arguments = toy_arguments(tiny_t5, toy_data, tmp_path / "run", TASKS, "--set", setting)
        outcome = treelora(*arguments)
        assert outcome.code == 2, outcome
        assert "encoder-decoder" in outcome.err and "Traceback" not in outcome.err
        assert not (tmp_path / "run").exists()
