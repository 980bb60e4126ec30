"""Losses and gradients of chosen rows, for methods to look at, leaving no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import Batch, Example
from treelora_cli.models.forward import answer_logits, answer_loss
from treelora_cli.models.snapshot import Snapshot
from treelora_cli.models.spread import ALL, Spread

Join = Callable[[Sequence[Example]], list[Batch]]
"""Makes batches of rows, within the limits of a forward pass."""


class Probe:
    """Asks the model about rows.

    Args:
        adapted: the model.
        join: makes batches of rows.
        spread: how gradients are worked out by several processes; all must ask the same.
    """

    def __init__(self, adapted: AdaptedModel, join: Join, spread: Spread = ALL) -> None:
        self._adapted = adapted
        self._join = join
        self._spread = spread

    def batches(self, rows: Sequence[Example]) -> list[Batch]:
        """Return rows as batches on the model's device."""
        return [batch.to(self._adapted.device) for batch in self._join(rows)]

    def loss(self, rows: Sequence[Example]) -> Tensor:
        """Return the mean cross-entropy of the rows' answer tokens, a float32 scalar, in the graph.

        In the model's present mode: with dropout while it trains.
        """
        batches = self.batches(rows)
        tokens = sum(batch.answer_tokens for batch in batches)
        return torch.stack([answer_loss(self._adapted, batch) for batch in batches]).sum() / tokens

    def gradient(self, rows: Sequence[Example]) -> list[Tensor]:
        """Return the gradient of the mean answer loss at the live weights; see mean_gradient."""
        mine, tokens = self._mine(rows)
        return mean_gradient(self._adapted, mine, tokens, self._spread)

    def gradient_under(self, rows: Sequence[Example], snapshot: Snapshot) -> list[Tensor]:
        """Return ``gradient`` at a snapshot's weights; the live weights stay as they were."""
        mine, tokens = self._mine(rows)
        return gradient_under(self._adapted, mine, snapshot, tokens, self._spread)

    def _mine(self, rows: Sequence[Example]) -> tuple[Sequence[Batch], int]:
        """Return this process's batches of rows, and the answer tokens of all of them."""
        batches = self._join(rows)
        return self._spread.mine(batches), sum(batch.answer_tokens for batch in batches)

    def logits(self, batch: Batch) -> Tensor:
        """Return the logits where a batch's answers are predicted, [n, vocabulary].

        At the live weights, without dropout and outside the graph.
        """
        with torch.no_grad(), self._adapted.evaluating():
            return answer_logits(self._adapted, batch.to(self._adapted.device))

    @contextmanager
    def at(self, snapshot: Snapshot) -> Iterator[None]:
        """Put a snapshot's weights into the model for a while.

        Not between a forward pass and its backward pass: what the graph keeps would be overwritten.
        """
        live = self._adapted.snapshot()
        self._adapted.restore(snapshot)
        try:
            yield
        finally:
            self._adapted.restore(live)


def mean_gradient(
    adapted: AdaptedModel, batches: Sequence[Batch], tokens: int | None = None, spread: Spread = ALL
) -> list[Tensor]:
    """Return the gradient of the mean answer loss at the live weights.

    Without dropout, so that no random number is drawn; ``.grad`` is neither read nor written.

    Args:
        adapted: the model.
        batches: this process's, at least one in all.
        tokens: answer tokens of all processes' batches; None: those of ``batches``.
        spread: adds up what the processes find.

    Returns:
        One tensor for each of ``adapted.parameters()``, of its shape; zero where the loss does not
        depend on it.
    """
    parameters = adapted.parameters()
    total = [torch.zeros_like(parameter) for parameter in parameters]
    tokens = tokens or sum(batch.answer_tokens for batch in batches)
    with adapted.evaluating():
        for batch in batches:
            loss = answer_loss(adapted, batch.to(adapted.device)) / tokens
            parts = torch.autograd.grad(loss, parameters, allow_unused=True)
            total = [
                held if part is None else held + part
                for held, part in zip(total, parts, strict=True)
            ]
    return [spread.sum(part) for part in total]


def gradient_under(
    adapted: AdaptedModel,
    batches: Sequence[Batch],
    snapshot: Snapshot,
    tokens: int | None = None,
    spread: Spread = ALL,
) -> list[Tensor]:
    """Return ``mean_gradient`` at a snapshot's weights; the live weights stay as they were."""
    live = adapted.snapshot()
    adapted.restore(snapshot)
    try:
        return mean_gradient(adapted, batches, tokens, spread)
    finally:
        adapted.restore(live)
