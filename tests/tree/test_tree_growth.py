"""Insertion along one path, shared banks and samples, with the limits lowered to a few tasks."""

from __future__ import annotations

import json
import statistics

import numpy as np
import pytest
import torch
import tree_synthetic as synthetic

from treelora_cli.tree import sampling
from treelora_cli.tree.build import build_tree, insert, is_unbalanced, update_tree
from treelora_cli.tree.groups import below, group_mean
from treelora_cli.tree.nodes import GradientTree, Group
from treelora_cli.tree.penalty import PathTargets
from treelora_cli.tree.scopes import node_deltas
from treelora_cli.tree.serial import from_document, to_document
from treelora_cli.tree.signatures import SignatureBank, xi_of

WIDTHS = (6, 3, 9)


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "EXACT_TASKS", 8)
    monkeypatch.setattr(sampling, "EXACT_MEMBERS", 4)
    monkeypatch.setattr(sampling, "SUMMED_MEMBERS", 3)


def signatures(n: int, seed: int) -> torch.Tensor:
    """Clusters whose entries differ by many powers of ten, so that the order of a sum shows."""
    rng = torch.Generator().manual_seed(seed)
    centres = torch.randn(5, sum(WIDTHS), generator=rng)
    rows = centres[torch.randint(5, (n,), generator=rng)] + torch.randn(
        n, sum(WIDTHS), generator=rng
    )
    return rows * 10 ** torch.linspace(-3, 3, sum(WIDTHS)) + 10.0 * (torch.arange(n) % 2)[:, None]


def bank_of(rows: torch.Tensor) -> SignatureBank:
    bank = SignatureBank.empty(WIDTHS)
    for i, row in enumerate(rows):
        bank = bank.add(f"T{i}", row, torch.ones(3))
    return bank


def text(tree: GradientTree, bank: SignatureBank) -> str:
    return json.dumps(to_document(tree, bank), allow_nan=False)


# Written again with numpy and plain loops.


def some(tasks: list[int], limit: int) -> list[int]:
    step = 1
    while len(tasks[::step]) > limit:
        step *= 2
    return tasks[::step]


def distance(a: np.ndarray, b: np.ndarray, scales: list[float]) -> float:
    ends = np.cumsum((0, *WIDTHS))
    return float(
        np.mean([np.abs(a - b)[ends[d] : ends[d + 1]].mean() / scales[d] for d in range(3)])
    )


def spans(rows: np.ndarray, tasks: list[int], scales: list[float]) -> list[float]:
    members = rows[some(tasks, 4)]
    return [distance(row, members.mean(0), scales) for row in members]


def by_tasks(tree: GradientTree) -> dict[tuple[int, ...], Group]:
    return {group.tasks: group for group in below(tree.top)}


@pytest.mark.parametrize("seed", range(3))
def test_an_insertion_equals_the_brute_force(seed: int, small_limits: None) -> None:
    rows = signatures(40, seed)
    plain = rows.double().numpy()
    bank = bank_of(rows[:9])
    tree = build_tree(bank)
    kept = 0
    for index in range(9, 40):
        before, old = by_tasks(tree), tree
        bank = bank.add(f"T{index}", rows[index], torch.ones(3))
        tree = insert(old, bank, index)
        scales = bank.scales().tolist()
        path = [old.top]
        while path[-1].children:
            sides = path[-1].children
            means = [plain[list(side.tasks)].mean(0) for side in sides]
            gaps = [distance(plain[index], mean, scales) for mean in means]
            path.append(sides[gaps.index(min(gaps))])
        after = by_tasks(tree)
        expected = {(*group.tasks, index) for group in path} | {(index,)}
        assert set(after) == (set(before) - {g.tasks for g in path[:-1]}) | expected
        for group in path:
            grown = after[(*group.tasks, index)]
            renewed = some(list(grown.tasks), 4) != some(list(group.tasks), 4)
            if renewed or not group.children:
                found = spans(plain, list(grown.tasks), scales)
                assert grown.radius == pytest.approx(max(found), rel=1e-4)
                assert grown.median == pytest.approx(statistics.median(found), rel=1e-4)
            else:
                kept += 1
                assert (grown.radius, grown.median) == (group.radius, group.median)
            if group.children:
                assert (grown.split, grown.block, grown.threshold) == (
                    group.split, group.block, group.threshold,
                )  # fmt: skip
        assert all(
            after[tasks] is before[tasks] for tasks in set(after) & set(before) - {path[-1].tasks}
        )
        assert by_tasks(old) == before
    assert kept > 20


def test_while_the_bank_is_small_all_radii_are_renewed() -> None:
    rows = signatures(12, 0)
    tree = build_tree(bank_of(rows[:11]))
    bank = bank_of(rows)
    old = [(group.radius, group.median) for group in below(tree.top)]
    grown = insert(tree, bank, 11)
    for group in below(grown.top):
        tasks = list(group.tasks)
        members = rows.double().numpy()[tasks]
        found = [distance(row, members.mean(0), bank.scales().tolist()) for row in members]
        assert group.radius == pytest.approx(max(found), rel=1e-4, abs=1e-9)
    assert [(group.radius, group.median) for group in below(tree.top)] == old


