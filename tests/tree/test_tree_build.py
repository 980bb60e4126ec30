"""Building, inserting and balancing against an independent construction in numpy."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
import tree_synthetic as synthetic
from hypothesis import given, settings
from hypothesis import strategies as st

from treelora_cli.errors import UsageError
from treelora_cli.tree.build import (
    build_tree,
    insert,
    is_unbalanced,
    node_mean,
    update_tree,
)
from treelora_cli.tree.nodes import GradientTree
from treelora_cli.tree.signatures import SignatureBank
from treelora_cli.tree.splits import (
    SPLITS,
    _iterated_coordinates,
    axis_share,
    axis_shares,
    principal,
)

RULES = ("principal", "paper", "official")


def bank_from(rows: np.ndarray, widths: tuple[int, ...]) -> SignatureBank:
    return synthetic.bank_of(torch.tensor(np.asarray(rows), dtype=torch.float32), widths)


def groups(tree: GradientTree) -> set[frozenset[int]]:
    return {frozenset(node.tasks) for node in tree.nodes}


def check_shape(tree: GradientTree, n: int) -> None:
    assert len(tree.nodes) == 2 * n - 1
    assert tree.root.tasks == tuple(range(n))
    assert sorted(task for node in tree.nodes if node.is_leaf for task in node.tasks) == list(
        range(n)
    )
    for at, node in enumerate(tree.nodes):
        assert node.id == at
        if node.is_leaf:
            assert (node.split, node.block, node.threshold) == (None, None, None)
            assert (node.radius, node.median, node.spread) == (0, 0, 0)
            continue
        left, right = (tree.nodes[child] for child in node.children)
        assert left.id == at + 1
        assert right.id == at + 1 + 2 * len(left.tasks) - 1
        assert tuple(sorted(left.tasks + right.tasks)) == node.tasks
        assert left.parent == right.parent == at
        assert left.depth == right.depth == node.depth + 1
    for task in range(n):
        path = tree.path_to(task)
        assert path[0] == 0
        assert tree.nodes[path[-1]].tasks == (task,)
        assert all(tree.nodes[b].parent == a for a, b in pairwise(path))


# The same construction written again, with numpy's SVD and plain recursion.


def reference_share(x: np.ndarray) -> float:
    x = x - x.mean(0)
    total = (x**2).sum()
    if total == 0:
        return 0.0
    few, many = sorted((len(x) - 1, x.shape[1]))
    by_chance = min(1, (1 + math.sqrt(few / many)) ** 2 / few)
    return np.linalg.svd(x, compute_uv=False)[0] ** 2 / total / by_chance


def reference_cut(x: np.ndarray, rule: str) -> tuple[list[int], list[int]]:
    n, mean = len(x), x.mean(0)
    if rule == "principal":
        u, s, _ = np.linalg.svd(x - mean, full_matrices=False)
        along = u[:, 0] * s[0]
        for value in along:
            if abs(value) > 1e-6 * abs(along).max():
                along = along if value < 0 else -along
                break
        order = list(np.argsort(along))
        best = max(
            (m for m in range(1, n) if n / 4 <= m <= 3 * n / 4),
            key=lambda m: along[order[m]] - along[order[m - 1]],
        )
        return sorted(order[:best]), sorted(order[best:])
    if rule == "paper":
        order = list(np.argsort(np.abs(x - mean).mean(1)))
        return sorted(order[: (n + 1) // 2]), sorted(order[(n + 1) // 2 :])
    dots = x @ mean
    threshold = sorted(dots)[(n - 1) // 2]
    return [i for i in range(n) if dots[i] >= threshold], [
        i for i in range(n) if dots[i] < threshold
    ]


def reference_groups(x: np.ndarray, widths: tuple[int, ...], rule: str, block_rule: str) -> list:
    ends = np.cumsum((0, *widths))
    slices = [slice(ends[d], ends[d + 1]) for d in range(len(widths))]

    def grow(tasks: list[int], depth: int) -> list:
        if len(tasks) == 1:
            return [tuple(tasks)]
        if block_rule == "index":
            block = min(depth, len(widths) - 1)
        else:
            shares = [round(reference_share(x[tasks][:, part]), 6) for part in slices]
            block = shares.index(max(shares))
        if len(tasks) == 2 and rule != "principal":
            left, right = [0], [1]
        else:
            left, right = reference_cut(x[tasks][:, slices[block]], rule)
        return [
            (tuple(tasks), block),
            *grow([tasks[i] for i in left], depth + 1),
            *grow([tasks[i] for i in right], depth + 1),
        ]

    return grow(list(range(len(x))), 0)


@settings(max_examples=80, deadline=None)
@given(
    n=st.integers(1, 12),
    widths=st.lists(st.integers(2, 7), min_size=1, max_size=4).map(tuple),
    rule=st.sampled_from(RULES),
    block_rule=st.sampled_from(("spread", "index")),
    seed=st.integers(0, 10**6),
)
def test_tree_equals_the_independent_construction(
    n: int, widths: tuple[int, ...], rule: str, block_rule: str, seed: int
) -> None:
    rows = np.random.default_rng(seed).normal(size=(n, sum(widths))).astype(np.float32)
    tree = build_tree(bank_from(rows, widths), rule, block_rule)
    check_shape(tree, n)
    found = [node.tasks if node.is_leaf else (node.tasks, node.block) for node in tree.nodes]
    assert found == reference_groups(rows.astype(np.float64), widths, rule, block_rule)


@settings(max_examples=30, deadline=None)
@given(n=st.integers(2, 9), rule=st.sampled_from(RULES), seed=st.integers(0, 10**6))
def test_radius_and_median_equal_plain_loops(n: int, rule: str, seed: int) -> None:
    widths = (3, 5, 2)
    rows = np.random.default_rng(seed).normal(size=(n, 10)).astype(np.float32)
    bank = bank_from(rows, widths)
    x, ends = rows.astype(np.float64), np.cumsum((0, *widths))

    def distance(a: np.ndarray, b: np.ndarray, scales: list[float]) -> float:
        parts = [np.abs(a - b)[ends[d] : ends[d + 1]].mean() / scales[d] for d in range(3)]
        return sum(parts) / 3

    scales = [
        np.mean([np.abs(row - x.mean(0))[ends[d] : ends[d + 1]].mean() for row in x])
        for d in range(3)
    ]
    for node in build_tree(bank, rule).nodes:
        members = x[list(node.tasks)]
        spans = [distance(row, members.mean(0), scales) for row in members]
        assert node.radius == pytest.approx(max(spans), rel=1e-4, abs=1e-6)
        assert node.median == pytest.approx(float(np.median(spans)), rel=1e-4, abs=1e-6)
        assert node_mean(bank, node).tolist() == pytest.approx(members.mean(0).tolist(), abs=1e-5)


@settings(max_examples=40, deadline=None)
@given(rule=st.sampled_from(RULES), n=st.integers(2, 10), seed=st.integers(0, 10**6))
def test_groups_do_not_depend_on_the_order_of_tasks(rule: str, n: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows, order = rng.normal(size=(n, 8)), rng.permutation(n)
    first = groups(build_tree(bank_from(rows, (4, 4)), rule))
    second = groups(build_tree(bank_from(rows[order], (4, 4)), rule))
    assert {frozenset(int(order[i]) for i in group) for group in second} == first


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("block_rule", ["spread", "index"])
@pytest.mark.parametrize("rows", [np.zeros((7, 6)), np.full((7, 6), 1 / 3), np.full((7, 6), 1e30)])
def test_tasks_that_cannot_be_told_apart_are_cut_by_index(
    rule: str, block_rule: str, rows: np.ndarray
) -> None:
    tree = build_tree(bank_from(rows, (2, 4)), rule, block_rule)
    check_shape(tree, 7)
    assert tree.nodes[1].tasks == (0, 1, 2, 3)
    assert all(node.threshold is None for node in tree.nodes)
    assert {node.split for node in tree.nodes if not node.is_leaf} == {"index"}
    assert tree.depth == 3


@pytest.mark.parametrize("rule", RULES)
def test_one_and_two_tasks(rule: str) -> None:
    one = build_tree(bank_from(np.ones((1, 4)), (4,)), rule)
    check_shape(one, 1)
    assert one.depth == 0
    two = build_tree(bank_from(np.array([[1.0, 2, 3, 4], [0, 5, 1, 1]]), (4,)), rule)
    check_shape(two, 2)
    assert [node.tasks for node in two.nodes] == [(0, 1), (0,), (1,)]


def test_equal_values_at_a_paper_cut_go_by_index() -> None:
    # Distances to the mean (0): 1, 1, 1, 1, 3, 3: the median lies among equal values.
    rows = np.array([[1.0], [-1], [1], [-1], [3], [-3]])
    tree = build_tree(bank_from(rows, (1,)), "paper")
    assert tree.nodes[1].tasks == (0, 1, 2)
    assert tree.root.threshold == pytest.approx(1)


def test_equal_values_at_an_official_cut_stay_together() -> None:
    rows = np.array([[1.0], [2], [2], [2], [5]])
    tree = build_tree(bank_from(rows, (1,)), "official")
    assert tree.nodes[1].tasks == (1, 2, 3, 4)
    assert tree.root.threshold == pytest.approx(2 * 2.4)


def test_principal_cuts_at_the_widest_gap_of_the_middle_half() -> None:
    rows = torch.tensor([[0.0], [1], [2], [3], [7], [8], [9], [40]])
    # The widest gap of all (9 to 40) would leave one task alone; 3 to 7 is the widest inside.
    cut = principal(rows)
    assert cut.left == (0, 1, 2, 3)
    assert cut.threshold == pytest.approx(5 - float(rows.mean()))
    # Equal gaps: the most balanced cut.
    assert principal(torch.arange(8.0).unsqueeze(1)).left == (0, 1, 2, 3)


def test_principal_axis_of_many_tasks_and_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = synthetic.clusters(1, n=40, groups=2)
    exact = principal(problem.bank.values)
    monkeypatch.setattr("treelora_cli.tree.sampling.EXACT_TASKS", 8)
    iterated = principal(problem.bank.values)
    assert (exact.left, exact.right) == (iterated.left, iterated.right)
    monkeypatch.undo()
    monkeypatch.setattr("treelora_cli.tree.splits._COLUMNS", 7)
    parts = principal(problem.bank.values)
    assert parts.left == exact.left
    assert parts.threshold == pytest.approx(exact.threshold)


def test_power_iteration_finds_the_axis() -> None:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(30, 20, generator=rng) * torch.linspace(2, 0.1, 20)
    along = np.array(_iterated_coordinates(rows - rows.mean(0)))
    largest = np.linalg.svd((rows - rows.mean(0)).double().numpy(), compute_uv=False)[0]
    assert (along**2).sum() == pytest.approx(largest**2, rel=1e-3)


def test_axis_share_is_one_by_chance_whatever_the_shape() -> None:
    rng = torch.Generator().manual_seed(0)
    for n, width in ((8, 2000), (64, 32), (32, 64), (300, 16)):
        noise = torch.randn(n, width, generator=rng)
        assert axis_share(noise) == pytest.approx(1, abs=0.15)
        grouped = noise + 3 * (torch.arange(n) % 2).unsqueeze(1)
        assert axis_share(grouped) > 1.5
        assert axis_share(1000 * grouped) == pytest.approx(axis_share(grouped), rel=1e-4)


def test_shares_of_all_blocks_at_once_are_those_of_each() -> None:
    rng = torch.Generator().manual_seed(0)
    widths = (7, 3, 12)
    for n in (2, 3, 9, 40):
        blocks = [torch.randn(n, width, generator=rng) * (1 + width) for width in widths]
        blocks[1][:] = 0.3
        filled = torch.zeros(3, n, 12, dtype=torch.float64)
        for d, block in enumerate(blocks):
            filled[d, :, : widths[d]] = block
        found = axis_shares(filled, torch.tensor(widths))
        assert found == pytest.approx([axis_share(block) for block in blocks], rel=1e-5)
        assert found[1] == 0


def test_spread_finds_the_block_that_tells_tasks_apart() -> None:
    problem = synthetic.clusters(3, n=32, groups=4, informative=1)
    flat = problem.bank.values.view(32, 8, 32)
    between = [
        float(
            torch.stack(
                [flat[torch.tensor(problem.labels) == g, d].mean(0) for g in range(4)]
            ).std()
        )
        for d in range(8)
    ]
    tree = build_tree(problem.bank)
    assert tree.root.block == between.index(max(between))
    assert tree.root.spread > 1.3


def test_index_rule_takes_the_level_and_then_the_last_block() -> None:
    tree = build_tree(synthetic.clusters(0, n=32, blocks=2).bank, block_rule="index")
    assert {node.block for node in tree.nodes if not node.is_leaf and node.depth == 0} == {0}
    assert {node.block for node in tree.nodes if not node.is_leaf and node.depth > 0} == {1}


def test_near_duplicates_are_siblings() -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(4, 20))
    rows = np.concatenate([base, base + 1e-3 * rng.normal(size=(4, 20))])
    tree = build_tree(bank_from(rows, (10, 10)))
    assert {frozenset({i, i + 4}) for i in range(4)} <= groups(tree)


@pytest.mark.parametrize(
    ("count", "informative", "least"),
    [(2, None, 0.97), (4, None, 0.72), (8, None, 0.72), (2, 2, 0.97), (4, 2, 0.72), (8, 2, 0.7)],
)
def test_purity_of_the_default_tree(count: int, informative: int | None, least: float) -> None:
    problems = [synthetic.clusters(s, groups=count, informative=informative) for s in range(6)]
    found = [synthetic.purity(build_tree(p.bank), p.labels) for p in problems]
    assert sum(found) / len(found) >= least


def test_purity_of_the_other_rules_is_lower() -> None:
    problems = [synthetic.clusters(s, groups=8) for s in range(6)]
    mean = {
        rule: sum(synthetic.purity(build_tree(p.bank, rule), p.labels) for p in problems) / 6
        for rule in RULES
    }
    assert mean["paper"] < mean["official"] < mean["principal"] - 0.1


def test_insert_descends_to_the_nearer_branch() -> None:
    problem = synthetic.clusters(0, n=24, groups=3)
    bank = problem.bank
    tree = build_tree(bank)
    scales = bank.scales()
    grown_bank = bank.add("new", bank.values[5] + 1e-4, torch.ones(8))
    grown = insert(tree, grown_bank, 24)
    check_shape(grown, 25)
    assert groups(grown) >= {frozenset({24}), frozenset({5})}
    node, new_scales = tree.root, grown_bank.scales()
    assert not torch.equal(scales, new_scales)
    while not node.is_leaf:
        gaps = [
            float((bank.block_distances(node_mean(bank, tree.nodes[c]))[5] / new_scales).mean())
            for c in node.children
        ]
        node = tree.nodes[node.children[gaps.index(min(gaps))]]
    assert frozenset({node.tasks[0], 24}) in groups(grown)
    # Cuts above the leaf stay, radii belong to the grown bank.
    assert grown.root.threshold == tree.root.threshold
    spans = grown_bank.block_distances(node_mean(grown_bank, grown.root)) / new_scales
    assert grown.root.radius == pytest.approx(float(spans.mean(1).max()))


def test_insert_refuses_what_is_not_next() -> None:
    bank = synthetic.clusters(0, n=6, groups=2).bank
    tree = build_tree(bank)
    for index in (5, 6, 7):
        with pytest.raises(ValueError):
            insert(tree, bank, index)


def test_unbalanced_chains_are_built_anew() -> None:
    # Each task lies further out than all before: every insertion lands on the same side.
    bank = bank_from(np.array([[1.0], [2.0]]), (1,))
    tree = build_tree(bank)
    for i in range(2, 12):
        bank = bank.add(f"far{i}", torch.tensor([2.0**i]), torch.ones(1))
        tree = insert(tree, bank, i)
    assert tree.depth == 11
    assert is_unbalanced(tree)
    rebuilt = update_tree(None, bank, rebuild="unbalanced")
    assert not is_unbalanced(rebuilt)
    assert rebuilt == build_tree(bank)


@pytest.mark.parametrize("rule", RULES)
def test_fresh_trees_are_balanced_and_shallow(rule: str) -> None:
    for seed in range(5):
        bank = synthetic.clusters(seed, n=50).bank
        tree = build_tree(bank, rule)
        assert not is_unbalanced(tree)
        assert tree.depth <= math.log(50) / math.log(4 / 3)


def test_update_with_always_depends_on_the_signatures_alone() -> None:
    bank, grown, tree = synthetic.clusters(2, n=20).bank, None, None
    grown = SignatureBank.empty(bank.widths)
    inserted = None
    for i, name in enumerate(bank.names):
        grown = grown.add(name, bank.values[i], torch.ones(8))
        tree = update_tree(tree, grown)
        inserted = update_tree(inserted, grown, rebuild="unbalanced")
        check_shape(inserted, i + 1)
        assert not is_unbalanced(inserted)
    assert tree == build_tree(bank)
    assert inserted != tree


def test_unknown_rules_are_usage_errors() -> None:
    bank = synthetic.clusters(0, n=4, groups=2).bank
    tree = build_tree(bank)
    for call in (
        lambda: build_tree(bank, "principle"),
        lambda: build_tree(bank, "paper", "level"),
        lambda: update_tree(tree, bank, rebuild="never"),
    ):
        with pytest.raises(UsageError):
            call()
    with pytest.raises(ValueError):
        build_tree(SignatureBank.empty((3,)))
    assert set(SPLITS) == set(RULES)
