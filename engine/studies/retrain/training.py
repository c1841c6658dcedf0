"""Fine-tuning in all arms and seeds, and whether each is right on each test image."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from engine.driver.progress import Display, duration
from engine.errors import JobError
from engine.methods.finiteness import LOGITS_FAULT, usable_logits
from engine.studies.retrain.accuracy import ACCEPTED, BEFORE, NONE
from engine.studies.retrain.finetune import Samples, choose_rows, fine_tune, predict
from engine.studies.retrain.image_tensors import ImageSet
from engine.studies.retrain.inputs import Material, Study
from engine.studies.retrain.options import RetrainOptions

Progress = Callable[[str, int], Callable[[], None]]


def train_arms(study: Study, material: Material, display: Display) -> tuple[dict[str, list[NDArray[np.bool_]]], Any]:
    """Fine-tune in all arms and seeds.

    Returns:
        By arm, and seed by seed, whether the prediction for each test image is right, [N]; and the network of arm
        `accepted` and the first seed.
    """
    options, network = study.options, material.target.network
    training, progress = (
        material.real.samples(material.num_classes),
        _progress(options, 1 + len(material.arms.pools), display),
    )
    right: dict[str, list[NDArray[np.bool_]]] = {BEFORE: [_right(network, material.test, BEFORE)]}
    kept = None
    for seed in range(options.num_seeds):
        for arm in (NONE, *material.arms.pools):
            trained = fine_tune(
                copy.deepcopy(network),
                training,
                _drawn(material, arm, seed),
                options.recipe,
                seed=seed,
                on_cpu=study.on_cpu,
                advance=progress(arm, seed),
            )
            right.setdefault(arm, []).append(_right(trained, material.test, f"{arm}, seed {seed + 1}"))
            kept = trained if (arm, seed) == (ACCEPTED, 0) else kept
    return right, kept


def _drawn(material: Material, arm: str, seed: int) -> Samples | None:
    """The generated samples of an arm: as many as the smallest pool has, drawn with the seed."""
    if arm == NONE:
        return None
    pool = material.arms.pools[arm]
    return material.generated.samples.take(pool[choose_rows(len(pool), material.arms.num_samples, seed)])


def _right(network: Any, images: ImageSet, arm: str) -> NDArray[np.bool_]:
    """Whether a network is right on each image.

    Raises:
        JobError: it gives values that are not finite.
    """
    return (finite_logits(network, images, f"--test (arm {arm})").argmax(1) == images.classes).numpy()


def finite_logits(network: Any, images: ImageSet, what: str) -> Tensor:
    """Logits [N, n] of a trained network.

    Args:
        what: the images, for messages.

    Raises:
        JobError: some are not finite.
    """
    logits = predict(network, images.pixels)
    if num := int((~usable_logits(logits)).sum()):
        raise JobError(
            f"--learning-rate: after training the network gives {LOGITS_FAULT} for {num} of {len(images)} images of"
            f" {what}; use a smaller one"
        )
    return logits


def _progress(options: RetrainOptions, num_arms: int, display: Display) -> Progress:
    """A function that gives, for an arm and a seed, the callback of every step."""
    total, done, started = num_arms * options.num_seeds * options.num_steps, 0, 0.0

    def of(arm: str, seed: int) -> Callable[[], None]:
        first = done

        def advance() -> None:
            nonlocal done, started
            done += 1
            # Measured from the end of the first step, which is slow.
            started = started or time.monotonic()
            text = f"arm {arm}, seed {seed + 1} of {options.num_seeds}, step {done - first}/{options.num_steps}"
            if done > 1:
                text += f", ETA {duration((time.monotonic() - started) / (done - 1) * (total - done))}"
            display.advance(text)

        return advance

    return of
