"""Steps driven by DeepSpeed's ZeRO 1 and 2: the optimizer's state is shared out among processes."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any

import torch
from torch import Tensor

from treelora_cli.engine.drive import Drive
from treelora_cli.engine.drive_ddp import Forward
from treelora_cli.engine.optim import build_optimizer, set_learning_rate
from treelora_cli.engine.world import World, noticing
from treelora_cli.errors import EnvironmentProblem, RunDirError
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import Batch
from treelora_cli.recipe import OptimSection

MOMENTS = ("exp_avg", "exp_avg_sq")


def import_deepspeed() -> Any:
    """Import DeepSpeed, quietly and without its C++ build on a CPU.

    Raises:
        EnvironmentProblem: it is not installed.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        # Its logger writes to what stdout is now; stdout is for results.
        with redirect_stdout(sys.stderr):
            import deepspeed
    except ImportError:
        raise EnvironmentProblem(
            "processes.engine=zero1 and zero2 need the package deepspeed",
            "pip install 'treelora[deepspeed]', or use processes.engine=ddp",
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # The operator serves inference alone, and building it takes a compiler and minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class ZeroDrive(Drive):
    """DeepSpeed's engine over the trainable parameters; what is frozen stays as it is.

    The weights of the adapter are kept in float32, so no loss scaling and no second copy is needed
    whatever the base's dtype. Checkpoints hold what ``safe_get_full_optimizer_state`` gives;
    DeepSpeed's own files are neither written nor read.

    Args:
        adapted: the model.
        optim: the recipe's ``optim`` section.
        rate: by what a parameter's learning rate is multiplied.
        world: the processes, more than one.
        stage: 1 or 2.

    Raises:
        EnvironmentProblem: DeepSpeed is missing.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        optim: OptimSection,
        rate: Callable[[str], float],
        world: World,
        *,
        stage: int,
    ) -> None:
        deepspeed = import_deepspeed()
        self.times = world.size
        self._parameters = adapted.parameters()
        self._state = build_optimizer(adapted.trainable(), optim, rate)
        # In the order that numbers the optimizer's state, before DeepSpeed makes it flat.
        self._order = [p for group in self._state.param_groups for p in group["params"]]
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optim.grad_clip,
            "zero_optimization": {"stage": stage},
            "zero_allow_untested_optimizer": True,
        }
        with noticing():
            deepspeed.init_distributed(verbose=False)
            self._engine, *_ = deepspeed.initialize(
                model=Forward(adapted), optimizer=self._state, config=config
            )
        from deepspeed import utils

        self._utils = utils

    def begin(self, lr: float) -> None:
        """Begin a step."""
        set_learning_rate(self._engine.optimizer, lr)

    def logits(self, batch: Batch, *, last: bool) -> Tensor:
        """Read a batch."""
        self._engine.set_gradient_accumulation_boundary(last)
        found: Tensor = self._engine(batch)
        return found

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a pass's gradient; each is reduced as it comes."""
        nothing = torch.stack([parameter.sum() for parameter in self._parameters]).sum() * 0
        with noticing():
            self._engine.backward(loss + nothing)

    def step(self) -> Tensor:
        """Clip and move."""
        with noticing():
            self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self._parameters[0].device)

    def written(self) -> None:
        """Put the model's weights into DeepSpeed's own copy, which its next step starts from."""
        for parameter in self._order:
            self._utils.safe_set_full_fp32_param(parameter, parameter.detach())

    def tensors(self) -> dict[str, Tensor]:
        """Gather AdamW's moments; every process gets the whole."""
        found: dict[str, Tensor] = {}
        steps = self._steps()
        for number, parameter in enumerate(self._order):
            found[f"{number}.step"] = steps.clone()
            for name in MOMENTS:
                whole = self._utils.safe_get_full_optimizer_state(parameter, name)
                found[f"{number}.{name}"] = whole.detach().cpu().view(parameter.shape).clone()
        return found

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Put AdamW's moments and its count of steps back, and the weights into its own copy.

        Raises:
            RunDirError: the tensors are not those of these parameters.
        """
        ordered = self._order
        wanted = {f"{number}.{name}" for number in range(len(ordered)) for name in MOMENTS}
        if not wanted <= tensors.keys():
            raise RunDirError(
                "the checkpoint's optimizer state does not fit the adapter",
                "was the run made with other lora settings? start a new run directory",
            )
        weights = [parameter.detach().clone() for parameter in ordered]
        self._make_state()
        with torch.no_grad():
            for parameter, weight in zip(ordered, weights, strict=True):
                parameter.copy_(weight)
        self.written()
        for number, parameter in enumerate(ordered):
            for name in MOMENTS:
                value = tensors[f"{number}.{name}"].to(parameter.device)
                self._utils.safe_set_full_optimizer_state(parameter, value, name)
        for state in self._state.state.values():
            state["step"].fill_(float(tensors["0.step"]))

    def _make_state(self) -> None:
        """Take a step of nothing at no learning rate: DeepSpeed makes its moments in the first.

        It also puts its own copy of the weights into the model, which is older than a checkpoint's.
        """
        set_learning_rate(self._engine.optimizer, 0.0)
        self._engine.set_gradient_accumulation_boundary(True)
        nothing = torch.stack([parameter.sum() for parameter in self._parameters]).sum() * 0
        with noticing():
            self._engine.backward(nothing)
            self._engine.step()

    def _steps(self) -> Tensor:
        states = list(self._state.state.values())
        count: Tensor = states[0]["step"].detach().cpu().float()
        return count

    def close(self) -> None:
        """Let go of the model: DeepSpeed's hooks and buffers go."""
        self._engine.destroy()
