"""Whether guidance should look through a tiny decoder: how much of a sample's arithmetic that saves, and its price."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.job.spec import JobSpec, RequestSpec
from engine.models.addresses import locate
from engine.models.arithmetic import Arithmetic, behind_tiny, count_folder
from engine.models.configurations import read_config
from engine.models.pipelines.lookup import family_of, request_image_size
from engine.models.pipelines.parts import has_configurations

# A decoder that saves less of a sample's arithmetic is not worth what it costs in KLDB.
MIN_SAVING = 0.2
# Measured by tools/decoder_price.py, see docs/results.md.
PRICE_FILE = Path(__file__).parent / "decoder_price.json"
# Of a zoo whose pipelines have one autoencoder, which it was trained on.
ZOO_DECODER = "tiny-autoencoder"
TAESD, TAESDXL = "madebyollin/taesd", "madebyollin/taesdxl"
# What distinguishes the autoencoder of Stable Diffusion 1.x and 2.x, for which TAESD was made, by its configuration;
# that of Stable Diffusion XL has the same architecture and another scale.
SD_AUTOENCODER = {
    "block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "latent_channels": 4, "scaling_factor": 0.18215,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderAdvice:
    """What `models.guidance_decoder` would change.

    Attributes:
        request: the guided request that gains most.
        num_requests: guided requests that gain at least `MIN_SAVING`.
        share: part of the arithmetic of a sample of it that is the gradient through the pipeline's decoder.
        tiny_share: the same with a tiny decoder.
        cost: arithmetic of a sample with a tiny decoder, of that without.
        address: a decoder made for the pipeline; empty where none is known.
        price: KLDB as it was measured on the digits zoo, as `tools/decoder_price.py` writes it.
    """

    request: str
    num_requests: int
    share: float
    tiny_share: float
    cost: float
    address: str
    price: dict[str, Any]


def decoder_advice(job: JobSpec) -> DecoderAdvice | None:
    """The advice for a job; None where nothing is guided, there is a tiny decoder already, or it would save little."""
    if job.models.guidance_decoder:
        return None
    gains = [advice for request in job.requests if (advice := _advice(job, request)) and advice.cost <= 1 - MIN_SAVING]
    if not gains:
        return None
    return dataclasses.replace(min(gains, key=lambda advice: advice.cost), num_requests=len(gains))


def _advice(job: JobSpec, request: RequestSpec) -> DecoderAdvice | None:
    """The advice for a request; None where nothing is guided, or the pipeline's configurations are not here."""
    sampling, parameters = job.sampling_of(request), job.parameters_of(request)
    steps, pipeline = sampling.num_inference_steps, request.diffusion or job.models.diffusion
    taken = request.steps_taken(steps)
    guided = [index for index in taken if parameters.is_guided(index, steps)]
    folder = locate(pipeline).folder
    if not guided or folder is None or not has_configurations(folder):
        return None
    if (found := _counted(pipeline, folder, _latents(job, request, folder, pipeline))) is None:
        return None
    address, *counted = found
    halves = 2 if sampling.guidance_scale > 1 and not family_of(folder, pipeline).embeds_guidance(folder) else 1
    num_through_unet = sum(parameters.is_through_unet(index, steps) for index in guided)
    totals = [
        one.guided(len(taken), len(guided), num_through_unet=num_through_unet, num_halves=halves)
        + (one.prompt(len(taken), halves) if request.twin else 0)
        for one in counted
    ]
    shares = [len(guided) * one.decoder_gradient / total for one, total in zip(counted, totals, strict=True)]
    return DecoderAdvice(
        request=request.name, num_requests=1, share=shares[0], tiny_share=shares[1], cost=totals[1] / totals[0],
        address=address, price=read_price(),
    )  # fmt: skip


@functools.lru_cache(maxsize=8)
def _counted(pipeline: str, folder: Path, latents: tuple[int, int]) -> tuple[str, Arithmetic, Arithmetic] | None:
    """The address of a tiny decoder, and the arithmetic of a sample without and with one, each in about a second.

    Returns:
        None for a family of pipelines whose arithmetic is not counted.
    """
    address, config = tiny_decoder(pipeline, folder)
    full = count_folder(folder, latents)
    return None if full is None else (address, full, behind_tiny(full, folder, config, latents))


def _latents(job: JobSpec, request: RequestSpec, folder: Path, address: str) -> tuple[int, int]:
    """Height and width of a request's latents."""
    height, width = request_image_size(job, request, folder, address)
    scale = family_of(folder, address).latent_space(folder).pixels_per_latent
    return height // scale, width // scale


def tiny_decoder(pipeline: str, folder: Path) -> tuple[str, dict[str, Any]]:
    """Address and configuration of an `AutoencoderTiny` for a pipeline.

    Returns:
        No address where none is known that was made for these latents: equal shapes do not make a decoder fit. The
        configuration is then that of TAESD, with as many stages as the latents need.
    """
    sibling = folder.parent / ZOO_DECODER
    if pipeline.startswith("zoo:") and (sibling / "config.json").is_file():
        return f"zoo:{folder.parent.name}/{ZOO_DECODER}", read_config(sibling / "config.json")
    latents = family_of(folder, pipeline).latent_space(folder)
    num_stages = round(math.log2(latents.pixels_per_latent)) + 1
    config = {
        "latent_channels": latents.channels,
        "encoder_block_out_channels": [64] * num_stages,
        "decoder_block_out_channels": [64] * num_stages,
        "num_encoder_blocks": [1, *[3] * (num_stages - 1)],
        "num_decoder_blocks": [*[3] * (num_stages - 1), 1],
    }
    vae = read_config(folder / "vae" / "config.json") | {"scaling_factor": latents.scaling_factor}
    made_for = {TAESD: SD_AUTOENCODER, TAESDXL: SD_AUTOENCODER | {"scaling_factor": 0.13025}}
    return next((address for address, known in made_for.items() if known.items() <= vae.items()), ""), config


def read_price() -> dict[str, Any]:
    """Median KLDB with intervals by classifier and decoder, as `tools/decoder_price.py` measured it."""
    return read_config(PRICE_FILE)


def advice_lines(advice: DecoderAdvice) -> list[str]:
    """An advice in words."""
    num_others = advice.num_requests - 1
    others = f" (and {num_others} more request{'s' if num_others > 1 else ''})" if num_others else ""
    decoder = advice.address or "ADDRESS, an AutoencoderTiny made for the latents of this pipeline,"
    target, other = advice.price["target"], advice.price["other"]
    return [
        f"{advice.request}{others}: {advice.share:.0%} of the arithmetic of a sample is the gradient of the pipeline's"
        f" decoder; with models.guidance_decoder: {decoder} a sample takes {advice.cost:.0%} of the arithmetic"
        f" ({advice.tiny_share:.0%} of that the decoder's gradient)",
        "the price, measured on the digits zoo with its tiny decoder: median KLDB on the target"
        f" {target['full'][0]:.2f} -> {target['tiny'][0]:.2f}, on a classifier that never guided"
        f" {other['full'][0]:.2f} -> {other['tiny'][0]:.2f} ({target['samples']} samples, docs/results.md)",
    ]
