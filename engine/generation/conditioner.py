"""The image embeddings of a request's samples: drawn from an artefact and screened, or those of given images."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Protocol

import PIL.Image
import torch
from torch import Tensor

from engine.data.images import LabelledImage
from engine.errors import JobError
from engine.generation.artefact import Conditioning, load_conditioning
from engine.generation.given_images import CheckedImages, GivenImages, ProgressCallback, Reader, check_same, read_for
from engine.job.plan import RequestPlan, SampleSpec
from engine.job.spec import ConditioningSpec, JobSpec
from engine.methods.conditioning.screening import ScreenedDraw, ScreeningOptions, screen, unscreened
from engine.models.artefacts import find_artefact
from engine.models.diffusion import load_image_encoder
from engine.models.digests import image_encoder_digest, model_digest
from engine.models.hardware import CPU_ROWS
from engine.models.pipelines.image_encoder import ImageEncoder


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
        """The first draw that passes the predictor, or the likeliest; without screening simply the first."""
        label = spec.cell.classes[0]
        if self._predictor is None:
            first = unscreened(self._distributions, label, spec.seed)
            return ScreenedDraw(embedding=first, screened=False, num_draws=0, confidence=0.0)
        return screen(self._distributions, self._predictor, label, spec.seed, self._options)


class GivenEmbeddings:
    """Embeddings of given images, in their order.

    Args:
        embeds: [N, d] of every class by its index, N at least 1; or what gives them once the images are read.
        encoder: whose they are, for messages.
    """

    def __init__(self, embeds: dict[int, Tensor] | Callable[[], dict[int, Tensor]], encoder: str) -> None:
        self._embeds_of = embeds if callable(embeds) else lambda: embeds
        self._encoder = encoder

    def draw(self, spec: SampleSpec) -> ScreenedDraw:
        """The embedding of image `index` of the sample's class, from the first again after the last.

        Raises:
            ValueError: it is not finite.
        """
        own = self._embeds_of()[spec.cell.classes[0]]
        embedding = own[spec.index % len(own)]
        if not embedding.isfinite().all():
            raise ValueError(f"the image encoder of '{self._encoder}' gives an image embedding that is not finite")
        return ScreenedDraw(embedding=embedding, screened=False, num_draws=0, confidence=0.0)


def open_conditioner(
    request: RequestPlan,
    diffusion: str,
    labels: Sequence[str],
    device: str,
    digest: str,
    later: Callable[[Reader], None] | None = None,
) -> Conditioner:
    """The conditioner of a request that asks for one, in a worker.

    Args:
        diffusion: address of the pipeline whose image encoder is used.
        labels: class names of the target.
        digest: of artefact or images, as the plan has it.
        later: takes the reader of given images, which are then read before the first draw; at once where not given.

    Raises:
        JobError: artefact or images differ from those that the plan was made with.
    """
    spec = request.spec.conditioning
    assert spec is not None
    if spec.artefact is not None:
        conditioning = _load_artefact(spec.artefact, _where(request, "artefact"))
        check_same(conditioning.digest, digest, spec.artefact, _where(request, "artefact"))
        return DrawnEmbeddings(conditioning, spec)
    assert spec.images is not None
    address, where = spec.images, _where(request, "images")
    encoder = load_image_encoder(diffusion, device)
    needed = {cell.classes[0]: request.spec.attempts_limit for cell in request.cells}
    embedder = _Embedder(encoder, needed)

    def finish(given: GivenImages) -> None:
        check_same(given.digest, digest, address, where)

    reader = Reader(address=address, where=where, take=embedder.take, finish=finish)
    if later is None:
        read_for([reader], labels)
    else:
        later(reader)
    return GivenEmbeddings(functools.cache(embedder.embeds), diffusion)


def conditioning_digests(
    job: JobSpec, requests: Sequence[RequestPlan], images: CheckedImages, notice: ProgressCallback
) -> dict[str, str]:
    """Check the artefacts and the given images of a job, before any model is loaded.

    Args:
        images: reads the given ones.
        notice: called with what the user should know, and need not fix.

    Returns:
        Digest of the content of each, by address.

    Raises:
        JobError: an artefact or an image source is missing, damaged, of another embedding space, or lacks a class that
            a request asks for.
    """
    digests: dict[str, str] = {}
    for request in requests:
        spec, diffusion = request.spec.conditioning, request.spec.diffusion or job.models.diffusion
        if spec is not None and spec.artefact is not None:
            conditioning = _checked_artefact(request, spec.artefact, diffusion)
            if spec.is_screened and spec.artefact not in digests:
                _note_other_target(job, spec.artefact, conditioning, notice)
            digests[spec.artefact] = conditioning.digest
        elif spec is not None and spec.images is not None:
            digests[spec.images] = images.of(request, spec.images, "conditioning.images").digest
    return digests


class _Embedder:
    """Embeds the first images of every class, as many as are needed, a few at a time.

    Calls have a fixed number of rows, so that the embedding of an image does not depend on its neighbours.
    """

    def __init__(self, encoder: ImageEncoder, needed: dict[int, int]) -> None:
        self._encoder = encoder
        self._left = dict(needed)
        self._waiting: list[tuple[int, PIL.Image.Image]] = []
        self._done: dict[int, list[Tensor]] = {index: [] for index in needed}

    def take(self, image: LabelledImage, _key: bytes = b"") -> None:
        """Queue an image, if its class lacks images."""
        if self._left.get(image.class_index, 0) > 0:
            self._left[image.class_index] -= 1
            self._waiting.append((image.class_index, image.image))
        if len(self._waiting) == CPU_ROWS:
            self._flush()

    def embeds(self) -> dict[int, Tensor]:
        """[N, d] by class, in the order of the images."""
        self._flush()
        return {index: torch.stack(rows) for index, rows in self._done.items()}

    def _flush(self) -> None:
        if not self._waiting:
            return
        images = [image for _, image in self._waiting]
        embeds = self._encoder.image_embeds(images + [images[-1]] * (CPU_ROWS - len(images)))
        for (index, _), row in zip(self._waiting, embeds[: len(images)], strict=True):
            self._done[index].append(row)
        self._waiting = []


def _load_artefact(address: str, where: str) -> Conditioning:
    folder = find_artefact(address)
    if folder is None:
        raise JobError(f"{where}: there is no '{address}'; make it with `riskforge prepare JOB --data PATH`")
    try:
        return load_conditioning(folder)
    except JobError as error:
        raise JobError([f"{where}: {problem}" for problem in error.problems]) from None


def _checked_artefact(request: RequestPlan, address: str, diffusion: str) -> Conditioning:
    """The artefact, if its embeddings are of the pipeline's space and it can be drawn from for every class."""
    where = _where(request, "artefact")
    conditioning = _load_artefact(address, where)
    if conditioning.models["encoder"]["digest"] != image_encoder_digest(diffusion):
        raise JobError(
            f"{where}: '{address}' describes the embeddings of '{conditioning.models['encoder']['address']}', not"
            f" those of the image encoder of '{diffusion}'; prepare it with a job that samples with this pipeline"
        )
    distributions = conditioning.distributions()
    for cell in request.cells:
        try:
            distributions.check(cell.classes[0])
        except ValueError as error:
            raise JobError(f"{where}: '{address}': {error}") from None
    return conditioning


def _note_other_target(job: JobSpec, address: str, conditioning: Conditioning, notice: ProgressCallback) -> None:
    """An error predictor knows the errors of the target that it was prepared with."""
    known = conditioning.models["target"]
    if known["digest"] != model_digest(job.models.target):
        notice(
            f"'{address}' was prepared with another target ('{known['address']}' as it was then) than"
            f" '{job.models.target}' is now: screening seeks the errors of the former; `riskforge prepare` makes"
            " another artefact"
        )


def _where(request: RequestPlan, field: str) -> str:
    return f"{request.where}.conditioning.{field}"
