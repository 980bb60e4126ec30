"""Routing a run: prompts find their task's adapter, and say what that adapter would have said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from support import run_command, toy_arguments, write_task

from treelora_cli.engine import evaluation, routed, routes
from treelora_cli.engine.evaluate_run import EvalRequest, evaluate_run
from treelora_cli.engine.plan import resolve_recipe
from treelora_cli.engine.route_run import RouteRequest, RouteResult, route_run
from treelora_cli.engine.stream import run_stream
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import encoder_for
from treelora_cli.models.features import prompt_features
from treelora_cli.recipe import Recipe, build_recipe, read_yaml
from treelora_cli.routing.router import Router
from treelora_cli.routing.statistics import FeatureStatistics
from treelora_cli.rundir.scores import Cell, Scores
from treelora_cli.rundir.tensors import load_tensors
from treelora_cli.tasks.load import load_tasks
from treelora_cli.tasks.shared_text import shared_parts, strip_shared

NAMES = ("alpha", "beta", "gamma")
ALIKE = ("delta", "epsilon")
# Tasks that look like nothing else, and two that differ in what follows "Task" alone.
TEXTS = {
    "alpha": "What is the colour of the sky over town {}? Answer:",
    "beta": "今天{}号天气怎么样？ 回答：",
    "gamma": "def add{}(a, b):\n    return a + b\n",
    "delta": "Task one. Is {} even? Answer:",
    "epsilon": "Task two. Is {} even? Answer:",
}


def rows_of(name: str, count: int, start: int = 0) -> list[tuple[str, str]]:
    rows = []
    for number in range(start, start + count):
        rows.append((TEXTS[name].format(number * 7919 % 997), "AB"[number % 2]))
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("route-data")
    for name in TEXTS:
        test = rows_of(name, 5, 100)
        # Rows that look like another task's, so that there are some to be sent elsewhere.
        test += rows_of("beta" if name == "alpha" else "alpha", 1, 200)
        write_task(folder, name, {"train": rows_of(name, 10), "eval": test[:3], "test": test})
    return folder


def make(tiny_model, data, run: Path, *more: str, tasks=NAMES, method="per-task") -> Path:
    arguments = toy_arguments(tiny_model, data, run, ",".join(tasks))
    sets = [arguments[at + 1] for at, part in enumerate(arguments) if part == "--set"]
    fixed = ["optim.epochs=1", "optim.lr=1e-2", "eval.batch_size=4"]
    flags = {
        "model": {"name": str(tiny_model)},
        "data": {"path": str(data)},
        "stream": {"tasks": list(tasks)},
        "method": {"name": method},
    }
    recipe = resolve_recipe(run, None, [*sets, *fixed, *more], flags)
    run_stream(recipe, run, lambda event: None)
    return run


@pytest.fixture(scope="module")
def bare(tmp_path_factory, tiny_model, data) -> Path:
    """Five tasks and no score."""
    folder = tmp_path_factory.mktemp("bare") / "run"
    return make(tiny_model, data, folder, "eval.when=none", tasks=(*NAMES, *ALIKE))


@pytest.fixture(scope="module")
def scored(tmp_path_factory, tiny_model, data) -> Path:
    """The same with zero-shot cells and those of each task's own adapter."""
    folder = tmp_path_factory.mktemp("scored") / "run"
    return make(tiny_model, data, folder, tasks=(*NAMES, *ALIKE))


@pytest.fixture
def run(bare: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bare, tmp_path / "run"))


@pytest.fixture
def answered(monkeypatch) -> list[int]:
    """The sizes of all batches that were answered."""
    sizes: list[int] = []
    original = evaluation.generate_batches

    def counted(*arguments, **named):
        for batch in original(*arguments, **named):
            sizes.append(len(batch))
            yield batch

    monkeypatch.setattr(evaluation, "generate_batches", counted)
    return sizes


def route(run: Path, way: RouteRequest = RouteRequest(), **request: object) -> RouteResult:  # noqa: B008
    return route_run(run, EvalRequest(**request), way, lambda event: None)


