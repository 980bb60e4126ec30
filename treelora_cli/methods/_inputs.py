"""What the adapted modules read: the second moments of their inputs over some rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from treelora_cli.methods._sums import pairs
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.encode import Example
from treelora_cli.models.probe import Probe


class Inputs(NamedTuple):
    """What the adapted modules read.

    Attributes:
        sums: the sum of x x' over all tokens, float32 [d, d] on the model's device, by the name of
            the module that reads x first; zero for one that read nothing.
        first: that module's name, for each adapted module.
    """

    sums: dict[str, Tensor]
    first: dict[str, str]


def read_inputs(model: AdaptedModel, rows: Sequence[Example], ask: Probe) -> Inputs:
    """Read rows at the live weights and look at what every adapted module is given.

    Rows are read one by one: then nothing is padding, whatever the model. Modules that read the
    very same tensor one after the other (query, key and value of a layer, say) share one matrix.

    Args:
        model: its adapted modules are watched.
        rows: of the task.
        ask: the task's.
    """
    watch = _Watch()
    widths = {pair.module: pair.A.shape[1] for pair in pairs(model.live_parameters)}
    with watch.over(model, list(widths)):
        for row in rows:
            for batch in ask.batches([row]):
                ask.logits(batch)
            watch.last = None
    for module, width in widths.items():
        if module not in watch.first:
            watch.first[module] = module
            watch.sums[module] = torch.zeros(width, width, device=model.device)
    return Inputs(watch.sums, watch.first)


class _Watch:
    """Adds up what modules read, as they are called."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.first: dict[str, str] = {}
        self.last: Tensor | None = None
        self._reader = ""

    @contextmanager
    def over(self, model: AdaptedModel, names: Sequence[str]) -> Iterator[None]:
        """Look at modules, by name, as long as this lasts."""
        handles = [
            model.peft.get_submodule(name).register_forward_pre_hook(partial(self._see, name))
            for name in names
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see(self, name: str, module: Any, given: tuple[Tensor, ...]) -> None:
        inputs = given[0]
        if inputs is not self.last:
            self.last, self._reader = inputs, name
            tokens = inputs.detach().reshape(-1, inputs.shape[-1]).float()
            product = tokens.T @ tokens
            self.sums[name] = self.sums[name] + product if name in self.sums else product
        self.first[name] = self._reader
