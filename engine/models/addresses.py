"""Where models are: `zoo:NAME/PART`, a folder, or a hub id. Reads configurations without importing torch.

Classifiers may also be files or factories: `engine.models.programs`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from engine.errors import JobError, first_line
from engine.job.spec_messages import nearest
from engine.models.configurations import ARTEFACT_DOCUMENT, PIPELINE_INDEX
from engine.models.pipelines import (
    check_pipeline,
    check_pipeline_weights,
)
from engine.models.weight_files import VARIANTS, has_weights, weighted_parts

ZOO = Path(__file__).parents[1] / "zoo"
_HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")
CONFIGURATION_PATTERNS = ("*.json", "*.txt")
WEIGHTS_PATTERN = "*.safetensors"
# Whole, in parts, and the list of the parts.
_OF_VARIANT = (".safetensors", "-*.safetensors", ".json")


@dataclass(frozen=True, slots=True)
class ModelLocation:
    """Where a model is found.

    Attributes:
        address: as the job has it.
        folder: the local folder, or None for a hub id that is not on this machine.
        is_hub: whether it is a hub id; its local folder need not be complete.
    """

    address: str
    folder: Path | None
    is_hub: bool = False


def locate(address: str) -> ModelLocation:
    """Find a model without downloading anything.

    Raises:
        JobError: no zoo part of that name (the nearest is offered), no such folder and not a hub id.
    """
    if address.startswith("zoo:"):
        return ModelLocation(address, zoo_folder(address.removeprefix("zoo:").rstrip("/")))
    try:
        folder = Path(address).expanduser()
        if folder.is_dir():
            return ModelLocation(address, folder)
        if folder.is_file():
            raise JobError(f"'{address}' is a file; give the folder of the model")
    except (OSError, RuntimeError, ValueError) as error:
        raise JobError(f"'{address}' cannot be looked at ({getattr(error, 'strerror', None) or error})") from None
    if not _HUB_ID.fullmatch(address):
        raise JobError(f"'{address}' is neither a folder nor a hub id (owner/name) nor a zoo part (zoo:NAME/PART)")
    return ModelLocation(address, _cached_snapshot(address), is_hub=True)


def resolve(address: str) -> Path:
    """The local folder of a model; what is missing of a hub id is downloaded (safetensors and configurations only).

    Of weights that are there in several precisions the plain ones are; another (`fp16`) only where there are no others.

    Raises:
        JobError: as `locate`, the hub cannot be reached, or it has a pipeline that does not run here.
    """
    source = locate(address)
    if source.folder is not None and not source.is_hub:
        return source.folder
    try:
        return _download(address)
    except JobError:
        raise
    except Exception as error:
        reason = first_line(error)
        raise JobError(f"'{address}' is not a folder here and could not be had from the model hub ({reason})") from None


def _download(address: str) -> Path:
    import huggingface_hub

    def download(patterns: list[str], ignored: list[str]) -> Path:
        return Path(huggingface_hub.snapshot_download(address, allow_patterns=patterns, ignore_patterns=ignored))

    # With the dots of a variant in a name; `non_ema` may stand anywhere.
    others = [f"*.{one}.*" for one in VARIANTS if one != "non_ema"] + ["*non_ema*"]
    folder = download(list(CONFIGURATION_PATTERNS), others)
    is_pipeline = (folder / PIPELINE_INDEX).is_file()
    if is_pipeline:
        # Before gigabytes are fetched for nothing; a job's own wishes are checked later.
        check_pipeline(folder, address, checks_safety=False)
    # Beside a pipeline's parts there may be other weights of many gigabytes.
    where = {part: "" if part == "." else f"{part}/" for part in weighted_parts(folder)}
    folder = download([f"{prefix}{WEIGHTS_PATTERN}" for prefix in where.values()], others)
    for variant in VARIANTS:
        lacking = [prefix for part, prefix in where.items() if not has_weights(folder / part)]
        if lacking:
            folder = download([f"{prefix}*.{variant}{ending}" for prefix in lacking for ending in _OF_VARIANT], [])
    if is_pipeline:
        check_pipeline_weights(folder, address, checks_safety=False)
    return folder


def zoo_folder(part: str) -> Path:
    parts = sorted(path.parent.relative_to(ZOO).as_posix() for path in ZOO.glob("*/*/*.json") if path.is_file())
    known = sorted({one for one in parts if _is_model(ZOO / one)})
    if part not in known:
        raise JobError(f"'zoo:{part}' is not in the zoo; it has {', '.join(known) or 'nothing'}" + nearest(part, known))
    return ZOO / part


def _is_model(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", PIPELINE_INDEX, ARTEFACT_DOCUMENT))


def _cached_snapshot(address: str) -> Path | None:
    """Folder of a hub id that was downloaded before, in whole or in part."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        for name in (PIPELINE_INDEX, "config.json"):
            found = try_to_load_from_cache(address, name)
            if isinstance(found, str):
                return Path(found).parent
    except (HFValidationError, OSError) as error:
        raise JobError(f"'{address}' is not a folder, and no hub id either ({first_line(error)})") from None
    return None
