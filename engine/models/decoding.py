"""Decoders of latents: exact for images that are stored; for guidance also in half precision, with slices that fit.

Legend: B samples, C channels, h x w latent size, H x W image size.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from engine.methods.guidance.half_precision import in_half_precision
from engine.methods.guidance.scene import Decoding
from engine.methods.guidance.slices import even_slices
from engine.models.hardware import Hardware
from engine.models.memory_model import Footprint, decoder_footprint, device_memory

# A slice has at most the pixels of 8 images of 512 px, enough to keep a GPU busy, and at most so many elements in a
# tensor: kernels index with 32 bits, those of the layout channels_last up to 2^31 - 1 alone.
SLICE_PIXELS = 8 * 512 * 512
SLICE_ELEMENTS = 2**30
# Shares of a GPU's memory that a slice may take: with a graph, and without one.
GRAPH_SHARE, FORWARD_SHARE = 0.4, 0.2
# Tensors as large as the largest one that a forward pass without a graph holds: three, and a convolution's workspace.
ALIVE_TENSORS = 4
EXACT = "float32"


class Decoder:
    """The decoder of an `AutoencoderKL` or `AutoencoderTiny` in float32, in slices on a GPU.

    On a CPU all rows are decoded at a time: there bytes depend on the rows of a call.

    Args:
        autoencoder: of diffusers, frozen, on its device.
        hardware: where it runs.
    """

    def __init__(self, autoencoder: Any, hardware: Hardware) -> None:
        self._autoencoder = autoencoder
        self._hardware = hardware
        self._footprints: dict[tuple[torch.dtype, tuple[int, ...]], Footprint] = {}
        self._decodings: dict[tuple[str, tuple[int, ...]], Decoding] = {}

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], nominally in [0, 1] and not clamped, of latents [B, C, h, w]; differentiable."""
        return self.in_slices(self._exact, latents, tuple(latents.shape[1:]))

    def in_slices(self, call: Callable[[Tensor], Tensor], values: Tensor, latent_shape: tuple[int, ...]) -> Tensor:
        """Results of a call with all rows of `values`, in slices that pass no limit of kernels, and fit the memory."""
        most = None if self._hardware.is_cpu else self.forward_rows(latent_shape)
        results = [call(values[part]) for part in even_slices(len(values), most)]
        return results[0] if len(results) == 1 else torch.cat(results)

    def decoding(self, latent_shape: tuple[int, ...], precision: str = EXACT) -> Decoding:
        """How guidance decodes latents [B, C, h, w].

        Side effects: gradient checkpointing is enabled where `auto` asks for it: not even the graph of a row fits.

        Args:
            latent_shape: C, h, w.
            precision: of weights and activations: the name of a torch type. Latents, images and gradients are float32.
        """
        known = (precision, latent_shape)
        if known not in self._decodings:
            self._decodings[known] = self._make_decoding(latent_shape, precision)
        return self._decodings[known]

    def trial_precision(self) -> str:
        """In which precision guidance may differentiate it, if the direction of its gradients allows."""
        hardware = self._hardware
        if not hardware.is_cuda or hardware.dtype == EXACT or hardware.deterministic:
            return EXACT
        if self.is_safe_in_float16:
            return "float16"
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else EXACT

    @property
    def is_safe_in_float16(self) -> bool:
        """Whether its configuration says that its activations stay within float16."""
        return not self._autoencoder.config.get("force_upcast", True)

    def _make_decoding(self, latent_shape: tuple[int, ...], precision: str) -> Decoding:
        dtype, decode, model = getattr(torch, precision), self._exact, self._autoencoder
        if precision != EXACT:
            model = _decoder_in(dtype, self._autoencoder)
            if self._hardware.gradient_checkpointing == "auto":
                # Half of the graph may fit where the original's does not.
                model.disable_gradient_checkpointing()
            decode = partial(self._images, in_half_precision(_unscaled(model), dtype))
        if self._hardware.is_cpu:
            return Decoding(decode=decode)
        fitting = self._footprint(dtype, latent_shape).rows_within(GRAPH_SHARE * device_memory(self._hardware))
        if fitting == 0 and self._hardware.gradient_checkpointing == "auto":
            model.enable_gradient_checkpointing()
        return Decoding(decode=decode, slice_rows=max(1, min(fitting, self._most_rows(dtype, latent_shape))))

    def _exact(self, latents: Tensor) -> Tensor:
        return self._images(_unscaled(self._autoencoder), latents)

    def _images(self, unscaled: Callable[[Tensor], Tensor], latents: Tensor) -> Tensor:
        config = self._autoencoder.config
        latents = latents / config.scaling_factor
        # Most autoencoders have none: null, or 0.
        return unscaled(latents + config.shift_factor if config.get("shift_factor") else latents) / 2 + 0.5

    def forward_rows(self, latent_shape: tuple[int, ...]) -> int:
        """Rows of a slice in float32 that keeps no graph."""
        largest_bytes = self._footprint(torch.float32, latent_shape).largest_elements * torch.float32.itemsize
        fitting = int(FORWARD_SHARE * device_memory(self._hardware) // (ALIVE_TENSORS * largest_bytes))
        return max(1, min(fitting, self._most_rows(torch.float32, latent_shape)))

    def _most_rows(self, dtype: torch.dtype, latent_shape: tuple[int, ...]) -> int:
        """Rows of a slice as far as pixels and elements limit them."""
        footprint = self._footprint(dtype, latent_shape)
        rows = 3 * SLICE_PIXELS // footprint.output_elements
        return max(1, min(rows, footprint.rows_below(SLICE_ELEMENTS)))

    def _footprint(self, dtype: torch.dtype, latent_shape: tuple[int, ...]) -> Footprint:
        known = (dtype, latent_shape)
        if known not in self._footprints:
            self._footprints[known] = decoder_footprint(
                self._autoencoder, latent_shape, dtype, is_fused=not self._hardware.deterministic
            )
        return self._footprints[known]


def _unscaled(model: Any) -> Callable[[Tensor], Tensor]:
    """Latents as an autoencoder has them to images in [-1, 1]."""
    return lambda latents: model.decode(latents).sample


def _decoder_in(dtype: torch.dtype, autoencoder: Any) -> Any:
    """The decoding half of an autoencoder in another precision, next to the original."""
    model = copy.deepcopy(autoencoder)
    # Only its decoder is used; the encoder would take as much memory again.
    del model.encoder
    # diffusers' own `to` warns of parts that it would load in float32.
    return torch.nn.Module.to(model, dtype)
