"""GORP: LoRA and whole weights trained together, off the gradient directions of earlier tasks.

Source: Wang, Lyu, Sun, Jing: Continual Gradient Low-Rank Projection Fine-Tuning for LLMs (ACL 2025,
arXiv 2507.02503). Gradients are projected into a low-rank space, then off S, the directions that
the first moments of earlier tasks span: U' G V - S S' U' G V for whole weights, G_A - S S' G_A for
LoRA's A (B is free), with S grown after every task until it holds 0.9 of the moment's energy.

Here a whole weight W [d_out, d_in] is trained by ``_lowrank.ProjectedAdam``: G' = G - G S S' first,
then its leading directions U' G' V and Adam on them. Of A [r, d_in], G_A - G_A S S' goes to the
recipe's optimizer. S holds directions of the module's inputs, the one space that stays the same
when an adapter is drawn anew: an update orthogonal to the inputs of earlier tasks does not change
what the module answers to them. The LoRA part is IncLoRA's: a fresh pair for every task on the
frozen sum of the earlier ones.

Stored per task: the sum of the adapters, the whole weights, and the directions added to S. Cost: a
randomised SVD of every whole weight's gradient each ``gap`` steps, 2 d_out d_in q for each
projection, q the columns of S, bounded by d_in; the sum grows as with inclora. Only the steps with
an SVD wait for the device.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from treelora_cli.errors import UsageError
from treelora_cli.methods._lowrank import Bases, LowRank, ProjectedAdam, Sides, added
from treelora_cli.methods._sums import Pair, SummedLora
from treelora_cli.methods.base import (
    EFFECT,
    Departure,
    MethodSettings,
    StepContext,
    StoredTask,
    StreamContext,
    TaskContext,
    TaskMemory,
)
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.readback import Readback
from treelora_cli.models.snapshot import WEIGHTS

logger = logging.getLogger("treelora")

Beta = Annotated[float, Field(ge=0, lt=1)]

# What the paper opens: query and value of the cross-attention of T5 (and of BART's kind), else the
# gate of Llama's kind of MLP. The first line with a match counts.
_OPENED = (
    ("EncDecAttention.q", "EncDecAttention.v"),
    ("encoder_attn.q_proj", "encoder_attn.v_proj"),
    ("mlp.gate_proj",),
    ("mlp.gate_up_proj",),
)
_MOMENT = "moment."


class GorpSettings(MethodSettings):
    """GORP's own settings."""

    weights: Literal["auto"] | tuple[str, ...] = Field(
        "auto",
        description="linear modules whose whole weights are trained, by the end of their names; "
        "auto: query and value of the cross-attention, or else mlp.gate_proj",
    )
    lr: Annotated[float, Field(ge=0)] = Field(
        1e-5, description="learning rate of the whole weights, constant; LoRA's is optim.lr"
    )
    rank: Annotated[int, Field(gt=0)] = Field(
        8, description="directions kept of each side of a whole weight's gradient"
    )
    gap: Annotated[int, Field(gt=0)] = Field(
        10, description="steps after which these directions are chosen anew"
    )
    sides: Sides = Field(
        "both", description="the gradient is cut on both sides (paper) or on its shorter one (code)"
    )
    energy: Annotated[float, Field(gt=0, le=1)] = Field(
        0.9, description="part of a first moment's squared norm that the basis has to hold"
    )
    adapter_basis: Literal["input", "rank"] = Field(
        "input",
        description="directions of LoRA's A that are kept off: of its inputs, or of its r rows "
        "(the released code), where nothing is left to train once the basis has r columns",
    )
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="of the moments kept here")


