"""What models take of a GPU's memory, measured on `meta`: true to what tensors hold, and what follows from it."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from engine.methods.guidance.slices import even_slices
from engine.models.decoder import GuidanceDecoder
from engine.models.decoding import FORWARD_SHARE, GRAPH_SHARE, SLICE_ELEMENTS, SLICE_PIXELS
from engine.models.memory_model import META, decoder_footprint, device_memory, network_footprint, rows_of
from engine.models.pipelines.base import NETWORK_GRAPH_SHARE
from tests.meta_models import (
    GIB,
    AliveBytes,
    IndexGuard,
    attention_of_a_gpu,
    full_decoder,
    known_pipeline,
    meta_denoiser,
    meta_hardware,
    meta_latents,
    meta_pipeline,
    middle_step,
)


@pytest.fixture(scope="module")
def unet_footprint():
    """Of Stable Diffusion's UNet, measured once."""
    model = known_pipeline("sd1", 512, "float16")
    with torch.no_grad():
        meta_denoiser(model, 2)(meta_latents(model, 2), middle_step())
    return model._footprint


def held_bytes(forward) -> int:
    """Bytes that torch holds after a forward pass whose result is kept, above those before."""
    results = []
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results.append(forward())
    events = [one for one in profiler.profiler.kineto_results.events() if one.name() == "[memory]"]
    sizes = [one.nbytes() for one in sorted(events, key=lambda one: one.start_ns())]
    return list(itertools.accumulate(sizes))[-1]


def test_the_graph_of_a_row_is_what_torch_holds(diffusion, hardware):
    """Measured on a CPU with real weights: full and tiny decoder, and the UNet, within a tenth."""
    rows, shape = 8, diffusion.latent_shape
    latents = torch.randn(rows, *shape).requires_grad_(True)
    condition = diffusion.encode(["three"] * rows)
    time = torch.tensor(500.0)
    tiny = GuidanceDecoder.load("zoo:digits/tiny-autoencoder", hardware)
    cases = {
        "full": (decoder_footprint(diffusion._vae, shape, torch.float32), lambda: diffusion.decode(latents)),
        "tiny": (decoder_footprint(tiny._autoencoder, shape, torch.float32), lambda: tiny.decode(latents)),
        "unet": (
            network_footprint(diffusion._network, latents, time, condition.tensors),
            lambda: diffusion.predict(latents, time, condition),
        ),
    }
    for name, (footprint, forward) in cases.items():
        forward()
        assert held_bytes(forward) == pytest.approx(rows * footprint.graph_bytes, rel=0.1), name


def test_half_precision_halves_graph_and_weights(diffusion):
    exact, half = (
        decoder_footprint(diffusion._vae, diffusion.latent_shape, dtype) for dtype in (torch.float32, torch.bfloat16)
    )
    assert half.graph_bytes == pytest.approx(exact.graph_bytes / 2, rel=0.01)
    assert half.weight_bytes * 2 == exact.weight_bytes and half.largest_elements == exact.largest_elements


