"""The image embeddings of a request's samples: drawn from an artefact and screened, or those of given images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from engine.artefact import Conditioning, load_conditioning
from engine.conditioning.screening import ScreenedDraw, ScreeningOptions, screen, unscreened
from engine.errors import JobError
from engine.images import LabelledImage, open_images
from engine.models.addresses import find_artefact, image_encoder_digest
from engine.models.clip import ImageEncoder
from engine.models.runtime import CPU_ROWS
from engine.plan import RequestPlan, SampleSpec
from engine.spec import ConditioningSpec, JobSpec


class Conditioner(Protocol):
    """Where the embedding of a sample comes from."""

    def draw(self, spec: SampleSpec) -> ScreenedDraw:
        """The embedding of a sample: a function of the sample alone."""


class DrawnEmbeddings:
    """Draws from class statistics, each from the sample's own seed (RiskyDiff, step 4).

    Args:
        conditioning: the artefact.
        spec: whether and how draws are screened.
    """

    def __init__(self, conditioning: Conditioning, spec: ConditioningSpec) -> None:
        self._distributions = conditioning.distributions()
        self._predictor = conditioning.fit.predictor if spec.is_screened else None
        self._options = ScreeningOptions(threshold=spec.threshold, max_draws=spec.max_draws)

    def draw(self, spec: SampleSpec) -> ScreenedDraw:
        """The first draw that passes the predictor, or the likeliest; without screening the first of all."""
        label = spec.cell.classes[0]
        if self._predictor is None:
            first = unscreened(self._distributions, label, spec.seed)
            return ScreenedDraw(embedding=first, screened=False, num_draws=0, confidence=0.0)
        return screen(self._distributions, self._predictor, label, spec.seed, self._options)


class GivenEmbeddings:
    """Embeddings of given images, in their order.

    Args:
        embeds: [N, d] of every class by its index, N at least 1.
    """

    def __init__(self, embeds: dict[int, Tensor]) -> None:
        self._embeds = embeds

    def draw(self, spec: SampleSpec) -> ScreenedDraw:
        """The embedding of image `index` of the sample's class, from the first again after the last."""
        own = self._embeds[spec.cell.classes[0]]
        return ScreenedDraw(embedding=own[spec.index % len(own)], screened=False, num_draws=0, confidence=0.0)


def open_conditioner(request: RequestPlan, diffusion: str, labels: Sequence[str], device: str) -> Conditioner:
    """The conditioner of a request that asks for one.

    Args:
        diffusion: address of the Stable unCLIP pipeline.
        labels: class names of the target.

    Raises:
        JobError: artefact or images are not what the request needs.
    """
    spec, where = request.spec.conditioning, f"requests.{request.number}.conditioning"
    assert spec is not None
    if spec.artefact is not None:
        return DrawnEmbeddings(_checked_artefact(request, spec.artefact, diffusion, where), spec)
    assert spec.images is not None
    needed = {cell.classes[0]: request.total // len(request.cells) for cell in request.cells}
    images = _first_of_each(given_images(spec.images, labels), needed)
    if missing := [labels[index] for index in needed if not images[index]]:
        raise JobError(f"{where}.images: '{spec.images}' has no usable image of class '{missing[0]}'; add one")
    encoder = ImageEncoder.load(diffusion, device)
    return GivenEmbeddings({index: _embed(encoder, some) for index, some in images.items()})


def conditioning_digests(job: JobSpec, labels: Sequence[str]) -> dict[str, str]:
    """Digest of the content of every artefact and every set of given images of a job, by address.

    Raises:
        JobError: one is missing, damaged or empty.
    """
    digests: dict[str, str] = {}
    for spec in (request.conditioning for request in job.requests):
        if spec is not None and spec.artefact is not None:
            digests[spec.artefact] = load_artefact(spec.artefact).digest
        elif spec is not None and spec.images is not None and spec.images not in digests:
            digests[spec.images] = _images_digest(given_images(spec.images, labels))
    return digests


def load_artefact(address: str) -> Conditioning:
    """The artefact at an address, checked against its digest.

    Raises:
        JobError: there is none, or it is damaged.
    """
    folder = find_artefact(address)
    if folder is None:
        raise JobError(f"conditioning: there is no '{address}'; make it with `riskforge prepare JOB --data PATH`")
    return load_conditioning(folder)


def given_images(address: str, labels: Sequence[str]) -> Iterator[LabelledImage]:
    """The usable images at an address, in order.

    Raises:
        JobError: there is nothing that can be read.
    """
    source = open_images(address, tuple(labels))
    return (found for found in source.read() if isinstance(found, LabelledImage))


def _checked_artefact(request: RequestPlan, address: str, diffusion: str, where: str) -> Conditioning:
    """The artefact, if its embeddings are of the pipeline's space and it can be drawn from for every class."""
    conditioning = load_artefact(address)
    if conditioning.models["encoder"]["digest"] != image_encoder_digest(diffusion):
        raise JobError(
            f"{where}.artefact: '{address}' describes the embeddings of '{conditioning.models['encoder']['address']}',"
            f" not those of the image encoder of '{diffusion}'; prepare it with a job that samples with this pipeline"
        )
    distributions = conditioning.distributions()
    for cell in request.cells:
        try:
            distributions.check(cell.classes[0])
        except ValueError as error:
            raise JobError(f"{where}.artefact: '{address}': {error}") from None
    return conditioning


def _first_of_each(images: Iterator[LabelledImage], needed: dict[int, int]) -> dict[int, list[LabelledImage]]:
    """The first images of every class, as many as are needed."""
    found: dict[int, list[LabelledImage]] = {index: [] for index in needed}
    for one in images:
        own = found.get(one.class_index)
        if own is not None and len(own) < needed[one.class_index]:
            own.append(one)
    return found


def _embed(encoder: ImageEncoder, images: list[LabelledImage]) -> Tensor:
    """Embeddings [N, d]; calls have a fixed number of rows, so that an image's does not depend on its neighbours."""
    parts = []
    for start in range(0, len(images), CPU_ROWS):
        some = images[start : start + CPU_ROWS]
        padded = [one.image for one in some] + [some[-1].image] * (CPU_ROWS - len(some))
        parts.append(encoder.image_embeds(padded)[: len(some)])
    return torch.cat(parts)


def _images_digest(images: Iterator[LabelledImage]) -> str:
    digest = hashlib.sha256()
    for one in images:
        digest.update(f"{one.class_index}:{one.image.width}x{one.image.height}:".encode() + one.image.tobytes())
    return digest.hexdigest()[:32]
