"""``treelora bench ablation``: ordinary runs, and a table that is their scores and nothing else."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
from support import TOY_SETTINGS

from treelora_cli.bench.ablation import SHIPPED, Outcome, read_settings, rows
from treelora_cli.engine.plan import resolve_recipe
from treelora_cli.errors import UsageError
from treelora_cli.methods.base import build_method
from treelora_cli.rundir.lock import RunLock


@pytest.fixture
def small(tmp_path: Path) -> list[str]:
    """Arguments of an ablation over three settings of a toy recipe."""
    sections: dict[str, list[str]] = {}
    for pair in TOY_SETTINGS:
        section, _, rest = pair.partition(".")
        sections.setdefault(section, []).append(rest.replace("=", ": ", 1))
    lines = [f"{name}:\n  " + "\n  ".join(values) for name, values in sections.items()]
    lines.append("stream:\n  tasks: [alpha, beta, gamma]")
    recipe = tmp_path / "toy.yaml"
    recipe.write_text("\n".join(lines).replace("stream:\n  checkpoint_steps: 2\n", ""))
    settings = tmp_path / "settings.yaml"
    settings.write_text(
        "default: []\nseq: [method.name=seqlora]\nown: [method.name=per-task]\n", encoding="utf-8"
    )
    return ["--recipe", str(recipe), "--settings", str(settings)]


def test_the_table_is_the_runs_scores(
    treelora, tiny_model: Path, toy_data: Path, tmp_path: Path, small: list[str]
) -> None:
    folder = tmp_path / "runs"
    arguments = ["bench", "ablation", "--model", tiny_model, "--data", toy_data, *small]
    arguments += ["--folder", folder, "--seeds", "1,2", "--json"]
    done = treelora(*arguments)
    assert done.code == 0, done
    document = json.loads(done.out)
    assert document["settings"]["signatures"] == "real"
    found = {
        row["setting"]: row for row in document["parts"]["ablation"]["tables"]["ablation"]["rows"]
    }
    assert list(found) == ["default", "seq", "own"]
    names = ["alpha", "beta", "gamma"]
    for setting, row in found.items():
        ops, bwts = [], []
        for seed in (1, 2):
            cells = json.loads((folder / f"{setting}-seed{seed}" / "scores.json").read_text())
            R = {(c["after"], c["task"]): c["score"] for c in cells["cells"]}
            assert all(c["split"] == "eval" for c in cells["cells"])
            wanted = 3 if setting == "own" else 5
            assert len(cells["cells"]) == wanted  # the diagonal and the last row, nothing else
            last = [R[name if setting == "own" else "gamma", name] for name in names]
            ops.append(100 * statistics.fmean(last))
            drops = [R[name, name] - end for name, end in zip(names, last, strict=True)]
            bwts.append(100 * statistics.fmean(drops))
        assert row["op"] == pytest.approx(statistics.fmean(ops))
        assert row["op_se"] == pytest.approx(statistics.stdev(ops) / math.sqrt(2))
        assert row["bwt"] == pytest.approx(statistics.fmean(bwts))
    begun = (folder / "seq-seed1" / "events.jsonl").read_text()
    with RunLock(folder / "own-seed2"):
        again = treelora(*arguments, "--only", "seq,own", "--format", "json")
    assert again.code == 0, again
    assert "begins" not in again.err
    assert (folder / "seq-seed1" / "events.jsonl").read_text() == begun


def test_a_run_that_another_process_has_is_passed_over(
    treelora, tiny_model: Path, toy_data: Path, tmp_path: Path, small: list[str]
) -> None:
    folder = tmp_path / "runs"
    arguments = ["bench", "ablation", "--model", tiny_model, "--data", toy_data, *small]
    arguments += ["--folder", folder, "--seeds", "1", "--only", "default,seq", "--format", "md"]
    (folder / "default-seed1").mkdir(parents=True)
    with RunLock(folder / "default-seed1"):
        done = treelora(*arguments)
    assert done.code == 0, done
    assert "default-seed1: another process is at it" in done.err
    assert "| seq |" in done.out
    assert "| default |" not in done.out


def test_means_errors_and_paired_gains() -> None:
    outcomes = [
        Outcome("default", 1, 20.0, 5.0, 25.0, 10.0),
        Outcome("default", 2, 22.0, 7.0, 26.0, 12.0),
        Outcome("other", 1, 23.0, 1.0, 24.0, 11.0),
        Outcome("other", 2, 26.0, 3.0, 27.0, 13.0),
        Outcome("other", 3, 29.0, 5.0, 30.0, 30.0),
    ]
    default, other = rows(outcomes, {"default": [], "other": ["a=1", "b=2"], "unseen": []})
    assert (default["op_text"], default["bwt_text"]) == ("21.0 ± 1.0", "6.0 ± 1.0")
    assert default["op_gain"] is None
    assert other["switch"] == "a=1 b=2"
    assert other["op"] == pytest.approx(26.0)
    assert other["op_se"] == pytest.approx(3.0 / math.sqrt(3))
    assert other["op_gain"] == pytest.approx(3.5)  # seeds 1 and 2 alone: the default has no third
    assert other["op_gain_se"] == pytest.approx(0.5)
    assert other["train_s"] == 13.0


def test_every_setting_that_comes_along_is_a_recipe(tmp_path: Path) -> None:
    settings = read_settings(SHIPPED, None)
    assert settings["default"] == []
    seen = set()
    for name, pairs in settings.items():
        flags = {"model": {"name": "m"}, "data": {"path": "d"}}
        recipe = resolve_recipe(tmp_path / name, "trace-small", pairs, flags)
        build_method(recipe)
        seen.add(str(recipe.to_dict()))
    assert len(seen) == len(settings) <= 25


def test_a_settings_file_is_checked(tmp_path: Path) -> None:
    path = tmp_path / "s.yaml"
    with pytest.raises(UsageError, match="does not exist"):
        read_settings(path, None)
    path.write_text("a: optim.lr=1\n")
    with pytest.raises(UsageError, match="setting 'a' is not a list"):
        read_settings(path, None)
    path.write_text("abc: []\n")
    with pytest.raises(UsageError, match="no setting 'abd'") as raised:
        read_settings(path, ["abd"])
    assert "abc" in raised.value.hint
