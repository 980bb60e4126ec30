"""Gradients of a live model taken another way than the package takes them, and tasks by hand."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from rows_support import flat, move, rows, task

from treelora_cli.methods.base import Method, StoredTask
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import Example
from treelora_cli.recipe import LoraSection, ModelSection

LORA = LoraSection(rank=4, dropout=0.0)


def live_model(folder: Path) -> AdaptedModel:
    """A model of a folder's with a LoRA adapter, without dropout."""
    backbone = load_backbone(ModelSection(name=str(folder), device="cpu"))
    return AdaptedModel(backbone, LORA, 0)


def weights(model: AdaptedModel) -> torch.Tensor:
    """All that is trained as one vector, copied."""
    return flat(model.parameters()).clone()


def row_loss(model: AdaptedModel, row: Example) -> torch.Tensor:
    """The summed loss of one row's answer, as transformers computes it."""
    tokens, start = torch.tensor([row.tokens]), row.answer_start
    if row.apart:
        found = model.peft(input_ids=tokens[:, :start], labels=tokens[:, start:], use_cache=False)
    else:
        labels = tokens.clone()
        labels[:, :start] = -100
        found = model.peft(input_ids=tokens, labels=labels, use_cache=False)
    return found.loss * (len(row.tokens) - start)


def row_gradients(model: AdaptedModel, chosen: Sequence[Example]) -> torch.Tensor:
    """The gradient of every row's summed loss, [rows, P]."""
    parameters = model.parameters()
    found = [torch.autograd.grad(row_loss(model, row), parameters) for row in chosen]
    return torch.stack([flat(parts) for parts in found])


def answer_tokens(chosen: Sequence[Example]) -> int:
    """The answer tokens of rows."""
    return sum(len(row.tokens) - row.answer_start for row in chosen)


def mean_gradient(model: AdaptedModel, chosen: Sequence[Example]) -> torch.Tensor:
    """The gradient of the mean loss over answer tokens, [P]."""
    return row_gradients(model, chosen).sum(dim=0) / answer_tokens(chosen)


def give(model: AdaptedModel, gradient: torch.Tensor) -> None:
    """Write a vector into the gradients."""
    at = 0
    for parameter in model.parameters():
        parameter.grad = gradient[at : at + parameter.numel()].view_as(parameter).clone()
        at += parameter.numel()


def taken(model: AdaptedModel) -> torch.Tensor:
    """The gradients as one vector."""
    return flat([parameter.grad for parameter in model.parameters() if parameter.grad is not None])


def task_rows(model: AdaptedModel, index: int) -> list[Example]:
    """The six rows of a task."""
    return rows(6, 50 + index, apart=model.backbone.encodes)


def finish(method: Method, model: AdaptedModel, count: int) -> list[StoredTask]:
    """Go through tasks that only move the weights; return them as they would be read back."""
    stored = []
    for index in range(count):
        context = task(model, index, task_rows(model, index))
        method.begin_task(context)
        move(model, index, 0.3)  # were B zero, A's gradient would be
        memory = method.end_task(context)
        end = model.snapshot()
        stored.append(StoredTask(index, context.name, memory, lambda end=end: end))
    return stored
