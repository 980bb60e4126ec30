"""The searches against a recomputation of every count and bound from the log of pulls."""

from __future__ import annotations

import json
import math
import random
import statistics
import time

import pytest
import torch
import tree_synthetic as synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora_cli.errors import DivergedError, RunDirError, UsageError
from treelora_cli.tree.build import build_tree
from treelora_cli.tree.nodes import GradientTree
from treelora_cli.tree.scopes import ScopedSearch, make_search, node_deltas
from treelora_cli.tree.search import (
    ExhaustiveSearch,
    FlatSearch,
    RandomSearch,
    TreeSearch,
)
from treelora_cli.tree.synthetic import smooth_tree

Log = list[tuple[int, float]]


def random_tree(n: int, seed: int, split: str = "principal") -> GradientTree:
    rng = torch.Generator().manual_seed(seed)
    return build_tree(synthetic.bank_of(torch.randn(n, 6, generator=rng), (2, 4)), split)


def never() -> torch.Tensor:
    raise AssertionError("only the exhaustive search may look at all distances")


def sigma_of(log: Log) -> float:
    """Deviation of all xi up to the last power of two."""
    if not log:
        return 0.0
    return statistics.pstdev(xi for _, xi in log[: 1 << (len(log).bit_length() - 1)])


def tree_bounds(tree: GradientTree, c: float, deltas: list[float], log: Log) -> dict[int, float]:
    """Every bound of Eq. 2, worked out from nothing."""
    sigma = sigma_of(log)
    seen = {node.id: [xi for arm, xi in log if arm in node.tasks] for node in tree.nodes}
    bounds: dict[int, float] = {}

    def bound(at: int) -> float:
        node = tree.nodes[at]
        below = [bound(child) for child in node.children]
        value = -math.inf
        if seen[at]:
            above = seen[at if node.parent is None else node.parent]
            bonus = c * sigma * math.sqrt(math.log(1 + len(above)) / len(seen[at]))
            value = sum(seen[at]) / len(seen[at]) - bonus
            if below:
                value = max(min(below), value - deltas[at])
        bounds[at] = value
        return value

    bound(0)
    return bounds


def descend(tree: GradientTree, bounds: dict[int, float]) -> int:
    node = tree.root
    while node.children:
        node = tree.nodes[min(node.children, key=lambda child: (bounds[child], child))]
    return node.tasks[0]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 12),
    seed=st.integers(0, 10**6),
    split=st.sampled_from(("principal", "paper", "official")),
    c=st.sampled_from((0.0, 0.3, 2.0)),
    delay=st.integers(0, 3),
)
def test_tree_search_equals_the_recomputation(
    n: int, seed: int, split: str, c: float, delay: int
) -> None:
    tree, rng = random_tree(n, seed, split), random.Random(seed)
    deltas = [rng.random() for _ in tree.nodes]
    worth = [rng.random() * 2 for _ in range(n)]
    search, log, waiting = TreeSearch(tree, c, deltas), [], []
    for _ in range(40):
        bounds = tree_bounds(tree, c, deltas, log)
        for node in tree.nodes:
            assert search.bound(node.id) == pytest.approx(bounds[node.id], abs=1e-9)
        arm = search.choose(never)
        assert arm == descend(tree, bounds)
        assert search.path() == tree.path_to(arm)
        waiting.append((arm, worth[arm] + rng.gauss(0, 0.3)))
        if len(waiting) > delay:
            log.append(waiting.pop(0))
            search.update(*log[-1])
    counts = [sum(pulled == arm for pulled, _ in log) for arm in range(n)]
    found = search.statistics()
    assert found["pulls"] == counts
    assert found["total"] == len(log)
    assert found["sigma"] == pytest.approx(sigma_of(log))
    for arm in range(n):
        seen = [xi for pulled, xi in log if pulled == arm]
        expected = sum(seen) / len(seen) if seen else None
        assert found["means"][arm] == (None if expected is None else pytest.approx(expected))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 9), seed=st.integers(0, 10**6), c=st.sampled_from((0.0, 0.3, 2.0)))
