"""The images that a request's criterion sees: what is kept of them, as CLIP embeddings.

Legend: N images, d entries of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import PIL.Image
import torch
from torch import Tensor

from engine.data.images import LabelledImage
from engine.errors import JobError
from engine.generation.given_images import CheckedImages, GivenImages, Reader, check_same
from engine.job.plan import Plan, RequestPlan
from engine.job.spec import JobSpec
from engine.methods.finiteness import usable_embeds
from engine.methods.guidance.scene import GivenFeatures
from engine.methods.neighbours import unit_features
from engine.models.clip import Clip

_FIELD = "guidance.custom.images"
# Rows that are embedded together: a fixed number, as a CPU's kernels choose their order of summation by it.
_ROWS = 8


class CriterionImages:
    """Embeddings of the images that criteria see, each set read once.

    Args:
        job: the job.
        plan: its plan, whose identity has the digests of the images.
        clip: embeds them.
        device: of the embeddings.
    """

    def __init__(self, job: JobSpec, plan: Plan, clip: Clip, device: str) -> None:
        self._job, self._plan, self._clip, self._device = job, plan, clip, device
        self._sets: dict[str, _Embedded] = {}

    def read(self, request: RequestPlan, later: Callable[[Reader], None]) -> None:
        """Have the images of a request read, where its criterion sees some that were not read yet.

        Args:
            later: takes their reader.
        """
        address = self._job.criterion_images(request.spec)
        if not address or address in self._sets:
            return
        where, planned = f"{request.where}.{_FIELD}", self._plan.identity["requests"][request.number]["given_images"]
        images = self._sets[address] = _Embedded(self._clip, where)

        def finish(given: GivenImages) -> None:
            check_same(given.digest, planned, address, where)

        later(Reader(address=address, where=where, take=images.take, finish=finish))

    def of(self, request: RequestPlan) -> GivenFeatures | None:
        """What the criterion of a request sees; None where it sees no images.

        Raises:
            JobError: CLIP gives an image an embedding that has no direction.
        """
        address = self._job.criterion_images(request.spec)
        return self._sets[address].features(self._device) if address else None


class _Embedded:
    """Embeddings of images, made while they are read."""

    def __init__(self, clip: Clip, where: str) -> None:
        self._clip, self._where = clip, where
        self._waiting: list[PIL.Image.Image] = []
        self._embeds: list[Tensor] = []
        self._classes: list[int] = []

    def take(self, image: LabelledImage, _key: bytes) -> None:
        self._waiting.append(image.image)
        self._classes.append(image.class_index)
        if len(self._waiting) == _ROWS:
            self._embed()

    def _embed(self) -> None:
        count = len(self._waiting)
        filled = self._waiting + [self._waiting[-1]] * (_ROWS - count)
        self._embeds.append(self._clip.image_embeds(filled)[:count])
        self._waiting = []

    def features(self, device: str) -> GivenFeatures:
        if self._waiting:
            self._embed()
        embeds = torch.cat(self._embeds)
        if not usable_embeds(embeds).all():
            raise JobError(f"{self._where}: '{self._clip.name}' gives an image an embedding without direction")
        return GivenFeatures(unit_features(embeds).to(device), torch.tensor(self._classes, device=device))


def given_digests(job: JobSpec, requests: Sequence[RequestPlan], images: CheckedImages) -> dict[str, str]:
    """Check the images that criteria see: digest of the classes and pixels of each set, by address.

    Raises:
        JobError: an image source is missing or damaged, or lacks a class that a request asks for.
    """
    addresses = ((request, job.criterion_images(request.spec)) for request in requests)
    return {address: images.of(request, address, _FIELD).digest for request, address in addresses if address}
