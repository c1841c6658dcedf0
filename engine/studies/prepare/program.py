"""From a validation set to an artefact: one pass over the images, then everything that is fitted on it.

RiskyDiff (Yu et al., AAAI 2026, arXiv 2512.18722), steps 1 to 3: embeddings and errors, class distributions, error
predictor; and the temperature of the target, or that alone. Or the images themselves, by their features, as an oracle.
The artefact depends on the images and their classes, not on their order, their files or their names.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from engine.data.images import ImageSource, open_images
from engine.driver.executors.base import Executor
from engine.driver.progress import Display, byte_size
from engine.errors import JobError
from engine.generation.artefact import Conditioning, save_conditioning
from engine.job.spec import JobSpec
from engine.models.addresses import resolve
from engine.models.artefact_documents import kind_of
from engine.models.clip_checks import is_siglip
from engine.models.configurations import CALIBRATION_DOCUMENT, NEIGHBOURS_DOCUMENT
from engine.models.digests import model_digest
from engine.models.factories import import_folders
from engine.models.job_checks import check_addresses, check_target
from engine.models.labels import target_labels
from engine.models.open_clip_checks import clip_config, is_open_clip
from engine.models.oracle_checks import check_encoder
from engine.studies.prepare.calibration import CalibrationFit, save_calibration
from engine.studies.prepare.distributed_pass import observe_distributed
from engine.studies.prepare.encoders import encoder_address, encoder_digest, is_pipeline
from engine.studies.prepare.fitting import fit_calibration, fit_conditioning
from engine.studies.prepare.folders import CONDITIONING, artefact_address, open_home
from engine.studies.prepare.neighbours import Neighbours, check_size, fit_neighbours, save_neighbours
from engine.studies.prepare.observation import (
    Observations,
    load_observer,
    load_part_observer,
    observe,
    signature,
)

# Above these sizes the pass is worth starting workers for. The number of images in tars is not known beforehand.
LARGE_SET = 20_000
LARGE_BYTES = 10**9
CALIBRATION, NEIGHBOURS = kind_of(CALIBRATION_DOCUMENT), kind_of(NEIGHBOURS_DOCUMENT)
Content = Conditioning | CalibrationFit | Neighbours


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """A stored artefact.

    Attributes:
        content: what it holds.
        path: its folder; of an artefact at an address a copy, which this process removes in the end.
        address: where it is.
        was_there: whether an equal artefact was there already.
        source: where the images came from, in words.
        encoder: whose image embeddings are described, in words; empty for a calibration.
        seconds: time from the start.
        advice: what to do about labels of images that are no classes; empty where all are.
    """

    content: Content
    path: Path
    address: str
    was_there: bool
    source: str
    encoder: str
    seconds: float
    advice: str = ""

    @property
    def conditioning(self) -> Conditioning:
        """The content of a conditioning artefact."""
        assert isinstance(self.content, Conditioning)
        return self.content

    @property
    def fitted(self) -> Conditioning | CalibrationFit:
        """The content of an artefact that has a temperature."""
        assert not isinstance(self.content, Neighbours)
        return self.content

    @property
    def neighbours(self) -> Neighbours:
        """The content of a *neighbours* artefact."""
        assert isinstance(self.content, Neighbours)
        return self.content


def prepare_conditioning(
    job: JobSpec,
    data: str,
    *,
    display: Display,
    folder: str | None = None,
    components: int = 1,
    encoder: str | None = None,
    executor: Executor | None = None,
    only_large: bool = False,
) -> Prepared:
    """Make the conditioning artefact of a job's target from labelled images.

    Args:
        data: a path or a named set, as in `engine.data.images.open_images`.
        folder: where the artefact goes; `artefact_folder(job)` where not given.
        components: Gaussians of a class.
        encoder: address of the CLIP model, or of the Stable unCLIP pipeline, whose image embeddings are described;
            `engine.studies.prepare.encoders.encoder_address` where not given.
        executor: its workers process the images in parts; where not given, this process alone does. It is closed in
            the end.
        only_large: whether a set that is not large is processed by this process even if there is an executor.

    Raises:
        RiskforgeError: models, data or folder are invalid, or no image can be used.
        WorkersFailingError: workers fail over and over.
    """
    return _prepare(job, data, display, folder, executor, only_large=only_large, encoder=encoder, components=components)


def prepare_calibration(
    job: JobSpec,
    data: str,
    *,
    display: Display,
    folder: str | None = None,
    executor: Executor | None = None,
    only_large: bool = False,
) -> Prepared:
    """Make the calibration artefact of a job's target from labelled images: of its models only the target is needed.

    Args:
        folder: where the artefact goes; `artefact_folder(job, "calibration")` where not given.

    The other arguments and the errors are those of `prepare_conditioning`.
    """
    return _prepare(job, data, display, folder, executor, only_large=only_large, kind=CALIBRATION)


def prepare_neighbours(
    job: JobSpec,
    data: str,
    encoder: str,
    *,
    display: Display,
    folder: str | None = None,
    executor: Executor | None = None,
    only_large: bool = False,
) -> Prepared:
    """Make an oracle for the classes of a job's target from labelled images: their nearest neighbours by an encoder.

    Args:
        encoder: address of the CLIP model whose image embeddings are the features.
        folder: where the artefact goes; `artefact_folder(job, "neighbours")` where not given.

    The other arguments and the errors are those of `prepare_conditioning`.
    """
    return _prepare(job, data, display, folder, executor, only_large=only_large, kind=NEIGHBOURS, encoder=encoder)


def _prepare(
    job: JobSpec,
    data: str,
    display: Display,
    folder: str | None,
    executor: Executor | None,
    *,
    only_large: bool,
    kind: str = CONDITIONING,
    encoder: str | None = None,
    components: int = 1,
) -> Prepared:
    started = time.monotonic()
    try:
        display.phase("checking models and data")
        _check_models(job, kind, encoder)
        home = open_home(job, folder, kind)
        labels = tuple(target_labels(job))
        source = open_images(data, labels)
        if kind == CONDITIONING:
            encoder = encoder or encoder_address(job)
        models = described_models(job, kind, encoder)
        if kind == NEIGHBOURS and encoder and source.num_images is not None:
            check_size(source.num_images, _num_features(encoder))
        if only_large:
            executor = _executor_for(source, executor, display)
        if executor is not None:
            executor.begin()
        observations = _observe(job, source, data, encoder, executor, display, with_target="target" in models)
        content: Content
        if kind == CALIBRATION:
            content = fit_calibration(observations, labels, models)
            path, was_there = save_calibration(content, home)
        elif kind == NEIGHBOURS:
            display.phase("choosing the number of neighbours")
            content = fit_neighbours(observations, labels, models)
            path, was_there = save_neighbours(content, home)
        else:
            display.phase("fitting class statistics and error predictor")
            content = fit_conditioning(observations, labels, models, components)
            path, was_there = save_conditioning(content, home)
    finally:
        if executor is not None:
            executor.close()
        display.close()
    return Prepared(
        content=content,
        path=path,
        address=artefact_address(home, path),
        was_there=was_there,
        source=source.kind,
        advice=source.advice,
        encoder=f"image encoder of {encoder}" if encoder and is_pipeline(encoder) else encoder or "",
        seconds=time.monotonic() - started,
    )


def _check_models(job: JobSpec, kind: str, encoder: str | None) -> None:
    """Check the models that an artefact of a kind needs.

    Raises:
        JobError: all problems of them.
    """
    if kind == CONDITIONING:
        check_addresses(job, with_artefacts=False)
        return
    check_target(job)
    if kind == NEIGHBOURS and encoder:
        try:
            check_encoder(encoder)
        except JobError as error:
            raise JobError([f"--encoder: {problem}" for problem in error.problems]) from None


def described_models(job: JobSpec, kind: str, encoder: str | None) -> dict[str, dict[str, str]]:
    """Addresses and digests of the models that an artefact depends on."""
    models = {}
    if kind != NEIGHBOURS:
        models["target"] = {"address": job.models.target, "digest": model_digest(job.models.target)}
    if encoder:
        models["encoder"] = {"address": encoder, "digest": encoder_digest(encoder)}
    return models


def _num_features(encoder: str) -> int:
    """Entries of an embedding of an encoder; transformers' default where its configuration does not say."""
    config = clip_config(resolve(encoder))
    if is_open_clip(resolve(encoder)):
        return int(config["model_cfg"].get("embed_dim", 512))
    vision: Any = config.get("vision_config") or {}
    of_vision = vision.get("hidden_size", 768) if is_siglip(resolve(encoder)) else 512
    return int(config.get("projection_dim") or config.get("hidden_size") or of_vision)


