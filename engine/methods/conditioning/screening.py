"""Screened embeddings: drawn from a class's distribution until the error predictor expects an error.

RiskyDiff (Yu et al., AAAI 2026): draw `c ~ N(mu_y, diag(sigma_y^2))`, keep it when g_phi predicts an error with a
confidence above 0.5. Here the number of draws is bounded, and a sample without a draw that passes is marked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from engine.methods.conditioning.distributions import ClassDistributions
from engine.methods.conditioning.seeds import derived_seed


class ErrorConfidence(Protocol):
    """What screening needs of a predictor."""

    def confidence(self, embeds: Tensor) -> Tensor:
        """Probability [B] that the target errs, for embeddings [B, d], each independent of the other rows."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ScreenedDraw:
    """The embedding that conditions a sample.

    Attributes:
        embedding: [d], float32.
        screened: whether the predictor expects an error with a confidence above the threshold.
        num_draws: draws made to find it.
        confidence: the predictor's, of this embedding.
    """

    embedding: Tensor
    screened: bool
    num_draws: int
    confidence: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ScreeningOptions:
    """How draws are screened.

    Attributes:
        threshold: confidence that a draw must exceed, in [0, 1).
        max_draws: draws for a sample, at most.
        chunk_size: draws that the predictor takes in one call; affects the speed only.
    """

    threshold: float = 0.5
    max_draws: int = 256
    chunk_size: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.threshold < 1:
            raise ValueError(f"threshold: {self.threshold} is not in [0, 1); no draw could exceed it, or all would")
        if self.max_draws < 1 or self.chunk_size < 1:
            raise ValueError(f"max_draws: {self.max_draws}, chunk_size: {self.chunk_size}; both must be at least 1")


def screen(
    distributions: ClassDistributions,
    predictor: ErrorConfidence,
    class_index: int,
    seed: int,
    options: ScreeningOptions | None = None,
) -> ScreenedDraw:
    """The first draw of a sample that passes; without one, the draw of the highest confidence, `screened=False`.

    A pure function of its arguments, independent of the other samples of a batch.

    Args:
        distributions: of the embeddings.
        predictor: of errors of the target.
        class_index: the conditioned class y.
        seed: the sample's own.
        options: `ScreeningOptions()` where not given.

    Raises:
        ValueError: the class has no distribution; the message names it.
    """
    options = options or ScreeningOptions()
    generator = embedding_generator(seed)
    best: ScreenedDraw | None = None
    for start in range(0, options.max_draws, options.chunk_size):
        size = min(options.chunk_size, options.max_draws - start)
        draws = torch.stack([distributions.draw(class_index, generator) for _ in range(size)])
        draw = _best_of(draws, predictor.confidence(draws), start, options)
        if draw.screened:
            return draw
        best = draw if best is None or draw.confidence > best.confidence else best
    assert best is not None
    return best


def _best_of(draws: Tensor, confidence: Tensor, start: int, options: ScreeningOptions) -> ScreenedDraw:
    """The first of some draws [n, d] that passes, or the one of the highest confidence [n].

    Args:
        start: draws made before these.
    """
    passed = (confidence > options.threshold).nonzero()[:, 0].tolist()
    row = passed[0] if passed else int(confidence.argmax())
    return ScreenedDraw(
        embedding=draws[row].clone(),
        screened=bool(passed),
        num_draws=start + row + 1 if passed else options.max_draws,
        confidence=float(confidence[row]),
    )


def unscreened(distributions: ClassDistributions, class_index: int, seed: int) -> Tensor:
    """A sample's first draw [d], without a predictor: the ablation without screening.

    Raises:
        ValueError: the class has no distribution; the message names it.
    """
    return distributions.draw(class_index, embedding_generator(seed))


def embedding_generator(seed: int) -> torch.Generator:
    """The generator of a sample's embeddings: seeded by the sample, another stream than its initial noise."""
    return torch.Generator("cpu").manual_seed(derived_seed(seed, "embedding"))
