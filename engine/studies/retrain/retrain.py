"""Does retraining on a run's samples help? Fine-tunes the target in several arms, over several seeds, and compares.

`before` is the target as it is; `none` is fine-tuned on real images alone; `plain` on real images and prompt-only
samples; `unfiltered` on real images and the samples of the risky requests whatever their rule says; `accepted` on real
images and the accepted ones. All arms have equal steps and batches, and as many generated samples as each other.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.data.images import ImageSource, open_images
from engine.data.run.manifest import software_versions
from engine.data.run.outcomes import ASKED, ERRS, asked_classes, target_errs
from engine.data.stores.base import Store
from engine.data.stores.folder import FolderStore
from engine.data.stores.fresh_folder import fresh_folder
from engine.data.stores.opening import refuse_objects
from engine.driver.progress import Display, duration
from engine.errors import JobError, OutputError
from engine.job.records import STATUS_FAILED
from engine.methods.finiteness import LOGITS_FAULT, usable_logits
from engine.methods.temperature import TemperatureFit, fit_temperature
from engine.models.addresses import model_digest, read_config, read_labels, resolve
from engine.models.classifier import Classifier, load_network
from engine.models.libraries import quiet_libraries
from engine.models.preprocess import Preprocessing
from engine.studies.output_folders import check_folder
from engine.studies.retrain.comparison import (
    ACCEPTED,
    BEFORE,
    NONE,
    PLAIN,
    UNFILTERED,
    Attempt,
    Comparison,
    Found,
    compare,
    compare_errors,
    findings,
)
from engine.studies.retrain.finetune import Recipe, Samples, choose_rows, fine_tune, predict, training_device
from engine.studies.retrain.image_tensors import GeneratedSet, ImageSet, read_generated, read_images
from engine.studies.samples import StudiedRun, check_target, choose_requests, is_plain, open_study, read_attempts

STUDY = "retrain"
DOCUMENT = "retrain.json"
MODEL = "model"
DOCUMENT_VERSION = 1
MIN_REAL_IMAGES = 20
MIN_CALIBRATION_IMAGES = 100
MAX_BATCH = 65_536
MAX_SEEDS, MAX_STEPS = 1000, 1_000_000
# With fewer generated samples an arm tells little.
FEW_SAMPLES = 50
MAX_LISTED = 1000
_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")

Progress = Callable[[str, int], Callable[[], None]]


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrainOptions:
    """What the command line asks for.

    Attributes:
        real, test: images to train and to test on, as `engine.data.images.open_images` takes them.
        plain, risky: names of requests; empty for those that are so by nature.
        mix: share of each batch that is generated, where something is.
        labels: `hard` for the class of a generated sample, `soft` for its `soft_label`.
        calibrate: images for the temperature of the model, unknown to it and to the target; without them it keeps the
            target's.
    """

    real: str
    test: str
    calibrate: str | None = None
    plain: tuple[str, ...] = ()
    risky: tuple[str, ...] = ()
    num_seeds: int = 5
    num_steps: int = 200
    mix: float = 0.2
    labels: str = "hard"
    batch_size: int = 64
    learning_rate: float = 3e-4

    @property
    def recipe(self) -> Recipe:
        """How a network is fine-tuned."""
        return Recipe(
            num_steps=self.num_steps,
            batch_size=self.batch_size,
            num_generated=round(self.mix * self.batch_size),
            learning_rate=self.learning_rate,
        )

    def check(self) -> None:
        """Refuse values with which there is nothing to do or to compare.

        Raises:
            JobError: all problems, a line each.
        """
        problems = []
        if self.num_seeds < 2:
            problems.append(f"--seeds: {self.num_seeds} is too few, intervals are over seeds; give 2 or more")
        elif self.num_seeds > MAX_SEEDS:
            problems.append(f"--seeds: {self.num_seeds} is too many; give {MAX_SEEDS} or fewer")
        if self.num_steps < 1:
            problems.append(f"--steps: {self.num_steps} trains nothing; give 1 or more")
        elif self.num_steps > MAX_STEPS:
            problems.append(f"--steps: {self.num_steps} is too many; give {MAX_STEPS} or fewer")
        if not 2 <= self.batch_size <= MAX_BATCH:
            problems.append(f"--batch-size: {self.batch_size} is not between 2 and {MAX_BATCH}")
        elif not 0 < self.mix < 1:
            problems.append(f"--mix: {self.mix:g} is not between 0 and 1; give the generated share of a batch, as 0.5")
        elif not 0 < self.recipe.num_generated < self.batch_size:
            problems.append(
                f"--mix: {self.mix:g} of a batch of {self.batch_size} leaves {self.recipe.num_generated} generated"
                " images in it; give another share, or a larger --batch-size"
            )
        if not (self.learning_rate > 0 and math.isfinite(self.learning_rate)):
            problems.append(f"--learning-rate: {self.learning_rate:g} is not a positive number; give one, as 0.001")
        if problems:
            raise JobError(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arms:
    """The arms with generated samples.

    Attributes:
        pools: by arm, the rows of the generated set that it draws from.
        left_out: by arm that there is not, the reason.
    """

    pools: dict[str, Tensor]
    left_out: dict[str, str]

    @property
    def num_samples(self) -> int:
        """Generated samples of every arm: as many as the smallest has."""
        return min(len(rows) for rows in self.pools.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrained:
    """What came of a study.

    Attributes:
        path: its folder.
        document: the content of `retrain.json`.
        findings: in words.
    """

    path: Path
    document: dict[str, Any]
    comparison: Comparison
    found: Found
    arms: Arms
    findings: list[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Study:
    """What is asked, checked as far as that goes without a model.

    Attributes:
        plain, risky: names of the requests of either kind.
        labels: class names of the target in index order.
        home: the folder of the results.
    """

    run: StudiedRun
    options: RetrainOptions
    plain: list[str]
    risky: list[str]
    labels: tuple[str, ...]
    home: Path

    @property
    def target(self) -> Path:
        """Folder of the target."""
        return resolve(self.run.job.models.target)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Material:
    """Everything that is trained and tested on, read and preprocessed."""

    real: ImageSet
    test: ImageSet
    calibration: ImageSet | None
    generated: GeneratedSet
    arms: Arms
    num_classes: int


def retrain(uri: str, options: RetrainOptions, *, display: Display, folder: str | None = None) -> Retrained:
    """Fine-tune the target of a run in all arms and seeds, compare them, and keep a model.

    Args:
        uri: folder of the run.
        folder: where the results go; `RUN-retrained`, beside the run, where not given.

    Raises:
        RiskforgeError: options, run, target, images or folder are not as they must be.

    Side effects:
        Replaces the results of an earlier retraining in the folder, at the very end.
    """
    started = time.monotonic()
    try:
        display.phase("checking run and data")
        study = _check(uri, options, folder)
        real = open_images(options.real, study.labels, "--real")
        test = open_images(options.test, study.labels, "--test")
        spare = open_images(options.calibrate, study.labels, "--calibrate") if options.calibrate else None
        material, network = _load(study, real, test, spare, display)
        right, kept = _train(study, material, network, display)
        display.phase("comparing and writing")
        return _conclude(study, material, right, kept, started)
    except torch.OutOfMemoryError:
        raise JobError(
            f"--batch-size: batches of {options.batch_size} do not fit the GPU's memory; give a smaller size"
        ) from None
    finally:
        display.close()


def _check(uri: str, options: RetrainOptions, folder: str | None) -> _Study:
    """What can be wrong without a model being loaded or an image read."""
    options.check()
    run = open_study(uri)
    home = _home(run.store, folder)
    check_folder(home, DOCUMENT, (DOCUMENT, MODEL), STUDY)
    plain, risky = choose_arms(run, options)
    check_target(run)
    _check_apart(home, run)
    labels = tuple(read_labels(run.job.models.target) or ())
    return _Study(run=run, options=options, plain=plain, risky=risky, labels=labels, home=home)


def choose_arms(run: StudiedRun, options: RetrainOptions) -> tuple[list[str], list[str]]:
    """Names of the plain and of the risky requests.

    Raises:
        JobError: the run has no request of such a name, or none is risky by nature.
    """
    plain = choose_requests(run, "--plain", options.plain)
    risky = choose_requests(run, "--risky", options.risky)
    requests = run.job.requests
    plain = plain or [one.name for one in requests if is_plain(one)]
    risky = risky or [one.name for one in requests if one.accept]
    joint = [one.name for one in requests if one.boundary is not None and one.name in {*plain, *risky}]
    if joint and options.labels == "hard":
        raise JobError(
            f"--labels: the samples of {', '.join(joint)} are of a joint prompt and have no single class; use soft, or"
            " name other requests with --plain and --risky"
        )
    if not risky:
        names = ", ".join(one.name for one in requests)
        raise JobError(f"--risky: no request of the run has an `accept` rule; name those whose samples to add: {names}")
    return plain, risky


def make_arms(run: StudiedRun, generated: GeneratedSet, plain: list[str], risky: list[str]) -> Arms:
    """Which generated samples each arm has.

    Raises:
        JobError: none is accepted, so there is nothing to study.
    """
    of_risky = generated.rows_of(risky)
    pools = {PLAIN: generated.rows_of(plain), UNFILTERED: of_risky, ACCEPTED: of_risky[generated.accepted[of_risky]]}
    if not len(pools[ACCEPTED]):
        raise JobError(
            f"RUN: no sample of {', '.join(risky)} is accepted so far; make more with a higher `count`, loosen their"
            " `accept`, or name other requests with --risky"
        )
    left_out = {}
    if not plain:
        left_out[PLAIN] = "no request has method prompt and no `accept` rule; name one with --plain"
    elif not len(pools[PLAIN]):
        left_out[PLAIN] = f"no sample of {', '.join(plain)} has an image so far"
    if len(pools[UNFILTERED]) == len(pools[ACCEPTED]):
        left_out[UNFILTERED] = _why_filtered(run, risky)
    return Arms(pools={arm: rows for arm, rows in pools.items() if arm not in left_out}, left_out=left_out)


def _why_filtered(run: StudiedRun, risky: list[str]) -> str:
    num_rejected = sum(record.counts.rejected for record in run.commits_of(risky))
    if not num_rejected:
        return f"no sample of {', '.join(risky)} is rejected, so it would be the arm `{ACCEPTED}`"
    return (
        f"the images of the {num_rejected} rejected samples are not stored; set output.store_rejected: true in the job"
        " and make the run anew"
    )


# Reading -------------------------------------------------------------------------------------------------------------


def _load(
    study: _Study, real: ImageSource, test: ImageSource, spare: ImageSource | None, display: Display
) -> tuple[_Material, Any]:
    """All samples, and the network of the target."""
    display.phase("loading the target")
    quiet_libraries()
    run, options, num_classes = study.run, study.options, len(study.labels)
    network = load_network(run.job.models.target).to(training_device(run.job.runtime.device == "cpu")).eval()
    preprocessing = Preprocessing.load(study.target)
    scorable = _Scorable(network, run.job.models.target, display)
    display.phase("reading samples and images")
    names, soft = list(dict.fromkeys([*study.plain, *study.risky])), options.labels == "soft"
    generated = read_generated(run, names, preprocessing, num_classes=num_classes, soft=soft, display=display)
    generated = generated.without(scorable.rows(generated.samples.pixels, "samples of the run"))
    arms = make_arms(run, generated, study.plain, study.risky)
    material = _Material(
        real=scorable.of(read_images(real, "--real", options.real, preprocessing, display), "--real"),
        test=scorable.of(read_images(test, "--test", options.test, preprocessing, display), "--test"),
        calibration=None
        if spare is None or options.calibrate is None
        else scorable.of(read_images(spare, "--calibrate", options.calibrate, preprocessing, display), "--calibrate"),
        generated=generated,
        arms=arms,
        num_classes=num_classes,
    )
    if len(material.real) < MIN_REAL_IMAGES:
        raise JobError(
            f"--real: '{options.real}' has {len(material.real)} usable images; give {MIN_REAL_IMAGES} or more"
        )
    if material.calibration is not None and len(material.calibration) < MIN_CALIBRATION_IMAGES:
        raise JobError(
            f"--calibrate: '{options.calibrate}' has {len(material.calibration)} usable images; give"
            f" {MIN_CALIBRATION_IMAGES} or more"
        )
    _check_sizes(material, options)
    for arm, reason in arms.left_out.items():
        display.notice(f"arm {arm} is left out: {reason}")
    if arms.num_samples < FEW_SAMPLES:
        display.notice(f"each arm has only {arms.num_samples} generated samples; differences may be chance")
    if soft and bool((generated.samples.targets.max(1).values == 1).all()):
        display.notice("--labels soft: all samples are of single classes, whose soft labels are the hard ones")
    return material, network


class _Scorable:
    """Leaves out, with a notice, what the target gives values for that are not finite: it would count as an error."""

    def __init__(self, network: Any, address: str, display: Display) -> None:
        self._network, self._display = network, display
        self._reason = f"models.target '{address}' gives {LOGITS_FAULT}"

    def rows(self, pixels: Tensor, what: str) -> Tensor:
        """Which of preprocessed images [N, 3, h, w] have scores, [N] booleans.

        Raises:
            JobError: none has.
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
        """The images of an option that have scores."""
        usable = self.rows(images.pixels, f"images of {option}")
        return images if usable.all() else images.without(usable, self._reason)


