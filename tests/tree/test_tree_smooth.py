"""What the tree search gains as tasks grow many, on smooth synthetic trees."""

from __future__ import annotations

import functools
import statistics

import pytest

from treelora_cli.tree.search import ExhaustiveSearch, FlatSearch, TreeSearch
from treelora_cli.tree.synthetic import play, regret, smooth_tree, steps_until

SEEDS = range(12)
STEPS = 1000


@functools.cache
def outcomes(kind: str, n: int) -> list[tuple[float, float]]:
    """Regret and steps until 90 % of pulls are among the best 5 %, gamma 0.5 and c 2."""
    found = []
    for seed in SEEDS:
        made = smooth_tree(seed, n, 0.5)
        search = FlatSearch(n, 2.0, made.noise())
        if kind == "tree":
            search = TreeSearch(made.tree, 2.0, made.deltas, made.noise())
        arms = play(search, made.values, 0.1, STEPS, seed)
        reached = steps_until(arms, made.best())
        found.append((regret(arms, made.values), STEPS if reached is None else reached))
    return found


def median(kind: str, n: int, what: int) -> float:
    return statistics.median(found[what] for found in outcomes(kind, n))


def test_the_tree_reaches_the_right_group_in_a_quarter_of_a_flat_searchs_steps() -> None:
    assert median("tree", 256, 1) <= median("flat", 256, 1) / 4


def test_regret_hardly_grows_with_the_number_of_tasks() -> None:
    assert median("tree", 1024, 0) < 1.5 * median("tree", 64, 0)
    assert median("flat", 1024, 0) > 3 * median("flat", 64, 0)


def test_the_tree_is_what_it_says() -> None:
    small, large = smooth_tree(3, 64, 0.5), smooth_tree(3, 1024, 0.5)
    for made, n in ((small, 64), (large, 1024)):
        assert len(made.values) == n
        assert len(made.tree.nodes) == len(made.deltas) == 2 * n - 1
        for node, delta in zip(made.tree.nodes, made.deltas, strict=True):
            values = [made.values[task] for task in node.tasks]
            assert delta == max(values) - min(values)
    # The large one goes on where the small one ends: what is new is a level 7 and smaller.
    rest = [large.values[16 * i] - small.values[i] for i in range(64)]
    assert statistics.pstdev(rest) < 0.5**6
    assert statistics.pstdev(small.values) > 0.3
    assert smooth_tree(4, 64, 0.5).values != small.values
    assert smooth_tree(0, 7, 0.5).tree.depth == 3
    assert smooth_tree(0, 1, 0.5).deltas == (0.0,)


def test_regret_and_steps_by_hand() -> None:
    values = (1.0, 3.0, 2.0)
    assert regret([0, 1, 2, 0], values) == pytest.approx(1.5)
    assert regret([0, 0], (2.0, 2.0)) == 0
    assert steps_until([1, 1, 0, 0, 1, 0, 0, 0], {0}, share=0.75, window=4) == 2
    assert steps_until([1, 1, 0, 0], {0}, window=4) is None
    assert steps_until([0], {0}, window=4) is None
    assert play(ExhaustiveSearch(3), values, 0.0, 4, 0) == [0] * 4
    assert smooth_tree(0, 40, 0.5).best() == frozenset(
        sorted(range(40), key=smooth_tree(0, 40, 0.5).values.__getitem__)[:2]
    )


def test_known_noise_is_the_width_of_the_bounds() -> None:
    made = smooth_tree(0, 8, 0.5)
    search = TreeSearch(made.tree, 1.0, made.deltas, 0.25)
    play(search, made.values, 0.1, 20, 0)
    assert search.statistics()["sigma"] == 0.25
    again = TreeSearch(made.tree, 1.0, made.deltas, 0.25)
    again.load_state(search.state())
    assert [again.bound(node.id) for node in made.tree.nodes] == [
        search.bound(node.id) for node in made.tree.nodes
    ]
