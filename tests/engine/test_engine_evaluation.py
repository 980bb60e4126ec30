"""Evaluation: nothing is answered twice, batches are shared, what is finished is kept."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import toy_arguments, toy_rows, write_task

from treelora_cli.engine import evaluation
from treelora_cli.engine.evaluate_run import EvalRequest, evaluate_run
from treelora_cli.errors import Interrupted
from treelora_cli.rundir.scores import Cell, Scores

NAMES = ("FOMC", "C-STANCE", "NumGLUE-cm")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two tasks with labels, one without; their rows fill no batch of 4."""
    folder = tmp_path_factory.mktemp("eval-data")
    for kind, name in enumerate(NAMES):
        train, test = toy_rows(kind, 6), toy_rows(kind, 5, 6)
        if name == "NumGLUE-cm":
            train, test = (
                [(prompt, str(at)) for at, (prompt, _) in enumerate(rows)] for rows in (train, test)
            )
        else:
            train, test = ([(p, "AB"[a in "Bno"]) for p, a in rows] for rows in (train, test))
        write_task(folder, name, {"train": train, "eval": test, "test": test})
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, data: Path) -> Path:
    """A trained run without any score."""
    from treelora_cli.engine.plan import resolve_recipe
    from treelora_cli.engine.stream import run_stream

    run = tmp_path_factory.mktemp("trained") / "run"
    arguments = toy_arguments(tiny_model, data, run, ",".join(NAMES))
    sets = [arguments[at + 1] for at, part in enumerate(arguments) if part == "--set"]
    more = ["eval.when=none", "optim.epochs=1", "optim.lr=5e-2", "eval.batch_size=4"]
    flags = {
        "model": {"name": str(tiny_model)},
        "data": {"path": str(data)},
        "stream": {"tasks": list(NAMES)},
        "method": {"name": "per-task"},
    }
    run_stream(resolve_recipe(run, None, [*sets, *more], flags), run, lambda event: None)
    return run


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of all batches that were answered."""
    sizes: list[int] = []

    def counted(original):
        def answer(*arguments, **named):
            for batch in original(*arguments, **named):
                sizes.append(len(batch))
                yield batch

        return answer

    for name in ("generate_batches", "choose_batches"):
        monkeypatch.setattr(evaluation, name, counted(getattr(evaluation, name)))
    return sizes


def ask(run: Path, adapter: str = "latest", **request: object) -> list[Cell]:
    return evaluate_run(run, EvalRequest(adapter=adapter, **request), lambda event: None)


def answers(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes() for path in run.glob("tasks/*/predictions/*")
    }


def test_small_tasks_share_batches_and_score_as_alone(trained, tmp_path, batches) -> None:
    together, alone = (Path(shutil.copytree(trained, tmp_path / name)) for name in "ab")
    for scoring, names in (("greedy", NAMES), ("likelihood", NAMES[:2])):
        cells = ask(together, "own", tasks=names, scoring=scoring)
        assert [cell.task for cell in cells] == list(names)
        shared = list(batches)
        batches.clear()
        assert cells == [
            cell for name in names for cell in ask(alone, "own", tasks=[name], scoring=scoring)
        ]
        assert sum(shared) == sum(batches) == 5 * len(names)
        assert len(shared) < len(batches)
        batches.clear()
    assert answers(together) == answers(alone)
    assert len(set(answers(alone).values())) == 5
    assert (together / "scores.json").read_bytes() == (alone / "scores.json").read_bytes()


def test_each_task_is_answered_by_its_own_adapter(trained, tmp_path) -> None:
    """Beside the live adapter or in its place, the same weights say the same."""
    beside, placed = (Path(shutil.copytree(trained, tmp_path / name)) for name in "ab")
    said = []
    ask(beside, "own")
    for number, name in enumerate(NAMES):
        ask(placed, f"task:{name}", tasks=[name])
        folder = f"tasks/{number:03d}-{name}/predictions"
        text = answers(placed)[f"{folder}/{name}.task={name}.test.jsonl"]
        assert answers(beside)[f"{folder}/{name}.own.test.jsonl"] == text
        said.append([json.loads(line)["prediction"] for line in text.splitlines()])
    ask(placed, "latest", tasks=["FOMC"])
    other = answers(placed)["tasks/002-NumGLUE-cm/predictions/FOMC.latest.test.jsonl"]
    assert [json.loads(line)["prediction"] for line in other.splitlines()] != said[0]


def test_the_same_answers_are_never_computed_twice(run: Path, batches: list[int]) -> None:
    latest = ask(run)
    assert batches
    batches.clear()
    known = answers(run)
    again, last = ask(run), ask(run, "task:NumGLUE-cm")
    own = ask(run, "own", tasks=["NumGLUE-cm"])
    assert batches == []
    assert again == latest
    for cell in [*last, *own]:
        (same,) = [other for other in latest if other.task == cell.task]
        assert (cell.score, cell.scores, cell.source) == (same.score, same.scores, same.source)
        slug = cell.adapter.replace(":", "=")
        text = answers(run)[f"tasks/002-NumGLUE-cm/predictions/{cell.task}.{slug}.test.jsonl"]
        assert text == known[f"tasks/002-NumGLUE-cm/predictions/{cell.task}.latest.test.jsonl"]
    assert len(Scores.load(run / "scores.json").cells) == 7


@pytest.mark.parametrize(
    "change", ["split", "rows", "adapter", "decoding", "code", "answers", "damage"]
)
def test_other_answers_are_computed(run: Path, batches, monkeypatch, change: str) -> None:
    ask(run, tasks=["FOMC"])
    batches.clear()
    adapter, request = "task:NumGLUE-cm", {}
    if change == "split":
        request["split"] = "eval"
    elif change == "rows":
        request["limit"] = 3
    elif change == "adapter":
        adapter = "task:C-STANCE"
    elif change == "decoding":
        request["scoring"] = "likelihood"
    elif change == "code":
        monkeypatch.setattr(evaluation, "EVALUATION_VERSION", 2)
    elif change == "answers":
        (run / "tasks/002-NumGLUE-cm/predictions/FOMC.latest.test.jsonl").unlink()
    elif change == "damage":
        # A cell of other weights under the wanted key, as after training a task anew.
        scores = Scores.load(run / "scores.json")
        (cell,) = scores.cells
        scores.put(Cell(**{**cell.__dict__, "adapter_hash": "sha256:0"}))
        scores.save(run / "scores.json")
        adapter = "latest"
    (cell,) = ask(run, adapter, tasks=["FOMC"], **request)
    assert sum(batches) == cell.rows == (3 if change == "rows" else 5)
    assert cell.code == evaluation.EVALUATION_VERSION


@pytest.mark.parametrize("last", [2, 3, 4])
def test_what_is_finished_is_kept(run: Path, monkeypatch, last: int) -> None:
    whole = ask(Path(shutil.copytree(run, run.parent / "whole")), "own")
    seen = 0

    def stop(name: str) -> None:
        nonlocal seen
        seen += name == "eval.batch"
        if seen == last:
            raise Interrupted(2, "stopped")

    monkeypatch.setattr(evaluation.faults, "hit", stop)
    monkeypatch.setattr(evaluation, "ROUND_BATCHES", 1)
    with pytest.raises(Interrupted):
        ask(run, "own")
    kept = Scores.load(run / "scores.json").cells
    assert len(kept) == (last - 1) // 2
    assert all(cell in whole for cell in kept)
    assert len(answers(run)) == len(kept)
    monkeypatch.undo()
    assert ask(run, "own") == whole


def test_likelihood_beside_greedy(treelora, run: Path, caplog) -> None:
    assert treelora("eval", run).code == 0
    outcome = treelora("eval", run, "--scoring", "likelihood", "--json")
    assert outcome.code == 0, outcome
    found = json.loads(outcome.out)["cells"]
    assert [cell["decoding"] for cell in found] == ["likelihood", "likelihood", "greedy"]
    said = [line for line in caplog.messages if "no closed set" in line]
    assert len(said) == 1
    assert said[0].endswith("generated: NumGLUE-cm")
    path = run / "tasks/002-NumGLUE-cm/predictions"
    names = sorted(file.name for file in path.iterdir())
    assert "FOMC.latest.test.jsonl" in names
    assert "FOMC.latest.test.likelihood.jsonl" in names
    assert "NumGLUE-cm.latest.test.likelihood.jsonl" not in names
    lines = (path / "FOMC.latest.test.likelihood.jsonl").read_text().splitlines()
    assert {json.loads(line)["prediction"] for line in lines} <= {"A", "B", "C"}
    assert treelora("eval", run, "--scoring", "likelihood", "--limit", "2").code == 0
    assert (path / "FOMC.latest.test.likelihood.limit-2.jsonl").is_file()
    refused = treelora("eval", run, "--scoring", "likelihood", "--tasks", "NumGLUE-cm")
    assert refused.code == 2
    assert "closed set of labels" in refused.err


def test_a_run_scored_by_likelihood(treelora, tiny_model, data, tmp_path, caplog) -> None:
    """Its report counts the likelihood cells, and those of open tasks as they are."""
    arguments = toy_arguments(tiny_model, data, tmp_path / "run", "FOMC,NumGLUE-cm")
    settings = ("eval.scoring=likelihood", "optim.epochs=1", "stream.checkpoint_steps=9")
    outcome = treelora(*arguments, *(part for pair in settings for part in ("--set", pair)))
    assert outcome.code == 0, outcome
    assert sum(line.endswith("generated: NumGLUE-cm") for line in caplog.messages) == 1
    report = json.loads(treelora("report", tmp_path / "run", "--format", "json").out)
    assert report["decoding"] == "likelihood"
    assert report["missing"] == []
    assert report["op"] is not None
    cells = Scores.load(tmp_path / "run" / "scores.json").cells
    assert {(cell.task, cell.decoding) for cell in cells} == {
        ("FOMC", "likelihood"), ("NumGLUE-cm", "greedy"),
    }  # fmt: skip
