"""Where models are: `zoo:NAME/PART`, a folder, or a hub id. Reads configurations without importing torch."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import engine
from engine.errors import JobError
from engine.spec import JobSpec, nearest

ZOO = Path(engine.__file__).parent / "zoo"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
# What is loaded from a folder and therefore decides the result: no pickles, no pictures, no notes.
_LOADED = ("*.json", "*.safetensors", "*.txt")


@dataclass(frozen=True, slots=True)
class Source:
    """Where a model is found.

    Attributes:
        address: as the job has it.
        folder: the local folder, or None for a hub id that is not on this machine.
    """

    address: str
    folder: Path | None


def locate(address: str) -> Source:
    """Find a model without downloading anything.

    Raises:
        JobError: no zoo part of that name (the nearest is offered), no such folder and not a hub id.
    """
    if address.startswith("zoo:"):
        return Source(address, _zoo_folder(address.removeprefix("zoo:")))
    folder = Path(address).expanduser()
    if folder.is_dir():
        return Source(address, folder)
    if folder.is_file():
        raise JobError(f"'{address}' is a file; give the folder of the model")
    if not _HUB_ID.match(address):
        raise JobError(f"'{address}' is neither a folder nor a hub id (owner/name) nor a zoo part (zoo:NAME/PART)")
    return Source(address, _cached_snapshot(address))


def resolve(address: str) -> Path:
    """The local folder of a model; a hub id is downloaded if it is not there (safetensors and configurations only).

    Raises:
        JobError: as `locate`, or the hub cannot be reached.
    """
    source = locate(address)
    if source.folder is not None:
        return source.folder
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(address, allow_patterns=list(_LOADED)))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise JobError(f"'{address}' is not a folder here and could not be had from the model hub ({reason})") from None


def read_labels(address: str) -> list[str] | None:
    """The class names of a classifier in index order, or None for a hub id that is not on this machine.

    Raises:
        JobError: the folder has no usable `config.json` with `id2label`.
    """
    source = locate(address)
    if source.folder is None:
        return None
    config = read_config(source.folder / "config.json")
    labels = config.get("id2label")
    if not isinstance(labels, dict) or len(labels) < 2:
        raise JobError(f"'{address}': config.json has no `id2label` with two classes or more; is it a classifier?")
    try:
        return [str(labels[str(index)]) for index in range(len(labels))]
    except KeyError as missing:
        raise JobError(f"'{address}': id2label in config.json has no class {missing}; number them from 0") from None


def read_config(path: Path) -> dict[str, Any]:
    """A JSON configuration.

    Raises:
        JobError: the file is missing or not a JSON object.
    """
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise JobError(f"'{path.parent}' has no {path.name}; is it a model folder?") from None
    except (OSError, ValueError) as error:
        raise JobError(f"'{path}' cannot be read as JSON ({error})") from None
    if not isinstance(config, dict):
        raise JobError(f"'{path}' is not a JSON object")
    return config


def model_digest(address: str) -> str:
    """Digest of everything that is loaded from a model's folder: names and contents, not the folder's place."""
    folder = resolve(address)
    digest = hashlib.sha256()
    for path in sorted(_loaded_files(folder)):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0")
        digest.update(_file_digest(path))
    return digest.hexdigest()[:32]


def model_digests(job: JobSpec) -> dict[str, Any]:
    """Digest of every model of a job by role, as `engine.plan.plan_identity` takes them."""
    models = job.models
    diffusion = sorted({request.diffusion or models.diffusion for request in job.requests})
    known: dict[str, str] = {}

    def of(address: str) -> str:
        if address not in known:
            known[address] = model_digest(address)
        return known[address]

    return {
        "diffusion": {address: of(address) for address in diffusion},
        "clip": of(models.clip),
        "target": of(models.target),
        "transfer": [of(address) for address in models.transfer],
        "oracle": of(models.oracle) if models.oracle else "",
    }


def check_addresses(job: JobSpec) -> None:
    """Check that every model of a job can be found and is of the right kind, without loading one.

    Raises:
        JobError: all problems, a line each, by field.
    """
    problems: list[str] = []
    for field, address, marker in _roles(job):
        try:
            source = locate(address)
            if source.folder is not None and not (source.folder / marker).is_file():
                raise JobError(f"'{address}' has no {marker}; {_KINDS[marker]} is expected here")
        except JobError as error:
            problems += [f"{field}: {problem}" for problem in error.problems]
    if not problems:
        problems += _label_problems(job)
    if problems:
        raise JobError(problems)


_KINDS = {
    "model_index.json": "a diffusers pipeline folder",
    "config.json": "a transformers model folder",
}


def _roles(job: JobSpec) -> list[tuple[str, str, str]]:
    models = job.models
    roles = [("models.diffusion", models.diffusion, "model_index.json"), ("models.clip", models.clip, "config.json")]
    roles.append(("models.target", models.target, "config.json"))
    roles += [(f"models.transfer.{place}", one, "config.json") for place, one in enumerate(models.transfer)]
    if models.oracle:
        roles.append(("models.oracle", models.oracle, "config.json"))
    for number, request in enumerate(job.requests):
        if request.diffusion:
            roles.append((f"requests.{number}.diffusion", request.diffusion, "model_index.json"))
    return roles


def _label_problems(job: JobSpec) -> list[str]:
    """Classifiers that are compared must have the same classes in the same order."""
    problems: list[str] = []
    others = [(f"models.transfer.{place}", one) for place, one in enumerate(job.models.transfer)]
    others += [("models.oracle", job.models.oracle)] if job.models.oracle else []
    try:
        wanted = read_labels(job.models.target)
    except JobError as error:
        return [f"models.target: {error}"]
    for field, address in others:
        try:
            labels = read_labels(address)
        except JobError as error:
            problems.append(f"{field}: {error}")
            continue
        if wanted and labels and labels != wanted:
            problems.append(f"{field}: '{address}' has other classes than the target; its id2label must be the same")
    return problems


def _zoo_folder(part: str) -> Path:
    parts = sorted(path.parent.relative_to(ZOO).as_posix() for path in ZOO.glob("*/*/*.json") if path.is_file())
    known = sorted({one for one in parts if _is_model(ZOO / one)})
    if part not in known:
        raise JobError(f"'zoo:{part}' is not in the zoo; it has {', '.join(known) or 'nothing'}" + nearest(part, known))
    return ZOO / part


def _is_model(folder: Path) -> bool:
    return (folder / "config.json").is_file() or (folder / "model_index.json").is_file()


def _cached_snapshot(address: str) -> Path | None:
    """Folder of a hub id that was downloaded before."""
    from huggingface_hub import try_to_load_from_cache

    for name in ("model_index.json", "config.json"):
        found = try_to_load_from_cache(address, name)
        if isinstance(found, str):
            return Path(found).parent
    return None


def _loaded_files(folder: Path) -> list[Path]:
    found = {path for pattern in _LOADED for path in folder.rglob(pattern)}
    return [path for path in found if not any(part.startswith(".") for part in path.relative_to(folder).parts)]


def _file_digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()
