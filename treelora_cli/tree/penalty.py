"""What pulls the current task toward the chosen tasks: targets, weights, penalty and gradient.

With F_d entries in block d, D blocks, m_d the stored tasks' mean displacement and lambda the
strength, the penalty is lambda ramp (1/D) sum_d mean|s^d - target^d| / m_d (paper Eq. 3 with the
scales taken out), so lambda means the same on every backbone (design 5.1.4).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from treelora_cli.errors import UsageError, did_you_mean
from treelora_cli.tree import sampling
from treelora_cli.tree.nodes import GradientTree
from treelora_cli.tree.signatures import SignatureBank

TARGETS = ("path", "leaf")
RAMPS = ("task", "epoch", "none")

# A displacement below this share of the largest block's is taken as no displacement at all.
_NEGLIGIBLE = 1e-6


class PathTargets:
    """The penalty's targets along a path of the tree, with the mean signatures kept.

    Block d of a target is that of the mean signature of the node at depth min(d, leaf depth). A
    node's mean is worked out when a path first meets it, for the one block it serves, so that a
    step costs O(F) whatever the number of tasks and all that is kept is no larger than the bank.
    Of a node with more than ``sampling.EXACT_TASKS`` members it is the mean of 129 to 256 of them,
    evenly spaced: its standard error is less than a tenth of the members' deviation.

    Args:
        tree: the tree over the bank's tasks.
        bank: the stored signatures.
        target: ``path``, or ``leaf`` for the leaf's own signature at every block.

    Raises:
        UsageError: an unknown target.
    """

    def __init__(self, tree: GradientTree, bank: SignatureBank, target: str = "path") -> None:
        if target not in TARGETS:
            raise UsageError(
                f"unknown bandit.target {target!r}", did_you_mean(target, list(TARGETS))
            )
        self._tree = tree
        self._bank = bank
        self._target = target
        self._ends = torch.tensor(bank.widths).cumsum(0).tolist()
        self._means: dict[int, Tensor] = {}

    def __call__(self, paths: Sequence[Sequence[int]]) -> Tensor:
        """Return the target signature, a constant float32 [F] on the host.

        Args:
            paths: node ids from the root to a leaf: one path for the model, or one a block.
        """
        if len(paths) > 1:
            pieces = [self._piece(path, block, block + 1) for block, path in enumerate(paths)]
            return torch.cat([piece for found in pieces for piece in found])
        return torch.cat(self._piece(paths[0], 0, self._bank.blocks))

    def of_arms(self, arms: Sequence[int]) -> Tensor:
        """Return the target for chosen arms (also of searches without a tree): their own paths."""
        return self([self._tree.path_to(arm) for arm in arms])

    def _piece(self, path: Sequence[int], first: int, last: int) -> list[Tensor]:
        """Return the targets of blocks first .. last - 1, one tensor a node that serves some."""
        leaf = len(path) - 1
        inner = min(leaf, last) if self._target == "path" else first
        found = [self._mean(path[block], block) for block in range(first, inner)]
        rest = max(first, inner)
        if rest < last:
            task = self._tree.nodes[path[leaf]].tasks[0]
            found.append(self._bank.values[task, self._start(rest) : self._ends[last - 1]])
        return found

    def _mean(self, at: int, block: int) -> Tensor:
        # A node serves only the block whose number is its depth, so its id is the whole key.
        mean = self._means.get(at)
        if mean is None:
            columns = self._bank.values[:, self._start(block) : self._ends[block]]
            members = sampling.evenly(self._tree.nodes[at].tasks, sampling.EXACT_TASKS)
            mean = columns[list(members)].mean(0)
            self._means[at] = mean
        return mean

    def _start(self, block: int) -> int:
        return int(self._ends[block - 1]) if block else 0


def path_targets(
    tree: GradientTree, bank: SignatureBank, path: Sequence[int], target: str = "path"
) -> Tensor:
    """Return the target of one path, float32 [F]; see ``PathTargets``, which keeps the means."""
    return PathTargets(tree, bank, target)([path])


def block_weights(
    lam: float, ramp: float, widths: Sequence[int], displacement_scale: Tensor
) -> Tensor:
    """Return the weight of one entry of each block, lambda ramp / (D F_d m_d), float32 [D].

    A block that no stored task has moved (m_d zero, undefined or negligible beside the largest)
    takes the mean m_d of the other blocks, so that lambda keeps its meaning there; 1 stands for
    all when no block has moved.

    Args:
        lam: lambda, the penalty's strength.
        ramp: from ``ramp_value``.
        widths: F_d.
        displacement_scale: m_d, [D], from ``SignatureBank.displacement_scale()``.
    """
    moved = displacement_scale.detach().double().nan_to_num(nan=0.0, posinf=0.0)
    usable = (moved > 0) & (moved >= _NEGLIGIBLE * moved.max())
    other = moved[usable].mean() if bool(usable.any()) else moved.new_tensor(1.0)
    scale = torch.where(usable, moved, other)
    sizes = torch.tensor(list(widths), dtype=torch.float64, device=scale.device)
    return (lam * ramp / (len(widths) * sizes * scale)).float()


def expand(weights: Tensor, widths: Sequence[int]) -> Tensor:
    """Return the weight of every entry, [F], from the weights [D] of the blocks."""
    return weights.repeat_interleave(torch.tensor(list(widths), device=weights.device))


def l1_penalty(
    signature: Tensor, target: Tensor, weights: Tensor, parameters: Sequence[Tensor]
) -> Tensor:
    """Return sum_i weights_i |signature_i - target_i|, a scalar with a gradient.

    Its subgradient by the parameters is weights sign(signature - target), 0 at equality. One node
    of the graph for all of them: a node each for reshaping and joining costs more than the sum.

    Args:
        signature: float32 [F], read from the parameters, detached: their entries one after the
            other, less a constant perhaps.
        target: [F], a constant on the same device.
        weights: [F], from ``expand``.
        parameters: the live tensors whose entries, in this order, make the signature.
    """
    apply = cast(Callable[..., Tensor], _L1Penalty.apply)
    return apply(signature, target, weights, *parameters)


class _L1Penalty(torch.autograd.Function):
    """The closed form of ``l1_penalty``."""

    @staticmethod
    def forward(
        ctx: Any, signature: Tensor, target: Tensor, weights: Tensor, *parameters: Tensor
    ) -> Tensor:
        gap = signature - target
        ctx.slope = torch.sign(gap).mul_(weights)
        ctx.like = [(parameter.shape, parameter.dtype) for parameter in parameters]
        return torch.dot(ctx.slope, gap)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        parts = (ctx.slope * upstream).split([shape.numel() for shape, _ in ctx.like])
        slopes = (
            part.view(shape).to(dtype) for part, (shape, dtype) in zip(parts, ctx.like, strict=True)
        )
        return (None, None, None, *slopes)


def sign_gradient(signature: Tensor, target: Tensor, weights: Tensor) -> Tensor:
    """Return weights sign(signature - target), [F]: the penalty's gradient without a graph.

    For detached signatures (gradients) this is Eq. 3 with the Hessian taken as the identity: an
    approximation, added to the parameter's gradient after the backward pass. Shapes as in
    ``l1_penalty``.
    """
    return weights * torch.sign(signature.detach().float() - target.detach())


def ramp_value(kind: str, step: int, steps: int, steps_per_epoch: int) -> float:
    """Return how much of the penalty counts at an optimizer step, from 0 up to below 1.

    Args:
        kind: ``task`` (step / steps of the task), ``epoch`` (the official code's sawtooth: the
            same within each epoch) or ``none`` (always 1).
        step: optimizer steps of this task already taken (0 at the first).
        steps: optimizer steps of the task.
        steps_per_epoch: optimizer steps of one epoch.

    Raises:
        UsageError: an unknown kind.
    """
    if kind == "task":
        return step / max(steps, 1)
    if kind == "epoch":
        return step % max(steps_per_epoch, 1) / max(steps_per_epoch, 1)
    if kind == "none":
        return 1.0
    raise UsageError(f"unknown bandit.ramp {kind!r}", did_you_mean(kind, list(RAMPS)))