def _check_sizes(material: _Material, options: RetrainOptions) -> None:
    """Without a resize, images must have the size of the generated ones."""
    wanted = material.generated.samples.pixels.shape[1:]
    for option, address, images in (("--real", options.real, material.real), ("--test", options.test, material.test)):
        if images.pixels.shape[1:] != wanted:
            sizes = [f"{height} x {width}" for _, height, width in (images.pixels.shape[1:], wanted)]
            raise JobError(
                f"{option}: '{address}' has images of {sizes[0]} pixels and the run {sizes[1]}, and the target's"
                " preprocessor does not resize; give images of one size"
            )


# Training ------------------------------------------------------------------------------------------------------------


def _train(
    study: _Study, material: _Material, network: Any, display: Display
) -> tuple[dict[str, list[NDArray[np.bool_]]], Any]:
    """Whether each arm and seed is right on each test image, and the network of the first seed's accepted arm."""
    options, on_cpu = study.options, study.run.job.runtime.device == "cpu"
    training, progress = (
        material.real.samples(material.num_classes),
        _progress(options, 1 + len(material.arms.pools), display),
    )
    right: dict[str, list[NDArray[np.bool_]]] = {BEFORE: [_right(network, material.test, BEFORE)]}
    kept = None
    for seed in range(options.num_seeds):
        for arm in (NONE, *material.arms.pools):
            trained = fine_tune(
                copy.deepcopy(network),
                training,
                _drawn(material, arm, seed),
                options.recipe,
                seed=seed,
                on_cpu=on_cpu,
                advance=progress(arm, seed),
            )
            right.setdefault(arm, []).append(_right(trained, material.test, f"{arm}, seed {seed + 1}"))
            kept = trained if (arm, seed) == (ACCEPTED, 0) else kept
    return right, kept


