"""How good are a run's images? Against real ones, the training set and their texts; and where the target fails.

Reads a bounded, evenly drawn sample of the stored images, writes `evaluation.json` and the report with it. Of guided
samples without a twin it looks for the unguided one in the run, for all of them, and writes `twins.parquet`. Equal
runs, options and images give equal figures on a CPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.data.images import open_images
from engine.data.run.file_names import EVALUATION, MANIFEST, METADATA, REPORT, TWINS_TABLE
from engine.data.run.manifest_reading import read_manifest
from engine.data.run.twins_table import FoundTwins, write_twins
from engine.data.stores.base import STATE
from engine.data.stores.lease import hold
from engine.data.stores.opening import open_store
from engine.driver.progress import Display
from engine.errors import JobError, OutputError
from engine.generation.loading import load_target
from engine.job.class_names import distinct_names
from engine.job.spec import JobSpec, RuntimeSpec
from engine.models.classifier import Classifier
from engine.models.clip import Clip
from engine.models.digests import model_digest
from engine.models.hardware import choose_hardware
from engine.models.library_logging import quiet_libraries
from engine.report.data import names_by_index
from engine.report.evaluation import Evaluation, Extremes, Shown
from engine.report.render import write_report
from engine.report.row_sums import sum_rows
from engine.studies.evaluate.extractors import choose_extractor
from engine.studies.evaluate.extremes import ScoredImages, boundary_extremes, risk_extremes
from engine.studies.evaluate.image_features import ImageFeatures, VisionModels
from engine.studies.evaluate.image_registry import ImageRegistry
from engine.studies.evaluate.inputs import StudiedSamples, left_out_lines, read_real, read_samples
from engine.studies.evaluate.memorisation import memorisation
from engine.studies.evaluate.options import EvaluateOptions
from engine.studies.evaluate.quality import qualities, text_scores
from engine.studies.evaluate.slices import failure_slices
from engine.studies.evaluate.twins import find_twins
from engine.studies.output_folders import check_results
from engine.studies.samples import StudiedRun, choose_requests, open_study

STUDY = "evaluate"


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """The result of an evaluation.

    Attributes:
        document: address of `evaluation.json`.
        twins: address of `twins.parquet`; empty without twins.
        num_twins: how many it has.
        report: address of the report.
    """

    evaluation: Evaluation
    document: str
    report: str
    twins: str = ""
    num_twins: int = 0


def evaluate(run_uri: str, options: EvaluateOptions, *, display: Display, folder: str | None = None) -> Evaluated:
    """Evaluate a finished run, and write its report again.

    Args:
        folder: where `evaluation.json` and `report.html` go, a folder or an address; into the run by default.

    Raises:
        JobError: an option is wrong, or a model or images cannot be used.
        OutputError: the run is not finished, or the folder holds something else.
        CorruptShardError: an image of the run cannot be read.
        OwnedError: it would go into the run, and a driver is at work there.
    """
    options.check()
    run = open_study(run_uri)
    for name in (MANIFEST, METADATA):
        if not run.store.exists(name):
            raise OutputError(f"RUN: '{run_uri}' has no {name}; let `riskforge run` finish it first")
    if options.reference is not None:
        choose_requests(run, "--reference", [options.reference])
    if folder is not None:
        check_results(folder, EVALUATION, (EVALUATION, TWINS_TABLE, REPORT, STATE), STUDY)
    # Every process that writes into a run holds its lease.
    with hold(run.store, notice=display.notice) if folder is None else contextlib.nullcontext():
        return _write(run, options, display, folder)


def _write(run: StudiedRun, options: EvaluateOptions, display: Display, folder: str | None) -> Evaluated:
    evaluation, found = _evaluate(run, options, display)
    into = run.store if folder is None else open_store(folder)
    try:
        into.replace(EVALUATION, evaluation.model_dump_json(indent=1).encode() + b"\n")
        num_twins = len(found.rows) if found else 0
        if found and num_twins:
            write_twins(into, found)
        else:
            into.remove(TWINS_TABLE)
        display.phase("writing the report")
        write_report(run.store, into=into)
    finally:
        if folder is not None:
            into.leave()
    return Evaluated(
        evaluation=evaluation,
        document=into.address(EVALUATION),
        report=into.address(REPORT),
        twins=into.address(TWINS_TABLE) if num_twins else "",
        num_twins=num_twins,
    )


def _evaluate(run: StudiedRun, options: EvaluateOptions, display: Display) -> tuple[Evaluation, FoundTwins | None]:
    job, manifest = run.job, read_manifest(run.store)
    labels = _labels(run, manifest)
    for option, address in (("--real", options.real), ("--train", options.train)):
        if address is not None:
            # A wrong path is reported before models are loaded; nothing is read yet.
            open_images(address, labels, option)
    display.phase("loading the models that embed images")
    quiet_libraries()
    models, target = _load(job, run, options)
    samples, num_attempts = read_samples(run, models, options, display)
    registry = ImageRegistry(distinct_names(dict(enumerate(labels))))
    names = [request.name for request in job.requests]
    real, real_source = None, None
    if options.real is not None:
        with_target = VisionModels(models.clip, models.extractor, target, clip_role=models.clip_role)
        real, real_source = read_real(options, labels, with_target, display)
    twins = find_twins(run, models.clip, display)
    display.phase("measuring distances")
    quality = qualities(samples, real, names, models.extractor.name, options)
    nearest = memorisation(samples, real, names, labels, models, options, registry, display)
    display.phase("clustering failures")
    evaluation = Evaluation(
        plan_digest=run.plan_digest,
        num_attempts=num_attempts,
        limit=options.limit,
        seed=options.seed,
        real=real_source,
        samples={name: len(samples.rows(name)) for name in names},
        left_out=left_out_lines(samples.images),
        quality=quality,
        text_scores=text_scores(samples, job, models),
        memorisation=nearest,
        slices=failure_slices(samples, labels, models.clip, options, registry),
        extremes=_extremes(job, samples, real, labels, registry) if real is not None else (),
        images=registry.images,
    )
    return evaluation, twins


def _labels(run: StudiedRun, manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """The target's class names as recorded in the run; of older runs, those of the classes that were asked for."""
    recorded = manifest.get("models", {}).get("target", {}).get("labels")
    if isinstance(recorded, list) and recorded and all(isinstance(label, str) for label in recorded):
        return tuple(recorded)
    names = names_by_index(sum_rows(run.store.fetch(METADATA)).outcomes, [])
    return tuple(names.get(index, f"class {index}") for index in range(max(names, default=-1) + 1))


