"""Gaussian mixtures as generators of a loop: exact, and many seeds at once."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.methods.curation.generators import GaussianMixture, circle_mixture, monomials
from engine.methods.curation.learning import Standardisation
from engine.methods.curation.loop import LoopOptions, curate
from engine.studies.loop.measures import MAX_COMPARED
from engine.studies.loop.rounds import RoundSignal, derived_seed, play_round, random_of
from engine.studies.loop.samples import Real, RoundSamples
from engine.studies.loop.signal import Memory
from engine.studies.loop.spec import SQUARED_DISTANCE, LoopSpec, MixtureSpec

# Seeds that are computed together, in every process and for any number of seeds: equal seeds give equal figures.
BLOCK = 16
_SPACE = "samples"


class MixtureGenerator:
    """The mixtures of a block of seeds, in the round that they are in.

    Args:
        job: the loop.
        arm: name of the arm.
        block: number of the block of seeds.
    """

    def __init__(self, job: LoopSpec, arm: str, block: int) -> None:
        assert job.generator.mixture is not None
        self._job = job
        self._spec: MixtureSpec = job.generator.mixture
        self._arm = arm
        self._seed = derived_seed(job.seed, "mixture", block)
        mixture = circle_mixture(self._spec.modes, radius=self._spec.radius, deviation=self._spec.deviation)
        self._first: GaussianMixture = replace(mixture, em_steps=job.arms[arm].steps or self._spec.em_steps).expanded(
            BLOCK
        )
        self._current = self._first
        self._number = 0

    @property
    def num_classes(self) -> int:
        """Modes."""
        return self._spec.modes

    @property
    def seed(self) -> int:
        """Of the choices of the present round; the same for all arms."""
        return derived_seed(self._seed, self._number)

    @property
    def options(self) -> LoopOptions:
        """Sizes and mix of a retraining."""
        weight = self._job.weight_of(self._arm)
        options = LoopOptions(num_training=self._spec.samples, num_candidates=self._job.curation.candidates)
        return options if weight is None else replace(options, curated_weight=weight)

    def samples(self) -> RoundSamples:
        """As many as there are candidates; features are monomials of degree one and two."""
        points = self._points()
        distances = torch.cdist(points, self._first.means)
        modes = distances.argmin(-1)
        if self._job.curation.reward == SQUARED_DISTANCE:
            rewards = -distances[..., 0].square()
        else:
            rewards = (self._spec.modes - modes).double()
        return RoundSamples(monomials(points), rewards, modes)

    def real(self) -> Real:
        """Samples of the first mixture."""
        points = self._first.sample(MAX_COMPARED, random_of(self.seed, "compared"))
        return Real(monomials(points), _SPACE)

    def recorded(self) -> RoundSignal:
        """There is none: people cannot see the samples."""
        raise ValueError("curation.preferences: a mixture has no records of people")

    def retrain(self, rewards: Tensor, signal: RoundSignal | None) -> dict[str, Any]:
        """Select, add samples of the first mixture, and refit."""
        options = self.options
        points, random = self._points(), random_of(self.seed, "selection")
        if self._job.curation.among == "class":
            raise ValueError("curation.among: a mixture is curated over the whole run")
        # Arms with real data select from the first ones, so that all arms begin with equal samples.
        count = options.num_curated * options.num_candidates
        selected, _ = curate(points[..., :count, :], rewards[..., :count], options.num_candidates, random)
        num_real = options.num_training - options.num_curated
        parts = [selected, self._first.sample(num_real, random)] if num_real else [selected]
        self._current = self._current.refit(torch.cat(parts, -2))
        self._number += 1
        return {"selected": selected.shape[-2]}

    def _points(self) -> Tensor:
        """[S, N, 2], independent draws whatever the mixtures."""
        options = self.options
        return self._current.sample(options.num_training * options.num_candidates, random_of(self.seed, "samples"))


def mixture_rounds(job: LoopSpec, arm: str, block: int) -> list[list[dict[str, Any]]]:
    """The measures of all rounds of the seeds of a block, `BLOCK` lists.

    A lane that an alarm stops has no later rounds.
    """
    torch.set_num_threads(1)
    generator = MixtureGenerator(job, arm, block)
    unit = Standardisation(torch.zeros(5, dtype=torch.float64), torch.ones(5, dtype=torch.float64))
    memory, lanes = Memory(unit), [list[dict[str, Any]]() for _ in range(BLOCK)]
    for number in range(job.rounds + 1):
        played = play_round(generator, job, arm, number, functools.partial(_given, memory), generator.seed)
        memory = played.memory or memory
        for lane, measures in zip(lanes, played.measures, strict=True):
            if not (lane and lane[-1]["stopped"]):
                lane.append(measures)
        if all(lane[-1]["stopped"] for lane in lanes):
            break
    return lanes


def _given(memory: Memory, samples: RoundSamples) -> Memory:
    return memory
