"""Run directories as the engine leaves them, made by hand through the rundir API."""

from __future__ import annotations

import math
from pathlib import Path
from unittest import mock

from treelora_cli.rundir.atomic import commit_dir, write_json
from treelora_cli.rundir.events import EventLog
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.runinfo import RunInfo
from treelora_cli.rundir.scores import Cell, Scores

TRACE = (
    "C-STANCE",
    "FOMC",
    "MeetingBank",
    "Py150",
    "ScienceQA",
    "NumGLUE-cm",
    "NumGLUE-ds",
    "20Minuten",
)


def names_for(count: int) -> list[str]:
    """Task names: those of TRACE, then numbered ones."""
    return [*TRACE, *(f"Task-{n}" for n in range(len(TRACE) + 1, count + 1))][:count]


def score(i: int, j: int, drop: float = 0.03) -> float:
    """A plausible and exactly reproducible R[i][j]; i = -1 is zero shot."""
    own = 0.45 + 0.45 * abs(math.sin(1.7 * (j + 1)))
    if i < j:
        return round(0.15 + 0.1 * abs(math.cos(j)) + 0.005 * (i + 1), 4)
    return round(max(0.1, own - drop * (i - j) * (1 + 0.5 * math.sin(i + 2 * j))), 4)


def cell(after: str | None, task: str, value: float, adapter: str = "latest", **other) -> Cell:
    """A full test cell unless ``other`` says otherwise."""
    fields = {"split": "test", "rows": 200, "limited": False, "decoding": "greedy"} | other
    return Cell(
        after=after,
        task=task,
        adapter=adapter,
        metric="accuracy",
        score=value,
        scores={"accuracy": value},
        adapter_hash="0" * 64,
        **fields,
    )


def make_cells(names: list[str], learned: int, mode: str = "latest", drop: float = 0.03):
    """Zero shot, the lower triangle and the cells just before each task."""
    cells = [cell(None, name, score(-1, j), "base") for j, name in enumerate(names)]
    for i in range(learned):
        last = len(names) if mode == "own" else min(i + 2, len(names))
        for j in range(last):
            if mode == "own" and i != j:
                continue
            cells.append(cell(names[i], names[j], score(i, j, drop), mode))
    return cells


def tree_document(names: list[str]) -> dict:
    """A binary tree that halves the tasks."""
    nodes: list[dict] = []

    def grow(tasks: list[int], depth: int, parent: int | None) -> int:
        number = len(nodes)
        node = {
            "id": number,
            "parent": parent,
            "children": [],
            "tasks": tasks,
            "depth": depth,
            "split": None,
            "block": None,
            "threshold": None,
            "radius": 0.0,
            "median": 0.0,
            "spread": 0.0,
        }
        nodes.append(node)
        if len(tasks) > 1:
            node |= {"split": "principal", "block": depth, "threshold": 0.125, "radius": 0.5}
            half = (len(tasks) + 1) // 2
            node["children"] = [
                grow(tasks[:half], depth + 1, number),
                grow(tasks[half:], depth + 1, number),
            ]
        return number

    grow(list(range(len(names))), 0, None)
    return {
        "format": 1,
        "tasks": names,
        "signature": {"kind": "lora_a", "factors": "A", "blocks": 12, "widths": [64] * 12},
        "split": "principal",
        "block_rule": "spread",
        "nodes": nodes,
    }


def make_run(path: Path, **settings) -> Path:
    """Write a run directory and return it; see :func:`_make_run` for the settings."""
    with mock.patch("os.fsync"):  # a test does not outlive a power cut
        return _make_run(path, **settings)


def _make_run(
    path: Path,
    *,
    tasks: int | list[str] = 3,
    learned: int | None = None,
    method: str = "treelora",
    model: str = "meta-llama/Llama-3.2-1B-Instruct",
    mode: str = "latest",
    builtin: bool = False,
    status: str | None = None,
    drop: float = 0.03,
    cells: list[Cell] | None = None,
    tree: bool = True,
    extra: dict | None = None,
    steps: int = 40,
    seed: int = 1234,
    recipe: str | None = None,
) -> Path:
    """Write a run directory; ``learned`` tasks are finished, the next one is in training."""
    names = names_for(tasks) if isinstance(tasks, int) else tasks
    learned = len(names) if learned is None else learned
    info = RunInfo(
        method=method,
        model=model,
        base_fingerprint="f" * 64,
        builtin_base=builtin,
        builtin_data=builtin,
        seed=seed,
        versions={"torch": "2.13.0", "transformers": "5.23.0", "treelora": "0.1.0"},
        status=status or ("finished" if learned == len(names) else "running"),
        extra={
            "mode": mode,
            "command": [
                "treelora",
                "train-stream",
                "--tasks",
                ",".join(names),
                "--seed",
                str(seed),
            ],
            **(extra or {}),
        },
    )
    for name in names:
        info.add_task(name, "accuracy")
    for j in range(learned):
        info.tasks[j]["status"] = "finished"
    if learned < len(names) and info.status == "running":
        info.tasks[learned]["status"] = "training"
    if recipe is None:
        recipe = f"method:\n  name: {method}\noptim:\n  lr: 0.0001\n  epochs: 2\n"
        recipe += f"stream:\n  seed: {seed}\n"
    run = RunDir.create(path, info, recipe=recipe)
    (path / "tasks").mkdir()
    _events(run, names, min(learned + 1, len(names)), steps, drop)
    for j in range(learned):
        _task(run, j, names[j], builtin, steps)
        if tree:
            folder = run.tree_history(j, names[j])
            folder.parent.mkdir(parents=True, exist_ok=True)
            with commit_dir(folder) as place:
                write_json(place / "tree.json", tree_document(names[: j + 1]))
            write_json(run.tree_json, tree_document(names[: j + 1]))
    Scores(make_cells(names, learned, mode, drop) if cells is None else cells).save(run.scores)
    return path


def _task(run: RunDir, j: int, name: str, builtin: bool, steps: int) -> None:
    with commit_dir(run.task_dir(j, name)) as place:
        write_json(
            place / "task.json",
            {
                "index": j,
                "name": name,
                "metric": "accuracy",
                "language": "zh" if name == "C-STANCE" else "en",
                "synthetic": builtin,
                "steps": steps,
                "seconds": {"train": 61.25 + j, "evaluate": 10.5},
                "chance": round(1 / 3, 4),
                "trainable_parameters": 851_968,
            },
        )


def _events(run: RunDir, names: list[str], begun: int, steps: int, drop: float) -> None:
    log = EventLog(run.events)
    log.append("run_started")
    for j, name in enumerate(names[:begun]):
        log.append("task_started", task=name)
        for step in range(1, steps + 1):
            loss = 0.4 + 0.1 * j % 3 + 2.2 * math.exp(-step * (0.06 + drop)) + 0.12 * math.sin(step)
            log.append("step", task=name, step=step, of=steps, epoch=1, loss=loss, penalty=0.01)
