"""Routes against brute-force distances; ties, one task, abstention, what cannot be routed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_synthetic import centres, rows_of, statistics_of

from treelora_cli.errors import RunDirError, UsageError
from treelora_cli.routing.quality import accuracy, agreement, confusion
from treelora_cli.routing.router import BASE, Router
from treelora_cli.routing.statistics import FeatureStatistics, shared_covariance

WIDTH = 8


def queries(means: torch.Tensor, each: int = 5) -> torch.Tensor:
    return torch.cat([rows_of(mean, each, 900 + k) for k, mean in enumerate(means)])


def squared_distances(
    tasks: Mapping[str, FeatureStatistics], rows: torch.Tensor
) -> list[list[float]]:
    inverse = torch.linalg.inv(shared_covariance(tasks.values()).matrix())
    return [
        [float((row - task.mean) @ inverse @ (row - task.mean)) for task in tasks.values()]
        for row in rows
    ]


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 9), st.floats(0.05, 2.0), st.integers(0, 1000))
def test_the_nearest_mean_answers(tasks: int, spread: float, seed: int) -> None:
    means = centres(tasks, WIDTH, spread, seed)
    kept = statistics_of(means)
    rows = queries(means)
    routes = Router(kept).route(rows.float())
    distances = squared_distances(kept, rows.float().double())
    assert routes.indices.tolist() == [row.index(min(row)) for row in distances]
    assert routes.nearest.equal(routes.indices)
    assert set(routes.dots.tolist()) == {tasks}
    first_two = [sorted(row)[:2] for row in distances]
    gaps = torch.tensor([(b - a) / 2 for a, b in first_two]).double()
    torch.testing.assert_close(routes.margin, gaps, atol=1e-5, rtol=1e-5)


def test_confidence_is_the_tasks_typical_distance_over_the_querys() -> None:
    kept = statistics_of(centres(3, WIDTH))
    rows = queries(centres(3, WIDTH))
    router = Router(kept)
    routes = router.route(rows)
    shared = shared_covariance(kept.values())
    typical = [shared.typical_distance(task) for task in kept.values()]
    for found, nearest, row in zip(
        routes.confidence.tolist(),
        routes.indices.tolist(),
        squared_distances(kept, rows),
        strict=True,
    ):
        assert found == pytest.approx(min(1.0, typical[nearest] / min(row)), rel=1e-9)
    assert router.typical.tolist() == pytest.approx(typical)
    assert 0.2 < float((routes.confidence == 1).double().mean()) < 0.8


def test_ties_go_to_the_lower_index() -> None:
    means = centres(3, WIDTH)
    one, two, three = statistics_of(means).values()
    kept = {"a": three, "b": one, "c": two, "d": one, "e": three}
    routes = Router(kept).route(queries(means))
    assert routes.indices.tolist() == [1] * 5 + [2] * 5 + [0] * 5
    assert float(routes.margin[0]) == pytest.approx(0.0, abs=1e-8)
    alone = [Router(kept).route(row.unsqueeze(0)).indices.item() for row in queries(means)]
    assert alone == routes.indices.tolist(), "a query's batch does not matter"


def test_one_task_takes_everything_but_what_is_far() -> None:
    mean = centres(1, WIDTH)
    kept = statistics_of(mean)
    near, far = queries(mean), queries(mean) + 1e3
    always = Router(kept).route(torch.cat([near, far]))
    assert always.indices.tolist() == [0] * 10
    assert set(always.margin.tolist()) == {float("inf")}
    careful = Router(kept, threshold=0.3).route(torch.cat([near, far]))
    assert careful.indices.tolist() == [0] * 5 + [BASE] * 5
    assert careful.nearest.tolist() == [0] * 10
    assert float(careful.confidence[5:].max()) < 0.01


def test_abstention_follows_the_threshold() -> None:
    means = centres(4, WIDTH)
    rows = queries(means, 40)
    confidence = Router(statistics_of(means)).route(rows).confidence
    for threshold in (0.0, 0.4, 0.8, 1.0):
        indices = Router(statistics_of(means), threshold).route(rows).indices
        assert (indices == BASE).equal(confidence < threshold)
    assert 0 < int((confidence < 0.8).sum()) < len(rows)


def test_new_rows_are_as_typical_as_promised() -> None:
    """A task's unseen rows lie, on average, where the typical distance says."""
    means = centres(5, 40)
    router = Router(statistics_of(means, count=30))
    rows = torch.cat([rows_of(mean, 200, 2000 + k) for k, mean in enumerate(means)])
    white = router.whiten(rows).reshape(5, 200, -1)
    distances = (white - router.means.unsqueeze(1)).square().sum(2).mean(1)
    assert float((distances / router.typical).mean()) == pytest.approx(1.0, abs=0.1)


