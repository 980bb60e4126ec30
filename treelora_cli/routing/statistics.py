"""What is kept of a task's prompts: count, mean and scatter of their features, no raw data.

Two sets of rows are merged exactly (Chan, Golub and LeVeque 1979), so a task's statistics do not
depend on how its prompts were batched or spread over ranks, beyond rounding.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from treelora_cli.errors import DivergedError, RunDirError

# A feature that varies less than this share of the mean variance counts as constant within tasks.
_CONSTANT = 1e-8

# The least share of the covariance that is taken to rest on other rows than the one left out.
_LEAST_REST = 0.1

_PRIOR_ROWS = 4

_HINT = "put the original file back; or train the task again"


@dataclass(frozen=True, slots=True, eq=False)
class FeatureStatistics:
    """Count, mean and scatter of feature rows.

    Attributes:
        count: the number of rows n.
        mean: float64 [H].
        scatter: float64 [H, H], the sum over rows of (x - mean)(x - mean)^T.
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def empty(cls, width: int) -> FeatureStatistics:
        """Return the statistics of no rows of H entries."""
        return cls(0, torch.zeros(width).double(), torch.zeros(width, width).double())

    @classmethod
    def of(cls, features: Tensor) -> FeatureStatistics:
        """Return the statistics of feature rows [n, H] of any floating dtype.

        Raises:
            DivergedError: a feature is not finite.
        """
        rows = features.detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(rows).all()):
            raise DivergedError(
                "the base model's features of a prompt are not finite numbers",
                "check the base model; with model.dtype=float16 try bfloat16 or float32",
            )
        if rows.shape[0] == 0:
            return cls.empty(rows.shape[1])
        mean = rows.mean(0)
        centred = rows - mean
        return cls(rows.shape[0], mean, centred.T @ centred)

    @property
    def width(self) -> int:
        """The number of features H."""
        return self.mean.shape[0]

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Return the statistics of both sets of rows together.

        Raises:
            ValueError: the widths differ.
        """
        if self.width != other.width:
            raise ValueError(f"{self.width} and {other.width} features cannot be merged")
        if 0 in {self.count, other.count}:
            return self if other.count == 0 else other
        total = self.count + other.count
        gap = other.mean - self.mean
        between = torch.outer(gap, gap) * (self.count * other.count / total)
        return FeatureStatistics(
            total,
            self.mean + gap * (other.count / total),
            self.scatter + other.scatter + between,
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors to store: count (int64 [1]), mean and scatter (float32).

        Of the symmetric scatter only the upper triangle is kept, [H (H + 1) / 2] in row order:
        0.53 MB a task at 512 features.
        """
        upper = _upper(self.width)
        return {
            "count": torch.tensor([self.count]),
            "mean": self.mean.float(),
            "scatter": self.scatter[upper[0], upper[1]].float(),
        }

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor]) -> FeatureStatistics:
        """Return the statistics of what :meth:`to_tensors` gave; other tensors are passed over.

        Raises:
            RunDirError: a tensor is missing, of another shape or not finite.
        """
        missing = {"count", "mean", "scatter"} - set(tensors)
        if missing:
            raise _damaged(f"it lacks {', '.join(sorted(missing))}")
        count, mean, packed = (tensors[key] for key in ("count", "mean", "scatter"))
        width = mean.numel()
        shapes = (tuple(count.shape), tuple(mean.shape), tuple(packed.shape))
        if shapes != ((1,), (width,), (width * (width + 1) // 2,)):
            raise _damaged(f"its tensors have the shapes {shapes}")
        if int(count) < 0 or not bool(torch.isfinite(mean).all() & torch.isfinite(packed).all()):
            raise _damaged("its values are not finite, or its count is negative")
        upper = _upper(width)
        scatter = torch.zeros(width, width, dtype=torch.float64)
        scatter[upper[0], upper[1]] = packed.double()
        scatter[upper[1], upper[0]] = packed.double()
        return cls(int(count), mean.double(), scatter)


@dataclass(frozen=True, slots=True, eq=False)
class SharedCovariance:
    """The covariance of features within a task, taken to be the same for every task.

    It is held as whitening: ``whiten(x)`` has the identity for covariance, so that squared
    distances of whitened rows are Mahalanobis distances.

    Attributes:
        scales: float64 [H], each feature's standard deviation within tasks (1 where constant).
        factor: float64 [H, H], the lower Cholesky factor of the shrunk correlation matrix.
        precision: float64 [H, H], the inverse of the shrunk covariance.
        intensity: the weight of the shrinkage target, in [0, 1].
        degrees: the degrees of freedom n - K that it rests on.
    """

    scales: Tensor
    factor: Tensor
    precision: Tensor
    intensity: float
    degrees: int

    def whiten(self, rows: Tensor) -> Tensor:
        """Return L^-1 (x / scales) of rows [n, H], float64 [n, H]; means are not taken off."""
        scaled = rows.double() / self.scales
        white: Tensor = torch.linalg.solve_triangular(self.factor, scaled.T, upper=False)
        return white.T

    def matrix(self) -> Tensor:
        """Return the shrunk covariance itself, float64 [H, H]."""
        correlation = self.factor @ self.factor.T
        return correlation * torch.outer(self.scales, self.scales)

    def typical_distance(self, task: FeatureStatistics) -> float:
        """Return the mean squared Mahalanobis distance to expect of a new row of a task.

        The task's own rows lie nearer to the mean and the covariance that they helped to make.
        Left out one at a time they lie at (n/(n-1))^2 h / (1 - (1-rho) h n / ((n-1) N)) (Sherman
        and Morrison), with h a row's squared distance, rho the intensity, N the degrees of
        freedom; here with the mean h, which is had from the scatter alone. A few rows of the
        shared covariance's own mean distance, H, are counted in, so that little data is not
        taken at its word.

        Args:
            task: its statistics.
        """
        if task.count < 2:
            return float(task.width)
        distance = float((self.precision * task.scatter).sum()) / task.count
        ratio = task.count / (task.count - 1)
        own = (1 - self.intensity) * ratio * distance / self.degrees
        # The formula has a pole where the task is nearly all there is to the covariance.
        expected = ratio**2 * distance / max(1 - own, _LEAST_REST)
        return (task.count * expected + _PRIOR_ROWS * task.width) / (task.count + _PRIOR_ROWS)


def shared_covariance(tasks: Iterable[FeatureStatistics]) -> SharedCovariance:
    """Pool the tasks' scatters over n - K degrees of freedom and shrink.

    The features of a language model differ in scale by orders of magnitude, so each is divided by
    its own deviation first and the resulting correlation matrix is shrunk toward a multiple of the
    identity (see :func:`oas_intensity`). Without degrees of freedom (one row a task) it is the
    identity.

    Args:
        tasks: at least one, of equal width; gone through once.

    Raises:
        ValueError: there is no task.
    """
    degrees, total = 0, None
    for task in tasks:
        degrees += max(task.count - 1, 0)
        total = task.scatter.clone() if total is None else total.add_(task.scatter)
    if total is None:
        raise ValueError("a shared covariance needs at least one task")
    covariance = total / max(degrees, 1)
    variances = covariance.diagonal()
    constant = variances <= _CONSTANT * variances.mean()
    scales = torch.where(constant, torch.ones_like(variances), variances.sqrt())
    correlation = covariance / torch.outer(scales, scales)
    # A constant feature has no correlations; with 1 on the diagonal it can always be divided by.
    correlation[constant, :] = 0.0
    correlation[:, constant] = 0.0
    correlation.diagonal()[constant] = 1.0
    intensity = oas_intensity(correlation, degrees)
    shrunk = (1 - intensity) * correlation
    shrunk.diagonal().add_(intensity * correlation.diagonal().mean())
    factor = torch.linalg.cholesky(shrunk)
    precision = torch.cholesky_inverse(factor) / torch.outer(scales, scales)
    return SharedCovariance(scales, factor, precision, intensity, degrees)


def oas_intensity(covariance: Tensor, degrees: int) -> float:
    """Return the oracle approximating shrinkage intensity toward (tr S / p) I.

    The closed form of Chen, Wiesel, Eldar and Hero, "Shrinkage Algorithms for MMSE Covariance
    Estimation", IEEE Transactions on Signal Processing 58 (2010), Eq. 23:
    rho = ((1 - 2/p) tr S^2 + tr^2 S) / ((n + 1 - 2/p) (tr S^2 - tr^2 S / p)), at most 1.
    Unlike Ledoit and Wolf's it needs no moment beyond S, so it can be had from stored scatters.

    Args:
        covariance: S, float64 [p, p].
        degrees: n, the degrees of freedom that S rests on.
    """
    p = covariance.shape[0]
    of_square = float(covariance.square().sum())
    squared = float(covariance.trace()) ** 2
    spread = (degrees + 1 - 2 / p) * (of_square - squared / p)
    if spread <= 0:
        return 1.0
    return min(1.0, ((1 - 2 / p) * of_square + squared) / spread)


@functools.lru_cache(maxsize=4)
def _upper(width: int) -> Tensor:
    return torch.triu_indices(width, width)


def _damaged(what: str) -> RunDirError:
    return RunDirError(f"features.safetensors is damaged: {what}", _HINT)
