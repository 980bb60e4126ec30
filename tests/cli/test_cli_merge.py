"""storage.form, storage.max_adapters, `merge` and `export` through the command line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support import toy_arguments

from treelora_cli.rundir import faults
from treelora_cli.rundir.layout import RunDir
from treelora_cli.rundir.merged import read_merged

TASKS = "alpha,beta,gamma,delta"
PROXIMAL = ["--method", "treelora", "--set", "method.form=proximal", "--set", "method.lambda=1"]
BUDGET = ["--set", "storage.max_adapters=2"]


def content(path: Path, *, but: tuple[str, ...] = ()) -> dict[str, bytes]:
    """Every file of a folder, but those that hold times or places."""
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name not in but
    }


def train(treelora, model: Path, data: Path, run: Path, tasks: str, *more: str) -> Path:
    outcome = treelora(*toy_arguments(model, data, run, tasks, *more))
    assert outcome.code == 0, outcome
    return run


def read(treelora, *arguments: object) -> dict:
    outcome = treelora(*arguments, "--json")
    assert outcome.code == 0, outcome
    return json.loads(outcome.out)


def test_differences_change_nothing_but_the_bytes_on_disk(
    treelora, tiny_model, toy_data, tmp_path
) -> None:
    delta = ["--set", "storage.form=delta"]
    whole = train(treelora, tiny_model, toy_data, tmp_path / "whole", TASKS, *PROXIMAL)
    small = train(
        treelora, tiny_model, toy_data, tmp_path / "small", "alpha,beta", *PROXIMAL, *delta
    )
    # Taken up again, the method reads adapters that are stored as differences.
    assert treelora("train-stream", "--run-dir", small, "--tasks", "gamma,delta").code == 0
    stored = [json.loads(p.read_text())["storage"] for p in sorted(small.glob("tasks/*/task.json"))]
    deltas = [index for index, one in enumerate(stored) if one["form"] == "delta"]
    assert len(deltas) >= 2
    for index, name in enumerate(TASKS.split(",")):
        folder = small / "tasks" / f"{index:03d}-{name}"
        assert (folder / "adapter").exists() == (index not in deltas)
        assert (folder / "delta.safetensors").exists() == (index in deltas)
    assert all(0 < stored[index]["entries_equal"] < stored[index]["entries"] for index in deltas)
    assert (whole / "scores.json").read_bytes() == (small / "scores.json").read_bytes()
    for adapter in ("own", "latest", "task:beta"):
        cells = [
            read(treelora, "eval", run, "--adapter", adapter)["cells"] for run in (whole, small)
        ]
        assert cells[0] == cells[1]
    for run in (whole, small):
        shown = read(treelora, "export", run, "--all", "--out", tmp_path / f"{run.name}-all")
        assert [one["task"] for one in shown["adapters"]] == TASKS.split(",")
    assert content(tmp_path / "whole-all") == content(tmp_path / "small-all")
    for index, name in enumerate(TASKS.split(",")):
        dense = content(whole / "tasks" / f"{index:03d}-{name}" / "adapter")
        assert content(tmp_path / "small-all" / name) == dense
    assert treelora("report", small).code == 0


def test_an_exported_adapter_loads_with_plain_peft(
    treelora, tiny_model, toy_data, tmp_path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    run = train(treelora, tiny_model, toy_data, tmp_path / "run", "alpha,beta", *PROXIMAL,
                "--set", "storage.form=delta", "--set", "eval.when=none")  # fmt: skip
    outcome = treelora("export", run, "--out", tmp_path / "out")
    assert outcome.out.split() == [str(tmp_path / "out" / "beta")]
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain = PeftModel.from_pretrained(base, tmp_path / "out" / "beta")
    changed = [value for key, value in plain.state_dict().items() if "lora_B" in key]
    assert changed
    assert all(bool(value.abs().sum() > 0) for value in changed)
    again = treelora("export", run, "--out", tmp_path / "out")
    assert again.code == 2
    assert "exists already" in again.err
    # All are looked at before the first is written.
    assert treelora("export", run, "--all", "--out", tmp_path / "out").code == 2
    assert not (tmp_path / "out" / "alpha").exists()
    assert treelora("export", run, "--out", run / "out").code == 2
    assert treelora("export", run, "--all", "--task", "beta", "--out", tmp_path / "x").code == 2
    wrong = treelora("export", run, "--task", "bета", "--out", tmp_path / "x")
    assert wrong.code == 2
    assert not (tmp_path / "x").exists()


class Stop(BaseException):
    """Stands for a kill inside this process."""


def test_a_budget_gives_the_same_bytes_however_the_run_came_about(
    treelora, monkeypatch, tiny_model, toy_data, tmp_path
) -> None:
    """The start of every task reads earlier adapters: merged ones, resumed or not."""
    more = ["--method", "treelora", "--set", "method.start=group", *BUDGET]
    whole = train(treelora, tiny_model, toy_data, tmp_path / "whole", TASKS, *more)
    groups = read_merged(RunDir.open(whole))
    assert [len(group.members) for group in groups] == [3]
    assert 3 not in groups[0].members
    assert len(list(whole.glob("tasks/*/adapter"))) == 1
    log = [json.loads(line) for line in (whole / "events.jsonl").read_text().splitlines()]
    assert [one["after"] for one in log if one["kind"] == "merged"] == ["gamma", "delta"]

    run, count = tmp_path / "run", 0
    real = faults.hit
    stops = {"merge.committed": {1}, "merge.switched": {2}, "merge.member": {2, 5}, "step": {8, 20}}
    seen: dict[str, int] = {}

    def hit(point: str) -> None:
        nonlocal count
        seen[point] = seen.get(point, 0) + 1
        if seen[point] in stops.get(point, ()):
            count += 1
            raise Stop
        real(point)

    monkeypatch.setattr(faults, "hit", hit)
    for _ in range(12):
        try:
            train(treelora, tiny_model, toy_data, run, TASKS, *more)
            break
        except Stop:
            continue
    assert count >= 5
    volatile = ("events.jsonl", "run.json", "recipe.yaml", "task.json", "MANIFEST.json", "lock")
    assert content(run, but=volatile) == content(whole, but=volatile)
    report = read(treelora, "report", whole)
    assert [one["tasks"] for one in report["merged"]] == [
        [TASKS.split(",")[member] for member in groups[0].members]
    ]
    assert "answer through one merged adapter" in treelora("report", whole).out


def test_under_own_the_matrix_shows_what_merging_costs(
    treelora, monkeypatch, tiny_model, toy_data, tmp_path
) -> None:
    more = ["--method", "per-task", *BUDGET, "--set", "eval.scoring=likelihood"]
    run = train(treelora, tiny_model, toy_data, tmp_path / "run", TASKS, *more)
    cells = json.loads((run / "scores.json").read_text())["cells"]
    found = {(cell["after"], cell["task"]): cell for cell in cells if cell["adapter"] == "own"}
    group = read_merged(RunDir.open(run))[0]
    names = TASKS.split(",")
    assert group.after == 3
    for index, name in enumerate(names):
        assert (name, name) in found  # as it was learned
        last = found.get(("delta", name))
        if index in group.members:
            assert last is not None
            assert last["adapter_hash"] != found[name, name]["adapter_hash"]
    merged = {found["delta", names[member]]["adapter_hash"] for member in group.members}
    assert len(merged) == 1
    matrix = read(treelora, "report", run)["matrix"]
    assert [matrix[3][j] for j in group.members] == [
        found["delta", names[j]]["score"] for j in group.members
    ]
    assert [matrix[j][j] for j in range(4)] == [found[name, name]["score"] for name in names]
    # Asked again, the same cells are found.
    again = read(treelora, "eval", run, "--adapter", "own")["cells"]
    assert [(cell["after"], cell["score"]) for cell in again] == [
        (after, found[after, name]["score"])
        for name, after in zip(names, ["delta"] * 4, strict=True)
    ]


def test_the_curve_says_what_merging_would_leave(treelora, tiny_model, toy_data, tmp_path) -> None:
    more = ["--method", "per-task", "--epochs", "6", "--set", "optim.lr=5e-2"]
    more += ["--set", "eval.when=none"]
    run = train(treelora, tiny_model, toy_data, tmp_path / "run", TASKS, *more)
    before = content(run)
    steps = read(treelora, "merge", run, "--curve")["steps"]
    assert content(run) == before
    assert [step["adapters"] for step in steps] == [4, 3, 2, 1]
    own = {c["task"]: c["score"] for c in read(treelora, "eval", run, "--adapter", "own")["cells"]}
    assert steps[0]["scores"] == own
    assert steps[2]["scores"] != own  # merging did change answers, so the rest can fail
    assert steps[0]["op"] == pytest.approx(sum(own.values()) / 4)
    for most in (3, 2):
        copy = Path(shutil.copytree(run, tmp_path / f"to-{most}"))
        merges = read(treelora, "merge", copy, "--to", most)["merges"]
        expected = [step["merge"] for step in steps[1 : 5 - most]]
        assert merges == expected
        asked = read(treelora, "eval", copy, "--adapter", "own")["cells"]
        assert {cell["task"]: cell["score"] for cell in asked} == steps[4 - most]["scores"]
        latest = [read(treelora, "export", one, "--out", tmp_path / f"{one.name}-{most}")
                  for one in (run, copy)]  # fmt: skip
        assert content(Path(latest[0]["adapters"][0]["path"])) == content(
            Path(latest[1]["adapters"][0]["path"])
        )
    few = read(treelora, "merge", run, "--curve", "--tasks", "beta", "--limit", "3")["steps"]
    assert all(step["limited"] and set(step["scores"]) == {"beta"} for step in few)
    shown = treelora("merge", run, "--curve", "--limit", "2", "--format", "md").out.splitlines()
    assert shown[0].startswith("| adapters | OP | merged |")
    assert len(shown) == 2 + 4


def test_a_killed_merge_is_finished_by_the_next_command(
    treelora, monkeypatch, tiny_model, toy_data, tmp_path
) -> None:
    more = ["--set", "eval.when=none", "--method", "seqlora"]
    run = train(treelora, tiny_model, toy_data, tmp_path / "run", "alpha,beta,gamma", *more)
    copy = Path(shutil.copytree(run, tmp_path / "copy"))
    read(treelora, "merge", copy, "--to", "2")

    def hit(point: str) -> None:
        if point == "merge.switched":
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(faults, "hit", hit)
        with pytest.raises(Stop):
            treelora("merge", run, "--to", "2")
    assert len(list(run.glob("tasks/*/adapter"))) == 3
    assert treelora("train-stream", "--run-dir", run).code == 0
    assert content(run / "tasks") == content(copy / "tasks")
    assert content(run / "merged") == content(copy / "merged")


def test_merge_refuses_what_makes_no_sense(treelora, tiny_model, toy_data, tmp_path) -> None:
    run = train(treelora, tiny_model, toy_data, tmp_path / "run", "alpha,beta",
                "--method", "joint", "--set", "eval.when=none")  # fmt: skip
    for more in (["--to", "2"], ["--curve"]):
        outcome = treelora("merge", run, *more)
        assert outcome.code == 2
        assert "trained at once" in outcome.err
    for more in ([], ["--to", "2", "--curve"], ["--to", "1"], ["--to", "2", "--limit", "3"]):
        assert treelora("merge", run, *more).code == 2
    info = RunDir.open(run)
    info.info.status, info.info.extra["mode"] = "interrupted", "latest"
    info.save_info()
    outcome = treelora("merge", run, "--to", "2")
    assert outcome.code == 2
    assert "not finished" in outcome.err
    assert treelora("merge", tmp_path / "none", "--to", "2").code == 4


def test_settings_of_storage(treelora, tiny_model, toy_data, tmp_path) -> None:
    outcome = treelora(*toy_arguments(tiny_model, toy_data, tmp_path / "run", "alpha",
                                      "--set", "storage.max_adapters=1"))  # fmt: skip
    assert outcome.code == 2
    assert "storage.max_adapters" in outcome.err
    run = train(treelora, tiny_model, toy_data, tmp_path / "run", "alpha", *PROXIMAL,
                "--set", "eval.when=none")  # fmt: skip
    # How adapters are stored may change between two calls; how many answer may not.
    refused = treelora("train-stream", "--run-dir", run, "--set", "storage.max_adapters=3")
    assert refused.code == 2
    assert "storage.max_adapters" in refused.err
    more = ["--tasks", "beta", "--set", "storage.form=delta"]
    assert treelora("train-stream", "--run-dir", run, *more).code == 0
    assert (run / "tasks" / "001-beta" / "delta.safetensors").exists()
