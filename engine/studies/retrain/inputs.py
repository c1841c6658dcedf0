"""What a retraining reads: the run, the images, the generated samples, and the network of the target."""

from __future__ import annotations

import unicodedata
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from engine.data.images import ImageSource
from engine.data.run.file_names import RESCORED
from engine.data.stores.base import Store
from engine.data.stores.folder import FolderStore
from engine.data.stores.opening import is_object_address, open_store
from engine.driver.progress import Display
from engine.errors import JobError, OutputError
from engine.methods.finiteness import LOGITS_FAULT, usable_logits
from engine.models.addresses import resolve
from engine.models.factory_folders import as_factory_folder
from engine.models.labels import read_labels
from engine.models.library_logging import quiet_libraries
from engine.models.preprocessing import Preprocessing
from engine.models.programs import is_program
from engine.models.trainable import Trainable, load_trainable
from engine.studies.output_folders import check_results
from engine.studies.retrain.arms import Arms, choose_arms, make_arms
from engine.studies.retrain.finetune import predict, training_device
from engine.studies.retrain.held_out import FEW_HELD_OUT
from engine.studies.retrain.image_tensors import GeneratedSet, ImageSet, read_generated, read_images
from engine.studies.retrain.options import RetrainOptions
from engine.studies.samples import StudiedRun, check_target, open_study

STUDY = "retrain"
DOCUMENT = "retrain.json"
MODEL = "model"
MIN_REAL_IMAGES = 20
MIN_CALIBRATION_IMAGES = 100
# With fewer generated samples, differences between arms may be chance.
FEW_SAMPLES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """A run and options, checked as far as possible without a model.

    Attributes:
        plain, risky: names of the requests of either kind.
        labels: class names of the target in index order.
        home: where the results go.
    """

    run: StudiedRun
    options: RetrainOptions
    plain: list[str]
    risky: list[str]
    labels: tuple[str, ...]
    home: Store

    @property
    def on_cpu(self) -> bool:
        """Whether to train on the CPU even where there is a GPU."""
        return bool(self.run.job.runtime.device == "cpu")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Material:
    """The images for training, test and calibration, read and preprocessed."""

    real: ImageSet
    test: ImageSet
    calibration: ImageSet | None
    generated: GeneratedSet
    arms: Arms
    num_classes: int
    target: Trainable


def check_study(uri: str, options: RetrainOptions, folder: str | None) -> Study:
    """Check everything that can be checked without loading a model or reading an image.

    Raises:
        RiskforgeError: options, run, target or folder are invalid.
    """
    options.check()
    run = open_study(uri)
    check_target(run)
    home = _home(run.store, folder)
    check_results(home.uri, DOCUMENT, (DOCUMENT, MODEL, RESCORED), STUDY)
    plain, risky = choose_arms(run, options)
    _check_apart(home.place, run)
    labels = tuple(read_labels(run.job.models.target) or ())
    return Study(run=run, options=options, plain=plain, risky=risky, labels=labels, home=home)


def read_material(
    study: Study, real: ImageSource, test: ImageSource, spare: ImageSource | None, display: Display
) -> Material:
    """Read all samples and images, and load the network of the target.

    Raises:
        RiskforgeError: the target or an image source cannot be used, or there are too few images.
    """
    display.phase("loading the target")
    quiet_libraries()
    address = study.run.job.models.target
    target = load_trainable(address, str(training_device(study.on_cpu)))
    preprocessing = target.preprocessing
    scorable = Scorable(target.network, address, display)
    display.phase("reading samples and images")
    generated = _read_generated(study, preprocessing, scorable, display)

    contexts = {plain_context(text): text for request in study.run.job.requests for text in request.contexts or ()}

    def read(source: ImageSource, option: str, address: str) -> ImageSet:
        images = read_images(source, option, address, preprocessing, display)
        return scorable.of(images.named(lambda text: contexts.get(plain_context(text), text)), option)

    options = study.options
    material = Material(
        arms=make_arms(study.run, generated, study.plain, study.risky, options.held_out, options.arms, target.network),
        generated=generated,
        real=read(real, "--real", options.real),
        test=read(test, "--test", options.test),
        calibration=read(spare, "--calibrate", options.calibrate) if spare and options.calibrate else None,
        num_classes=len(study.labels),
        target=target,
    )
    _check_numbers(material, options)
    _check_sizes(material, options)
    _note_limitations(material, options, display)
    return material


def plain_context(text: str) -> str:
    """A context for comparisons with those of the run: folders may be named in other ways than prompts."""
    return " ".join(unicodedata.normalize("NFC", text).replace("_", " ").casefold().split())


