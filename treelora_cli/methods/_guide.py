"""One task's walk over the earlier ones: aim, compare, learn, without waiting for the device."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from treelora_cli.models.readback import Readback, send
from treelora_cli.tree.penalty import PathTargets, block_weights, expand
from treelora_cli.tree.scopes import ScopedSearch
from treelora_cli.tree.signatures import SignatureBank, block_means


class Guide:
    """What guides one task: search, targets and weights, all fixed when the task begins.

    The task to compare with at a step is chosen when the step before has ended, from feedback up
    to the step before that: its rows travel to the device while it works, and no number is waited
    for. ``aim``, ``pull`` or ``ask``, and ``learn`` follow one another at every step.

    Args:
        bank: the stored signatures.
        search: the bandit over them, with no pulls yet.
        targets: gives what a chosen path pulls toward.
        strength: lambda.
        device: where the model lives.
    """

    def __init__(
        self,
        bank: SignatureBank,
        search: ScopedSearch,
        targets: PathTargets,
        strength: float,
        device: torch.device,
    ) -> None:
        self.bank = bank
        self.search = search
        self.device = device
        self.scales = bank.scales().to(device)
        self.targets = targets
        weights = block_weights(strength, 1.0, bank.widths, bank.displacement_scale())
        self.weights = expand(weights, bank.widths).to(device)
        blocks = torch.tensor(bank.widths, device=device) * bank.blocks
        self._shares = expand(1 / (blocks * self.scales), bank.widths)
        self.arms: tuple[int, ...] = ()
        self._row = self._target = torch.empty(0)
        self._unread: deque[tuple[tuple[int, ...], Readback]] = deque()

    def aim(self, arms: Sequence[int], *, fetch: bool) -> None:
        """Take the arms of the next step, and send for what comparing with them needs."""
        self.arms = tuple(arms)
        if fetch:
            self._row = send(self.bank.row(self.arms), self.device)
            self._target = send(self.targets.of_arms(self.arms), self.device)

    def pull(self, signature: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """Compare with the task that was aimed at.

        Args:
            signature: [F], the live one, detached.

        Returns:
            The penalty's target, [F] on the signature's device, and what the event shows.
        """
        gaps = (signature - self._row).abs_()
        if self.arms[1:]:
            xis = block_means(gaps, self.bank.widths) / self.scales
        else:
            # The mean over blocks of the scaled means within them, as one product.
            xis = torch.dot(gaps, self._shares)
        return self._target, self._observed(xis)

    def ask(
        self, gradient: Tensor, under: Callable[[int], Tensor]
    ) -> tuple[Tensor, dict[str, Any]]:
        """Compare gradients of the same rows, now and under the adapter that was aimed at.

        Args:
            gradient: [F], the live one.
            under: gives the rows' gradient under a task's adapter, [F]; a forward and backward
                pass each. The exhaustive search, which has nothing to aim by before the step,
                asks for all of them.
        """
        asked = {arm: under(arm) for arm in self.arms or range(len(self.bank))}
        gaps = {
            arm: (block_means((gradient - found).abs(), self.bank.widths) / self.scales)
            for arm, found in asked.items()
        }
        if not self.arms:
            self.arms = self.search.choose(lambda: torch.stack(list(gaps.values())))
        return asked[self.arms[0]], self._observed(gaps[self.arms[0]].mean())

    def _observed(self, xis: Tensor) -> dict[str, Any]:
        readback = Readback(xis)
        self._unread.append((self.arms, readback))
        return {"arms": list(self.arms), "xi": readback}

    def learn(self, *, left: int) -> None:
        """Give the search its feedback, but for that of the newest steps.

        Args:
            left: how many steps' feedback stays unread.
        """
        while len(self._unread) > left:
            arms, xis = self._unread.popleft()
            self.search.update(arms, xis.read())

    def means(self) -> dict[int, float]:
        """Return the mean feedback of every task that was pulled, over all searches."""
        sums: dict[int, float] = {}
        pulls: dict[int, int] = {}
        for one in self.search.statistics():
            for arm, (count, mean) in enumerate(zip(one["pulls"], one["means"], strict=True)):
                if count:
                    sums[arm] = sums.get(arm, 0.0) + count * mean
                    pulls[arm] = pulls.get(arm, 0) + count
        return {arm: total / pulls[arm] for arm, total in sums.items()}

    def state(self) -> dict[str, Any]:
        """Return the search, the arms aimed at and the unread feedback as JSON values."""
        unread = [[list(arms), xis.read()] for arms, xis in self._unread]
        return {"search": self.search.state(), "arms": list(self.arms), "unread": unread}

    def load_state(self, state: dict[str, Any], *, fetch: bool) -> None:
        """Take up what ``state`` returned.

        Raises:
            RunDirError: the search's state belongs to another search.
        """
        self.search.load_state(state["search"])
        self._unread = deque(
            (tuple(arms), Readback(torch.tensor(xis, dtype=torch.float64)))
            for arms, xis in state["unread"]
        )
        self.aim(state["arms"], fetch=fetch)
