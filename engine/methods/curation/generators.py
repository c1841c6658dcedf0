"""The Gaussian mixture as a generator of the loop: exact sampling and refit."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

# Weight of the unit matrix in a component's covariance, and pseudo-samples of the former component: a mode that
# curation has emptied keeps its place.
_COVARIANCE_FLOOR = 1e-4
_PRIOR_SAMPLES = 1e-3


@dataclass(frozen=True, slots=True, eq=False)
class GaussianMixture:
    """A mixture of k Gaussians, one for each of many independent runs.

    Attributes:
        weights: [..., k], sum 1.
        means: [..., k, d].
        covariances: [..., k, d, d].
        em_steps: steps of a refit, from this mixture on; few of them are an optimisation cut short.
    """

    weights: Tensor
    means: Tensor
    covariances: Tensor
    em_steps: int = 5

    def expanded(self, *runs: int) -> GaussianMixture:
        """The same mixture for several runs."""
        return GaussianMixture(
            self.weights.expand(*runs, *self.weights.shape[-1:]),
            self.means.expand(*runs, *self.means.shape[-2:]),
            self.covariances.expand(*runs, *self.covariances.shape[-3:]),
            self.em_steps,
        )

    def sample(self, num_samples: int, generator: torch.Generator) -> Tensor:
        """Exact samples [..., N, d]."""
        *runs, num_components = self.weights.shape
        flat = self.weights.reshape(-1, num_components)
        chosen = torch.multinomial(flat, num_samples, replacement=True, generator=generator)
        chosen = chosen.reshape(*runs, num_samples)
        noise = torch.randn(*chosen.shape, self.means.shape[-1], generator=generator, dtype=self.means.dtype)
        factor = torch.linalg.cholesky(self.covariances)
        index = chosen[..., None]
        means = torch.gather(self.means, -2, index.expand(*chosen.shape, self.means.shape[-1]))
        shape = (*chosen.shape, *factor.shape[-2:])
        factors = torch.gather(factor, -3, index[..., None].expand(shape))
        return means + (factors @ noise[..., None])[..., 0]

    def log_joint(self, samples: Tensor) -> Tensor:
        """`log weight_k + log density_k` at samples [..., N, d], [..., N, k]."""
        factor = torch.linalg.cholesky(self.covariances)
        centred = samples[..., None, :, :] - self.means[..., :, None, :]
        # [..., k, d, N]
        white = torch.linalg.solve_triangular(factor, centred.mT, upper=False)
        log_volume = factor.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        constant = self.weights.log() - log_volume - 0.5 * samples.shape[-1] * math.log(2 * math.pi)
        return (constant[..., None] - 0.5 * white.square().sum(-2)).mT

    def refit(self, samples: Tensor) -> GaussianMixture:
        """The mixture after `em_steps` steps of expectation-maximisation on samples [..., N, d]."""
        mixture = self
        for _ in range(self.em_steps):
            mixture = mixture._em_step(samples)
        return mixture

    def _em_step(self, samples: Tensor) -> GaussianMixture:
        shares = torch.softmax(self.log_joint(samples), -1)
        mass = shares.sum(-2)
        total = mass + _PRIOR_SAMPLES
        means = (shares.mT @ samples + _PRIOR_SAMPLES * self.means) / total[..., None]
        centred = samples[..., None, :, :] - means[..., :, None, :]
        scatter = centred.mT @ (shares.mT[..., None] * centred)
        eye = torch.eye(samples.shape[-1], dtype=samples.dtype)
        covariances = (scatter + _PRIOR_SAMPLES * self.covariances) / total[..., None, None] + _COVARIANCE_FLOOR * eye
        return GaussianMixture(total / total.sum(-1, keepdim=True), means, covariances, self.em_steps)


def circle_mixture(num_modes: int, *, radius: float = 2.0, deviation: float = 0.3) -> GaussianMixture:
    """Equal Gaussians on a circle, the first at angle zero: with eight modes the papers' example."""
    angles = torch.arange(num_modes, dtype=torch.float64) * (2 * math.pi / num_modes)
    covariances = (deviation**2 * torch.eye(2, dtype=torch.float64)).expand(num_modes, 2, 2)
    weights = torch.full((num_modes,), 1 / num_modes, dtype=torch.float64)
    return GaussianMixture(weights, radius * torch.stack([angles.cos(), angles.sin()], -1), covariances)


def monomials(samples: Tensor) -> Tensor:
    """Features [..., N, 5] of samples [..., N, 2]: all monomials of degree one and two, of about unit size."""
    x, y = samples[..., 0], samples[..., 1]
    return torch.stack([x, y, x * x / 2, y * y / 2, x * y], -1) / 2
