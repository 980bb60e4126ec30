"""``treelora bench``: arguments, forms, every part once at its smallest."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from treelora_cli.bench.parts import BY_NAME_ONLY, PARTS, choose
from treelora_cli.bench.startup import call, synthetic_run
from treelora_cli.errors import EnvironmentProblem


def test_help_names_every_part(treelora) -> None:
    shown = treelora("bench", "--help")
    assert shown.code == 0
    for name in (*PARTS, "all"):
        assert name in shown.out


def test_parts_come_in_their_own_order_and_once() -> None:
    assert [part.name for part in choose(["tree", "step", "tree"])] == ["step", "tree"]
    usual = [name for name in PARTS if name not in BY_NAME_ONLY]
    assert [part.name for part in choose([])] == usual
    assert [part.name for part in choose(["all"])] == usual
    assert [part.name for part in choose(["all", "scale", "ablation"])] == list(PARTS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["stp"], "unknown part 'stp'"),
        (["step", "--methods", "seqlroa"], "unknown method 'seqlroa'"),
        (["data", "--data", "somewhere"], "--data and --model go together"),
        (["step", "--json", "--format", "md"], "two formats"),
        (["ablation"], "needs --model and --data"),
        (["ablation", "--seeds", "1,x"], "not a list of whole numbers"),
        (["ablation", "--split", "train"], "unknown split 'train'"),
        (["step", "--format", "html"], "unknown format 'html'"),
        (["step", "--out", "bench.pdf"], "the suffix says no format"),
        (["step", "--out", "nowhere/bench.md"], "there is no folder nowhere"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_measured(treelora, arguments, said) -> None:
    done = treelora("bench", *arguments)
    assert done.code == 2
    assert said in done.err
    assert "step:" not in done.err


def run_quick(treelora, *arguments: str) -> dict:
    done = treelora("bench", *arguments, "--quick", "--repeat", "1", "--device", "cpu", "--json")
    assert done.code == 0, done
    document = json.loads(done.out)
    assert document["schema_version"] == 1
    assert document["kind"] == "bench"
    assert document["settings"]["quick"] is True
    assert document["machine"]["gpu"] is None
    return document["parts"]


def test_steps_of_the_methods_asked_for(treelora) -> None:
    rows = run_quick(treelora, "step", "--methods", "treelora,seqlora")["step"]["tables"]["short"][
        "rows"
    ]
    assert [(row["method"], row["earlier"]) for row in rows] == [
        ("treelora", 1),
        ("treelora", 200),
        ("seqlora", None),
    ]
    for row in rows:
        assert row["pairs"] == 1
        assert row["ratio"] == pytest.approx(row["method_ms"] / row["plain_ms"])
        assert row["ratio_low"] == row["ratio"] == row["ratio_high"]


def test_tasks_data_eval_and_tree(treelora) -> None:
    parts = run_quick(treelora, "tasks", "data", "eval", "tree")
    assert list(parts) == ["tasks", "data", "eval", "tree"]
    tasks = parts["tasks"]["tables"]["tasks"]["rows"]
    assert [row["earlier"] for row in tasks] == [1, 10, 100]
    data = parts["data"]["tables"]["data"]["rows"]
    assert data[-1]["task"] == "all"
    assert data[-1]["rows"] == sum(row["rows"] for row in data[:-1]) == 16
    assert data[-1]["tokens"] == sum(row["tokens"] for row in data[:-1])
    answers = parts["eval"]["tables"]["eval"]["rows"]
    assert [row["prompts"] for row in answers] == [2] * 8 + [16]
    assert all(row["same_answers"] == row["prompts"] for row in answers)
    assert answers[-1]["one_s"] == pytest.approx(sum(row["one_s"] for row in answers[:-1]))
    assert [row["tasks"] for row in parts["tree"]["tables"]["cost"]["rows"]] == [16, 64]
    games = parts["tree"]["tables"]["regret"]["rows"]
    assert {row["search"] for row in games} == {"tree", "flat", "random"}


def test_a_file_takes_the_form_of_its_suffix(treelora, tmp_path: Path) -> None:
    out = tmp_path / "bench.md"
    arguments = ["--quick", "--repeat", "1", "--methods", "seqlora", "--out", str(out)]
    done = treelora("bench", "step", *arguments)
    assert (done.code, done.out) == (0, "")
    assert f"wrote {out} (md)" in done.err
    assert "| seqlora | – |" in out.read_text(encoding="utf-8")


def test_a_synthetic_run_is_one_that_our_commands_read(treelora, tmp_path: Path) -> None:
    synthetic_run(tmp_path / "run", 100, 0)
    shown = treelora("tree", "show", tmp_path / "run", "--json")
    assert shown.code == 0, shown
    assert len(json.loads(shown.out)["tasks"]) == 100
    named = treelora("tree", "show", tmp_path / "run", "--at", "synthetic-99")
    assert named.code == 0, named


def test_a_command_that_fails_is_not_timed() -> None:
    call(["-c", "import treelora_cli"])
    with pytest.raises(EnvironmentProblem, match="exit code 3: too bad"):
        call(["-c", "import sys; print('too bad', file=sys.stderr); sys.exit(3)"])


@pytest.mark.slow
def test_everything_once(treelora) -> None:
    done = treelora("bench", "--quick", "--json", "--device", "cpu")
    assert done.code == 0, done
    parts = json.loads(done.out)["parts"]
    assert list(parts) == [name for name in PARTS if name not in BY_NAME_ONLY]
    assert len(parts["startup"]["tables"]["startup"]["rows"]) == 4


def test_scale_is_counted_from_published_sizes() -> None:
    """Llama-2-7B has 6,738,415,616 parameters; rank 8 on its queries and values 4,194,304."""
    from treelora_cli.bench.scale import SIZES, count, storage, training

    size = next(one for one in SIZES if one.name == "Llama-2-7B")
    found = count(size)
    assert (found.base, found.adapter) == (6_738_415_616, 4_194_304)
    assert found.A == 64 * 8 * 4096
    kept = storage(size, found)
    assert kept["tasks_100_gb"] == pytest.approx(100 * 4 * (4_194_304 + 64 * 8 * 4096) / 1e9)
    step = training(size, found)
    assert step["zero1_8_mb"] == pytest.approx(2 * 4 * 4_194_304 / 8 / 1e6)
    # A ring sends each gradient nearly twice.
    assert step["reduce_8_ms"] == pytest.approx(1000 * 2 * 7 / 8 * 4 * 4_194_304 / 25e9)


def test_curves_stand_beside_what_is_computed(treelora) -> None:
    (row,) = run_quick(treelora, "curves")["curves"]["tables"]["curves"]["rows"]
    assert row["kept_over_estimate"] == pytest.approx(1, abs=0.35)
    assert row["signature_over_entries"] == 1
    # A header of the file on a tiny adapter: 4 kilobytes of entries.
    assert 1 < row["adapter_over_entries"] < 1.5
    assert row["step_ms"] > 0
    operations = row["gflops"] * row["step_ms"] * 1e6
    layers = operations / 4 / (4 * 128)
    assert layers == pytest.approx(row["parameters_m"] * 1e6 - 2 * 512 * 64, rel=1e-6)


def test_a_base_that_is_shared_out_in_scale() -> None:
    """Eight parts, of which seven come from elsewhere, twice a step, at 2 bytes an entry."""
    from treelora_cli.bench.scale import SIZES, count, training

    size = next(one for one in SIZES if one.name == "Llama-2-7B")
    step = training(size, count(size))
    assert step["part_gb"] == pytest.approx(2 * 6.738415616 / 8)
    assert step["gather_s"] == pytest.approx(2 * 7 * 2 * 6_738_415_616 / 8 / 400e9)