def test_what_is_stored_routes_alike() -> None:
    means = centres(6, WIDTH)
    kept = statistics_of(means)
    again = {name: FeatureStatistics.from_tensors(task.to_tensors()) for name, task in kept.items()}
    rows = queries(means)
    before, after = Router(kept).route(rows), Router(again).route(rows)
    assert before.indices.equal(after.indices)
    torch.testing.assert_close(before.confidence, after.confidence, atol=1e-4, rtol=1e-4)


class Lazy(Mapping[str, FeatureStatistics]):
    """Loads a task's statistics whenever it is asked, as from a disk."""

    def __init__(self, kept: dict[str, FeatureStatistics]) -> None:
        self.stored = {name: task.to_tensors() for name, task in kept.items()}

    def __getitem__(self, name: str) -> FeatureStatistics:
        return FeatureStatistics.from_tensors(self.stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self.stored)

    def __len__(self) -> int:
        return len(self.stored)


def test_tasks_may_be_loaded_when_asked() -> None:
    means = centres(3, WIDTH)
    router = Router(Lazy(statistics_of(means)))
    assert router.names == ("T0", "T1", "T2")
    assert router.route(queries(means)).indices.tolist() == [0] * 5 + [1] * 5 + [2] * 5


def test_above_the_limit_a_tree_is_searched() -> None:
    means = centres(60, WIDTH)
    kept = statistics_of(means, count=8)
    rows = queries(means, 2)
    exact, by_tree = Router(kept), Router(kept, exact_up_to=59, beam=12)
    assert set(exact.route(rows).dots.tolist()) == {60}
    found = by_tree.route(rows)
    assert int(found.dots.max()) < 60 + 60
    same, dots = agreement(exact, rows, 12)
    assert same >= 0.95
    assert dots == pytest.approx(float(found.dots.double().mean()))
    alike = found.indices == exact.route(rows).indices
    assert same == float(alike.double().mean())
    torch.testing.assert_close(
        found.confidence[alike], exact.route(rows).confidence[alike], atol=1e-3, rtol=1e-3
    )


def test_an_offset_that_all_tasks_share_costs_the_tree_no_precision() -> None:
    means = 1e7 + centres(20, WIDTH)
    kept = statistics_of(means)
    found = Router(kept, exact_up_to=1, beam=20).route(queries(means, 2))
    assert found.indices.tolist() == [k for k in range(20) for _ in range(2)]
    assert float(found.confidence.min()) > 0.1


def test_what_cannot_be_routed_is_refused() -> None:
    kept = statistics_of(centres(2, WIDTH))
    with pytest.raises(RunDirError, match="there is no task"):
        Router({})
    with pytest.raises(RunDirError, match="task X has features of no prompt"):
        Router({**kept, "X": FeatureStatistics.empty(WIDTH)})
    with pytest.raises(RunDirError, match="cannot be compared"):
        Router({**kept, "X": FeatureStatistics.of(torch.randn(5, 3))})
    with pytest.raises(RunDirError, match="7 features"):
        Router(kept).route(torch.zeros(1, 7))
    for threshold in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError, match="threshold"):
            Router(kept, threshold)


def test_no_queries_have_no_routes() -> None:
    kept = statistics_of(centres(3, WIDTH))
    for router in (Router(kept), Router(kept, exact_up_to=1)):
        assert router.route(torch.zeros(0, WIDTH)).indices.tolist() == []


def test_confusion_counts_every_query() -> None:
    counts = confusion([0, 0, 0, 1, 2], [0, 2, BASE, 1, 1], 3)
    assert counts.tolist() == [[1, 0, 1, 1], [0, 1, 0, 0], [0, 1, 0, 0]]
    assert accuracy(counts).tolist() == pytest.approx([1 / 3, 1.0, 0.0])
    assert confusion([], [], 2).tolist() == [[0, 0, 0], [0, 0, 0]]
    assert bool(accuracy(confusion([1], [1], 2)).isnan()[0])
    for true, routed in (([0], [3]), ([3], [0]), ([-1], [0]), ([0], [-2]), ([0], [0, 1])):
        with pytest.raises(ValueError):
            confusion(true, routed, 3)
