"""A decoder in half precision between float32 latents and float32 images, differentiable without under- or overflow.

Legend: B samples, C channels, h x w latent size, H x W image size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.methods.guidance.precision import cotangent_exponents, shifted


def in_half_precision(decode: Callable[[Tensor], Tensor], dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """A function of float32 tensors, by one that computes in half precision.

    In the backward pass each sample's gradient is multiplied by a power of two where it enters the half precision, and
    divided by it in float32 where it leaves: exact, and without waiting for the GPU. A sample that overflows
    nevertheless gets a gradient that is not finite, which the step rules count and do not follow.

    Args:
        decode: latents [B, C, h, w] to images [B, 3, H, W], both of `dtype`, differentiable.
        dtype: float16 or bfloat16.
    """

    def images(latents: Tensor) -> Tensor:
        scale = _Scale()
        made: Tensor = _Out.apply(decode(_In.apply(latents, dtype, scale)), scale)
        return made

    return images


class _Scale:
    """The exponents [B] of a backward pass, between the two functions that it goes through."""

    exponents: Tensor


class _In(torch.autograd.Function):
    """float32 to half precision; the gradient back to float32, and to its own scale."""

    @staticmethod
    def forward(context: Any, latents: Tensor, dtype: torch.dtype, scale: _Scale) -> Tensor:
        context.scale = scale
        return latents.to(dtype)

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return shifted(gradients[0].float(), -context.scale.exponents), None, None


class _Out(torch.autograd.Function):
    """Half precision to float32; the gradient scaled, and to half precision."""

    @staticmethod
    def forward(context: Any, images: Tensor, scale: _Scale) -> Tensor:
        context.scale, context.dtype = scale, images.dtype
        return images.float()

    @staticmethod
    def backward(context: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        context.scale.exponents = cotangent_exponents(gradients[0])
        return shifted(gradients[0], context.scale.exponents).to(context.dtype), None
