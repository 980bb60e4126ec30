"""Statistics against plain sums, the shrinkage against its own iteration, distances against leaving
rows out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from routing_synthetic import centres, generator, mixing, rows_of, statistics_of

from treelora_cli.errors import DivergedError, RunDirError
from treelora_cli.routing.statistics import FeatureStatistics, oas_intensity, shared_covariance


def same(left: FeatureStatistics, right: FeatureStatistics) -> None:
    assert left.count == right.count
    torch.testing.assert_close(left.mean, right.mean, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(left.scatter, right.scatter, atol=1e-7, rtol=1e-9)


def test_scatter_is_about_the_mean() -> None:
    rows = [[1.0, 2.0], [3.0, 5.0], [5.0, 2.0]]
    found = FeatureStatistics.of(torch.tensor(rows))
    assert (found.count, found.mean.tolist()) == (3, [3.0, 3.0])
    assert found.scatter.tolist() == [[8.0, 0.0], [0.0, 6.0]]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=5), st.integers(0, 10**6))
def test_merging_parts_gives_the_whole(sizes: list[int], seed: int) -> None:
    rows = 100.0 + torch.randn(sum(sizes), 4, generator=generator(seed)).double()
    parts = [FeatureStatistics.of(part) for part in rows.split(sizes)]
    left, right = FeatureStatistics.empty(4), FeatureStatistics.empty(4)
    for part in parts:
        left = left.merge(part)
    for part in reversed(parts):
        right = part.merge(right)
    same(left, FeatureStatistics.of(rows))
    same(right, FeatureStatistics.of(rows))


def test_what_cannot_be_summed_is_refused() -> None:
    with pytest.raises(DivergedError, match="not finite"):
        FeatureStatistics.of(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="cannot be merged"):
        FeatureStatistics.empty(3).merge(FeatureStatistics.empty(4))


def test_storing_keeps_float32_and_half_of_the_scatter() -> None:
    kept = FeatureStatistics.of(torch.randn(30, 512, generator=generator(0)))
    tensors = kept.to_tensors()
    assert {name: str(value.dtype) for name, value in tensors.items()} == {
        "count": "torch.int64", "mean": "torch.float32", "scatter": "torch.float32",
    }  # fmt: skip
    assert sum(value.nbytes for value in tensors.values()) < 530_000
    again = FeatureStatistics.from_tensors(tensors)
    assert again.count == 30
    torch.testing.assert_close(again.mean, kept.mean, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(again.scatter, kept.scatter, atol=1e-5, rtol=1e-6)
    assert again.scatter.equal(again.scatter.T)
    for name, value in again.to_tensors().items():
        assert value.equal(tensors[name]), "written again it is the same"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mean": None}, "lacks mean"),
        ({"scatter": torch.zeros(4)}, "shapes"),
        ({"mean": torch.full((2,), float("inf"))}, "not finite"),
        ({"count": torch.tensor([-1])}, "negative"),
        ({"count": torch.tensor([1, 2])}, "shapes"),
    ],
)
def test_damaged_statistics_are_refused(change: dict[str, torch.Tensor], message: str) -> None:
    tensors = {**FeatureStatistics.of(torch.randn(5, 2)).to_tensors(), **change}
    whole = {name: value for name, value in tensors.items() if value is not None}
    with pytest.raises(RunDirError, match=message):
        FeatureStatistics.from_tensors(whole)


def iterated(S: torch.Tensor, n: int) -> float:
    """The oracle's intensity with the current estimate for the truth, again and again."""
    p, target = S.shape[0], S.trace() / S.shape[0] * torch.eye(S.shape[0]).double()
    rho = 0.5
    for _ in range(5000):
        estimate = (1 - rho) * S + rho * target
        of_square, squared = float((estimate @ S).trace()), float(estimate.trace() ** 2)
        rho = min(
            ((1 - 2 / p) * of_square + squared)
            / ((n + 1 - 2 / p) * of_square + (1 - n / p) * squared),
            1.0,
        )
    return rho


@pytest.mark.parametrize(("n", "p"), [(20, 6), (60, 6), (12, 30)])
def test_the_intensity_is_where_the_oracles_iteration_ends(n: int, p: int) -> None:
    rows = torch.randn(n, p, generator=generator(n)).double() @ mixing(p).T
    S = rows.T @ rows / n
    assert oas_intensity(S, n) == pytest.approx(iterated(S, n), rel=1e-6)