def test_flat_search_equals_the_recomputation(n: int, seed: int, c: float) -> None:
    rng, search, log = random.Random(seed), FlatSearch(n, c), []
    worth = [rng.random() for _ in range(n)]
    for _ in range(40):
        sigma = sigma_of(log)
        bounds = []
        for arm in range(n):
            seen = [xi for pulled, xi in log if pulled == arm]
            bonus = c * sigma * math.sqrt(math.log(1 + len(log)) / len(seen)) if seen else 0
            bounds.append(sum(seen) / len(seen) - bonus if seen else -math.inf)
        arm = search.choose(never)
        assert arm == bounds.index(min(bounds))
        log.append((arm, worth[arm] + rng.gauss(0, 0.3)))
        search.update(*log[-1])
    assert search.path() == ()


def test_worked_example_by_hand() -> None:
    # Two arms: root 0, leaves 1 and 2. Pulls: arm 0 -> 1.0, arm 1 -> 2.0; sigma = 0.5.
    tree = random_tree(2, 0)
    search = TreeSearch(tree, 2.0, [0.25, 0, 0])
    assert search.choose(never) == 0
    search.update(0, 1.0)
    assert search.choose(never) == 1
    search.update(1, 2.0)
    bonus = 2 * 0.5 * math.sqrt(math.log(3))
    assert search.bound(1) == pytest.approx(1 - bonus)
    assert search.bound(2) == pytest.approx(2 - bonus)
    root = 1.5 - 2 * 0.5 * math.sqrt(math.log(3) / 2) - 0.25
    assert search.bound(0) == pytest.approx(max(1 - bonus, root))


def test_ties_go_left_and_to_the_lower_index() -> None:
    tree = random_tree(4, 1)
    search = TreeSearch(tree, 0.0, [0.0] * 7)
    left = tree.root.children[0]
    while tree.nodes[left].children:
        left = tree.nodes[left].children[0]
    assert search.choose(never) == tree.nodes[left].tasks[0]
    for arm in range(4):
        search.update(arm, 1.0)
    assert search.choose(never) == tree.nodes[left].tasks[0]
    flat = FlatSearch(3, 0.0)
    for arm in range(3):
        assert flat.choose(never) == arm
        flat.update(arm, 1.0)
    assert flat.choose(never) == 0
    assert ExhaustiveSearch(3).choose(lambda: torch.tensor([2.0, 1.0, 1.0])) == 1


def test_a_refresh_happens_only_at_powers_of_two() -> None:
    search = FlatSearch(1, 1.0)
    seen = []
    for step in range(1, 20):
        search.update(0, float(step % 3))
        seen.append(search.statistics()["sigma"])
    changes = [i + 1 for i in range(1, 19) if seen[i] != seen[i - 1]]
    assert changes == [2, 4, 8, 16]


def test_random_search_is_uniform_and_repeatable() -> None:
    draws = [RandomSearch(8, 7) for _ in range(2)]
    arms = [[search.choose(never) for _ in range(4000)] for search in draws]
    assert arms[0] == arms[1]
    assert all(abs(arms[0].count(arm) / 4000 - 1 / 8) < 0.02 for arm in range(8))
    assert arms[0] != [RandomSearch(8, 8).choose(never) for _ in range(4000)]


