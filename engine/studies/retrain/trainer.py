"""Training of a network in an arm with a seed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor

from engine.studies.retrain.arm_records import ARITHMETIC, AUGMENT, AVERAGE, DISTILL, NONE, PGD, Protection, parse_arm
from engine.studies.retrain.batch_changes import Attack, Augmentation
from engine.studies.retrain.finetune import BatchChange, Recipe, Samples, fine_tune
from engine.studies.retrain.protection import Distillation, combine


def _nothing() -> None:
    """For callers that show no progress."""


@dataclass(slots=True, eq=False, kw_only=True)
class ArmTrainer:
    """Trains copies of a network, all with equal steps and batches.

    Attributes:
        network: the old one, in evaluation mode; it is never changed, and protection is toward it.
        real: the real images.
        bounds: values of black and of white in the network's input, each [1, 3, 1, 1], as
            `engine.models.preprocessing.Preprocessing.bounds`.
        on_cpu: whether to train on the CPU even where there is a GPU.
    """

    network: Any
    real: Samples
    recipe: Recipe
    bounds: tuple[Tensor, Tensor]
    protection: Protection = field(default_factory=Protection)
    augmentation: Augmentation = field(default_factory=Augmentation)
    attack: Attack = field(default_factory=Attack)
    on_cpu: bool = True
    _alone: dict[int, Any] = field(default_factory=dict, init=False)

    def train(self, arm: str, generated: Samples | None, *, seed: int, advance: Callable[[], None] = _nothing) -> Any:
        """A trained and protected copy of the network, in evaluation mode.

        Args:
            arm: as `parse_arm` takes it.
            generated: the samples of the arm; None for real images alone.
            advance: called after every step.

        Raises:
            JobError: the loss is not finite.
        """
        record = parse_arm(arm).record
        if self.protection.kind == ARITHMETIC:
            # The base is trained with the same seed, thus on the same real images in the same order.
            alone = self._trained_alone(seed, advance if record.name == NONE else _nothing)
            trained = (
                copy.deepcopy(alone) if record.name == NONE else self._tuned(record.images, generated, seed, advance)
            )
            return combine(self.network, trained, alone, self.protection.used)
        trained = self._tuned(record.images, generated, seed, advance)
        if self.protection.kind == AVERAGE:
            return combine(self.network, trained, self.network, self.protection.used)
        return trained

    def _trained_alone(self, seed: int, advance: Callable[[], None]) -> Any:
        """The network fine-tuned on real images alone; that of the last seed is kept."""
        if seed not in self._alone:
            self._alone = {seed: self._tuned("", None, seed, advance)}
        return self._alone[seed]

    def _tuned(self, images: str, generated: Samples | None, seed: int, advance: Callable[[], None]) -> Any:
        return fine_tune(
            copy.deepcopy(self.network),
            self.real,
            generated,
            self.recipe,
            seed=seed,
            on_cpu=self.on_cpu,
            advance=advance,
            change=self._change(images),
            distillation=self._distillation(),
        )

    def _change(self, images: str) -> BatchChange | None:
        """What is done to a batch of real images."""
        if images == AUGMENT:
            return lambda network, batch, rng: self.augmentation.of(batch, rng)
        if images == PGD:
            return partial(self.attack.of, self.bounds)
        return None

    def _distillation(self) -> Distillation | None:
        if self.protection.kind == DISTILL:
            return Distillation(self.network, self.protection.used)
        return None
