"""The class of machine that was measured: what decides speed, and nothing that names it."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import Any

import torch

from treelora_cli.engine.environment import versions

SHOWN = ("torch", "transformers", "peft", "treelora")


def machine(device: torch.device) -> dict[str, Any]:
    """Return processor, cores, threads, GPU and versions.

    Args:
        device: where models live.
    """
    found = versions()
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "versions": {name: found[name] for name in SHOWN},
    }


def _processor() -> str:
    listed = Path("/proc/cpuinfo")
    if listed.is_file():
        for line in listed.read_text(encoding="utf-8", errors="replace").splitlines():
            name, colon, value = line.partition(":")
            if colon and name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def resident_bytes() -> int | None:
    """Return this process's resident set; None where the system does not say (no /proc)."""
    status = Path("/proc/self/statm")
    if not status.is_file():
        return None
    pages = int(status.read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def free_bytes() -> int | None:
    """Return the host memory that is free for use; None where the system does not say."""
    listed = Path("/proc/meminfo")
    if not listed.is_file():
        return None
    for line in listed.read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None
