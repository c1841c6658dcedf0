"""Which folders of classifiers and CLIP models are known to be scored rightly, by their files alone.

Class names, the kind of the head, the shape of the input, the image processor, the weights. Imports no torch.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engine.errors import JobError
from engine.methods.config_values import is_number
from engine.models.folders import (
    TIMM_KEY,
    conversion_line,
    has_weights,
    need_file,
    read_config,
    readable,
    weights_problem,
)
from engine.models.processors import check_processor, check_timm_transform
from engine.models.weights import StoredTensor, stored_tensors

MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6
_NO_NAME = re.compile(r"(?i:label|class)[ _-]?\d+|n\d{8}")
# What `timm.create_model` takes and a network's own folder must not say: other files, other outputs.
_TIMM_OTHERS = (
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir", "features_only",
    "scriptable", "exportable", "no_jit",
)  # fmt: skip
_SINGLE = (
    "a head with a single logit z has no second class to be scored against; save the network with two logits, [0, z]"
    " for the classes [other, named one]: the same probabilities"
)
_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", None)


# Class names ---------------------------------------------------------------------------------------------------------


def class_names(folder: Path, address: str) -> list[str]:
    """Class names of a classifier's folder in index order.

    Raises:
        JobError: config.json has none that can stand in a prompt, or contradicts itself.
    """
    config = read_config(folder / "config.json")
    if TIMM_KEY in config:
        with readable(address):
            return check_names(_timm_names(config, address), f"'{address}': label_names in config.json")
    where, labels = f"'{address}': id2label in config.json", config.get("id2label")
    if isinstance(labels, dict) and len(labels) == 1:
        raise JobError(f"{where} has one class: {_SINGLE}")
    if labels is None and config.get("num_labels") == 1:
        raise JobError(f"'{address}': num_labels: {_SINGLE}")
    if not isinstance(labels, dict) or len(labels) < 2:
        raise JobError(f"'{address}': config.json has no `id2label` with two classes or more; is it a classifier?")
    return check_names(_in_order(labels, where), where)


def check_names(names: Sequence[Any], where: str) -> list[str]:
    """Class names, if every one can stand in a prompt; some may be equal, as ImageNet's two cranes.

    Args:
        where: whose they are, for messages.

    Raises:
        JobError: naming the first that cannot.
    """
    remedy = "give every class its own name in words, as it is to stand in 'a photo of a ...'"
    for index, name in enumerate(names):
        if not isinstance(name, str) or not name.strip():
            raise JobError(f"{where}: class {index} has no name ({name!r}); {remedy}")
        if name != name.strip():
            raise JobError(f"{where}: the name of class {index}, {name!r}, begins or ends with a space; {remedy}")
        if _NO_NAME.fullmatch(name):
            raise JobError(
                f"{where}: class {index} is called {name!r}, a number and no name: CLIP and the diffusion model would"
                f" be asked for 'a photo of a {name}'; {remedy}"
            )
    if len(set(names)) < min(2, len(names)):
        raise JobError(f"{where}: all classes are called {names[0]!r}; {remedy}")
    return list(names)


def _in_order(labels: dict[str, Any], where: str) -> list[Any]:
    """The values of a mapping by index, which must have no gap."""
    by_index = {int(key): value for key, value in labels.items() if re.fullmatch(r"\d+", str(key))}
    lacking = next((index for index in range(len(labels)) if index not in by_index), None)
    if lacking is not None:
        raise JobError(f"{where} has no class {lacking}; number the {len(labels)} classes from 0, without gaps")
    return [by_index[index] for index in range(len(labels))]


def _timm_names(config: dict[str, Any], address: str) -> list[Any]:
    """Class names of a folder of timm: in its configuration, else those of the part of ImageNet that it is for."""
    names = config.get("label_names", config.get("labels"))
    if names is None:
        _raise([f"'{address}': {problem}" for problem in _timm_problems(config)])
        check_timm(address)
        from huggingface_hub.errors import StrictDataclassError
        from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig

        try:
            known = TimmWrapperConfig.from_dict(config).id2label or {}
        except StrictDataclassError as error:
            raise ValueError(" ".join(str(error).split())) from error
        names = [] if known.get(0) == "LABEL_0" else [known[index] for index in sorted(known)]
    if isinstance(names, dict) and len(names) > 1:
        names = _in_order(names, f"'{address}': label_names in config.json")
    if isinstance(names, list) and len(names) == 1:
        raise JobError(f"'{address}': label_names in config.json has one class: {_SINGLE}")
    if not isinstance(names, list) or len(names) < 2:
        raise JobError(f"'{address}': config.json names no classes; add `label_names`, a list of two names or more")
    return names


def check_timm(address: str) -> None:
    """Check that timm is there.

    Raises:
        JobError: it is not.
    """
    if importlib.util.find_spec("timm") is None:
        raise JobError(f"'{address}' is a model of timm, which is not installed; install riskforge[timm]")


# Classifiers ---------------------------------------------------------------------------------------------------------


def check_classifier(folder: Path, address: str, *, is_whole: bool = True) -> None:
    """Check by its files that a folder is of a classifier that is scored rightly.

    Args:
        is_whole: whether all of its files should be there; a hub id may be here in part.

    Raises:
        JobError: all problems, a line each, with field and remedy.
    """
    need_file(folder, "config.json", address, "a transformers or timm model folder")
    with readable(address):
        config = read_config(folder / "config.json")
        is_timm, num_classes = TIMM_KEY in config, len(class_names(folder, address))
        kinds = config.get("architectures") or []
        if kinds and not is_timm and not any("ForImageClassification" in str(kind) for kind in kinds):
            raise JobError(f"'{address}' is a {kinds[0]}; a network for image classification is needed")
        _raise([f"'{address}': {one}" for one in (_timm_problems(config) if is_timm else _head_problems(config))])
        read_temperature(config, address)
        if is_timm:
            check_timm(address)
            check_timm_transform(config[TIMM_KEY], address)
        elif is_whole:
            check_processor(folder, address, config)
        if (folder / "adapter_config.json").is_file():
            raise JobError(
                f"'{address}' is an adapter (adapter_config.json) of another model; merge it (merge_and_unload) and"
                " save the whole network"
            )
        if is_whole:
            _check_weights(folder, address, "AutoModelForImageClassification", is_timm=is_timm)
        if has_weights(folder):
            _check_head(folder, address, num_classes)


def read_temperature(config: dict[str, Any], address: str) -> float:
    """The calibration temperature of a configuration, 1 where it has none.

    Raises:
        JobError: it is none by which logits can be divided.
    """
    value = config.get("temperature", 1.0)
    if not is_number(value) or not MIN_TEMPERATURE <= value < MAX_TEMPERATURE:
        raise JobError(
            f"'{address}': temperature {value!r} in config.json is not a number from {MIN_TEMPERATURE:g} to"
            f" {MAX_TEMPERATURE:g}; `riskforge prepare` fits it"
        )
    return float(value)


def _head_problems(config: dict[str, Any]) -> list[str]:
    """What of transformers' configuration is no classifier of one class among several on RGB images."""
    labels, head, problems = config.get("id2label"), config.get("problem_type"), list[str]()
    if head == "multi_label_classification":
        problems.append(
            "problem_type: its head is of independent classes ('multi_label_classification', sigmoid), and risk and"
            " KLDB are of a softmax over classes of which one is right; train a head for single_label_classification"
        )
    elif head not in (None, "single_label_classification"):
        problems.append(f"problem_type: {head!r} is no classification into one of several classes")
    count = config.get("num_labels")
    if count == 1:
        problems.append(f"num_labels: {_SINGLE}")
    elif count is not None and isinstance(labels, dict) and count != len(labels):
        problems.append(f"num_labels: {count!r}, but id2label has {len(labels)} classes; set both to what the head has")
    problems += _inverse_problems(config)
    vision = config.get("vision_config") if isinstance(config.get("vision_config"), dict) else {}
    for field, channels in (
        ("num_channels", config.get("num_channels")),
        ("vision_config.num_channels", (vision or {}).get("num_channels")),
    ):
        if channels not in (None, 3):
            problems.append(
                f"{field}: {channels!r}; images here have three channels: train the network on RGB (a grey image has"
                " three equal ones)"
            )
    if "auto_map" in config:
        problems.append("auto_map: names code of the folder's own, which is not run; name it as a factory instead")
    if config.get("quantization_config"):
        problems.append("quantization_config: quantised weights are not scored with; save them in float32 or float16")
    return problems


