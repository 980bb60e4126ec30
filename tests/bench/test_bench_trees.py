"""Synthetic smooth trees, and what is read off a game played on them."""

from __future__ import annotations

import statistics

import pytest
import torch

from treelora_cli.bench import trees
from treelora_cli.bench.smooth import bank_of, smooth_values
from treelora_cli.tree.search import TreeSearch
from treelora_cli.tree.synthetic import play, smooth_tree


@pytest.mark.parametrize("count", [2, 8, 11, 64])
def test_a_smooth_tree_has_its_leaves(count: int) -> None:
    values = smooth_values(count, 40, 0)
    assert values.shape == (count, 40)
    assert len(values.unique(dim=0)) == count
    assert values.equal(smooth_values(count, 40, 0))


def test_variance_is_that_of_the_sum_of_offsets_and_siblings_are_near() -> None:
    values = smooth_values(64, 4000, 1)
    assert float(values.square().mean()) == pytest.approx(
        sum(0.25**level for level in range(1, 7)), rel=0.2
    )
    gaps = torch.cdist(values, values).square() / 4000
    gaps.fill_diagonal_(float("inf"))
    # Siblings differ by the two deepest offsets alone.
    assert gaps.amin(1).tolist() == pytest.approx([2 * 0.25**6] * 64, rel=0.15)


def test_leaves_stand_in_no_order() -> None:
    values = smooth_values(64, 400, 1)
    neighbours = (values[1:] - values[:-1]).square().mean()
    strangers = (values[32:] - values[:32]).square().mean()
    assert float(neighbours / strangers) == pytest.approx(1, abs=0.35)


def test_a_bank_has_blocks_of_one_width() -> None:
    bank = bank_of(torch.arange(24.0).reshape(4, 6), 3)
    assert (len(bank), bank.widths) == (4, (2, 2, 2))
    assert bank.gather([0, 1, 2]).tolist() == [0, 1, 8, 9, 16, 17]


def test_games_tell_the_searches_apart() -> None:
    rows = {kind: trees._game(64, kind, 1.0, 400, range(4)) for kind in ("tree", "flat", "random")}
    assert rows["tree"]["regret"] < 0.6 * rows["flat"]["regret"]
    assert rows["flat"]["regret"] < 0.7 * rows["random"]["regret"]
    assert rows["tree"]["settled"] is not None
    assert rows["random"]["settled"] is None
    assert rows["tree"]["regret_100"] < rows["tree"]["regret"]
    # Choosing at random pays the mean gap, step after step.
    gaps = []
    for seed in range(4):
        values = smooth_tree(seed, 64, 0.5).values
        gaps.append((statistics.mean(values) - min(values)) / (max(values) - min(values)))
    assert rows["random"]["regret"] == pytest.approx(400 * statistics.median(gaps), rel=0.1)


def test_the_tree_search_knows_how_far_worths_spread_in_a_node() -> None:
    found = smooth_tree(0, 64, 0.5)
    arms = play(trees._search("tree", found, 2.0, 0), found.values, 0.1, 200, 0)
    assert arms == play(TreeSearch(found.tree, 2.0, found.deltas), found.values, 0.1, 200, 0)
    blind = TreeSearch(found.tree, 2.0, [0.0] * len(found.deltas))
    assert arms != play(blind, found.values, 0.1, 200, 0)
