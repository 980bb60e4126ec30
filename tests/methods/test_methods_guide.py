"""What the guide makes of its searches' statistics."""

from __future__ import annotations

import pytest
import torch

from treelora_cli.methods._guide import Guide
from treelora_cli.tree.build import build_tree
from treelora_cli.tree.penalty import PathTargets
from treelora_cli.tree.scopes import make_search
from treelora_cli.tree.signatures import SignatureBank

WIDTHS = (4, 6)


@pytest.fixture
def guide() -> Guide:
    """Three stored tasks, searched in each of two blocks."""
    draw = torch.Generator().manual_seed(0)
    bank = SignatureBank.empty(WIDTHS)
    for name in ("a", "b", "c"):
        bank = bank.add(name, torch.randn(sum(WIDTHS), generator=draw), torch.ones(len(WIDTHS)))
    tree = build_tree(bank)
    search = make_search("flat", tree, bank, scope="block")
    return Guide(bank, search, PathTargets(tree, bank), 1.0, torch.device("cpu"))


def test_the_mean_feedback_of_a_task_is_over_all_its_pulls(guide) -> None:
    pulls: list[tuple[tuple[int, ...], list[float]]] = [
        ((0, 1), [4.0, 1.0]),
        ((0, 0), [2.0, 9.0]),
        ((0, 1), [3.0, 5.0]),
    ]
    for arms, xis in pulls:
        guide.search.update(arms, xis)
    seen: dict[int, list[float]] = {}
    for arms, xis in pulls:
        for arm, xi in zip(arms, xis, strict=True):
            seen.setdefault(arm, []).append(xi)
    # Three pulls in one block and one in the other: 4.5, and not the mean of 3 and 9.
    assert seen[0] == [4.0, 2.0, 9.0, 3.0]
    assert guide.means() == pytest.approx({arm: sum(xs) / len(xs) for arm, xs in seen.items()})


def test_a_task_that_was_never_pulled_has_no_mean(guide) -> None:
    guide.search.update((1, 1), [1.0, 2.0])
    assert guide.means() == {1: 1.5}
