"""Whether an `AutoencoderKL` of a user's own can replace that of a pipeline, by configurations alone; without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.errors import JobError
from engine.methods.config_values import shown
from engine.models.configurations import need_file, read_config, reading_configuration
from engine.models.pipelines.checks import quantisation_problems
from engine.models.weight_files import conversion_line, weights_problem

# What decides shape and scale of the latents, with diffusers' defaults.
_LATENTS: dict[str, Any] = {
    "latent_channels": 4,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "out_channels": 3,
}


def check_vae(folder: Path, address: str) -> None:
    """Check by its configuration that a folder is an `AutoencoderKL`.

    Raises:
        JobError: saying what it is instead.
    """
    need_file(folder, "config.json", address, "the folder of an AutoencoderKL, as diffusers saves it,")
    config = read_config(folder / "config.json")
    kind = config.get("_class_name", "transformers model")
    if kind == "AutoencoderTiny":
        raise JobError(f"'{address}' is an AutoencoderTiny; name it in models.guidance_decoder")
    if kind != "AutoencoderKL":
        raise JobError(f"'{address}' is of class {kind}; an AutoencoderKL is needed")
    if problems := list(quantisation_problems(folder.name, config)):
        raise JobError(f"'{address}': {problems[0]}")


def check_vae_weights(folder: Path, address: str) -> None:
    """Check by their names that a VAE's weights are there, as safetensors.

    Raises:
        JobError: they are not; with the command that converts them.
    """
    if problem := weights_problem(folder, address, conversion_line("diffusers.AutoencoderKL", address, folder)):
        raise JobError(problem)


def vae_problem(address: str, vae: Path, pipeline: Path, of: str) -> str | None:
    """Why a VAE does not fit the latents of a pipeline, or None.

    Args:
        address: of the VAE.
        vae: its folder.
        pipeline: folder of the pipeline.
        of: address of the pipeline.
    """
    given, own = read_config(vae / "config.json"), read_config(pipeline / "vae" / "config.json")
    for option, default in _LATENTS.items():
        if (value := given.get(option, default)) != (wanted := own.get(option, default)):
            return (
                f"'{address}' has {option}: {shown(value)}, the VAE of '{of}' {shown(wanted)}; it must be made for the"
                " same latents"
            )
    with reading_configuration(address):
        sizes = [len(config.get("block_out_channels", [64])) for config in (given, own)]
    if sizes[0] != sizes[1]:
        return (
            f"'{address}' makes images {2 ** (sizes[0] - 1)} times the size of the latents, the VAE of '{of}'"
            f" {2 ** (sizes[1] - 1)} times; it must be made for the same latents"
        )
    return None
