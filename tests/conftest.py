"""Fixtures for every test; what they are made of is in support.py."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
from support import Outcome, make_checkpoint, make_t5, toy_rows, write_task


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a byte-level tokenizer."""
    return make_checkpoint(tmp_path_factory.mktemp("tiny-llama"))


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random T5, two layers a side, with a byte-level tokenizer."""
    return make_t5(tmp_path_factory.mktemp("tiny-t5"))


@pytest.fixture(scope="session")
def toy_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four tasks of 12 train, 4 eval and 6 test rows in TRACE's layout."""
    folder = tmp_path_factory.mktemp("toy-data")
    for kind, name in enumerate(("alpha", "beta", "gamma", "delta")):
        rows = {
            "train": toy_rows(kind, 12),
            "eval": toy_rows(kind, 4, 12),
            "test": toy_rows(kind, 6, 16),
        }
        write_task(folder, name, rows)
    return folder


@pytest.fixture
def treelora(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Run the command line inside this process; returns exit code, stdout and stderr."""
    from treelora_cli.cli.app import main

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["treelora", *map(str, arguments)])
        monkeypatch.delenv("TREELORA_DEBUG", raising=False)
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        captured = capsys.readouterr()
        return Outcome(int(stopped.value.code or 0), captured.out, captured.err)

    return run
