"""DualPrompt: a task's own expert in training, the nearest key's afterwards, by loops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from conditions_support import batch_of, cosine, learn, mean_of_tokens, prompts
from rows_support import meet, rows, start, step, task

from treelora_cli.methods.dualprompt import DualPrompt
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.forward import answer_loss
from treelora_cli.models.snapshot import PART
from treelora_cli.recipe import LoraSection

SMALL = {"general": 2, "expert": 3}
BASES = pytest.mark.parametrize("base", ["tiny_model", "tiny_t5"])


def part(method: DualPrompt, name: str) -> np.ndarray:
    return method.model.snapshot()[PART + name].double().numpy()


@BASES
def test_a_task_is_trained_with_its_own_expert(request, base: str) -> None:
    """Even where the keys of others are nearer to its rows."""
    method = start(DualPrompt, request.getfixturevalue(base), SMALL | {"match": 0.7})
    examples = rows(4, 2, apart=base == "tiny_t5")
    finished: list = []
    learn(method, finished, examples)
    method.begin_task(task(method.model, 1, examples))
    batch = batch_of(examples)
    ids, mask = batch.input_ids, batch.prompt_mask()
    queries = mean_of_tokens(method, ids, mask)
    with torch.no_grad():
        method.experts.keys[0].copy_(torch.from_numpy(queries[0]))
    answer_loss(method.model, batch).backward()
    soft = method.experts.read(ids, mask)
    expected = np.concatenate([part(method, "expert"), part(method, "general")])
    for row in soft:
        np.testing.assert_allclose(row.detach().numpy(), expected, rtol=1e-6)
    trained = method.model.trainable()
    assert set(trained) == {PART + name for name in ("general", "expert", "key")}
    assert all(trained[PART + name].grad.abs().sum() > 0 for name in ("general", "expert"))
    assert trained[PART + "key"].grad is None
    penalty = method.penalty(step())
    distances = [1 - cosine(query, part(method, "key")) for query in queries]
    assert penalty.item() == pytest.approx(0.7 * np.mean(distances), rel=1e-4)
    penalty.backward()
    key = trained[PART + "key"]
    with torch.no_grad():
        key -= 0.1 * key.grad / key.grad.norm() * key.norm()
    method.experts.read(ids, mask)
    assert method.penalty(step()).item() < penalty.item()


@BASES
def test_the_nearest_key_chooses_the_expert(request, base: str) -> None:
    method = start(DualPrompt, request.getfixturevalue(base), SMALL)
    finished: list = []
    ids, mask = prompts([9, 4, 6, 5, 7], 1, left=base == "tiny_model")
    experts = []
    for index in range(3):
        learn(method, finished, rows(3, index, apart=base == "tiny_t5"), 0.02)
        experts.append(part(method, "expert"))
        # One row's own query as the key, so that no task is nearest to all rows.
        query = torch.from_numpy(mean_of_tokens(method, ids, mask)[index]).float()
        method.experts.keys[index] = query
    assert len({expert.tobytes() for expert in experts}) == 3, "each task draws its own"
    soft = method.experts.read(ids, mask)
    keys = [key.double().numpy() for key in method.experts.keys]
    chosen = []
    for query, row in zip(mean_of_tokens(method, ids, mask), soft, strict=True):
        nearest = max(range(3), key=lambda t: cosine(query, keys[t]))
        chosen.append(nearest)
        expected = np.concatenate([experts[nearest], part(method, "general")])
        np.testing.assert_allclose(row.detach().numpy(), expected, rtol=1e-6)
    assert chosen[:3] == [0, 1, 2]


def test_earlier_experts_and_keys_stay_and_come_back_from_disk(tiny_model: Path) -> None:
    method = start(DualPrompt, tiny_model, SMALL)
    finished: list = []
    ids, mask = prompts([9, 4, 6], 1)
    first = learn(method, finished, rows(3, 0), 0.02)
    alone = method.experts.read(ids, mask)
    expert, key = method.experts.experts[0].clone(), method.experts.keys[0].clone()
    learn(method, finished, rows(3, 1), 0.02)
    together = method.experts.read(ids, mask)
    assert torch.equal(method.experts.experts[0], expert)
    assert torch.equal(method.experts.keys[0], key)
    assert torch.equal(first.adapter()[PART + "expert"], expert)
    assert not torch.equal(method.experts.experts[1], expert)
    section = LoraSection(rank=3, alpha=6, dropout=0.0)
    fresh = meet(DualPrompt, AdaptedModel(method.model.backbone, section, 0), section, SMALL)
    fresh.install(finished)
    assert torch.equal(fresh.experts.read(ids, mask), together)
    fresh.install(finished[:1])
    assert torch.equal(fresh.experts.read(ids, mask), alone)
    fresh.install(finished)
    assert torch.equal(fresh.experts.read(ids, mask), together)


def test_an_expert_starts_as_words_by_the_tasks_seed(tiny_model: Path) -> None:
    table = None
    found = []
    for index in (0, 1, 1):
        method = start(DualPrompt, tiny_model, SMALL)
        table = method.model.backbone.model.get_input_embeddings().weight.detach()
        general = part(method, "general")
        method.begin_task(task(method.model, index, rows(3, 0)))
        assert np.array_equal(part(method, "general"), general), "it goes on from task to task"
        expert = part(method, "expert")
        for token in [*expert, *general]:
            assert (torch.from_numpy(token).float() == table).all(1).any()
        np.testing.assert_allclose(part(method, "key"), expert.mean(0), atol=1e-7)
        found.append(expert)
    assert not np.array_equal(found[0], found[1])
    assert np.array_equal(found[1], found[2])


def test_the_adapter_adds_nothing(tiny_model: Path) -> None:
    method = start(DualPrompt, tiny_model, SMALL | {"rate": 3})
    finished: list = []
    stored = learn(method, finished, rows(3, 0))
    B = [value for key, value in stored.adapter().items() if ".lora_B." in key]
    assert B
    assert all(value.abs().sum() == 0 for value in B)
    assert method.rate(PART + "key") == 3
    assert not method.learns("any.lora_A.weight")
