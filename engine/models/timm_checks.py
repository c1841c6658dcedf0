"""Which folders that timm saved are scored with correctly, by `config.json` alone. Imports neither torch nor timm."""

from __future__ import annotations

import importlib.util
import re
from typing import Any

from engine.errors import JobError
from engine.models.class_name_checks import SINGLE_LOGIT, in_index_order
from engine.models.configurations import TIMM_KEY
from engine.models.processor_checks import AS_FACTORY, is_colour, is_finite_number

# What `timm.create_model` takes and a network's own folder must not say: other files, other outputs.
_TIMM_OTHERS = (
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "features_only",
    "scriptable", "exportable", "no_jit",
)  # fmt: skip


def check_timm_installed(address: str) -> None:
    """Check that timm is there.

    Raises:
        JobError: it is not.
    """
    if importlib.util.find_spec("timm") is None:
        raise JobError(f"'{address}' is a model of timm, which is not installed; install riskforge[timm]")


def timm_problems(config: dict[str, Any]) -> list[str]:
    """What of timm's configuration is no classifier of one class among several on RGB images."""
    pretrained, arguments = config[TIMM_KEY], config.get("model_args") or {}
    if not isinstance(pretrained, dict) or not isinstance(arguments, dict):
        return ["pretrained_cfg and model_args in config.json are objects; is it saved by timm?"]
    problems = []
    name = config.get("architecture")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        problems.append(f"architecture: {name!r} is no name of timm's")
    if others := [name for name in _TIMM_OTHERS if name in arguments]:
        problems.append(f"model_args.{others[0]}: has no place in a network's own folder; leave it out")
    counts = {
        "num_classes": config.get("num_classes"),
        "model_args.num_classes": arguments.get("num_classes"),
        "pretrained_cfg.num_classes": pretrained.get("num_classes"),
    }
    known = {field: count for field, count in counts.items() if count is not None}
    if 1 in known.values():
        problems.append(f"num_classes: {SINGLE_LOGIT}")
    elif 0 in known.values():
        problems.append("num_classes: 0, so it has no head; save the whole classifier")
    first, other = (
        known.get("num_classes", arguments.get("num_classes")),
        arguments.get("num_classes", known.get("num_classes")),
    )
    names = config.get("label_names")
    if first != other:
        problems.append(f"num_classes: {first!r}, but {other!r} in model_args; set both to what the head has")
    elif isinstance(names, (list, dict)) and len(names) > 1 and first is not None and len(names) != first:
        problems.append(
            f"num_classes: {first!r}, but label_names has {len(names)} classes; set both to what the head has"
        )
    if arguments.get("in_chans", 3) != 3:
        problems.append(
            f"model_args.in_chans: {arguments['in_chans']!r}; images here have three channels: train on RGB"
        )
    return problems


def check_timm_transform(config: dict[str, Any], address: str) -> None:
    """Check that timm's transform for evaluation is known to be followed.

    Args:
        config: what timm calls the configuration of the data: `pretrained_cfg`, or what it makes of it.

    Raises:
        JobError: naming field, value and remedy.
    """
    shape, mode = config.get("input_size", [3, 224, 224]), config.get("crop_mode") or "center"
    interpolation = config.get("interpolation") or "bicubic"
    if not (
        isinstance(shape, (list, tuple)) and len(shape) == 3 and all(type(one) is int and one > 0 for one in shape)
    ):
        raise JobError(f"'{address}': input_size: {shape!r} is not [3, height, width]")
    channels, height, width = shape
    if channels != 3:
        raise JobError(
            f"'{address}': input_size: {list(shape)!r} is of {channels} channels; images here have three: train the"
            f" network on RGB, {AS_FACTORY}"
        )
    if not (mode == "squash" or (mode == "center" and height == width)) or interpolation not in ("bilinear", "bicubic"):
        raise JobError(
            f"'{address}': timm's crop_mode '{mode}' at {height} x {width} pixels with interpolation '{interpolation}'"
            " has no differentiable equivalent here; bilinear and bicubic have, with squash, or with center where the"
            " input is square"
        )
    share = config.get("crop_pct")
    if share is not None and not (is_finite_number(share) and share > 0):
        raise JobError(f"'{address}': crop_pct: {share!r} is not a share of the edge above 0")
    for field in ("mean", "std"):
        value = config.get(field) or [1, 1, 1]
        value = list(value) if isinstance(value, tuple) else value
        if not is_colour(value) or (field == "std" and min(value) <= 0):
            raise JobError(f"'{address}': {field}: {value!r} is not three numbers, one for each of red, green and blue")


def timm_names(config: dict[str, Any], address: str) -> list[Any]:
    """Class names of a folder of timm: in its configuration, else those of the part of ImageNet that it is for."""
    names = config.get("label_names", config.get("labels"))
    if names is None:
        if problems := timm_problems(config):
            raise JobError([f"'{address}': {problem}" for problem in problems])
        check_timm_installed(address)
        from huggingface_hub.errors import StrictDataclassError
        from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig

        try:
            known = TimmWrapperConfig.from_dict(config).id2label or {}
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error).split())) from error
        names = [] if known.get(0) == "LABEL_0" else [known[index] for index in sorted(known)]
    if isinstance(names, dict) and len(names) > 1:
        names = in_index_order(names, f"'{address}': label_names in config.json")
    if isinstance(names, list) and len(names) == 1:
        raise JobError(f"'{address}': label_names in config.json has one class: {SINGLE_LOGIT}")
    if not isinstance(names, list) or len(names) < 2:
        raise JobError(f"'{address}': config.json names no classes; add `label_names`, a list of two names or more")
    return names
