"""Whether the programs that are timed make the same samples: naive against ours, ours against diffusers'."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bench.arms import PLAIN, PROMPT
from bench.measure import full_float32
from bench.programs import Batch, Bench

# Relative distance of latents (or images) of one sample, in float32. Rounding differs between a batch and a single
# sample, and guidance feeds it back step by step: 5e-6 on a CPU. RiskyDiff's step a fifth longer moves latents by 9e-3.
TOLERANCE = 1e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Two arms compared.

    Attributes:
        what: of the two.
        difference: largest relative distance over the samples.
    """

    what: str
    difference: float

    @property
    def holds(self) -> bool:
        """Whether the two are equal up to rounding."""
        return self.difference <= TOLERANCE


def check_arms(bench: Bench, batch: Batch) -> list[Check]:
    """Compare every naive arm with its twin, and diffusers' pipeline with the prompt alone, in float32.

    Latents of the naive loop against those of the engine's parts, and its images against those of the generator.
    """
    arms = {arm.name: arm for arm in bench.arms}
    checks = []
    with full_float32(), torch.no_grad():
        for arm in bench.arms:
            if not arm.twin:
                continue
            naive = torch.cat([bench.naive_latents(arm, batch.part(row, row + 1)) for row in range(len(batch))])
            twin = arms[arm.twin]
            checks.append(_check(f"latents of {arm.name} and {twin.name}", naive, bench.latents(twin, batch)))
            images = bench.naive.decode(naive)
            checks.append(_check(f"images of {arm.name} and {twin.name}", images, bench.images(twin, batch)))
        plain, prompt = arms.get(PLAIN[bench.family]), arms.get(PROMPT[bench.family])
        if plain and prompt:
            ours = bench.images(prompt, batch).clamp(0, 1)
            checks.append(_check(f"images of {plain.name} and {prompt.name}", bench.images(plain, batch), ours))
    return checks


def relative_difference(first: Tensor, second: Tensor) -> float:
    """Largest `|a - b| / |a|` over the samples of two tensors [B, ...]; infinite where one is not finite."""
    distance = (first - second).flatten(1).norm(dim=1) / first.flatten(1).norm(dim=1)
    return float(distance.nan_to_num(nan=float("inf")).max())


def _check(what: str, first: Tensor, second: Tensor) -> Check:
    return Check(what=what, difference=relative_difference(first, second))
