"""Models of the Hugging Face hub: what is cached of them, and the download of the rest. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from engine.errors import JobError, first_line
from engine.models.configurations import CONFIGURATION_PATTERNS, PIPELINE_INDEX
from engine.models.pipelines.lookup import check_pipeline, check_pipeline_weights
from engine.models.weight_files import VARIANTS, WEIGHTS_PATTERN, has_weights, weighted_parts

# A whole file, its shards, and the index of the shards.
_VARIANT_ENDINGS = (".safetensors", "-*.safetensors", ".json")
# The dots of a variant within a name; `non_ema` may be anywhere.
_VARIANT_PATTERNS = [*(f"*.{variant}.*" for variant in VARIANTS if variant != "non_ema"), "*non_ema*"]


def cached_snapshot(address: str) -> Path | None:
    """The folder of a hub id that was downloaded before, in whole or in part.

    Raises:
        JobError: it is not a hub id.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        for name in (PIPELINE_INDEX, "config.json"):
            path = try_to_load_from_cache(address, name)
            if isinstance(path, str):
                return Path(path).parent
    except (HFValidationError, OSError) as error:
        raise JobError(f"'{address}' is not a folder, and not a hub id either ({first_line(error)})") from None
    return None


def download(address: str) -> Path:
    """The folder of a hub id; what is missing is downloaded, safetensors and configurations only.

    Weights in single precision are preferred; another variant (`fp16`) is downloaded only where there are no others.

    Raises:
        JobError: the hub has a pipeline that does not run here.
        Exception: whatever the hub's library raises where it cannot be reached.
    """
    folder = _snapshot(address, list(CONFIGURATION_PATTERNS), _VARIANT_PATTERNS)
    is_pipeline = (folder / PIPELINE_INDEX).is_file()
    if is_pipeline:
        # Before gigabytes are downloaded in vain; whether the job fits the pipeline is checked later.
        check_pipeline(folder, address, checks_safety=False)
    folder = _download_weights(address, folder)
    if is_pipeline:
        check_pipeline_weights(folder, address, checks_safety=False)
    return folder


def _download_weights(address: str, folder: Path) -> Path:
    # By part: next to the parts of a pipeline there may be other weights of many gigabytes.
    prefixes = {part: "" if part == "." else f"{part}/" for part in weighted_parts(folder)}
    folder = _snapshot(address, [f"{prefix}{WEIGHTS_PATTERN}" for prefix in prefixes.values()], _VARIANT_PATTERNS)
    for variant in VARIANTS:
        lacking = [prefix for part, prefix in prefixes.items() if not has_weights(folder / part)]
        if lacking:
            patterns = [f"{prefix}*.{variant}{ending}" for prefix in lacking for ending in _VARIANT_ENDINGS]
            folder = _snapshot(address, patterns, [])
    return folder


def _snapshot(address: str, patterns: list[str], ignored: list[str]) -> Path:
    import huggingface_hub

    return Path(huggingface_hub.snapshot_download(address, allow_patterns=patterns, ignore_patterns=ignored))
