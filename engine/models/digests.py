"""Digests of models: equal where everything that is loaded is equal, wherever it is stored."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from engine.job.spec import JobSpec
from engine.models.addresses import CONFIGURATION_PATTERNS, WEIGHTS_PATTERN, resolve
from engine.models.configurations import PIPELINE_INDEX, part_classes
from engine.models.independence import check_independent
from engine.models.program_description import program_digest
from engine.models.programs import is_program
from engine.models.weight_files import is_left_out, weights_variant


def model_digest(address: str) -> str:
    """Digest of everything that is loaded from a model's folder: names and contents, not the folder's place.

    Of files and factories: `engine.models.program_description.program_digest`.
    """
    if is_program(address):
        return program_digest(address)
    folder = resolve(address)
    return _folder_digest(folder, _loaded_files(folder))


def _folder_digest(folder: Path, files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(_file_digest(path))
    return digest.hexdigest()[:32]


def model_digests(job: JobSpec, *, is_made: bool = False) -> dict[str, Any]:
    """Digest of every model of a job by role, as `engine.job.plan.plan_identity` takes them.

    Args:
        is_made: whether this is the job of a run that is there: it is read whatever its models are to each other.

    Raises:
        JobError: a model cannot be had, or one that is to judge another is that other (`check_independent`).
    """
    models = job.models
    diffusion = sorted({request.diffusion or models.diffusion for request in job.requests})
    known: dict[str, str] = {}

    def of(address: str) -> str:
        if address not in known:
            known[address] = model_digest(address)
        return known[address]

    digests = {
        "diffusion": {address: of(address) for address in diffusion},
        "clip": of(models.clip),
        "target": of(models.target),
        "transfer": [of(address) for address in models.transfer],
        "oracle": of(models.oracle) if models.oracle else "",
        **({"guidance_decoder": of(models.guidance_decoder)} if models.guidance_decoder else {}),
        # A checker's weights are in the digest of its pipeline.
        **({"safety_checker": "off"} if models.safety_checker == "off" else {}),
    }
    if not is_made:
        # After the digests: what was missing of a hub id is here now.
        check_independent(models)
    if models.judge is None:
        # No key either: plans without a judge keep the digest that they had before there were judges.
        return digests
    return digests | {"judge": of(models.judge)}


def image_encoder_digest(address: str) -> str:
    """Digest of what decides the image embeddings of a Stable unCLIP pipeline: encoder and preprocessing.

    Equal encoders have equal digests, whichever pipeline they are part of.
    """
    folder = resolve(address)
    parts = ("image_encoder", "feature_extractor")
    return _folder_digest(folder, [one for one in _loaded_files(folder) if one.relative_to(folder).parts[0] in parts])


def _loaded_files(folder: Path) -> list[Path]:
    """The files that are loaded and therefore decide the result: no pickles, no pictures, no notes, no variants."""
    parts = list(part_classes(folder)) if (folder / PIPELINE_INDEX).is_file() else []
    roots = [folder / part for part in parts] or [folder]
    patterns = (*CONFIGURATION_PATTERNS, WEIGHTS_PATTERN)
    found = {path for root in roots for pattern in patterns for path in root.rglob(pattern)}
    found |= {folder / PIPELINE_INDEX} if parts else set()
    variants = {where: weights_variant(where) for where in {path.parent for path in found}}
    return [
        path
        for path in found
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not is_left_out(path, variants[path.parent])
    ]


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
