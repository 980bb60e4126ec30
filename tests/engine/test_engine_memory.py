"""Memory: foreseen before loading, explained when it runs out, and never a reason to lose a run."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import toy_arguments

from treelora_cli.engine import memory, shortage
from treelora_cli.engine.memory import free_memory, longest_row, pass_rows, sharers, training_need
from treelora_cli.engine.opening import load_stream_tasks
from treelora_cli.engine.shortage import advice, explaining_shortage, foresee, training_hint
from treelora_cli.engine.world import noticing
from treelora_cli.errors import EnvironmentProblem
from treelora_cli.methods.base import build_method
from treelora_cli.models import backbone as loading
from treelora_cli.models.encode import encoder_for
from treelora_cli.recipe import ProcessesSection, Recipe, build_recipe, differences
from treelora_cli.rundir import faults

GPU_IS_FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
HOST_IS_FULL = RuntimeError("[enforce fail at alloc_cpu.cpp:1] . DefaultCPUAllocator: can't "
                            "allocate memory: you tried to allocate 99 bytes.")  # fmt: skip


def results(run: Path) -> dict[str, bytes]:
    """What a run found out: adapters and scores."""
    names = ("adapter_model.safetensors", "scores.json")
    return {
        str(path.relative_to(run)): path.read_bytes()
        for path in sorted(run.rglob("*"))
        if path.name in names
    }


def fail_at(monkeypatch: pytest.MonkeyPatch, point: str, at: int, error: BaseException) -> None:
    """Raise once, when a point has been passed so often."""
    real, seen = faults.hit, 0

    def hit(where: str) -> None:
        nonlocal seen
        seen += where == point
        if where == point and seen == at:
            raise error
        real(where)

    monkeypatch.setattr(faults, "hit", hit)


def recipe_of(model: Path, data: Path, **optim: object) -> Recipe:
    return build_recipe(
        {
            "model": {"name": str(model), "device": "cpu"},
            "data": {"path": str(data), "max_prompt_tokens": 96, "max_answer_tokens": 8},
            "stream": {"tasks": ["alpha"]},
            "method": {"name": "seqlora"},
            "optim": {"batch_size": 12} | optim,
        },
        "test",
    )


def forecast_of(recipe: Recipe) -> shortage.Forecast:
    found = foresee(recipe, build_method(recipe), load_stream_tasks(recipe, ["alpha"]))
    assert found is not None
    return found


def test_out_of_memory_in_a_step_is_explained_and_resumed(
    treelora, monkeypatch, tiny_model: Path, toy_data: Path, tmp_path: Path
) -> None:
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert treelora(*toy_arguments(tiny_model, toy_data, whole, "alpha,beta")).code == 0
    with monkeypatch.context() as patch:
        fail_at(patch, "step", 10, GPU_IS_FULL)
        outcome = treelora(*toy_arguments(tiny_model, toy_data, run, "alpha,beta"))
    assert outcome.code == 6, outcome
    assert "ran out of memory while training task beta" in outcome.err
    hint = next(line for line in outcome.err.splitlines() if line.startswith("hint"))
    assert len(re.findall(r"--set \w+\.\w+=\w+", hint)) == 3, hint
    assert "optim.gradient_checkpointing=true" in hint
    assert json.loads((run / "run.json").read_text())["status"] == "failed"
    assert treelora("train-stream", "--run-dir", run).code == 0
    assert results(run) == results(whole)


def test_a_run_goes_on_with_what_spares_memory(
    treelora, monkeypatch, tiny_model: Path, toy_data: Path, tmp_path: Path
) -> None:
    """Layers computed again change no bit; smaller passes change nothing but rounding."""
    whole, run = tmp_path / "whole", tmp_path / "run"
    assert treelora(*toy_arguments(tiny_model, toy_data, whole, "alpha")).code == 0
    with monkeypatch.context() as patch:
        fail_at(patch, "step", 4, GPU_IS_FULL)
        assert treelora(*toy_arguments(tiny_model, toy_data, run, "alpha")).code == 6
    more = ["--set", "optim.gradient_checkpointing=true"]
    assert treelora("train-stream", "--run-dir", run, *more).code == 0
    assert results(run) == results(whole)
    smaller = ["--set", "optim.micro_batch_tokens=40", "--set", "optim.micro_batch_size=1"]
    assert treelora("train-stream", "--run-dir", run, "--tasks", "beta", *smaller).code == 0
    refused = treelora("train-stream", "--run-dir", run, "--set", "optim.batch_size=2")
    assert refused.code == 2


def test_out_of_memory_while_answering(
    treelora, monkeypatch, tiny_model: Path, toy_data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        fail_at(patch, "eval.batch", 2, GPU_IS_FULL)
        outcome = treelora(*toy_arguments(tiny_model, toy_data, run, "alpha"))
    assert outcome.code == 6
    assert "while answering" in outcome.err
    assert "eval.batch_size=1," in outcome.err and "eval.batch_tokens=8192" in outcome.err
    assert treelora("train-stream", "--run-dir", run, "--set", "eval.batch_size=1").code == 0
    (run / "scores.json").unlink()
    fail_at(monkeypatch, "eval.batch", 1, HOST_IS_FULL)
    outcome = treelora("eval", run, "--adapter", "own")
    assert outcome.code == 6 and "--batch-size" in outcome.err


def test_out_of_memory_while_loading(
    treelora, monkeypatch, tiny_model: Path, toy_data: Path, tmp_path: Path
) -> None:
    def full(*arguments: object) -> object:
        raise GPU_IS_FULL

    monkeypatch.setattr(loading, "_load_model", full)
    outcome = treelora(*toy_arguments(tiny_model, toy_data, tmp_path / "run", "alpha"))
    assert outcome.code == 6
    assert "the GPU ran out of memory while loading the model" in outcome.err
    assert not (tmp_path / "run").exists()


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="shapes"), explaining_shortage("testing", str):
        raise RuntimeError("shapes differ")
    with pytest.raises(torch.OutOfMemoryError), noticing():
        raise GPU_IS_FULL
    for error in (HOST_IS_FULL, MemoryError()):
        with (
            pytest.raises(EnvironmentProblem, match="the machine ran out"),
            explaining_shortage("testing", str),
        ):
            raise error


def test_it_is_foreseen_and_said_before_loading(
    treelora, monkeypatch, caplog, tiny_model: Path, toy_data: Path, tmp_path: Path
) -> None:
    arguments = toy_arguments(tiny_model, toy_data, tmp_path / "run", "alpha", "--epochs", "1")
    need = json.loads(treelora(*arguments, "--dry-run", "--json").out)["memory_bytes"]
    monkeypatch.setattr(shortage, "free_memory", lambda device: need)
    assert treelora(*arguments).code == 0
    assert not any("training will take" in message for message in caplog.messages)
    monkeypatch.setattr(shortage, "free_memory", lambda device: need - 1)
    assert treelora(*arguments, "--tasks", "alpha,beta").code == 0, "a warning refuses nothing"
    (warning,) = (record for record in caplog.records if "training will take" in record.message)
    assert warning.levelname == "WARNING"
    assert "any one of these fits: --set optim.gradient_checkpointing=true" in warning.message


def test_settings_are_halved_until_they_fit(tiny_model: Path, toy_data: Path) -> None:
    found = forecast_of(recipe_of(tiny_model, toy_data))
    sizes, longest = found.sizes, found.longest
    whole = training_need(sizes, found.recipe, longest)
    room = whole.state + (whole.total - whole.state) // 3
    texts = {one.text: one for one in found.settings(room)}
    passes = next(one for text, one in texts.items() if text.startswith("optim.micro_batch_tokens"))
    tokens = int(passes.text.partition("=")[2])
    assert tokens == 12 * longest // 4, "halved twice, for a third is left"
    assert passes.total <= room and not passes.anew

    def needed(tokens: int) -> int:
        recipe = recipe_of(tiny_model, toy_data, micro_batch_tokens=tokens)
        return training_need(sizes, recipe, longest).total

    assert needed(tokens) == passes.total
    assert needed(2 * tokens) > room
    # Nothing fits below the weights: every number goes as far down as it can.
    least = {one.text for one in found.settings(0)}
    assert f"optim.micro_batch_tokens={longest}" in least
    assert "model.dtype=bfloat16" in least
    spared = forecast_of(recipe_of(tiny_model, toy_data, gradient_checkpointing=True))
    assert not any("checkpointing" in one.text for one in spared.settings(0))


def test_what_fits_alone_comes_first(tiny_model: Path, toy_data: Path) -> None:
    found = forecast_of(recipe_of(tiny_model, toy_data))
    again = next(one for one in found.settings(None) if "checkpointing" in one.text)
    assert found.settings(again.total)[0] == again
    first = found.settings(again.total - 1)[0]
    assert first.text.startswith("optim.micro_batch_tokens") and first.total < again.total


def test_shorter_prompts_make_shorter_rows(tiny_model: Path, toy_data: Path) -> None:
    recipe = recipe_of(tiny_model, toy_data, gradient_checkpointing=True)
    data = recipe.data.model_copy(update={"max_prompt_tokens": 192})
    sizes = forecast_of(recipe).sizes
    found = shortage.Forecast(sizes, recipe.model_copy(update={"data": data}), 200)
    *_, shorter = found.settings(0)
    assert shorter.text == "data.max_prompt_tokens=64" and shorter.anew
    # An answer of 8 tokens, and one more at either end.
    assert shorter.total == training_need(sizes, found.recipe, 64 + 8 + 2).total


def test_a_pass_has_one_row_at_least(tiny_model: Path, toy_data: Path) -> None:
    found = forecast_of(recipe_of(tiny_model, toy_data, micro_batch_tokens=20))
    rows = [pass_rows(found.sizes, found.recipe, longest) for longest in (5, 20, 21)]
    assert rows == [4, 1, 1]


def test_what_has_just_run_out_fits_half_at_most(
    tiny_model: Path, toy_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever seems free: beside the weights, half of what the estimate said."""
    monkeypatch.setattr(shortage, "advice", lambda settings, room: str(room))
    monkeypatch.setattr(shortage, "own_memory", lambda device: 1000)
    recipe = recipe_of(tiny_model, toy_data)
    found = forecast_of(recipe)
    need = training_need(found.sizes, recipe, found.longest)
    half = need.state + (need.total - need.state) // 2
    tasks = load_stream_tasks(recipe, ["alpha"])
    for free, room in ((None, half), (10 * need.total, half), (500, 1500)):
        monkeypatch.setattr(shortage, "free_memory", lambda device, free=free: free)
        assert training_hint(recipe, build_method(recipe), tasks) == str(room)


