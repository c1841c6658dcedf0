"""The options of a retraining."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.errors import JobError
from engine.studies.retrain.arm_records import DEFAULT_ARMS, PROTECT_NOTHING, Protection, parse_arm
from engine.studies.retrain.batch_changes import PGD_EPS, PGD_STEPS, Attack, Augmentation
from engine.studies.retrain.finetune import Recipe

MAX_BATCH = 65_536
MAX_HELD_OUT = 0.9
MAX_SEEDS, MAX_STEPS = 1000, 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrainOptions:
    """The options of `riskforge retrain`.

    Attributes:
        real, test: images to train and to test on, as `engine.data.images.open_images` takes them.
        plain, risky: names of requests; where empty, `choose_arms` chooses them.
        mix: share of each batch that is generated, where something is.
        labels: `hard` for the class of a generated sample, `soft` for its `soft_label`.
        calibrate: images for fitting the model's temperature, which neither it nor the target was trained on; without
            them the target's temperature is kept.
        held_out: share of the accepted samples that no network is trained on, and that are tested; 0 for none.
        arms: what to compare with fine-tuning on real images alone, as `parse_arm` takes them.
        protect, protect_weight: how to keep what the target could, as in `Protection`, for all arms alike.
        flips: whether the arm `augment` mirrors images.
        pgd_eps, pgd_steps: of the attack of the arm `pgd`.
    """

    real: str
    test: str
    calibrate: str | None = None
    plain: tuple[str, ...] = ()
    risky: tuple[str, ...] = ()
    num_seeds: int = 5
    num_steps: int = 200
    mix: float = 0.2
    labels: str = "hard"
    batch_size: int = 64
    learning_rate: float = 3e-4
    held_out: float = 0.2
    arms: tuple[str, ...] = DEFAULT_ARMS
    protect: str = PROTECT_NOTHING
    protect_weight: float | None = None
    flips: bool = False
    pgd_eps: float = PGD_EPS
    pgd_steps: int = PGD_STEPS

    @property
    def protection(self) -> Protection:
        """How what the target could is kept."""
        return Protection(kind=self.protect, strength=self.protect_weight)

    @property
    def augmentation(self) -> Augmentation:
        """What the arm `augment` does."""
        return Augmentation(flips=self.flips)

    @property
    def attack(self) -> Attack:
        """What the arm `pgd` does."""
        return Attack(eps=self.pgd_eps, num_steps=self.pgd_steps)

    @property
    def recipe(self) -> Recipe:
        """How a network is fine-tuned."""
        return Recipe(
            num_steps=self.num_steps,
            batch_size=self.batch_size,
            num_generated=round(self.mix * self.batch_size),
            learning_rate=self.learning_rate,
        )

    def check(self) -> None:
        """Check the values.

        Raises:
            JobError: all problems, a line each.
        """
        problems = []
        if self.num_seeds < 2:
            problems.append(f"--seeds: {self.num_seeds} is too few, intervals are over seeds; give 2 or more")
        elif self.num_seeds > MAX_SEEDS:
            problems.append(f"--seeds: {self.num_seeds} is too many; give {MAX_SEEDS} or fewer")
        if self.num_steps < 1:
            problems.append(f"--steps: {self.num_steps} trains nothing; give 1 or more")
        elif self.num_steps > MAX_STEPS:
            problems.append(f"--steps: {self.num_steps} is too many; give {MAX_STEPS} or fewer")
        if not 2 <= self.batch_size <= MAX_BATCH:
            problems.append(f"--batch-size: {self.batch_size} is not between 2 and {MAX_BATCH}")
        elif not 0 < self.mix < 1:
            problems.append(f"--mix: {self.mix:g} is not between 0 and 1; give the generated share of a batch, as 0.5")
        elif not 0 < self.recipe.num_generated < self.batch_size:
            problems.append(
                f"--mix: {self.mix:g} of a batch of {self.batch_size} leaves {self.recipe.num_generated} generated"
                " images in it; give another share, or a larger --batch-size"
            )
        if not 0 <= self.held_out <= MAX_HELD_OUT:
            problems.append(
                f"--held-out: {self.held_out:g} is not between 0 and {MAX_HELD_OUT:g}; give the share of the accepted"
                " samples to test on, or 0 for none"
            )
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            problems.append(f"--learning-rate: {self.learning_rate:g} is not a positive number; give one, as 0.001")
        for arm in self.arms:
            try:
                parse_arm(arm)
            except JobError as error:
                problems += error.problems
        problems += self.protection.problems() + self.attack.problems()
        if problems:
            raise JobError(problems)