def _read_generated(study: Study, preprocessing: Preprocessing, scorable: Scorable, display: Display) -> GeneratedSet:
    """The stored samples of the studied requests, without those that the target has no finite scores for."""
    names = list(dict.fromkeys([*study.plain, *study.risky]))
    generated = read_generated(
        study.run,
        names,
        preprocessing,
        num_classes=len(study.labels),
        soft=study.options.labels == "soft",
        display=display,
    )
    return generated.without(scorable.rows(generated.samples.pixels, "samples of the run"))


def _check_numbers(material: Material, options: RetrainOptions) -> None:
    """Check that there are enough images.

    Raises:
        JobError: too few to train on, or for fitting the temperature.
    """
    if len(material.real) < MIN_REAL_IMAGES:
        raise JobError(
            f"--real: '{options.real}' has {len(material.real)} usable images; give {MIN_REAL_IMAGES} or more"
        )
    if material.calibration is not None and len(material.calibration) < MIN_CALIBRATION_IMAGES:
        raise JobError(
            f"--calibrate: '{options.calibrate}' has {len(material.calibration)} usable images; give"
            f" {MIN_CALIBRATION_IMAGES} or more"
        )


def _note_limitations(material: Material, options: RetrainOptions, display: Display) -> None:
    """Notify the user of arms that are left out, few samples, and soft labels that are hard ones."""
    arms = material.arms
    for arm, reason in arms.left_out.items():
        display.notice(f"arm {arm} is left out: {reason}")
    if arms.counts and arms.num_samples < FEW_SAMPLES:
        display.notice(f"each arm has only {arms.num_samples} generated samples; differences may be chance")
    if options.held_out and len(arms.held_out) < FEW_HELD_OUT:
        display.notice(
            f"--held-out: only {len(arms.held_out)} generated samples are held out, too few for their row to say much;"
            " make more samples, or give a larger share"
        )
    if options.labels == "soft" and bool((material.generated.samples.targets.max(1).values == 1).all()):
        display.notice("--labels soft: all samples are of single classes, whose soft labels are the hard ones")


class Scorable:
    """Leaves out, with a notice, images for which the target gives non-finite values: they would count as errors."""

    def __init__(self, network: Any, address: str, display: Display) -> None:
        self._network, self._display = network, display
        self._reason = f"models.target '{address}' gives {LOGITS_FAULT}"

    def rows(self, pixels: Tensor, what: str) -> Tensor:
        """Which of preprocessed images [N, 3, h, w] have finite scores, [N] booleans.

        Raises:
            JobError: no image has.
        """
        if not len(pixels):
            return torch.ones(0, dtype=torch.bool)
        usable = usable_logits(predict(self._network, pixels))
        if not usable.any():
            raise JobError(f"RUN: its {self._reason} for all {len(pixels)} {what}; replace its weights")
        if num := int((~usable).sum()):
            self._display.notice(f"{num} of {len(pixels)} {what} are left out: {self._reason}")
        return usable

    def of(self, images: ImageSet, option: str) -> ImageSet:
        """The images of an option that have finite scores."""
        usable = self.rows(images.pixels, f"images of {option}")
        return images if usable.all() else images.without(usable, self._reason)


def _check_sizes(material: Material, options: RetrainOptions) -> None:
    """Check that images have the size of the generated ones, which they need if the preprocessing does not resize."""
    wanted = material.generated.samples.pixels.shape[1:]
    for option, address, images in (("--real", options.real, material.real), ("--test", options.test, material.test)):
        if images.pixels.shape[1:] != wanted:
            sizes = [f"{height} x {width}" for _, height, width in (images.pixels.shape[1:], wanted)]
            raise JobError(
                f"{option}: '{address}' has images of {sizes[0]} pixels and the run {sizes[1]}, and the target's"
                " preprocessor does not resize; give images of one size"
            )


def _home(store: Store, folder: str | None) -> Store:
    """Where the results go; a folder is absolute.

    Raises:
        RiskforgeError: the address or the folder cannot be.
    """
    if folder is None and isinstance(store, FolderStore):
        return FolderStore(store.place.with_name(f"{store.place.name}-retrained"))
    if folder is None or is_object_address(folder):
        return open_store(folder or f"{store.uri}-retrained")
    try:
        return FolderStore(Path(folder).expanduser().resolve())
    except (OSError, RuntimeError, ValueError) as error:
        raise JobError(f"--output: '{folder}' cannot be looked at ({error}); choose another") from None


def _check_apart(home: PurePath, run: StudiedRun) -> None:
    """Check that the results replace neither the run nor its target."""
    address = run.job.models.target
    target = as_factory_folder(address) or (None if is_program(address) else resolve(address))
    places = {"the run": run.store.place} | ({"the run's target": target.resolve()} if target else {})
    for what, place in places.items():
        if home == place or home in place.parents:
            raise OutputError(f"--output: {home} holds {what}, which would be replaced; choose another")
