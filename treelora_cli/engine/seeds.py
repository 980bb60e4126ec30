"""Seeds for everything that draws, derived from the run's one seed and what it is for."""

from __future__ import annotations

import hashlib


def derive(seed: int, *parts: str | int) -> int:
    """Return a seed in [0, 2^31) that depends on the run's seed and on every part.

    Deriving instead of drawing on makes a task's training the same whether the run was extended,
    resumed or done in one go, and whatever was evaluated in between.
    """
    text = "\x1f".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
