"""What a retraining writes: `retrain.json` and the model."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.run.file_names import RESCORED
from engine.data.run.manifest import software_versions
from engine.data.run.outcomes import asked_classes, target_errs
from engine.data.stores.base import Store
from engine.data.stores.built_output import built_output
from engine.driver.progress import Display
from engine.job.columns import ASKED, ERRS, NO_CLASS
from engine.job.records import STATUS_FAILED
from engine.methods.temperature import TemperatureFit, fit_temperature
from engine.models.classifier import Classifier
from engine.models.digests import model_digest
from engine.models.trainable import Trainable
from engine.studies.rescore.program import Rescored, rescore_run, rescored_document
from engine.studies.retrain.accuracy import Attempt, Comparison, ErrorAgreement, compare, compare_errors
from engine.studies.retrain.arms import Arms
from engine.studies.retrain.changes import ArmChange
from engine.studies.retrain.findings import findings
from engine.studies.retrain.image_tensors import ImageSet
from engine.studies.retrain.inputs import DOCUMENT, MODEL, STUDY, Material, Study
from engine.studies.retrain.training import Tested, finite_logits
from engine.studies.samples import StudiedRun, depends_on_context_alone, read_attempts

DOCUMENT_VERSION = 1
MAX_LISTED = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Retrained:
    """The results of a retraining.

    Attributes:
        store: where it is.
        document: the content of `retrain.json`.
        agreement: of errors on generated samples and on test images.
        findings: in words.
        rescored: the samples of the run under the new model.
    """

    store: Store
    document: dict[str, Any]
    comparison: Comparison
    agreement: ErrorAgreement
    arms: Arms
    findings: list[str]
    rescored: Rescored

    @property
    def path(self) -> Path:
        """Its folder, where that is on this machine."""
        return Path(self.store.uri)


def write_results(
    study: Study, material: Material, tested: Tested, kept: Any, started: float, display: Display
) -> Retrained:
    """Compute figures and findings, and publish the folder with document and model."""
    main = material.arms.main
    comparison = compare(tested.right, material.test.contexts, tested.held_out, material.test.origins)
    agreement = compare_errors(_attempts(study.run, _unguided(study)), comparison)
    overlap = len(set(material.test.keys) & set(material.real.keys))
    sentences = findings(comparison, agreement, main) + _dependences(study, overlap)
    temperature, fit = _temperature(study, material, kept)
    document = _describe_study(study, material) | {
        "images_in_both": overlap,
        "overall": dataclasses.asdict(comparison.overall),
        "held_out": dataclasses.asdict(comparison.held_out) if comparison.held_out else None,
        "contexts": [dataclasses.asdict(row) for row in comparison.contexts],
        "changes": [_describe_change(change) for change in comparison.changes],
        "found": dataclasses.asdict(agreement) | {"num_ranked": agreement.num_ranked},
        "findings": sentences,
        "temperature": {"used": temperature, "fit": dataclasses.asdict(fit) if fit else None},
    }
    with built_output(study.home, STUDY, DOCUMENT, display.notice) as output:
        built = output.path
        digest = _save_model(kept, material.target, temperature, built / MODEL)
        rescored = _rescore(study, built, display)
        document["rescore"] = rescored_document(rescored) | {"folder": RESCORED}
        document["model"] = {"arm": main, "seed": 0, "digest": digest}
        document["timing"] = {"seconds": time.monotonic() - started, "finished": time.time()}
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
        (built / DOCUMENT).write_text(f"{text}\n", encoding="utf-8")
    return Retrained(
        store=study.home,
        document=document,
        comparison=comparison,
        agreement=agreement,
        arms=material.arms,
        findings=sentences,
        rescored=rescored,
    )


def _rescore(study: Study, built: Path, display: Display) -> Rescored:
    """The samples of the run under the new model, as `riskforge rescore` stores them."""
    display.phase("scoring the samples of the run again")
    rescored = rescore_run(
        study.run.store.uri,
        str(built / MODEL),
        output=str(built / RESCORED),
        named=study.home.address(MODEL),
        advance=display.advance,
        notice=display.notice,
    )
    return dataclasses.replace(rescored, folder=study.home.address(RESCORED))


def _describe_study(study: Study, material: Material) -> dict[str, Any]:
    """What was compared, and with which inputs: all but the results."""
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
            "samples": arms.counts,
            "left_out": arms.left_out,
            "held_out": len(arms.held_out),
        },
        "data": {
            "real": _describe_images(options.real, material.real),
            "test": _describe_images(options.test, material.test),
            **_describe_calibration(options.calibrate, material.calibration),
        },
        "protection": dataclasses.asdict(options.protection) | {"strength": options.protection.used},
        "seeds": list(range(options.num_seeds)),
        "versions": software_versions(),
    }


def _describe_change(change: ArmChange) -> dict[str, Any]:
    return dataclasses.asdict(change) | {
        "weak": [row.context for row in change.weak],
        "worse": [row.context for row in change.worse],
    }


def _unguided(study: Study) -> list[str]:
    """The studied requests whose errors depend on the context alone."""
    named = {*study.plain, *study.risky}
    requests = study.run.job.requests
    return [request.name for request in requests if request.name in named and depends_on_context_alone(request)]


def _attempts(run: StudiedRun, requests: list[str]) -> Iterator[Attempt]:
    """The target's prediction for every sample, stored or not; where the oracle disagrees, the sample is not valid."""
    columns = ["context", "status", "oracle_class", *ASKED, *ERRS]
    for row in read_attempts(run, requests, columns):
        if row["status"] != STATUS_FAILED:
            is_valid = row["oracle_class"] in (NO_CLASS, *asked_classes(row))
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
        "unusable": [{"name": item.name, "reason": item.reason} for item in images.unusable[:MAX_LISTED]],
    }


def _dependences(study: Study, overlap: int) -> list[str]:
    """Why the test images are not independent of the training data, as far as that can be seen."""
    options, named = study.options, {*study.plain, *study.risky}
    sentences = []
    if overlap:
        sentences.append(f"Not independent: {overlap} different images of --test are also in --real.")
    for request in study.run.job.requests:
        conditioning, start = request.conditioning, request.used_start
        uses = {"are variations of": conditioning and conditioning.images, "start from": start and start.images}
        for relation, given in uses.items():
            if request.name in named and given and _same_place(given, options.test):
                sentences.append(f"Not independent: the samples of {request.name} {relation} the images of --test.")
    return sentences


def _same_place(first: str, second: str) -> bool:
    return first == second or Path(first).expanduser().resolve() == Path(second).expanduser().resolve()


def _temperature(study: Study, material: Material, network: Any) -> tuple[float, TemperatureFit | None]:
    """The temperature of the kept network: fitted on the images for it, or the target's in the run.

    Not on a part of the real images: the target was mostly trained on them, and a network is overconfident on its
    training images. Where the likelihood has no maximum, the target's is kept as well.
    """
    current = material.target.temperature if study.run.temperature is None else study.run.temperature
    if material.calibration is None:
        return current, None
    logits = finite_logits(network, material.calibration.pixels, "images of --calibrate")
    fit = fit_temperature(logits, material.calibration.classes, current)
    return (fit.current if fit.bound else fit.fitted), fit


def _save_model(network: Any, target: Trainable, temperature: float, folder: Path) -> str:
    """Store a model so that it can be the target of a job, check that it loads, and return its digest."""
    target.store(network, folder, temperature)
    Classifier.load(str(folder))
    return model_digest(str(folder))