def _load(job: JobSpec, run: StudiedRun, options: EvaluateOptions) -> tuple[VisionModels, Classifier | None]:
    """The models that compute features, and the target where there are real images to score.

    Raises:
        JobError: one cannot be loaded, or the target is another than that of the run.
    """
    device = choose_hardware(RuntimeSpec()).device
    role = "--clip" if options.clip else "models.clip"
    try:
        clip = Clip.load(options.clip or job.models.clip, device)
    except JobError as error:
        raise JobError([f"{role}: {problem}" for problem in error.problems]) from None
    judge = Clip.load(job.models.judge, device) if job.models.judge else None
    extractor = choose_extractor(options.features, clip, options.inception, device)
    if options.real is None:
        return VisionModels(clip, extractor, judge=judge, clip_role=role), None
    if (digest := model_digest(job.models.target)) != run.target_digest:
        raise JobError(
            f"--real: the target '{job.models.target}' that would score the images has changed since the run (digest"
            f" {run.target_digest} in the manifest, {digest} now); restore that model, or leave --real out"
        )
    return VisionModels(clip, extractor, judge=judge, clip_role=role), load_target(job, run.temperature, device)


def _extremes(
    job: JobSpec, samples: StudiedSamples, real: ImageFeatures, labels: Sequence[str], registry: ImageRegistry
) -> tuple[Extremes, ...]:
    """Real images and samples, near and far from each requested boundary; and of high and low risk."""
    methods = {request.name: request.method_record for request in job.requests}

    def show_real(row: int, text: str) -> Shown:
        predicted = registry.name_of(int(real.logits[row].argmax()))
        caption = f"{registry.name_of(int(real.classes[row]))} → {predicted}, {text}"
        return registry.show("real", real.names[row], real.thumbnails[row], caption)

    def show_sample(row: int, text: str) -> Shown:
        return registry.sample(samples, row, text)

    scored = ScoredImages(
        logits=real.logits,
        classes=real.classes,
        records=samples.records,
        methods=methods,
        labels=[registry.name_of(index) for index in range(len(labels))],
        show_real=show_real,
        show_sample=show_sample,
    )
    return (*boundary_extremes(scored), *risk_extremes(scored))
