"""Digests of models: equal where everything that is loaded is equal, wherever it is stored."""

from __future__ import annotations

import functools
import hashlib
from pathlib import Path
from typing import Any

from engine.errors import JobError
from engine.job.spec import JobSpec
from engine.models.adapters import adapter_identity
from engine.models.addresses import resolve
from engine.models.configurations import CONFIGURATION_PATTERNS, PIPELINE_INDEX, part_classes
from engine.models.independence import check_independent
from engine.models.neighbour_documents import read_neighbours
from engine.models.oracle_kinds import kind_in, oracle_folder
from engine.models.pipelines.lookup import family_of
from engine.models.program_description import program_digest
from engine.models.programs import is_program
from engine.models.weight_files import WEIGHTS_PATTERN, is_left_out, weights_variant


def model_digest(address: str) -> str:
    """Digest of everything that is loaded of a model: names and contents of files, not the folder's path.

    Of files and factories: `engine.models.program_description.program_digest`.

    Raises:
        JobError: the model cannot be located or downloaded.
    """
    if is_program(address):
        return program_digest(address)
    folder = resolve(address)
    return _folder_digest(folder, loaded_files(folder))


def image_encoder_digest(address: str) -> str:
    """Digest of what determines the image embeddings that a pipeline is conditioned on: encoder and preprocessing.

    Equal encoders have equal digests, whichever pipeline they are part of.
    """
    folder = resolve(address)
    parts = family_of(folder, address).embedding_parts
    files = [path for path in loaded_files(folder) if path.relative_to(folder).parts[0] in parts]
    return _folder_digest(folder, files)


def oracle_digest(address: str) -> str:
    """Digest of everything that an oracle's scores depend on; of a *neighbours* artefact its document and its encoder.

    Raises:
        JobError: as `model_digest`; the artefact is damaged, or its encoder is not the one that it was made with.
    """
    folder = None if is_program(address) else oracle_folder(address)
    if folder is None or kind_in(folder) != "neighbours":
        return model_digest(address)
    document = read_neighbours(folder)
    encoder = model_digest(document.encoder_address)
    if encoder != document.encoder_digest:
        raise JobError(
            f"'{address}' was made with another encoder: '{document.encoder}' had the digest {document.encoder_digest},"
            f" and has {encoder} now; restore that model, or make the artefact again with `riskforge prepare JOB --only"
            " neighbours`"
        )
    return hashlib.sha256(f"{document.digest} {encoder}".encode()).hexdigest()[:32]


def model_digests(job: JobSpec, *, of_existing_run: bool = False) -> dict[str, Any]:
    """Digest of every model of a job by role, as `engine.job.plan.plan_identity` takes them.

    Args:
        of_existing_run: whether a run of the job exists; it is read even if its models are not independent.

    Raises:
        JobError: a model cannot be located or downloaded, or the models are not independent (`check_independent`).
    """
    models, of, of_oracle = job.models, functools.cache(model_digest), functools.cache(oracle_digest)
    diffusion = sorted({request.diffusion or models.diffusion for request in job.requests})
    digests = {
        "diffusion": {address: of(address) for address in diffusion},
        "clip": of(models.clip),
        "target": of(models.target),
        "transfer": [of(address) for address in models.transfer],
        "oracle": of_oracle(models.all_oracles[0]) if models.all_oracles else "",
        # Absent where a job has none: plans keep the digest that they had before there were such fields.
        **({"oracles": [*map(of_oracle, models.oracles)]} if models.oracles else {}),
        **({"further_targets": [*map(of, models.further_targets)]} if models.further_targets else {}),
        **({"guidance_decoder": of(models.guidance_decoder)} if models.guidance_decoder else {}),
        **({"adapters": [*map(adapter_identity, models.adapters)]} if models.adapters else {}),
        **({"vae": of(models.vae)} if models.vae else {}),
        # A checker's weights are in the digest of its pipeline.
        **({"safety_checker": "off"} if models.safety_checker == "off" else {}),
    }
    if not of_existing_run:
        # After the digests: what was missing of a hub id has been downloaded now.
        check_independent(models, oracle_guides=job.oracle_guides)
    return digests | ({"judge": of(models.judge)} if models.judge is not None else {})


def _folder_digest(folder: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:32]


def loaded_files(folder: Path) -> list[Path]:
    """The files that are loaded of a model's folder: no pickles, images, notes or other variants."""
    parts = list(part_classes(folder)) if (folder / PIPELINE_INDEX).is_file() else []
    roots = [folder / part for part in parts] or [folder]
    patterns = (*CONFIGURATION_PATTERNS, WEIGHTS_PATTERN)
    paths = {path for root in roots for pattern in patterns for path in root.rglob(pattern)}
    paths |= {folder / PIPELINE_INDEX} if parts else set()
    variants = {parent: weights_variant(parent) for parent in {path.parent for path in paths}}
    return [
        path
        for path in paths
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not is_left_out(path, variants[path.parent])
    ]
