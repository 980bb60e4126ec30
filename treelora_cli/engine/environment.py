"""What a run was made with: package versions for run.json."""

from __future__ import annotations

import platform
from importlib import metadata

import treelora_cli

PACKAGES = ("torch", "transformers", "peft", "tokenizers", "safetensors")


def versions() -> dict[str, str]:
    """Return version numbers by package, Python's and treelora's among them."""
    found = {"python": platform.python_version(), "treelora": treelora_cli.__version__}
    return found | {package: metadata.version(package) for package in PACKAGES}
