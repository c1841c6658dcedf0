"""Whether the programs that are timed make the same samples: published against ours, ours against diffusers'.

Rounding differs between a batch and a single sample. Guidance that normalises its gradient stretches the rounding error
of a gradient near zero to the full step, and later steps feed it back: a few samples in a hundred end visibly
elsewhere, and some more measurably, with nothing wrong. So most samples have to agree, not all: in their latents after
the first guided step and at the end, and in their images. A program that does something else moves them all.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import PIL.Image
import torch
from torch import Tensor

from bench.arms import PLAIN, PROMPT, Arm
from bench.measure import scores_of
from bench.programs import Batch, Bench
from engine.data.images.encoding import quantise
from engine.models.kernels import full_float32

# Relative distance of a sample's latents, in float32, after the first guided step and at the end. Rounding on a CPU
# makes 1e-6 of it, and more than 1e-5 in one sample of eight. A step that is a fiftieth longer makes 1e-3 of the first;
# RiskyDiff's last step, the weakest of all, is 3e-5 of the second.
FIRST_TOLERANCE, LAST_TOLERANCE = 1e-4, 2e-5
GREY_LEVELS = 1.0
# Share of the samples that has to agree.
MOST = 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """How far two programs are apart in one respect.

    Attributes:
        what: the respect.
        distances: of each sample.
        tolerance: largest distance that rounding explains.
        unit: of the distances.
    """

    what: str
    distances: tuple[float, ...]
    tolerance: float
    unit: str

    @property
    def num_within(self) -> int:
        """Samples that agree."""
        return sum(distance <= self.tolerance for distance in self.distances)

    @property
    def holds(self) -> bool:
        """Whether most samples agree."""
        return self.num_within >= MOST * len(self.distances)

    def __str__(self) -> str:
        total = len(self.distances)
        apart = f" (the others up to {max(self.distances):.3g})" if self.num_within < total else ""
        return f"{self.num_within} of {total} {self.what} within {self.tolerance:g} {self.unit}{apart}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """Two programs compared, sample by sample.

    Attributes:
        what: the two.
        agreements: in what they were compared.
        scores: median KLDB or risk of both.
    """

    what: str
    agreements: tuple[Agreement, ...]
    scores: tuple[float, float]

    @property
    def holds(self) -> bool:
        """Whether the two make the same samples, but for a few that rounding has led elsewhere."""
        return all(agreement.holds for agreement in self.agreements)

    def __str__(self) -> str:
        respects = ", ".join(str(agreement) for agreement in self.agreements)
        medians = f"medians {self.scores[0]:.3g} and {self.scores[1]:.3g}"
        return f"{self.what}: {respects}; {medians}{'' if self.holds else ': DIFFERENT'}"


def check_arms(bench: Bench, batch: Batch) -> list[Check]:
    """Compare every published loop with its twin, and diffusers' pipeline with the prompt alone, in float32."""
    arms = {arm.name: arm for arm in bench.arms}
    for arm in bench.arms:
        # The engine sets the precision of products for its process when it loads: not within what follows.
        bench.load(arm)
    with full_float32(bench.device), torch.no_grad():
        checks = [check_published(bench, arm, arms[arm.twin], batch) for arm in bench.arms if arm.twin]
        plain, prompt = arms.get(PLAIN.get(bench.family, "")), arms.get(PROMPT[bench.family])
        if plain and prompt:
            made = [bench.images(arm, batch) for arm in (plain, prompt)]
            checks.append(_check(bench, (plain, prompt), batch, made, ()))
    return checks


def check_published(bench: Bench, published: Arm, twin: Arm, batch: Batch) -> Check:
    """Compare a published loop with the engine: latents with those of its parts, images with those of its generator."""
    size, place = bench.batch_size(published, 0), twin.guided_steps(bench.job.sampling.num_inference_steps)[0] - 1
    images, traces = [], []
    for start in range(0, len(batch), size):
        trace: list[Tensor] = []
        images.append(bench.naive.decode(bench.published(published, batch.part(start, start + size), trace)))
        traces.append(trace)
    ours, theirs = bench.trajectory(twin, batch), [torch.cat(parts) for parts in zip(*traces, strict=True)]
    respects = (
        ("first guided latents", place, FIRST_TOLERANCE),
        ("final latents", -1, LAST_TOLERANCE),
    )
    agreements = tuple(
        Agreement(what=what, distances=distances_of(theirs[at], ours[at]), tolerance=tolerance, unit="of their norm")
        for what, at, tolerance in respects
    )
    return _check(bench, (published, twin), batch, [torch.cat(images), bench.images(twin, batch)], agreements)


def distances_of(first: Tensor, second: Tensor) -> tuple[float, ...]:
    """`|a - b| / |a|` of each sample of two tensors [B, ...]; infinite where one is not finite."""
    distance = (first - second).flatten(1).norm(dim=1) / first.flatten(1).norm(dim=1)
    return tuple(distance.nan_to_num(nan=float("inf")).tolist())


def relative_difference(first: Tensor, second: Tensor) -> float:
    """The largest of `distances_of`."""
    return max(distances_of(first, second))


def grey_levels(first: Tensor, second: Tensor) -> tuple[float, ...]:
    """Largest difference of each sample's 8-bit images, of two tensors [B, 3, H, W]; infinite where not finite."""
    finite = torch.isfinite(first).flatten(1).all(1) & torch.isfinite(second).flatten(1).all(1)
    pixels = [torch.from_numpy(quantise(images.nan_to_num())).int() for images in (first, second)]
    levels = (pixels[0] - pixels[1]).abs().flatten(1).amax(1).float()
    return tuple(levels.where(finite.cpu(), torch.inf).tolist())


def _check(
    bench: Bench, arms: tuple[Arm, Arm], batch: Batch, images: Sequence[Tensor], agreements: tuple[Agreement, ...]
) -> Check:
    pictures = [[PIL.Image.fromarray(pixels) for pixels in quantise(made.nan_to_num())] for made in images]
    first, second = (statistics.median(scores_of(bench, bench.target, batch, made)) for made in pictures)
    of_images = Agreement(what="images", distances=grey_levels(*images), tolerance=GREY_LEVELS, unit="grey level")
    return Check(
        what=" and ".join(arm.name for arm in arms), agreements=(*agreements, of_images), scores=(first, second)
    )
