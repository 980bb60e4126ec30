"""Merging adapters, against dense matrices; and killed at every point of it."""

from __future__ import annotations

import json
import math
import shutil
from itertools import combinations
from pathlib import Path

import pytest
import torch
from engine_stored import (
    LORA,
    NAMES,
    SCALE,
    SHAPES,
    dense,
    in_child,
    partly,
    random_adapter,
    same_bits,
    whole_run,
)

from treelora_cli.engine import merging
from treelora_cli.engine.adapters import load_adapter, load_config, since
from treelora_cli.engine.export import export_adapters
from treelora_cli.engine.merging import Held, Pool, keep_to, load_pool, tidy
from treelora_cli.errors import RunDirError
from treelora_cli.rundir import faults
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.manifest import verify
from treelora_cli.rundir.merged import read_facts, read_merged


def spread(count: int) -> list[dict[str, torch.Tensor]]:
    """Adapters with two near pairs: (0, 3) the nearest, then (1, 2)."""
    found = [random_adapter(seed) for seed in range(count)]
    found[3] = random_adapter(33, near=found[0], size=0.02)
    found[2] = random_adapter(22, near=found[1], size=0.05)
    return found


def best_fit(target: torch.Tensor, rank: int = 3) -> torch.Tensor:
    """The best approximation of a concatenated change, module by module."""
    parts, at = [], 0
    for d_out, d_in in SHAPES.values():
        matrix = target[at : at + d_out * d_in].view(d_out, d_in)
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
        parts.append(((u[:, :rank] * s[:rank]) @ vh[:rank]).reshape(-1))
        at += d_out * d_in
    return torch.cat(parts)


def test_a_pool_merges_as_dense_matrices_say() -> None:
    """Every step of six adapters: the pair, the distances, the mean and what it costs."""
    found = spread(6)
    pool = Pool([Held((i,), one) for i, one in enumerate(found)], 5, SCALE)
    changes = {(i,): dense(one) for i, one in enumerate(found)}
    while len(pool.held) > 1:
        free = [m for m in changes if 5 not in m or len(changes) == 2]
        pairs = list(combinations(sorted(free), 2))
        left, right = min(
            pairs, key=lambda pair: float((changes[pair[0]] - changes[pair[1]]).norm())
        )
        joined = pool.join()
        assert joined.sides == (left, right)
        a, b = changes.pop(left), changes.pop(right)
        distance = float((a - b).norm())
        mean = (len(left) * a + len(right) * b) / (len(left) + len(right))
        merged = best_fit(mean)
        assert joined.distance == pytest.approx(distance, rel=1e-6)
        norms = float(a.norm() + b.norm()) / 2
        assert joined.relative_distance == pytest.approx(distance / norms, rel=1e-6)
        moved = len(left) * (a - merged).square().sum() + len(right) * (b - merged).square().sum()
        before = len(left) * a.square().sum() + len(right) * b.square().sum()
        assert joined.error == pytest.approx(math.sqrt(moved / before), rel=1e-5)
        assert joined.cut == pytest.approx(float((merged - mean).norm() / mean.norm()), rel=1e-4)
        held = next(one for one in pool.held if one.members == joined.members)
        torch.testing.assert_close(dense(held.snapshot), merged, atol=1e-4, rtol=1e-4)
        changes[joined.members] = dense(held.snapshot)
        assert {one.members for one in pool.held} == set(changes)
    assert pool.held[0].members == tuple(range(6))


def test_the_newest_adapter_is_left_alone_though_it_is_nearest() -> None:
    found = spread(4)  # (0, 3) is the nearest pair, and 3 the newest
    pool = Pool([Held((i,), one) for i, one in enumerate(found)], 3, SCALE)
    assert pool.join().sides == ((1,), (2,))


def test_nothing_in_them_is_merged_without_dividing_by_zero() -> None:
    zero = {key: torch.zeros_like(value) for key, value in random_adapter(0).items()}
    pool = Pool([Held((0,), zero), Held((1,), dict(zero)), Held((2,), random_adapter(1))], 2, SCALE)
    joined = pool.join()
    assert (joined.sides, joined.distance, joined.error) == (((0,), (1,)), 0.0, 0.0)
    assert joined.relative_distance == joined.cut == 0.0


