"""Which files of a folder hold a model's weights.

Only safetensors are loaded: plain ones, or another variant (`fp16`) where there are no others, whole or sharded.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from engine.errors import JobError
from engine.models.configurations import PIPELINE_INDEX, part_classes, read_config

WEIGHTS_PATTERN = "*.safetensors"
# Other precisions and training states of weights; of several without the plain ones the first is loaded.
VARIANTS = ("fp16", "bf16", "non_ema")
# In the names of files next to plain weights that are neither loaded nor digested.
_MARKS = (".fp16.", ".bf16.", "non_ema")
_STEM = r"(?:diffusion_pytorch_model|model)"
_VARIANT = r"(?:\.(?P<variant>(?![^.]*-of-\d)[^.]+))?"
_WHOLE = re.compile(rf"{_STEM}{_VARIANT}\.safetensors")
_INDEX = re.compile(rf"{_STEM}\.safetensors\.index{_VARIANT}\.json")
_SHARDED = r"(?:\.(?P<variant>[^.]+?))?-\d{5}-of-\d{5}"
_SHARD = re.compile(rf"{_STEM}{_SHARDED}\.safetensors")
_PICKLES = (
    re.compile(rf"(?:diffusion_)?pytorch_model{_VARIANT}\.bin"),
    re.compile(rf"(?:diffusion_)?pytorch_model{_SHARDED}\.bin"),
)
_WEIGHTLESS = re.compile(r"(Tokenizer|TokenizerFast|Scheduler|Processor|ProcessorFast|ProcessorPil|FeatureExtractor)$")


def weighted_parts(folder: Path) -> list[str]:
    """The parts of a pipeline's folder that have weights; of a single model the folder itself, `.`."""
    if not (folder / PIPELINE_INDEX).is_file():
        return ["."]
    return [name for name, kind in part_classes(folder).items() if not _WEIGHTLESS.search(kind)]


def has_weights(folder: Path) -> bool:
    """Whether a folder has safetensors that can be loaded, of whichever variant."""
    return bool(_variants(folder))


def weights_variant(folder: Path) -> str | None:
    """The `variant` with which `from_pretrained` of diffusers and transformers loads a folder's safetensors.

    None is the plain weights, or no weights at all: `weights_problem` distinguishes these.
    """
    variants = _variants(folder)
    if None in variants or not variants:
        return None
    ranks = {variant: rank for rank, variant in enumerate(VARIANTS)}
    return min(filter(None, variants), key=lambda variant: (ranks.get(variant, len(ranks)), variant))


def weights_problem(folder: Path, address: str, conversion: str) -> str | None:
    """What is wrong with a folder's weights, by the names of its files and the index of its shards; None if nothing is.

    Args:
        address: of the model, for the message.
        conversion: the command that converts the model to safetensors, from `conversion_line`.
    """
    names = _names(folder)
    if not _variants(folder):
        return _missing_weights(folder, names, address, conversion)
    variant = weights_variant(folder)
    indices = [name for name in names if (m := _INDEX.fullmatch(name)) and m["variant"] == variant]
    if any((m := _WHOLE.fullmatch(name)) and m["variant"] == variant for name in names) or not indices:
        return None
    shards = read_config(folder / indices[0]).get("weight_map")
    lacking = sorted(set(map(str, shards.values())) - names) if isinstance(shards, dict) else ["weight_map"]
    return f"'{address}': {folder.name}/{indices[0]} names {lacking[0]}, which does not exist" if lacking else None


def check_weights(folder: Path, address: str, conversion: str) -> None:
    """Check that a folder has weights that can be loaded; the arguments are those of `weights_problem`.

    Raises:
        JobError: it has none, with the command that converts what there is.
    """
    if problem := weights_problem(folder, address, conversion):
        raise JobError(problem)


def _missing_weights(folder: Path, names: set[str], address: str, conversion: str) -> str:
    if any(pattern.fullmatch(name) for name in names for pattern in _PICKLES):
        return (
            f"'{address}': the weights in {folder.name} are pickled (.bin), which may run any code and are not loaded;"
            f" if you trust them, convert them once and name the new folder: {conversion}"
        )
    return (
        f"'{address}' has no safetensors in {folder.name}, the only format that is loaded; get"
        f" model.safetensors or diffusion_pytorch_model.safetensors, or convert the weights: {conversion}"
    )


def conversion_line(loader: str, address: str, folder: Path | None = None) -> str:
    """The command that turns a model's pickled weights into safetensors, in a folder of its own.

    Args:
        loader: class of a library, such as `diffusers.DiffusionPipeline`.
        folder: of the model, if it is on this machine.
    """
    names = [path.name for path in folder.rglob("*.bin")] if folder else []
    variants = {m["variant"] for name in names for pattern in _PICKLES if (m := pattern.fullmatch(name))}
    option = f", variant={json.dumps(min(filter(None, variants)))}" if variants and None not in variants else ""
    library, source, target = loader.partition(".")[0], json.dumps(address), f"{Path(address).name}-safetensors"
    code = f"import {library}; {loader}.from_pretrained({source}{option}).save_pretrained({json.dumps(target)})"
    return f"python -c {shlex.quote(code)}"


def is_left_out(path: Path, variant: str | None) -> bool:
    """Whether a file of a folder holds another precision or training state than the weights that are loaded.

    Args:
        variant: of the file's folder, from `weights_variant`.
    """
    if variant is None:
        return any(mark in path.name for mark in _MARKS)
    match = next((m for pattern in (_WHOLE, _INDEX, _SHARD) if (m := pattern.fullmatch(path.name))), None)
    return match is not None and match["variant"] != variant


def _names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def _variants(folder: Path) -> set[str | None]:
    """The variants of which a folder has whole safetensors; None stands for the plain ones."""
    patterns = (_WHOLE, _INDEX)
    return {m["variant"] for name in _names(folder) for pattern in patterns if (m := pattern.fullmatch(name))}
