"""The pass over labelled images: what target and image encoder say of each, in one process or divided over workers.

What comes out depends on the images and their classes, not on their order, their files, their names, or who saw which:
every call of a model has the same number of rows, and the result is ordered by class and content.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import PIL.Image
import torch
from torch import Tensor

from engine.data.images import (
    PART_ROWS,
    ImageSource,
    LabelledImage,
    Place,
    Unusable,
    image_key,
    nothing_usable,
    open_images,
)
from engine.driver.executors.base import Executor, ExecutorEvent, ShardResult
from engine.driver.progress import Display, duration
from engine.driver.run_loop import POLL_SECONDS, UNPLACED_SECONDS, WorkersFailingError, brief
from engine.driver.scheduling.messages import ShardError, ShardProgress, UserFault, WorkerLost, WorkerReady
from engine.errors import JobError, fault
from engine.generation.worker import ShardProgressCallback
from engine.job.plan import ShardSpec
from engine.job.spec import JobSpec
from engine.methods.finiteness import Faults
from engine.models.addresses import image_encoder_digest, locate, model_digest, resolve, target_labels
from engine.models.classifier import Classifier
from engine.models.clip import Clip, ImageEncoder
from engine.models.libraries import quiet_libraries
from engine.models.pipelines import is_unclip
from engine.models.runtime import CPU_ROWS, Hardware, choose_hardware, fix_threads
from engine.models.targets import add_import_folders

GPU_ROWS = 64
# Workers that a part of the pass may lose while their machines live.
MAX_LOSSES = 1
MIN_PART_BYTES = 2**20
_INDEX = "model_index.json"


class Encoder(Protocol):
    """What the pass asks of an image encoder."""

    def image_embeds(self, images: list[PIL.Image.Image]) -> Tensor:
        """Raw embeddings [B, d] of 8-bit images, on the CPU."""
        ...


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Observations:
    """What the models say of the images, ordered by class and content.

    Attributes:
        embeds: [N, d], float32, raw.
        logits: [N, n], divided by the target's temperature.
        classes: [N] class indices.
        temperature: the target's.
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


@dataclass(slots=True, eq=False, kw_only=True)
class PartSeen:
    """What the models say of a part of the images, in the order of the source.

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
        """Images that are through, usable or not."""
        return len(self.keys) + len(self.unusable)


class Observer:
    """Shows images to the target and to the image encoder; it does so in an actor or in the driver alike.

    Args:
        num_rows: images of every model call; the last call is filled up, because kernels choose their order of
            summation by the shape.
        address: of the encoder, for messages.
    """

    def __init__(
        self, source: ImageSource, target: Classifier, encoder: Encoder, num_rows: int, address: str = ""
    ) -> None:
        self._address = address
        self.source = source
        self._target = target
        self._encoder = encoder
        self._num_rows = num_rows

    def sample_shard(
        self, shard: ShardSpec, attempt: int, report: ShardProgressCallback, batch_limit: int
    ) -> Callable[[], Any]:
        """A part of the pass, which executors know as a shard: number `start` of `stop`. Gives a `PartSeen`."""
        seen = self.observe(shard.start, shard.stop, report)
        return lambda: seen

    def observe(self, part: int, num_parts: int, report: Callable[[int], None]) -> PartSeen:
        """Part `part` of `num_parts`; `report` hears the number of images that are through."""
        seen, waiting = PartSeen(temperature=self._target.temperature), list[tuple[Place, LabelledImage]]()
        for place, found in self.source.read_part(part, num_parts):
            if isinstance(found, Unusable):
                seen.unusable.append((place, found))
            else:
                waiting.append((place, found))
            if len(waiting) == self._num_rows:
                self._show(waiting, seen)
                waiting = []
            report(seen.num_tried)
        if waiting:
            self._show(waiting, seen)
        return seen

    def _show(self, waiting: list[tuple[Place, LabelledImage]], seen: PartSeen) -> None:
        """Show a batch to the models, and note what they say."""
        images = [one.image for _, one in waiting]
        padded = [*images, *[images[-1]] * (self._num_rows - len(images))]
        embeds = self._encoder.image_embeds(padded)[: len(images)]
        logits = self._target.score(padded)[: len(images)]
        faults = Faults(len(images))
        faults.check_logits(logits, "models.target", self._target.name)
        faults.check_embeds(embeds, "the image encoder", self._address)
        usable = torch.tensor([not faults[row] for row in range(len(images))])
        seen.embeds.append(embeds[usable])
        seen.logits.append(logits[usable])
        for row, (place, one) in enumerate(waiting):
            if faults[row]:
                seen.unusable.append((place, Unusable(one.name, faults[row])))
            else:
                seen.keys.append((one.class_index, image_key(one.image)))


def encoder_address(job: JobSpec) -> str:
    """The image encoder whose embeddings a job is conditioned on: the first Stable unCLIP pipeline, else `models.clip`.

    A pipeline of the hub that is not here yet is known by its request, which has `conditioning`.
    """
    conditioned = {request.diffusion or job.models.diffusion for request in job.requests if request.conditioning}
    for address in (job.models.diffusion, *(request.diffusion for request in job.requests)):
        if address and (address in conditioned or _is_unclip(locate(address).folder)):
            return address
    return job.models.clip


def load_encoder(address: str, device: str) -> Encoder:
    """The image encoder of a pipeline, or a CLIP model.

    Raises:
        JobError: it cannot be loaded.
    """
    return ImageEncoder.load(address, device) if is_pipeline(address) else Clip.load(address, device)


def encoder_digest(address: str) -> str:
    """Digest of what decides the embeddings."""
    return image_encoder_digest(address) if is_pipeline(address) else model_digest(address)


def is_pipeline(address: str) -> bool:
    """Whether an encoder's address is that of a pipeline which it is part of."""
    return (resolve(address) / _INDEX).is_file()