def own(run: Path, adapter: str, **request: object) -> list[Cell]:
    return evaluate_run(run, EvalRequest(adapter=adapter, **request), lambda event: None)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def said(run: Path, after: str, task: str, adapter: str) -> list[dict]:
    (folder,) = run.glob(f"tasks/*-{after}")
    slug = adapter.replace(":", "=")
    return lines(folder / "predictions" / f"{task}.{slug}.test.jsonl")


def by_each(run: Path, scored: Path, tasks: tuple[str, ...]) -> dict[tuple[str, str], list[str]]:
    """What each adapter alone, and the base, says to the rows of each task."""
    found = {}
    for adapter in tasks:
        own(run, f"task:{adapter}")
        for task in tasks:
            rows = said(run, adapter, task, f"task:{adapter}")
            found[adapter, task] = [row["prediction"] for row in rows]
    for task in tasks:
        rows = lines(scored / "predictions" / f"{task}.base.test.jsonl")
        found["base", task] = [row["prediction"] for row in rows]
    return found


def recipe_of(run: Path) -> Recipe:
    return build_recipe(read_yaml((run / "recipe.yaml").read_text(), "recipe"), "recipe")


def routed_by_hand(run: Path, tasks, threshold=0.0, strip=False) -> dict[str, list[str]]:
    """Where each test row goes, from the rows themselves."""
    recipe = recipe_of(run)
    model = AdaptedModel(load_backbone(recipe.model), recipe.lora, 0)
    encoder = encoder_for(model.backbone.tokenizer, recipe.data, model.backbone.positions)
    statistics, queries = {}, {}
    for task in load_tasks(tasks, recipe.data.path):
        train, test = ([row.prompt for row in task.splits[s]] for s in ("train", "test"))
        if strip:
            parts = shared_parts(train)
            train, test = ([strip_shared(p, parts) for p in some] for some in (train, test))
        statistics[task.name] = FeatureStatistics.of(prompt_features(model, encoder, train))
        queries[task.name] = prompt_features(model, encoder, test)
    router = Router(statistics, threshold)
    called = [*tasks, "base"]
    return {
        name: [called[at] for at in router.route(rows).indices.tolist()]
        for name, rows in queries.items()
    }


def test_every_row_is_answered_by_the_adapter_it_is_sent_to(run, scored, tmp_path) -> None:
    """Mixed batches say what each adapter says alone; the base what it said before training."""
    tasks = (*NAMES, *ALIKE)
    alone = by_each(Path(shutil.copytree(run, tmp_path / "alone")), scored, tasks)
    ways = {
        "route": RouteRequest(),
        "route:0.9": RouteRequest(threshold=0.9),
        "route:stripped": RouteRequest(stripped=True),
    }
    for adapter, way in ways.items():
        result = route(run, way)
        expected = routed_by_hand(run, tasks, way.threshold or 0.0, way.stripped)
        for cell in result.cells:
            assert (cell.adapter, cell.after) == (adapter, "epsilon")
            rows = said(run, "epsilon", cell.task, adapter)
            assert [row["routed"] for row in rows] == expected[cell.task]
            for row in rows:
                answers = alone[row["routed"], cell.task]
                assert row["prediction"] == answers[row["row"]]
                assert 0 <= row["confidence"] <= 1
        away = sum(to != name for name in tasks for to in expected[name])
        assert away >= len(tasks)
    assert any("base" in to for to in routed_by_hand(run, tasks, 0.9).values())
    distinct = {tuple(alone[adapter, "alpha"]) for adapter in (*tasks, "base")}
    assert len(distinct) > 3, "otherwise it would not matter who answers"
    assert len(Scores.load(run / "scores.json").cells) == 3 * len(tasks)


