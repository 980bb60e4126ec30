"""A backbone that carries one live LoRA adapter, seen as blocks in depth order.

The adapter is PEFT's own; only its public interface is used. Inside PEFT the live adapter is always
called ``t000``, never a user's text, because PEFT drops tensors whose adapter name equals a part of
a module's path (peft#3584).

Methods may put more around it: a frozen sum of earlier adapters under it (``stand_on``), whole
weights of the base that are trained too (``open_weights``), parameters of their own (``add_part``),
and a condition that looks at prompts (``condition``).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from treelora_cli.errors import UsageError
from treelora_cli.models.backbone import Backbone
from treelora_cli.models.condition import Condition
from treelora_cli.models.opened import base_parameters, check_opened
from treelora_cli.models.snapshot import PART, WEIGHTS, Snapshot, concatenated, rank_of
from treelora_cli.models.targets import explain_targets, lora_config
from treelora_cli.recipe import LoraSection

SLOT = "t000"
PAST = "t000past"
"""PEFT's name of the frozen sum of earlier adapters."""
MOST_BESIDE = 32
"""Adapters that may be beside the live one at a time."""
BASE_ROW = "__base__"
"""PEFT's name, in a batch of several adapters, for a row that none of them answers."""
Factors = Literal["A", "AB"]


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

    Attributes:
        peft: PEFT's model; forward passes and generation go through it.
        blocks: the adapted layers, nearest the input first.
        scale: alpha / rank; a module's weights change by ``scale * B @ A``.
        condition: looks at the prompts of every batch; None: nothing does.

    Raises:
        UsageError: no module of the model matches the targets.
    """

    def __init__(self, backbone: Backbone, lora: LoraSection, seed: int) -> None:
        self.backbone = backbone
        self.condition: Condition | None = None
        torch.manual_seed(seed)
        config = lora_config(lora, backbone.model)
        with explain_targets():
            self.peft: Any = get_peft_model(backbone.model, config, adapter_name=SLOT)
        self.peft.eval()
        self.blocks = _blocks(self.peft)
        self.scale = lora.alpha / lora.rank
        self._live = saved_parameters(self.peft, SLOT)
        self._more: dict[str, torch.nn.Parameter] = {}
        self._base: Snapshot = {}
        self._past: Snapshot | None = None
        self._initial = {key: _on_host(parameter) for key, parameter in self._live.items()}

    @property
    def live(self) -> str:
        """PEFT's name of the live adapter."""
        return SLOT

    @property
    def device(self) -> torch.device:
        """Where the model lives."""
        return self.backbone.device

    def trainable(self) -> dict[str, torch.nn.Parameter]:
        """Return the trainable parameters by their key in a snapshot, the adapter's first."""
        return {key: p for key, p in (self._live | self._more).items() if p.requires_grad}

    def parameters(self) -> list[torch.nn.Parameter]:
        """Return the trainable parameters, in the order of ``trainable``."""
        return list(self.trainable().values())

    @property
    def live_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The live adapter's parameters by the key PEFT saves them under, as in a snapshot."""
        return dict(self._live)

    @property
    def more_parameters(self) -> dict[str, torch.nn.Parameter]:
        """What answers beside LoRA, by key: opened base weights and parts added by the method."""
        return dict(self._more)

    def open_weights(self, wanted: Callable[[str], bool]) -> dict[str, torch.nn.Parameter]:
        """Make base weights trainable; from now on they are part of every snapshot.

        Args:
            wanted: told a parameter's name in the base model, says whether it is opened.

        Returns:
            The opened parameters by name; none twice where weights are tied.

        Raises:
            UsageError: none is wanted, or one is quantised or in half precision.
        """
        opened = {
            name: parameter
            for name, parameter in base_parameters(self.peft).items()
            if wanted(name)
        }
        for name, parameter in opened.items():
            check_opened(name, parameter.dtype)
        if not opened:
            raise UsageError("no weight of the base is chosen", "choose others in the method")
        for name, parameter in opened.items():
            parameter.requires_grad_(True)
            self._more[WEIGHTS + name] = parameter
            self._base[WEIGHTS + name] = _on_host(parameter)
        return opened

    def add_part(self, name: str, values: Tensor, *, trainable: bool = True) -> torch.nn.Parameter:
        """Add a parameter of the method's own, part of every snapshot from now on.

        Args:
            name: unlike any other part's.
            values: where it starts; it is kept in float32 on the model's device.
            trainable: whether the optimizer gets it.
        """
        start = values.detach().to(self.device, torch.float32, copy=True)
        part = torch.nn.Parameter(start, requires_grad=trainable)
        self._more[PART + name] = part
        return part

    def freeze_adapter(self, *, A: bool = True, B: bool = True) -> None:
        """Stop training the live adapter's A, B or both."""
        for key, parameter in self._live.items():
            if (A and ".lora_A." in key) or (B and ".lora_B." in key):
                parameter.requires_grad_(False)

    def stand_on(self, past: Snapshot | None) -> None:
        """Put a frozen adapter under the live one: every forward pass adds both.

        Args:
            past: of any rank, such as ``answer`` gives, A and B of the adapted modules; None: none.

        Raises:
            UsageError: its keys or shapes are not those of this model.
        """
        # PEFT makes the adapters that it switches to trainable, whatever was frozen before.
        with self._flags(), torch.random.fork_rng(self._cuda_devices()):
            if PAST in self.peft.peft_config:
                self.peft.delete_adapter(PAST)
            if past is not None:
                self.peft.add_adapter(PAST, self._config_for(past))
                _fill(saved_parameters(self.peft, PAST), past)
            self.peft.base_model.set_adapter([SLOT] if past is None else [PAST, SLOT])
        for parameter in self.past_parameters.values():
            parameter.requires_grad_(False)
        self._past = None if past is None else dict(past)

    @property
    def past(self) -> Snapshot | None:
        """The frozen adapter under the live one, float32 on the host."""
        return self._past

    @property
    def past_parameters(self) -> dict[str, torch.nn.Parameter]:
        """The frozen adapter under the live one, on the device, by key; empty where there is none.

        They are others after every ``stand_on``.
        """
        return saved_parameters(self.peft, PAST)

    def answer(self) -> Snapshot:
        """Copy to the host what answers: the live adapter, after the frozen one where there is one.

        A sum of adapters is one adapter of the summed rank: A's rows and B's columns stand behind
        one another, the frozen one's first, at the same scale.
        """
        live = self.snapshot()
        return live if self._past is None else concatenated([self._past, live])

    def _config_for(self, snapshot: Snapshot) -> LoraConfig:
        """Return the live adapter's configuration with the rank of a snapshot, without dropout."""
        config: LoraConfig = copy.deepcopy(self.peft.peft_config[SLOT])
        times = rank_of(snapshot) / config.r
        config.lora_alpha *= times
        config.r = rank_of(snapshot)
        config.lora_dropout = 0.0
        return config

    @contextmanager
    def _flags(self) -> Iterator[None]:
        """Undo what PEFT does to ``requires_grad`` when adapters come, go or are switched."""
        before = [(parameter, parameter.requires_grad) for parameter in self.peft.parameters()]
        try:
            yield
        finally:
            for parameter, flag in before:
                parameter.requires_grad_(flag)

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Be the base alone: no adapter, no condition, opened weights as they came.

        Afterwards all is as before.
        """
        condition = self.condition
        live = {key: _on_host(self._more[key]) for key in self._base}
        self.condition = None
        try:
            with ExitStack() as stack:
                stack.enter_context(self._flags())
                stack.enter_context(self.peft.disable_adapter())
                self._put({key: self._more[key] for key in self._base}, self._base)
                yield
        finally:
            self._put({key: self._more[key] for key in live}, live)
            self.condition = condition

    @staticmethod
    def _put(parameters: Mapping[str, torch.nn.Parameter], values: Snapshot) -> None:
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.copy_(values[key])

    def trainable_count(self) -> int:
        """Return the number of trainable entries."""
        return sum(parameter.numel() for parameter in self.parameters())

    def config_document(self, snapshot: Snapshot | None = None) -> dict[str, Any]:
        """Return the content of PEFT's adapter_config.json, with sets in a stable order.

        Args:
            snapshot: the adapter it is for, where its rank may be another than the live one's.
        """
        live = self.peft.peft_config[SLOT].to_dict()
        if snapshot is not None and rank_of(snapshot) != live["r"]:
            live["lora_alpha"] = live["lora_alpha"] * rank_of(snapshot) / live["r"]
            live["r"] = rank_of(snapshot)
        plain = {
            key: sorted(value) if isinstance(value, set) else value for key, value in live.items()
        }
        plain["base_model_name_or_path"] = self.backbone.name
        plain["inference_mode"] = True
        return plain

    def snapshot(self) -> Snapshot:
        """Copy all that may be trained to the host: the live adapter and what was added to it."""
        return {key: _on_host(p) for key, p in (self._live | self._more).items()}

    def restore(self, snapshot: Snapshot) -> None:
        """Put a snapshot's weights into the live adapter and what was added to it.

        Raises:
            UsageError: its keys or shapes are not those of this model and these LoRA settings.
        """
        _fill(self._live | self._more, snapshot)

    @contextmanager
    def beside(self, snapshots: Sequence[Snapshot]) -> Iterator[list[str]]:
        """Put further adapters beside the live one, so that rows of one batch may differ in theirs.

        They answer where a forward pass names them (PEFT's ``adapter_names``), and only in
        evaluation mode. Afterwards they are gone; the live adapter, what is trainable and the
        random state are as before.

        Args:
            snapshots: at most ``MOST_BESIDE``, of any rank, LoRA alone.

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
        names: list[str] = []
        try:
            for number, snapshot in enumerate(snapshots, start=1):
                names.append(f"t{number:03d}")
                with torch.random.fork_rng(self._cuda_devices()):
                    self.peft.add_adapter(names[-1], self._config_for(snapshot))
                _fill(saved_parameters(self.peft, names[-1]), snapshot)
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

    def reset(self, seed: int | None = None) -> None:
        """Return the live adapter to a seeded start, B zero; nothing else is touched.

        Args:
            seed: draws A anew, as PEFT does (uniform, Kaiming with a = sqrt(5)); None: A as it was
                drawn when the model was made.
        """
        start = {key: self._initial[key] for key in self._live}
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            for key, value in start.items():
                if ".lora_A." in key:
                    start[key] = torch.empty_like(value)
                    torch.nn.init.kaiming_uniform_(start[key], math.sqrt(5), generator=generator)
        self._put(self._live, start)

    def signature_parameters(self, factors: Factors) -> list[torch.nn.Parameter]:
        """Return the parameters a signature reads, block by block in depth order."""
        return [p for block in self.blocks for p in block.parameters(factors)]

    def named_factors(self, kind: Literal["A", "B"]) -> list[tuple[str, torch.nn.Parameter]]:
        """Return the live adapter's A or B matrices by module name, in the model's order."""
        found = []
        for key, parameter in self._live.items():
            module, mark, _ = key.partition(f".lora_{kind}.")
            if mark:
                found.append((module.removeprefix("base_model.model."), parameter))
        return found

    def block_widths(self, factors: Factors) -> tuple[int, ...]:
        """Return the number of signature entries of every block."""
        return tuple(sum(p.numel() for p in block.parameters(factors)) for block in self.blocks)


def saved_parameters(peft_model: Any, slot: str) -> dict[str, torch.nn.Parameter]:
    """Return an adapter's parameters by the key PEFT saves them under: their name less the slot."""
    found = {}
    for name, parameter in peft_model.named_parameters():
        parts = name.split(".")
        if slot in parts:
            found[".".join(part for part in parts if part != slot)] = parameter
    return found


def _on_host(parameter: Tensor) -> Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)


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


def _blocks(peft_model: Any) -> list[Block]:
    """Group the adapter's parameters by the layer number in their module path."""
    found: dict[tuple[bool, int], tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]] = {}
    for name, parameter in peft_model.named_parameters():
        kind = re.search(r"\.lora_([AB])\.", name)
        if kind is None:
            continue
        layer = re.search(r"\.(\d+)\.", name)
        # An encoder-decoder numbers both halves from 0; the decoder is the deeper one.
        depth = (".decoder." in name, int(layer.group(1)) if layer else 0)
        found.setdefault(depth, ([], []))[kind.group(1) == "B"].append(parameter)
    return [
        Block(depth, tuple(A), tuple(B)) for depth, (_, (A, B)) in enumerate(sorted(found.items()))
    ]
