"""`treelora report --evidence` on a run that was really trained."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, toy_arguments

TASKS = ["alpha", "beta", "gamma"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_model, toy_data) -> Path:
    """Three tasks of SeqLoRA, never evaluated."""
    path = tmp_path_factory.mktemp("evidence-cli") / "run"
    more = ["--method", "seqlora", "--set", "eval.when=none"]
    code = "from treelora_cli.cli.app import main; main()"
    arguments = toy_arguments(tiny_model, toy_data, path, ",".join(TASKS), *more)
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return path


def parts_of(run: Path) -> list[torch.Tensor]:
    """What each task added to all entries, from the stored files alone."""
    whole = []
    for index, name in enumerate(TASKS):
        folder = run / "tasks" / f"{index:03d}-{name}" / "adapter"
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        changes = [
            tensors[key.replace("lora_A", "lora_B")].double() @ value.double()
            for key, value in tensors.items()
            if ".lora_A." in key
        ]
        scale = config["lora_alpha"] / config["r"]
        whole.append(scale * torch.cat([change.flatten() for change in changes]))
    return [whole[0], whole[1] - whole[0], whole[2] - whole[1]]


def test_the_numbers_are_those_of_the_stored_adapters(treelora, run) -> None:
    outcome = treelora("report", run, "--evidence", "--json")
    assert outcome.code == 0, outcome
    found = json.loads(outcome.out)["evidence"]
    parts = parts_of(run)
    assert (found["tasks"], found["part"]) == (TASKS, "difference")
    assert found["entries"] == len(parts[0])
    counted = [part.abs() > 0.1 * part.square().mean().sqrt() for part in parts]
    for i, part in enumerate(parts):
        assert found["norm"][i] == pytest.approx(float(part.norm()), rel=1e-6)
        for j, other in enumerate(parts):
            both = float((counted[i] & counted[j]).double().mean())
            assert found["collision"][i][j] == pytest.approx(both, abs=1.5 / len(part))
            cosine = float(part @ other / (part.norm() * other.norm()))
            assert found["cosine"][i][j] == pytest.approx(cosine, abs=1e-6)
    assert 0 < found["collision"][0][1] < found["density"][0] < 1


def test_progress_goes_to_stderr_and_the_report_to_stdout(treelora, run) -> None:
    outcome = treelora("report", run, "--evidence")
    assert "What each task added to the weights" in outcome.out
    assert "3 adapters read" in outcome.err
    assert "modules compared" in outcome.err
    assert "modules compared" not in outcome.out


def test_without_the_flag_nothing_is_compared(treelora, run) -> None:
    assert json.loads(treelora("report", run, "--json").out)["evidence"] is None
    assert "added to the weights" not in treelora("report", run).out


def test_the_threshold_is_a_flag_of_its_own(treelora, run) -> None:
    densities = {}
    for threshold in ("0", "0.1", "1"):
        shown = treelora("report", run, "--evidence-threshold", threshold, "--json")
        found = json.loads(shown.out)["evidence"]
        assert found["threshold"] == float(threshold)
        densities[threshold] = found["density"][0]
    assert densities["0"] > densities["0.1"] > densities["1"] > 0


@pytest.mark.parametrize("threshold", ["-0.1", "nan", "inf"])
def test_a_threshold_that_is_none_is_refused(treelora, run, threshold) -> None:
    outcome = treelora("report", run, "--evidence-threshold", threshold)
    assert outcome.code == 2
    assert "--evidence-threshold" in outcome.err


def test_a_damaged_adapter_is_an_error_that_names_it(treelora, run, tmp_path) -> None:
    broken = shutil.copytree(run, tmp_path / "broken")
    (file,) = broken.glob("tasks/001-*/adapter/adapter_model.safetensors")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    outcome = treelora("report", broken, "--evidence")
    assert outcome.code == 4
    assert "adapter_model.safetensors" in outcome.err.replace("\n", "")
    assert treelora("report", broken).code == 0, "the weights are not read without the flag"
