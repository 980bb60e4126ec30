"""OSF on PEFT's tuner against singular value decompositions in numpy."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from support import make_checkpoint, toy_arguments

from treelora_cli.errors import UsageError
from treelora_cli.methods.base import EFFECT, StepContext, StreamContext, TaskContext
from treelora_cli.methods.osf import Osf, OsfSettings
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.osf import OsfModel
from treelora_cli.recipe import BanditSection, LoraSection, ModelSection, TreeSection

IDS = torch.tensor([[3, 5, 8, 13, 21, 34]])
NAME = "model.layers.0.mlp.up_proj"
KEY = f"weights.{NAME}.weight"
STREAM = StreamContext(7, BanditSection(), TreeSection())


def load(path: Path, dtype: str = "float32") -> OsfModel:
    section = ModelSection(name=str(path), device="cpu", dtype=dtype)
    return OsfModel(load_backbone(section), LoraSection())


@pytest.fixture
def model(tiny_model: Path) -> OsfModel:
    return load(tiny_model)


def logits(model: OsfModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.peft(input_ids=IDS).logits
    return found


def learn(model: OsfModel, steps: int, *, hold: bool) -> list[float]:
    """Train with AdamW; return the norms of what holding the factors took off."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    taken = []
    for _ in range(steps):
        optimizer.zero_grad()
        model.peft(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
        if hold:
            taken.append(float(model.hold()))
    return taken


def weight_of(model: OsfModel) -> np.ndarray:
    return model.snapshot()[KEY].double().numpy()


def test_every_linear_layer_of_a_block_is_adapted(model: OsfModel, tiny_t5: Path) -> None:
    assert len(model.more_parameters) == 2 * 7
    assert model.parameters() == []
    assert not model.decomposed
    t5 = load(tiny_t5)
    assert all(key.endswith(".weight") for key in t5.more_parameters)
    assert any("EncDecAttention" in key for key in t5.more_parameters)
    assert not any("shared" in key or "lm_head" in key for key in t5.more_parameters)


def test_decomposing_changes_nothing_and_frees_the_smallest_directions(model: OsfModel) -> None:
    before, W = logits(model), weight_of(model)
    model.decompose(0.25)
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=0)
    rank = min(W.shape) - int(0.25 * min(W.shape))
    values = np.linalg.svd(W)[1]
    S = model.trainable()[f"{NAME}.S_low"].detach().numpy()
    np.testing.assert_allclose(S, values[-rank:], rtol=1e-4)
    assert model.trainable()[f"{NAME}.U_low"].shape == (W.shape[0], rank)
    assert model.trainable()[f"{NAME}.V_low"].shape == (rank, W.shape[1])
    entries = [p.numel() for p in model.parameters()]
    assert model.trainable_count() == sum(entries)
    assert len(entries) == 3 * len(model.more_parameters)


def test_at_least_one_direction_is_preserved_and_one_is_free(model: OsfModel) -> None:
    counted = model.trainable_count()
    model.decompose(0.0)
    assert model.trainable_count() == counted == sum(p.numel() for p in model.parameters())
    whole = min(weight_of(model).shape)
    assert len(model.trainable()[f"{NAME}.S_low"]) == whole - 1
    model.decompose(0.999)
    assert len(model.trainable()[f"{NAME}.S_low"]) == 1


@pytest.mark.parametrize("hold", [True, False])
def test_the_preserved_part_is_unchanged_if_the_factors_are_held(
    model: OsfModel, hold: bool
) -> None:
    """U_h' W V_h stays diag(S_h) and nothing mixes with it, or AdamW's steps leak into it."""
    W = weight_of(model)
    U, S, V = np.linalg.svd(W, full_matrices=False)
    k = int(0.5 * min(W.shape))
    model.decompose(0.5)
    taken = learn(model, 3, hold=hold)
    model.fold()
    after = weight_of(model)
    mixed = np.linalg.norm(U[:, :k].T @ after - np.diag(S[:k]) @ V[:k])
    mixed += np.linalg.norm(after @ V[:k].T - U[:, :k] @ np.diag(S[:k]))
    assert np.linalg.norm(after - W) > 1e-2
    if hold:
        assert mixed < 1e-4
        assert min(taken) > 1e-3
    else:
        assert mixed > 1e-3


