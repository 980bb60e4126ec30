"""A short stream by hand for methods that sum adapters: random steps in place of training."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import numpy as np
import torch

from treelora_cli.methods._sums import SummedLora
from treelora_cli.methods.base import StepContext, StoredTask, StreamContext, TaskContext
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.snapshot import Snapshot
from treelora_cli.recipe import BanditSection, LoraSection, ModelSection, TreeSection

M = TypeVar("M", bound=SummedLora)


def start(kind: type[M], folder: Path, settings: dict | None = None, **lora: object) -> M:
    """Return a method that has met a model of a folder's, and no task."""
    backbone = load_backbone(ModelSection(name=str(folder), device="cpu"))
    section = LoraSection(**{"rank": 3, "alpha": 6, "dropout": 0.0, **lora})
    method = kind(kind.Settings.model_validate(settings or {}))
    method.start(
        StreamContext(7, BanditSection(), TreeSection(), section),
        AdaptedModel(backbone, section, 0),
    )
    return method


def task(index: int) -> TaskContext:
    return TaskContext(index, f"task{index}", steps=4, steps_per_epoch=4, seed=100 + index)


def step(number: int = 0) -> StepContext:
    return StepContext(number, torch.tensor(1.0))


def move(model: AdaptedModel, seed: int, size: float = 0.1) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.live_parameters.values():
            parameter += size * torch.randn(parameter.shape, generator=generator)


def learn(method: SummedLora, index: int) -> tuple[StoredTask, Snapshot]:
    """Go through a task; return it as stored, and the adapter that it trained itself."""
    method.begin_task(task(index))
    move(method.model, index)
    memory = method.end_task(task(index))
    answer, own = method.model.answer(), method.model.snapshot()
    stored = StoredTask(index, f"task{index}", memory, lambda: answer)
    method.install([stored])
    return stored, own


def modules(snapshot: Snapshot) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return A and B of every module in float64."""
    keys = sorted(key for key in snapshot if ".lora_A." in key)
    return [
        (snapshot[key].double().numpy(), snapshot[key.replace("lora_A", "lora_B")].double().numpy())
        for key in keys
    ]


def gradients(model: AdaptedModel) -> list[tuple[np.ndarray | None, np.ndarray | None]]:
    """Return the gradients of A and B of every module, as ``modules`` orders them."""
    live = model.live_parameters
    found = []
    for key in sorted(key for key in live if ".lora_A." in key):
        pair = (live[key].grad, live[key.replace("lora_A", "lora_B")].grad)
        found.append(tuple(None if g is None else g.double().numpy() for g in pair))
    return found
