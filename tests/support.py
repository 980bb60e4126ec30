"""What the tests share: a tiny checkpoint of a real architecture, a tiny data folder, a runner.

Not in conftest.py: there are several of those, and importing from one gives whichever came last.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared"

TEXTS = [
    "What is the colour of the sky? Answer:",
    "Which letter comes next? A B C Answer:",
    "今天天气怎么样？ 回答：",
    "Übersetze den Satz über die Straße. Antwort:",
    "def add(a, b):\n    return a + b\n",
    "0123456789 +-*/= , . ? ! ( ) [ ] { } < > \" '",
]


def make_tokenizer(folder: Path, *, ends: bool = False) -> None:
    """Train a byte-level BPE on a few lines, so that any text can be encoded.

    With ``ends`` it has no begin token and puts the end token behind a text, as T5's does.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    special = {"pad_token": "<pad>", "eos_token": "</s>"}
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", 2)]
        )
    else:
        special["bos_token"] = "<s>"
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)


def make_checkpoint(
    folder: Path, model_type: str = "llama", positions: int = 256, **more: object
) -> Path:
    """Save a random model of a real architecture, two layers deep, with its tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    make_tokenizer(folder)
    settings = {
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": positions,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = AutoConfig.for_model(model_type, **settings | more)
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def make_t5(folder: Path, model_type: str = "t5", **settings: object) -> Path:
    """Save a random encoder-decoder of a real architecture, two layers a side."""
    import torch
    from transformers import AutoConfig, AutoModelForSeq2SeqLM

    make_tokenizer(folder, ends=True)
    sizes = {"vocab_size": 320, "d_model": 32}
    if model_type in {"pegasus", "marian", "bart"}:
        for side in ("encoder", "decoder"):
            sizes |= {f"{side}_layers": 2, f"{side}_attention_heads": 4, f"{side}_ffn_dim": 64}
    else:
        layers = {"num_layers": 2, "num_decoder_layers": 2}
        sizes |= {"d_kv": 8, "d_ff": 64, "num_heads": 4} | layers
    tokens = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}
    config = AutoConfig.for_model(model_type, **sizes | tokens | settings)
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(folder)
    return folder


def write_task(folder: Path, name: str, rows: dict[str, list[tuple[str, str]]]) -> None:
    """Write a task in TRACE's layout."""
    (folder / name).mkdir(parents=True)
    for split, pairs in rows.items():
        document = [{"prompt": prompt, "answer": answer} for prompt, answer in pairs]
        text = json.dumps(document, ensure_ascii=False, indent=0)
        (folder / name / f"{split}.json").write_text(text, encoding="utf-8")


def toy_rows(kind: int, count: int, start: int = 0) -> list[tuple[str, str]]:
    """Rows that differ between kinds and never repeat."""
    labels = [("A", "B"), ("yes", "no"), ("红", "蓝"), ("groß", "klein")][kind]
    return [
        (f"task {kind} question {number}: is {number * 7 % 11} even? Answer:", labels[number % 2])
        for number in range(start, start + count)
    ]


TOY_SETTINGS = [
    "data.max_prompt_tokens=96",
    "data.max_answer_tokens=8",
    "optim.batch_size=4",
    "optim.micro_batch_size=2",
    "optim.lr=1e-3",
    "optim.epochs=2",
    "lora.rank=4",
    "stream.checkpoint_steps=2",
    "eval.batch_size=6",
]


def toy_arguments(model: Path, data: Path, run: Path, tasks: str, *more: str) -> list[str]:
    """Arguments of a train-stream over the toy tasks: six steps a task."""
    sets = [part for pair in TOY_SETTINGS for part in ("--set", pair)]
    head = ["train-stream", "--tasks", tasks, "--model", str(model), "--data", str(data)]
    return [*head, "--run-dir", str(run), *sets, *more]


def free_port() -> int:
    """Return a port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def run_command(
    *arguments: str, timeout: float = 240, stdin: str | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run the real command in a child process."""
    code = "from treelora_cli.cli.app import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        input=stdin,
        text=True,
        timeout=timeout,
        check=False,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1", **environment},
    )


class Outcome:
    """What a command did."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def __repr__(self) -> str:
        return f"exit {self.code}\nstdout: {self.out}\nstderr: {self.err}"
