"""Quantised bases: what transformers is asked for, what is refused, and where it can be, a run."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from support import make_checkpoint, toy_arguments

from treelora_cli.errors import EnvironmentProblem, UsageError
from treelora_cli.models import backbone, quantized
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.outline import outline
from treelora_cli.models.quantized import quantized_loading
from treelora_cli.recipe import LoraSection, ModelSection

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
CPU = torch.device("cpu")


def section(folder: Path, kind: str, **more: object) -> ModelSection:
    return ModelSection(name=str(folder), device="cpu", quantization=kind, **more)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch):
    """Stands for bitsandbytes, installed for the devices it is told, or not at all."""

    def install(*devices: str, broken: bool = False) -> None:
        def load(name: str) -> SimpleNamespace:
            if broken:
                raise OSError("libcudart.so: cannot open shared object file")
            return SimpleNamespace(supported_torch_devices=set(devices))

        there = SimpleNamespace() if devices else None
        monkeypatch.setattr(quantized, "find_spec", lambda name: there)
        monkeypatch.setattr(quantized, "import_module", load)

    return install


@pytest.mark.parametrize("look", [load_backbone, lambda asked: outline(asked, LoraSection())])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_without_the_package_the_hint_says_how(tiny_model: Path, package, look, kind: str) -> None:
    package()
    with pytest.raises(EnvironmentProblem, match=f"quantization={kind} needs") as raised:
        look(section(tiny_model, kind))
    assert "pip install 'treelora[quantization]'" in raised.value.hint


def test_a_package_that_cannot_do_it_on_a_cpu(tiny_model: Path, package) -> None:
    package("cuda")
    with pytest.raises(EnvironmentProblem, match="has nothing for cpu"):
        load_backbone(section(tiny_model, "nf4"))


def test_a_package_that_does_not_import(tiny_model: Path, package) -> None:
    package("cpu", broken=True)
    with pytest.raises(EnvironmentProblem, match="cannot be imported"):
        load_backbone(section(tiny_model, "nf4"))


def test_what_transformers_is_asked_for(
    tiny_model: Path, package, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights go to their device while they are read, and are not moved afterwards."""
    package("cpu")
    asked: dict[str, object] = {}

    class Recorder:
        @staticmethod
        def from_pretrained(source: str, **options: object) -> object:
            asked.update(options)
            raise OSError("recorded")

    monkeypatch.setattr(backbone, "auto_class", lambda config: Recorder)
    with pytest.raises(Exception, match="recorded"):
        load_backbone(section(tiny_model, "nf4", dtype="bfloat16"))
    config = asked["quantization_config"].to_dict()  # type: ignore[attr-defined]
    assert config["load_in_4bit"] and not config["load_in_8bit"]
    assert config["bnb_4bit_quant_type"] == "nf4" and config["bnb_4bit_use_double_quant"]
    assert config["bnb_4bit_compute_dtype"] == "bfloat16"
    assert asked["device_map"] == {"": CPU}
    assert asked["use_safetensors"] and not asked["trust_remote_code"]
    eight = quantized_loading("int8", CPU, torch.float32)["quantization_config"].to_dict()
    assert eight["load_in_8bit"] and not eight["load_in_4bit"]
    assert quantized_loading("none", CPU, torch.float32) == {}


def test_bytes_of_a_quantised_base(tiny_model: Path, package) -> None:
    package("cpu")
    plain = outline(section(tiny_model, "none"), LoraSection())
    # A layer: q and o 32 x 32, k and v 32 x 16, three of the MLP 32 x 64; two layers.
    linear = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
    eight = outline(section(tiny_model, "int8"), LoraSection())
    four = outline(section(tiny_model, "nf4", dtype="bfloat16"), LoraSection())
    assert eight.base_bytes == plain.base_bytes - 3 * linear
    rest = 2 * (plain.parameters - linear)
    assert rest + 0.5 * linear < four.base_bytes < rest + 0.53 * linear
    assert plain.base_bytes_in("int8") == eight.base_bytes


def test_quantised_weights_cannot_be_opened(tiny_model: Path, package) -> None:
    package("cpu")

    def opens(name: str):
        return lambda key: name in key

    with pytest.raises(UsageError, match=r"down_proj\.weight is quantised"):
        outline(section(tiny_model, "nf4"), LoraSection(), opens("weights.model.layers.0.mlp.down"))
    # A norm is not quantised.
    outline(section(tiny_model, "nf4"), LoraSection(), opens("weights.model.norm"))


def test_a_dry_run_refuses_what_opens_the_base(
    treelora, tiny_model: Path, toy_data: Path, tmp_path: Path, package
) -> None:
    package("cpu")
    more = ["--method", "seqft", "--set", "model.quantization=nf4", "--dry-run"]
    outcome = treelora(*toy_arguments(tiny_model, toy_data, tmp_path / "run", "alpha", *more))
    assert outcome.code == 2, outcome
    assert "quantised" in outcome.err


@pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_trains_and_answers_from_a_quantised_base(
    treelora, toy_data: Path, tmp_path: Path, kind: str
) -> None:
    folder = make_checkpoint(tmp_path / "model", hidden_size=64, intermediate_size=128, head_dim=16)
    loaded = load_backbone(section(folder, kind)).model
    assert loaded.model.layers[0].mlp.up_proj.weight.dtype in {torch.uint8, torch.int8}
    run = tmp_path / "run"
    more = ["--set", f"model.quantization={kind}", "--set", "model.device=cpu"]
    outcome = treelora(*toy_arguments(folder, toy_data, run, "alpha,beta", *more))
    assert outcome.code == 0, outcome
    assert treelora("eval", run, "--adapter", "own").code == 0
