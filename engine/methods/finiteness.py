"""Which rows of a model's output can be scored.

A row that cannot is never read as a class: the sample fails, and its message names the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.methods.scores import at_least_float32

# Below it a cosine is not that of the embedding: torch divides by this length instead.
MIN_LENGTH = 1e-8
LOGITS_FAULT = "logits that are not finite, or too large for a softmax in float32"
EMBEDS_FAULT = "an image embedding that is not finite or has no direction"


def usable_logits(logits: Tensor) -> Tensor:
    """Whether every score of logits [B, n] is finite, [B] booleans: no NaN, no infinity, no overflow in the softmax."""
    return torch.log_softmax(at_least_float32(logits), -1).sum(-1).isfinite()


def usable_embeds(embeds: Tensor) -> Tensor:
    """Whether embeddings [B, d] have a cosine with others, [B] booleans: finite, of a finite length above zero."""
    lengths = torch.linalg.vector_norm(at_least_float32(embeds), dim=-1)
    return lengths.isfinite() & (lengths >= MIN_LENGTH)


class Faults:
    """Why the rows of a batch cannot be scored: by row, the models that gave unusable values, with their roles.

    Args:
        num_rows: B.
    """

    def __init__(self, num_rows: int) -> None:
        self._texts: list[list[str]] = [[] for _ in range(num_rows)]

    def check_logits(self, logits: Tensor, role: str, address: str) -> None:
        """Record the rows of logits [B, n] that have no scores."""
        self._note(usable_logits(logits), f"{role} '{address}' gives {LOGITS_FAULT}")

    def check_embeds(self, embeds: Tensor, role: str, address: str) -> None:
        """Record the rows of image embeddings [B, d] that have no cosine."""
        self._note(usable_embeds(embeds), f"{role} '{address}' gives {EMBEDS_FAULT}")

    def __getitem__(self, row: int) -> str:
        """The faults of a row; empty without any."""
        return "; ".join(self._texts[row])

    def _note(self, usable: Tensor, text: str) -> None:
        for texts, is_usable in zip(self._texts, usable.tolist(), strict=True):
            if not is_usable:
                texts.append(text)
