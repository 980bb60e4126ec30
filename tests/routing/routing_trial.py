"""How well prompts are routed by looks alone, on the real task data beside the checkout.

Statistics come from training prompts, queries from the test split; both as they are ("full") and
with the task's shared beginning and ending taken off ("stripped"), learned from training prompts.

Run as a script to print the tables that the defaults were chosen by:
    PYTHONPATH=. python tests/routing/routing_trial.py [--sets trace,all] [--views all] [--unknown]
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import Encoder, positions_of
from treelora_cli.models.features import Pooling, mean_over, normed, pool, project, prompt_features
from treelora_cli.recipe import LoraSection, ModelSection
from treelora_cli.routing.quality import accuracy, confusion
from treelora_cli.routing.router import Router
from treelora_cli.routing.statistics import FeatureStatistics
from treelora_cli.tasks.layouts import detect
from treelora_cli.tasks.load import load_tasks
from treelora_cli.tasks.shared_text import shared_parts, strip_shared
from treelora_cli.tasks.types import Task

SHARED = Path(__file__).resolve().parents[3] / "shared"
KINDS = ("full", "stripped")
Samples = dict[str, tuple[Tensor, Tensor]]
"""Features of training and of test prompts by task."""


def mean_of(layer: float, tokens: int | None = None) -> Pooling:
    """The mean over the first tokens at a layer, given as a share of the depth; 0: embeddings."""

    def mean(states: Sequence[Tensor], mask: Tensor) -> Tensor:
        positions = positions_of(mask)
        counted = mask.bool() & ((positions > 0) | (mask.sum(1, keepdim=True) == 1))
        if tokens is not None:
            counted &= positions < tokens
        state = normed(states[round(layer * (len(states) - 1))])
        return mean_over(state, counted).cpu()

    return mean


def last_of(layer: float) -> Pooling:
    return lambda states, _: normed(states[round(layer * (len(states) - 1))])[:, -1].cpu()


def beside(pools: Sequence[Pooling], widths: list[int]) -> Pooling:
    """All views from one forward pass, one beside the other; their widths are noted."""

    def pool_all(states: Sequence[Tensor], mask: Tensor) -> Tensor:
        found = [view(states, mask) for view in pools]
        widths[:] = [part.shape[1] for part in found]
        return torch.cat(found, 1)

    return pool_all


def together(*pools: Pooling) -> Pooling:
    return lambda states, mask: project(torch.cat([p(states, mask) for p in pools], 1))


VIEWS: dict[str, Pooling] = {
    "chosen: middle@64 + last + last token": pool,
    "embeddings, mean": mean_of(0),
    "middle layer, mean": mean_of(0.5),
    "middle layer, mean of first 64": mean_of(0.5, 64),
    "last layer, mean": mean_of(1),
    "last layer, last token": last_of(1),
    "embeddings + middle + last, means": together(mean_of(0), mean_of(0.5), mean_of(1)),
    "middle@64 + middle + last, means": together(mean_of(0.5, 64), mean_of(0.5), mean_of(1)),
    "two: last, mean and last token": together(mean_of(1), last_of(1)),
}


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


def picked(rows: Sequence[str], count: int) -> list[str]:
    return random.Random(0).sample(list(rows), min(count, len(rows)))


def prompts_of(task: Task, train: int, test: int) -> dict[str, tuple[list[str], list[str]]]:
    """Training and test prompts, full and stripped."""
    every = [row.prompt for row in task.splits["train"]]
    parts = shared_parts(every)
    chosen = picked(every, train), picked([row.prompt for row in task.splits["test"]], test)
    bare = tuple([strip_shared(prompt, parts) for prompt in prompts] for prompts in chosen)
    return {"full": chosen, "stripped": (bare[0], bare[1])}


def load(names: str) -> list[Task]:
    folders = ["trace"] if names == "trace" else ["trace", "cl_benchmark"]
    tasks = []
    for folder in folders:
        data = SHARED / "data" / folder
        tasks += load_tasks(sorted(detect(data).tasks), data)
    return tasks


def route_all(samples: Samples, threshold: float = 0.0) -> tuple[Router, Tensor]:
    """The router of some tasks and the confusion of their test prompts."""
    statistics = {name: FeatureStatistics.of(train) for name, (train, _) in samples.items()}
    router = Router(statistics, threshold)
    true, routed = [], []
    for index, (_, test) in enumerate(samples.values()):
        indices = router.route(test).indices
        true += [index] * len(indices)
        routed += indices.tolist()
    return router, confusion(true, routed, len(samples))


def confused(names: Sequence[str], counts: Tensor) -> str:
    cells = [
        (int(counts[i, j]), f"{names[i]} -> {names[j]} {int(counts[i, j])}")
        for i in range(len(names))
        for j in range(len(names))
        if i != j and counts[i, j]
    ]
    return ", ".join(text for _, text in sorted(cells, reverse=True)[:10])


def show_unknown(samples: Samples, thresholds: Sequence[float]) -> None:
    """Leave each task out in turn: how many of its prompts, and of the others', are refused."""
    known = {threshold: [0, 0] for threshold in thresholds}
    unknown = {threshold: [0, 0] for threshold in thresholds}
    for left_out, (_, strangers) in samples.items():
        rest = {name: value for name, value in samples.items() if name != left_out}
        router = Router({name: FeatureStatistics.of(train) for name, (train, _) in rest.items()})
        own = torch.cat([router.route(test).confidence for _, test in rest.values()])
        foreign = router.route(strangers).confidence
        for threshold in thresholds:
            for tally, values in ((known, own), (unknown, foreign)):
                tally[threshold][0] += int((values < threshold).sum())
                tally[threshold][1] += len(values)
    for threshold in thresholds:
        kept, refused = known[threshold], unknown[threshold]
        say(
            f"    threshold {threshold}: refuses {kept[0] / kept[1]:.1%} of known tasks' prompts, "
            f"{refused[0] / refused[1]:.1%} of an unknown task's"
        )


