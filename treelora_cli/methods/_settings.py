"""What the recipe's ``method`` section may say for TreeLoRA."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from treelora_cli.methods.base import MethodSettings


class TreeLoraSettings(MethodSettings):
    """TreeLoRA's own settings.

    Under ``signature: lora_a`` distances favour the most recent task, because weights go on from
    task to task and drift; ``lora_delta`` compares what each task changed.
    """

    strength: Annotated[float, Field(ge=0)] = Field(
        3.0,
        alias="lambda",
        description="strength of the penalty, the same on every backbone: mean displacements that "
        "the group takes back (proximal), weight beside the loss (subgradient; the paper's 0.5)",
    )
    ramp: Literal["task", "epoch", "none"] = Field(
        "task", description="how the penalty grows: over the task, over each epoch, not at all"
    )
    target: Literal["path", "leaf"] = Field(
        "leaf", description="pulled toward the means along the chosen path, or the task's own"
    )
    form: Literal["proximal", "subgradient"] = Field(
        "proximal",
        description="the penalty as a gradient all through the task (subgradient); or only until "
        "the group is fixed, and then as soft-thresholding of A and B onto the group's mean, which "
        "leaves most entries equal to it (proximal)",
    )
    fixed_after: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.25, description="part of the task after which form=proximal fixes the group"
    )
    signature: Literal["lora_a", "lora_delta", "gradient", "query"] = Field(
        "lora_a",
        description="live weights (with start=continue they favour the last task, for weights "
        "drift), their change within the task, the mean gradient, or the paper's literal gradient "
        "of the present rows under an earlier adapter",
    )
    factors: Literal["A", "AB"] = Field("A", description="LoRA matrices that make the signature")
    start: Literal["continue", "fresh", "group"] = Field(
        "continue",
        description="a task starts from the last task's weights, from the common seeded start, or "
        "from the mean change of the group of tasks it resembles",
    )
    start_batches: Annotated[int, Field(gt=0)] = Field(
        4, description="steps' rows whose gradient finds the group"
    )
