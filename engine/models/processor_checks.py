"""Which image processors are supported: applied exactly in scoring, and reproduced by a differentiable path.

Supported are those classes of transformers whose steps are a resize, a centre crop and a normalisation, with those
values of their options for which the tensor path gives the same: `tests/test_processor_checks.py` compares each with
transformers. Only configurations are read. Imports no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import JobError
from engine.methods.config_values import is_integer, is_number
from engine.models.configurations import read_config
from engine.models.processor_classes import (
    BICUBIC,
    BILINEAR,
    CLASS_OF_MODEL,
    DEFAULTS,
    FIXED_SIZE_MODELS,
    UNCROPPED,
    plain_name,
)

_FILTERS = {0: "nearest", 1: "lanczos", 4: "box", 5: "hamming"}
_FILES = ("processor_config.json", "preprocessor_config.json")
# Integers in JSON may be larger than any float.
_MAX_NUMBER = 1e300
# The end of a remedy.
AS_FACTORY = "or name the model as a factory (package.module:factory) that does it itself"


def check_processor(folder: Path, address: str, model: dict[str, Any] | None = None) -> str:
    """Check that the image processor of a folder is supported.

    Args:
        model: the model's own configuration, where there is one: it may name the class, and has the size of the input.

    Returns:
        The class of the processor, a key of `DEFAULTS`.

    Raises:
        JobError: all problems, one line each, with file, field and remedy.
    """
    name, settings = _read(folder, address)
    where = f"'{address}': {name}"
    kind = _kind(settings, model or {})
    if kind not in DEFAULTS:
        known = ", ".join(sorted(DEFAULTS))
        raise JobError(
            f"{where}: image_processor_type: {kind or 'missing'!r} is not supported here ({known} are); save one"
            f" of them with the model if it does the same, {AS_FACTORY}"
        )
    if problems := _option_problems(settings, kind) or _size_problems(settings, kind, model or {}):
        raise JobError([f"{where}: {problem}" for problem in problems])
    return kind


def _read(folder: Path, address: str) -> tuple[str, dict[str, Any]]:
    """Name and content of the file from which transformers reads the image processor."""
    for name in _FILES:
        if (folder / name).is_file():
            settings = read_config(folder / name)
            if name == _FILES[1]:
                return name, settings
            if isinstance(nested := settings.get("image_processor"), dict):
                return f"{name}: image_processor", nested
    raise JobError(
        f"'{address}' has no {_FILES[1]}, so the preprocessing of its images is not known; save the image processor"
        " that it was trained with into the folder (AutoImageProcessor.from_pretrained(...).save_pretrained(FOLDER))"
    )


def _kind(settings: dict[str, Any], model: dict[str, Any]) -> str:
    named = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    named = named or model.get("image_processor_type") or CLASS_OF_MODEL.get(str(model.get("model_type")), "")
    return plain_name(str(named))


def _option_problems(settings: dict[str, Any], kind: str) -> list[str]:
    """Options that change the steps to others than those that are supported.

    Options that a file lacks have the class's default. null is taken literally, as transformers does: false for a
    switch, and no value for anything else.
    """
    return [
        *_switch_problems(settings, kind),
        *_normalisation_problems(settings, kind),
        *_resize_problems(settings, kind),
        *_crop_problems(settings, kind),
    ]


def _switch_problems(settings: dict[str, Any], kind: str) -> Iterator[str]:
    if "auto_map" in settings:
        yield f"auto_map: {settings['auto_map']!r} names code in the folder, which is not run; remove it, {AS_FACTORY}"
    if settings.get("do_rescale", True) is not True:
        yield (
            f"do_rescale: {settings['do_rescale']!r} leaves pixels in 0 to 255, which is not supported; set it true,"
            f" {AS_FACTORY}"
        )
    factor = settings.get("rescale_factor", 1 / 255)
    if not (is_finite_number(factor) and math.isclose(factor, 1 / 255, rel_tol=1e-4)):
        yield (
            f"rescale_factor: {factor!r} is not 1/255; include the difference in image_mean and image_std, {AS_FACTORY}"
        )
    if pad := settings.get("do_pad"):
        yield f"do_pad: {pad!r} pads images, which is not supported; set it false, {AS_FACTORY}"
    if offset := settings.get("rescale_offset"):
        yield (
            f"rescale_offset: {offset!r} shifts pixels, which is not supported; set it false and shift image_mean,"
            f" {AS_FACTORY}"
        )
    if (normalize := settings.get("do_normalize")) and not DEFAULTS[kind].normalizes:
        yield f"do_normalize: {normalize!r} has no effect in this class; set it false, {AS_FACTORY}"


def _normalisation_problems(settings: dict[str, Any], kind: str) -> Iterator[str]:
    for field in _channel_fields(settings, kind):
        if field not in settings:
            continue
        if not is_three_numbers(settings[field]):
            yield f"{field}: {settings[field]!r} is not a list of three numbers, one for each of red, green and blue"
        elif field == "image_std" and min(settings[field]) <= 0:
            yield f"{field}: {settings[field]!r} is a divisor and must be positive"


def _channel_fields(settings: dict[str, Any], kind: str) -> list[str]:
    """The options of three numbers that a processor reads; EfficientNet's divides a second time by `image_std`."""
    if settings.get("do_normalize", DEFAULTS[kind].normalizes):
        return ["image_mean", "image_std"]
    return ["image_std"] if kind == "EfficientNetImageProcessor" and settings.get("include_top", True) else []