@pytest.mark.parametrize("kind", ["tree", "flat", "random", "exhaustive"])
@pytest.mark.parametrize("scope", ["model", "block"])
def test_state_survives_json_at_any_step(kind: str, scope: str) -> None:
    problem = synthetic.clusters(0, n=12, groups=3, blocks=4)
    bank, tree = problem.bank, build_tree(problem.bank)
    scales = bank.scales()

    def new() -> ScopedSearch:
        return make_search(kind, tree, bank, scope=scope, seed=5)

    def step(search: ScopedSearch, rng: random.Random) -> tuple[int, ...]:
        query = problem.query + rng.gauss(0, 0.5)
        arms = search.choose(lambda: bank.scaled_distances(query, scales))
        search.update(arms, bank.pull(query, arms, scales).tolist())
        return arms

    whole, rng = new(), random.Random(0)
    arms = [step(whole, rng) for _ in range(21)]
    again, rng = new(), random.Random(0)
    for at in range(21):
        saved = json.loads(json.dumps(again.state(), allow_nan=False))
        again = new()
        again.load_state(saved)
        assert again.state() == saved
        assert step(again, rng) == arms[at]
    assert again.statistics() == whole.statistics()
    assert again.paths() == whole.paths()
    assert len(arms[0]) == (1 if scope == "model" else 4)


def test_block_scope_is_one_independent_search_a_block() -> None:
    problem = synthetic.clusters(0, n=12, groups=3, blocks=4)
    bank, tree = problem.bank, build_tree(problem.bank)
    table = bank.scaled_distances(problem.query, bank.scales())
    both = make_search("tree", tree, bank, scope="block", c=0.5, delta="bound")
    deltas = node_deltas(tree, bank, "bound", "block")
    alone = [TreeSearch(tree, 0.5, deltas[d]) for d in range(4)]
    for _ in range(30):
        arms = both.choose(never)
        assert list(arms) == [search.choose(never) for search in alone]
        xis = [float(table[arm, d]) for d, arm in enumerate(arms)]
        both.update(arms, xis)
        for search, arm, xi in zip(alone, arms, xis, strict=True):
            search.update(arm, xi)
    exhaustive = make_search("exhaustive", tree, bank, scope="block")
    assert list(exhaustive.choose(lambda: table)) == table.argmin(0).tolist()
    whole = make_search("exhaustive", tree, bank)
    assert whole.choose(lambda: table) == (int(table.mean(1).argmin()),)


@pytest.mark.parametrize("scope", ["model", "block"])
def test_deltas_equal_plain_loops(scope: str) -> None:
    problem = synthetic.clusters(4, n=14, groups=3, blocks=3, width=5)
    bank, tree = problem.bank, build_tree(problem.bank)
    rows, c = bank.values.view(14, 3, 5).double(), bank.scales().double()

    def terms(a: torch.Tensor, b: torch.Tensor) -> list[float]:
        parts = ((a - b).abs().mean(1) / c).tolist()
        return [sum(parts) / 3] if scope == "model" else parts

    for delta in ("observed", "median", "bound"):
        found = node_deltas(tree, bank, delta, scope)
        assert len(found) == (1 if scope == "model" else 3)
        for node in tree.nodes:
            expected = []
            for column in range(len(found)):
                members = list(node.tasks)
                spans = [terms(rows[k], rows[members].mean(0))[column] for k in members]
                seen = [
                    [terms(rows[q], rows[k])[column] for k in members if k != q] for q in range(14)
                ]
                gaps = [statistics.mean(far) - min(far) for far in seen if far]
                expected.append(
                    {
                        "observed": max(gaps),
                        "median": statistics.median(spans),
                        "bound": 2 * max(spans),
                    }[delta]
                )
            got = [column[node.id] for column in found]
            assert got == pytest.approx(expected, rel=1e-4, abs=1e-5)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 10), seed=st.integers(0, 10**6))
