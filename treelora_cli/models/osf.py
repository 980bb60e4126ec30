"""A backbone whose own weights are trained in what their singular value decomposition leaves free.

The tuner is PEFT's (``peft.OSFConfig``: orthogonal subspace fine-tuning); only its public interface
is used. While a task is trained, PEFT's model carries for every adapted matrix W = U diag(s) V' the
trainable part of its smallest singular values, and the largest are preserved; afterwards the change
is merged into W, by PEFT, and what is left is the plain backbone with other weights. They are what
is stored and what answers, at the speed of the plain model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn

import torch
from peft import OSFConfig, get_peft_model
from peft.tuners.osf import OSFLayer
from torch import Tensor

from treelora_cli.errors import UsageError
from treelora_cli.models.adapted import SLOT, AdaptedModel
from treelora_cli.models.backbone import Backbone
from treelora_cli.models.snapshot import WEIGHTS, Snapshot, is_more
from treelora_cli.models.targets import explain_targets, named_targets
from treelora_cli.recipe import LoraSection

_FACTORS = ("U_low", "S_low", "V_low")


class OsfModel(AdaptedModel):
    """A backbone trained by PEFT's orthogonal subspace tuner; there is no LoRA on it.

    ``peft`` is PEFT's model between ``decompose`` and ``fold``, and the bare backbone otherwise.
    A snapshot holds the adapted weights, and between the two also the trainable factors.

    Args:
        backbone: the model; its adapted weights change.
        lora: which modules are adapted; ``auto``: PEFT's choice for this tuner, which is all
            linear layers of a block. Nothing else of it is used.

    Raises:
        UsageError: no linear module matches the targets, or their weights are quantised.
    """

    def __init__(self, backbone: Backbone, lora: LoraSection) -> None:
        # Nothing of the parent's adapter is made; what it does with snapshots is all used.
        self.backbone = backbone
        self.condition = None
        self.peft = backbone.model
        self.blocks = []
        self.scale = 1.0
        self._targets = named_targets(lora)
        self._names = self._adapted()
        self._live = {}
        self._more = {f"{WEIGHTS}{name}.weight": self._weight(name) for name in self._names}
        self._base = {
            key: weight.detach().to("cpu", copy=True) for key, weight in self._more.items()
        }
        self._past = None
        self._initial = {}
        self._entries = sum(self._free(name, 0.0) for name in self._names)

    def _config(self, ranks: dict[str, int]) -> OSFConfig:
        return OSFConfig(
            effective_rank=1,
            rank_pattern={f"^{re.escape(name)}$": rank for name, rank in ranks.items()},
            target_modules=self._targets,
            task_type="SEQ_2_SEQ_LM" if self.backbone.encodes else "CAUSAL_LM",
        )

    def _adapted(self) -> list[str]:
        """Return the names of the modules that PEFT adapts, found on a model without weights."""
        model = self.backbone.model
        with torch.device("meta"), explain_targets():
            shadow = type(model)(model.config)
            get_peft_model(shadow, self._config({}))
        names = [name for name, part in shadow.named_modules() if isinstance(part, OSFLayer)]
        if not names:
            raise UsageError(
                f"lora.targets: PEFT's OSF adapts linear layers only, and {self.backbone.name} has "
                "none there",
                "use lora.targets=all-linear, or a method that trains LoRA",
            )
        for name in names:
            if not self._weight(name).is_floating_point():
                raise UsageError(
                    f"the base's weight {name} is quantised and cannot be decomposed",
                    "use a method that trains LoRA only, or a base in floating point",
                )
        return names

    def _weight(self, name: str) -> torch.nn.Parameter:
        weight: torch.nn.Parameter = self.backbone.model.get_submodule(name).weight
        return weight

    def _preserved(self, name: str, share: float) -> int:
        """Return how many singular directions of a matrix are preserved, at least 1 (PEFT)."""
        whole = min(self._weight(name).shape)
        return min(max(1, int(share * whole)), max(1, whole - 1))

    def _free(self, name: str, share: float) -> int:
        """Return the number of entries that are trainable of a matrix."""
        shape = self._weight(name).shape
        return (min(shape) - self._preserved(name, share)) * (sum(shape) + 1)

    def decompose(self, share: float) -> None:
        """Decompose the adapted weights as they are now, and make the free part trainable.

        One singular value decomposition of every matrix, in float32 on its device.

        Args:
            share: of every matrix's singular directions, the largest, that is preserved; in [0, 1).
        """
        self.fold()
        config = self._config({name: self._preserved(name, share) for name in self._names})
        self.peft = get_peft_model(self.backbone.model, config, adapter_name=SLOT)
        self.peft.eval()
        self._live = {
            f"{name}.{factor}": self._layer(name).osf_svd_params[SLOT][factor]
            for name in self._names
            for factor in _FACTORS
        }
        self._entries = sum(parameter.numel() for parameter in self._live.values())

    def _layer(self, name: str) -> Any:
        return self.backbone.model.get_submodule(name)

    @property
    def decomposed(self) -> bool:
        """Whether there is something trainable."""
        return bool(self._live)

    def fold(self) -> None:
        """Merge what was trained into the weights; the bare backbone is left."""
        if self.decomposed:
            self.peft.merge_and_unload()
            self._bare()

    def _bare(self) -> None:
        self.peft = self.backbone.model
        self._live = {}

    def hold(self) -> Tensor:
        """Take off the trainable factors what lies in the preserved directions.

        The tuner projects gradients alone; what AdamW makes of them leaves the free directions.

        Returns:
            The norm of what was taken off, a float32 scalar on the device.
        """
        squares = []
        for key, factor in self._live.items():
            if key.endswith("S_low"):
                continue
            # Through the tuner's own projection, which it has hung on the factor's gradient.
            (kept,) = torch.autograd.grad(factor, factor, grad_outputs=factor.detach())
            with torch.no_grad():
                squares.append((factor - kept).float().square().sum())
                factor.copy_(kept)
        return torch.stack(squares).sum().sqrt()

    def restore(self, snapshot: Snapshot) -> None:
        """Put a snapshot's weights into the model; factors, if it has any, must be there already.

        Raises:
            UsageError: its keys or shapes are not those of this model.
        """
        if self.decomposed and all(map(is_more, snapshot)):
            self.peft.unload()
            self._bare()
        super().restore(snapshot)

    def trainable_count(self) -> int:
        """Return the number of entries trained in the present task, or last, or first."""
        return self._entries

    def config_document(self, snapshot: Snapshot | None = None) -> dict[str, Any]:
        """Return nothing: there is no adapter to configure."""
        return {}

    @contextmanager
    def as_base(self) -> Iterator[None]:
        """Be the base alone, with its weights as they came; afterwards all is as before."""
        condition = self.condition
        live = {key: weight.detach().to("cpu", copy=True) for key, weight in self._more.items()}
        self.condition = None
        try:
            with ExitStack() as stack:
                if self.decomposed:
                    stack.enter_context(self._flags())
                    stack.enter_context(self.peft.disable_adapter())
                self._put(self._more, self._base)
                yield
        finally:
            self._put(self._more, live)
            self.condition = condition

    @contextmanager
    def beside(self, snapshots: Sequence[Snapshot]) -> Iterator[list[str]]:
        """Yield no name for no snapshot.

        Raises:
            UsageError: there are snapshots; whole weights cannot stand beside one another.
        """
        if snapshots:
            self._refuse()
        yield []

    def stand_on(self, past: Snapshot | None) -> None:
        """Refuse: there is no adapter to put one under.

        Raises:
            UsageError: always.
        """
        self._refuse()

    def reset(self, seed: int | None = None) -> None:
        """Refuse: there is no adapter to start anew.

        Raises:
            UsageError: always.
        """
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise UsageError(
            "this run trains weights of the base itself, not adapters on it",
            "use a method that trains LoRA",
        )