def test_what_is_said_of_the_routing(treelora, run) -> None:
    outcome = treelora("eval", run, "--adapter", "route", "--tasks", "alpha,beta", "--json")
    assert outcome.code == 0, outcome
    document = json.loads(outcome.out)
    assert document["schema_version"] == 1
    assert [cell["task"] for cell in document["cells"]] == ["alpha", "beta"]
    found = document["routing"]
    expected = routed_by_hand(run, (*NAMES, *ALIKE))
    columns = [*NAMES, *ALIKE, "base"]
    assert found["confusion"]["rows"] == ["alpha", "beta"]
    assert found["confusion"]["columns"] == columns
    counts = [[expected[name].count(to) for to in columns] for name in ("alpha", "beta")]
    assert found["confusion"]["counts"] == counts
    for name, row, at in zip(("alpha", "beta"), counts, (0, 1), strict=True):
        one = found["per_task"][name]
        assert one == {
            "rows": 6, "accuracy": row[at] / 6, "own_adapter": row[at] / 6, "abstained": 0,
        }  # fmt: skip
        assert row[at] == 5, "the sixth row looks like the other task"
    assert found["accuracy"] == pytest.approx(5 / 6)
    assert found["abstained"] == 0
    assert found["exact"] is True
    assert found["dot_products"] == 5
    assert "agreement" not in found
    assert all(value > 0 for value in found["ms_per_query"].values())
    table = treelora("eval", run, "--adapter", "route", "--tasks", "alpha,beta").out
    assert "83.3%" in table
    assert "beta 1" in table


def test_very_many_tasks_are_searched(run, monkeypatch) -> None:
    monkeypatch.setattr(routes, "EXACT_UP_TO", 2)
    found = route(run).routing
    assert found["exact"] is False
    assert found["agreement"] == 1.0
    assert found["dot_products"] > 1


def test_all_abstain_above_what_is_typical(run, scored, answered) -> None:
    """What the base answered before training is what it answers now."""
    result = route(run, RouteRequest(threshold=1.0), tasks=["gamma"])
    counts = result.routing["confusion"]["counts"][0]
    assert counts[-1] == result.routing["abstained"] > 0
    assert {row["routed"] for row in said(run, "epsilon", "gamma", "route:1")} >= {"base"}
    assert result.routing["per_task"]["gamma"]["accuracy"] == counts[2] / 6


def test_no_answer_is_computed_twice(scored, tmp_path, answered) -> None:
    """Own and base cells hold most answers already; only rows sent elsewhere are asked."""
    run = Path(shutil.copytree(scored, tmp_path / "run"))
    tasks = (*NAMES, *ALIKE)
    expected = routed_by_hand(run, tasks)
    away = sum(to != name for name in tasks for to in expected[name])
    first = route(run)
    assert sum(answered) == away
    answered.clear()
    again = route(run)
    assert answered == []
    assert again.cells == first.cells
    assert {key: again.routing[key] for key in ("confusion", "per_task", "accuracy")} == {
        key: first.routing[key] for key in ("confusion", "per_task", "accuracy")
    }
    # A threshold that refuses rows of every task: the base has answered them before training.
    refusing = route(run, RouteRequest(threshold=0.9)).routing
    assert refusing["abstained"] > away
    assert sum(answered) <= away


def test_more_adapters_than_fit_at_once(run, tmp_path, monkeypatch) -> None:
    few = Path(shutil.copytree(run, tmp_path / "few"))
    whole = route(run)
    monkeypatch.setattr(routed, "MOST_BESIDE", 1)
    assert route(few).cells == whole.cells
    for name in NAMES:
        assert said(few, "epsilon", name, "route") == said(run, "epsilon", name, "route")


def test_history_is_what_each_moment_would_have_said(
    tiny_model, data, tmp_path, bare, answered
) -> None:
    """A stream that stops and routes after every task, against one that looks back at its end."""
    step = tmp_path / "step"
    tasks = (*NAMES, *ALIKE)
    for number in range(1, 6):
        make(tiny_model, data, step, "eval.when=none", tasks=tasks[:number])
        route(step)
    answered.clear()
    whole = Path(shutil.copytree(bare, tmp_path / "whole"))
    result = route(whole, RouteRequest(history=True))
    assert [(cell.after, cell.task) for cell in result.cells] == [
        (tasks[i], tasks[j]) for i in range(5) for j in range(i + 1)
    ]
    assert Scores.load(whole / "scores.json").cells == Scores.load(step / "scores.json").cells
    pairs = set()
    for i, after in enumerate(tasks):
        for task in tasks[: i + 1]:
            rows = said(whole, after, task, "route")
            assert rows == said(step, after, task, "route")
            pairs |= {(task, row["row"], row["routed"]) for row in rows}
    assert sum(answered) == len(pairs) < 6 * 15
    hashes = {cell.after: cell.adapter_hash for cell in result.cells}
    assert len(set(hashes.values())) == 5


