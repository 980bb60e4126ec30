"""SAPT's mixture against dense weights merged row by row; its attention against numpy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conditions_support import batch_of, learn, mean_of_tokens, prompts
from rows_support import meet, move, rows, start, step, task

from treelora_cli.errors import UsageError
from treelora_cli.methods.base import EFFECT, StoredTask
from treelora_cli.methods.sapt import Sapt
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import Encoder
from treelora_cli.models.forward import answer_logits, answer_loss
from treelora_cli.models.generate import generate
from treelora_cli.models.snapshot import PART, Snapshot, is_more
from treelora_cli.recipe import LoraSection, ModelSection

BASES = pytest.mark.parametrize("base", ["tiny_model", "tiny_t5"])
SMALL = {"width": 5, "temperature": 0.2}
WIDE = {"targets": "all-linear"}


def taught(folder: Path, tasks: int, **lora: object) -> tuple[Sapt, list[StoredTask], list]:
    """A method that has learned so many tasks, and each task's own adapter."""
    method = start(Sapt, folder, SMALL, **WIDE, **lora)
    finished: list[StoredTask] = []
    own = []
    for index in range(tasks):
        examples = rows(3, index, apart=method.model.backbone.encodes)
        method.begin_task(task(method.model, index, examples))
        move(method.model, index, 0.3)
        own.append(method.model.snapshot())
        keep(method, finished, method.model.answer())
    return method, finished, own


def keep(method: Sapt, finished: list[StoredTask], answer: Snapshot) -> None:
    context = task(method.model, len(finished), [])
    memory = method.end_task(context)
    finished.append(StoredTask(len(finished), context.name, memory, lambda: answer))
    method.install(finished)


def weights_by_hand(method: Sapt, ids, mask, keys: list[torch.Tensor]) -> np.ndarray:
    """softmax(norm(silu(U D e / rms(e))) . k / (temperature sqrt(H))), [B, tasks]."""
    parts = {
        name: method.model.snapshot()[PART + f"query.{name}"].double().numpy()
        for name in ("down", "up")
    }
    found = []
    for mean in mean_of_tokens(method, ids, mask):
        x = mean / np.sqrt(np.mean(mean**2))
        x = parts["up"] @ (parts["down"] @ x)
        x = x / (1 + np.exp(-x))
        x = (x - x.mean()) / np.sqrt(x.var() + 1e-5)
        scores = [x @ k.double().numpy() / np.sqrt(len(x)) / SMALL["temperature"] for k in keys]
        raised = np.exp(np.array(scores) - max(scores))
        found.append(raised / raised.sum())
    return np.stack(found)


def merged(folder: Path, scale: float, adapters: list[Snapshot], weights: np.ndarray):
    """The base, loaded anew, with the weighted sum of all changes in its dense weights."""
    model = load_backbone(ModelSection(name=str(folder), device="cpu")).model
    for adapter, weight in zip(adapters, weights, strict=True):
        for key, A in adapter.items():
            if is_more(key) or ".lora_A." not in key:
                continue
            change = adapter[key.replace("lora_A", "lora_B")].double() @ A.double()
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            with torch.no_grad():
                model.get_submodule(name).weight += (float(weight) * scale * change).float()
    return model


