"""The conditioning artefact: class statistics and an error predictor, in a folder that is named by its content.

`statistics.safetensors` holds the tensors, `conditioning.json` everything else with a digest over both. Equal content
gives equal bytes and an equal name; a folder is published atomically.
"""

from __future__ import annotations

import dataclasses
import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from engine.data.images import Unusable
from engine.data.stores.artefact_folders import publish_artefact
from engine.data.stores.base import Store
from engine.errors import JobError
from engine.methods.conditioning.distributions import ClassDistributions
from engine.methods.conditioning.gaussians import ClassGaussians, ClassMoments
from engine.methods.conditioning.mixtures import ClassMixtures
from engine.methods.conditioning.predictor import ErrorPredictor, PredictorFit
from engine.methods.conditioning.predictor_evaluation import PredictorEvaluation
from engine.methods.temperature import TemperatureFit
from engine.models.artefact_documents import (
    REMEDY,
    document_bytes,
    kind_of,
    malformed,
    read_document,
    sealed,
    unreadable,
)
from engine.models.configurations import ARTEFACT_DOCUMENT as DOCUMENT
from engine.models.untrusted_files import read_whole

STATISTICS = "statistics.safetensors"
MAX_STATISTICS_BYTES = 8 * 2**30


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Conditioning:
    """Class statistics, error predictor and calibration, with what they were made from.

    Attributes:
        statistics: moments of every class (one Gaussian a class), or mixtures.
        num_errors: errors of the target, by class index.
        fit: the error predictor and how good it is, or why there is none.
        temperature: the fit of the target's temperature to the images.
        models: `{"target": {"address", "digest"}, "encoder": {"address", "digest"}}`.
        options: how statistics and predictor were fitted.
        images_digest: digest of the images and their classes, independent of their order, names and files.
        unusable: items of the data that could not be used.
        temperature_verdict: as the document has it, whose digest covers the words; of a new artefact those of the fit.
    """

    statistics: ClassMoments | ClassMixtures
    num_errors: tuple[int, ...]
    fit: PredictorFit
    temperature: TemperatureFit
    models: dict[str, dict[str, str]]
    options: dict[str, Any]
    images_digest: str
    unusable: tuple[Unusable, ...]
    temperature_verdict: str = ""

    @property
    def kind(self) -> str:
        """`gaussians` or `mixtures`."""
        return "mixtures" if isinstance(self.statistics, ClassMixtures) else "gaussians"

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in index order."""
        return self.statistics.labels

    @property
    def counts(self) -> tuple[int, ...]:
        """Images by class index."""
        return tuple(self.statistics.count.tolist())

    @property
    def digest(self) -> str:
        """Digest of the content, hexadecimal; computed at every access."""
        return _content(self)[0]["digest"]

    def distributions(self) -> ClassDistributions:
        """The distributions that embeddings are drawn from; computed at every call."""
        if isinstance(self.statistics, ClassMixtures):
            return self.statistics
        return ClassGaussians.of(self.statistics)

    def notes(self) -> list[str]:
        """Notes on classes without a distribution or with a less accurate one, a line each."""
        distributions = self.distributions()
        notes = self.statistics.notes() if isinstance(self.statistics, ClassMixtures) else []
        for index in range(len(self.labels)):
            try:
                distributions.check(index)
            except ValueError as error:
                notes.append(str(error))
        return notes


def save_conditioning(conditioning: Conditioning, folder: Path | Store) -> tuple[Path, bool]:
    """Store an artefact as `folder/conditioning-DIGEST12`.

    Returns:
        Its folder, and whether an equal artefact was there already.

    Raises:
        OutputError: it cannot be written, or a folder of that name is damaged.
    """
    fields, statistics = _content(conditioning)
    files = {STATISTICS: statistics, DOCUMENT: document_bytes(fields)}
    return publish_artefact(
        folder, kind_of(DOCUMENT), fields["digest"], files, lambda path: load_conditioning(path).digest
    )


def load_conditioning(folder: Path | str) -> Conditioning:
    """Read an artefact and check it against its digest.

    Raises:
        JobError: it is no artefact, of another version, or does not match its digest.
    """
    folder = Path(folder).expanduser()
    fields = read_document(folder, DOCUMENT)
    try:
        statistics = read_whole(folder / STATISTICS, MAX_STATISTICS_BYTES)
        if hashlib.sha256(statistics).hexdigest() != fields["statistics_sha256"]:
            raise JobError(f"'{folder}': {STATISTICS} is not what it was (checksum); {REMEDY}")
        return _conditioning_of(fields, safetensors.torch.load(statistics))
    except OSError as error:
        raise unreadable(folder, DOCUMENT, error) from None
    except (KeyError, TypeError, ValueError, AttributeError, safetensors.SafetensorError) as error:
        raise malformed(folder, error) from None


def _content(conditioning: Conditioning) -> tuple[dict[str, Any], bytes]:
    """The fields of the document with their digest, and the bytes of the statistics."""
    statistics = safetensors.torch.save(_tensors(conditioning))
    evaluation, temperature = conditioning.fit.evaluation, conditioning.temperature
    fields = {
        "kind": conditioning.kind,
        "classes": list(conditioning.labels),
        "counts": list(conditioning.counts),
        "errors": list(conditioning.num_errors),
        "dim": conditioning.distributions().dim,
        "images_digest": conditioning.images_digest,
        "models": conditioning.models,
        "options": conditioning.options,
        "predictor": {
            "trained": conditioning.fit.predictor is not None,
            "verdict": conditioning.fit.verdict,
            "evaluation": evaluation.state() if evaluation else None,
            # Without a key where there is none: digests of artefacts from before there was one stay what they are.
            **({"advice": conditioning.fit.advice} if conditioning.fit.advice else {}),
        },
        "temperature": dataclasses.asdict(temperature),
        "temperature_verdict": conditioning.temperature_verdict or temperature.verdict,
        "notes": conditioning.notes(),
        "unusable": [dataclasses.asdict(item) for item in conditioning.unusable],
        "statistics_sha256": hashlib.sha256(statistics).hexdigest(),
    }
    return sealed(fields), statistics


def _tensors(conditioning: Conditioning) -> dict[str, Tensor]:
    parts = {"statistics": conditioning.statistics.state()}
    if conditioning.fit.predictor is not None:
        parts["predictor"] = conditioning.fit.predictor.state()
    return {
        f"{part}.{name}": value.contiguous()
        for part, state in parts.items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    }


def _conditioning_of(fields: dict[str, Any], tensors: dict[str, Tensor]) -> Conditioning:
    evaluation = fields["predictor"]["evaluation"]
    return Conditioning(
        statistics=_statistics_of(fields, tensors),
        num_errors=tuple(fields["errors"]),
        fit=PredictorFit(
            predictor=_predictor_of(tensors) if fields["predictor"]["trained"] else None,
            evaluation=PredictorEvaluation.from_state(evaluation) if evaluation else None,
            verdict=fields["predictor"]["verdict"],
            advice=fields["predictor"].get("advice", ""),
        ),
        temperature=TemperatureFit(**fields["temperature"]),
        temperature_verdict=fields["temperature_verdict"],
        models=fields["models"],
        options=fields["options"],
        images_digest=fields["images_digest"],
        unusable=tuple(Unusable(**item) for item in fields["unusable"]),
    )


def _statistics_of(fields: dict[str, Any], tensors: dict[str, Tensor]) -> ClassMoments | ClassMixtures:
    state = {"labels": fields["classes"], **_part(tensors, "statistics")}
    if fields["kind"] == "mixtures":
        return ClassMixtures.from_state({"kind": "mixtures", **state})
    return ClassMoments.from_state({"kind": "class_moments", **state})


def _predictor_of(tensors: dict[str, Tensor]) -> ErrorPredictor:
    state = _part(tensors, "predictor")
    if not all(tensor.isfinite().all() for tensor in state.values() if tensor.is_floating_point()):
        # Its confidence would be NaN, and the first of all draws would be taken for the likeliest.
        raise ValueError("the weights of its error predictor are not finite")
    return ErrorPredictor.from_state({"kind": "error_predictor", **state})


def _part(tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part}."): value for name, value in tensors.items() if name.startswith(f"{part}.")}
