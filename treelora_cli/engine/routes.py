"""What routing keeps of every task, and where it sends the rows of a test split.

Before a task is trained, the frozen base reads some of its training prompts; count, mean and
scatter of their features stay beside the task's adapter (``features.safetensors``). Later a router
over all learned tasks says of any prompt which of them it looks like. Nothing is drawn at random
and no weight is touched, so that training is the same with and without.

Prompts can also be looked at with their task's shared instruction taken off. That is an
experiment, not a service: its statistics are made from the task data when it is asked for, because
keeping them would double what every task costs in time and on disk.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from treelora_cli.engine.adapters import Place, trained_places
from treelora_cli.engine.evaluation import build_encoder
from treelora_cli.engine.store import FEATURES_FILE
from treelora_cli.errors import RunDirError
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.features import prompt_features
from treelora_cli.recipe import DataSection
from treelora_cli.routing.quality import agreement
from treelora_cli.routing.router import BEAM, EXACT_UP_TO, Router, Routes
from treelora_cli.routing.statistics import FeatureStatistics
from treelora_cli.rundir import faults
from treelora_cli.rundir.atomic import read_unit
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.tensors import load_tensors
from treelora_cli.tasks.shared_text import shared_parts, strip_shared
from treelora_cli.tasks.types import Task
from treelora_cli.tree.serial import to_document

ROUTE = "route"
STRIPPED = "stripped"

Statistics = Mapping[str, FeatureStatistics]
"""What is known of every learned task's prompts, in the order of the stream."""
Parts = tuple[str, str]
"""The beginning and the ending that all prompts of a task share."""


@dataclass(frozen=True)
class Eye:
    """Reads prompts with the frozen base.

    Attributes:
        adapted: the model; its adapter is switched off meanwhile.
        data: how prompts are cut.
        on_batch: called before every batch; may raise to stop.
    """

    adapted: AdaptedModel
    data: DataSection
    on_batch: Callable[[], None]

    def features(self, prompts: Sequence[str]) -> Tensor:
        """Return the features of prompts, float32 [n, H]."""
        encoder = build_encoder(self.adapted, self.data)
        return prompt_features(self.adapted, encoder, prompts, on_batch=self._before_batch)

    def statistics(self, prompts: Sequence[str]) -> FeatureStatistics:
        """Return the statistics of prompts, as they read back from disk.

        Raises:
            DivergedError: a feature is not finite.
        """
        found = FeatureStatistics.of(self.features(prompts))
        return FeatureStatistics.from_tensors(found.to_tensors())

    def _before_batch(self) -> None:
        faults.hit("features.batch")
        self.on_batch()


@dataclass(frozen=True)
class Collected:
    """What is stored of a task's prompts, and the seconds that reading them took."""

    tensors: dict[str, Tensor]
    seconds: float


def collect(eye: Eye, task: Task, count: int) -> Collected:
    """Read some of a task's training prompts, before it is trained.

    Before, not after: what goes wrong here is then no loss of a trained task, and a signal may stop
    it at any batch.

    Args:
        eye: reads them.
        task: the task.
        count: the most prompts; 0: none.

    Raises:
        DivergedError: a feature is not finite.
    """
    if count == 0:
        return Collected({}, 0.0)
    began = time.perf_counter()
    tensors = eye.statistics(sampled(task, count)).to_tensors()
    return Collected(tensors, time.perf_counter() - began)