@BASES
def test_the_weights_are_a_softmax_over_the_keys(request, base: str) -> None:
    method, finished, own = taught(request.getfixturevalue(base), 3)
    ids, mask = prompts([9, 4, 6], 1, left=base == "tiny_model")
    keys = [adapter[PART + "key"] for adapter in own]
    method.attention.read(ids, mask)
    found = method.attention.weights
    expected = weights_by_hand(method, ids, mask, keys)
    np.testing.assert_allclose(found[:, :3].detach().numpy(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(found[:, 3], torch.zeros(3)), "the live adapter answers nothing"
    assert np.ptp(expected, axis=0).max() > 0.05, "otherwise it would not matter who asks"
    method.begin_task(task(method.model, 3, []))
    method.attention.read(ids, mask)
    key = method.model.snapshot()[PART + "key"]
    expected = weights_by_hand(method, ids, mask, [*keys, key])
    np.testing.assert_allclose(
        method.attention.weights.detach().numpy(), expected, rtol=1e-4, atol=1e-6
    )
    assert len(finished) == 3


@BASES
def test_every_row_reads_its_own_mixture(request, base: str) -> None:
    """In training, of the frozen adapters and the live one: logits and loss of dense weights."""
    folder = request.getfixturevalue(base)
    method, _, own = taught(folder, 2)
    examples = rows(3, 7, apart=base == "tiny_t5")
    method.begin_task(task(method.model, 2, examples))
    move(method.model, 9, 0.3)
    live = method.model.snapshot()
    batch = batch_of(examples)
    logits = answer_logits(method.model, batch)
    keys = [adapter[PART + "key"] for adapter in [*own, live]]
    weights = weights_by_hand(method, batch.input_ids, batch.prompt_mask(), keys)
    lengths = [len(example.tokens) - example.answer_start for example in examples]
    kept = logits[batch.labels != -100].split(lengths)
    for row, example in enumerate(examples):
        model = merged(folder, method.model.scale, [*own, live], weights[row])
        ids = torch.tensor([example.tokens])
        if base == "tiny_t5":
            inner = torch.tensor([[0, *example.tokens[example.answer_start : -1]]])
            out = model(input_ids=ids[:, : example.answer_start], decoder_input_ids=inner).logits[0]
        else:
            out = model(input_ids=ids).logits[0, example.answer_start - 1 : -1]
        torch.testing.assert_close(kept[row], out, rtol=1e-3, atol=1e-4)


@BASES
def test_answers_are_those_of_each_rows_dense_weights(request, base: str) -> None:
    """Batched, with the cache of earlier tokens; one by one without adapter and hook."""
    folder = request.getfixturevalue(base)
    method, _, own = taught(folder, 3)
    encodes = method.model.backbone.encodes
    encoder = Encoder(method.model.backbone.tokenizer, 60, 8, encodes=encodes)
    start_of_all = "Which letter comes next, if any, please? "
    questions = [start_of_all + rest for rest in ("a", "今天天气怎么样", "x y z " * 4, "12")]
    answers = generate(method.model, encoder, questions, 6, 8)
    keys = [adapter[PART + "key"] for adapter in own]
    alone = []
    for question in questions:
        ids = torch.tensor([encoder.prompt(question)[0]])
        weights = weights_by_hand(method, ids, torch.ones_like(ids), keys)
        out = merged(folder, method.model.scale, own, weights[0]).generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False,
            eos_token_id=encoder.stops, pad_token_id=0, decoder_start_token_id=0,
        )  # fmt: skip
        new = out[0] if encodes else out[0, ids.shape[1] :]
        alone.append(method.model.backbone.tokenizer.decode(new, skip_special_tokens=True))
    assert answers == alone
    method.attention.keys = method.attention.keys[::-1]
    assert generate(method.model, encoder, questions, 6, 8) != answers


@BASES
def test_only_the_new_task_learns_and_its_key_does(request, base: str) -> None:
    method, _, _ = taught(request.getfixturevalue(base), 2)
    examples = rows(3, 7, apart=base == "tiny_t5")
    method.begin_task(task(method.model, 2, examples))
    move(method.model, 9, 0.3)
    batch = batch_of(examples)
    answer_loss(method.model, batch).backward()
    trained = method.model.trainable()
    named = {PART + name for name in ("query.down", "query.up", "key")}
    assert {key for key in trained if is_more(key)} == named
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained.values())
    past = method.model.past_parameters.values()
    assert past and all(p.grad is None and not p.requires_grad for p in past)
    assert not any(key.requires_grad for key in method.attention.keys)
    key = trained[PART + "key"]
    direction = torch.randn(key.shape, generator=torch.Generator().manual_seed(0))
    slope = float(key.grad @ direction)
    losses = []
    for sign in (1, -1):
        with torch.no_grad():
            key += sign * 1e-2 * direction
            losses.append(answer_loss(method.model, batch).item())
            key -= sign * 1e-2 * direction
    assert slope == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=0.05, abs=2e-3)


def test_a_step_says_how_much_attention_is_on_earlier_tasks(tiny_model: Path) -> None:
    method, _, _ = taught(tiny_model, 1)
    batch = batch_of(rows(3, 7))
    method.begin_task(task(method.model, 1, []))
    answer_loss(method.model, batch)
    said = method.after_step(step())[EFFECT].read()[0]
    assert said == pytest.approx(1 - method.attention.weights[:, 1].mean().item())
    assert 0 < said < 1
    first = start(Sapt, tiny_model, SMALL)
    first.begin_task(task(first.model, 0, []))
    answer_loss(first.model, batch)
    assert first.after_step(step()) == {}
    assert torch.equal(first.attention.weights, torch.ones(3, 1))


def test_what_answers_comes_back_from_disk(tiny_model: Path) -> None:
    method, finished, _ = taught(tiny_model, 2)
    examples = rows(3, 7)
    learned = answer_logits(method.model, batch_of(examples))
    section = LoraSection(rank=3, alpha=6, dropout=0.0, **WIDE)
    fresh = meet(Sapt, AdaptedModel(method.model.backbone, section, 0), section, SMALL)
    fresh.install(finished[:1])
    assert not torch.equal(answer_logits(fresh.model, batch_of(examples)), learned)
    fresh.install(finished)
    assert torch.equal(answer_logits(fresh.model, batch_of(examples)), learned)
    third = learn(fresh, list(finished), examples)
    assert third.adapter()[PART + "key"].abs().max() > 0.5


def test_a_module_that_reads_other_rows_than_prompts_is_refused(tiny_model: Path) -> None:
    method, _, _ = taught(tiny_model, 1)
    method.attention.read(*prompts([5, 4, 3]))
    with pytest.raises(UsageError, match="weighs adapters by row"):
        method.model.peft(input_ids=torch.ones(2, 4, dtype=torch.int64))


def test_rate(tiny_model: Path) -> None:
    method = start(Sapt, tiny_model, SMALL | {"rate": 3})
    assert method.rate(PART + "key") == 3
    assert method.rate("x.lora_A.weight") == 1
