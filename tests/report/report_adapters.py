"""Adapters in run directories that were made by hand; see report_fixtures."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import torch
from report_fixtures import make_run

from treelora_cli.engine.adapters import write_adapter
from treelora_cli.rundir.atomic import commit_dir, write_json
from treelora_cli.rundir.layout import RunDir

SHAPES = {"layers.0.q_proj": (24, 16), "layers.0.v_proj": (8, 16), "layers.1.q_proj": (24, 16)}


def factors(rank: int, seed: int) -> dict[str, torch.Tensor]:
    """Random A and B of every module, as an adapter holds them."""
    draw = torch.Generator().manual_seed(seed)
    found = {}
    for name, (height, width) in SHAPES.items():
        found[f"{name}.lora_A.weight"] = torch.randn(rank, width, generator=draw)
        found[f"{name}.lora_B.weight"] = torch.randn(height, rank, generator=draw)
    return found


def put_adapters(run_path: Path, adapters: list[dict[str, torch.Tensor]], scale: float) -> None:
    """Give the first tasks of a run an adapter each; alpha is such that the scale stays."""
    run = RunDir.open(run_path)
    with mock.patch("os.fsync"):
        for index, tensors in enumerate(adapters):
            rank = next(value.shape[0] for key, value in tensors.items() if ".lora_A." in key)
            name = run.info.tasks[index]["name"]
            with commit_dir(run.task_dir(index, name)) as place:
                write_json(place / "task.json", {"index": index, "name": name})
                config = {"lora_alpha": scale * rank, "r": rank}
                write_adapter(place / "adapter", config, tensors)


def adapted_run(path: Path, adapters: list[dict[str, torch.Tensor]], **settings) -> Path:
    """A run whose finished tasks left these adapters, under the scale 2."""
    settings = {"tasks": len(adapters), **settings}
    make_run(path, **settings)
    put_adapters(path, adapters, 2.0)
    return path


def changes(adapters: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
    """The change of all entries by each adapter, flat, under the scale 2."""
    return [
        torch.cat(
            [
                2.0 * (a[f"{m}.lora_B.weight"] @ a[f"{m}.lora_A.weight"]).flatten().double()
                for m in SHAPES
            ]
        )
        for a in adapters
    ]
