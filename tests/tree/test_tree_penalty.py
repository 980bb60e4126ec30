"""Targets, weights and gradients against closed forms and finite differences."""

from __future__ import annotations

import math

import pytest
import torch
import tree_synthetic as synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora_cli.errors import UsageError
from treelora_cli.tree.build import build_tree
from treelora_cli.tree.penalty import (
    PathTargets,
    block_weights,
    expand,
    l1_penalty,
    path_targets,
    ramp_value,
    sign_gradient,
)
from treelora_cli.tree.signatures import SignatureBank

WIDTHS = (2, 5, 3, 4)


def random_bank(n: int, seed: int) -> SignatureBank:
    rng = torch.Generator().manual_seed(seed)
    return synthetic.bank_of(torch.randn(n, sum(WIDTHS), generator=rng), WIDTHS)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 12), seed=st.integers(0, 10**6), target=st.sampled_from(("path", "leaf")))
def test_targets_equal_plain_loops(n: int, seed: int, target: str) -> None:
    bank = random_bank(n, seed)
    tree = build_tree(bank)
    rows = bank.values.tolist()
    kept = PathTargets(tree, bank, target)

    def expected(task: int, block: int) -> list[float]:
        path = tree.path_to(task)
        node = tree.nodes[path[min(block, len(path) - 1) if target == "path" else -1]]
        start = sum(WIDTHS[:block])
        return [
            sum(rows[k][i] for k in node.tasks) / len(node.tasks)
            for i in range(start, start + WIDTHS[block])
        ]

    for task in [*range(n), 0]:
        want = [value for block in range(4) for value in expected(task, block)]
        assert kept.of_arms([task]).tolist() == pytest.approx(want, abs=1e-5)
        alone = path_targets(tree, bank, tree.path_to(task), target)
        assert torch.equal(alone, kept([tree.path_to(task)]))
    arms = [(seed + block) % n for block in range(4)]
    want = [value for block in range(4) for value in expected(arms[block], block)]
    assert kept.of_arms(arms).tolist() == pytest.approx(want, abs=1e-5)


def test_means_are_kept_and_no_larger_than_the_bank() -> None:
    bank = synthetic.clusters(0, n=40, blocks=6).bank
    targets = PathTargets(build_tree(bank), bank)
    for task in range(40):
        targets.of_arms([task])
    assert sum(mean.numel() for mean in targets._means.values()) <= bank.values.numel()
    kept = dict(targets._means)
    targets.of_arms([3])
    assert all(targets._means[at] is mean for at, mean in kept.items())
    assert not targets.of_arms([3]).requires_grad


def test_the_root_guides_the_first_block_and_the_leaf_the_last() -> None:
    bank = synthetic.clusters(0, n=8, groups=2).bank
    target = PathTargets(build_tree(bank), bank).of_arms([5])
    assert torch.allclose(target[:32], bank.values[:, :32].mean(0), atol=1e-6)
    assert torch.equal(target[-32:], bank.values[5, -32:])


