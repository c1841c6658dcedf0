"""From a validation set to a conditioning artefact: one pass over the images, then everything that is fitted on it.

RiskyDiff (Yu et al., AAAI 2026, arXiv 2512.18722), steps 1 to 3: embeddings and errors, class distributions, error
predictor. What comes out depends on the images and their classes, not on their order, their files or their names.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import PIL.Image
import torch
from torch import Tensor

from engine.artefact import Conditioning, save_conditioning
from engine.conditioning.gaussians import ClassMoments
from engine.conditioning.mixtures import ClassMixtures, MixtureOptions, fit_mixtures
from engine.conditioning.predictor import PredictorOptions, fit_predictor
from engine.dataset.store import open_store
from engine.errors import JobError, OutputError
from engine.images import SOUGHT, Found, ImageSource, LabelledImage, Unusable, open_images
from engine.models.addresses import check_addresses, model_digest
from engine.models.classifier import Classifier
from engine.models.clip import Clip
from engine.models.runtime import CPU_ROWS, Hardware, choose_hardware
from engine.progress import Display, duration
from engine.run import target_labels
from engine.spec import JobSpec
from engine.temperature import fit_temperature
from engine.worker import quiet_libraries

GPU_ROWS = 64


class ImageEncoder(Protocol):
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
        images_digest: digest of the images and their classes.
        unusable: what could not be used, as it was found.
    """

    embeds: Tensor
    logits: Tensor
    classes: Tensor
    images_digest: str
    unusable: tuple[Unusable, ...]

    @property
    def errors(self) -> Tensor:
        """Whether the target errs, [N] booleans."""
        return self.logits.argmax(1) != self.classes


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A stored artefact.

    Attributes:
        conditioning: what it holds.
        path: its folder.
        was_there: whether an equal one was there already.
        source: where the images came from, in words.
        seconds: time from the start.
    """

    conditioning: Conditioning
    path: Path
    was_there: bool
    source: str
    seconds: float


def prepare_conditioning(
    job: JobSpec,
    data: str,
    *,
    display: Display,
    folder: str | None = None,
    components: int = 1,
    encoder: str | None = None,
) -> Prepared:
    """Make the conditioning artefact of a job's target from labelled images.

    Args:
        data: a path or a named set, as in `engine.images.open_images`.
        folder: where the artefact goes; `artefact_folder(job)` where not given.
        components: Gaussians of a class.
        encoder: address of the CLIP model whose image embeddings are described; `models.clip` where not given.

    Raises:
        RiskforgeError: models, data or folder are not as they must be; no image can be used.
    """
    started = time.monotonic()
    try:
        display.phase("checking models and data")
        check_addresses(job)
        home = Path(folder).expanduser() if folder is not None else artefact_folder(job)
        _check_writable(home)
        source = open_images(data, tuple(target_labels(job)))
        display.phase("loading models")
        quiet_libraries()
        hardware, address = choose_hardware(job.runtime), encoder or job.models.clip
        target = Classifier.load(job.models.target, hardware.device)
        clip = Clip.load(address, hardware.device)
        seen = observe(source, data, target, clip, num_rows=_num_rows(job, hardware), display=display)
        display.phase("fitting class statistics and error predictor")
        models = {
            role: {"address": one, "digest": model_digest(one)}
            for role, one in (("target", job.models.target), ("encoder", address))
        }
        conditioning = fit_conditioning(seen, target, models, components)
        path, was_there = save_conditioning(conditioning, home)
    finally:
        display.close()
    return Prepared(
        conditioning=conditioning,
        path=path,
        was_there=was_there,
        source=source.kind,
        seconds=time.monotonic() - started,
    )


def artefact_folder(job: JobSpec) -> Path:
    """Where a job's artefacts go by default: `OUTPUT-conditioning`, beside its output.

    Raises:
        OutputError: an output that this version does not store to.
    """
    root = open_store(job.output.uri).root
    return root.with_name(f"{root.name}-conditioning")


def observe(
    source: ImageSource, data: str, target: Classifier, encoder: ImageEncoder, *, num_rows: int, display: Display
) -> Observations:
    """Show every image to the target and to the image encoder.

    Args:
        data: the address of the source, for messages.
        num_rows: images of every model call; the last call is filled up, because kernels choose their order of
            summation by the shape.

    Raises:
        JobError: no image can be used.
    """
    run = _Pass(target=target, encoder=encoder, num_rows=num_rows)
    started = time.monotonic()
    for found in source.read():
        run.take(found)
        if run.num_tried:
            display.advance(_progress_text(run.num_tried, source.num_images, time.monotonic() - started))
    run.flush()
    if not run.keys:
        raise JobError(_nothing_usable(source, data, run.unusable))
    return run.result()


def fit_conditioning(
    seen: Observations, target: Classifier, models: dict[str, dict[str, str]], components: int
) -> Conditioning:
    """Everything that is fitted on a pass, with the options that every job has."""
    labels, options = tuple(target.labels), PredictorOptions()
    statistics, how = _fit_statistics(seen, labels, components)
    return Conditioning(
        statistics=statistics,
        num_errors=tuple(torch.bincount(seen.classes[seen.errors], minlength=len(labels)).tolist()),
        fit=fit_predictor(seen.embeds, seen.errors, seen.classes, labels, options),
        temperature=fit_temperature(seen.logits.double() * target.temperature, seen.classes, target.temperature),
        models=models,
        options={"statistics": how, "predictor": dataclasses.asdict(options)},
        images_digest=seen.images_digest,
        unusable=seen.unusable,
    )


def _fit_statistics(
    seen: Observations, labels: tuple[str, ...], components: int
) -> tuple[ClassMoments | ClassMixtures, dict[str, object]]:
    """Class statistics, and the options that they are made with."""
    if components == 1:
        moments = ClassMoments.empty(labels, seen.embeds.shape[1])
        moments.add(seen.embeds, seen.classes)
        return moments, {"components": 1}
    options = MixtureOptions(components=components)
    return fit_mixtures(seen.embeds, seen.classes, labels, options), dataclasses.asdict(options)


@dataclass(slots=True, eq=False, kw_only=True)
class _Pass:
    """Images on their way through the models.

    Attributes:
        keys: class index and digest of the pixels of every usable image.
    """

    target: Classifier
    encoder: ImageEncoder
    num_rows: int
    waiting: list[LabelledImage] = field(default_factory=list)
    keys: list[tuple[int, bytes]] = field(default_factory=list)
    embeds: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    unusable: list[Unusable] = field(default_factory=list)

    @property
    def num_tried(self) -> int:
        """Images that are through, usable or not."""
        return len(self.keys) + len(self.unusable)

    def take(self, found: Found) -> None:
        """Take in what a source found, and call the models where it fills a batch."""
        if isinstance(found, Unusable):
            self.unusable.append(found)
            return
        self.waiting.append(found)
        if len(self.waiting) == self.num_rows:
            self.flush()

    def flush(self) -> None:
        """Show what waits to the models."""
        if not self.waiting:
            return
        images = [one.image for one in self.waiting]
        padded = [*images, *[images[-1]] * (self.num_rows - len(images))]
        embeds = self.encoder.image_embeds(padded)[: len(images)]
        logits = self.target.score(padded)[: len(images)]
        finite = torch.isfinite(embeds).all(1) & torch.isfinite(logits).all(1)
        self.embeds.append(embeds[finite])
        self.logits.append(logits[finite])
        for one, is_finite in zip(self.waiting, finite.tolist(), strict=True):
            if is_finite:
                self.keys.append((one.class_index, _pixel_digest(one.image)))
            else:
                self.unusable.append(Unusable(one.name, "gives embeddings or logits that are not finite"))
        self.waiting = []

    def result(self) -> Observations:
        """What was seen, in the order of classes and contents."""
        order = sorted(range(len(self.keys)), key=self.keys.__getitem__)
        digest = hashlib.sha256()
        for row in order:
            index, pixels = self.keys[row]
            digest.update(index.to_bytes(8, "big") + pixels)
        return Observations(
            embeds=torch.cat(self.embeds)[order],
            logits=torch.cat(self.logits)[order],
            classes=torch.tensor([self.keys[row][0] for row in order]),
            images_digest=digest.hexdigest()[:32],
            unusable=tuple(self.unusable),
        )


def _pixel_digest(image: PIL.Image.Image) -> bytes:
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).digest()


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


def _nothing_usable(source: ImageSource, data: str, unusable: list[Unusable]) -> list[str]:
    if not unusable:
        return [f"--data: '{data}' has no image (read as {source.kind}); give {SOUGHT}"]
    reasons = [f"{one.name}: {one.reason}" for one in unusable[:3]]
    more = f"; and {len(unusable) - 3} more" if len(unusable) > 3 else ""
    return [f"--data: '{data}' has no usable image (read as {source.kind}): {'; '.join(reasons)}{more}; give {SOUGHT}"]


def _check_writable(folder: Path) -> None:
    """Find out before the pass what would stop the artefact after it.

    Raises:
        OutputError: the folder, or the nearest one above it that exists, is a file or not writable.
    """
    nearest = next(one for one in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(one))
    if not nearest.is_dir():
        raise OutputError(f"--output: {nearest} is a file, not a folder; choose another")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise OutputError(f"--output: {nearest} is not writable; change the permissions or choose another")
