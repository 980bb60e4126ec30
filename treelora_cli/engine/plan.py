"""Settle a run's recipe and task order before anything is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from treelora_cli.errors import UsageError, did_you_mean
from treelora_cli.methods.base import build_method
from treelora_cli.recipe import (
    Recipe,
    build_recipe,
    differences,
    find_recipe,
    merge,
    parse_overrides,
    read_yaml,
)
from treelora_cli.rundir.names import check_task_name

DEFAULT_RECIPE = "quickstart"


def resolve_recipe(
    run_path: Path,
    recipe: str | None,
    settings: list[str],
    flags: dict[str, Any],
    *,
    arriving: bool = False,
) -> Recipe:
    """Return the run's recipe with every key written out.

    Layers, later ones win: defaults; the recipe named, or else the one stored in the run directory,
    or else ``quickstart`` where the built-in base is used; ``--set``; flags.

    Args:
        run_path: the run directory, existing or not.
        recipe: name or file, or None.
        settings: ``section.key=value`` texts.
        flags: nested values the user gave by flag.
        arriving: tasks will be named later, so that there may be none yet.

    Raises:
        UsageError: an unknown key, a value out of range, tasks in another order than before,
            settings that differ from those the run was begun with, or a task that cannot be added.
    """
    stored = _stored_recipe(run_path)
    overrides = merge(parse_overrides(settings), flags)
    base, where = _base_document(stored, recipe, overrides)
    _forget_other_methods_settings(base, overrides)
    asked = overrides.get("stream", {}).get("tasks")
    resolved = _complete(build_recipe(merge(base, overrides), where))
    if resolved.data.path is not None and resolved.model.name is None:
        raise UsageError(
            "data of your own needs a model: the built-in base knows only the built-in tasks",
            "add --model with a hub id or a folder",
        )
    tasks = list(resolved.stream.tasks)
    if stored is not None:
        changed = differences(stored, resolved)
        if changed:
            raise UsageError(
                f"{run_path} was begun with other settings: {'; '.join(changed)}",
                "leave them as they were, or give another --run-dir",
            )
        tasks = merge_tasks(list(stored.stream.tasks), tasks if asked or recipe else [])
        _check_growth(stored, tasks, run_path)
    if tasks or not arriving:
        check_tasks(tasks, resolved)
    if arriving:
        _check_arriving(resolved)
    return resolved.model_copy(
        update={"stream": resolved.stream.model_copy(update={"tasks": tuple(tasks)})}
    )


def _check_arriving(recipe: Recipe) -> None:
    """Refuse what cannot be done with tasks that are still arriving.

    Raises:
        UsageError: the method or the evaluation has to know all tasks.
    """
    if build_method(recipe).mode == "joint":
        raise UsageError(
            f"method {recipe.method.name} trains all tasks at once and cannot wait for more",
            "name all tasks with --tasks A,B,C",
        )
    if recipe.eval.when in ("ends", "last"):
        raise UsageError(
            f"eval.when={recipe.eval.when} needs to know which task is the last, but tasks are "
            "still arriving",
            "use eval.when=all or none with --tasks -",
        )


def _check_growth(stored: Recipe, tasks: list[str], run_path: Path) -> None:
    """Refuse to add a task to a run that trains all of its tasks at once.

    Raises:
        UsageError: it is such a run, and there is a new task.
    """
    new = tasks[len(stored.stream.tasks) :]
    if new and build_method(stored).mode == "joint":
        raise UsageError(
            f"{run_path} trains all its tasks at once with the method {stored.method.name}, so "
            f"{', '.join(new)} cannot be added to it",
            "train a new run on all of them: give another --run-dir",
        )


def _stored_recipe(run_path: Path) -> Recipe | None:
    path = run_path / "recipe.yaml"
    if not (run_path / "run.json").exists() or not path.exists():
        return None
    return build_recipe(read_yaml(path.read_text(encoding="utf-8"), str(path)), str(path))


def _base_document(
    stored: Recipe | None, recipe: str | None, overrides: dict[str, Any]
) -> tuple[dict[str, Any], str]:
    if recipe is None and stored is not None:
        return stored.to_dict(), "the run's recipe"
    own_model = "name" in overrides.get("model", {})
    own_data = "path" in overrides.get("data", {})
    if recipe is None and (own_model or own_data):
        return {}, "the settings"
    path = find_recipe(recipe or DEFAULT_RECIPE)
    return read_yaml(path.read_text(encoding="utf-8"), str(path)), f"recipe {path.name}"


def _forget_other_methods_settings(base: dict[str, Any], overrides: dict[str, Any]) -> None:
    """Settings written for one method mean nothing to another."""
    wanted = overrides.get("method", {}).get("name")
    section = base.get("method")
    if wanted is not None and isinstance(section, dict) and section.get("name") != wanted:
        base["method"] = {}


def _complete(recipe: Recipe) -> Recipe:
    """Write out the method's own settings, defaults included, so that the run shows them all."""
    method = build_method(recipe)
    settings = method.settings.model_dump(mode="json", by_alias=True)
    document = recipe.to_dict()
    document["method"] = {"name": recipe.method.name, **settings}
    return build_recipe(document, "the recipe")


def merge_tasks(before: list[str], asked: list[str]) -> list[str]:
    """Return the run's tasks with new ones appended in the order given.

    Raises:
        UsageError: tasks the run has already are named in another order.
    """
    known = [name for name in asked if name in before]
    if known != [name for name in before if name in known]:
        raise UsageError(
            f"the run has its tasks in the order {', '.join(before)}, but they were named in the "
            f"order {', '.join(known)}",
            "keep the order, or give another --run-dir",
        )
    return before + [name for name in asked if name not in before]


def check_tasks(tasks: list[str], recipe: Recipe) -> None:
    """Check the stream's names.

    Raises:
        UsageError: no task, a bad name, a name twice, or a task without its number of epochs.
    """
    if not tasks:
        raise UsageError("no tasks given", "name them: --tasks C-STANCE,FOMC")
    for name in tasks:
        check_task_name(name)
        recipe.epochs_of(name)
    twice = sorted({name for name in tasks if tasks.count(name) > 1})
    if twice:
        raise UsageError(f"task {twice[0]!r} is named twice", "name every task once")


def pick(names: list[str], chosen: list[str] | None, what: str) -> list[str]:
    """Return the chosen names, checked, or all.

    Raises:
        UsageError: a chosen name is not among the names.
    """
    for name in chosen or []:
        if name not in names:
            raise UsageError(f"{what} {name!r} is not in this run", did_you_mean(name, names))
    return [name for name in names if chosen is None or name in chosen]
