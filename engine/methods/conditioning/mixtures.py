"""One diagonal Gaussian mixture a class over image embeddings: for classes with several modes.

RiskyDiff (Yu et al., AAAI 2026) has one Gaussian a class, and leaves a multi-modal estimator to future work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.methods.conditioning.gaussians import ClassMoments
from engine.methods.conditioning.input_checks import check_embeddings, check_kind, check_spread, class_text
from engine.methods.conditioning.seeds import derived_seed

# A component with fewer images is a single image, and its spread the regulariser alone.
_MIN_COMPONENT_IMAGES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MixtureOptions:
    """How the mixtures are fitted.

    Attributes:
        components: of a class with enough images.
        min_images_per_component: a class with fewer images has fewer components.
        reg_covar: added to every variance, as a share of the class's mean variance.
        max_iter: steps of expectation maximisation.
        seed: of the initial components.
    """

    components: int = 3
    min_images_per_component: int = 10
    reg_covar: float = 1e-4
    max_iter: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        if self.components < 1 or self.min_images_per_component < _MIN_COMPONENT_IMAGES:
            raise ValueError(
                f"components: {self.components}, min_images_per_component: {self.min_images_per_component};"
                f" at least 1 and {_MIN_COMPONENT_IMAGES} are needed"
            )


@dataclass(frozen=True, slots=True, eq=False)
class ClassMixtures:
    """`sum_k w_yk N(mu_yk, diag(sigma_yk^2))` of every class y. Components that a class lacks have weight zero.

    Attributes:
        labels: class names in index order.
        count: [n], images that each mixture is made from.
        weights: [n, K], float64.
        means: [n, K, d], float32.
        stds: [n, K, d], float32.
    """

    labels: tuple[str, ...]
    count: Tensor
    weights: Tensor
    means: Tensor
    stds: Tensor

    @property
    def dim(self) -> int:
        """Entries d of an embedding."""
        return self.means.shape[2]

    @property
    def num_components(self) -> Tensor:
        """Components of every class, [n]; zero for a class without two different images."""
        return (self.weights > 0).sum(1)

    def notes(self) -> list[str]:
        """Classes that have fewer components than asked for, a line each."""
        wanted = self.weights.shape[1]
        return [
            f"{class_text(self.labels, index)}: {number} instead of {wanted} components; {int(self.count[index])}"
            " images do not support more"
            for index, number in enumerate(self.num_components.tolist())
            if 0 < number < wanted
        ]

    def moments(self) -> ClassMoments:
        """Mean and spread of each whole mixture.

        Expectation maximisation leaves both as the images have them, but for `reg_covar`: they are those that one
        Gaussian a class would be made from.
        """
        weights, means = self.weights[..., None], self.means.double()
        mean = (weights * means).sum(1)
        variance = (weights * (self.stds.double().square() + (means - mean[:, None]).square())).sum(1)
        return ClassMoments(self.labels, self.count.clone(), mean, variance * self.count[:, None])

    def check(self, class_index: int) -> None:
        """Check that a class can be drawn from.

        Raises:
            ValueError: it is unknown, or has no image, a single one, or identical ones; the message names it.
        """
        class_text(self.labels, class_index)
        check_spread(
            self.labels, class_index, int(self.count[class_index]), self.means[class_index], self.stds[class_index]
        )

    def draw(self, class_index: int, generator: torch.Generator) -> Tensor:
        """One embedding [d], float32: a component by weight, then `mu_yk + sigma_yk * noise`.

        Raises:
            ValueError: as `check`.
        """
        self.check(class_index)
        noise = torch.randn(self.dim, generator=generator, dtype=torch.float32)
        position = torch.rand(1, generator=generator, dtype=torch.float64)
        shares = self.weights[class_index][self.weights[class_index] > 0].cumsum(0)
        component = int(torch.searchsorted(shares[:-1], position, right=True))
        return self.means[class_index, component] + self.stds[class_index, component] * noise

    def state(self) -> dict[str, Any]:
        """Tensors and plain values, for `from_state`."""
        return {
            "kind": "mixtures",
            "labels": list(self.labels),
            "count": self.count,
            "weights": self.weights,
            "means": self.means,
            "stds": self.stds,
        }

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> ClassMixtures:
        """Mixtures from their `state`.

        Raises:
            ValueError: it is a state of another kind.
        """
        check_kind(state, "mixtures")
        return cls(tuple(state["labels"]), *(state[name] for name in ("count", "weights", "means", "stds")))


def fit_mixtures(
    embeds: Tensor, classes: Tensor, labels: Sequence[str], options: MixtureOptions | None = None
) -> ClassMixtures:
    """Fit the mixture of every class by expectation maximisation (scikit-learn's GaussianMixture).

    A class without two different images has no component, and is refused by `check` and `draw`.

    Args:
        embeds: [N, d], raw.
        classes: [N] class indices.
        labels: n class names in index order.
        options: `MixtureOptions()` where not given.

    Raises:
        ValueError: shapes or indices are wrong, or an embedding is not finite; the last message
            names the class.
    """
    options = options or MixtureOptions()
    check_embeddings(embeds, classes, labels)
    shape = (len(labels), options.components, embeds.shape[1])
    weights, means, stds = torch.zeros(shape[:2], dtype=torch.float64), torch.zeros(shape), torch.zeros(shape)
    for index in classes.unique().tolist():
        rows = embeds[classes == index].double().cpu().numpy()
        model = _fit_class(rows, options, derived_seed(options.seed, f"mixture of class {index}"))
        if model is not None:
            number = len(model.weights_)
            weights[index, :number] = torch.from_numpy(model.weights_)
            means[index, :number] = torch.from_numpy(model.means_).float()
            stds[index, :number] = torch.from_numpy(np.sqrt(model.covariances_)).float()
    return ClassMixtures(tuple(labels), torch.bincount(classes, minlength=len(labels)), weights, means, stds)


def _fit_class(rows: np.ndarray, options: MixtureOptions, seed: int) -> Any:
    """The mixture of images [N, d] with the most components that they support, or None."""
    from sklearn.mixture import GaussianMixture

    num_different = len(np.unique(rows, axis=0))
    if num_different < 2:
        return None
    floor = options.reg_covar * rows.var(0).mean()
    most = min(options.components, len(rows) // options.min_images_per_component, num_different)
    for components in range(max(most, 1), 0, -1):
        model = GaussianMixture(
            components, covariance_type="diag", reg_covar=floor, max_iter=options.max_iter, random_state=seed
        ).fit(rows)
        if components == 1 or not _is_degenerate(model, len(rows), floor):
            break
    return model


def _is_degenerate(model: Any, num_images: int, floor: float) -> bool:
    """Whether a component is a single image, or copies of one."""
    too_small = (model.weights_ * num_images < _MIN_COMPONENT_IMAGES).any()
    return bool(too_small or (model.covariances_.max(1) <= 2 * floor).any())