def test_folding_keeps_what_was_learned(model: OsfModel) -> None:
    model.decompose(0.5)
    before = model.snapshot()
    learn(model, 3, hold=True)
    low, start = model.snapshot(), before
    learned = logits(model)
    model.fold()
    torch.testing.assert_close(logits(model), learned, atol=1e-4, rtol=0)
    expected = before[KEY].double().numpy()
    for factors, sign in ((low, 1), (start, -1)):
        U, S, V = (
            factors[f"{NAME}.{part}"].double().numpy() for part in ("U_low", "S_low", "V_low")
        )
        expected = expected + sign * U @ np.diag(S) @ V
    np.testing.assert_allclose(weight_of(model), expected, atol=1e-5)
    assert model.peft is model.backbone.model
    assert set(model.snapshot()) == set(model.more_parameters)
    assert model.answer().keys() == model.snapshot().keys()


def test_an_encoder_decoder_learns_too(tiny_t5: Path) -> None:
    model = load(tiny_t5)
    model.decompose(0.0)
    labels = torch.tensor([[4, 9, 2]])
    losses = []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(4):
        optimizer.zero_grad()
        loss = model.peft(input_ids=IDS, labels=labels).loss
        loss.backward()
        optimizer.step()
        model.hold()
        losses.append(loss.item())
    model.fold()
    with torch.no_grad():
        folded = model.peft(input_ids=IDS, labels=labels).loss.item()
    assert folded < losses[-1] < losses[0]


