"""What a stream would take on models up to 70B, counted from their shapes; nothing is timed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig

from treelora_cli.bench.document import Column, Row, Table
from treelora_cli.bench.part import Part, Plan, Say
from treelora_cli.models.adapted import SLOT, saved_parameters
from treelora_cli.models.targets import lora_config
from treelora_cli.recipe import LoraSection

ABOUT = (
    "Bytes and operations of a stream on larger models, counted from the models' shapes and this "
    "program's formulas; nothing here is measured"
)
LORA = LoraSection(rank=8, alpha=32, targets=("q_proj", "v_proj"))
TOKENS = 32 * 1024
"""Tokens of an optimizer step: the papers' 32 rows, of 1,024 tokens."""
TASKS = (8, 100, 10_000)
PROCESSES = (8, 64)
LINK = 25e9
"""Bytes a second between machines: a 200 Gbit/s network."""
NEAR, MACHINE = 400e9, 8
"""Bytes a second between the accelerators of a machine (NVLink), and how many it has."""
SPEED = 400e12
"""Operations a second that a present accelerator reaches in bfloat16, about 40 % of its peak."""
GB = 1e9


@dataclass(frozen=True, slots=True)
class Size:
    """A Llama's published sizes."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool = False


SIZES = (
    Size("Llama-3.2-1B", 2048, 16, 32, 8, 8192, 128256, tied=True),
    Size("Llama-2-7B", 4096, 32, 32, 32, 11008, 32000),
    Size("Llama-2-13B", 5120, 40, 40, 40, 13824, 32000),
    Size("Llama-3.1-70B", 8192, 80, 64, 8, 28672, 128256),
)


@dataclass(frozen=True, slots=True)
class Counted:
    """Entries of a model.

    Attributes:
        base: of the base.
        A: of the adapter's down-projections, which make the default signature.
        adapter: of the whole adapter.
    """

    base: int
    A: int
    adapter: int


def count(size: Size) -> Counted:
    """Count a model with its adapter on the meta device: no weight is made."""
    config = LlamaConfig(
        hidden_size=size.hidden,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        intermediate_size=size.intermediate,
        vocab_size=size.vocab,
        tie_word_embeddings=size.tied,
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
        base = sum(parameter.numel() for parameter in model.parameters())
        adapted = get_peft_model(model, lora_config(LORA, model), adapter_name=SLOT)
    entries = {key: p.numel() for key, p in saved_parameters(adapted, SLOT).items()}
    down = sum(n for key, n in entries.items() if ".lora_A." in key)
    return Counted(base, down, sum(entries.values()))


def storage(size: Size, found: Counted) -> Row:
    """Return what tasks leave: adapter and signature, float32."""
    task = 4 * (found.adapter + found.A)
    return {
        "model": size.name,
        "base_gb": 2 * found.base / GB,
        "adapter_mb": 4 * found.adapter / 1e6,
        "signature_mb": 4 * found.A / 1e6,
        **{f"tasks_{count}_gb": count * task / GB for count in TASKS},
        "host_gb": TASKS[-1] * 4 * found.A / GB,
    }


def training(size: Size, found: Counted) -> Row:
    """Return what a step takes in every process, and between them.

    Weights in bfloat16 or 4 bit (with a scale of 8 bit for 64 of them), the adapter in float32 with
    gradient and two moments; ZeRO 1 shares the moments out, ZeRO 2 the gradients too. A step reads
    the base twice with two operations an entry and token: forward, and backward to the activations.
    With FSDP2 the accelerators of a machine share the base, and gather it in each of the two.
    """
    row: Row = {
        "model": size.name,
        "bf16_gb": 2 * found.base / GB,
        "nf4_gb": found.base * (4 + 8 / 64) / 8 / GB,
        "adapter_mb": 4 * found.adapter / 1e6,
        "optimizer_mb": 8 * found.adapter / 1e6,
        "step_s": 4 * found.base * TOKENS / SPEED,
        "part_gb": 2 * found.base / MACHINE / GB,
        "gather_s": 2 * 2 * found.base * (MACHINE - 1) / MACHINE / NEAR,
    }
    for processes in PROCESSES:
        row[f"zero1_{processes}_mb"] = 8 * found.adapter / processes / 1e6
        sent = 2 * (processes - 1) / processes * 4 * found.adapter
        row[f"reduce_{processes}_ms"] = 1000 * sent / LINK
        row[f"step_{processes}_s"] = 4 * found.base * TOKENS / SPEED / processes
    return row


def run(plan: Plan, say: Say) -> Sequence[Table]:
    """Count every size."""
    found = []
    for size in SIZES:
        say(f"scale: {size.name}")
        found.append((size, count(size)))
    kept = (
        Column("model", ("model",)),
        Column("base bf16 GB", ("base_gb",)),
        Column("adapter MB", ("adapter_mb",)),
        Column("signature MB", ("signature_mb",)),
        *(Column(f"{count:,} tasks GB", (f"tasks_{count}_gb",), 2) for count in TASKS),
        Column("signatures in host memory GB", ("host_gb",)),
    )
    spread = [
        column
        for processes in PROCESSES
        for column in (
            Column(f"moments, {processes} x ZeRO MB", (f"zero1_{processes}_mb",), 2),
            Column(f"all-reduce, {processes} ms", (f"reduce_{processes}_ms",), 2),
            Column(f"step, {processes} s", (f"step_{processes}_s",), 3),
        )
    ]
    needed = (
        Column("model", ("model",)),
        Column("base bf16 GB", ("bf16_gb",)),
        Column("base 4-bit GB", ("nf4_gb",)),
        Column("adapter MB", ("adapter_mb",)),
        Column("moments MB", ("optimizer_mb",)),
        Column("step, 1 s", ("step_s",), 2),
        Column(f"base, {MACHINE} x FSDP2 GB", ("part_gb",)),
        Column(f"gather, {MACHINE} x FSDP2 s", ("gather_s",), 3),
        *spread,
    )
    where = "LoRA of rank 8 on query and value"
    return [
        Table(
            "storage",
            f"What tasks leave on disk; {where}",
            kept,
            [storage(size, one) for size, one in found],
            (f"The host holds all signatures of {TASKS[-1]:,} tasks; an accelerator one path's.",),
        ),
        Table(
            "training",
            f"What a step of 32 rows of 1,024 tokens takes; {where}",
            needed,
            [training(size, one) for size, one in found],
            (
                f"Computed at {SPEED / 1e12:.0f} TFLOP/s a process and {LINK / GB:.0f} GB/s "
                f"between machines, {NEAR / GB:.0f} within one, without activations. Every process "
                "holds the whole base but with FSDP2, where one forward pass of a step is counted.",
            ),
        ),
    ]


PART = Part("scale", ABOUT, run)
