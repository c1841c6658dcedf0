"""Fine-tuning against a loop of plain torch: optimiser, schedule, clipping, batches and seeds."""

from __future__ import annotations

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from engine.errors import JobError
from engine.studies.retrain.finetune import Recipe, Samples, _batches, choose_rows, fine_tune, predict

RECIPE = Recipe(num_steps=20, batch_size=8, num_generated=3, learning_rate=0.05)


class Network(nn.Module):
    """A linear classifier with dropout and the call of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(12, 4)
        self.dropout = nn.Dropout(0.2)

    def forward(self, pixels: Tensor) -> Tensor:
        return self.linear(self.dropout(pixels.flatten(1)))


def samples(number: int, seed: int, scale: float = 2.0) -> Samples:
    """So large that gradients of some steps are clipped: AdamW does not notice a factor that all steps share."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.softmax(torch.randn(number, 4, generator=generator), 1)
    return Samples(scale * torch.randn(number, 3, 2, 2, generator=generator), targets)


@pytest.fixture
def network() -> Network:
    torch.manual_seed(0)
    return Network()


def reference(network: Network, real: Samples, generated: Samples | None, seed: int) -> Network:
    """AdamW, two steps of warm-up, half a cosine, gradients of norm one at most, cross entropy with soft targets."""
    network = copy.deepcopy(network).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=RECIPE.learning_rate)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step, batch in enumerate(_batches(real, generated, RECIPE, seed)):
            rate = step / 2 if step < 2 else 0.5 * (1 + math.cos(math.pi * (step - 2) / 18))
            optimizer.param_groups[0]["lr"] = RECIPE.learning_rate * rate
            logits = network(batch.pixels)
            loss = -(batch.targets * torch.log_softmax(logits, 1)).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
    return network


@pytest.mark.parametrize("with_generated", [True, False])
def test_training_is_that_of_its_description(network, with_generated):
    """Weights after twenty steps; progress is reported for each, and the caller's random numbers are left alone."""
    real, generated = samples(21, 1), samples(9, 2) if with_generated else None
    expected, steps = reference(network, real, generated, seed=5), []
    torch.manual_seed(11)
    before = torch.random.get_rng_state()
    trained = fine_tune(network, real, generated, RECIPE, seed=5, on_cpu=True, advance=lambda: steps.append(0))
    assert torch.equal(torch.random.get_rng_state(), before) and len(steps) == 20 and not trained.training
    for ours, theirs in zip(trained.parameters(), expected.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)
    other = reference(network, real, generated, seed=6)
    assert not torch.allclose(other.linear.weight, expected.linear.weight, atol=1e-3)


def test_a_loss_that_is_not_finite_is_refused(network):
    real = samples(10, 1)
    real.pixels[3] = torch.inf
    with pytest.raises(JobError, match=r"--learning-rate: 0\.05 makes the loss grow"):
        fine_tune(network, real, None, RECIPE, seed=0, on_cpu=True, advance=lambda: None)


def test_predictions_do_not_depend_on_their_blocks(network, monkeypatch):
    """Raw logits, in the order of the images."""
    pixels = samples(23, 4).pixels
    network.eval()
    with torch.no_grad():
        expected = network(pixels)
    monkeypatch.setattr("engine.studies.retrain.finetune.PREDICT_ROWS", 5)
    assert torch.allclose(predict(network, pixels), expected, atol=1e-5)


def test_generated_samples_are_drawn_apart_from_real_ones():
    """Streams of a seed differ, so that neither choice says anything about another."""
    choices = choose_rows(100, 100, 3).numpy()
    assert sorted(choices) == list(range(100))
    assert not np.array_equal(choices, np.random.default_rng(3).permutation(100))
    recipe = Recipe(num_steps=1, batch_size=80, num_generated=40, learning_rate=1.0)
    ramp = Samples(torch.arange(40.0)[:, None], torch.zeros(40, 1))
    [batch] = _batches(ramp, ramp, recipe, 3)
    first, second = batch.pixels[:40, 0], batch.pixels[40:, 0]
    assert sorted(first.tolist()) == sorted(second.tolist()) and not torch.equal(first, second)


@given(st.integers(1, 30), st.integers(2, 12), st.data())
@settings(max_examples=30, deadline=None)
def test_arms_of_a_seed_share_their_real_batches(num_generated_samples, batch_size, data):
    """The generated samples take the end of each batch, whatever the arm; none comes twice before all came once."""
    num_generated = data.draw(st.integers(1, batch_size - 1))
    recipe = Recipe(num_steps=6, batch_size=batch_size, num_generated=num_generated, learning_rate=1.0)
    real = Samples(torch.arange(25.0)[:, None], torch.zeros(25, 1))
    generated = Samples(-1 - torch.arange(float(num_generated_samples))[:, None], torch.ones(num_generated_samples, 1))
    alone, mixed = (list(_batches(real, other, recipe, 3)) for other in (None, generated))
    assert [len(batch) for batch in alone + mixed] == [batch_size] * 12
    cut = batch_size - num_generated
    for ours, theirs in zip(alone, mixed, strict=True):
        assert torch.equal(ours.pixels[:cut], theirs.pixels[:cut])
        assert torch.equal(theirs.targets[:, 0], (theirs.pixels[:, 0] < 0).float())
    drawn = torch.cat([batch.pixels[cut:, 0] for batch in mixed])
    counts = torch.bincount((-1 - drawn).long(), minlength=num_generated_samples)
    assert counts.max() - counts.min() <= 1


def test_rows_are_chosen_without_replacement():
    """Equal seeds choose equally, others otherwise."""
    chosen = choose_rows(50, 20, 1)
    assert len(set(chosen.tolist())) == 20 and torch.equal(chosen, choose_rows(50, 20, 1))
    assert not torch.equal(chosen, choose_rows(50, 20, 2))
