"""Keeping what a network could: distillation toward the old one, and arithmetic with the weights of both."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div

# Below it a variance counts as zero.
LEAST_VARIANCE = 1e-12


@dataclass(frozen=True, slots=True, eq=False)
class Distillation:
    """An added loss: `strength` times the mean Kullback-Leibler divergence from the old predictions to the new ones.

    It is in nats, at the networks' own temperature.
    """

    old: Any
    strength: float

    def loss(self, pixels: Tensor, logits: Tensor) -> Tensor:
        """The loss for images [B, 3, h, w] that the new network gives logits [B, n]."""
        with torch.no_grad():
            wanted = self.old(pixels).float().log_softmax(1)
        divergence: Tensor = kl_div(logits.log_softmax(1), wanted, log_target=True, reduction="batchmean")
        return self.strength * divergence


@torch.no_grad()
def combine(old: nn.Module, new: nn.Module, base: nn.Module, strength: float) -> Any:
    """`new` with weights `old + strength (new - base)`; three networks of one architecture.

    Averages of batch normalisation are combined as weights are; its variances, which must stay positive, by their
    logarithms. What is no floating point number, such as a number of batches, stays that of `new`. Where `new` equals
    `base` the result is `old`, exactly.
    """
    variances = {
        f"{name}.running_var" if name else "running_var"
        for name, module in new.named_modules()
        if isinstance(getattr(module, "running_var", None), Tensor)
    }
    ours, trained, other = old.state_dict(), new.state_dict(), base.state_dict()
    combined = {}
    for name, tensor in trained.items():
        if not tensor.is_floating_point():
            continue
        if name in variances:
            ratio = tensor.clamp_min(LEAST_VARIANCE) / other[name].clamp_min(LEAST_VARIANCE)
            combined[name] = ours[name] * ratio**strength
        else:
            combined[name] = ours[name] + strength * (tensor - other[name])
    for name, value in combined.items():
        trained[name].copy_(value)
    return new