def test_history_gives_op_and_bwt(treelora, run) -> None:
    outcome = treelora("eval", run, "--adapter", "route", "--history")
    assert outcome.code == 0, outcome
    cells = {(cell.after, cell.task): cell.score for cell in Scores.load(run / "scores.json").cells}
    tasks = (*NAMES, *ALIKE)
    op = sum(cells["epsilon", name] for name in tasks) / 5
    bwt = sum(cells[name, name] - cells["epsilon", name] for name in tasks) / 5
    assert f"OP {100 * op:.2f}, BWT {100 * bwt:.2f} under route" in outcome.out
    report = json.loads(treelora("report", run, "--format", "json").out)
    (found,) = report["routed"]
    assert found["adapter"] == "route"
    assert found["op"] == pytest.approx(op)
    assert found["bwt"] == pytest.approx(bwt)
    assert "with route, where no task is named: OP" in treelora("report", run).out


def test_what_is_stored_is_that_of_evenly_spaced_prompts(tiny_model, data, tmp_path) -> None:
    run = make(tiny_model, data, tmp_path / "run", "eval.when=none", "route.prompts=4")
    recipe = recipe_of(run)
    model = AdaptedModel(load_backbone(recipe.model), recipe.lora, 0)
    encoder = encoder_for(model.backbone.tokenizer, recipe.data, model.backbone.positions)
    for number, name in enumerate(NAMES):
        prompts = [prompt for prompt, _ in rows_of(name, 10)]
        chosen = [prompts[at] for at in (0, 2, 5, 7)]
        rows = prompt_features(model, encoder, chosen).double()
        stored = FeatureStatistics.from_tensors(
            load_tensors(run / f"tasks/{number:03d}-{name}/features.safetensors")
        )
        assert stored.count == 4
        torch.testing.assert_close(stored.mean, rows.mean(0), rtol=1e-5, atol=1e-6)
        scatter = (rows - rows.mean(0)).T @ (rows - rows.mean(0))
        torch.testing.assert_close(stored.scatter, scatter, rtol=1e-4, atol=1e-5)
        document = json.loads((run / f"tasks/{number:03d}-{name}/task.json").read_text())
        assert document["seconds"]["features"] > 0


def kept(run: Path) -> dict[str, bytes]:
    files = [run / "scores.json", run / "tree" / "tree.json", *run.glob("tasks/*/adapter/*")]
    files += [*run.glob("tasks/*/*.safetensors"), *run.glob("tasks/*/predictions/*")]
    return {str(path.relative_to(run)): path.read_bytes() for path in sorted(files)}


def test_training_is_the_same_with_and_without(tiny_model, data, tmp_path) -> None:
    """And what was not stored is made from the data when it is asked for: bit for bit."""
    with_, without = (
        make(tiny_model, data, tmp_path / str(count), f"route.prompts={count}", method="treelora")
        for count in (200, 0)
    )
    features = {name: text for name, text in kept(with_).items() if "features" in name}
    assert len(features) == 3
    others = {name: text for name, text in kept(with_).items() if "features" not in name}
    assert others == kept(without)
    assert route(with_).cells == route(without).cells


def test_without_data_an_old_run_says_what_it_lacks(treelora, run, tmp_path) -> None:
    for folder in run.glob("tasks/*"):
        (folder / "features.safetensors").unlink()
        listed = json.loads((folder / "MANIFEST.json").read_text())
        listed["files"].pop("features.safetensors")
        (folder / "MANIFEST.json").write_text(json.dumps(listed))
    only = tmp_path / "only"
    shutil.copytree(Path(recipe_of(run).data.path) / "beta", only / "beta")
    outcome = treelora("eval", run, "--adapter", "route", "--tasks", "beta", "--data", only)
    assert outcome.code == 4
    assert "routing needs to know of alpha, beta, gamma" in outcome.err
    assert "--data" in outcome.err
    assert treelora("eval", run, "--adapter", "route", "--tasks", "beta").code == 0
    shown = treelora("tree", "show", run, "--features")
    assert shown.code == 4
    assert "no features of the prompts of alpha" in shown.err


