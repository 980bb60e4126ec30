"""The proximal form of TreeLoRA's penalty: what a task does not need stays exactly its group's.

A subgradient step never makes an entry equal to its target. The proximal step of the same L1
penalty does (soft-thresholding, Daubechies, Defrise and De Mol 2004): after every optimizer step

    w <- g + sign(w - g) max(|w - g| - threshold, 0)

over all entries of A and B, g the mean of a group of earlier adapters. The group is fixed after a
part of the task, when the bandit knows where the task belongs. With m the mean distance that the
stored tasks moved this tensor, and s optimizer steps left, threshold = lambda m / s: whatever moves
an entry by less than lambda mean displacements over the rest of the task does not move it at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from treelora_cli.methods.base import StoredTask
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.readback import send
from treelora_cli.models.snapshot import Snapshot, mean_snapshot

MOVED = "moved"
_START = "start."


class Proximal:
    """Pulls the live adapter onto the mean of a group of earlier ones, entry by entry.

    Args:
        model: its live adapter is pulled.
        strength: lambda.
    """

    def __init__(self, model: AdaptedModel, strength: float) -> None:
        self._parameters = model.live_parameters
        self._device = model.device
        self._strength = strength
        self._moved: list[Tensor] = []
        self._start: Snapshot = {}
        self._reference: list[Tensor] = []
        self._thresholds: list[Tensor] = []

    def restore(self, finished: Sequence[StoredTask]) -> None:
        """Take up how far earlier tasks moved each tensor."""
        self._moved += [task.memory.tensors[MOVED] for task in finished]

    def begin(self, start: Snapshot) -> None:
        """Begin a task, with no group yet.

        Args:
            start: the adapter it starts from.
        """
        self._start = start
        self._reference, self._thresholds = [], []

    @property
    def fixed(self) -> bool:
        """Whether the group is fixed."""
        return bool(self._reference)

    def fix(self, members: Sequence[Snapshot], steps_left: int) -> None:
        """Fix the group.

        Args:
            members: its tasks' adapters.
            steps_left: optimizer steps of the task still to come.
        """
        mean = mean_snapshot(members)
        moved = torch.stack(self._moved).mean(0) * (self._strength / max(1, steps_left))
        self._reference = [send(mean[key], self._device) for key in self._parameters]
        self._thresholds = list(send(moved, self._device))

    def step(self) -> None:
        """Take the proximal step."""
        with torch.no_grad():
            for live, goal, threshold in zip(
                self._parameters.values(), self._reference, self._thresholds, strict=True
            ):
                # g + (gap - clamp(gap)) is exactly g where the gap is within the threshold.
                gap = live.float() - goal
                live.copy_(goal + (gap - gap.clamp(-threshold, threshold)))

    def end(self, end: Snapshot) -> Tensor:
        """Return how far the task moved each tensor on average, float32 [tensors], and keep it."""
        moved = torch.stack([(end[key] - self._start[key]).abs().mean() for key in end])
        self._moved.append(moved)
        return moved

    def state(self) -> dict[str, Tensor]:
        """Return where the task began, as tensors for a checkpoint."""
        return {f"{_START}{key}": value for key, value in self._start.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take up where the task began; the group is fixed anew by the caller."""
        self._start = {key: tensors[f"{_START}{key}"] for key in self._start}
