"""SeqLoRA: one adapter trained on task after task, nothing done against forgetting.

Source: the baseline of Qian et al. (ICML 2025) and of TRACE (Wang et al., 2023), as their code has
it: the adapter is neither reset nor merged at a task boundary. Loss: mean cross-entropy of the
answer tokens. Stored per task: the adapter. Cost per step: that of plain LoRA, whatever the number
of tasks. Departure from the papers' code: a new optimizer for every task.
"""

from __future__ import annotations

from treelora_cli.methods.base import Method


class SeqLora(Method):
    """Sequential fine-tuning of a single LoRA adapter."""

    name = "seqlora"