def test_damaged_features_are_refused(treelora, run) -> None:
    path = run / "tasks/001-beta/features.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    outcome = treelora("eval", run, "--adapter", "route")
    assert outcome.code == 4
    assert "features.safetensors" in outcome.err


def test_a_kill_while_prompts_are_read(treelora, tiny_model, data, tmp_path, monkeypatch) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = toy_arguments(tiny_model, data, whole, "alpha,beta")
    assert treelora(*arguments).code == 0
    arguments = toy_arguments(tiny_model, data, killed, "alpha,beta")
    done = run_command(*arguments, TREELORA_FAULT="features.batch:kill9:4")
    assert done.returncode == -9, done
    assert (killed / "tasks/000-alpha/features.safetensors").exists()
    assert not (killed / "tasks/001-beta").exists()
    monkeypatch.setenv("TREELORA_FAULT", "features.batch:term:1")
    stopped = treelora(*arguments)
    assert stopped.code == 143, stopped
    assert "stopped while reading prompts of task beta" in stopped.err
    monkeypatch.delenv("TREELORA_FAULT")
    assert treelora(*arguments).code == 0
    assert kept(killed) == kept(whole)
    assert len([name for name in kept(whole) if "features" in name]) == 2


def test_a_kill_while_routed_rows_are_answered(run, tmp_path, monkeypatch) -> None:
    whole = Path(shutil.copytree(run, tmp_path / "whole"))
    expected = route(whole, RouteRequest(history=True)).cells
    seen = 0

    def stop(name: str) -> None:
        nonlocal seen
        seen += name == "eval.batch"
        if seen == 4:
            raise KeyboardInterrupt

    monkeypatch.setattr(evaluation.faults, "hit", stop)
    monkeypatch.setattr(routed, "ROUND_BATCHES", 1)
    with pytest.raises(KeyboardInterrupt):
        route(run, RouteRequest(history=True))
    done = Scores.load(run / "scores.json").cells
    assert 0 < len(done) < len(expected)
    assert all(cell in expected for cell in done)
    monkeypatch.undo()
    assert route(run, RouteRequest(history=True)).cells == expected


def test_merged_adapters_answer_for_their_tasks(treelora, tiny_model, data, tmp_path) -> None:
    run = make(
        tiny_model, data, tmp_path / "run", "eval.when=none", "storage.max_adapters=2",
        tasks=(*NAMES, "delta"),
    )  # fmt: skip
    alone = Path(shutil.copytree(run, tmp_path / "alone"))
    (group, *_) = json.loads((run / "merged/merged.json").read_text())["groups"]
    found = route(run).routing
    at = {name: number for number, name in enumerate(found["confusion"]["columns"])}
    own(alone, "own")
    shared = 0
    for name, counts in zip(*(found["confusion"][key] for key in ("rows", "counts")), strict=True):
        mine = group["names"] if name in group["names"] else [name]
        one = found["per_task"][name]
        assert one["own_adapter"] == sum(counts[at[other]] for other in mine) / one["rows"]
        assert one["accuracy"] == counts[at[name]] / one["rows"]
        shared += one["own_adapter"] != one["accuracy"]
        (path,) = alone.glob(f"tasks/*/predictions/{name}.own.test.jsonl")
        for row, expected in zip(said(run, "delta", name, "route"), lines(path), strict=True):
            if row["routed"] in mine:
                assert row["prediction"] == expected["prediction"]
    assert shared, "no row went to another task that shares the adapter"
    refused = treelora("eval", run, "--adapter", "route", "--history")
    assert refused.code == 2
    assert "merged" in refused.err


def test_adapters_stored_as_differences(tiny_model, data, tmp_path) -> None:
    settings = ("eval.when=none", "method.form=proximal", "method.lambda=5")
    dense, delta = (
        make(
            tiny_model, data, tmp_path / form, *settings, f"storage.form={form}", method="treelora"
        )
        for form in ("dense", "delta")
    )
    assert list(delta.glob("tasks/*/delta.safetensors"))
    assert route(delta).cells == route(dense).cells


