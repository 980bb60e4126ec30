"""A fresh LoRA for every task on the frozen sum of the earlier ones: what several methods share.

After task n a module's weights are W + s (B_1 A_1 + ... + B_n A_n). The frozen part is one adapter
whose rank grows by r with every task, A's rows and B's columns behind one another, and so is what
is stored. Nobody has to know the task of a question: the sum answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, NamedTuple

from torch import Tensor

from treelora_cli.methods.base import Answer, Method, StoredTask, StreamContext, TaskContext
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.change import A_KEY, B_KEY
from treelora_cli.models.snapshot import is_more, lora_of


class SummedLora(Method):
    """A method whose live adapter stands on the frozen sum of all earlier tasks' adapters.

    Attributes:
        live: the live adapter's factors, module by module.
        past: those of the frozen sum, of the same modules; empty in the first task.
    """

    answer: ClassVar[Answer] = "sum"

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        """Begin with nothing under the live adapter."""
        super().start(stream, model)
        model.stand_on(None)
        self.live = pairs(model.live_parameters)
        self.past: list[Pair] = []

    def begin_task(self, task: TaskContext) -> None:
        """Draw the live adapter anew: its A by the task's seed, its B zero."""
        self.model.reset(task.seed)
        self.past = pairs(self.model.past_parameters)

    def install(self, finished: Sequence[StoredTask]) -> None:
        """Freeze the last task's sum under a live adapter that adds nothing yet.

        What was trained beside LoRA, if anything, is the last task's.
        """
        answer = finished[-1].adapter()
        self.model.stand_on(lora_of(answer))
        self.model.reset()
        more = {key: value for key, value in answer.items() if is_more(key)}
        if more:
            self.model.restore(self.model.snapshot() | more)


class Pair(NamedTuple):
    """The two factors of one adapted module; it changes by ``scale * B @ A``.

    Attributes:
        module: its name.
        A: [r, d_in].
        B: [d_out, r].
    """

    module: str
    A: Tensor
    B: Tensor


def pairs(parameters: Mapping[str, Tensor]) -> list[Pair]:
    """Return the factors of every module, in the order of the parameters.

    Args:
        parameters: an adapter's by PEFT's saved key, such as ``AdaptedModel.live_parameters``.
    """
    return [
        Pair(key.removesuffix(A_KEY), A, parameters[key.removesuffix(A_KEY) + B_KEY])
        for key, A in parameters.items()
        if key.endswith(A_KEY)
    ]
