"""Gradients slice by slice: the same as of the whole batch, with one image for all criteria of a slice."""

from __future__ import annotations

import pytest
import torch

from engine.methods.boundary.guide import guide_to_boundary
from engine.methods.boundary.spec import BoundaryGuidanceSpec
from engine.methods.custom.guide import guide_by_criterion
from engine.methods.custom.spec import CustomGuidanceSpec
from engine.methods.risky.guide import guide_to_risk
from engine.methods.risky.spec import RiskyGuidanceSpec
from engine.methods.sampling.denoiser import ClassifierFreeDenoiser, Condition, Step
from tests.guidance_scenes import scene_of

ROWS = 5
GENERATOR = torch.Generator().manual_seed(0)
WEIGHTS = torch.randn(12, 4, generator=GENERATOR, dtype=torch.float64)
LATENTS = torch.randn(ROWS, 3, 2, 2, generator=GENERATOR, dtype=torch.float64)
STEP = Step(index=5, total=40, timestep=torch.tensor(500.0), scale=0.8, sigma=0.6, normalise_input=False)


def logits(images):
    return (images.flatten(1) @ WEIGHTS).tanh()


def conformity(images, labels):
    """Of each sample to its own label."""
    return (images.flatten(1) @ WEIGHTS)[range(len(images)), labels] / 9


def denoiser():
    condition = Condition({"text": torch.zeros(ROWS, 1, dtype=torch.float64)})
    return ClassifierFreeDenoiser(
        lambda latents, timestep, condition: latents.sin() / 3,
        conditional=condition,
        unconditional=condition,
        prediction="epsilon",
        guidance_scale=1.0,
    )


def away_from_label(images, scene):
    """A criterion of a user that asks the scene for the labels of the rows that it is given."""
    assert len(images) == len(scene.labels) == len(scene.classes) == scene.num_samples
    return conformity(images, scene.labels).abs() + scene.labels + torch.tensor([len(one) for one in scene.classes])


GUIDES = {
    "boundary": lambda scene: guide_to_boundary(denoiser(), BoundaryGuidanceSpec(), scene),
    "detached": lambda scene: guide_to_boundary(denoiser(), BoundaryGuidanceSpec(gradient="detached"), scene),
    "unet": lambda scene: guide_to_boundary(denoiser(), BoundaryGuidanceSpec(gradient="unet"), scene),
    "risky": lambda scene: guide_to_risk(denoiser(), RiskyGuidanceSpec(conformity_floor=0.9), scene),
    "paper": lambda scene: guide_to_risk(denoiser(), RiskyGuidanceSpec(step="paper", conformity_weight=1.0), scene),
    "custom": lambda scene: guide_by_criterion(away_from_label, denoiser(), CustomGuidanceSpec(), scene),
}


@pytest.mark.parametrize("name", GUIDES)
@pytest.mark.parametrize("slice_rows", [1, 2, 4, 8])
def test_slices_change_neither_criteria_nor_gradients(name, slice_rows):
    """Every sample keeps its label: labels differ in each row, and so would a criterion of another row's."""
    classes = [(0, 1), (1, 2), (2, 3), (3, 0), (0, 2)]
    results, rows = [], []

    def decode(latents):
        rows.append(len(latents))
        return latents / 4 + 0.5

    for most in (None, slice_rows):
        rows.clear()
        guided = GUIDES[name](scene_of(classes, logits, decode, conformity, slice_rows=most))
        results.append(guided.gradients(guided.predict(LATENTS, STEP), STEP))
    # One image of each row, also where there are two criteria.
    assert sum(rows) == ROWS and max(rows) <= slice_rows
    for whole, sliced in zip(*results, strict=True):
        assert torch.allclose(whole, sliced, rtol=1e-12, atol=1e-14) and whole.shape[1] == ROWS
        assert (whole != 0).flatten(2).any(2).all() if whole.ndim > 2 else whole.unique().numel() > 1


def test_a_graph_ends_with_its_slice():
    """What the memory holds is the graph of one slice: an image is gone before the next is decoded."""
    alive, most_alive = set(), []

    class Watched(torch.autograd.Function):
        """Notes when the graph that holds it is freed."""

        @staticmethod
        def forward(context, latents):
            token = Token()
            context.token = token
            return latents / 4 + 0.5

        @staticmethod
        def backward(context, gradient):
            return gradient / 4

    class Token:
        def __init__(self):
            alive.add(id(self))
            most_alive.append(len(alive))

        def __del__(self):
            alive.discard(id(self))

    scene = scene_of([(0, 1)] * ROWS, logits, Watched.apply, conformity, slice_rows=1)
    guided = guide_to_risk(denoiser(), RiskyGuidanceSpec(conformity_floor=0.9), scene)
    guided.gradients(guided.predict(LATENTS, STEP), STEP)
    assert most_alive == [1] * ROWS and not alive