def _is_unclip(folder: Path | None) -> bool:
    return folder is not None and (folder / _INDEX).is_file() and is_unclip(folder)


def load_observer(job: JobSpec, source: ImageSource, encoder: str) -> Observer:
    """The observer of a job's target, on the hardware of this process.

    Args:
        encoder: address of the image encoder, as in `load_encoder`.

    Raises:
        JobError: a model cannot be loaded, or `runtime` asks for what is impossible here.
    """
    quiet_libraries()
    hardware = choose_hardware(job.runtime)
    fix_threads(hardware)
    target = Classifier.load(job.models.target, hardware.device)
    return Observer(source, target, load_encoder(encoder, hardware.device), _num_rows(job, hardware), encoder)


def load_part_observer(
    job: JobSpec,
    data: str,
    encoder: str,
    *,
    folder: str,
    like: tuple[str, int | None, int],
    imports: tuple[str, ...] = (),
) -> Observer:
    """The observer of a worker, which opens the images itself.

    Args:
        data: address of the images.
        folder: the driver's working folder, which relative addresses start from.
        like: what the driver sees at the address, as `signature` has it.
        imports: the folders that factories are imported from, beside those of the process.

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
    return load_observer(job, source, encoder)


def signature(source: ImageSource) -> tuple[str, int | None, int]:
    """What can be known of a source without reading it: its kind and its size."""
    return source.kind, source.num_images, source.num_bytes


def observe(observer: Observer, data: str, display: Display) -> Observations:
    """Show every image to the models, in this process.

    Args:
        data: the address of the images, for messages.

    Raises:
        JobError: no image can be used.
    """
    source, started = observer.source, time.monotonic()

    def report(num_tried: int) -> None:
        if num_tried:
            display.advance(_progress_text(num_tried, source.num_images, time.monotonic() - started))

    return _merged([observer.observe(0, 1, report)], source, data)


def observe_divided(
    source: ImageSource, data: str, executor: Executor, factory: Callable[[], Observer], display: Display
) -> Observations:
    """Show every image to the models, a part of them on each of the executor's workers.

    The result is that of one process, bit for bit where the workers run on CPUs. It is put together here: 4 (d + n)
    bytes an image for d entries of an embedding and n classes, twice that for a moment; 14 GB for 10^6 images of
    ImageNet's classes.

    Args:
        factory: loads an observer in its process. Picklable.

    Raises:
        RiskforgeError: a worker met what only the user can mend, or no image can be used.
        WorkersFailingError: a part of the images lost its worker once more after it was begun again, or a defect.
    """
    return _merged(_Division(source, executor, display).run(factory), source, data)


class _Division:
    """The pass in as many parts as there are workers. A part whose worker is lost begins again on a new one."""

    def __init__(self, source: ImageSource, executor: Executor, display: Display) -> None:
        self._source = source
        self._executor = executor
        self._display = display
        self._parts: dict[int, int] = {}
        self._losses: Counter[int] = Counter()
        self._num_tried: Counter[int] = Counter()
        self._seen: dict[int, PartSeen] = {}
        self._started: float | None = None

    def run(self, factory: Callable[[], Observer]) -> list[PartSeen]:
        """What was seen, part by part."""
        self._display.phase(self._executor.opening)
        self._num_parts = self._executor.open(factory, _most_parts(self._source))
        self._display.phase(f"loading models ({self._num_parts} worker{'s' if self._num_parts > 1 else ''})")
        for part in range(self._num_parts):
            self._begin(part)
        deadline = time.monotonic() + UNPLACED_SECONDS
        while len(self._seen) < self._num_parts:
            for event in self._executor.poll(POLL_SECONDS):
                self._take(event)
            self._show_progress()
            deadline = self._note_unplaced(deadline)
        return [self._seen[part] for part in range(self._num_parts)]

    def _begin(self, part: int) -> None:
        """Start a worker for a part."""
        worker = len(self._parts)
        self._parts[worker] = part
        self._executor.start_worker(worker)

    def _take(self, event: ExecutorEvent) -> None:
        """Do what an event asks for."""
        if isinstance(event, UserFault):
            raise fault(event.message, event.exit_code)
        part = self._parts[event.worker]
        if isinstance(event, WorkerReady):
            self._started = self._started or time.monotonic()
            shard = ShardSpec(number=part, request=0, start=part, stop=self._num_parts)
            self._executor.submit(event.worker, shard, 1 + self._losses[part])
        elif isinstance(event, ShardProgress):
            self._num_tried[part] = event.num_done
        elif isinstance(event, ShardResult):
            seen: Any = event.outcome
            self._seen[part], self._num_tried[part] = seen, seen.num_tried
            self._executor.stop_worker(event.worker)
        elif isinstance(event, WorkerLost):
            self._replace(part, event)
        elif isinstance(event, ShardError):
            raise WorkersFailingError(f"the pass over the images failed on a worker: {brief(event.message)}")

    def _replace(self, part: int, event: WorkerLost) -> None:
        """Begin a part again; a machine that was lost is nobody's fault."""
        reason = brief(event.message)
        self._losses[part] += not event.node_lost
        if self._losses[part] > MAX_LOSSES:
            raise WorkersFailingError(
                f"{self._losses[part]} workers were lost with the same part of the images, the last one: {reason};"
                " nothing is stored, the same command begins again"
            )
        self._num_tried[part] = 0
        self._display.notice(f"worker {event.worker} is replaced, its part of the images begins again: {reason}")
        self._begin(part)

    def _show_progress(self) -> None:
        if num_tried := self._num_tried.total():
            assert self._started is not None, "a worker that tells of images was ready"
            seconds = time.monotonic() - self._started
            self._display.advance(_progress_text(num_tried, self._source.num_images, seconds))

    def _note_unplaced(self, deadline: float) -> float:
        """Say once when workers wait for a machine for long. Returns the time to look again."""
        if time.monotonic() < deadline:
            return deadline
        if num := self._executor.num_unplaced:
            self._display.notice(f"{num} worker(s) still wait for room on the cluster; ask for fewer with --workers")
            return float("inf")
        return time.monotonic() + UNPLACED_SECONDS


def _most_parts(source: ImageSource) -> int:
    """So many that each has something to do."""
    if source.num_images is None:
        return 1 + source.num_bytes // MIN_PART_BYTES
    return max(1, -(-source.num_images // PART_ROWS))


def _merged(parts: Sequence[PartSeen], source: ImageSource, data: str) -> Observations:
    """What was seen in all parts, in the order of classes and contents.

    Raises:
        JobError: no image can be used.
    """
    keys = [key for part in parts for key in part.keys]
    unusable = [one for _, one in sorted((one for part in parts for one in part.unusable), key=lambda one: one[0])]
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


def _num_rows(job: JobSpec, hardware: Hardware) -> int:
    if not hardware.is_cuda:
        return CPU_ROWS
    return GPU_ROWS if job.runtime.batch_size == "auto" else job.runtime.batch_size


def _progress_text(done: int, total: int | None, seconds: float) -> str:
    rate = done / seconds if seconds > 0 else 0.0
    text = f"{done}{f'/{total}' if total else ''} images"
    if rate:
        text += f", {rate:.1f}/s"
    return f"{text}, ETA {duration((total - done) / rate)}" if rate and total and done < total else text
