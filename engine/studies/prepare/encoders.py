"""Image encoders whose embeddings a conditioning artefact describes: CLIP's, or that of a pipeline."""

from __future__ import annotations

from typing import Protocol

import PIL.Image
from torch import Tensor

from engine.job.spec import JobSpec
from engine.models import clip
from engine.models.addresses import locate, resolve
from engine.models.configurations import PIPELINE_INDEX
from engine.models.diffusion import load_image_encoder
from engine.models.digests import image_encoder_digest, model_digest
from engine.models.pipelines.lookup import takes_image_embeddings


class Encoder(Protocol):
    """An image encoder as the pass over the images uses it."""

    def image_embeds(self, images: list[PIL.Image.Image]) -> Tensor:
        """Raw embeddings [B, d] of 8-bit images, on the CPU."""
        ...


def encoder_address(job: JobSpec) -> str:
    """The image encoder whose embeddings a job is conditioned on: the first pipeline that takes any, or `models.clip`.

    A pipeline of the hub that is not on this machine yet is recognised by its request, which has `conditioning`.
    """
    conditioned = {request.diffusion or job.models.diffusion for request in job.requests if request.conditioning}
    for address in (job.models.diffusion, *(request.diffusion for request in job.requests)):
        if address and (address in conditioned or takes_image_embeddings(locate(address).folder)):
            return address
    return job.models.clip


def load_encoder(address: str, device: str) -> Encoder:
    """The image encoder of a pipeline, a CLIP model or DINOv2.

    Raises:
        JobError: it cannot be loaded.
    """
    return load_image_encoder(address, device) if is_pipeline(address) else clip.load_image_encoder(address, device)


def encoder_digest(address: str) -> str:
    """Digest of the files that the embeddings depend on."""
    return image_encoder_digest(address) if is_pipeline(address) else model_digest(address)


def is_pipeline(address: str) -> bool:
    """Whether an encoder's address is that of a pipeline which it is part of."""
    return (resolve(address) / PIPELINE_INDEX).is_file()
