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
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import load_backbone
from treelora_cli.models.encode import Example, collate
from treelora_cli.models.forward import answer_loss
from treelora_cli.models.outline import outline
from treelora_cli.models.quantized import quantized_loading
from treelora_cli.models.recompute import recompute_layers
from treelora_cli.recipe import LoraSection, ModelSection

INSTALLED = importlib.util.find_spec("bitsandbytes") is not None
CPU = torch.device("cpu")
needs_package = pytest.mark.skipif(not INSTALLED, reason="bitsandbytes is not installed")


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


def held_bytes(model: torch.nn.Module) -> int:
    """What a loaded base takes: its parameters, and what goes with those that are packed."""
    count = 0
    for parameter in model.parameters():
        count += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        if state is not None:
            count += state.absmax.nbytes + state.state2.absmax.nbytes
    return count


@needs_package
@pytest.mark.parametrize("architecture", ["llama", "mixtral"])
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_the_bytes_foreseen_are_those_of_the_loaded_base(
    tmp_path: Path, kind: str, architecture: str
) -> None:
    """Norms, embeddings and the output layer stay as they are, and so do experts."""
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    experts = {"num_local_experts": 4} if architecture == "mixtral" else {}
    asked = section(make_checkpoint(tmp_path, architecture, **sizes | experts), kind)
    model = load_backbone(asked).model
    assert held_bytes(model) == outline(asked, LoraSection(targets=("q_proj",))).base_bytes
    stacked = [one for name, one in model.named_parameters() if ".experts." in name]
    assert len(stacked) == (4 if experts else 0)
    assert all(one.dtype == torch.float32 for one in stacked)


@needs_package
@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_of_a_quantised_base_are_close_to_those_without(
    tmp_path: Path, kind: str
) -> None:
    """Layers computed again give the same, and a base in 4 or 8 bits nearly the same."""

    def gradients(kind: str, *, again: bool) -> torch.Tensor:
        backbone_ = load_backbone(section(folder, kind))
        if again:
            recompute_layers(backbone_.model)
        model = AdaptedModel(backbone_, LoraSection(rank=4, dropout=0.0), 0)
        model.peft.train()
        tokens = tuple(range(3, 40))
        answer_loss(model, collate([Example(tokens, 30, truncated=False)], 0)).backward()
        found = [parameter.grad for parameter in model.parameters()]
        return torch.cat([grad.flatten() for grad in found if grad is not None])

    folder = make_checkpoint(tmp_path, hidden_size=64, intermediate_size=128, head_dim=16)
    plain, packed = gradients("none", again=False), gradients(kind, again=False)
    assert torch.equal(packed, gradients(kind, again=True))
    assert plain.norm() > 0
    error = float((packed - plain).norm() / plain.norm())
    assert 0 < error < {"nf4": 0.25, "int8": 0.03}[kind]


@needs_package
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