def _resize_problems(settings: dict[str, Any], kind: str) -> Iterator[str]:
    defaults, is_resized = DEFAULTS[kind], bool(settings.get("do_resize", True))
    resample = settings.get("resample", defaults.resample)
    if is_resized and resample not in (BILINEAR, BICUBIC):
        name = _FILTERS.get(resample, "unknown") if isinstance(resample, int) else "unknown"
        yield (
            f"resample: {resample!r} ({name}): only bilinear and bicubic resizing are differentiable here; set 2 or 3"
            f" and compare the accuracy, {AS_FACTORY}"
        )
    forms = [{"height", "width"}, {"shortest_edge"}]
    if kind == "ConvNextImageProcessor" and is_resized:
        forms = forms[1:]
    size = settings.get("size", defaults.size)
    edges = _edges(size, square=defaults.square)
    # transformers checks the form even where it does not resize.
    if set(edges) not in forms and (is_resized or size is not None):
        wanted = " or ".join("{" + ", ".join(sorted(form)) + "}" for form in forms)
        yield f"size: {size!r} is not {wanted} in pixels; other sizes are not supported: set it, {AS_FACTORY}"
    share: Any = settings.get("crop_pct", defaults.crop_pct)
    # ConvNext's is read only below this edge, and may be null above.
    is_read = kind == "ConvNextImageProcessor" and is_resized and edges.get("shortest_edge", UNCROPPED) < UNCROPPED
    if defaults.crop_pct and (is_read or share is not None) and not (is_finite_number(share) and 0 < share <= 1):
        yield f"crop_pct: {share!r} is not a fraction of the edge, above 0 and at most 1"


def _crop_problems(settings: dict[str, Any], kind: str) -> Iterator[str]:
    crop = settings.get("crop_size", DEFAULTS[kind].crop_size)
    if _crops(settings, kind) and _edges(crop, square=True).keys() != {"height", "width"}:
        yield f"crop_size: {settings.get('crop_size')!r} is not {{height, width}} in pixels, or one number for both"


def _crops(settings: dict[str, Any], kind: str) -> bool:
    """Whether a processor crops to `crop_size`; ConvNext's crops to a fraction of the edge instead."""
    return kind != "ConvNextImageProcessor" and bool(settings.get("do_center_crop", DEFAULTS[kind].crops))


def _size_problems(settings: dict[str, Any], kind: str, model: dict[str, Any]) -> list[str]:
    """An output of another size than that for which the network has position embeddings."""
    vision = model.get("vision_config") if isinstance(model.get("vision_config"), dict) else {}
    own = model.get("image_size") or (vision or {}).get("image_size")
    shape = _output_shape(settings, kind)
    if model.get("model_type") not in FIXED_SIZE_MODELS or own is None or shape is None:
        return []
    wanted = [own, own] if isinstance(own, int) else own
    if not isinstance(wanted, list) or len(wanted) != 2:
        return [f"makes images of {shape[0]} x {shape[1]} pixels, and config.json has image_size: {own!r}"]
    if list(shape) == wanted:
        return []
    field = "crop_size" if _crops(settings, kind) else "size"
    return [
        f"{field}: makes images of {shape[0]} x {shape[1]} pixels, and the network takes {wanted[0]} x {wanted[1]}"
        " (image_size in config.json); set the size that it was trained with"
    ]


def _output_shape(settings: dict[str, Any], kind: str) -> tuple[int, int] | None:
    """Height and width of the result for a square image; None where the image keeps its size."""
    defaults = DEFAULTS[kind]
    if _crops(settings, kind):
        crop = _edges(settings.get("crop_size", defaults.crop_size), square=True)
        return crop["height"], crop["width"]
    if not settings.get("do_resize", True):
        return None
    size = _edges(settings.get("size", defaults.size), square=defaults.square)
    edge = size.get("shortest_edge", 0)
    return (size["height"], size["width"]) if "height" in size else (edge, edge)


def _edges(size: Any, *, square: bool) -> dict[str, int]:
    """A size as transformers reads it, in pixels; empty where it does not consist of positive integers."""
    if is_integer(size):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    elif isinstance(size, list) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    if not isinstance(size, dict):
        return {}
    return size if all(type(value) is int and value > 0 for value in size.values()) else {}


def is_finite_number(value: Any) -> bool:
    """Whether a value of JSON is a number that a float can hold."""
    return is_number(value) and abs(value) < _MAX_NUMBER


def is_three_numbers(value: Any) -> bool:
    """Whether a value of JSON is a list of three numbers, one for each channel."""
    return isinstance(value, list) and len(value) == 3 and all(map(is_finite_number, value))
