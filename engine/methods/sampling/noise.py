"""Per-sample noise: one seeded CPU generator a sample, so that neighbours, retries and devices change nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_noise(
    seeds: Sequence[int], *shapes: tuple[int, ...], device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    """Standard normal noise [B, *shape] of every shape, float32: what diffusers draws for a list of seeded generators.

    Args:
        seeds: one a sample, non-negative, below 2^63.
        shapes: of one sample each; a sample's generator draws them one after the other.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return tuple(
        torch.cat([torch.randn((1, *shape), generator=one, dtype=torch.float32) for one in generators]).to(device)
        for shape in shapes
    )
