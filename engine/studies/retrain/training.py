"""Fine-tuning in all arms and seeds, and whether each is right on each test image."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.driver.progress import Display, duration
from engine.errors import JobError
from engine.methods.finiteness import LOGITS_FAULT, usable_logits
from engine.studies.retrain.accuracy import ACCEPTED, BEFORE, NONE
from engine.studies.retrain.finetune import Samples, choose_rows, fine_tune, predict
from engine.studies.retrain.inputs import Material, Study
from engine.studies.retrain.options import RetrainOptions

Progress = Callable[[str, int], Callable[[], None]]


@dataclass(slots=True, eq=False)
class Tested:
    """By arm, and seed by seed, whether the prediction for each image is right, [N]; of `before` once.

    Attributes:
        right: of the test images.
        held_out: of the generated samples that are held out of training; empty where there are none.
    """

    right: dict[str, list[NDArray[np.bool_]]] = field(default_factory=dict)
    held_out: dict[str, list[NDArray[np.bool_]]] = field(default_factory=dict)

    def add(self, arm: str, network: Any, material: Material, what: str) -> None:
        """Test a network.

        Raises:
            JobError: it gives values that are not finite.
        """
        logits = finite_logits(network, material.test.pixels, f"images of --test (arm {what})")
        self.right.setdefault(arm, []).append((logits.argmax(1) == material.test.classes).numpy())
        if len(rows := material.arms.held_out):
            logits = finite_logits(network, material.generated.samples.pixels[rows], f"held-out samples (arm {what})")
            classes = torch.tensor(material.generated.classes)[rows]
            self.held_out.setdefault(arm, []).append((logits.argmax(1) == classes).numpy())


def train_arms(study: Study, material: Material, display: Display) -> tuple[Tested, Any]:
    """Fine-tune in all arms and seeds.

    Returns:
        What each is right on, and the network of arm `accepted` and the first seed.
    """
    options, network = study.options, material.target.network
    training, progress = (
        material.real.samples(material.num_classes),
        _progress(options, 1 + len(material.arms.pools), display),
    )
    tested, kept = Tested(), None
    tested.add(BEFORE, network, material, BEFORE)
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
            tested.add(arm, trained, material, f"{arm}, seed {seed + 1}")
            kept = trained if (arm, seed) == (ACCEPTED, 0) else kept
    return tested, kept


def _drawn(material: Material, arm: str, seed: int) -> Samples | None:
    """The generated samples of an arm: as many as the smallest pool has, drawn with the seed."""
    if arm == NONE:
        return None
    pool = material.arms.pools[arm]
    return material.generated.samples.take(pool[choose_rows(len(pool), material.arms.num_samples, seed)])


def finite_logits(network: Any, pixels: Tensor, what: str) -> Tensor:
    """Logits [N, n] of a trained network for preprocessed images [N, 3, h, w].

    Args:
        what: the images, for messages.

    Raises:
        JobError: some are not finite.
    """
    logits = predict(network, pixels)
    if num := int((~usable_logits(logits)).sum()):
        raise JobError(
            f"--learning-rate: after training the network gives {LOGITS_FAULT} for {num} of {len(pixels)} {what}; use a"
            " smaller one"
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