def sampled(task: Task, count: int) -> list[str]:
    """Return at most ``count`` training prompts, evenly spaced: the same ones whenever asked."""
    rows = task.splits["train"]
    size = min(count, len(rows))
    return [rows[number * len(rows) // size].prompt for number in range(size)]


def instruction(task: Task) -> Parts:
    """Return what the training prompts of a task share: their beginning and their ending."""
    return shared_parts([row.prompt for row in task.splits["train"]])


def load_statistics(run: RunDir, places: Sequence[Place]) -> dict[str, FeatureStatistics]:
    """Return what finished tasks have stored, by name; tasks that have nothing are left out.

    Raises:
        RunDirError: a task's folder is missing or damaged.
    """
    found = {}
    for index, name in places:
        stored = read_unit(run.task_dir(index, name), _read_features)
        if stored is not None:
            found[name] = stored
    return found


def _read_features(folder: Path) -> FeatureStatistics | None:
    path = folder / FEATURES_FILE
    return FeatureStatistics.from_tensors(load_tensors(path)) if path.exists() else None


def stored_router(run: RunDir, places: Sequence[Place]) -> Router:
    """Return the router over what finished tasks have stored.

    Raises:
        RunDirError: a task has stored nothing, or not what was written.
    """
    statistics = load_statistics(run, places)
    missing = [name for _, name in places if name not in statistics]
    if missing:
        raise RunDirError(
            f"{run.path} holds no features of the prompts of {', '.join(missing)}",
            "the run is older than routing or has route.prompts=0; `treelora eval --adapter route` "
            "reads them anew from the task data",
        )
    return Router(statistics)


def feature_tree(run: RunDir, at: str | None = None) -> dict[str, Any]:
    """Return the document of the tree over the prompts of a run's tasks.

    Args:
        run: the run directory.
        at: the last task it is over; None: the last one learned.

    Raises:
        RunDirError: the run has no such task yet, or one without features.
    """
    places = trained_places(run)
    names = [name for _, name in places]
    if not places or (at is not None and at not in names):
        missing = "any task" if at is None else at
        raise RunDirError(f"{run.path} has not learned {missing} yet")
    known = places if at is None else places[: names.index(at) + 1]
    tree = stored_router(run, known).tree
    return to_document(tree.tree, tree.bank, kind="prompt features")


def adapter_name(threshold: float, stripped: bool) -> str:
    """Return what scores.json calls this way of routing: ``route[:THRESHOLD][:stripped]``."""
    marks = [f"{threshold:g}"] if threshold else []
    return ":".join([ROUTE, *marks, *([STRIPPED] if stripped else [])])


def digest(statistics: FeatureStatistics) -> str:
    """Identify a task's statistics by SHA-256 over what is stored of them."""
    found = hashlib.sha256()
    for key, value in sorted(statistics.to_tensors().items()):
        found.update(f"{key}:{tuple(value.shape)}".encode())
        found.update(value.contiguous().numpy().tobytes())
    return found.hexdigest()


@dataclass(frozen=True)
class Sent:
    """Where the rows of a task go.

    Attributes:
        indices: int64 [n], the position of a learned task, or -1 for the base.
        confidence: float64 [n] in [0, 1].
        dots: int64 [n], the dot products with a task's mean that it took.
    """

    indices: Tensor
    confidence: Tensor
    dots: Tensor


@dataclass
class Cost:
    """What routing took.

    Attributes:
        queries: prompts that were read.
        routed: prompts that were routed, once for each set of learned tasks.
        feature_seconds: reading them.
        route_seconds: routing them.
    """

    queries: int = 0
    routed: int = 0
    feature_seconds: float = 0.0
    route_seconds: float = 0.0


class Traffic:
    """Routes the rows of tasks among the tasks learned up to any moment.

    Args:
        eye: reads the prompts.
        statistics: of every learned task.
        threshold: abstain below this confidence.
        parts: what is taken off the prompts of a task before they are looked at, by name; None:
            nothing.
    """

    def __init__(
        self,
        eye: Eye,
        statistics: Statistics,
        threshold: float,
        parts: Mapping[str, Parts] | None = None,
    ) -> None:
        self._eye = eye
        self._statistics = statistics
        self._threshold = threshold
        self._parts = parts
        self.adapter = adapter_name(threshold, parts is not None)
        self.names = tuple(statistics)
        self.cost = Cost()
        self._digests = [digest(one) for one in statistics.values()]

    @property
    def exact(self) -> bool:
        """True where every prompt is compared with every task."""
        return len(self.names) <= EXACT_UP_TO

    def identity(self, learned: int, adapters: Sequence[str]) -> str:
        """Identify what decides the answers: the router over the first tasks, and their adapters.

        Args:
            learned: how many tasks the router knows.
            adapters: the identity of each task's adapter.
        """
        found = hashlib.sha256(f"{self.adapter} {self._threshold!r}".encode())
        for name, adapter, features in zip(
            self.names[:learned], adapters, self._digests, strict=False
        ):
            found.update(f"\n{name} {adapter} {features}".encode())
        return f"sha256:{found.hexdigest()}"

    def read(self, tasks: Sequence[Task], split: str) -> dict[str, Tensor]:
        """Return the features of the rows of tasks, by name."""
        found = {}
        for task in tasks:
            began = time.perf_counter()
            prompts = [row.prompt for row in task.splits[split]]
            if self._parts is not None:
                prompts = [strip_shared(prompt, self._parts[task.name]) for prompt in prompts]
            found[task.name] = self._eye.features(prompts)
            self.cost.feature_seconds += time.perf_counter() - began
            self.cost.queries += len(prompts)
        return found

    def send(
        self, features: Mapping[str, Tensor], moments: Sequence[int]
    ) -> Iterator[tuple[int, str, Sent]]:
        """Route rows as they would have been routed when so many tasks were learned.

        Args:
            features: of the rows of tasks, by name.
            moments: counts of learned tasks; at each the tasks learned by then are routed.

        Yields:
            The moment, the name of a task and where its rows go.
        """
        for learned in moments:
            known = {name: features[name] for name in self.names[:learned] if name in features}
            for name, sent in self.among(learned, known).items():
                yield learned, name, sent

    def among(self, learned: int, features: Mapping[str, Tensor]) -> dict[str, Sent]:
        """Route rows among the first tasks, whether or not their own is one of them.

        Args:
            learned: how many tasks the router knows.
            features: of the rows of tasks, by name.
        """
        router = self._router(learned)
        found = {}
        for name, rows in features.items():
            routes = self._route(router, rows)
            found[name] = Sent(routes.indices, routes.confidence, routes.dots)
        return found

    def agreement(self, features: Mapping[str, Tensor]) -> dict[str, float]:
        """Return how often the search finds the nearest task; nothing where none is made."""
        if self.exact or not features:
            return {}
        rows = torch.cat(list(features.values()))
        share, _ = agreement(self._router(len(self.names)), rows, BEAM)
        return {"agreement": share}

    def _router(self, learned: int) -> Router:
        known = {name: self._statistics[name] for name in self.names[:learned]}
        return Router(known, self._threshold, EXACT_UP_TO)

    def _route(self, router: Router, rows: Tensor) -> Routes:
        began = time.perf_counter()
        routes = router.route(rows)
        self.cost.route_seconds += time.perf_counter() - began
        self.cost.routed += rows.shape[0]
        return routes
