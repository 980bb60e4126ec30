"""Load a frozen language model and its tokenizer, local or from the hub."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.utils import is_flash_attn_2_available
from transformers.utils import logging as transformers_logging

from treelora_cli.errors import DataError, EnvironmentProblem, TreeloraError
from treelora_cli.models.kind import auto_class, check_kind, check_reading
from treelora_cli.models.quantized import check_quantization, quantized_loading
from treelora_cli.recipe import ModelSection

BUILTIN = Path(__file__).resolve().parent / "builtin"
BUILTIN_NAME = "built-in base"
SAMPLE_BYTES = 1 << 20
HASH_WHOLE_BELOW = 1 << 28
FLASH = "flash_attention_2"

logger = logging.getLogger("treelora")


@dataclass(frozen=True)
class Backbone:
    """A frozen pre-trained model, ready to carry an adapter.

    Attributes:
        model: the transformers model, in evaluation mode, no parameter trainable.
        tokenizer: its tokenizer, with a pad token.
        name: what the user called it; ``built-in base`` for the one that comes along.
        fingerprint: identifies the weights; see :func:`fingerprint`.
        builtin: True for the built-in, synthetic base.
        device: where the model lives.
    """

    model: Any
    tokenizer: Any
    name: str
    fingerprint: str
    builtin: bool
    device: torch.device

    @property
    def positions(self) -> int | None:
        """The longest sequence the model takes, in tokens, or None if it does not say.

        For an encoder-decoder that of either side; T5 knows distances alone and has no limit.
        """
        found = getattr(self.model.config, "max_position_embeddings", None)
        return int(found) if found else None

    @property
    def encodes(self) -> bool:
        """Whether the prompt goes to an encoder and the answer to a decoder, as in T5."""
        return bool(self.model.config.is_encoder_decoder)


def load_backbone(section: ModelSection, *, on_host: bool = False) -> Backbone:
    """Load the backbone a recipe names; remote code is never run and only safetensors are read.

    Args:
        section: the recipe's ``model`` section.
        on_host: leave the weights on the host, for somebody else to put them on the device.

    Raises:
        DataError: no such model, no weights, or an architecture that does not answer in text.
        EnvironmentProblem: the device, or the package for attention or quantisation is missing.
        MemoryError, torch.OutOfMemoryError: there is no room for it.
    """
    transformers_logging.disable_progress_bar()
    device = choose_device(section.device)
    dtype = choose_dtype(section.dtype, device)
    check_quantization(section.quantization, device)
    source = source_of(section)
    check_folder(source)
    packed = quantized_loading(section.quantization, device, dtype)
    options = {"revision": section.revision} if section.revision else {}
    attention = choose_attention(section.attention, device, dtype)
    if not Path(source).is_dir():
        logger.info("model %s: taken from the hub, or from its cache", source)
    try:
        # The small file first: a hub out of reach is waited for once, not once for every file.
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **options)
        check_kind(source, config)
        try:
            model = _load_model(config, source, dtype, attention, options | packed)
        except (ImportError, ValueError):
            # Our own choice may not suit the architecture or the installed build; the user's must.
            if attention is None or section.attention != "auto":
                raise
            logger.info("no %s for %s, using the model's default", attention, source)
            model = _load_model(config, source, dtype, None, options | packed)
        tokenizer = load_tokenizer(source, options)
        check_reading(source, config, tokenizer)
    except (TreeloraError, MemoryError, torch.OutOfMemoryError):
        raise
    except ImportError as error:
        raise EnvironmentProblem(
            f"model {source!r} needs a missing package: {one_line(error)}", "install it"
        ) from None
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more
        raise DataError(
            f"model {source!r} cannot be loaded: {one_line(error)}", loading_hint(error)
        ) from None
    model.requires_grad_(False)
    model.eval()
    # transformers fills what a generation config leaves open from the model's own, which may hold
    # sampling, penalties or lengths; scores must not depend on them.
    model.generation_config = GenerationConfig()
    if not (packed or on_host):
        model.to(device)
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        name=section.name or BUILTIN_NAME,
        fingerprint=fingerprint(source, model),
        builtin=section.name is None,
        device=device,
    )


def loading_hint(error: Exception) -> str:
    """Say what to do about a model that cannot be loaded."""
    text = str(error).lower()
    if "connect" in text or "offline" in text:
        return "check the id and the network, or give a folder that holds the model"
    return "give a hub id or a folder with config.json, *.safetensors and a tokenizer"


def source_of(section: ModelSection) -> str:
    """Return the hub id or folder to load from; the built-in base where none is named."""
    return section.name or str(BUILTIN)


def load_tokenizer(source: str, options: dict[str, str]) -> Any:
    """Load a tokenizer and see to it that it can pad.

    Raises:
        DataError: it has no end-of-sequence token.
    """
    tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    _ensure_pad_token(tokenizer)
    return tokenizer


def choose_device(wanted: str) -> torch.device:
    """Return the device to run on; ``auto`` takes the first CUDA device if there is one.

    Raises:
        EnvironmentProblem: the device named is unknown or absent.
    """
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError:
        raise EnvironmentProblem(f"unknown device {wanted!r}", "use auto, cpu or cuda") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentProblem(
            f"device {wanted!r} asked for, but torch sees no CUDA device", "use model.device=cpu"
        )
    return device


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """Return the weights' dtype; ``auto`` is float32 on CPU and bfloat16 where a GPU has it."""
    if wanted != "auto":
        dtype: torch.dtype = getattr(torch, wanted)
        return dtype
    if device.type == "cuda" and torch.cuda.is_bf16_supported():
        return torch.bfloat16
    return torch.float32


