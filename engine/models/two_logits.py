"""Binary heads: a single logit z is read as the two logits [0, z], whose softmax is [1 - sigmoid(z), sigmoid(z)].

Legend: B samples, n classes, h x w the network's input.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def paired(output: Any, num_classes: int) -> Any:
    """Logits [B, 2] of a single logit [B, 1] or [B] of two classes; whatever else is left as it is."""
    if num_classes != 2 or not isinstance(output, Tensor):
        return output
    if output.ndim == 2 and output.shape[1] == 1:
        output = output[:, 0]
    # Multiplied, so that a logit that is not finite leaves none that is.
    return torch.stack([0 * output, output], 1) if output.ndim == 1 else output


class Paired(nn.Module):
    """A network with one logit, as one with two.

    Attributes:
        inner: from images [B, 3, h, w] to a logit [B, 1] or [B].
    """

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B, 2] of images [B, 3, h, w]."""
        logits: Tensor = paired(self.inner(pixels), 2)
        return logits
