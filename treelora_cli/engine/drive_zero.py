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
from treelora_cli.models.forward import answer_logits
from treelora_cli.recipe import OptimSection

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 50_000_000
"""The most entries of gradients that are reduced at a time."""


def import_deepspeed() -> Any:
    """Import DeepSpeed, quietly and without its C++ build on a CPU.

    Raises:
        EnvironmentProblem: it is not installed, or too old.
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
    if not hasattr(deepspeed.DeepSpeedEngine, "coalesce_grad_reduction"):
        raise EnvironmentProblem(
            f"deepspeed {deepspeed.__version__} is too old: 0.19.1 was the first to reduce the "
            "gradients of several backward passes at once",
            "pip install --upgrade deepspeed, or use processes.engine=ddp",
        )
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if not torch.cuda.is_available():
        # The operator serves inference alone, and building it takes a compiler and minutes.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class ZeroDrive(Drive):
    """DeepSpeed's engine over the trainable parameters; what is frozen stays as it is.

    The weights of the adapter are kept in float32, so no loss scaling and no second copy is needed
    whatever the base's dtype. Gradients of a step's passes are added up here and reduced once, in
    the parameters' order: ZeRO 2 alone would reduce each as its backward pass comes to it, and mix
    up parameters where that order differs between processes (DeepSpeed#2343), as with a penalty
    that a process without rows does not have, or experts that one process's rows do not ask.
    Checkpoints hold what ``safe_get_full_optimizer_state`` gives; DeepSpeed's own files are neither
    written nor read.

    Args:
        adapted: the model.
        optim: the recipe's ``optim`` section.
        rate: by what a parameter's learning rate is multiplied.
        world: the processes, more than one.
        stage: 1 or 2.

    Raises:
        EnvironmentProblem: DeepSpeed is missing or too old.
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
        self._adapted = adapted
        self._state = build_optimizer(adapted.trainable(), optim, rate)
        # In the order that numbers the optimizer's state, before DeepSpeed makes it flat.
        self._order = [p for group in self._state.param_groups for p in group["params"]]
        self._gradients: list[Tensor] = []
        config = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": optim.grad_clip,
            "zero_optimization": {
                "stage": stage,
                # A buffer of this size is made in every step; unasked it is 2 GB.
                "reduce_bucket_size": min(adapted.trainable_count(), BUCKET),
            },
            "zero_allow_untested_optimizer": True,
        }
        with noticing():
            deepspeed.init_distributed(verbose=False)
            self._engine, *_ = deepspeed.initialize(
                model=Forward(adapted), optimizer=self._state, config=config
            )
        self._utils = deepspeed.utils

    def begin(self, lr: float) -> None:
        """Begin a step."""
        set_learning_rate(self._engine.optimizer, lr)
        self._gradients = [torch.zeros_like(parameter) for parameter in self._order]

    def logits(self, batch: Batch, *, last: bool) -> Tensor:
        """Read a batch."""
        return answer_logits(self._adapted, batch)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Add a pass's gradient; DeepSpeed sees it with the step."""
        found = torch.autograd.grad(loss, self._order, materialize_grads=True)
        for gradient, part in zip(self._gradients, found, strict=True):
            gradient.add_(part)

    def step(self) -> Tensor:
        """Average over the processes, clip and move."""
        self._move()
        norm = self._engine.get_global_grad_norm()
        return torch.as_tensor(norm, dtype=torch.float32, device=self._adapted.device)

    def _move(self) -> None:
        """Give DeepSpeed the gradients, all of them on every process, and let it take a step."""
        with noticing():
            with self._engine.coalesce_grad_reduction():
                for parameter, gradient in zip(self._order, self._gradients, strict=True):
                    parameter.grad = gradient
            self._engine.step()
        self._gradients = []

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
        self.begin(0.0)
        self._move()

    def _steps(self) -> Tensor:
        states = list(self._state.state.values())
        count: Tensor = states[0]["step"].detach().cpu().float()
        return count

    def close(self) -> None:
        """Let go of the model: DeepSpeed's hooks and buffers go."""
        self._engine.destroy()
