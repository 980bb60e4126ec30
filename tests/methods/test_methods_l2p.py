"""L2P's choice, pull and reading against loops over tokens; the pool really answers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conditions_support import batch_of, cosine, learn, mean_of_tokens, prompts
from rows_support import meet, move, rows, start, step
from torch.nn import functional

from treelora_cli.errors import UsageError
from treelora_cli.methods.base import build_method
from treelora_cli.methods.l2p import L2p
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import Encoder
from treelora_cli.models.forward import answer_loss
from treelora_cli.models.generate import generate
from treelora_cli.models.snapshot import PART
from treelora_cli.recipe import LoraSection, build_recipe

SMALL = {"pool": 6, "length": 3, "top_k": 2}


def parts(method: L2p) -> tuple[np.ndarray, np.ndarray]:
    found = method.model.snapshot()
    return tuple(found[PART + name].double().numpy() for name in ("prompts", "keys"))


def shake(method: L2p, size: float) -> None:
    """Let the adapter change something, so that a random base says more than one thing."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in method.model.live_parameters.values():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def chosen_by_hand(method: L2p, ids, mask) -> list[list[int]]:
    """The prompts of every row, nearest first."""
    _, keys = parts(method)
    return [
        sorted(range(len(keys)), key=lambda m: -cosine(query, keys[m]))[: method.settings.top_k]
        for query in mean_of_tokens(method, ids, mask)
    ]


@pytest.mark.parametrize("base", ["tiny_model", "tiny_t5"])
@pytest.mark.parametrize("left", [False, True])
def test_the_nearest_prompts_are_read(request, base: str, left: bool) -> None:
    method = start(L2p, request.getfixturevalue(base), SMALL)
    move(method.model, 3, 0.02)
    ids, mask = prompts([9, 4, 6, 5], 1, left=left)
    soft = method.pool.read(ids, mask)
    assert soft.shape == (4, method.pool.width, soft.shape[2])
    assert method.pool.width == 6
    wanted = chosen_by_hand(method, ids, mask)
    assert len(set(map(tuple, wanted))) > 1, "otherwise it would not matter who asks"
    pool, keys = parts(method)
    for row, query, found in zip(wanted, mean_of_tokens(method, ids, mask), soft, strict=True):
        expected = np.concatenate([pool[m] for m in row])
        np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-6)
        assert cosine(query, keys[row[0]]) > cosine(query, keys[row[1]])


def test_what_stands_behind_a_prompt_decides_nothing(tiny_model: Path) -> None:
    method = start(L2p, tiny_model, SMALL)
    ids, mask = prompts([9, 4], 1)
    other = torch.where(mask.bool(), ids, (ids + 7) % 320)
    assert torch.equal(method.pool.read(ids, mask), method.pool.read(other, mask))
    wider = [functional.pad(one, (0, 3)) for one in (ids, mask)]
    torch.testing.assert_close(method.pool.read(*wider), method.pool.read(ids, mask))


@pytest.mark.parametrize("base", ["tiny_model", "tiny_t5"])
def test_the_penalty_pulls_the_chosen_keys_to_the_queries(request, base: str) -> None:
    method = start(L2p, request.getfixturevalue(base), SMALL | {"pull": 0.3})
    move(method.model, 3, 0.02)
    examples = rows(5, 2, apart=base == "tiny_t5")
    batch = batch_of(examples)
    answer_loss(method.model, batch).backward()
    parameters = method.model.trainable()
    assert set(parameters) == {PART + "prompts", PART + "keys"}
    assert parameters[PART + "prompts"].grad.abs().sum() > 0
    assert parameters[PART + "keys"].grad is None, "the answers choose, they do not teach the keys"
    penalty = method.penalty(step())
    ids, mask = batch.input_ids, batch.prompt_mask()
    wanted, (_, keys) = chosen_by_hand(method, ids, mask), parts(method)
    queries = mean_of_tokens(method, ids, mask)
    distances = [
        sum(1 - cosine(query, keys[m]) for m in row)
        for query, row in zip(queries, wanted, strict=True)
    ]
    assert penalty.item() == pytest.approx(0.3 * np.mean(distances), rel=1e-4)
    penalty.backward()
    key = parameters[PART + "keys"]
    with torch.no_grad():
        key -= 0.01 * key.grad / key.grad.abs().max() * key.abs().max()
    method.pool.read(ids, mask)
    assert method.penalty(step()).item() < penalty.item()
    untouched = set(range(6)) - {m for row in wanted for m in row}
    assert all(key.grad[m].abs().sum() == 0 for m in untouched)