def _drawn(material: _Material, arm: str, seed: int) -> Samples | None:
    """The generated samples of an arm: of a pool larger than the smallest one, as many, drawn with the seed."""
    if arm == NONE:
        return None
    pool = material.arms.pools[arm]
    return material.generated.samples.take(pool[choose_rows(len(pool), material.arms.num_samples, seed)])


def _right(network: Any, images: ImageSet, arm: str) -> NDArray[np.bool_]:
    """Whether a network is right on each image.

    Raises:
        JobError: it gives values that are not finite.
    """
    return (_finite_logits(network, images, f"--test (arm {arm})").argmax(1) == images.classes).numpy()


def _finite_logits(network: Any, images: ImageSet, what: str) -> Tensor:
    logits = predict(network, images.pixels)
    if num := int((~usable_logits(logits)).sum()):
        raise JobError(
            f"--learning-rate: after training the network gives {LOGITS_FAULT} for {num} of {len(images)} images of"
            f" {what}; use a smaller one"
        )
    return logits


def _progress(options: RetrainOptions, num_arms: int, display: Display) -> Progress:
    """Makes, for an arm and a seed, what is to be called after every step."""
    total, done, started = num_arms * options.num_seeds * options.num_steps, 0, 0.0

    def of(arm: str, seed: int) -> Callable[[], None]:
        first = done

        def advance() -> None:
            nonlocal done, started
            done += 1
            # The clock runs from the first step on, which is slow.
            started = started or time.monotonic()
            text = f"arm {arm}, seed {seed + 1} of {options.num_seeds}, step {done - first}/{options.num_steps}"
            if done > 1:
                text += f", ETA {duration((time.monotonic() - started) / (done - 1) * (total - done))}"
            display.advance(text)

        return advance

    return of


