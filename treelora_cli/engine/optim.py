"""The optimizer of one task, its learning-rate schedule, and its state as named tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from treelora_cli.errors import RunDirError
from treelora_cli.recipe import OptimSection


def build_optimizer(
    parameters: Mapping[str, torch.nn.Parameter],
    section: OptimSection,
    rate: Callable[[str], float] = lambda key: 1.0,
) -> torch.optim.AdamW:
    """Return a new AdamW over the trainable parameters, as one fused kernel.

    Args:
        parameters: by key.
        section: the recipe's ``optim`` section.
        rate: given a key, by what that parameter's learning rate is multiplied; groups of the
            optimizer carry it as ``rate``.
    """
    groups: dict[float, list[torch.nn.Parameter]] = {}
    for key, parameter in parameters.items():
        groups.setdefault(rate(key), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": some, "rate": factor} for factor, some in groups.items()],
        lr=section.lr,
        betas=section.betas,
        weight_decay=section.weight_decay,
        fused=True,
    )


def learning_rate(section: OptimSection, step: int, steps: int) -> float:
    """Return the learning rate of a step: linear warm-up, then the schedule's decay.

    Args:
        section: the recipe's ``optim`` section.
        step: from 0.
        steps: steps of the task.
    """
    if step < section.warmup_steps:
        return section.lr * (step + 1) / section.warmup_steps
    if section.schedule == "constant":
        return section.lr
    span = max(1, steps - section.warmup_steps)
    done = min(1.0, (step - section.warmup_steps) / span)
    left = 1 - done if section.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return section.lr * (section.final_lr + (1 - section.final_lr) * left)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the optimizer's state as ``<parameter number>.<field>`` tensors on the host."""
    state = optimizer.state_dict()["state"]
    return {
        f"{number}.{field}": torch.as_tensor(value).detach().cpu().clone()
        for number, fields in state.items()
        for field, value in fields.items()
    }


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of all groups, each times its own ``rate``."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["rate"]


def load_optimizer_tensors(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back what :func:`optimizer_tensors` returned.

    Raises:
        RunDirError: the tensors are not those of this optimizer's parameters.
    """
    document = optimizer.state_dict()
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, _, field = key.partition(".")
        state.setdefault(int(number), {})[field] = value
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    fits = all(
        number < len(parameters) and fields["exp_avg"].shape == parameters[number].shape
        for number, fields in state.items()
    )
    if not fits:
        raise RunDirError(
            "the checkpoint's optimizer state does not fit the adapter",
            "was the run made with other lora settings? start a new run directory",
        )
    optimizer.load_state_dict({**document, "state": state})
