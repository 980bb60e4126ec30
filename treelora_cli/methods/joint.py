"""Joint training: one adapter on the rows of all tasks at once; no stream, nothing to forget.

Source: multi-task learning (MTL) as the benchmarks' upper reference (O-LoRA benchmark, Wang et
al., 2023), with LoRA. Rows of all tasks are shuffled together, a task's as often as it has epochs,
in as many optimizer steps as the stream would take. Only the last row of the score matrix exists:
OP is defined, BWT, forgetting and FWT are not. A task cannot be added later: that is a new run.
Stored: one adapter. Cost per step: that of plain LoRA.
"""

from __future__ import annotations

from treelora_cli.methods.base import Method


class Joint(Method):
    """One LoRA adapter trained on all tasks at once, shuffled together."""

    name = "joint"
    mode = "joint"