def _inverse_problems(config: dict[str, Any]) -> list[str]:
    """Where id2label and label2id give a name to different classes."""
    labels, inverse = config.get("id2label"), config.get("label2id")
    if not isinstance(labels, dict) or not isinstance(inverse, dict):
        return []
    # Of classes with one name, as ImageNet's two cranes, the inverse can have but one.
    by_name: dict[str, list[str]] = {}
    for index, name in labels.items():
        by_name.setdefault(str(name), []).append(str(index))
    for name, index in inverse.items():
        if name in by_name and str(index) not in by_name[name]:
            return [
                f"label2id: {name!r} is class {index!r}, and class {by_name[name][0]} in id2label; correct one of them"
            ]
    return []


def _timm_problems(config: dict[str, Any]) -> list[str]:
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
        problems.append(f"num_classes: {_SINGLE}")
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


def _check_weights(folder: Path, address: str, loader: str, *, is_timm: bool = False) -> None:
    """Check that there are weights that can be loaded.

    Raises:
        JobError: there are none, with the command that converts what there is.
    """
    line = conversion_line(f"transformers.{loader}", address, folder)
    if is_timm:
        target = f"{Path(address).name}-safetensors"
        line = (
            f'python -c "import timm; m = timm.create_model({f"local-dir:{folder}"!r}, pretrained=True);'
            f' timm.models.save_for_hf(m, {target!r}, safe_serialization=True)"'
        )
    if problem := weights_problem(folder, address, line):
        raise JobError(problem)


