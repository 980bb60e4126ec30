"""A task by hand for methods that read rows: random tokens, and a probe that really asks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from treelora_cli.methods.base import Method, StepContext, StreamContext, TaskContext
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import Example, collate
from treelora_cli.models.probe import Probe
from treelora_cli.recipe import BanditSection, LoraSection, ModelSection, TreeSection

M = TypeVar("M", bound=Method)
STEPS = 4


def start(kind: type[M], folder: Path, settings: dict | None = None, **lora: object) -> M:
    """Return a method that has met a model of a folder's, and no task."""
    backbone = load_backbone(ModelSection(name=str(folder), device="cpu"))
    section = LoraSection(**{"rank": 3, "alpha": 6, "dropout": 0.0, **lora})
    return meet(kind, AdaptedModel(backbone, section, 0), section, settings)


def meet(
    kind: type[M], model: AdaptedModel, section: LoraSection, settings: dict | None = None
) -> M:
    """Return another method of that kind that has met a model, and no task."""
    method = kind(kind.Settings.model_validate(settings or {}))
    method.start(StreamContext(7, BanditSection(), TreeSection(), section), model)
    return method


def rows(count: int, seed: int, *, apart: bool = False) -> list[Example]:
    """Rows of random tokens, no two of a length, with answers of one to three tokens."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for number in range(count):
        prompt, answer = 6 + number, 1 + number % 3
        tokens = torch.randint(3, 320, (prompt + answer,), generator=generator).tolist()
        found.append(Example(tuple(tokens), prompt, False, apart))
    return found


def task(model: AdaptedModel, index: int, examples: Sequence[Example]) -> TaskContext:
    """Return a task of so many rows: four steps in two epochs."""
    return TaskContext(
        index,
        f"task{index}",
        STEPS,
        STEPS // 2,
        100 + index,
        rows=examples,
        ask=Probe(model, lambda some: [collate(list(some), 0)]),
    )


def step(number: int = 0) -> StepContext:
    return StepContext(number, torch.tensor(1.0))


def move(model: AdaptedModel, seed: int, size: float = 0.1) -> None:
    """Make a random step of all that is trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def give_gradients(model: AdaptedModel, seed: int) -> list[torch.Tensor]:
    """Put random gradients in place of a backward pass; return copies."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return [parameter.grad.clone() for parameter in model.parameters()]


def flat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