# Concluding ----------------------------------------------------------------------------------------------------------


def _conclude(
    study: _Study, material: _Material, right: dict[str, list[NDArray[np.bool_]]], kept: Any, started: float
) -> Retrained:
    """Figures, findings and the stored folder."""
    comparison = compare(right, material.test.contexts)
    found = compare_errors(_attempts(study.run, _unguided(study)), comparison)
    overlap = len(set(material.test.keys) & set(material.real.keys))
    said = findings(comparison, found) + _dependences(study, overlap)
    temperature, fit = _temperature(study, material, kept)
    document = _describe_study(study, material) | {
        "images_in_both": overlap,
        "overall": dataclasses.asdict(comparison.overall),
        "contexts": [dataclasses.asdict(row) for row in comparison.contexts],
        "found": dataclasses.asdict(found) | {"num_ranked": found.num_ranked},
        "findings": said,
        "temperature": {"used": temperature, "fit": dataclasses.asdict(fit) if fit else None},
    }
    with fresh_folder(study.home) as built:
        digest = _save_model(kept, study.target, temperature, built / MODEL)
        document["model"] = {"arm": ACCEPTED, "seed": 0, "digest": digest}
        document["timing"] = {"seconds": time.monotonic() - started, "finished": time.time()}
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
        (built / DOCUMENT).write_text(f"{text}\n", encoding="utf-8")
    return Retrained(
        path=study.home, document=document, comparison=comparison, found=found, arms=material.arms, findings=said
    )


