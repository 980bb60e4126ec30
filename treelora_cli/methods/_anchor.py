"""Quadratic penalties of several tasks as the one quadratic that is their sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from treelora_cli.errors import RunDirError

WEIGHT, CENTRE, FLOOR = "anchor.weight", "anchor.centre", "anchor.floor"


@dataclass(frozen=True)
class Anchor:
    """sum over j of weight_j (theta_j - centre_j)^2, plus floor.

    Attributes:
        weight: float32 [P], none negative.
        centre: float32 [P].
        floor: float64 scalar, at least 0: the least value there is.
    """

    weight: Tensor
    centre: Tensor
    floor: Tensor

    @classmethod
    def of(cls, weight: Tensor, centre: Tensor) -> Anchor:
        """Return the penalty of one task."""
        return cls(weight, centre, torch.zeros((), dtype=torch.float64))

    def value(self, theta: Tensor) -> Tensor:
        """Return its value at theta, [P], a scalar in the graph."""
        return (self.weight * (theta - self.centre).square()).sum() + self.floor.to(theta.dtype)

    def plus(self, other: Anchor) -> Anchor:
        """Return the sum of two: their centres' weighted mean, and what no theta can take away.

        a (t - x)^2 + b (t - y)^2 = (a + b) (t - (a x + b y) / (a + b))^2 + a b / (a + b) (x - y)^2
        """
        a, b = self.weight.double(), other.weight.double()
        x, y = self.centre.double(), other.centre.double()
        both = a + b
        share = torch.where(both > 0, b / both, 1.0)  # where nothing weighs, the later centre
        floor = self.floor + other.floor + (a * share * (x - y).square()).sum()
        return Anchor(both.float(), (x + share * (y - x)).float(), floor)

    def times(self, factor: float) -> Anchor:
        """Return it weighing so many times as much."""
        return Anchor(self.weight * factor, self.centre, self.floor * factor)

    def to(self, device: torch.device) -> Anchor:
        """Return it on a device."""
        return Anchor(*(part.to(device) for part in (self.weight, self.centre, self.floor)))

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by name."""
        return {WEIGHT: self.weight, CENTRE: self.centre, FLOOR: self.floor}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor], size: int, task: str) -> Anchor:
        """Read it back.

        Args:
            tensors: those of ``tensors``.
            size: P.
            task: after which it was stored, for messages.

        Raises:
            RunDirError: a tensor is missing, or is not of this model.
        """
        shapes = {WEIGHT: (size,), CENTRE: (size,), FLOOR: ()}
        if any(k not in tensors or tensors[k].shape != shape for k, shape in shapes.items()):
            raise RunDirError(
                f"what is stored after task {task} is damaged or not of this model's shape",
                "use the run's own base and lora settings, or put method.safetensors back",
            )
        return cls(tensors[WEIGHT], tensors[CENTRE], tensors[FLOOR])