def _load_model(
    config: Any, source: str, dtype: torch.dtype, attention: str | None, options: dict[str, Any]
) -> Any:
    return auto_class(config).from_pretrained(
        source,
        dtype=dtype,
        attn_implementation=attention,
        use_safetensors=True,
        trust_remote_code=False,
        **options,
    )


def choose_attention(wanted: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Return the attention implementation; FlashAttention only where it can run.

    None leaves the choice to transformers: SDPA where the architecture has it, else eager. The
    package is imported only where it would run. One that was built for another torch fails then,
    and ``auto`` goes on without it.

    Raises:
        EnvironmentProblem: FlashAttention was asked for and cannot run here.
    """
    if wanted not in {"auto", FLASH}:
        return wanted
    fits = device.type == "cuda" and dtype in {torch.bfloat16, torch.float16}
    if wanted == "auto" and not (fits and find_spec("flash_attn")):
        return None
    if fits:
        trouble, hint = _flash_trouble(device)
    else:
        where = f"{device.type} in {str(dtype).removeprefix('torch.')}"
        trouble = f"flash-attn runs on CUDA in bfloat16 or float16, not on {where}"
        hint = "use model.attention=auto"
    if not trouble:
        return FLASH
    if wanted == FLASH:
        raise EnvironmentProblem(f"model.attention={FLASH}: {trouble}", hint)
    logger.info("attention is computed without FlashAttention: %s", trouble)
    return None


def _flash_trouble(device: torch.device) -> tuple[str, str]:
    """Return why FlashAttention cannot run on a CUDA device, and what to do; empty where it can."""
    build = "pip install 'treelora[flash-attn]' (needs a CUDA toolkit), or model.attention=auto"
    if find_spec("flash_attn") is None:
        return "it needs the package flash-attn", build
    try:
        # What transformers imports of it, which is late, and then no error that it explains.
        for module in ("flash_attn", "flash_attn.bert_padding"):
            import_module(module)
        known = is_flash_attn_2_available()
    except Exception as error:  # an ImportError, or an OSError of the loader
        said = f"{type(error).__name__}: {one_line(error)}"
        again = "build it again for this torch: pip install --force-reinstall --no-cache-dir "
        again += "--no-build-isolation --no-deps flash-attn; or model.attention=auto"
        return f"the installed flash-attn cannot be imported ({said})", again
    if not known:  # asked nevertheless, transformers would fetch a kernel from the hub
        return "transformers does not take the installed flash-attn, it may be too old", build
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "flash-attn needs a GPU of the Ampere generation or later", "model.attention=auto"
    return "", ""


def fingerprint(source: str, model: Any) -> str:
    """Identify a model's weights.

    A local folder's config and weight files are hashed with SHA-256: whole below 256 MiB, else
    size, safetensors header and the first and last MiB (``sampled-sha256:``). A hub id is
    identified by the commit it resolved to.
    """
    folder = Path(source)
    if not folder.is_dir():
        return f"hub:{source}@{getattr(model.config, '_commit_hash', None) or 'unknown'}"
    weights = sorted(folder.glob("*.safetensors"))
    whole = sum(path.stat().st_size for path in weights) < HASH_WHOLE_BELOW
    digest = hashlib.sha256()
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    digest.update(json.dumps(config, sort_keys=True).encode())
    for path in weights:
        digest.update(f"{path.name}:{path.stat().st_size}".encode())
        digest.update(_contents(path, whole))
    return f"{'sha256' if whole else 'sampled-sha256'}:{digest.hexdigest()}"


def _contents(path: Path, whole: bool) -> bytes:
    with path.open("rb") as file:
        if whole:
            return hashlib.file_digest(file, "sha256").digest()
        head = file.read(SAMPLE_BYTES)
        file.seek(max(0, path.stat().st_size - SAMPLE_BYTES))
        return head + file.read()


def check_folder(source: str) -> None:
    """Say what a local folder lacks before transformers says it in many lines.

    Raises:
        DataError: the folder, its config or its weights are missing or of the wrong kind.
    """
    folder = Path(source)
    looks_local = folder.exists() or source.startswith((".", "/", "~"))
    if not looks_local:
        return
    if not folder.is_dir():
        raise DataError(f"model folder {source!r} does not exist", "give a hub id or a folder")
    if not (folder / "config.json").is_file():
        raise DataError(f"model folder {source!r} has no config.json", "is it the right folder?")
    if not any(folder.glob("*.safetensors")):
        other = sorted(path.name for path in [*folder.glob("*.bin"), *folder.glob("*.pt")])
        found = f"; {other[0]} is not read, for pickled weights can run code" if other else ""
        raise DataError(
            f"model folder {source!r} has no weights (*.safetensors){found}",
            "save it with model.save_pretrained(folder) of transformers 5",
        )
    try:
        AutoConfig.from_pretrained(source, trust_remote_code=False)
    except Exception as error:
        raise DataError(
            f"{source}/config.json cannot be used: {one_line(error)}",
            "is it a transformers model?",
        ) from None


def _ensure_pad_token(tokenizer: Any) -> None:
    """Padding is masked everywhere, so any valid id serves where a tokenizer has no pad token."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    if tokenizer.eos_token_id is None:
        raise DataError(
            "the model's tokenizer has no end-of-sequence token", "set eos_token in its config"
        )


def one_line(error: BaseException) -> str:
    """Return the first line of an error's text that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