@pytest.mark.parametrize(
    ("pixels", "precision", "memory_gib", "rows"),
    [
        # The pixels of 8 images of 512 px, whatever the memory.
        (512, "bfloat16", 139, 8),
        (768, "bfloat16", 139, 3),
        # 5.6 GiB a row in float32: the share of the memory decides.
        (512, "float32", 139, 8),
        (512, "float32", 80, 5),
        (512, "float32", 24, 1),
        (512, "bfloat16", 24, 3),
        (768, "float32", 24, 1),
    ],
)
def test_a_slice_has_the_rows_that_fit(pixels, precision, memory_gib, rows):
    """Of Stable Diffusion's decoder: by pixels, elements and memory; and one row always."""
    decoder, shape = full_decoder(meta_hardware(memory_gib=memory_gib)), (4, pixels // 8, pixels // 8)
    footprint = decoder_footprint(decoder._autoencoder, shape, getattr(torch, precision))
    assert decoder.decoding(shape, precision).slice_rows == rows
    assert rows == 1 or rows * footprint.graph_bytes <= GRAPH_SHARE * memory_gib * GIB
    assert rows * pixels**2 <= SLICE_PIXELS and rows * footprint.largest_elements <= SLICE_ELEMENTS


@pytest.mark.parametrize(
    ("pixels", "memory_gib", "rows"),
    # 0.8 GiB a row at 512 px, where torch counts what is alive; a gibibyte is planned for, in a fifth of the memory.
    [(512, 139, 8), (512, 40, 8), (512, 24, 4), (512, 16, 3), (512, 11, 2), (512, 4, 1), (768, 24, 2), (768, 11, 1)],
)
def test_stored_images_are_decoded_in_slices_that_fit(pixels, memory_gib, rows):
    """On a small card, or on a part of one, eight images of 512 px would limit the whole batch."""
    decoder, slices = full_decoder(meta_hardware(memory_gib=memory_gib)), []
    side = pixels // 8
    latents = torch.empty(16, 4, side, side, device=META)
    decode = decoder._autoencoder.decode
    decoder._autoencoder.decode = lambda part: slices.append(len(part)) or decode(part)
    with torch.no_grad(), attention_of_a_gpu():
        assert decoder.decode(latents).shape == (16, 3, pixels, pixels)
    assert max(slices) == rows and sum(slices) == 16
    assert rows == 1 or rows * alive_bytes(pixels) <= FORWARD_SHARE * memory_gib * GIB


@functools.cache
def alive_bytes(pixels) -> int:
    """Bytes of the tensors that are alive at the peak of decoding a row without gradient, above those before."""
    latents = torch.empty(1, 4, pixels // 8, pixels // 8, device=META)
    decoder = full_decoder(meta_hardware())
    with torch.no_grad(), attention_of_a_gpu(), AliveBytes() as alive:
        decoder._autoencoder.decode(latents)
    return alive.peak


def test_small_images_are_not_sliced_into_launches():
    """The pixels of 8 images of 512 px are 2048 of 32 px."""
    assert full_decoder(meta_hardware()).decoding((4, 8, 8)).slice_rows == 8 * 64


def test_a_cpu_decodes_all_rows_at_a_time(diffusion, monkeypatch):
    """There the rows of a call decide bytes."""
    rows = []
    decode = diffusion._vae.decode
    monkeypatch.setattr(diffusion._vae, "decode", lambda latents: rows.append(len(latents)) or decode(latents))
    monkeypatch.setattr("engine.models.decoding.SLICE_PIXELS", 1)
    latents = torch.randn(5, *diffusion.latent_shape)
    with torch.no_grad():
        images = diffusion.decode(latents)
        diffusion.encode_images(images)
    assert rows == [5] and diffusion.decoder.decoding(diffusion.latent_shape).slice_rows is None


def convolutions(precision, memory_gib, switch, before=()) -> int:
    """Convolutions, recomputed ones among them, of the gradient of one decoded image; other precisions came before."""
    decoder = full_decoder(meta_hardware(memory_gib=memory_gib, gradient_checkpointing=switch))
    for earlier in before:
        decoder.decoding((4, 64, 64), earlier)
    decode = decoder.decoding((4, 64, 64), precision).decode
    latents = torch.empty(1, 4, 64, 64, device=META, requires_grad=True)
    with attention_of_a_gpu(), IndexGuard() as guard:
        torch.autograd.grad(decode(latents).sum(), latents)
    return guard.calls["aten.convolution.default"]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_the_decoder_recomputes_only_where_no_row_fits(precision):
    """5.6 or 2.8 GiB a row: `auto` recomputes with 6 GiB and not with 24; `off` never."""
    plain = convolutions(precision, 6, "off")
    assert convolutions(precision, 24, "auto") == plain < convolutions(precision, 6, "auto")


def test_half_precision_recomputes_only_where_its_own_graph_does_not_fit():
    """A trial begins with float32, whose graph of a row takes more than 40 % of 10 GiB; half of it does not."""
    plain = convolutions("bfloat16", 10, "off")
    assert convolutions("float32", 10, "auto") > plain
    assert convolutions("bfloat16", 10, "auto", before=["float32"]) == plain
    assert convolutions("bfloat16", 6, "auto", before=["float32"]) > plain


@pytest.mark.parametrize(
    ("memory_gib", "options", "recomputes"),
    [
        # 0.72 GiB a row in float16, 16 rows where the job says `auto`.
        (24, {}, False),
        (16, {}, True),
        (16, {"batch_size": 8}, False),
        (139, {"batch_size": 128}, True),
        (16, {"gradient_checkpointing": "off"}, False),
        (139, {"gradient_checkpointing": "on"}, True),
    ],
)
def test_the_unet_recomputes_where_the_graph_of_a_batch_does_not_fit(
    memory_gib, options, recomputes, unet_footprint, monkeypatch
):
    """Decided at the first call, for the batch that memory is planned for, whatever the rows of the call."""
    monkeypatch.setattr("engine.models.memory_model.network_footprint", lambda *_, **__: unet_footprint)
    model = meta_pipeline("sd1", 512, meta_hardware(memory_gib=memory_gib, **options))
    with torch.no_grad():
        meta_denoiser(model, 2)(meta_latents(model, 2), middle_step())
    assert model._network.is_gradient_checkpointing is recomputes
    if not options:
        assert (16 * unet_footprint.graph_bytes > NETWORK_GRAPH_SHARE * memory_gib * GIB) is recomputes


def test_calls_of_the_network_are_split_where_a_tensor_would_be_too_large():
    """128 rows at 768 px in two equal halves, 128 at 512 px in one call."""
    for pixels, expected in ((512, [128]), (768, [64, 64])):
        rows: list[int] = []
        model = known_pipeline("sd1", pixels, "float16")
        # The model is measured before: only what samples is counted.
        with torch.no_grad():
            meta_denoiser(model, 1)(meta_latents(model, 1), middle_step())
            hook = model._network.register_forward_pre_hook(lambda _, inputs, rows=rows: rows.append(len(inputs[0])))
            meta_denoiser(model, 64)(meta_latents(model, 64), middle_step())
            hook.remove()
        assert rows == expected


def test_unfused_attention_counts_its_matrices(unet_footprint):
    """With `deterministic` single precision has no fused kernel: 4096 by 4096 numbers a head, which limit the rows."""
    model = meta_pipeline("sd1", 512, meta_hardware("float32", deterministic=True))
    with torch.no_grad():
        meta_denoiser(model, 1)(meta_latents(model, 1), middle_step())
    assert model._footprint.largest_elements == 8 * 4096**2 > unet_footprint.largest_elements


def test_the_memory_is_that_of_the_process(monkeypatch):
    """The share that several workers of a GPU are given; with `deterministic` the whole, whoever else is there."""
    properties = type("Properties", (), {"total_memory": 80 * GIB})
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "get_per_process_memory_fraction", lambda: 0.5)
    shared = dataclasses.replace(meta_hardware(), memory_bytes=0)
    assert device_memory(shared) == 40 * GIB
    assert device_memory(dataclasses.replace(shared, deterministic=True)) == 80 * GIB
    assert device_memory(meta_hardware(memory_gib=24)) == 24 * GIB


def test_rows_of_a_call_are_taken_from_tensors_and_mappings():
    """As Stable Diffusion XL has them: a mapping in the arguments; what has no rows is of every row."""
    values = {"text": torch.arange(6).reshape(3, 2), "more": {"time": torch.arange(3)}, "scale": torch.tensor(2.0)}
    part = rows_of(values, 3, slice(1, 3))
    assert part["text"].tolist() == [[2, 3], [4, 5]] and part["more"]["time"].tolist() == [1, 2]
    assert part["scale"] is values["scale"] and rows_of(None, 3, slice(1)) is None


@pytest.mark.parametrize(
    ("rows", "most", "sizes"), [(33, 8, [7, 7, 7, 6, 6]), (8, 8, [8]), (3, None, [3]), (2, 1, [1, 1])]
)
def test_slices_are_few_and_even(rows, most, sizes):
    slices = even_slices(rows, most)
    assert [part.stop - part.start for part in slices] == sizes
    assert [row for part in slices for row in range(rows)[part]] == list(range(rows))