def test_bound_delta_never_hides_a_member(n: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    bank = synthetic.bank_of(torch.randn(n, 7, generator=rng), (2, 5))
    tree = build_tree(bank)
    xis = bank.xi_all(torch.randn(7, generator=rng), bank.scales()).tolist()
    for node, delta in zip(tree.nodes, node_deltas(tree, bank, "bound")[0], strict=True):
        # Whatever mixture of members was pulled, its mean less delta is below the best member.
        assert max(xis[k] for k in node.tasks) - delta <= min(xis[k] for k in node.tasks) + 1e-5


def test_observed_delta_with_more_tasks_than_observers() -> None:
    bank = synthetic.clusters(0, n=50, groups=5).bank
    tree = build_tree(bank)
    wide, narrow = node_deltas(tree, bank, "bound")[0], node_deltas(tree, bank, "observed")[0]
    assert all(
        0 <= few < many or node.is_leaf
        for few, many, node in zip(narrow, wide, tree.nodes, strict=True)
    )


def test_a_single_task_is_always_the_arm() -> None:
    bank = synthetic.clusters(0, n=1, groups=1).bank
    tree = build_tree(bank)
    for kind in ("tree", "flat", "random", "exhaustive"):
        search = make_search(kind, tree, bank)
        for _ in range(5):
            assert search.choose(lambda: torch.zeros(1, 8)) == (0,)
            search.update((0,), [1.0])
    assert make_search("tree", tree, bank).paths() == ((),)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["tree", "flat", "random", "exhaustive"])
def test_feedback_that_is_not_finite_is_refused(kind: str, bad: float) -> None:
    bank = synthetic.clusters(0, n=4, groups=2).bank
    search = make_search(kind, build_tree(bank), bank)
    before = search.state()
    with pytest.raises(DivergedError):
        search.update((1,), [bad])
    assert search.state() == before


def test_foreign_states_are_refused() -> None:
    bank = synthetic.clusters(0, n=4, groups=2).bank
    tree = build_tree(bank)
    search = make_search("tree", tree, bank)
    search.update(search.choose(never), [1.0])
    good = search.state()["searches"][0]
    other = make_search("flat", tree, bank).state()
    damaged = [
        {},
        other,
        {"searches": [good, good]},
        {"searches": [{**good, "slots": 9}]},
        {"searches": [{**good, "visited": [[99, 1, 1.0]]}]},
        {"searches": [{**good, "last": 99}]},
        {"searches": [{key: good[key] for key in good if key != "sigma"}]},
    ]
    for state in damaged:
        with pytest.raises(RunDirError):
            make_search("tree", tree, bank).load_state(state)


def test_unknown_choices_are_usage_errors() -> None:
    bank = synthetic.clusters(0, n=4, groups=2).bank
    tree = build_tree(bank)
    for call in (
        lambda: make_search("bandit", tree, bank),
        lambda: make_search("tree", tree, bank, scope="layer"),
        lambda: make_search("tree", tree, bank, delta="mean"),
    ):
        with pytest.raises(UsageError):
            call()
    with pytest.raises(ValueError):
        FlatSearch(0, 1.0)
    with pytest.raises(ValueError):
        TreeSearch(tree, 1.0, [0.0])


def balanced(depth: int) -> GradientTree:
    """A full tree without signatures, 2 ** depth arms."""
    return smooth_tree(0, 2**depth, 0.5).tree


def test_a_step_renews_the_path_and_its_siblings_only(monkeypatch: pytest.MonkeyPatch) -> None:
    tree = balanced(7)
    search = TreeSearch(tree, 1.0, [0.1] * 255)
    renewed: list[int] = []
    inner = TreeSearch._renew
    monkeypatch.setattr(
        TreeSearch, "_renew", lambda self, at: (renewed.append(at), inner(self, at))[1]
    )
    for step in range(1, 200):
        renewed.clear()
        search.update(search.choose(never), 1 + 0.001 * step)
        if step & (step - 1):
            assert len(renewed) == 2 * 7 + 1
        else:
            assert len(renewed) <= 8 * step


def test_a_step_over_many_tasks_is_quick() -> None:
    search = TreeSearch(balanced(14), 1.0, [0.1] * (2**15 - 1))
    rng = random.Random(0)
    best = math.inf
    for _ in range(20):
        start = time.perf_counter()
        for _ in range(50):
            search.update(search.choose(never), rng.random())
        best = min(best, (time.perf_counter() - start) / 50)
    assert best < 1e-4  # seconds a step for 16 384 tasks