def pulled(live: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """The penalty of one live parameter."""
    return l1_penalty(live.detach().float().reshape(-1), target, weights, [live])


def test_weights_make_lambda_mean_the_same() -> None:
    moved = torch.tensor([0.5, 1.0, 2.0, 4.0])
    weights = block_weights(0.3, 0.5, WIDTHS, moved)
    for weight, width, m in zip(weights.tolist(), WIDTHS, moved.tolist(), strict=True):
        assert weight == pytest.approx(0.3 * 0.5 / (4 * width * m))
    # Every entry one mean displacement away: the penalty is lambda * ramp.
    target = torch.zeros(14)
    away = expand(moved, WIDTHS)
    assert float(pulled(away, target, expand(weights, WIDTHS))) == pytest.approx(0.15)
    # A backbone of another size and scale: the same.
    wide = tuple(100 * width for width in WIDTHS)
    weights = block_weights(0.3, 0.5, wide, 1e-3 * moved)
    away = expand(1e-3 * moved, wide)
    assert float(pulled(away, 0 * away, expand(weights, wide))) == pytest.approx(0.15)


@pytest.mark.parametrize("nothing", [0.0, math.nan, math.inf, 1e-12])
def test_a_block_that_never_moved_takes_the_others_scale(nothing: float) -> None:
    moved = torch.tensor([1.0, nothing, 3.0, 2.0])
    weights = block_weights(1.0, 1.0, WIDTHS, moved)
    assert weights[1].item() == pytest.approx(1 / (4 * 5 * 2.0))
    assert weights[2].item() == pytest.approx(1 / (4 * 3 * 3.0))
    assert torch.isfinite(weights).all()


def test_no_block_moved() -> None:
    weights = block_weights(1.0, 1.0, WIDTHS, torch.zeros(4))
    assert weights.tolist() == pytest.approx([1 / (4 * width) for width in WIDTHS])


def test_expand_repeats_each_block() -> None:
    assert expand(torch.tensor([1.0, 2.0]), (2, 3)).tolist() == [1, 1, 2, 2, 2]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_gradient_is_the_closed_form_and_the_finite_difference(seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    target = torch.randn(14, generator=rng)
    live = target + torch.randn(14, generator=rng)
    equal = torch.rand(14, generator=rng) < 0.3
    live[equal] = target[equal]
    live.requires_grad_()
    weights = expand(block_weights(0.5, 0.7, WIDTHS, torch.rand(4, generator=rng) + 0.1), WIDTHS)
    pulled(live, target, weights).backward()
    gradient = live.grad
    assert gradient is not None
    assert (gradient[equal] == 0).all()
    closed = [
        float(w) * math.copysign(1, s - t) if s != t else 0.0
        for w, s, t in zip(weights, live.tolist(), target.tolist(), strict=True)
    ]
    assert gradient.tolist() == pytest.approx(closed, rel=1e-6)
    detached = sign_gradient(live, target, weights)
    assert torch.equal(detached, gradient)
    assert not detached.requires_grad
    with torch.no_grad():
        wide, step = live.double(), 1e-6
        for i in torch.nonzero(~equal).flatten().tolist():
            up, down = wide.clone(), wide.clone()
            up[i] += step
            down[i] -= step
            slope = float(
                ((up - target).abs() * weights).sum() - ((down - target).abs() * weights).sum()
            )
            assert slope / (2 * step) == pytest.approx(float(gradient[i]), rel=1e-4)


def test_a_step_down_the_gradient_comes_nearer() -> None:
    live = torch.tensor([1.0, -2.0, 0.5], requires_grad=True)
    target, weights = torch.zeros(3), torch.ones(3)
    before = pulled(live, target, weights)
    before.backward()
    with torch.no_grad():
        after = pulled(live - 0.1 * live.grad, target, weights)
    assert float(after) == pytest.approx(float(before.detach()) - 0.3)


def test_a_live_half_precision_signature_is_compared_in_float32() -> None:
    live = torch.tensor([1.0, 2.0], dtype=torch.bfloat16, requires_grad=True)
    value = pulled(live, torch.tensor([1.001, 2.0]), torch.ones(2))
    assert value.dtype == torch.float32
    assert float(value.detach()) == pytest.approx(0.001, rel=1e-3)


def test_the_gradient_reaches_each_parameter_in_its_shape_and_dtype() -> None:
    one = torch.tensor([[1.0, -2.0], [0.5, 3.0]], requires_grad=True)
    two = torch.tensor([1.0, 2.0, -1.0], dtype=torch.bfloat16, requires_grad=True)
    both = torch.cat([one.detach().reshape(-1), two.detach().float()])
    target, weights = torch.tensor([0.0, 0, 1, 3, 2, 2, 2]), torch.arange(1.0, 8.0)
    value = 0.5 * l1_penalty(both, target, weights, [one, two])
    value.backward()
    assert float(value.detach()) == pytest.approx(0.5 * (1 + 4 + 3 * 0.5 + 0 + 5 + 0 + 7 * 3))
    assert one.grad.tolist() == [[0.5, -1.0], [-1.5, 0.0]]
    assert two.grad.tolist() == [-2.5, 0.0, -3.5]
    assert two.grad.dtype == torch.bfloat16


def test_targets_are_constants() -> None:
    target = torch.zeros(2, requires_grad=True)
    live = torch.ones(2, requires_grad=True)
    pulled(live, target, torch.ones(2)).backward()
    assert target.grad is None


def test_ramps() -> None:
    assert [ramp_value("task", step, 4, 2) for step in range(4)] == [0, 0.25, 0.5, 0.75]
    assert [ramp_value("epoch", step, 4, 2) for step in range(4)] == [0, 0.5, 0, 0.5]
    assert [ramp_value("none", step, 4, 2) for step in range(4)] == [1, 1, 1, 1]
    assert ramp_value("task", 0, 0, 0) == 0
    with pytest.raises(UsageError):
        ramp_value("linear", 0, 4, 2)
    with pytest.raises(UsageError):
        PathTargets(build_tree(random_bank(2, 0)), random_bank(2, 0), "root")