def test_the_intensity_is_nearly_the_best() -> None:
    """Averaged over samples the error is within a tenth of the best constant intensity's."""
    p, n = 20, 30
    truth = torch.diag(torch.linspace(0.5, 2, p).double())
    errors: dict[float, float] = {}
    own = 0.0
    for seed in range(60):
        rows = torch.randn(n, p, generator=generator(seed)).double() @ truth.sqrt()
        S = rows.T @ rows / n
        target = S.trace() / p * torch.eye(p).double()
        for rho in [step / 20 for step in range(21)]:
            error = float(((1 - rho) * S + rho * target - truth).square().sum())
            errors[rho] = errors.get(rho, 0.0) + error
        rho = oas_intensity(S, n)
        own += float(((1 - rho) * S + rho * target - truth).square().sum())
    assert own < 1.1 * min(errors.values())
    assert errors[0.0] > 2 * own


def test_an_identity_is_shrunk_no_further_than_itself() -> None:
    assert oas_intensity(torch.eye(5).double(), 10) == 1.0
    assert oas_intensity(torch.eye(1).double(), 10) == 1.0


def test_whitened_distances_are_mahalanobis() -> None:
    tasks = statistics_of(centres(3, 6))
    shared = shared_covariance(tasks.values())
    rows = torch.randn(4, 6, generator=generator(1)).double()
    white = shared.whiten(rows)
    expected = rows @ torch.linalg.inv(shared.matrix()) @ rows.T
    torch.testing.assert_close(white @ white.T, expected)
    pooled = sum(task.scatter for task in tasks.values()) / (3 * 40 - 3)
    assert shared.degrees == 117
    scale = pooled.diagonal().sqrt()
    shrunk = (1 - shared.intensity) * pooled / torch.outer(scale, scale)
    shrunk += shared.intensity * torch.eye(6).double()
    torch.testing.assert_close(shared.matrix(), shrunk * torch.outer(scale, scale))
    assert shared.intensity == oas_intensity(pooled / torch.outer(scale, scale), 117)
    assert 0 < shared.intensity < 0.5


def test_features_that_never_vary_do_no_harm() -> None:
    rows = torch.randn(9, 3, generator=generator(0)).double()
    rows[:, 1] = 5.0
    shared = shared_covariance([FeatureStatistics.of(rows)])
    assert bool(torch.isfinite(shared.whiten(rows)).all())
    # Hardly varying, and only with another feature: in large units its covariance exceeds 1.
    rows[:, 1] = 5.0 + 1e-5 * rows[:, 0]
    large = 1e6 * rows
    assert bool(
        torch.isfinite(shared_covariance([FeatureStatistics.of(large)]).whiten(large)).all()
    )
    alone = shared_covariance([FeatureStatistics.of(rows[:1]), FeatureStatistics.of(rows[1:2])])
    assert alone.whiten(rows).equal(rows), "no degrees of freedom: plain distances"


def left_out(rows: list[torch.Tensor], task: int) -> float:
    """The mean squared distance of each row of a task to statistics made without it."""
    distances = []
    intensity = shared_covariance([FeatureStatistics.of(part) for part in rows]).intensity
    degrees = sum(len(part) - 1 for part in rows)
    scales = (sum(FeatureStatistics.of(part).scatter for part in rows) / degrees).diagonal().sqrt()
    for at in range(len(rows[task])):
        rest = torch.cat([rows[task][:at], rows[task][at + 1 :]])
        parts = [rest if k == task else part for k, part in enumerate(rows)]
        S = sum(FeatureStatistics.of(part).scatter for part in parts) / degrees
        shrunk = (1 - intensity) * S + intensity * torch.diag(scales**2)
        gap = rows[task][at] - rest.mean(0)
        distances.append(float(gap @ torch.linalg.inv(shrunk) @ gap))
    return sum(distances) / len(distances)


@pytest.mark.parametrize(("width", "count"), [(5, 40), (30, 20), (60, 60)])
def test_the_typical_distance_is_that_of_rows_left_out(width: int, count: int) -> None:
    rows = [rows_of(mean, count, 50 + k) for k, mean in enumerate(centres(4, width))]
    tasks = [FeatureStatistics.of(part) for part in rows]
    shared = shared_covariance(tasks)
    brute = left_out(rows, 1)
    prior = (count * brute + 4 * width) / (count + 4)
    assert shared.typical_distance(tasks[1]) == pytest.approx(prior, rel=0.03)
    half = shared.whiten(tasks[1].scatter)
    naive = float(shared.whiten(half.T).trace()) / count
    assert abs(naive / brute - 1) > 0.06, "rows kept in are nearer"


def test_one_row_says_nothing_of_its_distance() -> None:
    tasks = [FeatureStatistics.of(torch.randn(20, 7)), FeatureStatistics.of(torch.randn(1, 7))]
    assert shared_covariance(tasks).typical_distance(tasks[1]) == 7.0
