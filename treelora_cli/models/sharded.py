"""A frozen base shared out over processes by torch's FSDP2; the adapter stays whole on each.

Every process holds a part of each base weight. A layer's weights are gathered when it is computed
and let go of afterwards, so all processes must make the same forward passes. What is trained is
small and read by methods as it is, so FSDP leaves it alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

from treelora_cli.errors import UsageError
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.kind import decoder_start
from treelora_cli.models.opened import base_parameters
from treelora_cli.models.snapshot import WEIGHTS


def mesh_of(parts: int, device: torch.device) -> DeviceMesh:
    """Return the mesh of the processes that share out one base with this one.

    Args:
        parts: how many share one; those of consecutive ranks do. All processes ask at once.
        device: where the model lives.
    """
    shape = (dist.get_world_size() // parts, parts)
    return init_device_mesh(device.type, shape, mesh_dim_names=("base", "part"))["part"]


def shard_base(adapted: AdaptedModel, mesh: DeviceMesh) -> None:
    """Keep this process's part of the base, on its device, and the adapter whole.

    No word is exchanged with other processes, so they may do it one after the other.

    Args:
        adapted: the model, its base on the host or on the device.
        mesh: of the processes that share it.

    Raises:
        UsageError: the base is not left alone.
    """
    check_base_is_left_alone(adapted)
    base = set(base_parameters(adapted.peft).values())
    own = {parameter for parameter in adapted.peft.parameters() if parameter not in base}
    share_out = partial(fully_shard, mesh=mesh, reshard_after_forward=True, ignored_params=own)
    model = adapted.backbone.model
    layers = dict(_layers(model))
    for layer in layers.values():
        share_out(layer)
    for group in _rest(model, set(layers)):
        share_out(group)
    share_out(model)
    for parameter in own:
        parameter.data = parameter.data.to(adapted.device)


def settle(adapted: AdaptedModel) -> None:
    """Make the first forward pass, all processes together.

    FSDP takes the first module that is called for the outermost one; methods call parts alone.
    """
    token = torch.zeros((1, 1), dtype=torch.int64, device=adapted.device)
    inputs: dict[str, Any] = {"input_ids": token, "use_cache": False}
    if adapted.backbone.encodes:
        inputs["decoder_input_ids"] = token + (decoder_start(adapted.backbone.model.config) or 0)
    with torch.no_grad():
        adapted.peft(**inputs)


def check_base_is_left_alone(adapted: AdaptedModel) -> None:
    """See to it that no weight of the base is trained.

    Raises:
        UsageError: one is.
    """
    opened = [key for key in adapted.trainable() if key.startswith(WEIGHTS)]
    # What puts no adapter of PEFT's around the base works on the base itself.
    if opened or adapted.peft is adapted.backbone.model:
        raise trained_base()


def trained_base() -> UsageError:
    """Return what is said where a method trains the base that was to be shared out."""
    return UsageError(
        "processes.engine=fsdp2 shares out the base among the processes, and the method trains "
        "weights of it",
        "use processes.engine=ddp, or a method that trains an adapter alone",
    )


def _layers(model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield a model's layers: the modules whose name ends with its first number."""
    for name, module in model.named_modules():
        *path, last = name.split(".")
        if last.isdigit() and not any(part.isdigit() for part in path):
            yield name, module


def _rest(model: Any, layers: set[str]) -> list[list[torch.nn.Module]]:
    """Return the modules outside all layers that hold weights; those that share one together."""
    groups: list[tuple[set[torch.nn.Parameter], list[torch.nn.Module]]] = []
    for name, module in model.named_modules():
        held = set(module.parameters(recurse=False))
        if not held or any(f"{name}.".startswith(f"{layer}.") for layer in layers):
            continue
        same = next((group for group in groups if group[0] & held), None)
        if same is None:
            groups.append((held, [module]))
        else:
            same[0].update(held)
            same[1].append(module)
    return [modules for _, modules in groups]