class Gorp(SummedLora):
    """LoRA and whole weights in one low-rank gradient space, off that of earlier tasks."""

    name = "gorp"
    needs = frozenset({"gradients", "weights"})
    answer = "more"
    Settings = GorpSettings
    settings: GorpSettings

    def start(self, stream: StreamContext, model: AdaptedModel) -> None:
        """Open the whole weights, with empty bases.

        Raises:
            UsageError: the model has no such weights, or they are quantised or in half precision.
        """
        super().start(stream, model)
        self.opened = model.open_weights(_chosen(model, self.settings.weights).__contains__)
        widths = {pair.module: self._turned(pair.A).shape[1] for pair in self.live}
        widths |= {name: weight.shape[1] for name, weight in self.opened.items()}
        self.bases = Bases(widths, model.device)
        self.how = LowRank(
            self.settings.rank, self.settings.gap, self.settings.sides, self.settings.betas
        )

    def learns(self, key: str) -> bool:
        """Tell what is trained: LoRA and the whole weights."""
        ends = sum(_OPENED, ()) if self.settings.weights == "auto" else self.settings.weights
        name = key.removeprefix(WEIGHTS).removesuffix(".weight")
        return not key.startswith(WEIGHTS) or _ends_with(name, ends)

    def _turned(self, matrix: Tensor) -> Tensor:
        """Return a matrix of A's shape, or the other way round, so that S acts on its right."""
        return matrix if self.settings.adapter_basis == "input" else matrix.T

    def restore(self, finished: Sequence[StoredTask]) -> None:
        """Take up the bases of earlier tasks."""
        for task in finished:
            self.bases.add(task.memory.tensors)

    def begin_task(self, task: TaskContext) -> None:
        """Draw a fresh LoRA pair and begin moments anew; warn of bases that are full."""
        super().begin_task(task)
        self.task = task
        self.away: Tensor | None = None
        self.moments = {pair.module: torch.zeros_like(pair.A) for pair in self.live}
        self.adams = {
            name: ProjectedAdam(weight, self.bases[name], self.how)
            for name, weight in self.opened.items()
        }
        self.full = self.bases.full()
        if self.full:
            logger.warning(
                "gorp: earlier tasks fill the whole basis of %d of %d matrices, the first of them "
                "%s: in task %s they are not trained",
                len(self.full),
                len(self.live) + len(self.opened),
                self.full[0],
                task.name,
            )

    def after_backward(self, step: StepContext) -> None:
        """Project the gradients; those of whole weights are hidden from the recipe's optimizer."""
        squares = [self._project(pair) for pair in self.live]
        for name, weight in self.opened.items():
            if weight.grad is not None:
                seed = self.task.seed + step.step
                squares.append(self.adams[name].see(weight.grad, seed))
                weight.grad = None
        self.away = torch.stack(squares).sum().sqrt()

    def _project(self, pair: Pair) -> Tensor:
        """Project the gradient of an A; return the squared norm of what that took off."""
        basis = self.bases[pair.module]
        if pair.A.grad is None:
            return torch.zeros((), device=basis.device)
        gradient = self._turned(pair.A.grad).float()
        inside = gradient @ basis
        kept = self._turned(gradient - inside @ basis.T)
        pair.A.grad.copy_(kept)
        self.moments[pair.module].lerp_(kept, 1 - self.settings.betas[0])
        return inside.square().sum()

    def after_step(self, step: StepContext) -> dict[str, Any]:
        """Change the whole weights; report how much was projected away."""
        for adam in self.adams.values():
            adam.step(self.settings.lr)
        return {} if self.away is None else {EFFECT: Readback(self.away)}

    def end_task(self, task: TaskContext) -> TaskMemory:
        """Add the task's directions to the bases."""
        moments = {key: self._turned(moment) for key, moment in self.moments.items()}
        moments |= {name: adam.moment() for name, adam in self.adams.items()}
        energy = self.settings.energy
        found = {key: added(moment, self.bases[key], energy) for key, moment in moments.items()}
        columns = {key: value for key, value in found.items() if value.shape[1]}
        self.bases.add(columns)
        info = {
            "basis_share": {
                "adapter": round(self.bases.share([pair.module for pair in self.live]), 4),
                "weights": round(self.bases.share(list(self.opened)), 4),
            },
            "full_bases": self.full,
        }
        return TaskMemory(columns, info)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the moments, on the host."""
        tensors = {_MOMENT + key: value.cpu().clone() for key, value in self.moments.items()}
        for name, adam in self.adams.items():
            tensors |= {f"{name}.{key}": value for key, value in adam.state().items()}
        return tensors, {}

    def load_state(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Take up a checkpoint's moments."""
        for key, moment in self.moments.items():
            moment.copy_(tensors[_MOMENT + key])
        for name, adam in self.adams.items():
            mark = f"{name}."
            adam.load_state(
                {key[len(mark) :]: tensors[key] for key in tensors if key.startswith(mark)}
            )

    departures = (
        Departure(
            "space of LoRA's basis",
            "S S' G_A; with A written as [d_in, r] that is the inputs",
            "A is [r, d_in], so S lies in R^r: full after two or three tasks, then A is frozen at "
            "its random start",
            "the inputs; the released code's is adapter_basis=rank, and full bases are warned of",
        ),
        Departure(
            "space of a whole weight's basis",
            "U' G V, whose coordinates change with U and V",
            "the rows kept of G, or for wide matrices such changing coordinates",
            "the inputs, taken off before U and V are chosen and once more after Adam",
        ),
        Departure(
            "directions of a task",
            "as few as hold 0.9 of the energy",
            "one fewer for the first task",
            "as the paper",
        ),
        Departure(
            "whole weights after a task",
            "go on to the next task",
            "are lost: only LoRA is saved, and the next process loads the base again",
            "stored with the task and gone on from",
        ),
        Departure(
            "Adam's epsilon for whole weights",
            "not said",
            "1e-8",
            "1e-4 of the largest entry: right after U and V are chosen all but the diagonal of "
            "U' G V is rounding, which would make steps of full size",
        ),
        Departure(
            "third loss term",
            "none",
            "keeps (P - P0)(P - P0)' near the identity, but over an empty set of parameters",
            "none",
        ),
        Departure(
            "LoRA's step",
            "of the projected gradient",
            "Adam's, which turns what was projected back a little",
            "as released: the recipe's AdamW",
        ),
    )


def _ends_with(name: str, ends: Sequence[str]) -> bool:
    """Tell whether a module's name ends with one of some, after a full stop."""
    return any(f".{name}".endswith(f".{end}") for end in ends)


def _chosen(model: AdaptedModel, wanted: Literal["auto"] | tuple[str, ...]) -> set[str]:
    """Return the names of the weights to open, as in the base model.

    Raises:
        UsageError: no linear module has such a name.
    """
    linear = [
        name.removesuffix(".base_layer")
        for name, module in model.peft.get_base_model().named_modules()
        if isinstance(module, torch.nn.Linear) and "lora_" not in name
    ]
    for ends in _OPENED if wanted == "auto" else (wanted,):
        found = {name for name in linear if _ends_with(name, ends)}
        if found:
            return {f"{name}.weight" for name in found}
    asked = "which weights are opened" if wanted == "auto" else ", ".join(wanted)
    raise UsageError(
        f"method.weights: {model.backbone.name} has no linear module for {asked}",
        f"name some by the end of their names, such as {linear[0] if linear else 'mlp.up_proj'}",
    )