def test_a_run_with_one_adapter_is_refused(treelora, tiny_model, data, tmp_path) -> None:
    run = make(tiny_model, data, tmp_path / "run", "eval.when=none", method="joint")
    assert not list(run.glob("tasks/*/features.safetensors"))
    outcome = treelora("eval", run, "--adapter", "route")
    assert outcome.code == 2
    assert "one adapter" in outcome.err


@pytest.mark.parametrize("flag", [["--route-threshold", "0.5"], ["--history"]])
def test_flags_of_route_alone(treelora, run, flag) -> None:
    assert treelora("eval", run, "--adapter", "own", *flag).code == 2
    assert treelora("eval", run, "--adapter", "route", "--route-threshold", "1.5").code == 2


def test_the_recipe_threshold_holds_unless_another_is_asked(run) -> None:
    text = (run / "recipe.yaml").read_text()
    (run / "recipe.yaml").write_text(text.replace("threshold: 0.0", "threshold: 0.8"))
    assert route(run, tasks=["beta"]).cells[0].adapter == "route:0.8"
    assert route(run, RouteRequest(threshold=0.0), tasks=["beta"]).cells[0].adapter == "route"


def test_likelihood_and_few_rows(run) -> None:
    """Cells of another way to answer, or of fewer rows, stand beside the others."""
    (cell,) = route(run, tasks=["alpha"], limit=2, scoring="likelihood").cells
    assert (cell.rows, cell.limited, cell.decoding) == (2, True, "likelihood")
    (whole,) = route(run, tasks=["alpha"]).cells
    assert (whole.rows, whole.limited, whole.decoding) == (6, False, "greedy")
    assert whole.adapter_hash == cell.adapter_hash, "few rows are routed by all that is known"


def test_what_routing_needs_of_the_data_is_the_runs_own(treelora, run, data, tmp_path) -> None:
    """However few rows are asked; and other rows of a task that is not asked are refused."""
    way = RouteRequest(stripped=True)
    (few,), (whole,) = (route(run, way, tasks=["alpha"], limit=limit).cells for limit in (2, None))
    assert few.adapter_hash == whole.adapter_hash
    other = Path(shutil.copytree(data, tmp_path / "other"))
    shutil.rmtree(other / "gamma")
    shutil.copytree(data / "delta", other / "gamma")
    outcome = treelora(
        "eval", run, "--adapter", "route", "--strip-instructions", "--tasks", "alpha",
        "--data", other,
    )  # fmt: skip
    assert outcome.code == 4
    assert "the rows of task gamma are not those of the run" in outcome.err


def test_the_tree_over_prompts(treelora, bare, tiny_model, data, tmp_path) -> None:
    alone = treelora("tree", "show", bare, "--features")
    assert alone.code == 0, alone
    assert "prompt features" in alone.out
    run = make(tiny_model, data, tmp_path / "run", "eval.when=none", method="treelora")
    both = treelora("tree", "show", run, "--features")
    assert both.out.index("signature lora_a") < both.out.index("signature prompt features")
    document = json.loads(treelora("tree", "show", run, "--features", "--json").out)
    gradient = json.loads(treelora("tree", "show", run, "--json").out)
    features = document.pop("features")
    assert document == gradient
    assert features["tasks"] == list(NAMES)
    assert sorted(node["tasks"][0] for node in features["nodes"] if not node["children"]) == [
        0, 1, 2,
    ]  # fmt: skip
    early = json.loads(treelora("tree", "show", run, "--features", "--at", "beta", "--json").out)
    assert early["features"]["tasks"] == ["alpha", "beta"]
    for form, start in (("dot", "graph"), ("mermaid", "---"), ("svg", "<?xml")):
        assert treelora("tree", "show", run, "--features", "--format", form).out.startswith(start)
    assert treelora("tree", "show", run, "--features", "--diff", "alpha", "beta").code == 2
    assert treelora("tree", "show", run, "--features", "--at", "nothing").code == 2


def test_tasks_asked_one_by_one_have_the_same_cells(run) -> None:
    together = route(Path(shutil.copytree(run, run.parent / "together"))).cells
    assert [route(run, tasks=[cell.task]).cells[0] for cell in together] == together
