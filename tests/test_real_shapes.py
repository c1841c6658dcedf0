"""Stable Diffusion's real shapes on `meta`: no tensor is beyond what kernels index, and slices fit the memory.

The engine's own denoiser, guidance and decoders run; only the arithmetic is left out. Nothing else in the suite sees
shapes of 512 px and batches of 64, where CUDA's `upsample_nearest2d` backward fails at 2^31 elements of grad_output.
"""

from __future__ import annotations

import itertools

import pytest
import torch

from engine.methods.guidance.scene import Decoding
from engine.methods.guidance.slices import even_slices
from engine.models.decoding import SLICE_ELEMENTS
from engine.models.memory_model import MAX_ELEMENTS, META, network_footprint
from tests.meta_models import (
    IndexGuard,
    TooLargeError,
    attention_of_a_gpu,
    channel_means,
    known_pipeline,
    meta_denoiser,
    meta_guided,
    meta_latents,
    middle_step,
    tiny_decoder,
)

UPSAMPLE_BACKWARD = "aten.upsample_nearest2d_backward.default"


def guided_step(model, rows, decode, gradient) -> IndexGuard:
    """One guided step of a batch, under the guard."""
    guided = meta_guided(model, rows, decode, gradient, channel_means)
    with attention_of_a_gpu(), IndexGuard() as guard:
        guided(meta_latents(model, rows), middle_step())
    return guard


def decoding_of(model, kind, precision) -> Decoding:
    decoder = tiny_decoder(model.hardware) if kind == "tiny" else model.decoder
    return decoder.decoding(model.latent_shape, precision)


def check(size, pixels, dtype, rows, gradient, kind, precision):
    model = known_pipeline(size, pixels, dtype)
    guard = guided_step(model, rows, decoding_of(model, kind, precision), gradient)
    assert guard.calls[UPSAMPLE_BACKWARD] >= 1 and guard.largest <= MAX_ELEMENTS


@pytest.mark.parametrize(
    ("size", "pixels", "dtype", "rows", "gradient", "kind", "precision"),
    [
        ("sd1", 512, "float32", 32, "detached", "full", "float32"),
        ("sd1", 512, "float16", 33, "unet", "full", "bfloat16"),
        ("sd21", 768, "float16", 8, "detached", "full", "bfloat16"),
        ("sd21", 768, "float16", 64, "unet", "tiny", "float16"),
    ],
)
def test_a_guided_step_is_within_the_kernels_indices(size, pixels, dtype, rows, gradient, kind, precision):
    """Network, decoder and criterion, forward and backward."""
    check(size, pixels, dtype, rows, gradient, kind, precision)


@pytest.mark.parametrize("pixels", [512, 768])
def test_no_batch_passes_the_limits(pixels):
    """Batches of 1 to 128 in every precision, by the footprints that the calls of the engine are sliced by."""
    side = pixels // 8
    for model in (known_pipeline("sd1", 512, "float16"), known_pipeline("sd21", 768, "float16")):
        latents = torch.empty(1, 4, side, side, dtype=torch.float16, device=META)
        text = meta_denoiser(model, 1)._conditional.tensors
        network = network_footprint(model._network, latents, torch.tensor(500.0), text)
        for rows in range(1, 129):
            halves = even_slices(2 * rows, network.rows_below(MAX_ELEMENTS))
            assert max(part.stop - part.start for part in halves) * network.largest_elements <= MAX_ELEMENTS
    decoders, shape = (model.decoder, tiny_decoder(model.hardware)), (4, side, side)
    for decoder, precision in itertools.product(decoders, ("float32", "bfloat16", "float16")):
        slice_rows = decoder.decoding(shape, precision).slice_rows
        footprint = decoder._footprints[getattr(torch, precision), shape]
        assert 1 <= slice_rows <= 8 and slice_rows * footprint.largest_elements <= SLICE_ELEMENTS


def test_the_guard_sees_what_fails_without_slices():
    """A batch of 32 at 512 px is the first whose last upsampling has 2^31 elements; 31 rows have fewer."""
    model = known_pipeline("sd1", 512, "float16")
    whole = Decoding(decode=model.decoder._exact)
    with pytest.raises(TooLargeError, match=r"\[32, 256, 512, 512\]"):
        guided_step(model, 32, whole, "detached")
    guided_step(model, 31, whole, "detached")


def test_sampling_and_storing_are_within_the_kernels_indices():
    """Steps without guidance, whose two halves are one call; decoding of what is stored; encoding of images.

    At 768 px 128 rows of the network's feed-forward layers have 3.0e9 elements: its calls are split. Of the decoder's
    last layers 15 rows have as many as kernels count; it takes few at a time, so more would only take longer.
    """
    rows, few, pixels = 64, 16, 768
    model = known_pipeline("sd21", pixels, "float16")
    latents = meta_latents(model, rows)
    with torch.no_grad(), attention_of_a_gpu(), IndexGuard() as guard:
        output = meta_denoiser(model, rows)(latents, middle_step()).output
        images = model.decode(latents[:few])
        encoded = model.encode_images(images)
    assert output.shape == latents.shape and encoded.shape == latents[:few].shape
    assert images.shape == (few, 3, pixels, pixels)
    assert guard.largest <= MAX_ELEMENTS
