"""Hyperparameters of a fine-tuning of the generator. Without torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.errors import JobError

_COUNTS = ("num_steps", "batch_size", "checkpoint_every")


@dataclass(frozen=True, slots=True, kw_only=True)
class FineTuneRecipe:
    """How a generator is fine-tuned.

    Attributes:
        num_steps: steps of the optimizer.
        batch_size: samples of a step, curated and real together.
        learning_rate: the highest, at the end of the warm-up.
        lora_rank: rank of the updates of the attention projections; None trains the whole network.
        lora_alpha: an update counts `lora_alpha / lora_rank` times; None stands for the rank.
        curated_weight: lambda of the loop's mixture: curated samples have the weight lambda / (1 + lambda), real ones
            1 / (1 + lambda). It counts nothing where there are no real ones.
        empty_prompt_share: share of the samples that are trained without their condition, so that classifier-free
            guidance keeps an unconditional half.
        warm_up_share: share of the steps in which the learning rate grows; it falls as half a cosine afterwards.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        checkpoint_every: steps between two checkpoints; no result depends on it.

    Raises:
        JobError: values that are impossible, a line each.
    """

    num_steps: int = 60
    batch_size: int = 32
    learning_rate: float = 1e-4
    lora_rank: int | None = None
    lora_alpha: float | None = None
    curated_weight: float = 1.0
    empty_prompt_share: float = 0.1
    warm_up_share: float = 0.1
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    checkpoint_every: int = 100

    def __post_init__(self) -> None:
        problems = [
            f"training.{name}: {getattr(self, name)} is not positive; give 1 or more"
            for name in _COUNTS
            if getattr(self, name) < 1
        ]
        problems += [
            f"training.{name}: {value:g} is not a positive number; {remedy}"
            for name, value, remedy in (
                ("learning_rate", self.learning_rate, "give one such as 1e-4"),
                ("max_grad_norm", self.max_grad_norm, "give one such as 1"),
                ("lora_alpha", self._alpha, "leave it out, or give one such as the rank"),
            )
            if not (math.isfinite(value) and value > 0)
        ]
        problems += [
            f"training.{name}: {getattr(self, name):g} is not a share; give a number from 0 to below 1"
            for name in ("empty_prompt_share", "warm_up_share")
            if not 0 <= getattr(self, name) < 1
        ]
        problems += [
            f"training.{name}: {getattr(self, name):g} is not a number from 0 on; give one such as 1"
            for name in ("curated_weight", "weight_decay")
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0)
        ]
        if self.lora_rank is not None and self.lora_rank < 1:
            problems.append(
                f"training.lora_rank: {self.lora_rank} is no rank; give 1 or more, or leave it out to train the whole"
                " network"
            )
        if problems:
            raise JobError(problems)

    @property
    def curated_share(self) -> float:
        """Share of the curated samples, lambda / (1 + lambda)."""
        return self.curated_weight / (1 + self.curated_weight)

    @property
    def lora_scale(self) -> float:
        """What the updates of LoRA are multiplied by."""
        return self._alpha / self.lora_rank if self.lora_rank else 1.0

    @property
    def _alpha(self) -> float:
        return float(self.lora_rank or 1) if self.lora_alpha is None else self.lora_alpha

    def rate_at(self, step: int) -> float:
        """Learning rate of a step, `0 <= step < num_steps`: a linear warm-up, then half a cosine."""
        warm_up = int(self.warm_up_share * self.num_steps)
        if step < warm_up:
            return self.learning_rate * (step + 1) / warm_up
        progress = (step - warm_up) / (self.num_steps - warm_up)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