@pytest.mark.parametrize("base", ["tiny_model", "tiny_t5"])
def test_answers_are_those_of_the_prompts_before_the_text(request, base: str) -> None:
    """Batched answers against transformers' own generation of one row of embeddings at a time."""
    method = start(L2p, request.getfixturevalue(base), SMALL, targets="all-linear")
    move(method.model, 5, 0.5)
    shake(method, 0.3)
    model = method.model.backbone.model
    encodes = method.model.backbone.encodes
    encoder = Encoder(method.model.backbone.tokenizer, 60, 8, encodes=encodes)
    questions = ["What is it?", "今天", "a much longer question than the others are"]
    answers = generate(method.model, encoder, questions, 6, 8)
    tokenizer = method.model.backbone.tokenizer
    for question, answer in zip(questions, answers, strict=True):
        ids = torch.tensor([encoder.prompt(question)[0]])
        soft = method.pool.read(ids, torch.ones_like(ids))
        embeds = torch.cat([soft.detach(), model.get_input_embeddings()(ids)], dim=1)
        out = model.generate(
            inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.int64),
            max_new_tokens=6, do_sample=False, eos_token_id=encoder.stops, pad_token_id=0,
            decoder_start_token_id=0,
        )  # fmt: skip
        assert answer == tokenizer.decode(out[0], skip_special_tokens=True)
    assert len(set(answers)) > 1
    method.model.condition = None
    assert generate(method.model, encoder, questions, 6, 8) != answers


def test_the_pool_starts_as_words_and_comes_back_from_disk(tiny_model: Path) -> None:
    method = start(L2p, tiny_model, SMALL)
    table = method.model.backbone.model.get_input_embeddings().weight.detach()
    pool, keys = parts(method)
    for token in pool.reshape(-1, pool.shape[-1]):
        assert (torch.from_numpy(token).float() == table).all(1).any()
    np.testing.assert_allclose(keys, pool.mean(1), atol=1e-7)
    assert np.array_equal(parts(start(L2p, tiny_model, SMALL))[0], pool), "the run's seed decides"
    finished: list = []
    stored = learn(method, finished, rows(3, 1))
    ids, mask = prompts([9, 4], 1)
    soft = method.pool.read(ids, mask)
    assert not torch.equal(soft, torch.zeros_like(soft))
    section = LoraSection(rank=3, alpha=6, dropout=0.0)
    fresh = meet(L2p, AdaptedModel(method.model.backbone, section, 0), section, SMALL)
    assert not torch.equal(fresh.pool.read(ids, mask), soft)
    fresh.install([stored])
    assert torch.equal(fresh.pool.read(ids, mask), soft)
    assert all(
        value.abs().sum() == 0 for key, value in stored.adapter().items() if ".lora_B." in key
    )


def test_settings(tiny_model: Path) -> None:
    method = start(L2p, tiny_model, SMALL | {"rate": 7})
    assert method.rate(PART + "keys") == 7
    assert not method.learns("any.lora_A.weight")
    document = {"method": {"name": "l2p", "pool": 4, "top_k": 5}}
    with pytest.raises(UsageError, match="top_k=5 prompts cannot be chosen of pool=4"):
        build_method(build_recipe(document, "here"))
