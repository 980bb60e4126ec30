"""Loading a base: every way in which a folder can be wrong gives one clear line."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from treelora_cli.errors import DataError, EnvironmentProblem
from treelora_cli.models import backbone
from treelora_cli.models.backbone import choose_attention, choose_device, load_backbone
from treelora_cli.recipe import ModelSection


def load(folder: Path | str) -> backbone.Backbone:
    return load_backbone(ModelSection(name=str(folder), device="cpu"))


@pytest.fixture
def copy(tiny_model: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model, tmp_path / "model"))


def test_loads_frozen(tiny_model: Path) -> None:
    loaded = load(tiny_model)
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert loaded.positions == 256
    assert loaded.tokenizer.pad_token_id is not None
    assert not loaded.builtin


def test_missing_folder() -> None:
    with pytest.raises(DataError, match="does not exist"):
        load("./nowhere")


def test_folder_without_config(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no config\.json"):
        load(tmp_path)


def test_folder_without_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(DataError, match=r"no weights \(\*\.safetensors\)$"):
        load(copy)


def test_pickled_weights_are_named_and_not_read(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").unlink()
    (copy / "pytorch_model.bin").write_bytes(b"\x80\x04never read")
    with pytest.raises(DataError, match=r"pytorch_model\.bin is not read"):
        load(copy)


def test_damaged_weights(copy: Path) -> None:
    data = (copy / "model.safetensors").read_bytes()
    (copy / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(DataError, match="cannot be loaded"):
        load(copy)


def test_encoder_decoder_is_refused(copy: Path) -> None:
    document = {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}
    (copy / "config.json").write_text(json.dumps(document))
    with pytest.raises(DataError, match="encoder-decoder"):
        load(copy)


def test_remote_code_is_refused(copy: Path) -> None:
    marker = copy / "ran"
    config = json.loads((copy / "config.json").read_text())
    config["model_type"] = "own_thing"
    config["auto_map"] = {
        "AutoConfig": "code.Own",
        "AutoModelForCausalLM": "code.OwnModel",
    }
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "code.py").write_text(f"open({str(marker)!r}, 'w').close()\n")
    with pytest.raises(DataError):
        load(copy)
    assert not marker.exists()


def test_fingerprint_follows_the_weights(copy: Path, tiny_model: Path) -> None:
    before = load(tiny_model).fingerprint
    assert load(copy).fingerprint == before
    from safetensors.torch import load_file, save_file

    tensors = load_file(copy / "model.safetensors")
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, copy / "model.safetensors", {"format": "pt"})
    assert load(copy).fingerprint != before


def test_fingerprint_of_large_files_is_sampled(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backbone, "HASH_WHOLE_BELOW", 10)
    assert load(tiny_model).fingerprint.startswith("sampled-sha256:")


def test_absent_device_and_package() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(EnvironmentProblem, match="no CUDA device"):
            choose_device("cuda")
    with pytest.raises(EnvironmentProblem, match="unknown device"):
        choose_device("abacus")
    cpu = torch.device("cpu")
    assert choose_attention("auto", cpu, torch.float32) is None
    if backbone.importlib.util.find_spec("flash_attn") is None:
        with pytest.raises(EnvironmentProblem, match="flash-attn"):
            choose_attention("flash_attention_2", cpu, torch.float32)


def test_an_automatic_choice_of_attention_falls_back(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FlashAttention may be importable and still refuse the model or the machine."""
    monkeypatch.setattr(backbone, "choose_attention", lambda *given: "flash_attention_2")
    assert load(tiny_model).model.config._attn_implementation == "sdpa"
    with pytest.raises(EnvironmentProblem):
        load_backbone(
            ModelSection(name=str(tiny_model), device="cpu", attention="flash_attention_2")
        )


def test_a_hub_out_of_reach() -> None:
    """The tests run with HF_HUB_OFFLINE=1: what is not cached cannot be had."""
    with pytest.raises(DataError, match="nobody/nothing") as raised:
        load("nobody/nothing-of-the-kind")
    assert "network" in raised.value.hint
