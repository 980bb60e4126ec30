"""Run directories with adapters on disk, made without a model; and processes that are killed."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

from treelora_cli.engine.store import save_task
from treelora_cli.methods.base import TaskMemory
from treelora_cli.recipe import LoraSection, Recipe
from treelora_cli.rundir import faults
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.runinfo import RunInfo

Snapshot = dict[str, torch.Tensor]
NAMES = ("alpha", "beta", "gamma", "delta", "epsilon", "zeta", "eta", "theta")
SHAPES = {"x.0.q": (60, 50), "x.1.v": (40, 90)}
LORA = LoraSection(rank=3, alpha=6)
SCALE = 2.0
CONFIG = {"peft_type": "LORA", "r": 3, "lora_alpha": 6}


def random_adapter(seed: int, near: Snapshot | None = None, size: float = 1.0) -> Snapshot:
    """An adapter of its own, or one that differs from another by so much in every entry."""
    generator = torch.Generator().manual_seed(seed)
    made: Snapshot = {}
    for name, (d_out, d_in) in SHAPES.items():
        made[f"{name}.lora_A.weight"] = torch.randn(3, d_in, generator=generator)
        made[f"{name}.lora_B.weight"] = torch.randn(d_out, 3, generator=generator)
    return made if near is None else {key: near[key] + size * made[key] for key in made}


def partly(base: Snapshot, seed: int, share: float) -> Snapshot:
    """An adapter of which this share of entries is another one's."""
    generator = torch.Generator().manual_seed(seed)
    other = random_adapter(seed)
    made = {}
    for key, value in base.items():
        changed = torch.rand(value.shape, generator=generator) < share
        made[key] = torch.where(changed, other[key], value)
    return made


def new_run(path: Path, count: int) -> RunDir:
    """A run of so many tasks, none of them trained yet."""
    info = RunInfo("treelora", "tiny", "0" * 64, False, True, 3, {"torch": "2"})
    for name in NAMES[:count]:
        info.add_task(name, "accuracy")
    info.status = "finished"
    return RunDir.create(path, info, Recipe(lora=LORA).to_yaml())


def add_task(
    run: RunDir, index: int, snapshot: Snapshot, reference: Sequence[int] = (), form: str = "delta"
) -> None:
    """Store a task; with a reference as its difference from it."""
    adapted = SimpleNamespace(answer=lambda: snapshot, config_document=lambda _: dict(CONFIG))
    document = {"index": index, "name": NAMES[index], "steps": 4}
    memory = TaskMemory({"kept": torch.arange(3.0)}, reference=tuple(reference))
    save_task(run, adapted, document, memory, {}, form)  # type: ignore[arg-type]
    answers = run.predictions((index, NAMES[index]), "alpha", "latest", "test")
    answers.parent.mkdir(parents=True)
    answers.write_text(f"answers of {NAMES[index]}\n", encoding="utf-8")


def whole_run(path: Path, adapters: Sequence[Snapshot], **references: Sequence[int]) -> RunDir:
    """A finished run; ``references`` by task name."""
    run = new_run(path, len(adapters))
    for index, snapshot in enumerate(adapters):
        add_task(run, index, snapshot, references.get(NAMES[index], ()))
    return run


def same_bits(left: Snapshot, right: Snapshot) -> bool:
    """Tell whether two adapters are the same, signs of zeros and all."""
    return left.keys() == right.keys() and all(
        torch.equal(left[key].view(torch.int32), right[key].view(torch.int32)) for key in left
    )


def dense(snapshot: Snapshot) -> torch.Tensor:
    """The change s B A of all modules, materialised, as one vector."""
    return torch.cat(
        [
            (SCALE * snapshot[f"{name}.lora_B.weight"].double()
             @ snapshot[f"{name}.lora_A.weight"].double()).reshape(-1)
            for name in SHAPES
        ]
    )  # fmt: skip


def in_child(work: Callable[[], object], fault: str) -> int:
    """Do something in a forked process with a fault; return its exit code or minus the signal."""
    child = os.fork()
    if child == 0:
        code = 70
        try:
            os.environ[faults.ENVIRONMENT] = fault
            faults.reset()
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
