"""Per-sample noise: a seeded CPU generator for each sample, so that batches, retries and devices change nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class NoiseStream:
    """The noise of a batch in the order in which it is drawn: of its first latents, then of the steps that draw some.

    Args:
        seeds: one per sample, non-negative, below 2^63.
        device: of the noise that is drawn; the generators are on the CPU.

    Attributes:
        generators: one per sample, as diffusers' pipelines and schedulers take them.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device | str = "cpu") -> None:
        self.generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        self._device = device

    def draw(self, shape: Sequence[int]) -> Tensor:
        """Standard normal noise [B, *shape], float32, of each sample from its own generator."""
        rows = [torch.randn((1, *shape), generator=each, dtype=torch.float32) for each in self.generators]
        return torch.cat(rows).to(self._device)


def draw_noise(
    seeds: Sequence[int], *shapes: tuple[int, ...], device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    """Standard normal noise [B, *shape] of every shape, float32: what diffusers draws for a list of seeded generators.

    Args:
        seeds: one per sample, non-negative, below 2^63.
        shapes: of a single sample; a sample's generator draws them in this order.
    """
    stream = NoiseStream(seeds, device)
    return tuple(stream.draw(shape) for shape in shapes)
