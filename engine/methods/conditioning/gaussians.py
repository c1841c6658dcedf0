"""One diagonal Gaussian a class over image embeddings (RiskyDiff, Yu et al., AAAI 2026, arXiv 2512.18722).

Embeddings are raw, not normalised: the diffusion model is conditioned on raw embeddings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.methods.conditioning.input_checks import check_embeddings, check_kind, check_spread, class_text


@dataclass(slots=True, eq=False)
class ClassMoments:
    """Count, mean and sum of squared deviations of every class: streaming, and mergeable over shards.

    The parallel update of Welford's sums (Chan, Golub and LeVeque 1979) is exact but for the rounding of float64,
    whatever the split. Partial moments that are merged in a fixed order give equal bits.

    Attributes:
        labels: class names in index order.
        count: [n], integers.
        mean: [n, d], float64.
        squares: [n, d], float64; sum of squared deviations from the mean.
    """

    labels: tuple[str, ...]
    count: Tensor
    mean: Tensor
    squares: Tensor

    @classmethod
    def empty(cls, labels: Sequence[str], dim: int) -> ClassMoments:
        """Moments of no image yet, of embeddings with `dim` entries."""
        mean, squares = torch.zeros(2, len(labels), dim, dtype=torch.float64)
        return cls(tuple(labels), torch.zeros(len(labels), dtype=torch.long), mean, squares)

    def add(self, embeds: Tensor, classes: Tensor) -> None:
        """Add embeddings [N, d] of images of classes [N].

        Raises:
            ValueError: shapes or indices are wrong, or an embedding is not finite; the last message
                names the class.
        """
        check_embeddings(embeds, classes, self.labels)
        if embeds.shape[1] != self.mean.shape[1]:
            raise ValueError(f"embeds have {embeds.shape[1]} entries, these moments {self.mean.shape[1]}")
        for index in classes.unique():
            rows = embeds[classes == index].double()
            mean = rows.mean(0, keepdim=True)
            squares = (rows - mean).square().sum(0, keepdim=True)
            self._combine(index[None], torch.tensor([len(rows)]), mean, squares)

    def merge(self, other: ClassMoments) -> None:
        """Add the moments of another shard.

        Raises:
            ValueError: they are of other classes, or of embeddings of another size.
        """
        if self.labels != other.labels or self.mean.shape != other.mean.shape:
            raise ValueError(
                f"moments of {len(other.labels)} classes x {other.mean.shape[1]} entries cannot be merged into those"
                f" of {len(self.labels)} x {self.mean.shape[1]}: labels and embedding size must be the same"
            )
        self._combine(torch.arange(len(self.labels)), other.count, other.mean, other.squares)

    def _combine(self, at: Tensor, count: Tensor, mean: Tensor, squares: Tensor) -> None:
        total = self.count[at] + count
        share = (count.double() / total.clamp_min(1))[:, None]
        delta = mean - self.mean[at]
        self.squares[at] += squares + delta.square() * self.count[at][:, None] * share
        self.mean[at] += delta * share
        self.count[at] = total

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, for `from_state`."""
        return {
            "kind": "class_moments",
            "labels": list(self.labels),
            "count": self.count,
            "mean": self.mean,
            "squares": self.squares,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ClassMoments:
        """Moments from their `state`.

        Raises:
            ValueError: it is a state of another kind.
        """
        check_kind(state, "class_moments")
        # Copies: later additions must not change the state.
        return cls(tuple(state["labels"]), *(state[name].clone() for name in ("count", "mean", "squares")))


@dataclass(frozen=True, slots=True, eq=False)
class ClassGaussians:
    """`N(mu_y, diag(sigma_y^2))` of every class y, with the population standard deviation (ddof 0).

    Attributes:
        labels: class names in index order.
        count: [n], images that each Gaussian is made from.
        mean: [n, d], float32.
        std: [n, d], float32.
    """

    labels: tuple[str, ...]
    count: Tensor
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, moments: ClassMoments) -> ClassGaussians:
        """The Gaussians of complete moments. A class without a spread is refused by `check` and `draw`."""
        variance = moments.squares / moments.count.clamp_min(1)[:, None]
        return cls(moments.labels, moments.count.clone(), moments.mean.float(), variance.sqrt().float())

    @property
    def dim(self) -> int:
        """Entries d of an embedding."""
        return self.mean.shape[1]

    def check(self, class_index: int) -> None:
        """Check that a class can be drawn from.

        Raises:
            ValueError: it is unknown, or has no image, a single one, or identical ones; the message names it.
        """
        class_text(self.labels, class_index)
        check_spread(
            self.labels, class_index, int(self.count[class_index]), self.mean[class_index], self.std[class_index]
        )

    def draw(self, class_index: int, generator: torch.Generator) -> Tensor:
        """One embedding [d], float32: `mu_y + sigma_y * noise`.

        Raises:
            ValueError: as `check`.
        """
        self.check(class_index)
        noise = torch.randn(self.dim, generator=generator, dtype=torch.float32)
        return self.mean[class_index] + self.std[class_index] * noise
