"""Parts of a pipeline's folder: their configuration files, and their weights from safetensors alone. Without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from engine.models.configurations import PIPELINE_INDEX, part_classes, read_config
from engine.models.loading import whole
from engine.models.weight_files import weights_variant

SAFETY_CHECKER = "safety_checker"
FEATURE_EXTRACTOR = "feature_extractor"
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))


def configuration_file(part: str) -> str:
    """The file name of a part's configuration in the folder of the part."""
    if part.startswith("tokenizer"):
        return "tokenizer_config.json"
    if part.endswith("scheduler"):
        return "scheduler_config.json"
    return "preprocessor_config.json" if part == FEATURE_EXTRACTOR else "config.json"


def has_vocabulary(tokenizer: Path) -> bool:
    """Whether the folder of a tokenizer has a vocabulary; transformers would make an empty one."""
    return any(all((tokenizer / name).is_file() for name in names) for names in _VOCABULARIES)


def has_configurations(folder: Path) -> bool:
    """Whether a folder has the configurations of all parts of a pipeline; of a hub id only some may be here."""
    if not (folder / PIPELINE_INDEX).is_file():
        return False
    parts = part_classes(folder)
    tokenizers = [name for name in parts if name.startswith("tokenizer")]
    files = (folder / name / configuration_file(name) for name in parts)
    return all(file.is_file() for file in files) and all(has_vocabulary(folder / name) for name in tokenizers)


def text_config(folder: Path) -> dict[str, Any]:
    """The configuration of a CLIP text encoder, which may be in that of a whole CLIP model."""
    config = read_config(folder / "config.json")
    kind, nested = config.get("model_type", "clip_text_model"), config.get("text_config")
    return {**nested, "model_type": kind} if isinstance(nested, dict) else config


def load_part(kind: Any, folder: Path, **options: Any) -> Any:
    """A model of diffusers or transformers with all of its weights, from safetensors in a local folder.

    Args:
        kind: its class.
        options: further arguments of `from_pretrained`.

    Raises:
        ValueError: as `engine.models.runtime.whole`.
    """
    return whole(
        kind.from_pretrained(
            folder,
            variant=weights_variant(folder),
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
            **options,
        )
    )