def _describe_study(study: _Study, material: _Material) -> dict[str, Any]:
    """What was studied, with what: all but the outcome."""
    run, options, arms = study.run, study.options, material.arms
    return {
        "study": STUDY,
        "document_version": DOCUMENT_VERSION,
        "arguments": dataclasses.asdict(options) | {"run": run.store.uri},
        "run": {"name": run.job.name, "plan_digest": run.plan_digest, "shards_digest": run.shards_digest},
        "target": {"address": run.job.models.target, "digest": run.target_digest},
        "requests": {"plain": study.plain, "risky": study.risky},
        "arms": {
            "available": {arm: len(rows) for arm, rows in arms.pools.items()},
            "samples_of_each": arms.num_samples,
            "left_out": arms.left_out,
        },
        "data": {
            "real": _describe_images(options.real, material.real),
            "test": _describe_images(options.test, material.test),
            **_describe_calibration(options.calibrate, material.calibration),
        },
        "seeds": list(range(options.num_seeds)),
        "versions": software_versions(),
    }


def _unguided(study: _Study) -> list[str]:
    """The studied requests whose errors tell of a context: guidance and screening make errors wherever they are."""
    named = {*study.plain, *study.risky}
    return [
        one.name
        for one in study.run.job.requests
        if one.name in named
        and not one.method_record.is_guided
        and one.boundary is None
        and not (one.conditioning and one.conditioning.is_screened)
    ]


