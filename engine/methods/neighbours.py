"""k nearest neighbours as a classifier: a vote of labelled images, weighted by the similarity of their features.

Wu et al., "Unsupervised feature learning via non-parametric instance discrimination" (CVPR 2018), section 3.4: each of
the k most similar images votes for its class with `exp(s / tau)`, s being the cosine of the features. Here the weight
is `exp((s - 1) / tau)`, 1 for an exact copy, and every class has a pseudo-count (Laplace): no probability is 0, and an
image that is like none of those with labels has nearly equal probabilities.

Shapes: B queries, N labelled images, n classes, d entries of a feature.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.methods.finiteness import usable_embeds
from engine.methods.temperature import TemperatureFit, fit_temperature

DEFAULT_K = 20
DEFAULT_TAU = 0.07
# Tried by `fit_vote`; the defaults first, which stay where nothing is better.
_KS = (DEFAULT_K, 5, 10, 50, 100, 200)
_TAUS = (DEFAULT_TAU, 0.03, 0.05, 0.1, 0.15, 0.2)
# Of all classes together, in votes of an exact copy.
_PSEUDO_COUNT = 0.1
# Neighbours beyond the k-th that are looked at, of which those that are exactly as similar as it vote too.
_MAX_TIES = 32
# Images that are classified by the others to choose k and tau.
MAX_QUERIES = 5_000
_QUERY_ROWS = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Vote:
    """The parameters of a vote.

    Attributes:
        k: neighbours that vote; those exactly as similar as the k-th vote too, so that no order of images matters.
        tau: temperature of the similarities.
    """

    k: int = DEFAULT_K
    tau: float = DEFAULT_TAU


def unit_features(embeds: Tensor) -> Tensor:
    """Embeddings [B, d] at length 1 in float32; NaN in rows that are not finite or have no direction."""
    embeds = embeds.float()
    normalised = torch.nn.functional.normalize(embeds, dim=1)
    return torch.where(usable_embeds(embeds)[:, None], normalised, torch.nan)


def vote_logits(queries: Tensor, features: Tensor, classes: Tensor, num_classes: int, vote: Vote) -> Tensor:
    """Logarithms of each class' votes [B, n], differentiable in the queries; a softmax gives the probabilities.

    Args:
        queries: [B, d] as `unit_features` gives them; a row with NaN has NaN for logits.
        features: of the labelled images, [N, d], of length 1.
        classes: their class indices, [N].
    """
    similarities, nearest = _nearest(queries @ features.T, vote.k)
    return _logits(similarities, classes[nearest], num_classes, vote)


def _nearest(similarities: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest of similarities [B, N] in each row, and some more, of which those equal to the k-th count."""
    found = similarities.topk(min(k + _MAX_TIES, similarities.shape[1]), dim=1)
    return found.values, found.indices


def _logits(similarities: Tensor, classes: Tensor, num_classes: int, vote: Vote) -> Tensor:
    """Logits [B, n] of sorted similarities [B, m] of neighbours with their classes [B, m]."""
    # In float64 the order of the terms, which equal similarities leave open, does not show in float32.
    similarities = similarities.double()
    last = similarities[:, min(vote.k, similarities.shape[1]) - 1, None]
    weights = torch.where(similarities >= last, torch.exp((similarities - 1) / vote.tau), 0.0)
    votes = weights.new_zeros(len(weights), num_classes).scatter_add(1, classes, weights)
    # No comparison with NaN is true, so that an unusable row has no votes.
    logits = torch.log(votes + _PSEUDO_COUNT / num_classes)
    return torch.where(last.isnan(), torch.nan, logits).float()


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class VoteFit:
    """The vote that is best where every image is classified by the others.

    Attributes:
        vote: k and tau.
        temperature: the fit of the temperature of its logits.
        logits: [Q, n] of the images that were classified by the others, not divided by a temperature.
        rows: those images, [Q] indices.
    """

    vote: Vote
    temperature: TemperatureFit
    logits: Tensor
    rows: Tensor

    @property
    def calibration(self) -> float:
        """The temperature to use: 1 where the fit has no minimum, as where every image is classified correctly."""
        return 1.0 if self.temperature.bound else self.temperature.fitted


def fit_vote(features: Tensor, classes: Tensor, num_classes: int) -> VoteFit:
    """Choose k, tau and temperature by the leave-one-out negative log-likelihood of labelled images.

    Args:
        features: [N, d] of length 1, N > 1.
        classes: [N] class indices.
    """
    rows = _query_rows(len(features))
    similarities, nearest = _others(features, rows, max(_KS))
    votes = [Vote(k=k, tau=tau) for k, tau in itertools.product(_KS, _TAUS)]
    best: tuple[Vote, TemperatureFit, Tensor] | None = None
    for vote in votes:
        kept = slice(vote.k + _MAX_TIES)
        logits = _logits(similarities[:, kept], classes[nearest[:, kept]], num_classes, vote)
        fit = fit_temperature(logits, classes[rows], 1.0)
        if best is None or fit.fitted_nll < best[1].fitted_nll:
            best = vote, fit, logits
    assert best is not None, "there are votes to try"
    return VoteFit(vote=best[0], temperature=best[1], logits=best[2], rows=rows)


def _query_rows(num_images: int) -> Tensor:
    """At most `MAX_QUERIES` indices, evenly spread."""
    step = -(-num_images // MAX_QUERIES)
    return torch.arange(0, num_images, step)


def _others(features: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As `_nearest` of some of the images among all others."""
    parts = []
    for chunk in rows.split(_QUERY_ROWS):
        similarities = features[chunk] @ features.T
        similarities[torch.arange(len(chunk)), chunk] = -torch.inf
        parts.append(_nearest(similarities, k))
    return torch.cat([values for values, _ in parts]), torch.cat([indices for _, indices in parts])
