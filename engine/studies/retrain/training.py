"""Fine-tuning in all arms and seeds, and whether each is right on each test image."""

from __future__ import annotations

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
from engine.studies.retrain.arm_records import BEFORE
from engine.studies.retrain.arms import draw_samples
from engine.studies.retrain.finetune import predict
from engine.studies.retrain.inputs import Material, Study
from engine.studies.retrain.options import RetrainOptions
from engine.studies.retrain.trainer import ArmTrainer

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
        What each is right on, and the network of the main arm and the first seed.
    """
    options, arms = study.options, material.arms
    trainer, progress = _trainer(study, material), _progress(options, len(arms.names), display)
    tested, kept = Tested(), None
    tested.add(BEFORE, trainer.network, material, BEFORE)
    for seed in range(options.num_seeds):
        for arm in arms.names:
            generated = draw_samples(material.generated, arms, arm, seed)
            trained = trainer.train(arm, generated, seed=seed, advance=progress(arm, seed))
            tested.add(arm, trained, material, f"{arm}, seed {seed + 1}")
            kept = trained if (arm, seed) == (arms.main, 0) else kept
    return tested, kept


def _trainer(study: Study, material: Material) -> ArmTrainer:
    options = study.options
    return ArmTrainer(
        network=material.target.network,
        real=material.real.samples(material.num_classes),
        recipe=options.recipe,
        bounds=material.target.preprocessing.bounds,
        protection=options.protection,
        augmentation=options.augmentation,
        attack=options.attack,
        on_cpu=study.on_cpu,
    )


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
