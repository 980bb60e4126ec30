"""Tasks with a known answer: Gaussian prompts around means, under one covariance."""

from __future__ import annotations

import torch
from torch import Tensor

from treelora_cli.routing.statistics import FeatureStatistics


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixing(width: int, seed: int = 0) -> Tensor:
    """A factor of a covariance whose features differ in scale by two orders of magnitude."""
    draw = torch.randn(width, width, generator=generator(seed)).double()
    return (torch.eye(width) + draw / width**0.5) * torch.logspace(-1, 1, width).unsqueeze(1)


def rows_of(mean: Tensor, count: int, seed: int) -> Tensor:
    noise = torch.randn(count, mean.shape[0], generator=generator(seed)).double()
    return mean + noise @ mixing(mean.shape[0]).T


def centres(tasks: int, width: int, spread: float = 3.0, seed: int = 7) -> Tensor:
    draw = torch.randn(tasks, width, generator=generator(seed)).double()
    return spread * draw @ mixing(width).T


def statistics_of(means: Tensor, count: int = 40) -> dict[str, FeatureStatistics]:
    return {
        f"T{k}": FeatureStatistics.of(rows_of(mean, count, 100 + k)) for k, mean in enumerate(means)
    }