def test_the_longest_row_is_found_among_the_longest_texts(
    tiny_model: Path, toy_data: Path, monkeypatch
) -> None:
    recipe = recipe_of(tiny_model, toy_data)
    tasks = load_stream_tasks(recipe, ["alpha", "beta"])
    found = forecast_of(recipe)
    encoder = encoder_for(found.sizes.tokenizer, recipe.data, None)
    rows = [(task, row) for task in tasks for row in task.splits["train"]]
    every = [len(encoder.example(r.prompt, r.answer, t.separator).tokens) for t, r in rows]
    assert longest_row(tasks, encoder) == max(every)
    monkeypatch.setattr(memory, "LOOKED_AT", 3)
    assert longest_row(tasks, encoder) == max(every)


def test_what_is_free(tmp_path: Path) -> None:
    free = free_memory("cpu")
    assert free is None or free > 1 << 20
    for name, text in {"max": "1000", "current": "700", "stat": "anon 5\ninactive_file 50"}.items():
        (tmp_path / f"memory.{name}").write_text(text + "\n")
    assert memory._container_room(tmp_path) == 350
    (tmp_path / "memory.max").write_text("max\n")
    assert memory._container_room(tmp_path) is None


def test_processes_on_one_host_share_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_available", lambda: 900)
    monkeypatch.setattr(memory, "_container_room", lambda: None)
    assert (free_memory("cpu"), sharers("cpu")) == (900, 1)
    monkeypatch.setenv("LOCAL_SIZE", "2")  # deepspeed's launcher
    assert (free_memory("cpu"), sharers("cpu")) == (450, 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")  # torchrun, --nproc
    assert (free_memory("cpu"), sharers("cpu")) == (300, 3)
    assert sharers("cuda:1") == 1, "each has a GPU of its own"


def test_a_forecast_of_several_processes(
    tiny_model: Path, toy_data: Path, monkeypatch: pytest.MonkeyPatch, caplog
) -> None:
    found = forecast_of(recipe_of(tiny_model, toy_data))
    alone = training_need(found.sizes, found.recipe, found.longest)
    monkeypatch.setenv("WORLD_SIZE", "5")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    each = training_need(found.sizes, found.recipe, found.longest)
    # 12 rows among five: three in one of them.
    assert (each.activations, each.logits) == (alone.activations // 4, alone.logits // 4)
    assert each.state == alone.state, "each has a base of its own"
    monkeypatch.setattr(memory, "_available", lambda: 2 * each.total - 2)
    monkeypatch.setattr(memory, "_container_room", lambda: None)
    caplog.clear()
    found.warn()
    (warning,) = caplog.messages
    assert "in each of 2 processes, and cpu has" in warning and "free for each; " in warning
    monkeypatch.setattr(memory, "_available", lambda: 2 * each.total)
    found.warn()
    assert len(caplog.messages) == 1


def test_a_base_that_is_shared_out(tiny_model: Path, toy_data: Path, monkeypatch) -> None:
    """A process holds its part, and one of the two layers gathered."""
    recipe = recipe_of(tiny_model, toy_data)
    sizes = forecast_of(recipe).sizes
    recipe = recipe.model_copy(update={"processes": ProcessesSection(engine="fsdp2")})
    assert training_need(sizes, recipe, 9).state == sizes.training_bytes, "alone: all of it"
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert training_need(sizes, recipe, 9).state == sizes.training_bytes, "one a machine: all of it"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    part = sizes.base_bytes // 4 + sizes.base_bytes // 2
    rest = sizes.training_bytes - sizes.base_bytes
    assert training_need(sizes, recipe, 9).state == rest + part
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert training_need(sizes, recipe, 9).state == rest + sizes.base_bytes, "never more than all"


def test_sharing_the_base_is_advised_to_neighbours(
    tiny_model: Path, toy_data: Path, monkeypatch
) -> None:
    found = forecast_of(recipe_of(tiny_model, toy_data))
    assert "fsdp2" not in advice(found.settings(None), None), "there is nobody to share it with"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert "--set processes.engine=fsdp2," in advice(found.settings(None), None)
    whole = found.recipe.model_copy(update={"processes": ProcessesSection(engine="fsdp2")})
    assert "fsdp2" not in advice(replace(found, recipe=whole).settings(None), None)
    opened = replace(found, sizes=replace(found.sizes, opened=1))
    assert "fsdp2" not in advice(opened.settings(None), None), "the method trains the base"


def test_only_what_spares_memory_may_change(tiny_model: Path, toy_data: Path) -> None:
    old = recipe_of(tiny_model, toy_data)
    new = recipe_of(tiny_model, toy_data, gradient_checkpointing=True, micro_batch_tokens=10)
    assert differences(old, new) == []
    assert differences(old, recipe_of(tiny_model, toy_data, batch_size=3)) != []


def test_bfloat16_keeps_the_adapter_in_float32_and_resumes_exactly(
    treelora, monkeypatch, tiny_model: Path, toy_data: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    whole, run = tmp_path / "whole", tmp_path / "run"
    more = ["--set", "model.dtype=bfloat16"]
    assert treelora(*toy_arguments(tiny_model, toy_data, whole, "alpha,beta", *more)).code == 0
    with monkeypatch.context() as patch:
        fail_at(patch, "step", 4, MemoryError())
        assert treelora(*toy_arguments(tiny_model, toy_data, run, "alpha,beta", *more)).code == 6
    stored = load_file(next((run / "checkpoint").glob("step-*")) / "tensors.safetensors")
    moved = [value for key, value in stored.items() if key.startswith("adapter.")]
    assert {value.dtype for value in moved} == {torch.float32}
    # Rounded to bfloat16 and back they would be others: nothing is lost in a checkpoint.
    assert any(not torch.equal(value, value.bfloat16().float()) for value in moved)
    assert treelora("train-stream", "--run-dir", run).code == 0
    assert results(run) == results(whole)
    adapter = load_file(run / "tasks" / "001-beta" / "adapter" / "adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.float32}
