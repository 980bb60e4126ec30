"""Loading a base: every way in which a folder can be wrong gives one clear line."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ROOT, make_t5
from tokenizers import Tokenizer, processors

from treelora_cli.errors import DataError, EnvironmentProblem
from treelora_cli.models import backbone
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.backbone import choose_attention, choose_device, load_backbone
from treelora_cli.models.outline import outline
from treelora_cli.recipe import LoraSection, ModelSection


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


def test_an_encoder_decoder_is_loaded_frozen(tiny_t5: Path) -> None:
    loaded = load(tiny_t5)
    assert loaded.encodes and loaded.positions is None
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert type(loaded.model).__name__ == "T5ForConditionalGeneration"


def both_ways(folder: Path) -> list[DataError]:
    """Load a folder, and outline it for a dry run: what is refused here is refused there."""
    raised = []
    section = ModelSection(name=str(folder), device="cpu")
    for attempt in (load_backbone, lambda section: outline(section, LoraSection())):
        with pytest.raises(DataError) as found:
            attempt(section)
        raised.append(found.value)
    return raised


def test_encoder_decoders_that_do_not_answer_text_are_refused(copy: Path) -> None:
    document = {"model_type": "whisper", "architectures": ["WhisperForConditionalGeneration"]}
    (copy / "config.json").write_text(json.dumps(document))
    for error in both_ways(copy):
        assert "encoder-decoder (whisper) that does not answer text" in error.message


def test_experts_that_drop_tokens_are_refused(tmp_path: Path) -> None:
    for error in both_ways(make_t5(tmp_path, "switch_transformers")):
        assert "(switch_transformers) drops tokens" in error.message


def test_an_encoder_decoder_without_a_decoder_start_is_refused(
    tiny_t5: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_t5, tmp_path / "t5"))
    config = json.loads((folder / "config.json").read_text())
    del config["decoder_start_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    for error in both_ways(folder):
        assert "which token its decoder begins with" in error.message
        assert "decoder_start_token_id" in error.hint


def test_encoder_decoders_that_begin_texts_otherwise_are_refused(tmp_path: Path) -> None:
    """BART's tokenizer begins every text with a token that T5's has not, on both sides."""
    folder = make_t5(tmp_path, "bart", bos_token_id=1)
    file = folder / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(file))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.save(str(file))
    for error in both_ways(folder):
        assert "(bart) begins every text with '<s>'" in error.message
        assert "\n" not in error.message


@pytest.mark.parametrize("kind", ["t5", "mt5"])
def test_an_outline_counts_what_loading_gives(tmp_path: Path, kind: str) -> None:
    folder = make_t5(tmp_path, kind)
    section, lora = ModelSection(name=str(folder), device="cpu"), LoraSection(rank=3)
    sizes = outline(section, lora)
    model = AdaptedModel(load_backbone(section), lora, 0)
    assert sizes.encodes
    assert sizes.trainable == model.trainable_count()
    assert sizes.parameters == sum(
        parameter.numel() for parameter in load_backbone(section).model.parameters()
    )


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


def test_absent_device() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(EnvironmentProblem, match="no CUDA device"):
            choose_device("cuda")
    with pytest.raises(EnvironmentProblem, match="unknown device"):
        choose_device("abacus")


@pytest.fixture
def flash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Installs a package of flash_attn's name for a while, with metadata as pip leaves them.

    Without them transformers would import it as soon as it is itself imported.
    """

    def put(code: str) -> None:
        folder = tmp_path / "packages" / "flash_attn"
        metadata = folder.with_name("flash_attn-2.8.3.dist-info")
        for place in (folder, metadata):
            place.mkdir(parents=True)
        (folder / "__init__.py").write_text(code)
        (folder / "bert_padding.py").write_text("")
        (metadata / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n"
        )
        (metadata / "top_level.txt").write_text("flash_attn\n")
        monkeypatch.syspath_prepend(tmp_path / "packages")
        importlib.invalidate_caches()

    yield put
    for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
        del sys.modules[name]


CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("ImportError", "flash_attn_2_cuda.so: undefined symbol: _ZN3c104cuda9SetDeviceEi"),
        ("OSError", "libcudart.so.12: cannot open shared object file"),
    ],
)
def test_a_broken_flash_attention_is_done_without(flash, caplog, error: str, said: str) -> None:
    """It was built for another torch, or its CUDA is gone: seen only when it is imported."""
    flash(f"raise {error}({said!r})")
    with caplog.at_level("INFO", logger="treelora"):
        assert choose_attention("auto", CUDA, torch.bfloat16) is None
    (note,) = caplog.messages
    assert said in note and "\n" not in note
    with pytest.raises(EnvironmentProblem, match="the installed flash-attn cannot") as raised:
        choose_attention("flash_attention_2", CUDA, torch.bfloat16)
    assert error in raised.value.message and said in raised.value.message
    assert "--no-build-isolation" in raised.value.hint and "attention=auto" in raised.value.hint


def test_flash_attention_is_taken_where_it_runs(flash, monkeypatch, caplog) -> None:
    flash("")
    capability = (8, 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(backbone, "is_flash_attn_2_available", lambda: True)
    caplog.set_level("INFO", logger="treelora")
    for wanted in ("auto", "flash_attention_2"):
        assert choose_attention(wanted, CUDA, torch.bfloat16) == "flash_attention_2"
    assert choose_attention("auto", CPU, torch.bfloat16) is None
    assert choose_attention("auto", CUDA, torch.float32) is None, "it has no kernel for it"
    assert choose_attention("sdpa", CUDA, torch.bfloat16) == "sdpa"
    assert not caplog.messages, "nobody misses it there"
    capability = (7, 5)
    with pytest.raises(EnvironmentProblem, match="Ampere"):
        choose_attention("flash_attention_2", CUDA, torch.bfloat16)
    monkeypatch.setattr(backbone, "is_flash_attn_2_available", lambda: False)
    assert choose_attention("auto", CUDA, torch.bfloat16) is None
    assert "transformers does not take" in caplog.text, "it would fetch a kernel from the hub"


def test_a_flash_attention_that_lacks_a_part(flash, tmp_path: Path) -> None:
    """The package of version 4 has the same name, and nothing that version 2 has."""
    flash("")
    (tmp_path / "packages" / "flash_attn" / "bert_padding.py").unlink()
    with pytest.raises(EnvironmentProblem, match=r"No module named 'flash_attn\.bert_padding'"):
        choose_attention("flash_attention_2", CUDA, torch.float16)


def test_flash_attention_that_cannot_be(monkeypatch) -> None:
    for device, dtype, where in ((CPU, torch.bfloat16, "cpu"), (CUDA, torch.float32, "float32")):
        with pytest.raises(EnvironmentProblem, match=f"bfloat16 or float16, not on.*{where}"):
            choose_attention("flash_attention_2", device, dtype)
    monkeypatch.setattr(backbone, "find_spec", lambda name: None)
    with pytest.raises(EnvironmentProblem, match="needs the package flash-attn") as raised:
        choose_attention("flash_attention_2", CUDA, torch.bfloat16)
    assert "treelora[flash-attn]" in raised.value.hint


def test_on_a_cpu_flash_attention_is_never_imported(flash, tiny_model: Path) -> None:
    """Neither by this program nor by what it is built on; in a process of its own."""
    flash("raise ImportError('imported')")
    code = (
        "import sys, treelora_cli.cli.app, treelora_cli.engine.stream\n"
        "from treelora_cli.models.backbone import load_backbone\n"
        "from treelora_cli.models.outline import outline\n"
        "from treelora_cli.recipe import LoraSection, ModelSection\n"
        "section = ModelSection(name=sys.argv[1], device='cpu')\n"
        "outline(section, LoraSection())\n"
        "print(load_backbone(section).model.config._attn_implementation)\n"
        "assert 'flash_attn' not in sys.modules\n"
    )
    path = os.pathsep.join([sys.path[0], str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-c", code, str(tiny_model)],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["sdpa"]), done.stderr


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