def test_a_later_task_is_decomposed_from_what_the_earlier_one_left(model: OsfModel) -> None:
    model.decompose(0.0)
    learn(model, 2, hold=True)
    model.decompose(0.5)
    after = weight_of(model)
    values = np.linalg.svd(after)[1]
    free = model.trainable()[f"{NAME}.S_low"].detach().numpy()
    np.testing.assert_allclose(free, values[len(values) // 2 :], rtol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stored_weights_bring_back_the_same_bits(tiny_model: Path, dtype: str) -> None:
    model = load(tiny_model, dtype)
    model.decompose(0.0)
    learn(model, 2, hold=True)
    model.fold()
    answer = model.answer()
    again = load(tiny_model, dtype)
    again.restore(answer)
    assert torch.equal(logits(again), logits(model))
    # From the middle of another task too, whose factors are then gone.
    again.decompose(0.5)
    learn(again, 1, hold=True)
    again.restore(answer)
    assert not again.decomposed
    assert torch.equal(logits(again), logits(model))


def test_a_checkpoint_inside_a_task_brings_back_the_same_bits(tiny_model: Path) -> None:
    models = [load(tiny_model), load(tiny_model)]
    models[0].decompose(0.5)
    learn(models[0], 2, hold=True)
    snapshot = models[0].snapshot()
    models[1].decompose(0.5)
    models[1].restore(snapshot)
    assert torch.equal(logits(models[0]), logits(models[1]))
    for one in models:
        learn(one, 1, hold=True)
        one.fold()
    assert torch.equal(logits(models[0]), logits(models[1]))


def test_the_base_alone_has_the_weights_it_came_with(model: OsfModel) -> None:
    base = logits(model)
    model.decompose(0.0)
    learn(model, 2, hold=True)
    for _ in range(2):  # with the factors, and folded
        learned = logits(model)
        assert not torch.allclose(learned, base, atol=1e-3)
        trainable = list(model.trainable())
        with model.as_base():
            assert torch.equal(logits(model), base)
        assert torch.equal(logits(model), learned)
        assert list(model.trainable()) == trainable
        model.fold()


def test_adapters_are_refused(model: OsfModel) -> None:
    with model.beside([]) as names:
        assert names == []
    for refused in (
        lambda: model.beside([{}]).__enter__(),
        lambda: model.stand_on(None),
        lambda: model.reset(1),
    ):
        with pytest.raises(UsageError, match="weights of the base itself"):
            refused()


def test_layers_that_cannot_be_decomposed_are_refused(tiny_model: Path, tmp_path: Path) -> None:
    backbone = load_backbone(ModelSection(name=str(tiny_model), device="cpu"))
    with pytest.raises(UsageError, match=r"lora\.targets"):
        OsfModel(backbone, LoraSection(targets=("nothing",)))
    with pytest.raises(UsageError, match="linear layers only"):
        OsfModel(backbone, LoraSection(targets=("embed_tokens",)))
    plain = AdaptedModel(backbone, LoraSection(), 0)
    with pytest.raises(UsageError, match="brings a model of its own"):
        Osf(OsfSettings()).start(STREAM, plain)


def test_the_preserved_share_grows_with_the_tasks() -> None:
    assert [OsfSettings().share(i) for i in range(4)] == [0, 1 / 2, 2 / 3, 3 / 4]
    assert [OsfSettings(tasks=3).share(i) for i in range(4)] == [0, 1 / 3, 2 / 3, 2 / 3]
    given = OsfSettings(preserved=(0.3, 0.5))
    assert [given.share(i) for i in range(3)] == [0.3, 0.5, 0.5]
    with pytest.raises(ValidationError, match="give one of them"):
        OsfSettings(tasks=3, preserved=(0.3,))


@pytest.mark.parametrize("hold", ["weights", "gradients"])
def test_the_method_decomposes_holds_and_folds(model: OsfModel, hold: str) -> None:
    method = Osf(OsfSettings(hold=hold, preserved=(0.5,), rate=0.25))
    method.start(STREAM, model)
    task = TaskContext(0, "task0", 3, 3, 1)
    method.begin_task(task)
    assert len(model.trainable()[f"{NAME}.S_low"]) == 16
    assert {method.rate(key) for key in model.trainable()} == {0.25}
    learn(model, 1, hold=False)
    info = method.after_step(StepContext(0, torch.tensor(1.0)))
    if hold == "weights":
        assert info[EFFECT].read()[0] > 1e-3
        assert float(model.hold()) < 1e-4
    else:
        assert info == {}
        assert float(model.hold()) > 1e-3
    memory = method.end_task(task)
    assert memory.info["preserved_share"] == 0.5
    assert not model.decomposed


def test_a_run_holds_whole_weights_and_says_so(treelora, tmp_path, tiny_model, toy_data) -> None:
    """Stored, scored again, not exported, not compared as LoRA."""
    run = tmp_path / "run"
    done = treelora(*toy_arguments(tiny_model, toy_data, run, "alpha,beta", "--method", "osf"))
    assert done.code == 0, done
    folder = run / "tasks" / "001-beta"
    assert (folder / "weights.safetensors").exists()
    assert not (folder / "adapter").exists()
    document = json.loads((folder / "task.json").read_text(encoding="utf-8"))
    assert document["answers_with"] == ["weights.safetensors"]
    assert document["storage"] == {"form": "weights"}
    assert document["trainable_parameters"] > 0
    assert treelora("eval", run, "--adapter", "own", "--limit", "2").code == 0
    refused = treelora("export", run, "--out", tmp_path / "out")
    assert refused.code == 2, refused
    assert "beta has no adapter" in refused.err
    report = treelora("report", run, "--evidence", "--json")
    assert report.code == 0, report
    assert "no LoRA adapter" in report.out


def test_gpt2_is_refused_by_name(tmp_path: Path) -> None:
    """Its layers are not torch's linear ones, and PEFT's tuner passes them over in silence."""
    path = make_checkpoint(tmp_path / "gpt2", "gpt2")
    with pytest.raises(UsageError, match="linear layers only"):
        load(path)
