"""Per-sample noise: a seeded CPU generator for each sample, so that batches, retries and devices change nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_noise(
    seeds: Sequence[int], *shapes: tuple[int, ...], device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    """Standard normal noise [B, *shape] of every shape, float32: what diffusers draws for a list of seeded generators.

    Args:
        seeds: one per sample, non-negative, below 2^63.
        shapes: of a single sample; a sample's generator draws them in this order.
    """
    generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
    return tuple(_rows(generators, shape).to(device) for shape in shapes)


def _rows(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    return torch.cat([torch.randn((1, *shape), generator=each, dtype=torch.float32) for each in generators])
