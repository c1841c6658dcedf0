"""Which folders of classifiers are scored with correctly, by their files alone. Imports no torch.

Checked are class names, the kind of the head, the shape of the input, the image processor and the weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import JobError
from engine.job.plan import MAX_TEMPERATURE, MIN_TEMPERATURE
from engine.methods.config_values import is_integer, is_number
from engine.models.class_name_checks import FOLDER_REMEDY, SINGLE_LOGIT, check_names, in_index_order
from engine.models.class_name_files import check_count, names_file, read_names
from engine.models.configurations import TIMM_KEY, need_file, read_config, reading_configuration
from engine.models.processor_checks import check_processor
from engine.models.stored_tensors import tensors_of
from engine.models.timm_checks import check_timm_installed, check_timm_transform, timm_count, timm_names, timm_problems
from engine.models.weight_files import check_weights, conversion_line, has_weights


def class_names(folder: Path, address: str) -> list[str]:
    """Class names of a classifier's folder in index order: of its file for them, else of config.json.

    Raises:
        JobError: there is none that can be used in a prompt, too few or too many, or config.json contradicts itself.
    """
    config = read_config(folder / "config.json")
    if (file := names_file(folder)) is not None:
        names = read_names(file)
        with reading_configuration(address):
            check_count(names, file, num_logits(config), address)
        return names
    if TIMM_KEY in config:
        with reading_configuration(address):
            return check_names(timm_names(config, address), f"'{address}': label_names in config.json", FOLDER_REMEDY)
    where, labels = f"'{address}': id2label in config.json", config.get("id2label")
    if isinstance(labels, dict) and len(labels) == 1:
        raise JobError(f"{where} has one class: {SINGLE_LOGIT}")
    if labels is None and config.get("num_labels") == 1:
        raise JobError(f"'{address}': num_labels: {SINGLE_LOGIT}")
    if not isinstance(labels, dict) or len(labels) < 2:
        raise JobError(f"'{address}': config.json has no `id2label` with two classes or more; is it a classifier?")
    return check_names(in_index_order(labels, where), where, FOLDER_REMEDY)


def num_logits(config: dict[str, Any]) -> int | None:
    """The logits of the network of a configuration, of transformers or timm; None where it does not tell."""
    if TIMM_KEY in config:
        return timm_count(config)
    labels, count = config.get("id2label"), config.get("num_labels")
    # Without either, transformers makes a head of two.
    known = len(labels) if isinstance(labels, dict) and labels else count if count is not None else 2
    return known if is_integer(known) else None


def is_binary(folder: Path) -> bool:
    """Whether the network of a classifier's folder has one logit z, which is read as [0, z].

    Raises:
        JobError: config.json cannot be read.
    """
    with reading_configuration(str(folder)):
        return num_logits(read_config(folder / "config.json")) == 1


def check_classifier(folder: Path, address: str, *, is_complete: bool = True) -> None:
    """Check by its files that a folder is that of a classifier which is scored with correctly.

    Args:
        is_complete: whether all of its files must exist; a hub id may be cached in part.

    Raises:
        JobError: the problems, one line each, with field and remedy.
    """
    need_file(folder, "config.json", address, "a transformers or timm model folder")
    with reading_configuration(address):
        config = read_config(folder / "config.json")
        is_timm, names = TIMM_KEY in config, class_names(folder, address)
        num_rows = 1 if num_logits(config) == 1 else len(names)
        kinds = config.get("architectures") or []
        if kinds and not is_timm and not any("ForImageClassification" in str(kind) for kind in kinds):
            raise JobError(f"'{address}' is a {kinds[0]}; a network for image classification is needed")
        if problems := timm_problems(config) if is_timm else _head_problems(config):
            raise JobError([f"'{address}': {problem}" for problem in problems])
        read_temperature(config, address)
        if is_timm:
            check_timm_installed(address)
            check_timm_transform(config[TIMM_KEY], address)
        elif is_complete:
            check_processor(folder, address, config)
        _check_files(folder, address, num_rows, is_timm=is_timm, is_complete=is_complete)


def _check_files(folder: Path, address: str, num_classes: int, *, is_timm: bool, is_complete: bool) -> None:
    """Check that the folder holds the weights of a whole network, not of an adapter."""
    if (folder / "adapter_config.json").is_file():
        raise JobError(
            f"'{address}' is an adapter (adapter_config.json) of another model; merge it (merge_and_unload) and save"
            " the whole network"
        )
    if is_complete:
        check_weights(folder, address, _conversion(folder, address, is_timm=is_timm))
    if has_weights(folder):
        _check_head(folder, address, num_classes)


def read_temperature(config: dict[str, Any], address: str) -> float:
    """The calibration temperature of a configuration, 1 where it has none.

    Raises:
        JobError: it is not a number by which logits can be divided.
    """
    value = config.get("temperature", 1.0)
    if not is_number(value) or not MIN_TEMPERATURE <= value < MAX_TEMPERATURE:
        raise JobError(
            f"'{address}': temperature {value!r} in config.json is not a number from {MIN_TEMPERATURE:g} to"
            f" {MAX_TEMPERATURE:g}; `riskforge prepare` fits it"
        )
    return float(value)


def _head_problems(config: dict[str, Any]) -> list[str]:
    """Why transformers' configuration is not that of a classifier of one class among several on RGB images."""
    problems = [*_task_problems(config), *_inverse_problems(config), *_channel_problems(config)]
    if "auto_map" in config:
        problems.append("auto_map: names code in the folder, which is not run; name it as a factory instead")
    if config.get("quantization_config"):
        problems.append("quantization_config: quantised weights are not supported; save them in float32 or float16")
    return problems


