"""Gradients through a network in half precision: scaled sample by sample, so that they neither underflow nor overflow.

Legend: B samples, C channels, H x W latent size, J the Jacobian of the network's output in its latents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from engine.methods.guidance.rules import per_sample
from engine.methods.scores import at_least_float32

# float16 holds 6e-8 to 65504. The largest entry of a cotangent is scaled to about this power of two.
SCALED_EXPONENT = 6
# Where a sample overflows nevertheless, its scale is lowered by this power of two, up to so many times.
LOWERED_EXPONENT = 5
MAX_LOWERINGS = 3


def pulled_back(cotangent: Tensor, output: Tensor, latents: Tensor) -> Tensor:
    """Gradients `J^T g` in the latents of every sample, float32, from gradients g in the network's output.

    Each sample's g is multiplied by a power of two before the backward pass and the result divided by it in float32:
    the same as scaling its loss, and exact where nothing under- or overflows. A sample whose gradient overflows is
    tried again with a lower scale; the other samples keep their gradients.

    Args:
        cotangent: g, [B, C, H, W], float32.
        output: of the network, with the graph to `latents`, which is kept.
        latents: [B, C, H, W], a leaf.

    Returns:
        [B, C, H, W]; NaN for a sample whose gradient is not finite at any scale.
    """
    pending = _finite(cotangent)
    exponents = cotangent_exponents(cotangent)
    result = torch.full_like(latents, torch.nan, dtype=cotangent.dtype)
    for _ in range(1 + MAX_LOWERINGS):
        scaled = torch.where(per_sample(pending, cotangent), shifted(cotangent, exponents), 0.0)
        (gradient,) = torch.autograd.grad(output, latents, scaled, retain_graph=True)
        finite = pending & _finite(gradient)
        result = torch.where(per_sample(finite, gradient), shifted(at_least_float32(gradient), -exponents), result)
        pending = pending & ~finite
        # This waits for a GPU, as nothing else in the sampling loop does but `Arrivals`.
        if not pending.any():
            break
        exponents = exponents - LOWERED_EXPONENT
    return result


def cotangent_exponents(cotangent: Tensor) -> Tensor:
    """Power of two for each sample, [B], that brings its largest entry just below 2^SCALED_EXPONENT; 0 for zeros."""
    largest = cotangent.flatten(1).abs().amax(1)
    return torch.where(_finite(cotangent), SCALED_EXPONENT - torch.frexp(largest).exponent, 0)


def shifted(values: Tensor, exponents: Tensor) -> Tensor:
    """Every sample times two to its exponent: exact, in two halves, as 2^200 alone is beyond float32."""
    half = exponents // 2
    return torch.ldexp(torch.ldexp(values, per_sample(half, values)), per_sample(exponents - half, values))


def _finite(values: Tensor) -> Tensor:
    """Which samples have finite entries only, [B]."""
    return torch.isfinite(values).flatten(1).all(1)