def test_down_to_a_budget_on_disk(tmp_path) -> None:
    found = spread(5)
    run = whole_run(tmp_path / "run", found)
    expected = Pool([Held((i,), one) for i, one in enumerate(found)], 4, SCALE)
    steps = [expected.join() for _ in range(3)]
    assert keep_to(run, 5, LORA) == []
    assert not run.merged.exists()
    first = keep_to(run, 4, LORA)
    assert first == steps[:1]
    assert [group.members for group in read_merged(run)] == [(0, 3)]
    # A run that is taken up again goes on from merged adapters as one that was not put down,
    # but for the rounding of what is known only to float32.
    rest = keep_to(run, 2, LORA)
    assert [one.sides for one in rest] == [one.sides for one in steps[1:]]
    groups = read_merged(run)
    assert [group.members for group in groups] == [(0, 1, 2, 3)]
    assert [path.name for path in run.merged.iterdir() if path.is_dir()] == ["000-alpha+3"]
    merged = load_adapter(run, 0, "alpha")
    for index in range(4):
        name = NAMES[index]
        folder = run.task_dir(index, name)
        verify(folder)
        assert same_bits(load_adapter(run, index, name), merged)
        assert since(run, (index, name)) == (4, "epsilon")
        assert sorted(path.name for path in folder.iterdir()) == [
            "MANIFEST.json", "method.safetensors", "predictions", "task.json"
        ]  # fmt: skip
        document = json.loads((folder / "task.json").read_text())
        assert document["storage"] == {"form": "merged", "merged_into": "000-alpha+3"}
        assert (folder / "predictions" / "alpha.latest.test.jsonl").exists()
    assert same_bits(load_adapter(run, 4, "epsilon"), found[4])
    assert since(run, (4, "epsilon")) == (4, "epsilon")
    facts = read_facts(run, groups[0])
    assert facts["members"] == list(NAMES[:4])
    assert [one["sides"] for one in facts["merges"]] == [
        [[NAMES[m] for m in side] for side in step.sides] for step in steps
    ]
    assert facts["merges"][0]["error"] == steps[0].error
    assert load_config(run, 1, "beta") == load_config(run, 4, "epsilon")
    assert [held.members for held in load_pool(run, SCALE).held] == [(0, 1, 2, 3), (4,)]


def test_differences_from_a_merged_adapter_are_made_dense(tmp_path) -> None:
    """gamma and delta are stored against alpha and beta; delta and zeta stay as they are."""
    base = random_adapter(0)
    beta = partly(base, 1, 0.01)
    gamma = partly(beta, 2, 0.3)
    other = random_adapter(7)
    found = [base, beta, gamma, other, partly(other, 4, 0.3), partly(gamma, 5, 0.3)]
    references = {"beta": [0], "gamma": [1], "epsilon": [3], "zeta": [2]}
    run = whole_run(tmp_path / "run", found, **references)
    assert [one.sides for one in keep_to(run, 5, LORA)] == [((0,), (1,))]
    forms = [
        json.loads((run.task_dir(i, NAMES[i]) / "task.json").read_text())["storage"]["form"]
        for i in range(6)
    ]
    assert forms == ["merged", "merged", "dense", "dense", "delta", "delta"]
    for index in range(2, 6):
        assert same_bits(load_adapter(run, index, NAMES[index]), found[index])
    with pytest.raises(AssertionError):
        assert same_bits(load_adapter(run, 0, "alpha"), base)


def passages(monkeypatch, work) -> list[str]:
    """Every fault point that the work passes, with how often it was passed by then."""
    seen: dict[str, int] = {}
    found = []

    def hit(point: str) -> None:
        seen[point] = seen.get(point, 0) + 1
        found.append(f"{point}:kill9:{seen[point]}")

    with monkeypatch.context() as patch:
        patch.setattr(faults, "hit", hit)
        work()
    return found


def thinned(points: list[str]) -> list[str]:
    """The last passage of every point, and every passage of those that only merging has."""
    last = {point.split(":")[0]: point for point in points}
    return [point for point in points if point in last.values() or point.startswith("merge.")]


def answers(run: RunDir) -> list[dict[str, torch.Tensor]]:
    return [load_adapter(run, entry["index"], entry["name"]) for entry in run.info.tasks]


