"""The parts of the benchmark, in the order in which they run; a new one is one more line here."""

from __future__ import annotations

import time
from collections.abc import Sequence

from treelora_cli.bench import ablation, curves, data, evaluate, scale, startup, step, tasks, trees
from treelora_cli.bench.document import Document, Section
from treelora_cli.bench.machine import machine
from treelora_cli.bench.part import Part, Plan, Say
from treelora_cli.errors import UsageError, did_you_mean

ALL = "all"
PARTS: dict[str, Part] = {
    part.name: part
    for part in (
        step.PART,
        tasks.PART,
        data.PART,
        evaluate.PART,
        trees.PART,
        startup.PART,
        curves.PART,
        scale.PART,
        ablation.PART,
    )
}
BY_NAME_ONLY = {scale.PART.name, ablation.PART.name}
"""Parts that ``all`` leaves out: one measures nothing, one needs a base, data and hours."""


def choose(names: Sequence[str]) -> list[Part]:
    """Return the parts named, in the order of the list above.

    None named, or ``all``: every one but those that are measured by name only.

    Raises:
        UsageError: an unknown part.
    """
    for name in names:
        if name not in PARTS and name != ALL:
            hint = did_you_mean(name, [*PARTS, ALL])
            raise UsageError(f"unknown part {name!r} of the benchmark", hint)
    everything = not names or ALL in names
    return [
        part
        for name, part in PARTS.items()
        if name in names or (everything and name not in BY_NAME_ONLY)
    ]


def measure(parts: Sequence[Part], plan: Plan, say: Say) -> Document:
    """Run parts one after the other.

    Args:
        parts: from ``choose``.
        plan: how to measure.
        say: told what is being measured.
    """
    settings = {
        "quick": plan.quick,
        "seed": plan.seed,
        "repeat": plan.repeat,
        "device": plan.device.type,
        "models": "random weights",
        "signatures": "synthetic",
    }
    if any(part.name == ablation.PART.name for part in parts):
        settings |= {"models": plan.model, "signatures": "real"}
    document = Document(machine(plan.device), settings)
    for part in parts:
        began = time.perf_counter()
        tables = part.run(plan, say)
        seconds = time.perf_counter() - began
        document.sections.append(Section(part.name, part.about, seconds, tables))
    return document
