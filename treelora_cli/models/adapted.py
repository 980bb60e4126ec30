"""A backbone that carries one live LoRA adapter, seen as blocks in depth order.

The adapter is PEFT's own; only its public interface is used. Inside PEFT the live adapter is always
called ``t000``, never a user's text, because PEFT drops tensors whose adapter name equals a part of
a module's path (peft#3584).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from treelora_cli.errors import UsageError
from treelora_cli.models.backbone import Backbone
from treelora_cli.recipe import LoraSection

SLOT = "t000"
MOST_BESIDE = 32
"""Adapters that may be beside the live one at a time."""
BASE_ROW = "__base__"
"""PEFT's name, in a batch of several adapters, for a row that none of them answers."""
Factors = Literal["A", "AB"]
Snapshot = dict[str, Tensor]
"""An adapter's tensors by PEFT's saved key, float32 on the host."""


@dataclass(frozen=True)
class Block:
    """A transformer layer with its adapted modules.

    Attributes:
        depth: 0 is the layer nearest the input.
        A: the down-projections, each [rank, d_in].
        B: the up-projections, each [d_out, rank].
    """

    depth: int
    A: tuple[torch.nn.Parameter, ...]
    B: tuple[torch.nn.Parameter, ...]

    def parameters(self, factors: Factors) -> tuple[torch.nn.Parameter, ...]:
        """Return the block's A matrices, or its A then its B matrices."""
        return self.A if factors == "A" else self.A + self.B


class AdaptedModel:
    """A backbone with a LoRA adapter on it.

    Args:
        backbone: the frozen model.
        lora: rank, scale, dropout and target modules.
        seed: decides the start of A; B starts at zero.

    Raises:
        UsageError: no module of the model matches the targets.
    """

    def __init__(self, backbone: Backbone, lora: LoraSection, seed: int) -> None:
        self.backbone = backbone
        torch.manual_seed(seed)
        with explain_targets():
            self.peft: Any = get_peft_model(backbone.model, lora_config(lora), adapter_name=SLOT)
        self.peft.eval()
        self.blocks = _blocks(self.peft)
        self._live = _saved(self.peft, SLOT)
        self._initial = self.snapshot()

    @property
    def live(self) -> str:
        """PEFT's name of the live adapter."""
        return SLOT

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.backbone.device

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the trainable parameters, in the model's order."""
        return [parameter for parameter in self.peft.parameters() if parameter.requires_grad]

    @property
    def live_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The live adapter's parameters by the key PEFT saves them under, as in a snapshot."""
        return dict(self._live)

    def trainable_count(self) -> int:
        """Return the number of trainable entries."""
        return sum(parameter.numel() for parameter in self.parameters())

    def config_document(self) -> dict[str, Any]:
        """Return the content of PEFT's adapter_config.json, with sets in a stable order."""
        live = self.peft.peft_config[SLOT].to_dict()
        plain = {
            key: sorted(value) if isinstance(value, set) else value for key, value in live.items()
        }
        plain["base_model_name_or_path"] = self.backbone.name
        plain["inference_mode"] = True
        return plain

    def snapshot(self) -> Snapshot:
        """Copy the live adapter to the host, keyed as PEFT saves it."""
        return {
            key: parameter.detach().to("cpu", torch.float32, copy=True)
            for key, parameter in self._live.items()
        }

    def restore(self, snapshot: Snapshot) -> None:
        """Put a snapshot's weights into the live adapter.

        Raises:
            UsageError: its keys or shapes are not those of this model and these LoRA settings.
        """
        _fill(self._live, snapshot)

    @contextmanager
    def beside(self, snapshots: Sequence[Snapshot]) -> Iterator[list[str]]:
        """Put further adapters beside the live one, so that rows of one batch may differ in theirs.

        They answer where a forward pass names them (PEFT's ``adapter_names``), and only in
        evaluation mode. Afterwards they are gone; the live adapter, what is trainable and the
        random state are as before.

        Args:
            snapshots: at most ``MOST_BESIDE``.

        Yields:
            One name per snapshot, for ``generate(adapters=...)``.

        Raises:
            UsageError: keys or shapes of a snapshot are not those of this model.
            ValueError: too many snapshots.
        """
        if len(snapshots) > MOST_BESIDE:
            raise ValueError(f"{len(snapshots)} adapters at once, at most {MOST_BESIDE}")
        if not snapshots:
            yield []
            return
        config = copy.deepcopy(self.peft.peft_config[SLOT])
        names: list[str] = []
        try:
            for number, snapshot in enumerate(snapshots, start=1):
                names.append(f"t{number:03d}")
                with torch.random.fork_rng(self._cuda_devices()):
                    self.peft.add_adapter(names[-1], config)
                _fill(_saved(self.peft, names[-1]), snapshot)
            yield list(names)
        finally:
            for name in names:
                if name in self.peft.peft_config:
                    self.peft.delete_adapter(name)

    def _cuda_devices(self) -> list[torch.device]:
        return [self.device] if self.device.type == "cuda" else []

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Switch dropout off, and back to what it was."""
        was_training = self.peft.training
        self.peft.eval()
        try:
            yield
        finally:
            self.peft.train(was_training)

    def reset(self) -> None:
        """Return the live adapter to its seeded start: A as drawn once, B zero."""
        self.restore(self._initial)

    def signature_parameters(self, factors: Factors) -> list[torch.nn.Parameter]:
        """Return the parameters a signature reads, block by block in depth order."""
        return [p for block in self.blocks for p in block.parameters(factors)]

    def named_factors(self, kind: Literal["A", "B"]) -> list[tuple[str, torch.nn.Parameter]]:
        """Return the adapter's A or B matrices by module name, in the model's parameter order."""
        found = []
        for name, parameter in self.peft.named_parameters():
            module, mark, _ = name.partition(f".lora_{kind}.")
            if mark:
                found.append((module.removeprefix("base_model.model."), parameter))
        return found

    def block_widths(self, factors: Factors) -> tuple[int, ...]:
        """Return the number of signature entries of every block."""
        return tuple(sum(p.numel() for p in block.parameters(factors)) for block in self.blocks)


def mean_snapshot(members: Sequence[Snapshot]) -> Snapshot:
    """Return the mean of A and of B over adapters, entry by entry: the same bits whenever asked.

    It is a point that entries can be equal to, not the mean change of the weights, which is no
    mean of factors.
    """
    if len(members) == 1:
        return members[0]
    mean: Snapshot = {}
    for key in members[0]:
        total = torch.zeros(members[0][key].shape, dtype=torch.float64)
        for member in members:
            total += member[key]
        mean[key] = (total / len(members)).float()
    return mean


def lora_config(lora: LoraSection) -> LoraConfig:
    """Return PEFT's configuration of the adapter a recipe asks for."""
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_targets(lora),
        bias="none",
        task_type="CAUSAL_LM",
    )


