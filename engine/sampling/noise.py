"""Per-sample noise: one seeded CPU generator a sample, so that neighbours, retries and devices change nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def initial_noise(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device | str = "cpu") -> Tensor:
    """Standard normal noise [B, *shape], float32: what diffusers draws for a list of seeded CPU generators.

    Args:
        seeds: one a sample, non-negative, below 2^63.
        shape: of one sample.
    """
    rows = [
        torch.randn((1, *shape), generator=torch.Generator("cpu").manual_seed(seed), dtype=torch.float32)
        for seed in seeds
    ]
    return torch.cat(rows).to(device)
