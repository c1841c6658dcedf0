"""What a model's folder says of itself: configurations, parts of a pipeline, and which files hold its weights.

Only safetensors are loaded: plain ones, or of another precision (`fp16`) where there are no others, whole or in parts.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import JobError
from engine.models.untrusted_files import MAX_DOCUMENT_BYTES, read_whole

PIPELINE_INDEX = "model_index.json"
# In the config.json of a folder of timm.
TIMM_KEY = "pretrained_cfg"
# Other precisions and training states of weights; of several without the plain ones the first is loaded.
VARIANTS = ("fp16", "bf16", "non_ema")
# Of files beside plain weights, which are neither loaded nor digested.
_MARKS = (".fp16.", ".bf16.", "non_ema")
_STEM = r"(?:diffusion_pytorch_model|model)"
_VARIANT = r"(?:\.(?P<variant>(?![^.]*-of-\d)[^.]+))?"
_WHOLE = re.compile(rf"{_STEM}{_VARIANT}\.safetensors")
_INDEX = re.compile(rf"{_STEM}\.safetensors\.index{_VARIANT}\.json")
_PARTED = r"(?:\.(?P<variant>[^.]+?))?-\d{5}-of-\d{5}"
_SHARD = re.compile(rf"{_STEM}{_PARTED}\.safetensors")
_PICKLES = (
    re.compile(rf"(?:diffusion_)?pytorch_model{_VARIANT}\.bin"),
    re.compile(rf"(?:diffusion_)?pytorch_model{_PARTED}\.bin"),
)
_WEIGHTLESS = re.compile(r"(Tokenizer|TokenizerFast|Scheduler|Processor|ProcessorFast|ProcessorPil|FeatureExtractor)$")


def read_config(path: Path) -> dict[str, Any]:
    """A JSON configuration.

    Raises:
        JobError: the file is missing or not a JSON object.
    """
    try:
        config = json.loads(read_whole(path, MAX_DOCUMENT_BYTES))
    except FileNotFoundError:
        raise JobError(f"'{path.parent}' has no {path.name}; is it a model folder?") from None
    except (OSError, ValueError, RecursionError) as error:
        raise JobError(f"'{path}' cannot be read as JSON ({error})") from None
    if not isinstance(config, dict):
        raise JobError(f"'{path}' is not a JSON object")
    return config


@contextlib.contextmanager
def readable(address: str) -> Iterator[None]:
    """Turn what a value of a wrong kind in a configuration raises into a message that names the model.

    Raises:
        JobError: in place of those errors.
    """
    try:
        yield
    except (TypeError, ValueError, AttributeError, KeyError, IndexError, ArithmeticError) as error:
        raise JobError(f"'{address}': a configuration of it has a value of a wrong kind ({error})") from None


def need_file(folder: Path, name: str, address: str, kind: str) -> None:
    """Check that a model's folder has a file.

    Raises:
        JobError: it has not; `kind` says what is expected of the folder.
    """
    if not (folder / name).is_file():
        raise JobError(f"'{address}' has no {name}; {kind} is expected here")


def part_classes(folder: Path) -> dict[str, str]:
    """Class name of every part of a pipeline's folder; a part that is left out has none."""
    index = read_config(folder / PIPELINE_INDEX)
    return {
        name: str(value[1])
        for name, value in index.items()
        if isinstance(value, list) and len(value) == 2 and all(value)
    }


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

    None is the plain weights, or no weights at all: `weights_problem` tells these apart.
    """
    found = _variants(folder)
    if None in found or not found:
        return None
    known = {name: place for place, name in enumerate(VARIANTS)}
    return min((one for one in found if one), key=lambda one: (known.get(one, len(known)), one))


def weights_problem(folder: Path, address: str, conversion: str) -> str | None:
    """What is wrong with a folder's weights, as far as names and the index of its parts tell, or None.

    Args:
        address: of the model, for the message.
        conversion: command that makes safetensors of the model, as `conversion_line` has it.
    """
    names, found = _names(folder), _variants(folder)
    if not found:
        return _missing_weights(folder, names, address, conversion)
    variant = weights_variant(folder)
    mine = [name for name in names if (m := _INDEX.fullmatch(name)) and m["variant"] == variant]
    if any((m := _WHOLE.fullmatch(name)) and m["variant"] == variant for name in names) or not mine:
        return None
    shards = read_config(folder / mine[0]).get("weight_map")
    lacking = sorted(set(map(str, shards.values())) - names) if isinstance(shards, dict) else ["weight_map"]
    return f"'{address}': {folder.name}/{mine[0]} names {lacking[0]}, which is not there" if lacking else None


def _missing_weights(folder: Path, names: set[str], address: str, conversion: str) -> str:
    if any(pattern.fullmatch(name) for name in names for pattern in _PICKLES):
        return (
            f"'{address}': the weights in {folder.name} are pickled (.bin), which may run any code and are not loaded;"
            f" if you trust them, convert them once and name the new folder: {conversion}"
        )
    return (
        f"'{address}' has no safetensors in {folder.name}, alone of which weights are loaded; get"
        f" model.safetensors or diffusion_pytorch_model.safetensors, or convert what there is: {conversion}"
    )


def conversion_line(loader: str, address: str, folder: Path | None = None) -> str:
    """The command that turns a model's pickled weights into safetensors, in a folder of its own.

    Args:
        loader: class of a library, such as `diffusers.DiffusionPipeline`.
        folder: where the model lies, if it is here.
    """
    names = [one.name for one in folder.rglob("*.bin")] if folder else []
    variants = {m["variant"] for name in names for pattern in _PICKLES if (m := pattern.fullmatch(name))}
    option = f", variant={json.dumps(min(filter(None, variants)))}" if variants and None not in variants else ""
    library, source, target = loader.partition(".")[0], json.dumps(address), f"{Path(address).name}-safetensors"
    code = f"import {library}; {loader}.from_pretrained({source}{option}).save_pretrained({json.dumps(target)})"
    return f"python -c {shlex.quote(code)}"


def is_left_out(path: Path, variant: str | None) -> bool:
    """Whether a file of a folder holds another precision or training state than the weights that are loaded.

    Args:
        variant: of the file's folder, as `weights_variant` has it.
    """
    if variant is None:
        return any(mark in path.name for mark in _MARKS)
    found = next((m for one in (_WHOLE, _INDEX, _SHARD) if (m := one.fullmatch(path.name))), None)
    return found is not None and found["variant"] != variant


def _names(folder: Path) -> set[str]:
    return {one.name for one in folder.iterdir()} if folder.is_dir() else set()


def _variants(folder: Path) -> set[str | None]:
    """The variants of which a folder has whole safetensors; None among them is the plain ones."""
    found = [m for name in _names(folder) for one in (_WHOLE, _INDEX) if (m := one.fullmatch(name))]
    return {m["variant"] for m in found}
