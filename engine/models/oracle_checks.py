"""Which oracles are scored with correctly, by their files alone. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from engine.errors import JobError
from engine.models.addresses import locate
from engine.models.classifier_checks import check_classifier, read_temperature
from engine.models.clip_checks import check_clip, check_image_encoder
from engine.models.digests import oracle_digest
from engine.models.neighbour_documents import check_features, find_neighbours, read_neighbours
from engine.models.open_clip_checks import clip_config
from engine.models.oracle_kinds import kind_in


def check_oracle(folder: Path, address: str) -> None:
    """Check an oracle by its files: a classifier, a CLIP model, or a *neighbours* artefact with its encoder.

    Args:
        folder: at the address; a folder that holds the artefact is as good as the artefact.

    Raises:
        JobError: what the folder holds instead, what is damaged or missing.
    """
    if (artefact := find_neighbours(address)) is not None:
        _check_neighbours(artefact, address)
        return
    is_complete = not locate(address).is_hub
    if kind_in(folder) == "clip":
        check_clip(folder, address, is_complete=is_complete)
        read_temperature(clip_config(folder), address)
    else:
        check_classifier(folder, address, is_complete=is_complete)


def check_encoder(address: str) -> None:
    """Check by its files that a model can embed images for a *neighbours* artefact.

    Raises:
        JobError: it is neither a CLIP model nor DINOv2, or not a whole one.
    """
    location = locate(address)
    if location.folder is not None:
        check_image_encoder(location.folder, address, is_complete=not location.is_hub)


def _check_neighbours(folder: Path, address: str) -> None:
    document = read_neighbours(folder)
    check_features(document)
    encoder = document.encoder_address
    try:
        check_encoder(encoder)
    except JobError as error:
        raise JobError([f"'{address}': its encoder: {problem}" for problem in error.problems]) from None
    # The digest of a model of the hub, which may be here in part, would download the rest.
    if not locate(encoder).is_hub:
        oracle_digest(address)
