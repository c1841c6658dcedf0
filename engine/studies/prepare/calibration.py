"""The calibration artefact: the temperature of a target, in a folder that is named by its content.

`calibration.json` has the fields of `conditioning.json` that it shares with it, so that either can calibrate a job.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

from engine.data.images import Unusable
from engine.data.stores.artefact_folders import publish_artefact
from engine.data.stores.base import Store
from engine.methods.temperature import TemperatureFit
from engine.models.artefact_documents import document_bytes, kind_of, read_document, sealed
from engine.models.configurations import CALIBRATION_DOCUMENT as DOCUMENT


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrationFit:
    """The temperature of a target, with what it was fitted on.

    Attributes:
        labels: class names in index order.
        counts: images by class index.
        num_errors: errors of the target by class index.
        models: `{"target": {"address", "digest"}}`.
        images_digest: digest of the images and their classes, independent of their order, names and files.
        unusable: items of the data that could not be used.
    """

    labels: tuple[str, ...]
    counts: tuple[int, ...]
    num_errors: tuple[int, ...]
    temperature: TemperatureFit
    models: dict[str, dict[str, str]]
    images_digest: str
    unusable: tuple[Unusable, ...]


def save_calibration(calibration: CalibrationFit, folder: Path | Store) -> tuple[Path, bool]:
    """Store an artefact as `folder/calibration-DIGEST12`.

    Returns:
        Its folder, and whether an equal artefact was there already.

    Raises:
        OutputError: it cannot be written, or a folder of that name is damaged.
    """
    fields = sealed(
        {
            "classes": list(calibration.labels),
            "counts": list(calibration.counts),
            "errors": list(calibration.num_errors),
            "images_digest": calibration.images_digest,
            "models": calibration.models,
            "temperature": dataclasses.asdict(calibration.temperature),
            "temperature_verdict": calibration.temperature.verdict,
            "unusable": [dataclasses.asdict(item) for item in calibration.unusable],
        }
    )
    files = {DOCUMENT: document_bytes(fields)}
    return publish_artefact(folder, kind_of(DOCUMENT), fields["digest"], files, _digest_in)


def _digest_in(folder: Path) -> str:
    return str(read_document(folder, DOCUMENT)["digest"])
