"""Fine-tuning of a classifier on real samples, mixed with generated ones batch by batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from engine.errors import JobError
from engine.models.kernels import full_float32
from engine.studies.retrain.protection import Distillation

WARM_UP_SHARE = 0.1
MAX_GRAD_NORM = 1.0
PREDICT_ROWS = 256
# Streams of random numbers of a seed.
REAL_STREAM, GENERATED_STREAM, CHOICE_STREAM, CHANGE_STREAM = range(4)


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """N samples as a network takes them: `pixels` [N, 3, h, w] preprocessed, `targets` [N, n] distributions."""

    pixels: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.pixels)

    def take(self, rows: Tensor) -> Samples:
        """The given rows."""
        return Samples(self.pixels[rows], self.targets[rows])

    def to(self, device: torch.device) -> Samples:
        """The same on a device."""
        return Samples(self.pixels.to(device), self.targets.to(device))


# From the network in training mode, a batch and random numbers to the batch that it is trained on.
BatchChange = Callable[[Any, Samples, np.random.Generator], Samples]


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Hyperparameters of a fine-tuning.

    Attributes:
        num_generated: generated samples in each batch, where there are any.
    """

    num_steps: int
    batch_size: int
    num_generated: int
    learning_rate: float


def fine_tune(
    network: Any,
    real: Samples,
    generated: Samples | None,
    recipe: Recipe,
    *,
    seed: int,
    on_cpu: bool,
    advance: Callable[[], None],
    change: BatchChange | None = None,
    distillation: Distillation | None = None,
) -> Any:
    """Train a network in place, and return it in evaluation mode.

    AdamW, cosine decay after a warm-up, gradients clipped by their norm. Batches of one seed hold the same real
    samples in the same order, whatever is generated: generated ones replace those at the end of each batch.

    Args:
        network: from images [B, 3, h, w] to logits [B, n], on any device; its parameters that require gradients
            are trained.
        generated: None for real samples alone.
        on_cpu: whether to train on the CPU even where there is a GPU.
        advance: called after every step.
        change: of every batch, where nothing is generated.
        distillation: toward an old network on the same device, on the real images of a batch, unchanged.

    Raises:
        JobError: the loss is not finite.
    """
    from accelerate import Accelerator
    from transformers.optimization import get_cosine_schedule_with_warmup

    weights = [weight for weight in network.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate)
    warm_up = int(WARM_UP_SHARE * recipe.num_steps)
    schedule = get_cosine_schedule_with_warmup(optimizer, warm_up, recipe.num_steps)
    accelerator = Accelerator(cpu=on_cpu, mixed_precision="no")
    model, optimizer, schedule = accelerator.prepare(network.train(), optimizer, schedule)
    total_loss = torch.zeros((), device=accelerator.device)
    num_real = recipe.batch_size - (0 if generated is None else recipe.num_generated)
    rng = _stream(seed, CHANGE_STREAM)
    # Dropout and similar layers draw from the global stream, which is restored afterwards.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for batch in _batches(real, generated, recipe, seed):
            batch = batch.to(accelerator.device)
            given = change(model, batch, rng) if change else batch
            logits = model(given.pixels).float()
            loss = cross_entropy(logits, given.targets)
            if distillation:
                pixels = batch.pixels[:num_real]
                loss = loss + distillation.loss(pixels, model(pixels).float() if change else logits[:num_real])
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), MAX_GRAD_NORM)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            total_loss += loss.detach()
            advance()
    trained = accelerator.unwrap_model(model).eval()
    if accelerator.device.type != "cpu":
        # Frees the states of the optimizer by a garbage collection, which is too slow where memory is plenty.
        accelerator.free_memory()
    if not math.isfinite(float(total_loss)):
        raise JobError(
            f"--learning-rate: {recipe.learning_rate:g} makes the loss grow beyond all numbers; use a smaller one"
        )
    return trained


def training_device(on_cpu: bool) -> torch.device:
    """Where networks are trained."""
    from accelerate import Accelerator

    return Accelerator(cpu=on_cpu).device


@torch.no_grad()
def predict(network: Any, pixels: Tensor) -> Tensor:
    """Logits [N, n] of preprocessed images, on the CPU, not divided by any temperature."""
    device = next(network.parameters()).device
    with full_float32(str(device)):
        return torch.cat([network(part.to(device)).float().cpu() for part in pixels.split(PREDICT_ROWS)])


def choose_rows(num_rows: int, count: int, seed: int) -> Tensor:
    """`count` of `num_rows` rows, drawn without replacement."""
    return torch.from_numpy(_stream(seed, CHOICE_STREAM).permutation(num_rows)[:count])


def _batches(real: Samples, generated: Samples | None, recipe: Recipe, seed: int) -> Iterator[Samples]:
    """The batches of a training."""
    of_real = _row_batches(len(real), recipe.batch_size, _stream(seed, REAL_STREAM))
    if generated is None:
        yield from (real.take(next(of_real)) for _ in range(recipe.num_steps))
        return
    of_generated = _row_batches(len(generated), recipe.num_generated, _stream(seed, GENERATED_STREAM))
    num_real = recipe.batch_size - recipe.num_generated
    for _ in range(recipe.num_steps):
        first, second = real.take(next(of_real)[:num_real]), generated.take(next(of_generated))
        yield Samples(torch.cat([first.pixels, second.pixels]), torch.cat([first.targets, second.targets]))


def _row_batches(num_rows: int, batch_size: int, rng: np.random.Generator) -> Iterator[Tensor]:
    """Rows batch by batch without end, in shuffled rounds over all rows."""
    waiting = np.empty(0, dtype=np.int64)
    while True:
        while len(waiting) < batch_size:
            waiting = np.concatenate([waiting, rng.permutation(num_rows)])
        yield torch.from_numpy(waiting[:batch_size])
        waiting = waiting[batch_size:]


def _stream(seed: int, stream: int) -> np.random.Generator:
    return np.random.default_rng([seed, stream])