def content(path: Path) -> dict[str, bytes]:
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def check_kills(monkeypatch, start: RunDir, most: int, all_points: bool) -> list[str]:
    """Kill a merge at its fault points: it reads as before or after, and is finished later."""
    before = answers(start)
    whole = RunDir.open(shutil.copytree(start.path, start.path.with_name("whole")))
    points = passages(monkeypatch, lambda: keep_to(whole, most, LORA))
    after, expected = answers(whole), content(whole.path)
    states = set()
    for number, point in enumerate(points if all_points else thinned(points)):
        run = RunDir.open(shutil.copytree(start.path, start.path.with_name(f"killed-{number}")))
        assert in_child(lambda run=run: keep_to(run, most, LORA), point) == -9, point
        read = answers(RunDir.open(run.path))
        switched = same_bits(read[0], after[0])
        states.add(switched)
        state = after if switched else before
        assert all(same_bits(*pair) for pair in zip(read, state, strict=True)), point
        run.sweep()
        tidy(run)
        keep_to(run, most, LORA)
        assert content(run.path) == expected, point
        shutil.rmtree(run.path)
    assert states == {True, False}
    assert not same_bits(before[0], after[0])
    return points


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_kill_while_a_group_grows(tmp_path, monkeypatch, every: bool) -> None:
    found = spread(5)
    found[2] = partly(found[0], 2, 0.05)
    start = whole_run(tmp_path / "start", found, gamma=[0])
    assert [one.members for one in keep_to(start, 4, LORA)] == [(0, 3)]
    points = check_kills(monkeypatch, start, 3, every)
    assert {point.split(":")[0] for point in points} >= {
        "merge.committed", "merge.switched", "merge.member", "atomic.moved-aside", "file.replaced"
    }  # fmt: skip


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_kill_while_differences_are_made_dense(tmp_path, monkeypatch, every: bool) -> None:
    found = spread(5)
    found[4] = partly(found[3], 4, 0.2)
    start = whole_run(tmp_path / "start", found, epsilon=[3])
    points = check_kills(monkeypatch, start, 4, every)
    assert "merge.freed:kill9:1" in points


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": 2}, "newer version"),
        ({"groups": "x"}, "no groups"),
        ({"unit": "../tasks/000-alpha"}, "no merged adapter"),
        ({"members": [0]}, "no two members"),
        ({"members": [3, 0]}, "no two members"),
        ({"members": [0, 9]}, "does not have"),
        ({"after": None}, "does not have"),
    ],
)
def test_a_damaged_list_of_groups_is_refused(tmp_path, change, message: str) -> None:
    run = whole_run(tmp_path / "run", spread(4))
    keep_to(run, 3, LORA)
    document = json.loads(run.merged_json.read_text())
    target = document if change.keys() & document.keys() else document["groups"][0]
    target |= change
    run.merged_json.write_text(json.dumps(document))
    with pytest.raises(RunDirError, match=message):
        load_adapter(run, 0, "alpha")


def test_a_task_in_two_groups_is_refused(tmp_path) -> None:
    run = whole_run(tmp_path / "run", spread(4))
    keep_to(run, 3, LORA)
    document = json.loads(run.merged_json.read_text())
    document["groups"] *= 2
    run.merged_json.write_text(json.dumps(document))
    with pytest.raises(RunDirError, match="in two groups"):
        load_adapter(run, 3, "delta")


def test_readers_need_no_lock_while_adapters_are_merged(tmp_path, monkeypatch) -> None:
    """The list of groups is read before the task's folder, which loses its adapter in between."""
    from treelora_cli.engine import adapters

    run = whole_run(tmp_path / "run", spread(5))
    real, calls = adapters.read_merged, []

    def read_then_merge(run: RunDir) -> object:
        groups = real(run)
        if not calls:
            calls.append(1)
            keep_to(RunDir.open(run.path), 2, LORA)
        return groups

    monkeypatch.setattr(adapters, "read_merged", read_then_merge)
    monkeypatch.setattr(merging, "read_merged", real)
    found = load_adapter(run, 0, "alpha")
    monkeypatch.undo()
    assert same_bits(found, load_adapter(run, 3, "delta"))


def test_export_writes_what_answers(tmp_path) -> None:
    found = spread(5)
    found[4] = partly(found[3], 4, 0.2)
    dense_run = whole_run(tmp_path / "dense", found)
    delta_run = whole_run(tmp_path / "delta", found, epsilon=[3])
    assert (delta_run.task_dir(4, "epsilon") / "delta.safetensors").exists()
    one, other = tmp_path / "one", tmp_path / "other"
    export_adapters(dense_run.path, None, one)
    export_adapters(delta_run.path, None, other)
    assert content(one) == content(other)
    own = content(dense_run.task_dir(2, "gamma") / "adapter")
    assert content(one / "gamma") == own
    assert set(own) == {"adapter_config.json", "adapter_model.safetensors"}
    keep_to(delta_run, 4, LORA)
    merged = export_adapters(delta_run.path, ["delta", "alpha"], tmp_path / "merged")
    assert [(x.task, x.members) for x in merged] == [
        ("alpha", ("alpha", "delta")), ("delta", ("alpha", "delta"))
    ]  # fmt: skip
    assert content(tmp_path / "merged" / "alpha") == content(tmp_path / "merged" / "delta")
