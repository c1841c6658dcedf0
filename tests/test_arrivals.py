"""Samples that have arrived: they are not moved, and cost no gradient. On small analytic models in float64."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.methods.boundary.guide import guide_to_boundary
from engine.methods.boundary.spec import BoundaryGuidanceSpec
from engine.methods.custom.guide import guide_by_criterion
from engine.methods.custom.spec import CustomGuidanceSpec
from engine.methods.guidance.arrivals import Arrivals
from engine.methods.guidance.guided import GuidedDenoiser
from engine.methods.risky.guide import guide_to_risk
from engine.methods.risky.spec import RiskyGuidanceSpec
from engine.methods.scores import kldb
from tests.guidance_scenes import scene_of
from tests.test_guidance import (
    latents_of,
    step_at,
    toy_conformity,
    toy_decode,
    toy_denoiser,
    toy_logits,
    toy_raw_conformity,
)

NUM_SAMPLES = 8
SPREAD = 12.0


class Counted:
    """A function of rows that notes how many it was called with, with a graph and without."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        self._function = function
        self.with_graph, self.without = list[int](), list[int]()

    def __call__(self, rows: Tensor, *more: Any) -> Tensor:
        (self.with_graph if torch.is_grad_enabled() else self.without).append(len(rows))
        return self._function(rows, *more)


class Guided:
    """A guided denoiser of eight samples that counts the rows of its network and of its decoder."""

    def __init__(self, guide: str, row_multiple: int | None, **options: Any) -> None:
        ensemble = options.pop("ensemble", "")
        denoiser = toy_denoiser(NUM_SAMPLES, scale=options.pop("guidance_scale", 3.0))
        self.network = denoiser._network = Counted(denoiser._network)
        self.decode = Counted(toy_decode)
        labels = [(row % 3, 3 + row % 2) for row in range(NUM_SAMPLES)]
        classes = labels if guide == "risky" else [(1, 3)] * NUM_SAMPLES
        scene = scene_of(
            classes, toy_logits, self.decode, toy_conformity, toy_raw_conformity, oracle_logits=other_logits
        )
        scene = dataclasses.replace(scene, row_multiple=row_multiple, **ENSEMBLES[ensemble])
        self.denoiser: GuidedDenoiser = GUIDES[guide](denoiser, options, scene)


def to_boundary(denoiser: Any, options: dict[str, Any], scene: Any) -> GuidedDenoiser:
    return guide_to_boundary(denoiser, BoundaryGuidanceSpec(**options), scene)


def to_risk(denoiser: Any, options: dict[str, Any], scene: Any) -> GuidedDenoiser:
    return guide_to_risk(denoiser, RiskyGuidanceSpec(**options), scene)


def to_criterion(denoiser: Any, options: dict[str, Any], scene: Any) -> GuidedDenoiser:
    subset = torch.tensor([1, 3])
    return guide_by_criterion(
        lambda images, rows: kldb(rows.logits(images), subset), denoiser, CustomGuidanceSpec(**options), scene
    )


def other_logits(images: Tensor) -> Tensor:
    """Of a second target, which is at the boundary elsewhere."""
    return toy_logits(images).roll(2, dims=1)


ENSEMBLES: dict[str, dict[str, Any]] = {"": {}} | {
    name: {"ensemble": name, "further_logits": (other_logits,)} for name in ("mean", "worst")
}
GUIDES = {"boundary": to_boundary, "risky": to_risk, "custom": to_criterion}
CASES = {
    "combined": ("boundary", {}),
    "combined-at-the-end": ("boundary", {"first_step": 38}),
    "detached": ("boundary", {"gradient": "detached"}),
    "unet": ("boundary", {"gradient": "unet"}),
    "unet-without-cfg": ("boundary", {"gradient": "unet", "guidance_scale": 1.0}),
    "norm": ("boundary", {"step": "norm", "preset": "perceptible"}),
    "risky": ("risky", {}),
    "risky-detached": ("risky", {"gradient": "detached"}),
    "floor": ("risky", {"conformity_floor": 0.0}),
    "oracle": ("risky", {"oracle_floor": 0.1}),
    "floors": ("risky", {"conformity_floor": 0.0, "oracle_floor": 0.1, "gradient": "detached"}),
    "custom": ("custom", {}),
    "mean": ("boundary", {"ensemble": "mean", "gradient": "unet"}),
    "worst": ("boundary", {"ensemble": "worst"}),
}


def median_distance(guide: str, options: dict[str, Any], latents: Tensor) -> float:
    """A tolerance that half of the samples are within."""
    made = Guided(guide, None, **options)
    prediction = made.denoiser.predict(latents, step_at())
    losses = made.denoiser.gradients(prediction, step_at())[0]
    return float(losses[0].median())


