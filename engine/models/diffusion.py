"""Diffusion pipelines by their addresses: found, checked, and loaded as the family that they are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.errors import JobError
from engine.job.spec import ModelsSpec
from engine.models.adapters import adapter_problems
from engine.models.addresses import resolve
from engine.models.hardware import Hardware
from engine.models.loading import loading
from engine.models.pipelines.base import ChangeParts, Pipeline
from engine.models.pipelines.image_encoder import ImageEncoder
from engine.models.pipelines.lookup import check_pipeline, check_pipeline_weights, family_of
from engine.models.pipelines.parts import load_part
from engine.models.vae_checks import check_vae, vae_problem


def load_pipeline(
    address: str, hardware: Hardware, *, checks_safety: bool = True, models: ModelsSpec | None = None
) -> Pipeline:
    """Load a diffusers pipeline folder, `zoo:` part or hub id; safetensors only.

    Args:
        checks_safety: load the pipeline's safety checker, too, where it has one.
        models: of a job, which has adapters and a VAE of its own, if any.

    Raises:
        JobError: it cannot be loaded, or is of no family in `engine.models.pipelines.registry`.
    """
    folder = resolve(address)
    check_pipeline(folder, address, checks_safety=checks_safety)
    check_pipeline_weights(folder, address, checks_safety=checks_safety)
    family = family_of(folder, address)
    change = _change(models, family, folder, address) if models and (models.adapters or models.vae) else None
    with loading(address, "a diffusion pipeline"):
        return family.load(folder, hardware, checks_safety=checks_safety, change=change)


def _change(models: ModelsSpec, family: type[Pipeline], folder: Path, address: str) -> ChangeParts:
    """What loads a job's adapters and VAE into the parts of a pipeline.

    They are checked again: a pipeline of the hub was not there to be checked before.

    Raises:
        JobError: they do not go with the pipeline.
    """
    problems = [f"models.{problem}" for problem in adapter_problems(models.adapters, folder, address)]
    vae = resolve(models.vae) if models.vae else None
    if vae and models.vae:
        check_vae(vae, models.vae)
        if problem := vae_problem(models.vae, vae, folder, address):
            problems.append(f"models.vae: {problem}")
    if problems:
        raise JobError(problems)

    def change(parts: dict[str, Any]) -> None:
        if vae:
            parts["vae"] = _load_vae(vae, str(models.vae))
        if models.adapters:
            from engine.models.adapter_loading import apply_adapters

            apply_adapters(family, folder, parts, models.adapters)

    return change


def _load_vae(folder: Path, address: str) -> Any:
    """An `AutoencoderKL`, in float32 as those of pipelines."""
    import torch
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    vae = load_part(AutoencoderKL, folder, torch_dtype=torch.float32)
    if broken := [name for name, weight in vae.state_dict().items() if not weight.isfinite().all()]:
        raise JobError(f"models.vae: '{address}' has values in {broken[0]} that are not finite; get the file again")
    return vae


def load_image_encoder(address: str, device: str = "cpu") -> ImageEncoder:
    """Load the image encoder of a pipeline that is conditioned on image embeddings, by the pipeline's address.

    Raises:
        JobError: it cannot be loaded, or there is none.
    """
    folder = resolve(address)
    with loading(address, "an image encoder"):
        return family_of(folder, address).load_image_encoder(folder, device)
