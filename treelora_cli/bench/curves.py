"""Step, memory and storage of models that grow, each beside what is computed from their shapes."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from treelora_cli.bench.arms import begin, task_context
from treelora_cli.bench.document import Column, Row, Table
from treelora_cli.bench.memory import learn_one
from treelora_cli.bench.part import Part, Plan, Say
from treelora_cli.bench.shapes import LLAMA_1B, LORA, TINY, Rows, SameRows, Shape, build
from treelora_cli.bench.timing import waiter
from treelora_cli.engine.forwards import Forwards
from treelora_cli.models.adapted import AdaptedModel
from treelora_cli.models.footprint import expert_widths, layer_sizes, linear_widths
from treelora_cli.recipe import OptimSection
from treelora_cli.rundir.tensors import save_tensors

ABOUT = (
    "A step of treelora with one earlier task on models that grow, what autograd keeps of it, and "
    "what a task leaves on disk, each beside what `scale` computes for models up to 70B"
)
OPTIM = OptimSection()
GROWING = (
    Shape(128, 4, 4, 4, 352, 4096),
    Shape(256, 6, 8, 8, 704, 4096),
    Shape(512, 8, 8, 8, 1408, 4096),
    Shape(768, 12, 12, 12, 2048, 4096),
)
GROWING_CUDA = (
    Shape(768, 12, 12, 12, 2048, 32000),
    LLAMA_1B,
    Shape(4096, 32, 32, 32, 11008, 32000),
)
WARMUP = 2


def step_seconds(
    plan: Plan, adapted: AdaptedModel, rows: Rows, vocab: int, steps: int
) -> tuple[list[float], int, int]:
    """Time steps of treelora's second task.

    Returns:
        Seconds of every step; bytes of the adapter's file, and of the signature that a task leaves.
    """
    examples = rows.examples(vocab, plan.seed)
    method, memory = learn_one("treelora", adapted, examples, OPTIM, plan.seed)
    pad = adapted.backbone.tokenizer.pad_token_id
    forwards = Forwards(examples, SameRows(len(examples), WARMUP + steps), OPTIM, pad)
    task = task_context(1, forwards, plan.seed, adapted)
    trainer = begin(method, adapted, task, forwards, OPTIM)
    wait = waiter(plan.device)
    found = []
    for _ in range(WARMUP + steps):
        began = time.perf_counter()
        trainer.advance()
        wait()
        found.append(time.perf_counter() - began)
    trainer.drain()
    signature = memory.tree.tensors["values"].nbytes if memory.tree is not None else 0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "adapter.safetensors"
        save_tensors(file, adapted.answer())
        return found[WARMUP:], file.stat().st_size, signature


def kept_bytes(adapted: AdaptedModel, rows: Rows, vocab: int, seed: int) -> int:
    """Return what autograd keeps of a pass for its backward pass, weights apart, in bytes."""
    own = {p.untyped_storage().data_ptr() for p in adapted.peft.parameters()}
    found: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = [example.tokens for example in rows.examples(vocab, seed)]
    ids = torch.tensor(tokens, device=adapted.device)
    adapted.peft.train()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        # Held until all is counted: storage that is freed may be given out again.
        logits = adapted.peft(input_ids=ids, use_cache=False, logits_to_keep=1).logits
    del logits
    return sum(found.values())


def estimated_bytes(adapted: AdaptedModel, rows: Rows) -> int:
    """Return what the forecast says of the same pass."""
    model = adapted.backbone.model
    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(model.config)
    adapter = adapted.live_parameters
    sizes = layer_sizes(model.config, linear_widths(bare), expert_widths(bare), adapter)
    tokens = rows.prompt + rows.answer
    return sizes.activation_bytes(
        rows.count * tokens, tokens, model.dtype.itemsize, dropout=False, checkpointing=False
    )


def measure(plan: Plan, shape: Shape, rows: Rows, steps: int) -> Row:
    """Return a model's row: measured, and computed beside it."""
    adapted = build(shape, plan.device, plan.seed)
    entries = sum(parameter.numel() for parameter in adapted.backbone.model.parameters())
    trained = adapted.trainable_count()
    seconds, file, signature = step_seconds(plan, adapted, rows, shape.vocab, steps)
    step = statistics.median(seconds)
    base = entries - trained
    kept = kept_bytes(adapted, rows, shape.vocab, plan.seed)
    down = sum(parameter.numel() for _, parameter in adapted.named_factors("A"))
    return {
        "model": str(shape),
        "parameters_m": base / 1e6,
        "step_ms": 1000 * step,
        "slowest_ms": 1000 * max(seconds),
        # Embeddings are looked up, and the output layer is computed at the answers alone.
        "gflops": 4 * (base - 2 * shape.vocab * shape.hidden) * _tokens(rows) / step / 1e9,
        "kept_mb": kept / 1e6,
        "kept_over_estimate": kept / estimated_bytes(adapted, rows),
        "adapter_mb": file / 1e6,
        "adapter_over_entries": file / (4 * trained),
        "signature_mb": signature / 1e6,
        "signature_over_entries": signature / (4 * down),
    }


def _tokens(rows: Rows) -> int:
    return rows.count * (rows.prompt + rows.answer)


def run(plan: Plan, say: Say) -> Sequence[Table]:
    """Measure every size."""
    shapes = (TINY,) if plan.quick else GROWING_CUDA if plan.cuda else GROWING
    rows = Rows(8, 480, 32) if plan.cuda else Rows(4, 112, 16)
    found = []
    for shape in shapes:
        say(f"curves: {shape}")
        found.append(measure(plan, shape, rows, plan.times(9, 2)))
    columns = (
        Column("model", ("model",)),
        Column("base, million", ("parameters_m",)),
        Column("step ms", ("step_ms",)),
        Column("GFLOP/s", ("gflops",)),
        Column("kept MB", ("kept_mb",)),
        Column("over the estimate", ("kept_over_estimate",), 2),
        Column("adapter MB", ("adapter_mb",), 3),
        Column("over 4 bytes an entry", ("adapter_over_entries",), 3),
        Column("signature MB", ("signature_mb",), 3),
        Column("over 4 bytes an entry of A", ("signature_over_entries",), 3),
    )
    notes = (
        "Operations are counted as `scale` counts them: four an entry of the layers and token. "
        "Where this column stays as it is, step times may be extended to larger models.",
    )
    title = f"{rows}, {plan.device.type}, LoRA of rank {LORA.rank} on query and value"
    return [Table("curves", title, columns, found, notes)]


PART = Part("curves", ABOUT, run)
