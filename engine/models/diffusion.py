"""Diffusion pipelines by their addresses: found, checked, and loaded as the family that they are of."""

from __future__ import annotations

from engine.models.addresses import resolve
from engine.models.hardware import Hardware
from engine.models.loading import loading
from engine.models.pipelines.base import Pipeline
from engine.models.pipelines.image_encoder import ImageEncoder
from engine.models.pipelines.lookup import check_pipeline, check_pipeline_weights, family_of


def load_pipeline(address: str, hardware: Hardware, *, checks_safety: bool = True) -> Pipeline:
    """Load a diffusers pipeline folder, `zoo:` part or hub id; safetensors only.

    Args:
        checks_safety: load the pipeline's safety checker, too, where it has one.

    Raises:
        JobError: it cannot be loaded, or is of no family in `engine.models.pipelines.registry`.
    """
    folder = resolve(address)
    check_pipeline(folder, address, checks_safety=checks_safety)
    check_pipeline_weights(folder, address, checks_safety=checks_safety)
    with loading(address, "a diffusion pipeline"):
        return family_of(folder, address).load(folder, hardware, checks_safety=checks_safety)


def load_image_encoder(address: str, device: str = "cpu") -> ImageEncoder:
    """Load the image encoder of a pipeline that is conditioned on image embeddings, by the pipeline's address.

    Raises:
        JobError: it cannot be loaded, or there is none.
    """
    folder = resolve(address)
    with loading(address, "an image encoder"):
        return family_of(folder, address).load_image_encoder(folder, device)