@pytest.mark.parametrize("rebuild", ["auto", "unbalanced"])
def test_a_tree_read_back_grows_as_the_one_in_memory(rebuild: str, small_limits: None) -> None:
    # Sizes so far apart that a sum depends on its order, even in float64.
    rows = signatures(60, 1) * 10.0 ** (7 * torch.arange(60) % 15 - 7).unsqueeze(1)
    bank, tree = bank_of(rows[:3]), None
    for index in range(3, 60):
        bank = bank.add(f"T{index}", rows[index], torch.ones(3))
        if tree is not None:
            again = from_document(json.loads(text(tree, bank_of(rows[:index]))))
            plain = SignatureBank(bank.names, rows[: index + 1].clone(), WIDTHS, bank.displacements)
            read = update_tree(again, plain, rebuild=rebuild)
        tree = update_tree(tree, bank, rebuild=rebuild)
        if index > 3:
            assert text(read, plain) == text(tree, bank)
    sums = 0
    for group in below(tree.top):
        if group.total is None:
            continue
        sums += 1
        anew = Group(group.tasks)
        group_mean(anew, bank)
        assert torch.equal(anew.total, group.total)
    assert sums > 5


def test_auto_builds_anew_up_to_the_limit_and_inserts_above(small_limits: None) -> None:
    rows = signatures(20, 2)
    bank, tree = SignatureBank.empty(WIDTHS), None
    for index, row in enumerate(rows):
        bank = bank.add(f"T{index}", row, torch.ones(3))
        before, tree = tree, update_tree(tree, bank)
        if index < 8:
            assert tree == build_tree(bank)
        else:
            shared = {id(group) for group in below(before.top)} & {
                id(group) for group in below(tree.top)
            }
            assert shared
        assert not is_unbalanced(tree)
    assert tree != build_tree(bank)


def test_only_the_group_out_of_balance_is_built_anew(small_limits: None) -> None:
    # Ever further out on one side: each insertion lands at the same end.
    rows = torch.cat([-(2.0 ** torch.arange(12)), 2.0 ** torch.arange(30)]).unsqueeze(1)
    bank = SignatureBank.empty((1,))
    for i in range(14):
        bank = bank.add(f"T{i}", rows[i], torch.ones(1))
    tree = build_tree(bank)
    parts = 0
    for i in range(14, 42):
        bank = bank.add(f"T{i}", rows[i], torch.ones(1))
        plain = insert(tree, bank, i)
        kept = {id(group) for group in below(tree.top)}
        tree = update_tree(tree, bank)
        assert not is_unbalanced(tree)
        assert sorted(node.tasks for node in tree.nodes if node.is_leaf) == [
            (k,) for k in range(i + 1)
        ]
        if is_unbalanced(plain):
            parts += any(id(group) in kept and group.children for group in below(tree.top))
    assert parts > 3


def test_banks_that_grew_from_one_another_share_storage_and_stay_intact() -> None:
    rows = torch.arange(30.0).unsqueeze(1).repeat(1, 4)
    banks = [SignatureBank.empty((1, 3))]
    for i in range(20):
        banks.append(banks[-1].add(f"T{i}", rows[i], torch.full((2,), float(i))))
    moves = len({bank.values.data_ptr() for bank in banks[1:]})
    assert moves < 10
    first, second = (
        banks[10].add("new", rows[25], torch.ones(2)),
        banks[10].add("other", rows[26], torch.ones(2)),
    )
    third = first.add("other", rows[27], torch.ones(2))
    for size, bank in enumerate(banks):
        assert len(bank) == size
        assert torch.equal(bank.values, rows[:size])
        assert bank.displacements[:, 0].tolist() == list(range(size))
    assert [bank.values[-1, 0].item() for bank in (first, second, third)] == [25, 26, 27]
    assert first.names[-1] == "new"
    assert torch.equal(second.values[:10], rows[:10])
    with pytest.raises(ValueError, match="twice"):
        third.add("new", rows[0], torch.ones(2))
    with pytest.raises(ValueError, match="twice"):
        second.add("T3", rows[0], torch.ones(2))
    assert len(banks[10].add("T15", rows[0], torch.ones(2))) == 11


def test_scales_are_kept_for_the_rows_they_belong_to(small_limits: None) -> None:
    rows = signatures(30, 3)
    banks = [bank_of(rows[:5])]
    for i in range(5, 30):
        banks.append(banks[-1].add(f"T{i}", rows[i], torch.ones(3)))
    for bank in [*banks, *reversed(banks)]:
        sample = some(list(range(len(bank))), 8)
        part = rows[sample].double().numpy()
        gaps = np.abs(part - part.mean(0)).mean(0)
        expected = [gaps[a:b].mean() for a, b in ((0, 6), (6, 9), (9, 18))]
        assert bank.scales().tolist() == pytest.approx(expected, rel=1e-4)
    other = banks[3].add("other", 1e6 * rows[0], torch.ones(3))
    assert not torch.allclose(other.scales(), banks[4].scales())