@contextmanager
def explain_targets() -> Iterator[None]:
    """Turn PEFT's complaint about target modules into one a user can act on.

    Raises:
        UsageError: no module of the model matches the targets.
    """
    try:
        yield
    except ValueError as error:
        raise UsageError(
            f"lora.targets: {str(error).splitlines()[0]}",
            "list module names of the model, or use lora.targets=all-linear",
        ) from None


def _saved(peft_model: Any, slot: str) -> dict[str, torch.nn.Parameter]:
    """Return an adapter's parameters by the key PEFT saves them under: their name less the slot."""
    found = {}
    for name, parameter in peft_model.named_parameters():
        parts = name.split(".")
        if slot in parts:
            found[".".join(part for part in parts if part != slot)] = parameter
    return found


def _fill(parameters: Mapping[str, torch.nn.Parameter], snapshot: Snapshot) -> None:
    """Copy a snapshot into an adapter's parameters, in place.

    Raises:
        UsageError: its keys or shapes are others.
    """
    own = {key: value.shape for key, value in parameters.items()}
    theirs = {key: value.shape for key, value in snapshot.items()}
    if own != theirs:
        odd = sorted(set(own.items()) ^ set(theirs.items()))[0][0]
        raise UsageError(
            f"the stored adapter does not fit this model: tensor {odd!r} differs",
            "use the base and the lora settings that the run was made with",
        )
    with torch.no_grad():
        for key, parameter in parameters.items():
            parameter.copy_(snapshot[key])


def _targets(lora: LoraSection) -> str | list[str] | None:
    if lora.targets == "auto":
        return None
    return lora.targets if isinstance(lora.targets, str) else list(lora.targets)


def _blocks(peft_model: Any) -> list[Block]:
    """Group the adapter's parameters by the layer number in their module path."""
    found: dict[int, tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]] = {}
    for name, parameter in peft_model.named_parameters():
        kind = re.search(r"\.lora_([AB])\.", name)
        if kind is None:
            continue
        layer = re.search(r"\.(\d+)\.", name)
        depth = int(layer.group(1)) if layer else 0
        found.setdefault(depth, ([], []))[kind.group(1) == "B"].append(parameter)
    return [
        Block(depth, tuple(A), tuple(B)) for depth, (_, (A, B)) in enumerate(sorted(found.items()))
    ]
