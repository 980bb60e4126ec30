"""A stream whose prompts are routed: its cells against routing by hand, and their numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import toy_arguments, write_task

from treelora_cli.engine import evaluation
from treelora_cli.engine.evaluate_run import EvalRequest
from treelora_cli.engine.plan import resolve_recipe
from treelora_cli.engine.route_run import RouteRequest, route_run
from treelora_cli.engine.stream import run_stream
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import encoder_for
from treelora_cli.models.features import prompt_features
from treelora_cli.recipe import Recipe, build_recipe, read_yaml
from treelora_cli.routing.router import Router
from treelora_cli.routing.statistics import FeatureStatistics
from treelora_cli.rundir import faults
from treelora_cli.rundir.scores import Cell, Scores
from treelora_cli.tasks.load import load_tasks

NAMES = ("alpha", "beta", "gamma")
TEXTS = {
    "alpha": "What is the colour of the sky over town {}? Answer:",
    "beta": "今天{}号天气怎么样？ 回答：",
    "gamma": "def add{}(a, b):\n    return a + b\n",
}


def rows_of(name: str, count: int, start: int = 0) -> list[tuple[str, str]]:
    return [
        (TEXTS[name].format(number * 7919 % 997), "AB"[number % 2])
        for number in range(start, start + count)
    ]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Three tasks; two of alpha's test rows look like gamma's, which is learned last."""
    folder = tmp_path_factory.mktemp("routed-data")
    for name in NAMES:
        test = rows_of(name, 4, 100) + rows_of("gamma" if name == "alpha" else "alpha", 2, 200)
        write_task(folder, name, {"train": rows_of(name, 8), "eval": test[:2], "test": test})
    return folder


def arguments(tiny_model, data, run: Path, *more: str, method: str = "hide") -> list[str]:
    sets = ["optim.epochs=1", "optim.lr=1e-2", *more]
    flags = [part for pair in sets for part in ("--set", pair)]
    return toy_arguments(tiny_model, data, run, ",".join(NAMES), "--method", method, *flags)


def make(tiny_model, data, run: Path, *more: str, **named: str) -> Path:
    given = arguments(tiny_model, data, run, *more, **named)
    sets = [given[at + 1] for at, part in enumerate(given) if part == "--set"]
    flags = {
        "model": {"name": str(tiny_model)},
        "data": {"path": str(data)},
        "stream": {"tasks": list(NAMES)},
        "method": {"name": named.get("method", "hide")},
    }
    run_stream(resolve_recipe(run, None, sets, flags), run, lambda event: None)
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_model, data) -> Path:
    return make(tiny_model, data, tmp_path_factory.mktemp("routed") / "run")


def cells_of(run: Path) -> list[Cell]:
    return Scores.load(run / "scores.json").cells


def routed(run: Path) -> dict[tuple[str | None, str], Cell]:
    return {(cell.after, cell.task): cell for cell in cells_of(run) if cell.adapter == "route"}


def said(run: Path, after: str, task: str, adapter: str = "route") -> list[dict]:
    (folder,) = run.glob(f"tasks/*-{after}")
    file = folder / "predictions" / f"{task}.{adapter.replace(':', '=')}.test.jsonl"
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def recipe_of(run: Path) -> Recipe:
    return build_recipe(read_yaml((run / "recipe.yaml").read_text(), "recipe"), "recipe")


def sent_by_hand(run: Path, learned: int) -> dict[str, list[str]]:
    """Where the test rows of all tasks go among the first ones, from the rows themselves."""
    recipe = recipe_of(run)
    model = AdaptedModel(load_backbone(recipe.model), recipe.lora, 0)
    encoder = encoder_for(model.backbone.tokenizer, recipe.data, model.backbone.positions)
    prompts = {
        (task.name, split): [row.prompt for row in task.splits[split]]
        for task in load_tasks(NAMES, recipe.data.path)
        for split in ("train", "test")
    }
    router = Router(
        {
            name: FeatureStatistics.of(prompt_features(model, encoder, prompts[name, "train"]))
            for name in NAMES[:learned]
        }
    )
    found = {}
    for name in NAMES:
        features = prompt_features(model, encoder, prompts[name, "test"])
        found[name] = [NAMES[at] for at in router.route(features).indices.tolist()]
    return found


def test_every_cell_is_routed_among_the_tasks_learned_so_far(treelora, whole, tmp_path) -> None:
    alone = Path(shutil.copytree(whole, tmp_path / "alone"))
    answers = {}
    for adapter in NAMES:
        assert treelora("eval", alone, "--adapter", f"task:{adapter}").code == 0
        for task in NAMES:
            for row in said(alone, adapter, task, f"task:{adapter}"):
                answers[adapter, task, row["row"]] = row["prediction"]
    cells = routed(whole)
    # The last column of each row is the cell before a task's own training, for FWT.
    pairs = [(NAMES[i], NAMES[j]) for i in range(3) for j in range(min(i + 2, 3))]
    assert set(cells) == set(pairs)
    assert {cell.adapter for cell in cells_of(whole)} == {"route", "base"}
    moved = False
    for learned, after in enumerate(NAMES, start=1):
        expected = sent_by_hand(whole, learned)
        for task in (task for first, task in pairs if first == after):
            rows = said(whole, after, task)
            assert [row["routed"] for row in rows] == expected[task]
            for row in rows:
                assert row["prediction"] == answers[row["routed"], task, row["row"]]
            right = sum(row["prediction"] == row["answer"] for row in rows)
            assert cells[after, task].score == pytest.approx(right / len(rows))
        moved |= expected["alpha"] != ["alpha"] * 6
    assert moved, "otherwise no later task draws a row away"


