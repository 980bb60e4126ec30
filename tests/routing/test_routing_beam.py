"""The tree over means: a wide beam is exact, a narrow one nearly so and cheap; it can be shown."""

from __future__ import annotations

import io
import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from routing_synthetic import generator

from treelora_cli.routing.beam import FeatureTree, nearest
from treelora_cli.tree.render import render
from treelora_cli.tree.serial import from_document, to_document


def tree_over(means: torch.Tensor) -> FeatureTree:
    return FeatureTree([f"T{k}" for k in range(len(means))], means)


def exact(means: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.cdist(rows.double(), means.double()).argmin(1)


def families(tasks: int, width: int, seed: int = 0) -> torch.Tensor:
    """Means in four levels of families, in a random order."""
    rng = generator(seed)
    means = torch.zeros(tasks, width)
    for count, size in ((10, 1.0), (100, 0.7), (1000, 0.5), (tasks, 0.35)):
        offsets = torch.randn(count, width, generator=rng) * size
        means += offsets[torch.arange(tasks) * count // tasks]
    return means[torch.randperm(tasks, generator=rng)]


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 24), st.integers(1, 6), st.integers(0, 10**6))
def test_a_beam_of_all_tasks_is_exact(tasks: int, width: int, seed: int) -> None:
    means = torch.randn(tasks, width, generator=generator(seed))
    rows = torch.randn(15, width, generator=generator(seed + 1))
    found = tree_over(means).search(rows, tasks)
    assert found.indices.equal(exact(means, rows))
    assert set(found.dots.tolist()) == {2 * tasks - 1}
    best = torch.cdist(rows, means).square().topk(min(2, tasks), largest=False).values
    scores = (rows.square().sum(1) - best[:, 0]) / 2
    torch.testing.assert_close(found.scores, scores, atol=1e-4, rtol=1e-4)
    if tasks > 1:
        gaps = (best[:, 1] - best[:, 0]) / 2
        torch.testing.assert_close(found.margins, gaps, atol=1e-4, rtol=1e-4)


def test_a_beam_of_one_follows_the_nearer_mean() -> None:
    means = torch.tensor([[0.0], [1.0], [10.0], [11.0]])
    found = tree_over(means).search(torch.tensor([[0.2], [5.0], [10.9]]), 1)
    assert found.indices.tolist() == [0, 1, 3]
    # The root, its two children, and the two children of one of them.
    assert found.dots.tolist() == [5, 5, 5]
    with pytest.raises(ValueError, match="at least one node"):
        tree_over(means).search(torch.zeros(1, 1), 0)


def test_a_beam_finds_the_nearest_of_thousands_for_a_tenth_of_the_cost() -> None:
    tasks, width = 5000, 64
    means = families(tasks, width)
    tree = tree_over(means)
    assert tree.tree.depth <= 30
    rng = generator(3)
    rows = means[torch.randint(0, tasks, (300,), generator=rng)]
    rows = rows + torch.randn(300, width, generator=rng)
    wanted = exact(means, rows)
    shares = {}
    for beam in (1, 8, 32):
        found = tree.search(rows, beam)
        shares[beam] = float((found.indices == wanted).double().mean())
        assert int(found.dots.max()) <= 1 + 2 * beam * tree.tree.depth
    assert shares[32] >= 0.99
    assert float(found.dots.double().mean()) < tasks / 8
    assert shares[1] < shares[8] <= shares[32], "a wider beam finds more"


def test_equal_means_go_to_the_lower_index() -> None:
    means = torch.randn(5, 3, generator=generator(0)).repeat(3, 1)
    rows = means[:5] + 0.01
    assert tree_over(means).search(rows, 15).indices.tolist() == [0, 1, 2, 3, 4]


def test_rounding_does_not_break_a_tie() -> None:
    scores = torch.tensor([[1.0, 1.0 + 1e-7, 0.5]])
    found = nearest(torch.tensor([[7, 8, 2]]), scores, torch.tensor([3]))
    assert found.indices.tolist() == [7]
    apart = nearest(torch.tensor([[7, 8, 2]]), torch.tensor([[1.0, 1.001, 0.5]]), torch.tensor([3]))
    assert apart.indices.tolist() == [8]


def test_the_tree_is_written_and_shown_as_a_gradient_tree() -> None:
    made = tree_over(families(12, 5))
    document = to_document(made.tree, made.bank, kind="features")
    again = from_document(json.loads(json.dumps(document)))
    assert again == made.tree
    assert sorted(again.root.tasks) == list(range(12))
    console = Console(file=io.StringIO(), width=200)
    console.print(render(document))
    shown = console.file.getvalue()
    assert all(name in shown for name in made.bank.names)
