"""How a step's rows are spread over forward passes: limits, and the same gradient whichever way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora_cli.engine.batches import BatchPlan
from treelora_cli.engine.forwards import Forwards
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import Example
from treelora_cli.models.grouping import group_by_length
from treelora_cli.models.probe import mean_gradient
from treelora_cli.recipe import LoraSection, ModelSection, OptimSection


@pytest.fixture
def model(tiny_model: Path) -> AdaptedModel:
    backbone = load_backbone(ModelSection(name=str(tiny_model), device="cpu"))
    adapted = AdaptedModel(backbone, LoraSection(rank=4, dropout=0.0), 0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in adapted.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return adapted


def rows(*lengths: tuple[int, int]) -> list[Example]:
    """Examples of random tokens: (tokens in all, of them the answer's)."""
    generator = torch.Generator().manual_seed(0)
    return [
        Example(
            tuple(torch.randint(3, 320, (total,), generator=generator).tolist()),
            total - answer,
            False,
        )
        for total, answer in lengths
    ]


MIXED = rows((40, 3), (9, 2), (90, 11), (33, 10), (12, 1), (90, 2), (7, 3))


@given(
    st.lists(st.integers(1, 60), max_size=30),
    st.integers(1, 9),
    st.one_of(st.none(), st.integers(1, 200)),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_groups_keep_to_their_limits_and_lose_nothing(
    lengths: list[int], most: int, tokens: int | None, packed: bool
) -> None:
    groups = group_by_length(lengths, most, tokens, packed=packed)
    flat = [number for group in groups for number in group]
    assert sorted(flat) == list(range(len(lengths)))
    assert [lengths[number] for number in flat] == sorted(lengths, reverse=True)
    for group in groups:
        found = [lengths[number] for number in group]
        cost = sum(found) if packed else max(found) * len(found)
        assert len(group) <= most
        assert tokens is None or cost <= tokens or len(group) == 1


def test_a_group_is_closed_only_when_the_next_row_does_not_fit() -> None:
    assert group_by_length([10, 10, 10, 5], 32, 20) == [[0, 1], [2, 3]]
    assert group_by_length([10, 10, 10, 5], 32, 20, packed=True) == [[0, 1], [2, 3]]
    assert group_by_length([10, 9, 2], 32, 21, packed=True) == [[0, 1, 2]]
    assert group_by_length([10, 9, 2], 32, 21) == [[0, 1], [2]]
    assert group_by_length([10, 9, 2], 2, None) == [[0, 1], [2]]


@pytest.mark.parametrize(
    "optim",
    [
        OptimSection(micro_batch_size=1, micro_batch_tokens=None),
        OptimSection(micro_batch_size=3, micro_batch_tokens=None),
        OptimSection(micro_batch_tokens=100),
        OptimSection(micro_batch_tokens=100, packing=True),
        OptimSection(packing=True),
    ],
    ids=["one", "three", "tokens", "packed-tokens", "packed"],
)
def test_the_gradient_of_a_step_does_not_depend_on_its_passes(
    model: AdaptedModel, optim: OptimSection
) -> None:
    plan = BatchPlan(len(MIXED), len(MIXED), 1, 0)
    whole = Forwards(MIXED, plan, OptimSection(), 0).of(0)
    assert len(whole) == 1
    passes = Forwards(MIXED, plan, optim, 0).of(0)
    assert sum(batch.tokens for batch in passes) == whole[0].tokens
    expected = mean_gradient(model, whole)
    for found, wanted in zip(mean_gradient(model, passes), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    assert all(gradient.abs().max() > 1e-4 for gradient in expected)


def test_passes_are_counted_and_padding_goes(model: AdaptedModel) -> None:
    plan = BatchPlan(len(MIXED), 4, 3, 5)
    forwards = Forwards(MIXED, plan, OptimSection(micro_batch_tokens=100), 0)
    counts = [len(forwards.of(step)) for step in range(plan.steps)]
    assert forwards.per_epoch() == max(sum(counts[n : n + 2]) for n in (0, 2, 4))
    padded = sum(
        batch.input_ids.numel() - batch.tokens
        for step in range(plan.steps)
        for batch in forwards.of(step)
    )
    whole = Forwards(MIXED, plan, OptimSection(), 0)
    naive = sum(b.input_ids.numel() - b.tokens for s in range(plan.steps) for b in whole.of(s))
    packed = Forwards(MIXED, plan, OptimSection(packing=True), 0)
    assert padded < naive
    assert all(b.input_ids.numel() == b.tokens for s in range(plan.steps) for b in packed.of(s))
