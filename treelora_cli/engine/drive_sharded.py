"""Steps on a base that is shared out over processes: the adapter's gradient is averaged here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from treelora_cli.engine.drive import PlainDrive
from treelora_cli.engine.world import World
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.recipe import OptimSection


class ShardedDrive(PlainDrive):
    """Every process reads its rows; FSDP gathers base weights, which have no gradient.

    What is trained is whole on every process, as under DDP, which does not take a model of which
    parts are shared out. Its gradient is averaged in one exchange a step.

    Args:
        adapted: the model, its base shared out.
        optim: the recipe's ``optim`` section.
        rate: by what a parameter's learning rate is multiplied.
        world: the processes, more than one.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        optim: OptimSection,
        rate: Callable[[str], float],
        world: World,
    ) -> None:
        super().__init__(adapted, optim, rate)
        self.times = world.size
        self._world = world

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a pass's gradient; after the last pass the sum of all passes is averaged."""
        super().backward(loss, last=last)
        if last:
            self._average()

    def _average(self) -> None:
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.parameters]
        joined = self._world.sum(torch.cat([grad.flatten() for grad in grads])) / self.times
        parts = torch.split(joined, [grad.numel() for grad in grads])
        for parameter, part in zip(self.parameters, parts, strict=True):
            parameter.grad = part.view_as(parameter)
