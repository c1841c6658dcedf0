"""Whether an `AutoencoderTiny` decodes the latents of a pipeline, by configurations alone; without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.errors import JobError
from engine.methods.config_values import shown
from engine.models.configurations import need_file, read_config, reading_configuration
from engine.models.pipelines.lookup import family_of
from engine.models.weight_files import conversion_line, weights_problem

FLOAT16_OVERFLOWS = "overflows in fp16, as its config.json does not say force_upcast: false; use auto, bf16 or fp32"


def check_decoder(folder: Path, address: str) -> None:
    """Check by its configuration that a folder is an `AutoencoderTiny` that makes images of latents.

    Raises:
        JobError: saying what it is instead.
    """
    need_file(folder, "config.json", address, "a diffusers model folder")
    config = read_config(folder / "config.json")
    kind = config.get("_class_name", "transformers model")
    if kind != "AutoencoderTiny":
        raise JobError(f"'{address}' is of class {kind}; an AutoencoderTiny is needed")
    with reading_configuration(address):
        _shape(config)
    if config.get("out_channels", 3) != 3:
        raise JobError(f"'{address}' makes images of {shown(config['out_channels'])} channels; three are needed")


def check_decoder_weights(folder: Path, address: str) -> None:
    """Check by their names that a decoder's weights are there, as safetensors.

    Raises:
        JobError: they are not; with the command that converts them.
    """
    if problem := weights_problem(folder, address, conversion_line("diffusers.AutoencoderTiny", address, folder)):
        raise JobError(problem)


def decoder_problem(address: str, decoder: Path, pipeline: Path, of: str) -> str | None:
    """Why an `AutoencoderTiny` does not fit the latents or the images of a pipeline, or None.

    Args:
        address: of the decoder.
        decoder: its folder.
        pipeline: folder of the pipeline.
        of: address of the pipeline.
    """
    tiny, latents = read_config(decoder / "config.json"), family_of(pipeline, of).latent_space(pipeline)
    channels, pixels_per_latent = _shape(tiny)
    if (channels, pixels_per_latent) != (latents.channels, latents.pixels_per_latent):
        return (
            f"'{address}' makes images {pixels_per_latent} times the size of latents of {channels} channels; those of"
            f" '{of}' have {latents.channels} channels, and {latents.pixels_per_latent} times"
        )
    scale = tiny.get("scaling_factor", 1.0), tiny.get("shift_factor", 0.0) or 0
    if scale not in ((1, 0), (latents.scaling_factor, latents.shift_factor)):
        return (
            f"'{address}' has scaling_factor {shown(scale[0])} and shift_factor {shown(scale[1])}, so it decodes"
            f" latents of another scale than those of '{of}'; 1 and 0 are those of a decoder for latents as they are"
            " denoised"
        )
    return None


def float16_problem(folder: Path) -> str | None:
    """Why guidance must not differentiate a decoder in float16, by its configuration, or None.

    Args:
        folder: of an `AutoencoderKL` or `AutoencoderTiny`.
    """
    config = read_config(folder / "config.json")
    # diffusers' defaults: a tiny autoencoder is safe unless it says otherwise, the large one is not.
    if not config.get("force_upcast", config.get("_class_name") != "AutoencoderTiny"):
        return None
    return FLOAT16_OVERFLOWS


def _shape(config: dict[str, Any]) -> tuple[int, int]:
    """Channels of the latents of an `AutoencoderTiny`, and pixels of a side for each latent."""
    stages, factor = config.get("num_decoder_blocks", [3, 3, 3, 1]), config.get("upsampling_scaling_factor", 2)
    return int(config.get("latent_channels", 4)), int(factor) ** (len(stages) - 1)
