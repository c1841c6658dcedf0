"""Screened embeddings: drawn from a class's distribution until the error predictor expects an error.

RiskyDiff (Yu et al., AAAI 2026): draw `c ~ N(mu_y, diag(sigma_y^2))`, keep it when g_phi says error with confidence
above 0.5. Draws are bounded here, and a draw that did not pass is marked.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.conditioning.distributions import ClassDistributions
from engine.conditioning.embeddings import check_kind, derived_seed


class ErrorConfidence(Protocol):
    """What screening asks of a predictor."""

    def confidence(self, embeds: Tensor) -> Tensor:
        """Probability [B] that the target errs, for embeddings [B, d]; a row's answer is its own."""


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
        chunk_size: draws that the predictor sees in one call; changes the speed alone.
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

    A pure function of its arguments: neighbours in a batch have no part in it.

    Args:
        distributions: where embeddings are drawn from.
        predictor: what they must convince.
        class_index: the conditioned class y.
        seed: the sample's own.
        options: `ScreeningOptions()` where not given.

    Raises:
        ValueError: the class has no distribution (naming it).
    """
    options = options or ScreeningOptions()
    generator = embedding_generator(seed)
    best: ScreenedDraw | None = None
    for start in range(0, options.max_draws, options.chunk_size):
        size = min(options.chunk_size, options.max_draws - start)
        draws = torch.stack([distributions.draw(class_index, generator) for _ in range(size)])
        confidence = predictor.confidence(draws)
        passed = (confidence > options.threshold).nonzero()[:, 0].tolist()
        row = passed[0] if passed else int(confidence.argmax())
        found = ScreenedDraw(
            embedding=draws[row].clone(),
            screened=bool(passed),
            num_draws=start + row + 1 if passed else options.max_draws,
            confidence=float(confidence[row]),
        )
        if passed:
            return found
        best = found if best is None or found.confidence > best.confidence else best
    assert best is not None
    return best


def unscreened(distributions: ClassDistributions, class_index: int, seed: int) -> Tensor:
    """A sample's first draw [d], whatever a predictor would say: the ablation without screening.

    Raises:
        ValueError: the class has no distribution (naming it).
    """
    return distributions.draw(class_index, embedding_generator(seed))


def embedding_generator(seed: int) -> torch.Generator:
    """The generator of a sample's embeddings: from its seed, and another stream than its initial noise."""
    return torch.Generator("cpu").manual_seed(derived_seed(seed, "embedding"))


@dataclass(frozen=True, slots=True, kw_only=True)
class ScreeningCount:
    """Screening of a class in figures.

    Attributes:
        num_samples: samples that were drawn for.
        num_screened: those of which a draw passed.
        num_draws: draws of all of them.
    """

    num_samples: int = 0
    num_screened: int = 0
    num_draws: int = 0

    @property
    def acceptance_rate(self) -> float:
        """Share of the draws that passed; 0 without draws."""
        return self.num_screened / self.num_draws if self.num_draws else 0.0

    def __add__(self, other: ScreeningCount) -> ScreeningCount:
        return ScreeningCount(
            num_samples=self.num_samples + other.num_samples,
            num_screened=self.num_screened + other.num_screened,
            num_draws=self.num_draws + other.num_draws,
        )


@dataclass(frozen=True, slots=True)
class ScreeningTally:
    """Screening in figures, class by class; tallies of shards add up.

    Attributes:
        per_class: count by class index.
    """

    per_class: dict[int, ScreeningCount] = field(default_factory=dict)

    @classmethod
    def of(cls, draws: Iterable[tuple[int, ScreenedDraw]]) -> ScreeningTally:
        """The tally of class indices and their draws."""
        tally = cls()
        for class_index, draw in draws:
            count = ScreeningCount(num_samples=1, num_screened=int(draw.screened), num_draws=draw.num_draws)
            tally.per_class[class_index] = tally.per_class.get(class_index, ScreeningCount()) + count
        return tally

    def __add__(self, other: ScreeningTally) -> ScreeningTally:
        none = ScreeningCount()
        classes = sorted(self.per_class.keys() | other.per_class.keys())
        return ScreeningTally(
            {index: self.per_class.get(index, none) + other.per_class.get(index, none) for index in classes}
        )

    def state(self) -> dict[str, Any]:
        """Plain values, for `from_state`: `[class index, samples, screened, draws]` a class."""
        rows = [[i, c.num_samples, c.num_screened, c.num_draws] for i, c in sorted(self.per_class.items())]
        return {"kind": "screening", "per_class": rows}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ScreeningTally:
        """A tally from its `state`.

        Raises:
            ValueError: it is the state of something else.
        """
        check_kind(state, "screening")
        return cls(
            {
                index: ScreeningCount(num_samples=samples, num_screened=screened, num_draws=draws)
                for index, samples, screened, draws in state["per_class"]
            }
        )
