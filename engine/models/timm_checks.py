"""Which folders that timm saved are scored with correctly, by `config.json` alone. Imports neither torch nor timm."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from typing import Any

from engine.errors import JobError
from engine.models.class_name_checks import SINGLE_LOGIT, in_index_order
from engine.models.configurations import TIMM_KEY
from engine.models.processor_checks import AS_FACTORY, is_finite_number, is_three_numbers

# Arguments of `timm.create_model` that would load other files or give other outputs than the folder's network.
_FOREIGN_ARGUMENTS = (
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "features_only",
    "scriptable", "exportable", "no_jit",
)  # fmt: skip


def check_timm_installed(address: str) -> None:
    """Check that timm can be imported.

    Raises:
        JobError: it is not installed.
    """
    if importlib.util.find_spec("timm") is None:
        raise JobError(f"'{address}' is a model of timm, which is not installed; install riskforge[timm]")


def timm_names(config: dict[str, Any], address: str) -> list[Any]:
    """Class names of a folder that timm saved, not checked: `label_names` of its configuration, else ImageNet's.

    Raises:
        JobError: there are no names, or only one.
    """
    names = config.get("label_names", config.get("labels"))
    if names is None and timm_count(config) == 1:
        raise JobError(f"'{address}': num_classes: {SINGLE_LOGIT}")
    if names is None:
        names = _imagenet_names(config, address)
    if isinstance(names, dict) and len(names) > 1:
        names = in_index_order(names, f"'{address}': label_names in config.json")
    if isinstance(names, list) and len(names) == 1:
        raise JobError(f"'{address}': label_names in config.json has one class: {SINGLE_LOGIT}")
    if not isinstance(names, list) or len(names) < 2:
        raise JobError(f"'{address}': config.json names no classes; add `label_names`, a list of two names or more")
    return names


def _imagenet_names(config: dict[str, Any], address: str) -> list[Any]:
    """The names that transformers gives the classes of a network whose head is of a known part of ImageNet."""
    if problems := timm_problems(config):
        raise JobError([f"'{address}': {problem}" for problem in problems])
    check_timm_installed(address)
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig

    try:
        names = TimmWrapperConfig.from_dict(config).id2label or {}
    except StrictDataclassError as error:
        raise ValueError(" ".join(str(error).split())) from error
    return [] if names.get(0) == "LABEL_0" else [names[index] for index in sorted(names)]


def timm_problems(config: dict[str, Any]) -> list[str]:
    """Why the configuration of timm is not that of a classifier of one class among several on RGB images."""
    pretrained, arguments = config[TIMM_KEY], config.get("model_args") or {}
    if not isinstance(pretrained, dict) or not isinstance(arguments, dict):
        return ["pretrained_cfg and model_args in config.json are not objects; save the model with timm"]
    problems = []
    name = config.get("architecture")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        problems.append(f"architecture: {name!r} is not a name of timm's")
    if foreign := [name for name in _FOREIGN_ARGUMENTS if name in arguments]:
        problems.append(f"model_args.{foreign[0]}: must not be set in a network's own folder; remove it")
    problems += _count_problems(config, pretrained, arguments)
    if arguments.get("in_chans", 3) != 3:
        problems.append(
            f"model_args.in_chans: {arguments['in_chans']!r}; images here have three channels: train on RGB"
        )
    return problems


def _count_problems(config: dict[str, Any], pretrained: dict[str, Any], arguments: dict[str, Any]) -> Iterator[str]:
    """Numbers of classes that are too small or contradict each other."""
    own, of_arguments = config.get("num_classes"), arguments.get("num_classes")
    if 0 in (own, of_arguments, pretrained.get("num_classes")):
        yield "num_classes: 0, so it has no head; save the whole classifier"
    count, other = of_arguments if own is None else own, arguments.get("num_classes", own)
    names = config.get("label_names")
    if count == 1 and isinstance(names, (list, dict)) and len(names) == 2:
        # Of the two classes of a single logit.
        names = None
    if count != other:
        yield f"num_classes: {count!r}, but {other!r} in model_args; set both to the number of logits"
    elif isinstance(names, (list, dict)) and len(names) > 1 and count is not None and len(names) != count:
        yield f"num_classes: {count!r}, but label_names has {len(names)} classes; set both to the number of logits"


def timm_count(config: dict[str, Any]) -> int | None:
    """The logits of a network that timm saved; None where its configuration does not tell."""
    arguments, pretrained = config.get("model_args"), config[TIMM_KEY]
    places = [config, *(place for place in (arguments, pretrained) if isinstance(place, dict))]
    count = next((place["num_classes"] for place in places if place.get("num_classes") is not None), None)
    return count if type(count) is int else None


def check_timm_transform(config: dict[str, Any], address: str) -> None:
    """Check that timm's transform for evaluation is supported.

    Args:
        config: timm's configuration of the data: `pretrained_cfg`, or what timm resolves it to.

    Raises:
        JobError: naming field, value and remedy.
    """
    _check_geometry(config, address)
    share = config.get("crop_pct")
    if share is not None and not (is_finite_number(share) and share > 0):
        raise JobError(f"'{address}': crop_pct: {share!r} is not a fraction of the edge above 0")
    for field in ("mean", "std"):
        value = config.get(field) or [1, 1, 1]
        value = list(value) if isinstance(value, tuple) else value
        if not is_three_numbers(value) or (field == "std" and min(value) <= 0):
            raise JobError(f"'{address}': {field}: {value!r} is not three numbers, one for each of red, green and blue")


def _check_geometry(config: dict[str, Any], address: str) -> None:
    """Check the input's shape, how images are brought to it, and the filter of the resize."""
    shape, mode = config.get("input_size", [3, 224, 224]), config.get("crop_mode") or "center"
    interpolation = config.get("interpolation") or "bicubic"
    if not (
        isinstance(shape, (list, tuple)) and len(shape) == 3 and all(type(size) is int and size > 0 for size in shape)
    ):
        raise JobError(f"'{address}': input_size: {shape!r} is not [3, height, width]")
    channels, height, width = shape
    if channels != 3:
        raise JobError(
            f"'{address}': input_size: {list(shape)!r} has {channels} channels; images here have three: train the"
            f" network on RGB, {AS_FACTORY}"
        )
    if not (mode == "squash" or (mode == "center" and height == width)) or interpolation not in ("bilinear", "bicubic"):
        raise JobError(
            f"'{address}': timm's crop_mode '{mode}' at {height} x {width} pixels with interpolation '{interpolation}'"
            " has no differentiable equivalent here; bilinear and bicubic have, with squash, or with center where the"
            " input is square"
        )
