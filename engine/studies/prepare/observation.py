"""The pass over labelled images: what target and image encoder predict for each.

The result depends on the images and their classes, not on their order, their files, their names, or which worker
processed which: every call of a model has the same number of rows, and the result is ordered by class and content.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from engine.data.images import ImageSource, LabelledImage, Place, Unusable, image_key, nothing_usable, open_images
from engine.driver.progress import Display, duration
from engine.errors import JobError
from engine.generation.worker import ShardProgressCallback
from engine.job.plan import ShardSpec
from engine.job.spec import JobSpec
from engine.methods.finiteness import Faults
from engine.models.classifier import Classifier
from engine.models.factories import add_import_folders
from engine.models.hardware import CPU_ROWS, Hardware, choose_hardware, fix_threads
from engine.models.labels import target_labels
from engine.models.library_logging import quiet_libraries
from engine.studies.prepare.encoders import Encoder, load_encoder

GPU_ROWS = 64


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Observations:
    """The models' outputs for all images, ordered by class and content.

    Attributes:
        embeds: [N, d], float32, raw; d = 0 without an image encoder.
        logits: [N, n], divided by the target's temperature; n = 0 without a target.
        classes: [N] class indices.
        temperature: the target's; 1 without one.
        images_digest: digest of the images and their classes.
        unusable: what could not be used, in the order of the source.
    """

    embeds: Tensor
    logits: Tensor
    classes: Tensor
    temperature: float
    images_digest: str
    unusable: tuple[Unusable, ...]

    @property
    def errors(self) -> Tensor:
        """Whether the target errs, [N] booleans."""
        return self.logits.argmax(1) != self.classes

    def num_errors(self, num_classes: int) -> tuple[int, ...]:
        """Errors of the target by class index."""
        return tuple(torch.bincount(self.classes[self.errors], minlength=num_classes).tolist())


@dataclass(slots=True, eq=False, kw_only=True)
class PartObservations:
    """The models' outputs for a part of the images, in the order of the source.

    Attributes:
        keys: class index and digest of the pixels of every usable image.
        embeds, logits: of the same images, batch by batch.
        unusable: with their places in the source.
    """

    temperature: float
    keys: list[tuple[int, bytes]] = field(default_factory=list)
    embeds: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    unusable: list[tuple[Place, Unusable]] = field(default_factory=list)

    @property
    def num_tried(self) -> int:
        """Images that were processed, usable or not."""
        return len(self.keys) + len(self.unusable)


class Observer:
    """Runs the target and the image encoder on images, in an actor or in the driver alike.

    Args:
        target: None where the encoder's embeddings are all that is needed.
        encoder: None where the target's logits are all that is needed.
        num_rows: images of every model call; the last call is filled up, because kernels choose their order of
            summation by the shape.
        address: of the encoder, for messages.
    """

    def __init__(
        self, source: ImageSource, target: Classifier | None, encoder: Encoder | None, num_rows: int, address: str = ""
    ) -> None:
        self._address = address
        self.source = source
        self._target = target
        self._encoder = encoder
        self._num_rows = num_rows

    def sample_shard(
        self, shard: ShardSpec, attempt: int, report: ShardProgressCallback, batch_limit: int
    ) -> Callable[[], Any]:
        """A part of the pass, which is a shard to executors: number `start` of `stop`. Returns `PartObservations`."""
        observed = self.observe(shard.start, shard.stop, report)
        return lambda: observed

    def observe(self, part: int, num_parts: int, report: Callable[[int], None]) -> PartObservations:
        """Part `part` of `num_parts`; `report` is called with the number of images that were processed."""
        observed = PartObservations(temperature=self._target.temperature if self._target else 1.0)
        waiting = list[tuple[Place, LabelledImage]]()
        for place, item in self.source.read_part(part, num_parts):
            if isinstance(item, Unusable):
                observed.unusable.append((place, item))
            else:
                waiting.append((place, item))
            if len(waiting) == self._num_rows:
                self._add_batch(waiting, observed)
                waiting = []
            report(observed.num_tried)
        if waiting:
            self._add_batch(waiting, observed)
        return observed

    def _add_batch(self, batch: list[tuple[Place, LabelledImage]], observed: PartObservations) -> None:
        """Run the models on a batch, and add their outputs to `observed`."""
        images = [item.image for _, item in batch]
        padded = [*images, *[images[-1]] * (self._num_rows - len(images))]
        logits = embeds = torch.empty(len(images), 0)
        faults = Faults(len(images))
        if self._target is not None:
            logits = self._target.score(padded)[: len(images)]
            faults.check_logits(logits, "models.target", self._target.name)
        if self._encoder is not None:
            embeds = self._encoder.image_embeds(padded)[: len(images)]
            faults.check_embeds(embeds, "the image encoder", self._address)
        usable = torch.tensor([not faults[row] for row in range(len(images))])
        observed.embeds.append(embeds[usable])
        observed.logits.append(logits[usable])
        for row, (place, item) in enumerate(batch):
            if faults[row]:
                observed.unusable.append((place, Unusable(item.name, faults[row])))
            else:
                observed.keys.append((item.class_index, image_key(item.image)))


def load_observer(job: JobSpec, source: ImageSource, encoder: str | None, *, with_target: bool = True) -> Observer:
    """The observer of a job's target, on the hardware of this process.

    Args:
        encoder: address of the image encoder, as in `load_encoder`; None for none.
        with_target: whether the target is observed too.

    Raises:
        JobError: a model cannot be loaded, or `runtime` asks for what is impossible here.
    """
    quiet_libraries()
    hardware = choose_hardware(job.runtime)
    fix_threads(hardware)
    # With its own temperature, whatever the job names: an artefact depends on the target and the images alone.
    target = Classifier.load(job.models.target, hardware.device) if with_target else None
    loaded = load_encoder(encoder, hardware.device) if encoder else None
    return Observer(source, target, loaded, batch_size(job, hardware), encoder or "")


def load_part_observer(
    job: JobSpec,
    data: str,
    encoder: str | None,
    *,
    folder: str,
    like: tuple[str, int | None, int],
    imports: tuple[str, ...] = (),
    with_target: bool = True,
) -> Observer:
    """The observer of a worker, which opens the images itself.

    Args:
        data: address of the images.
        folder: the driver's working folder, which relative addresses start from.
        like: `signature` of the source as the driver has it.
        imports: the folders that factories are imported from, in addition to those of the process.
        with_target: as in `load_observer`.

    Raises:
        JobError: as `load_observer`, or the images are not the driver's.

    Side effects: makes `folder` the working folder of this process, where there is one of that name, and adds to
    `sys.path`.
    """
    with contextlib.suppress(OSError):
        os.chdir(folder)
    add_import_folders(imports)
    source = None
    with contextlib.suppress(JobError):
        source = open_images(data, tuple(target_labels(job)))
    if source is None or signature(source) != like:
        raise JobError(
            f"--data: '{data}' as {socket.gethostname()} sees it is not what the driver sees; use a folder that all"
            " machines share"
        )
    return load_observer(job, source, encoder, with_target=with_target)


def signature(source: ImageSource) -> tuple[str, int | None, int]:
    """What is known of a source without reading it: its kind, its number of images and its bytes."""
    return source.kind, source.num_images, source.num_bytes


def observe(observer: Observer, data: str, display: Display) -> Observations:
    """Run the models on every image, in this process.

    Args:
        data: the address of the images, for messages.

    Raises:
        JobError: no image can be used.
    """
    source, started = observer.source, time.monotonic()

    def report(num_tried: int) -> None:
        if num_tried:
            display.advance(progress_text(num_tried, source.num_images, time.monotonic() - started))

    return merge_observations([observer.observe(0, 1, report)], source, data)


def merge_observations(parts: Sequence[PartObservations], source: ImageSource, data: str) -> Observations:
    """The observations of all parts, in the order of classes and contents.

    Raises:
        JobError: no image can be used.
    """
    keys = [key for part in parts for key in part.keys]
    placed = sorted((pair for part in parts for pair in part.unusable), key=lambda pair: pair[0])
    unusable = [item for _, item in placed]
    if not keys:
        raise JobError(nothing_usable(source, "--data", data, unusable))
    order = sorted(range(len(keys)), key=keys.__getitem__)
    digest = hashlib.sha256()
    for row in order:
        index, pixels = keys[row]
        digest.update(index.to_bytes(8, "big") + pixels)
    return Observations(
        embeds=torch.cat([batch for part in parts for batch in part.embeds])[order],
        logits=torch.cat([batch for part in parts for batch in part.logits])[order],
        classes=torch.tensor([keys[row][0] for row in order]),
        temperature=parts[0].temperature,
        images_digest=digest.hexdigest()[:32],
        unusable=tuple(unusable),
    )


def batch_size(job: JobSpec, hardware: Hardware) -> int:
    """Images of every model call of a pass."""
    if not hardware.is_cuda:
        return CPU_ROWS
    return GPU_ROWS if job.runtime.batch_size == "auto" else job.runtime.batch_size


def progress_text(done: int, total: int | None, seconds: float) -> str:
    """How many images were processed, at which rate, and for how long it will go on."""
    rate = done / seconds if seconds > 0 else 0.0
    text = f"{done}{f'/{total}' if total else ''} images"
    if rate:
        text += f", {rate:.1f}/s"
    return f"{text}, ETA {duration((total - done) / rate)}" if rate and total and done < total else text