def _attempts(run: StudiedRun, requests: list[str]) -> Iterator[Attempt]:
    """What the target made of every sample, stored or not; where an oracle disagrees, the sample is not valid."""
    columns, has_oracle = ["context", "status", "oracle_class", *ASKED, *ERRS], bool(run.job.models.oracle)
    for row in read_attempts(run, requests, columns):
        if row["status"] != STATUS_FAILED:
            is_valid = not has_oracle or row["oracle_class"] in asked_classes(row)
            yield Attempt(row["context"], is_valid, target_errs(row))


def _describe_calibration(address: str | None, images: ImageSet | None) -> dict[str, Any]:
    return {} if address is None or images is None else {"calibrate": _describe_images(address, images)}


def _describe_images(address: str, images: ImageSet) -> dict[str, Any]:
    return {
        "address": address,
        "kind": images.kind,
        "images": len(images),
        "digest": images.digest,
        "num_unusable": len(images.unusable),
        "unusable": [{"name": one.name, "reason": one.reason} for one in images.unusable[:MAX_LISTED]],
    }


def _dependences(study: _Study, overlap: int) -> list[str]:
    """What makes the test images no strangers to the arms, as far as it can be seen."""
    options, named = study.options, {*study.plain, *study.risky}
    sentences = []
    if overlap:
        sentences.append(f"Not independent: {overlap} different images of --test are also in --real.")
    for request in study.run.job.requests:
        given = request.conditioning.images if request.conditioning else None
        if request.name in named and given and _same_place(given, options.test):
            sentences.append(f"Not independent: the samples of {request.name} are variations of the images of --test.")
    return sentences


def _same_place(one: str, other: str) -> bool:
    return one == other or Path(one).expanduser().resolve() == Path(other).expanduser().resolve()


def _temperature(study: _Study, material: _Material, network: Any) -> tuple[float, TemperatureFit | None]:
    """The temperature of the kept network: fitted on the images for it, or the target's.

    Not on a part of the real images: they are mostly those that the target itself was trained on, and a network is too
    sure of images that it knows. Where the likelihood has no maximum, the target's is kept as well.
    """
    current = float(read_config(study.target / "config.json").get("temperature", 1.0))
    if material.calibration is None:
        return current, None
    logits = _finite_logits(network, material.calibration, "--calibrate")
    fit = fit_temperature(logits, material.calibration.classes, current)
    return (fit.current if fit.bound else fit.fitted), fit


def _save_model(network: Any, target: Path, temperature: float, folder: Path) -> str:
    """Store a model so that it can be the target of a job, see that it loads, and give its digest."""
    network.save_pretrained(folder)
    for name in _PREPROCESSORS:
        if (target / name).is_file():
            shutil.copyfile(target / name, folder / name)
    # Written into the file: transformers keeps this field out of its configuration objects.
    config = read_config(folder / "config.json") | {"temperature": temperature}
    (folder / "config.json").write_text(f"{json.dumps(config, indent=2)}\n", encoding="utf-8")
    Classifier.load(str(folder))
    return model_digest(str(folder))


def _home(store: Store, folder: str | None) -> Path:
    if folder is None:
        if not isinstance(store, FolderStore):
            raise OutputError(f"--output: say where the results of {store.uri} go; they are written to folders alone")
        return store.place.with_name(f"{store.place.name}-retrained")
    refuse_objects(folder, "--output", "a retraining")
    try:
        return Path(folder).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise JobError(f"--output: '{folder}' cannot be looked at ({error}); choose another") from None


def _check_apart(home: Path, run: StudiedRun) -> None:
    """Keep the run and its target, which the results are compared with, from being replaced by them."""
    target = resolve(run.job.models.target).resolve()
    for what, place in (("the run", run.store.place), ("the run's target", target)):
        if home == place or home in place.parents:
            raise OutputError(f"--output: {home} holds {what}, which would be replaced; choose another")
