"""Read a run directory, finished or not, into a :class:`RunReport`; nothing is written."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from treelora_cli.errors import RunDirError
from treelora_cli.report import metrics
from treelora_cli.report.losses import loss_curves
from treelora_cli.report.model import (
    JOINT,
    SYNTHETIC,
    LossPoint,
    RoutedScores,
    RunReport,
    TaskReport,
)
from treelora_cli.report.scoring import Scored, score
from treelora_cli.report.settings import origin_of, settings_of
from treelora_cli.report.treedoc import read_tree
from treelora_cli.report.words import clean, clean_lines, marked
from treelora_cli.rundir.atomic import committed
from treelora_cli.rundir.events import read_events
from treelora_cli.rundir.jsonfile import read_json
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.merged import read_facts, read_merged
from treelora_cli.rundir.scores import Cell, Scores

Json = dict[str, Any]


def collect(run_path: Path) -> RunReport:
    """Read everything a report says about one run.

    Readers take no lock: files are replaced atomically, so a run may go on meanwhile.

    Args:
        run_path: the run directory.

    Raises:
        RunDirError: it is missing, damaged or of another format version.
    """
    run = RunDir.open(run_path)
    info = run.info.to_json()
    decoding = _text(info.get("decoding"))
    cells = _count_open_tasks(Scores.load(run.scores).cells, decoding)
    mode = _text(info.get("mode")) or "latest"
    scored = score(info["tasks"], cells, mode, decoding)
    sources = _Sources(run, info, cells, read_events(run.events), scored)
    return _report(run_path, sources, _tasks(sources))


def _count_open_tasks(cells: list[Cell], decoding: str | None) -> list[Cell]:
    """Let the answers of tasks without labels count in a run that is scored by likelihood.

    Labels cannot be compared where there are none: the run itself generates such answers.
    """
    if decoding != "likelihood":
        return cells
    labelled = {cell.task for cell in cells if cell.decoding == decoding}
    return [cell if cell.task in labelled else replace(cell, decoding=decoding) for cell in cells]


@dataclass(frozen=True, slots=True)
class _Sources:
    """What was read of one run directory."""

    run: RunDir
    info: Json
    cells: list[Cell]
    events: list[Json]
    scored: Scored


def _tasks(sources: _Sources) -> tuple[TaskReport, ...]:
    scored = sources.scored
    curves = loss_curves(sources.events)
    seconds = {
        event.get("task"): event.get("seconds")
        for event in sources.events
        if event.get("kind") == "task_finished"
    }
    rows = _rows(sources.cells, scored)
    documents = [
        _task_document(sources.run.task_dir(j, name)) for j, name in enumerate(scored.names)
    ]
    members = _members(documents)
    tasks = []
    for j, entry in enumerate(sources.info["tasks"]):
        name = scored.names[j]
        known = {**entry, **members.get(name, {}), **documents[j]}
        known |= {"status": entry["status"], "rows": rows.get(name)}
        known["seconds"] = {**_mapping(known.get("seconds")), **_mapping(seconds.get(name))}
        known["builtin"] = bool(sources.info["builtin_data"])
        tasks.append(_task(known, j, scored, curves.get(name, ())))
    return tuple(tasks)


def _members(documents: Sequence[Json]) -> dict[str, Json]:
    """Tasks that were trained at once are all described where the last of them is."""
    return {
        str(one["name"]): one
        for stored in documents
        for one in stored.get("members") or ()
        if isinstance(one, dict) and "name" in one
    }


def _task_document(folder: Path) -> Json:
    """Read task.json, without the checksums: they would read every weight of the run."""
    for _ in range(3):
        place = committed(folder)
        if place is None:
            break
        try:
            return read_json(place / "task.json")
        except RunDirError:
            # A writer may have replaced the folder between the two lines above.
            if os.path.lexists(place / "task.json"):
                raise
    return {}


def _task(known: Json, j: int, scored: Scored, loss: tuple[LossPoint, ...]) -> TaskReport:
    synthetic = known["builtin"] or bool(known.get("synthetic"))
    learned = j < scored.learned
    name = clean(scored.names[j])
    steps = _whole(known.get("steps"))
    return TaskReport(
        name=name,
        status=_text(known.get("status")) or "pending",
        metric=_text(known.get("metric")),
        language=_text(known.get("language")),
        synthetic=synthetic,
        label=marked(name, synthetic, SYNTHETIC if known["builtin"] else "synthetic"),
        own=scored.R[j][j] if learned and scored.mode != JOINT else None,
        final=scored.R[-1][j] if learned else None,
        zero_shot=scored.zero_shot[j],
        chance=_number(known.get("chance")),
        rows=known["rows"],
        train_seconds=_number(known["seconds"].get("train")),
        evaluate_seconds=_number(known["seconds"].get("evaluate")),
        steps=loss[-1].step if steps is None and loss else steps,
        trainable_parameters=_whole(known.get("trainable_parameters")),
        loss=loss,
    )


def _rows(cells: Sequence[Cell], scored: Scored) -> dict[str, int]:
    """Test rows behind the scores of each task, the most where cells differ."""
    rows: dict[str, int] = {}
    for cell in metrics.test_cells(cells, scored.decoding):
        if cell.adapter == scored.adapter or cell.after is None:
            rows[cell.task] = max(cell.rows, rows.get(cell.task, 0))
    return rows


def _report(run_path: Path, sources: _Sources, tasks: tuple[TaskReport, ...]) -> RunReport:
    run, info, scored = sources.run, sources.info, sources.scored
    builtin_base = bool(info["builtin_base"])
    R = scored.R
    recipe = _recipe(run.recipe_yaml)
    return RunReport(
        path=clean(str(run_path)),
        title=clean(run_path.resolve().name),
        status=_text(info.get("status")) or "unknown",
        method=_text(info.get("method")) or "unknown method",
        model=marked(_text(info.get("model")) or "unknown model", builtin_base),
        builtin_base=builtin_base,
        builtin_data=bool(info.get("builtin_data")),
        seed=_whole(info.get("seed")),
        mode=scored.mode,
        decoding=None if scored.decoding is None else clean(scored.decoding),
        tasks=tasks,
        learned=scored.learned,
        matrix=tuple(tuple(row) for row in R),
        op_curve=tuple(metrics.op_curve(R)),
        op=metrics.op(R),
        bwt=metrics.bwt(scored.history),
        bwt_lopez_paz=metrics.bwt_lopez_paz(scored.history),
        forgetting=metrics.forgetting(scored.history),
        fwt=metrics.fwt(scored.history, scored.zero_shot),
        missing=tuple((clean(after), clean(task)) for after, task in scored.missing()),
        limited_cells=sum(cell.limited for cell in sources.cells),
        limited_matrix=tuple(tuple(row) for row in scored.few_rows),
        train_seconds=_total(task.train_seconds for task in tasks),
        evaluate_seconds=_total(task.evaluate_seconds for task in tasks),
        tree=read_tree(run.tree_json),
        recipe=recipe,
        versions=_versions(info),
        command=_command(info.get("command")),
        settings=settings_of(recipe),
        origin=origin_of(info),
        merged=tuple(_merged(run)),
        routed=tuple(_routed(sources.cells, scored)),
    )


def _merged(run: RunDir) -> Iterator[tuple[tuple[str, ...], float | None]]:
    for group in read_merged(run):
        names = tuple(clean(run.info.tasks[member]["name"]) for member in group.members)
        merges = read_facts(run, group).get("merges")
        last = merges[-1] if isinstance(merges, list) and merges else None
        yield names, _number(_mapping(last).get("error"))


def _routed(cells: Sequence[Cell], scored: Scored) -> Iterator[RoutedScores]:
    """The numbers under each other way of routing whose last row is complete."""
    ways = {cell.adapter for cell in cells if cell.adapter.split(":")[0] == "route"}
    for way in sorted(ways - {scored.adapter}):
        R = metrics.matrix_from_scores(cells, scored.names, way, scored.decoding)[: scored.learned]
        op = metrics.op(R)
        if op is not None:
            yield RoutedScores(clean(way), op, metrics.bwt(R), metrics.bwt_lopez_paz(R))


def _recipe(path: Path) -> str:
    try:
        return clean_lines(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return ""


def _versions(info: Json) -> dict[str, str]:
    found = _mapping(info.get("versions")) or _mapping(info.get("package_versions"))
    return {clean(str(name)): clean(str(version)) for name, version in sorted(found.items())}


def _command(value: object) -> str | None:
    if isinstance(value, list):
        return clean(shlex.join(str(part) for part in value)) or None
    return _text(value)


def _mapping(value: object) -> Json:
    return value if isinstance(value, dict) else {}


def _text(value: object) -> str | None:
    return (clean(value) or None) if isinstance(value, str) else None


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _total(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