@pytest.mark.parametrize("case", CASES)
def test_rows_that_rest_change_nothing_for_the_others(case: str) -> None:
    """Three guided steps: half of the samples arrive, stay there or leave again, and every prediction is that of whole
    batches; the second step takes the gradient of no more rows than it needs."""
    guide, options = CASES[case]
    first, first_step = latents_of(NUM_SAMPLES) * SPREAD, options.get("first_step", 5)
    options = {key: value for key, value in options.items() if key != "first_step"} | {"tolerance": 0.0, "every": 1}
    tolerance = median_distance(guide, options, first)
    whole, parted = (Guided(guide, multiple, **options | {"tolerance": tolerance}) for multiple in (None, 2))
    # The same latents again: those that had arrived rest. Then others, where some have left.
    for number, latents in enumerate([first, first, first.flip(0)]):
        parted.decode.with_graph.clear(), parted.network.with_graph.clear(), parted.network.without.clear()
        expected, found = (made.denoiser(latents, step_at(index=first_step + number)) for made in (whole, parted))
        for name in ("output", "conditional", "latents"):
            assert torch.allclose(getattr(expected, name), getattr(found, name), rtol=1e-12, atol=1e-12), name
        if number == 1:
            num_moving = int((found.latents != latents).flatten(1).any(1).sum())
            assert 0 < num_moving < NUM_SAMPLES and sum(parted.decode.with_graph) <= num_moving + 1
            if parted.denoiser._is_through_unet(step_at(index=first_step + number)):
                assert parted.network.with_graph == parted.decode.with_graph
            # No row of either half is predicted twice.
            num_halves = 1 if options.get("guidance_scale") == 1.0 else 2
            assert sum(parted.network.with_graph + parted.network.without) == num_halves * NUM_SAMPLES
    for count in ("guided_steps", "zero", "nonfinite"):
        assert torch.equal(getattr(whole.denoiser.health, count), getattr(parted.denoiser.health, count))


def test_a_sample_at_its_target_and_below_the_floor_of_an_oracle_has_not_arrived() -> None:
    """It is moved until it has; one that is above the floor is not."""
    latents = latents_of(NUM_SAMPLES) * SPREAD
    made = Guided("risky", 2, oracle_floor=0.1, tolerance=10.0, target_risk=5.0, every=5)
    losses = made.denoiser.gradients(made.denoiser.predict(latents, step_at()), step_at())[0]
    assert not losses[0].any() and 0 < (losses[1] > 0).sum() < NUM_SAMPLES
    moved = made.denoiser(latents, step_at()).latents
    assert torch.equal((moved != latents).flatten(1).any(1), losses[1] > 0)


def test_all_samples_at_rest_take_no_gradient() -> None:
    """Nothing is differentiated while nobody leaves: the network is called as without guidance."""
    made = Guided("boundary", 2, gradient="unet", tolerance=10.0)
    latents = latents_of(NUM_SAMPLES)
    made.denoiser(latents, step_at())
    made.network.with_graph.clear(), made.decode.with_graph.clear(), made.network.without.clear()
    prediction = made.denoiser(latents, step_at(index=10))
    assert made.network.with_graph == made.decode.with_graph == []
    assert made.network.without == [2 * NUM_SAMPLES] and torch.equal(prediction.latents, latents)


@pytest.mark.parametrize("step", ["polyak", "norm", "paper"])
def test_a_sample_within_the_tolerance_is_not_moved(step: str) -> None:
    """Whatever the step rule; the others move as without a tolerance."""
    latents = latents_of(NUM_SAMPLES) * SPREAD
    tolerance = median_distance("boundary", {"step": step}, latents)
    free, bound = (Guided("boundary", None, step=step, every=5, **one) for one in ({}, {"tolerance": tolerance}))
    losses = free.denoiser.gradients(free.denoiser.predict(latents, step_at()), step_at())[0][0]
    moved, kept = (made.denoiser(latents, step_at()).latents for made in (free, bound))
    has_arrived = losses <= tolerance
    assert 0 < has_arrived.sum() < NUM_SAMPLES
    assert torch.equal(kept[has_arrived], latents[has_arrived])
    assert torch.equal(kept[~has_arrived], moved[~has_arrived])
    assert not torch.equal(moved[has_arrived], latents[has_arrived])
    assert torch.equal(bound.denoiser.health.guided_steps, (~has_arrived).long())


def test_rows_are_filled_up_to_the_multiple() -> None:
    """By rows that rest, each row in one of the two parts; without enough of them nobody rests."""
    arrivals = Arrivals(8, 4)
    assert [part.tolist() for part in arrivals.split()] == [list(range(8)), []]
    arrivals.note(torch.tensor([[0, 1, 0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 2, 0, 0]]))
    assert [part.tolist() for part in arrivals.split()] == [[1, 5, 0, 2], [3, 4, 6, 7]]
    arrivals.note(torch.tensor([[1, 1, 1, 1, 1, 0, 0, 0]]))
    assert [part.tolist() for part in arrivals.split()] == [list(range(8)), []]
    arrivals.note(torch.zeros(1, 8))
    assert [part.tolist() for part in arrivals.split()] == [[], list(range(8))]
    # Where all rows stay together nothing is read, which would wait for a GPU.
    together = Arrivals(8, None)
    together.note(torch.zeros(1, 8, device="meta"))
    assert not len(together.split()[1])
