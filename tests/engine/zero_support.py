"""What the drive asks of DeepSpeed, done by one process: its own copy of the weights, above all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor


class OneProcessDeepSpeed:
    """Stands in for the package; like it, a step starts from float32 copies of the weights.

    Attributes:
        config: what the engine was made with.
        adding: whether gradients may be given to it now.
    """

    DeepSpeedEngine = SimpleNamespace(coalesce_grad_reduction=None)

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.adding = False
        self.utils = self

    def init_distributed(self, **options: object) -> None:
        pass

    def initialize(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, config: dict[str, Any]
    ) -> tuple[OneProcessDeepSpeed, None]:
        self.config, self.optimizer = config, optimizer
        self.copies: dict[torch.nn.Parameter, torch.nn.Parameter] = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                self.copies[parameter] = torch.nn.Parameter(parameter.detach().clone())
            group["params"] = [self.copies[parameter] for parameter in group["params"]]
        return self, None

    @contextmanager
    def coalesce_grad_reduction(self) -> Iterator[None]:
        self.adding = True
        yield
        self.adding = False

    def step(self) -> None:
        assert not self.adding
        for parameter, copy in self.copies.items():
            copy.grad, parameter.grad = parameter.grad, None
        limit = self.config["gradient_clipping"] or torch.inf
        self.norm = torch.nn.utils.clip_grad_norm_(list(self.copies.values()), limit)
        self.optimizer.step()
        with torch.no_grad():
            for parameter, copy in self.copies.items():
                parameter.copy_(copy)

    def get_global_grad_norm(self) -> float:
        return float(self.norm)

    def destroy(self) -> None:
        pass

    def safe_set_full_fp32_param(self, parameter: torch.nn.Parameter, value: Tensor) -> None:
        self.copies[parameter].data.copy_(value)

    def safe_get_full_optimizer_state(self, parameter: torch.nn.Parameter, name: str) -> Tensor:
        return self.optimizer.state[self.copies[parameter]][name]

    def safe_set_full_optimizer_state(
        self, parameter: torch.nn.Parameter, value: Tensor, name: str
    ) -> None:
        self.optimizer.state[self.copies[parameter]][name].copy_(value)
