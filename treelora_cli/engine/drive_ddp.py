"""Steps driven by torch's DistributedDataParallel."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from treelora_cli.engine.drive import PlainDrive
from treelora_cli.engine.world import World, noticing
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import Batch
from treelora_cli.models.forward import answer_logits
from treelora_cli.recipe import OptimSection


class Forward(torch.nn.Module):
    """The forward pass with all that is trained by it, as wrappers of modules want to see it.

    Args:
        adapted: the model.
    """

    def __init__(self, adapted: AdaptedModel) -> None:
        super().__init__()
        self._adapted = (adapted,)
        self.peft = adapted.peft
        inside = set(map(id, adapted.peft.parameters()))
        own = [p for p in adapted.more_parameters.values() if id(p) not in inside]
        self.parts = torch.nn.ParameterList(own)

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits where answers are predicted."""
        return answer_logits(self._adapted[0], batch)


class DdpDrive(PlainDrive):
    """Every process reads its rows; gradients are averaged in each step's last backward pass.

    Args:
        adapted: the model.
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
        with noticing():
            self._ddp = DistributedDataParallel(Forward(adapted), broadcast_buffers=False)

    def logits(self, batch: Batch, *, last: bool) -> Tensor:
        """Read a batch; DDP must know before the pass whether its gradient is reduced."""
        with nullcontext() if last else self._ddp.no_sync():
            found: Tensor = self._ddp(batch)
        return found

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a pass's gradient; in the last pass the sum of all passes is averaged."""
        # DDP waits for the gradient of every parameter, also of one that this step did not use.
        nothing = torch.stack([parameter.sum() for parameter in self.parameters]).sum() * 0
        with nullcontext() if last else self._ddp.no_sync(), noticing():
            super().backward(loss + nothing, last=last)

    def close(self) -> None:
        """Let go of the model: the hooks go with the wrapper."""
        del self._ddp
