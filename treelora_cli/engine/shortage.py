"""Memory that runs short: a warning before it does, and settings that would fit when it has.

Nothing is made smaller by itself: an estimate too large is a warning, and memory that has run out
is an error that names what to change.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch

from treelora_cli.engine.memory import (
    SHARING,
    Group,
    free_memory,
    longest_row,
    own_memory,
    pass_rows,
    sharers,
    size,
    training_need,
)
from treelora_cli.errors import EnvironmentProblem, TreeloraError
from treelora_cli.methods.base import Method
from treelora_cli.models.encode import encoder_for
from treelora_cli.models.outline import Outline, outline
from treelora_cli.recipe import EvalSection, Recipe
from treelora_cli.tasks.types import Task

_SAID = ("out of memory", "can't allocate memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What torch says in a plain RuntimeError where an allocation failed, on the host for one."""

logger = logging.getLogger("treelora")


@dataclass(frozen=True)
class Setting:
    """A setting that spares memory.

    Attributes:
        text: as ``--set`` takes it.
        total: the estimate with it, in bytes.
        anew: whether it is one that a run must be begun with.
    """

    text: str
    total: int
    anew: bool = False


@dataclass(frozen=True)
class Forecast:
    """What a run would take, and what could be changed in it.

    Attributes:
        sizes: of the model.
        recipe: the run's.
        longest: tokens of the longest training row.
    """

    sizes: Outline
    recipe: Recipe
    longest: int

    def warn(self) -> None:
        """Warn where training is not likely to fit what is free; it is an estimate, no refusal."""
        need = training_need(self.sizes, self.recipe, self.longest)
        free = free_memory(self.sizes.device)
        if free is None or need.total <= free:
            return
        device = self.sizes.device
        count = sharers(device)
        logger.warning(
            "training will take about %s (base and adapter %s, activations %s, logits %s)%s, and "
            "%s has %s free%s; %s",
            *map(size, (need.total, need.state, need.activations, need.logits)),
            f" in each of {count} processes" if count > 1 else "",
            device,
            size(free),
            " for each" if count > 1 else "",
            advice(self.settings(free), free),
        )

    def settings(self, room: int | None) -> list[Setting]:
        """Return three settings that spare memory, those that fit alone first.

        Args:
            room: what there is for all of it, in bytes; numbers are halved until the estimate fits
                it. None: nobody knows, and each is halved once.
        """
        found = [
            self._recomputing(),
            self._sharing(),
            self._passes(room),
            self._base(),
            self._prompts(room),
        ]
        known = [setting for setting in found if setting is not None]
        return sorted(known, key=lambda one: room is not None and one.total > room)[:3]

    def _recomputing(self) -> Setting | None:
        if self.recipe.optim.gradient_checkpointing:
            return None
        return self._setting("optim", "gradient_checkpointing", True)

    def _sharing(self) -> Setting | None:
        """The base shared out among the processes of a machine."""
        fits = not self.sizes.opened and self.recipe.model.quantization == "none"
        if Group.launched().here == 1 or self.recipe.processes.engine == SHARING or not fits:
            return None
        return self._setting("processes", "engine", SHARING)

    def _passes(self, room: int | None) -> Setting | None:
        tokens = pass_rows(self.sizes, self.recipe, self.longest) * self.longest
        return self._halved("optim", "micro_batch_tokens", tokens, self.longest, room)

    def _prompts(self, room: int | None) -> Setting | None:
        data = self.recipe.data
        tokens = min(data.max_prompt_tokens, self.longest)
        return self._halved("data", "max_prompt_tokens", tokens, min(tokens, 64), room)

    def _base(self) -> Setting | None:
        """The base in fewer bits: four on a GPU, and bfloat16 on a CPU."""
        sizes, section = self.sizes, self.recipe.model
        if sizes.opened or section.quantization != "none":
            return None
        if sizes.device.startswith("cuda"):
            smaller = replace(sizes, base_bytes=sizes.base_bytes_in("nf4"))
            key, value = "quantization", "nf4"
        elif sizes.itemsize == 4:
            smaller = replace(sizes, base_bytes=sizes.base_bytes // 2, itemsize=2)
            key, value = "dtype", "bfloat16"
        else:
            return None
        total = training_need(smaller, self.recipe, self.longest).total
        return Setting(f"model.{key}={value}", total, anew=True)

    def _halved(
        self, section: str, key: str, value: int, least: int, room: int | None
    ) -> Setting | None:
        """Return a number halved until the estimate fits; None where it is the least already."""
        if value <= least:
            return None
        while True:
            value = max(least, value // 2)
            found = self._setting(section, key, value)
            if room is None or found.total <= room or value == least:
                return found

    def _setting(self, section: str, key: str, value: Any) -> Setting:
        part = getattr(self.recipe, section).model_copy(update={key: value})
        recipe = self.recipe.model_copy(update={section: part})
        data = recipe.data
        longest = min(self.longest, data.max_prompt_tokens + data.max_answer_tokens + 2)
        text = str(value).lower() if isinstance(value, bool) else value
        total = training_need(self.sizes, recipe, longest).total
        return Setting(f"{section}.{key}={text}", total, anew=section == "data")


def foresee(recipe: Recipe, method: Method, tasks: Sequence[Task]) -> Forecast | None:
    """Look at model and rows without loading a weight.

    Returns:
        None where it cannot be said: no tasks yet, or a model that loading will complain of.
    """
    if not (tasks and method.trains):
        return None
    try:
        sizes = outline(recipe.model, recipe.lora, method.learns)
        encoder = encoder_for(sizes.tokenizer, recipe.data, sizes.positions, encodes=sizes.encodes)
    except TreeloraError:
        return None
    return Forecast(sizes, recipe, longest_row(tasks, encoder))


def advice(settings: Sequence[Setting], room: int | None) -> str:
    """Say in one line what to change."""
    fitting = [one for one in settings if room is not None and one.total <= room]
    others = [one for one in settings if one not in fitting]
    if room is None:
        return f"any of these takes less: {_listed(settings)}"
    if not fitting:
        return f"none of these fits alone by the estimate, try them together: {_listed(settings)}"
    said = f"by the estimate any one of these fits: {_listed(fitting)}"
    return said + (f"; these take less: {_listed(others)}" if others else "")


def _listed(settings: Sequence[Setting]) -> str:
    return ", ".join(
        f"--set {one.text}" + (" (with another --run-dir)" if one.anew else "") for one in settings
    )


def ran_out(error: BaseException) -> bool:
    """Tell whether an error says that memory could not be had."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in _SAID)


@contextmanager
def explaining_shortage(doing: str, hint: Callable[[], str]) -> Iterator[None]:
    """Turn memory that has run out into one line.

    Args:
        doing: what is being done.
        hint: asked only then what to change.

    Raises:
        EnvironmentProblem: it has run out.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out(error):
            raise
        where = "the GPU" if isinstance(error, torch.OutOfMemoryError) else "the machine"
        raise EnvironmentProblem(
            f"{where} ran out of memory while {doing}; what was stored before is kept", hint()
        ) from None


def training_hint(recipe: Recipe, method: Method, tasks: Sequence[Task]) -> str:
    """Say what would make training fit, by the estimate."""
    forecast = foresee(recipe, method, tasks)
    if forecast is None:
        return "lower optim.micro_batch_tokens, or set optim.gradient_checkpointing=true"
    free = free_memory(forecast.sizes.device)
    room = None if free is None else free + own_memory(forecast.sizes.device)
    # It did not fit, whatever the estimate says: at least one halving below it.
    need = training_need(forecast.sizes, recipe, forecast.longest)
    most = need.state + (need.total - need.state) // 2
    room = most if room is None else min(room, most)
    return advice(forecast.settings(room), room)


def evaluation_hint(plan: EvalSection) -> str:
    """Say what takes less where answers are generated; none of it changes a score."""
    tokens, rows = (plan.batch_tokens or 32768) // 4, max(1, plan.batch_size // 4)
    return (
        f"these take less and change no score: --set eval.batch_tokens={tokens}, "
        f"--set eval.batch_size={rows}, or for `treelora eval` --batch-size {rows}"
    )