def _executor_for(source: ImageSource, executor: Executor | None, display: Display) -> Executor | None:
    """The executor if a set is large, else None; notifies the user which."""
    if source.num_images is None:
        is_large = source.num_bytes > LARGE_BYTES
        size, limit = f"{byte_size(source.num_bytes)} of tars", byte_size(LARGE_BYTES)
    else:
        is_large = source.num_images > LARGE_SET
        size, limit = f"{source.num_images} images", str(LARGE_SET)
    if is_large:
        display.notice(f"{size}, more than {limit}: divided over Ray workers (--executor local would not)")
        return executor
    display.notice(f"{size}, no more than {limit}: read by this process (--executor ray would divide them)")
    return None


def _observe(
    job: JobSpec,
    source: ImageSource,
    data: str,
    encoder: str | None,
    executor: Executor | None,
    display: Display,
    *,
    with_target: bool,
) -> Observations:
    """The models' outputs for the images, computed here or on the executor's workers."""
    if executor is None:
        display.phase("loading models")
        return observe(load_observer(job, source, encoder, with_target=with_target), data, display)
    like, folder = signature(source), str(Path.cwd())
    imports = import_folders()
    factory = partial(
        load_part_observer, job, data, encoder, folder=folder, like=like, imports=imports, with_target=with_target
    )
    return observe_distributed(source, data, executor, factory, display)