def everything(bank: SignatureBank) -> list[object]:
    tree = build_tree(bank)
    targets = PathTargets(tree, bank)
    deltas = [
        node_deltas(tree, bank, delta, scope)
        for delta in ("observed", "median", "bound")
        for scope in ("model", "block")
    ]
    reached = [targets.of_arms([task]).tolist() for task in range(len(bank))]
    return [text(tree, bank), bank.scales().tolist(), deltas, reached]


def test_nothing_is_sampled_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = synthetic.clusters(0, n=40, groups=4, blocks=3, width=40)
    monkeypatch.setattr(sampling, "EXACT_MEMBERS", 4)
    monkeypatch.setattr(sampling, "ENTRIES", 8)
    exact = everything(problem.bank)
    for limit, same in ((40, True), (39, False)):
        monkeypatch.setattr(sampling, "EXACT_TASKS", limit)
        assert [a == b for a, b in zip(everything(problem.bank), exact, strict=True)] == [same] * 4
    assert sampling.evenly(range(256), 256) == range(256)
    assert sampling.EXACT_TASKS == 39
    monkeypatch.undo()
    assert sampling.EXACT_TASKS == 256


def test_samples_are_even_and_keep_still() -> None:
    assert list(sampling.evenly(range(257), 256)) == list(range(0, 257, 2))
    changes = [
        n for n in range(257, 2049)
        if sampling.evenly(range(n), 256) != sampling.evenly(range(n - 1), 256)
    ]  # fmt: skip
    assert len(changes) < 600
    assert all(128 < len(sampling.evenly(range(n), 256)) <= 256 for n in range(257, 5000))
    columns, counts = sampling.some_entries((4096, 100, 300), 128)
    assert counts == (125, 100, 100)
    assert columns[:3].tolist() == [0, 33, 66]
    assert columns[125:225].tolist() == list(range(4096, 4196))
    assert int(columns[-1]) < 4496


def test_samples_say_nearly_what_all_say(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = synthetic.clusters(1, n=400, groups=4, width=100)
    bank = problem.bank
    monkeypatch.setattr(sampling, "EXACT_TASKS", 1000)
    tree, scales = build_tree(bank), bank.scales()
    deltas = node_deltas(tree, bank, "observed")[0]
    monkeypatch.setattr(sampling, "EXACT_TASKS", 100)
    rough = build_tree(bank)
    assert bank.scales().tolist() == pytest.approx(scales.tolist(), rel=0.05)
    assert rough.root.median == pytest.approx(tree.root.median, rel=0.1)
    assert synthetic.purity(rough, problem.labels) >= synthetic.purity(tree, problem.labels) - 0.05
    targets = PathTargets(rough, bank)
    found = targets.of_arms([7])[:100]
    assert float((found - bank.values[:, :100].mean(0)).abs().mean()) < 0.4
    assert torch.allclose(found, bank.values[::4, :100].mean(0), atol=1e-5)
    # All entries of these narrow blocks count, so only the way of adding up differs.
    again = node_deltas(tree, bank, "observed")[0]
    ratio = float((bank.scales() / scales).mean())
    assert again == pytest.approx([delta / ratio for delta in deltas], rel=0.02, abs=1e-4)
    both = node_deltas(tree, bank, "observed", "block")
    assert [len(column) for column in both] == [799] * 8


def test_a_step_asks_no_tensor_for_its_values() -> None:
    """On the meta device reading a value is an error; on an accelerator it would be a wait."""
    bank = bank_of(signatures(12, 0))
    query, scales = torch.zeros(18, device="meta"), bank.scales().to("meta")
    assert bank.scaled_distances(query, scales).shape == (12, 3)
    assert bank.pull(query, [3], scales).shape == (1,)
    assert bank.pull(query, [3, 4, 5], scales).shape == (3,)
    assert bank.xi(query, 3, scales).shape == ()
    with pytest.raises(Exception, match="meta"):
        bank.pull(query, [3], scales).tolist()


def test_a_row_fetched_ahead_gives_the_same_feedback() -> None:
    rows = signatures(12, 0)
    bank, query = bank_of(rows), rows[3] + 1
    scales = bank.scales()
    for arms, scope in (([4], "model"), ([4, 0, 7], "block")):
        row = bank.row(arms)
        found = xi_of(query, row, scales, bank.widths, scope)
        assert torch.equal(found, bank.pull(query, arms, scales))
        table = bank.scaled_distances(query, scales)
        expected = table[4].mean() if scope == "model" else table[arms, [0, 1, 2]]
        assert found.tolist() == pytest.approx(expected.reshape(-1).tolist(), rel=1e-5)
    assert torch.equal(bank.row([4]), bank.values[4])
