"""The released code's arithmetic against what was recorded from it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from treelora_cli.tree.official import (
    GUARD,
    OfficialNode,
    OfficialSearch,
    accumulate,
    as_gradient_tree,
    build,
    differences,
    gather,
    regularizer,
    row_probabilities,
    strength,
    task_probabilities,
)
from treelora_cli.tree.serial import from_document, to_document
from treelora_cli.tree.signatures import SignatureBank

VECTORS = Path(__file__).resolve().parents[1] / "data" / "treelora_official.json"
CASES: list[dict[str, Any]] = json.loads(VECTORS.read_text(encoding="utf-8"))["cases"]


def cases(*kinds: str) -> Any:
    chosen = [case for case in CASES if case["kind"] in kinds]
    return pytest.mark.parametrize("case", chosen, ids=[case["id"] for case in chosen])


def close(found: Any, expected: Any) -> None:
    expected = torch.tensor(expected)
    torch.testing.assert_close(torch.as_tensor(found), expected, rtol=1e-4, atol=1e-5)


def probable(found: torch.Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), rtol=0, atol=2e-4)


def same_tree(found: OfficialNode, expected: dict[str, Any]) -> None:
    assert list(found.tasks) == expected["tasks"]
    assert found.depth == expected["depth"]
    assert (not found.children) == expected["leaf"]
    assert (found.median is None) == (expected["median"] is None)
    if expected["leaf"]:
        return
    close(found.median, expected["median"])
    close(found.mean, expected["mean"])
    for child, side in zip(found.children, ("left", "right"), strict=True):
        same_tree(child, expected[side])


def tree_of(stored: torch.Tensor) -> OfficialNode:
    return build(differences(stored), range(len(stored)), stored.shape[1])


def test_every_recorded_kind_is_tested() -> None:
    assert len(CASES) == 45
    assert {case["kind"] for case in CASES} == {
        "tree_build", "accumulate", "end_task", "search", "update", "regularizer", "episode"
    }  # fmt: skip


@cases("tree_build")
def test_tree(case: dict[str, Any]) -> None:
    given = case["inputs"]
    features = torch.tensor(given["features"])
    same_tree(build(features, given["tasks"], given["max_depth"]), case["outputs"]["tree"])


@cases("accumulate")
def test_running_vector_and_strength(case: dict[str, Any]) -> None:
    given = case["inputs"]
    rounds = given["rounds_per_epoch"]
    for epoch, expected in zip(given["A"], case["outputs"]["epochs"], strict=True):
        running = torch.zeros_like(torch.tensor(epoch[0]))
        for number, (matrix, one) in enumerate(zip(epoch, expected, strict=True)):
            running = accumulate(running, torch.tensor(matrix), rounds)
            assert one["round"] == number
            close(strength(given["reg"], number, rounds), one["strength"])
            close(running, one["running"])


@cases("end_task")
def test_differences_and_the_tree_after_each_task(case: dict[str, Any]) -> None:
    stored = torch.tensor(case["inputs"]["stored"])
    close(differences(stored), case["outputs"]["differences"])
    for count, expected in enumerate(case["outputs"]["trees"], start=1):
        same_tree(tree_of(stored[:count]), expected)


def play(
    search: OfficialSearch,
    running: torch.Tensor,
    given: dict[str, Any],
    expected: list[dict[str, Any]],
) -> torch.Tensor:
    """Go through the rounds of an epoch with both draws forced, comparing every table."""
    drawn = zip(given["A"], given["first"], given["selected"], expected, strict=True)
    for number, (matrix, first, selected, one) in enumerate(drawn):
        assert one["round"] == number
        running = accumulate(running, torch.tensor(matrix), search.rounds)
        close(search.similarity, one["sim_before"])
        table = search.scores(number)
        probable(task_probabilities(table), one["task_probs"])
        probable(row_probabilities(table, search.tree, first), one["layer_probs"])
        search.update(running, torch.tensor(selected))
        close(search.similarity, one["sim_after"])
        assert search.counts.tolist() == one["counts_after"]
    return running


@cases("search")
def test_search(case: dict[str, Any]) -> None:
    given, expected = case["inputs"], case["outputs"]
    stored = torch.tensor(given["stored"])
    tree = None if given["tree"] is None else tree_of(stored)
    if tree is not None:
        same_tree(tree, given["tree"])
    search = OfficialSearch(stored, tree, given["rounds_per_epoch"])
    running = play(search, torch.zeros(stored.shape[1:]), given, expected["rounds"])
    close(running, expected["running_last"])


@cases("update")
def test_update(case: dict[str, Any]) -> None:
    given = case["inputs"]
    search = OfficialSearch(torch.tensor(given["stored"]), None, 1)
    search.similarity = torch.tensor(given["sim"])
    search.update(torch.tensor(given["running"]), torch.tensor(given["selected"]))
    close(search.similarity, case["outputs"]["sim"])


@cases("regularizer")
def test_regularizer_and_its_gradient(case: dict[str, Any]) -> None:
    given, expected = case["inputs"], case["outputs"]
    matrix = torch.tensor(given["A"], requires_grad=True)
    targets = gather(torch.tensor(given["stored"]), torch.tensor(given["selected"]))
    weight = strength(given["reg"], given["round"], given["rounds_per_epoch"])
    value = regularizer(matrix, targets, torch.tensor(given["loss"]), weight)
    value.backward()
    close(-(matrix * targets).sum().detach(), expected["raw"])
    close(value.detach(), expected["value"])
    close(given["loss"] - value.detach(), expected["loss_after"])
    close(matrix.grad, expected["grad_A"])


@cases("episode")
def test_episode(case: dict[str, Any]) -> None:
    """Several tasks, each searched against what this code itself has stored of the others."""
    given = case["inputs"]
    rounds, reg = given["rounds_per_epoch"], given["reg"]
    kept: list[torch.Tensor] = []
    for task, expected in zip(given["tasks"], case["outputs"]["tasks"], strict=True):
        running = torch.zeros(0)
        for epoch, recorded in zip(task["epochs"], expected["epochs"], strict=True):
            running = torch.zeros_like(torch.tensor(epoch["A"][0]))
            if not kept:
                for matrix in epoch["A"]:
                    running = accumulate(running, torch.tensor(matrix), rounds)
                continue
            stored = torch.stack(kept)
            search = OfficialSearch(stored, tree_of(stored), rounds)
            running = play(search, running, epoch, recorded["rounds"])
            played = zip(epoch["A"], epoch["loss"], epoch["selected"], recorded["rounds"],
                         strict=True)  # fmt: skip
            for number, (values, loss, selected, one) in enumerate(played):
                matrix = torch.tensor(values, requires_grad=True)
                targets = gather(stored, torch.tensor(selected))
                weight = strength(reg, number, rounds)
                value = regularizer(matrix, targets, torch.tensor(loss), weight)
                value.backward()
                close(value.detach(), one["reg_value"])
                close(matrix.grad, one["reg_grad"])
        kept.append(running)
        close(running, expected["stored"])
        same_tree(tree_of(torch.stack(kept)), expected["tree"])


def test_a_divisor_of_zero_stays_finite() -> None:
    matrix = torch.tensor([[GUARD]], requires_grad=True)
    value = regularizer(matrix, torch.ones(1, 1), torch.tensor(2.0), 0.5)
    value.backward()
    assert math.isfinite(value.item())
    assert math.isfinite(matrix.grad.item())


def test_draws_follow_the_probabilities_and_the_generator() -> None:
    """Far tasks win the first draw; for each row the draw is all but uniform (an oddity)."""
    generator = torch.Generator().manual_seed(3)
    stored = torch.randn(4, 6, 10, generator=generator)
    stored[2] *= 20
    running = torch.randn(6, 10, generator=generator)
    search = OfficialSearch(stored, tree_of(stored), 400)
    for number in range(400):
        search.update(running, search.draw(number, generator))
    assert task_probabilities(search.scores(400)).argmax() == 2
    shares = search.counts.sum(1) / search.counts.sum()
    assert shares.sum().item() == pytest.approx(1)
    assert shares.max() < math.e * shares.min()
    again = torch.Generator().manual_seed(9)
    first = search.draw(400, again)
    again.manual_seed(9)
    assert search.draw(400, again).equal(first)


@pytest.mark.parametrize(("tasks", "rows"), [(1, 3), (2, 3), (7, 5), (8, 2)])
def test_the_shown_tree_is_the_official_one(tasks: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(tasks)
    features = differences(torch.randn(tasks, rows, 4, generator=generator))
    root = build(features, range(tasks), rows)
    names = tuple(f"task{number}" for number in range(tasks))
    bank = SignatureBank(names, features.flatten(1), (4,) * rows, torch.zeros(tasks, rows))
    tree = as_gradient_tree(root, bank)
    document = to_document(tree, bank, "lora_a", "A")

    def check(at: int, node: OfficialNode) -> None:
        shown = tree.nodes[at]
        assert shown.tasks == tuple(sorted(node.tasks))
        assert shown.depth == node.depth
        if node.children:
            assert shown.block == node.depth
            assert shown.threshold == (None if node.by_position else node.median)
        for child, official in zip(shown.children, node.children, strict=True):
            check(child, official)

    check(0, root)
    assert document["split"] == "official"
    leaves = [node for node in tree.nodes if node.is_leaf]
    assert sorted(task for leaf in leaves for task in leaf.tasks) == list(range(tasks))
    if tasks <= 7:
        assert from_document(document) == tree
    else:
        assert max(len(leaf.tasks) for leaf in leaves) > 1