def report(features: dict[str, Samples], options: argparse.Namespace, trace: set[str]) -> None:
    for chosen in options.sets.split(","):
        for kind in KINDS:
            for count in options.train:
                samples = {
                    name: (train[:count], test)
                    for name, (train, test) in features[kind].items()
                    if chosen == "all" or name in trace
                }
                router, counts = route_all(samples)
                say(
                    f"  {chosen} ({len(samples)} tasks), {kind}, {count} training prompts a task: "
                    f"{float(accuracy(counts).mean()):.1%} (shrinkage {router.intensity:.3f})"
                )
            if options.views == "chosen":
                say(f"    confused: {confused(router.names, counts) or 'none'}")
            if options.unknown:
                show_unknown(samples, (0.25, 0.5, 0.67))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=str(SHARED / "base"))
    parser.add_argument("--sets", default="trace,all")
    parser.add_argument("--views", default="chosen", choices=["chosen", "all"])
    parser.add_argument("--train", type=int, nargs="+", default=[60, 200], help="prompts a task")
    parser.add_argument("--test", type=int, default=64, help="prompts a task")
    parser.add_argument("--unknown", action="store_true", help="leave each task out in turn")
    options = parser.parse_args()
    adapted = AdaptedModel(load_backbone(ModelSection(name=options.model)), LoraSection(), seed=0)
    encoder = Encoder(adapted.backbone.tokenizer, 767, 200, positions=adapted.backbone.positions)
    trace = {task.name for task in load("trace")}
    tasks = load("all" if "all" in options.sets else "trace")
    prompts = {task.name: prompts_of(task, max(options.train), options.test) for task in tasks}
    views = list(VIEWS) if options.views == "all" else list(VIEWS)[:1]
    widths: list[int] = []
    pooling = beside([VIEWS[view] for view in views], widths)
    start, read = time.perf_counter(), 0
    features: dict[str, Samples] = {kind: {} for kind in KINDS}
    for name, kinds in prompts.items():
        for kind, (train, test) in kinds.items():
            both = prompt_features(adapted, encoder, train + test, 32, pooling=pooling)
            features[kind][name] = both[: len(train)], both[len(train) :]
            read += len(both)
    say(f"{(time.perf_counter() - start) / read * 1e3:.1f} ms a prompt for {len(views)} view(s)")
    for view, columns in zip(views, torch.arange(sum(widths)).split(widths), strict=True):
        say(f"{view}: {widths[views.index(view)]} features")
        seen = {
            kind: {name: (a[:, columns], b[:, columns]) for name, (a, b) in samples.items()}
            for kind, samples in features.items()
        }
        report(seen, options, trace)


if __name__ == "__main__":
    main()
