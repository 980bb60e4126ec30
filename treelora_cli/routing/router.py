"""Which task a prompt looks like: the nearest mean under the covariance that all tasks share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from treelora_cli.errors import RunDirError, UsageError
from treelora_cli.routing.beam import FeatureTree, Found, nearest
from treelora_cli.routing.statistics import FeatureStatistics, shared_covariance

BASE = -1
"""The index of the base model without an adapter: where a prompt goes that looks like no task."""

EXACT_UP_TO = 1000
"""Up to this many tasks every query is compared with each of them."""

BEAM = 32
"""Nodes kept a level when a tree is searched."""


@dataclass(frozen=True, slots=True, eq=False)
class Routes:
    """Where n queries go, and what is known of each.

    Attributes:
        indices: int64 [n], the position of a task, or ``BASE`` where the router abstains.
        nearest: int64 [n], the nearest task, whether or not the router abstains.
        confidence: float64 [n] in [0, 1], how typical the query is of its nearest task: the mean
            squared distance of that task's own prompts over the query's, 1 where it is nearer.
        margin: float64 [n], by how much the log-likelihood under the nearest task exceeds that
            under the next one, in nats; infinite with one task. The Gaussian model exaggerates it.
        dots: int64 [n], the comparisons with a mean (dot products of width H) that it took.
    """

    indices: Tensor
    nearest: Tensor
    confidence: Tensor
    margin: Tensor
    dots: Tensor


class Router:
    """Sends feature vectors to tasks by linear discriminant analysis with equal priors.

    Args:
        tasks: the statistics of K >= 1 tasks by name; their order gives the indices. It is gone
            through twice, so it may load each task when asked.
        threshold: abstain below this confidence; 0 never does. 0.5 refuses a query whose squared
            distance is more than twice that of the task's own prompts.
        exact_up_to: above this many tasks a tree over the means is searched.
        beam: nodes kept a level then.

    Attributes:
        names: the tasks' names.
        means: float64 [K, H], whitened and centred.
        typical: float64 [K], the mean squared distance of each task's own prompts.
        intensity: how far the covariance was shrunk.

    Raises:
        RunDirError: tasks without statistics, or of different widths.
        UsageError: a threshold outside [0, 1].
    """

    def __init__(
        self,
        tasks: Mapping[str, FeatureStatistics],
        threshold: float = 0.0,
        exact_up_to: int = EXACT_UP_TO,
        beam: int = BEAM,
    ) -> None:
        if not 0.0 <= threshold <= 1.0:
            raise UsageError(f"found a threshold of {threshold}, expected 0 to 1")
        self.names = tuple(tasks)
        means = _means(tasks)
        self._covariance = shared_covariance(tasks[name] for name in self.names)
        self._centre = means.mean(0)
        self.means = self.whiten(means)
        self.typical = torch.tensor(
            [self._covariance.typical_distance(tasks[name]) for name in self.names],
            dtype=torch.float64,
        )
        self.intensity = self._covariance.intensity
        self.threshold = threshold
        self._beam = beam
        self._exact_up_to = exact_up_to

    def route(self, features: Tensor) -> Routes:
        """Route feature rows [n, H]; the lower index on ties.

        Raises:
            RunDirError: the rows have another width than the statistics.
        """
        if features.shape[1] != self.means.shape[1]:
            raise RunDirError(
                f"the prompts have {features.shape[1]} features, the stored tasks "
                f"{self.means.shape[1]}",
                "use the base model that the run was made with",
            )
        rows = self.whiten(features)
        few = len(self.names) <= self._exact_up_to
        found = self.exact(rows) if few else self.tree.search(rows, self._beam)
        typical = self.typical[found.indices]
        distances = rows.square().sum(1) - 2 * found.scores
        near = distances <= typical
        confidence = torch.where(near, torch.ones_like(typical), typical / distances)
        abstains = confidence < self.threshold
        indices = found.indices.masked_fill(abstains, BASE)
        return Routes(indices, found.indices, confidence, found.margins.double(), found.dots)

    def exact(self, rows: Tensor) -> Found:
        """Compare whitened rows [n, H] with all K tasks, in one product.

        The score z.m_k - |m_k|^2 / 2 is the log-likelihood up to a constant of the query.
        """
        scores = rows @ self.means.T - self.means.square().sum(1) / 2
        tasks = torch.arange(len(self.names)).expand_as(scores)
        return nearest(tasks, scores, torch.full((rows.shape[0],), len(self.names)))

    @cached_property
    def tree(self) -> FeatureTree:
        """The tree over the tasks' whitened means, to search or to show."""
        return FeatureTree(self.names, self.means)

    def whiten(self, rows: Tensor) -> Tensor:
        """Return features [n, H] in the coordinates of ``means``, float64 [n, H]."""
        return self._covariance.whiten(rows.detach().to("cpu", torch.float64) - self._centre)


def _means(tasks: Mapping[str, FeatureStatistics]) -> Tensor:
    """Return the tasks' means, float64 [K, H].

    Raises:
        RunDirError: there is no task, one has no rows, or their widths differ.
    """
    means = {}
    for name in tasks:
        statistics = tasks[name]
        if statistics.count == 0:
            raise RunDirError(f"task {name} has features of no prompt", "train the task again")
        means[name] = statistics.mean
    widths = {name: mean.shape[0] for name, mean in means.items()}
    if len(set(widths.values())) != 1:
        raise RunDirError(
            f"the stored features cannot be compared: {widths}" if widths else "there is no task",
            "all tasks of a run must have been trained on the same base",
        )
    return torch.stack(list(means.values()))