def test_routing_again_gives_the_same_cells(whole, tmp_path) -> None:
    again = Path(shutil.copytree(whole, tmp_path / "again"))
    (again / "scores.json").unlink()
    result = route_run(again, EvalRequest(), RouteRequest(history=True), lambda event: None)
    before = routed(whole)
    assert [(cell.after, cell.task) for cell in result.cells] == [
        (NAMES[i], NAMES[j]) for i in range(3) for j in range(i + 1)
    ]
    assert all(before[cell.after, cell.task] == cell for cell in result.cells)


def test_the_report_counts_routed_cells(treelora, whole) -> None:
    report = json.loads(treelora("report", whole, "--format", "json").out)
    cells = {place: cell.score for place, cell in routed(whole).items()}
    assert report["adapter_mode"] == "route"
    op = sum(cells["gamma", name] for name in NAMES) / 3
    bwt = sum(cells[name, name] - cells["gamma", name] for name in NAMES) / 3
    base = {cell.task: cell.score for cell in cells_of(whole) if cell.after is None}
    fwt = sum(cells[NAMES[j - 1], NAMES[j]] - base[NAMES[j]] for j in (1, 2)) / 2
    assert report["op"] == pytest.approx(op)
    assert report["bwt"] == pytest.approx(bwt)
    assert report["fwt"] == pytest.approx(fwt)
    assert report["missing"] == []


def test_the_tree_that_is_shown_is_the_one_over_prompts(treelora, whole) -> None:
    shown = treelora("tree", "show", whole, "--json")
    assert shown.code == 0, shown
    with_flag = treelora("tree", "show", whole, "--features", "--json")
    assert json.loads(shown.out) == json.loads(with_flag.out)
    assert "beta" in treelora("tree", "show", whole, "--at", "beta").out


def test_no_answer_is_computed_twice(tiny_model, data, tmp_path, monkeypatch) -> None:
    asked: list[int] = []
    original = evaluation.generate_batches

    def counted(adapted, encoder, prompts, *rest, **named):
        asked.append(len(prompts))
        return original(adapted, encoder, prompts, *rest, **named)

    monkeypatch.setattr(evaluation, "generate_batches", counted)
    run = make(tiny_model, data, tmp_path / "run")
    different = {
        (row["routed"], task, row["row"])
        for after, task in routed(run)
        for row in said(run, after, task)
    }
    zero_shot = 3 * 6
    assert sum(asked) == zero_shot + len(different)
    assert len(different) < 8 * 6


def test_a_run_that_is_stopped_ends_the_same(
    treelora, tiny_model, data, whole, tmp_path, monkeypatch
) -> None:
    class Stop(BaseException):
        pass

    count, real = 0, faults.hit

    def hit(point: str) -> None:
        nonlocal count
        count += point == "eval.batch"
        if point == "eval.batch" and count in (4, 6):
            raise Stop
        real(point)

    monkeypatch.setattr(faults, "hit", hit)
    run = tmp_path / "run"
    for _ in range(3):
        try:
            outcome = treelora(*arguments(tiny_model, data, run))
            break
        except Stop:
            continue
    assert count > 6
    assert outcome.code == 0, outcome
    assert (run / "scores.json").read_bytes() == (whole / "scores.json").read_bytes()
    for after, task in routed(whole):
        assert said(run, after, task) == said(whole, after, task)


@pytest.mark.parametrize("when", ["ends", "last"])
def test_what_is_scored_when(tiny_model, data, whole, tmp_path, when: str) -> None:
    run = make(tiny_model, data, tmp_path / "run", f"eval.when={when}")
    own = [(name, name) for name in NAMES[:2]] if when == "ends" else []
    wanted = {*own, *(("gamma", name) for name in NAMES)}
    assert routed(run) == {place: routed(whole)[place] for place in wanted}


def test_a_task_of_which_nothing_is_stored_is_read_anew(tiny_model, data, whole, tmp_path) -> None:
    """With route.prompts=0 the training rows in hand say what a task looks like."""
    run = make(tiny_model, data, tmp_path / "run", "route.prompts=0")
    assert not list(run.glob("tasks/*/features.safetensors"))
    assert routed(run) == routed(whole)


def test_the_other_form_answers_by_its_one_adapter(tiny_model, data, tmp_path) -> None:
    run = make(tiny_model, data, tmp_path / "run", "method.form=contrastive")
    assert {cell.adapter for cell in cells_of(run)} == {"latest", "base"}
    assert json.loads((run / "run.json").read_text())["mode"] == "latest"
