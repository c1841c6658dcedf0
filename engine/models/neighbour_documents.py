"""The *neighbours* artefact by its document: labelled images in the feature space of an encoder. Imports no torch.

`neighbours.json` has everything but the features of the images, which are in `features.safetensors`, ordered by class.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import JobError
from engine.job.plan import usable_temperature
from engine.methods.config_values import is_integer, is_number
from engine.models.addresses import locate
from engine.models.artefact_documents import REMEDY, malformed, read_document, unreadable
from engine.models.artefacts import find_artefact
from engine.models.class_name_checks import check_names
from engine.models.configurations import NEIGHBOURS_DOCUMENT as DOCUMENT
from engine.models.untrusted_files import check_regular

FEATURES = "features.safetensors"
# Features of all images, 2 GiB in float32: every worker holds them, and searches all of them for every image.
MAX_VALUES = 2**29


@dataclass(frozen=True, slots=True, kw_only=True)
class NeighboursDocument:
    """What is known of labelled images and of the vote among them, without their features.

    Attributes:
        folder: of the artefact.
        digest: of its content.
        labels: class names in index order.
        counts: images by class index.
        dim: entries d of a feature.
        k: neighbours that vote.
        tau: temperature of the similarities.
        temperature: by which the logits of the vote are divided.
        encoder: address of the model whose image embeddings the features are, as it was given.
        encoder_digest: that model's digest at the time.
        features_sha256: checksum of the file with the features.
    """

    folder: Path
    digest: str
    labels: tuple[str, ...]
    counts: tuple[int, ...]
    dim: int
    k: int
    tau: float
    temperature: float
    encoder: str
    encoder_digest: str
    features_sha256: str

    @property
    def encoder_address(self) -> str:
        """The encoder as it is found from here.

        A relative path is looked for in the working folder, as all of a job's, and then in the folder of the artefact,
        so that an artefact can be handed on with its encoder.
        """
        inside = self.folder / self.encoder
        return str(inside) if not Path(self.encoder).is_dir() and inside.is_dir() else self.encoder


def find_neighbours(address: str) -> Path | None:
    """The folder of a *neighbours* artefact, given itself or by a folder that holds it; None for anything else.

    Raises:
        JobError: as `locate`, or the folder holds several.
    """
    folder = locate(address).folder
    if folder is None or (folder / DOCUMENT).is_file():
        return folder
    return find_artefact(str(folder), (DOCUMENT,))


def read_neighbours(folder: Path) -> NeighboursDocument:
    """The document of an artefact, checked against its digest; the features are not read.

    Raises:
        JobError: it is damaged or of another version.
    """
    fields = read_document(folder, DOCUMENT)
    try:
        return _document_of(fields, folder)
    except (KeyError, TypeError, ValueError) as error:
        raise malformed(folder, error) from None


def check_features(document: NeighboursDocument) -> None:
    """Check the features of an artefact against their checksum.

    Raises:
        JobError: they are not there, or not what they were.
    """
    path = document.folder / FEATURES
    try:
        check_regular(path)
        with path.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise unreadable(document.folder, DOCUMENT, error) from None
    if checksum != document.features_sha256:
        raise changed_features(document.folder)


def changed_features(folder: Path) -> JobError:
    """The error for features that do not have the checksum in the document."""
    return JobError(f"'{folder}': {FEATURES} is not what it was (checksum); {REMEDY}")


def _document_of(fields: dict[str, Any], folder: Path) -> NeighboursDocument:
    """The document of parsed fields.

    Raises:
        ValueError: a value is not what this version writes.
    """
    counts, dim, k, tau = fields["counts"], fields["dim"], fields["k"], fields["similarity_temperature"]
    encoder, labels = fields["models"]["encoder"], check_names(fields["classes"], f"'{folder}': classes")
    if not all(is_integer(value) and value > 0 for value in (*counts, dim, k)) or len(counts) != len(labels):
        raise ValueError("its counts are not those of images by class")
    if sum(counts) * dim > MAX_VALUES:
        raise ValueError(too_many(sum(counts), dim))
    if not is_number(tau) or not tau > 0:
        raise ValueError("the temperature of its similarities is not a positive number")
    if not all(isinstance(encoder[name], str) and encoder[name] for name in ("address", "digest")):
        raise ValueError("its encoder is no text")
    return NeighboursDocument(
        folder=folder,
        digest=fields["digest"],
        labels=tuple(labels),
        counts=tuple(counts),
        dim=dim,
        k=k,
        tau=float(tau),
        temperature=usable_temperature(fields["temperature"]),
        encoder=encoder["address"],
        encoder_digest=encoder["digest"],
        features_sha256=str(fields["features_sha256"]),
    )


def too_many(num_images: int, dim: int) -> str:
    """Why the features of images are more than are searched."""
    return (
        f"{num_images:,} images with {dim} features each are more than fit into the memory of every worker; the most is"
        f" {MAX_VALUES // dim:,} images: give fewer, as many of each class"
    )