def _check_head(folder: Path, address: str, num_classes: int) -> None:
    """Check that some tensor has a row for every class: transformers would fill a missing head at random."""
    shapes = [tensor.shape for tensor in _tensors(folder, address, "a classifier").values()]
    if not any(shape and shape[0] == num_classes for shape in shapes):
        raise JobError(
            f"'{address}': config.json names {num_classes} classes, and no tensor of its weights has {num_classes}"
            " rows: it has no head, or one for others; save the whole classifier with its own config.json"
        )


# CLIP ----------------------------------------------------------------------------------------------------------------


def check_clip(folder: Path, address: str, *, is_whole: bool = True) -> None:
    """Check by its files that a folder holds a whole CLIP model.

    Args:
        is_whole: whether all of its files should be there; a hub id may be here in part.

    Raises:
        JobError: saying what it is instead, or what is missing.
    """
    need_file(folder, "config.json", address, "a transformers model folder")
    with readable(address):
        config = read_config(folder / "config.json")
        kinds = config.get("architectures") or ["CLIPModel"]
        if config.get("model_type") != "clip" or "CLIPModel" not in kinds:
            kind = config.get("model_type") if config.get("model_type") != "clip" else kinds[0]
            raise JobError(f"'{address}' is a model of type {kind!r}; a CLIP model is needed")
        vision = config.get("vision_config")
        if isinstance(vision, dict) and vision.get("num_channels", 3) != 3:
            raise JobError(
                f"'{address}': vision_config.num_channels: {vision['num_channels']!r}; images here have three"
            )
        if is_whole:
            check_processor(folder, address, config)
            _check_tokenizer(folder, address)
            _check_weights(folder, address, "CLIPModel")
        if has_weights(folder):
            names = _tensors(folder, address, "a CLIP model")
            for name in ("text_projection.weight", "visual_projection.weight"):
                if not any(one.endswith(name) for one in names):
                    raise JobError(f"'{address}' has no {name} in its weights; save the whole CLIP model")


def _check_tokenizer(folder: Path, address: str) -> None:
    if not (folder / "tokenizer.json").is_file():
        for name in ("vocab.json", "merges.txt"):
            need_file(folder, name, address, "the tokenizer of a CLIP model, or tokenizer.json,")
    path = folder / "tokenizer_config.json"
    kind = read_config(path).get("tokenizer_class") if path.is_file() else None
    if kind not in _TOKENIZERS:
        raise JobError(
            f"'{address}': tokenizer_class: {kind!r} splits prompts otherwise than CLIP's; give a CLIP model"
        )


def _tensors(folder: Path, address: str, kind: str) -> dict[str, StoredTensor]:
    try:
        return stored_tensors(folder)
    except JobError as error:
        raise JobError(f"'{address}' cannot be loaded as {kind} ({error})") from None


def _raise(problems: list[str]) -> None:
    if problems:
        raise JobError(problems)