def _task_problems(config: dict[str, Any]) -> Iterator[str]:
    labels, head, count = config.get("id2label"), config.get("problem_type"), config.get("num_labels")
    # A sigmoid of one logit is a softmax of two; of several it is not of their softmax.
    if head == "multi_label_classification" and num_logits(config) == 1:
        return
    if head == "multi_label_classification":
        yield (
            "problem_type: its head is of independent classes ('multi_label_classification', sigmoid), and risk and"
            " KLDB are of a softmax over classes of which one is right; train a head for single_label_classification"
        )
    elif head not in (None, "single_label_classification"):
        yield f"problem_type: {head!r} is not a classification into one of several classes"
    if count is not None and isinstance(labels, dict) and count != len(labels):
        yield f"num_labels: {count!r}, but id2label has {len(labels)} classes; set both to the number of logits"


def _channel_problems(config: dict[str, Any]) -> Iterator[str]:
    vision = config.get("vision_config")
    of_vision = vision.get("num_channels") if isinstance(vision, dict) else None
    for field, channels in (("num_channels", config.get("num_channels")), ("vision_config.num_channels", of_vision)):
        if channels not in (None, 3):
            yield (
                f"{field}: {channels!r}; images here have three channels: train the network on RGB (a grey image has"
                " three equal channels)"
            )


def _inverse_problems(config: dict[str, Any]) -> list[str]:
    """The first name that id2label and label2id give to different classes, as a list of at most one problem."""
    labels, inverse = config.get("id2label"), config.get("label2id")
    if not isinstance(labels, dict) or not isinstance(inverse, dict):
        return []
    # The inverse has only one index for a name that several classes share, as ImageNet's two cranes do.
    by_name: dict[str, list[str]] = {}
    for index, name in labels.items():
        by_name.setdefault(str(name), []).append(str(index))
    for name, index in inverse.items():
        if name in by_name and str(index) not in by_name[name]:
            return [
                f"label2id: {name!r} is class {index!r}, and class {by_name[name][0]} in id2label; correct one of them"
            ]
    return []


def _conversion(folder: Path, address: str, *, is_timm: bool) -> str:
    """The command that converts a classifier's weights to safetensors."""
    if not is_timm:
        return conversion_line("transformers.AutoModelForImageClassification", address, folder)
    target = f"{Path(address).name}-safetensors"
    return (
        f'python -c "import timm; m = timm.create_model({f"local-dir:{folder}"!r}, pretrained=True);'
        f' timm.models.save_for_hf(m, {target!r}, safe_serialization=True)"'
    )


def _check_head(folder: Path, address: str, num_classes: int) -> None:
    """Check that some tensor has a row for every class: transformers would fill a missing head with random numbers."""
    shapes = [tensor.shape for tensor in tensors_of(folder, address, "a classifier").values()]
    if not any(shape and shape[0] == num_classes for shape in shapes):
        raise JobError(
            f"'{address}': config.json names {num_classes} classes, and no tensor of its weights has {num_classes}"
            " rows: it has no head, or that of another task; save the whole classifier with its own config.json"
        )
