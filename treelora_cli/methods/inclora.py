"""IncLoRA: a fresh LoRA adapter for every task, the earlier ones frozen and all of them summed.

Source: the baseline of O-LoRA (Wang et al., EMNLP Findings 2023, arXiv 2310.14152), there O-LoRA
without its penalty. Task n trains B_n A_n in W + s (B_1 A_1 + ... + B_n A_n); loss: mean
cross-entropy of the answer tokens. Stored per task: the sum, one LoRA of rank n r. Cost: reading
and answering add a LoRA of rank n r, so both grow with the tasks, as the adapter's size does; what
is trained stays the same.
"""

from __future__ import annotations

from treelora_cli.methods._sums import SummedLora


class IncLora(SummedLora):
    """An incremental sum of LoRA adapters, nothing done against interference."""

    name = "inclora"
