"""Load a base and put a method's adapter on it: whole, or shared out over the processes."""

from __future__ import annotations

from treelora_cli.engine.world import ALONE, World
from treelora_cli.errors import EnvironmentProblem, UsageError
from treelora_cli.methods.base import Method
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import choose_device, load_backbone
from treelora_cli.models.recompute import recompute_layers
from treelora_cli.models.sharded import mesh_of, settle, shard_base
from treelora_cli.recipe import Recipe


def build_model(recipe: Recipe, method: Method, world: World = ALONE) -> AdaptedModel:
    """Return the method's model; where the base is shared out, all processes must ask at once.

    Those of one machine share one base, for its parts are gathered in every pass, which a network
    is too slow for. They load it in turns, so that the host holds one whole at a time.

    Raises:
        TreeloraError: of the kind and exit code that fits what is wrong.
    """
    if not world.sharded:
        return _build(recipe, method, on_host=False)
    parts = parts_of(world)
    mesh = mesh_of(parts, choose_device(recipe.model.device))
    for turn in range(parts):
        if turn == world.local_rank:
            adapted = _build(recipe, method, on_host=True)
            shard_base(adapted, mesh)
        world.wait()
    settle(adapted)
    return adapted


def check_building(recipe: Recipe, world: World) -> None:
    """Check, before anything is loaded, that a base can be shared out.

    Raises:
        UsageError: it is quantised.
    """
    if world.sharded and recipe.model.quantization != "none":
        raise UsageError(
            "processes.engine=fsdp2 shares out a base in floating point, and "
            f"model.quantization={recipe.model.quantization} packs it",
            "leave one of them out: a base in 4 bit takes a quarter of its memory by itself",
        )


def parts_of(world: World) -> int:
    """Return how many processes share one base: those of a machine.

    Raises:
        EnvironmentProblem: machines have different numbers of them.
    """
    places: list[int] = world.gather(world.local_rank)
    parts = max(places) + 1
    if world.size % parts or places != [rank % parts for rank in range(world.size)]:
        raise EnvironmentProblem(
            "processes.engine=fsdp2 needs as many processes on every machine, and they are "
            f"numbered {places}",
            "start torchrun with one --nproc-per-node everywhere",
        )
    return parts


def _build(recipe: Recipe, method: Method, *, on_host: bool) -> AdaptedModel:
    backbone = load_backbone(recipe.model, on_host=on_host)
    if recipe.optim.gradient_checkpointing:
        recompute_layers(backbone.model)
    return method.build(backbone, recipe.lora, recipe.stream.seed)
