"""Which image processors are followed: scored with exactly, and differentiated through. By their configurations alone.

Known are those classes of transformers whose steps are a resize, a crop at the centre and a normalisation, with those
values of their options with which a tensor path gives the same: `tests/test_processors.py` compares each with
transformers. Imports no torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.errors import JobError
from engine.methods.config_values import is_number, is_whole
from engine.models.folders import read_config

_BILINEAR, _BICUBIC = 2, 3
_FILTERS = {0: "nearest", 1: "lanczos", 4: "box", 5: "hamming"}
_FILES = ("processor_config.json", "preprocessor_config.json")
# Whole numbers of JSON may be larger than any float.
_MAX_NUMBER = 1e300
_SUFFIXES = ("Pil", "Fast")
# ConvNext's processors resize images to edges below this one with a margin, and crop it.
UNCROPPED = 384
_OWN = "or name the model as a factory (package.module:factory) that does it itself"


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What a class of transformers takes where the file is silent.

    Attributes:
        size, crop_size: as the file may have them.
        crops: whether it crops at the centre.
        square: whether one number for the size is both edges, or the shorter one.
    """

    size: int
    resample: int = _BICUBIC
    crop_size: int | None = None
    crops: bool = False
    square: bool = False
    crop_pct: float | None = None
    normalizes: bool = True


KNOWN = {
    "BeitImageProcessor": Known(size=224, crop_size=224, square=True),
    "BitImageProcessor": Known(size=224, crop_size=224, crops=True),
    "CLIPImageProcessor": Known(size=224, crop_size=224, crops=True),
    "ConvNextImageProcessor": Known(size=384, crop_pct=0.875),
    "DeiTImageProcessor": Known(size=256, crop_size=224, crops=True, square=True),
    "EfficientNetImageProcessor": Known(size=346, crop_size=289, square=True),
    "LevitImageProcessor": Known(size=224, crop_size=224, crops=True),
    "MobileNetV1ImageProcessor": Known(size=256, crop_size=224, crops=True, resample=_BILINEAR),
    "MobileNetV2ImageProcessor": Known(size=256, crop_size=224, crops=True, resample=_BILINEAR),
    "MobileViTImageProcessor": Known(size=224, crop_size=256, crops=True, normalizes=False),
    "PoolFormerImageProcessor": Known(size=224, crop_size=224, crops=True, crop_pct=0.9),
    "PvtImageProcessor": Known(size=224, square=True),
    "SegformerImageProcessor": Known(size=512, square=True, resample=_BILINEAR),
    "SiglipImageProcessor": Known(size=224),
    "ViTImageProcessor": Known(size=224, square=True, resample=_BILINEAR),
}
# What transformers takes where no file names a class, by the type of the model.
BY_MODEL = {
    **dict.fromkeys(("beit", "data2vec-vision"), "BeitImageProcessor"),
    **dict.fromkeys(("bit", "dinov2", "focalnet", "hiera"), "BitImageProcessor"),
    **dict.fromkeys(("clip", "metaclip_2"), "CLIPImageProcessor"),
    **dict.fromkeys(("convnext", "convnextv2", "cvt", "regnet", "resnet"), "ConvNextImageProcessor"),
    **dict.fromkeys(("dinat", "ijepa", "swiftformer", "swin", "swinv2", "vit", "vit_msn"), "ViTImageProcessor"),
    **dict.fromkeys(("mobilevit", "mobilevitv2"), "MobileViTImageProcessor"),
    **dict.fromkeys(("pvt", "pvt_v2"), "PvtImageProcessor"),
    "deit": "DeiTImageProcessor",
    "efficientnet": "EfficientNetImageProcessor",
    "levit": "LevitImageProcessor",
    "mobilenet_v1": "MobileNetV1ImageProcessor",
    "mobilenet_v2": "MobileNetV2ImageProcessor",
    "poolformer": "PoolFormerImageProcessor",
    "segformer": "SegformerImageProcessor",
    "siglip": "SiglipImageProcessor",
}
# Networks whose position embeddings fit images of one size alone.
FIXED_SIZES = ("clip", "deit", "ijepa", "metaclip_2", "siglip", "vit", "vit_msn")


def plain_name(kind: str) -> str:
    """The class of a processor without the names of backends: `ViTImageProcessor` of its Fast and its Pil form."""
    for suffix in _SUFFIXES:
        kind = kind.removesuffix(suffix)
    return kind.removesuffix("FeatureExtractor") + "ImageProcessor" if kind.endswith("FeatureExtractor") else kind


def check_processor(folder: Path, address: str, model: dict[str, Any] | None = None) -> str:
    """Check that the image processor of a folder is known to be followed.

    Args:
        model: the model's own configuration, where there is one: it may name the class, and has the size of its input.

    Returns:
        Its class, one of `KNOWN`.

    Raises:
        JobError: all problems, a line each, with file, field and remedy.
    """
    name, settings = _read(folder, address)
    where = f"'{address}': {name}"
    kind = _kind(settings, model or {})
    if kind not in KNOWN:
        known = ", ".join(sorted(KNOWN))
        raise JobError(
            f"{where}: image_processor_type: {kind or 'missing'!r} is not one that is followed here ({known}); save one"
            f" of them with the model if it does the same, {_OWN}"
        )
    problems = [f"{where}: {problem}" for problem in _problems(settings, kind)]
    if not problems:
        problems = [f"{where}: {problem}" for problem in _size_problems(settings, kind, model or {})]
    if problems:
        raise JobError(problems)
    return kind


def _read(folder: Path, address: str) -> tuple[str, dict[str, Any]]:
    """Name and content of the file that transformers takes the image processor from."""
    for name in _FILES:
        if (folder / name).is_file():
            settings = read_config(folder / name)
            if name == _FILES[1]:
                return name, settings
            if isinstance(nested := settings.get("image_processor"), dict):
                return f"{name}: image_processor", nested
    raise JobError(
        f"'{address}' has no {_FILES[1]}, so how images become its input is not known; save the image processor that it"
        " was trained with into the folder (AutoImageProcessor.from_pretrained(...).save_pretrained(FOLDER))"
    )


def _kind(settings: dict[str, Any], model: dict[str, Any]) -> str:
    named = settings.get("image_processor_type") or settings.get("feature_extractor_type")
    named = named or model.get("image_processor_type") or BY_MODEL.get(str(model.get("model_type")), "")
    return plain_name(str(named))


def _problems(settings: dict[str, Any], kind: str) -> list[str]:
    """Options with which the steps are others than those that are followed.

    What a file is silent on the class decides; null it takes as it stands: no for a switch, and nothing for a value.
    """
    known, problems = KNOWN[kind], list[str]()

    def wrong(field: str, reason: str) -> None:
        problems.append(f"{field}: {settings.get(field)!r} {reason}")

    if "auto_map" in settings:
        wrong("auto_map", f"names code of the folder's own, which is not run; leave it out, {_OWN}")
    if settings.get("do_rescale", True) is not True:
        wrong("do_rescale", f"leaves pixels in 0 to 255, which 8-bit scaling here does not follow; set it true, {_OWN}")
    factor = settings.get("rescale_factor", 1 / 255)
    if not (_is_small(factor) and math.isclose(factor, 1 / 255, rel_tol=1e-4)):
        wrong("rescale_factor", f"is not 1/255; fold the difference into image_mean and image_std, {_OWN}")
    if settings.get("do_pad"):
        wrong("do_pad", f"pads images, which is not followed; set it false, {_OWN}")
    if settings.get("rescale_offset"):
        wrong("rescale_offset", f"shifts pixels, which is not followed; set it false and shift image_mean, {_OWN}")
    if settings.get("do_normalize") and not known.normalizes:
        wrong("do_normalize", f"is not what this class does; set it false, {_OWN}")
    for field in _colours(settings, kind):
        if field in settings and not _is_colour(settings[field]):
            wrong(field, "is not a list of three numbers, one for each of red, green and blue")
        elif field == "image_std" and field in settings and min(settings[field]) <= 0:
            wrong(field, "divides by what is not positive")
    problems += _resize_problems(settings, kind, is_resized=bool(settings.get("do_resize", True)))
    if _crops(settings, kind):
        crop = settings.get("crop_size", known.crop_size)
        if _edges(crop, square=True).keys() != {"height", "width"}:
            wrong("crop_size", "is not {height, width} in pixels, or one number for both")
    return problems


def _colours(settings: dict[str, Any], kind: str) -> list[str]:
    """The options of three numbers that a processor reads; EfficientNet's divides once more by the second."""
    if settings.get("do_normalize", KNOWN[kind].normalizes):
        return ["image_mean", "image_std"]
    return ["image_std"] if kind == "EfficientNetImageProcessor" and settings.get("include_top", True) else []


def _resize_problems(settings: dict[str, Any], kind: str, *, is_resized: bool) -> list[str]:
    known, problems = KNOWN[kind], list[str]()
    resample = settings.get("resample", known.resample)
    if is_resized and resample not in (_BILINEAR, _BICUBIC):
        name = _FILTERS.get(resample, "unknown") if isinstance(resample, int) else "unknown"
        problems.append(
            f"resample: {resample!r} ({name}): only bilinear and bicubic resizing can be differentiated here; set 2 or"
            f" 3, and see that the accuracy is what it was, {_OWN}"
        )
    size, keys = settings.get("size", known.size), [{"height", "width"}, {"shortest_edge"}]
    if kind == "ConvNextImageProcessor" and is_resized:
        keys = keys[1:]
    # Its form is read in any case.
    edges = _edges(size, square=known.square)
    if set(edges) not in keys and (is_resized or size is not None):
        wanted = " or ".join("{" + ", ".join(sorted(one)) + "}" for one in keys)
        problems.append(f"size: {size!r} is not {wanted} in pixels; other sizes are not followed here: set it, {_OWN}")
    share: Any = settings.get("crop_pct", known.crop_pct)
    # ConvNext's is read below this edge alone, and may be null above.
    is_read = kind == "ConvNextImageProcessor" and is_resized and edges.get("shortest_edge", UNCROPPED) < UNCROPPED
    if known.crop_pct and (is_read or share is not None) and not (_is_small(share) and 0 < share <= 1):
        problems.append(f"crop_pct: {share!r} is not a share of the edge between 0 and 1")
    return problems


def _crops(settings: dict[str, Any], kind: str) -> bool:
    """Whether a processor crops to `crop_size`; ConvNext's has a share of the edge instead."""
    return kind != "ConvNextImageProcessor" and bool(settings.get("do_center_crop", KNOWN[kind].crops))


def _size_problems(settings: dict[str, Any], kind: str, model: dict[str, Any]) -> list[str]:
    """An input of another size than the network has position embeddings for."""
    vision = model.get("vision_config") if isinstance(model.get("vision_config"), dict) else {}
    own = model.get("image_size") or (vision or {}).get("image_size")
    shape = _output_shape(settings, kind)
    if model.get("model_type") not in FIXED_SIZES or own is None or shape is None:
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
    """Height and width of what a square image becomes; None where that is the image's own size."""
    known = KNOWN[kind]
    if _crops(settings, kind):
        crop = _edges(settings.get("crop_size", known.crop_size), square=True)
        return crop["height"], crop["width"]
    if not settings.get("do_resize", True):
        return None
    size = _edges(settings.get("size", known.size), square=known.square)
    edge = size.get("shortest_edge", 0)
    return (size["height"], size["width"]) if "height" in size else (edge, edge)


def _edges(size: Any, *, square: bool) -> dict[str, int]:
    """A size as transformers reads it; empty where it is none of positive whole numbers."""
    if is_whole(size):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    elif isinstance(size, list) and len(size) == 2:
        size = {"height": size[0], "width": size[1]}
    if not isinstance(size, dict):
        return {}
    return size if all(type(value) is int and value > 0 for value in size.values()) else {}


def _is_small(value: Any) -> bool:
    return is_number(value) and abs(value) < _MAX_NUMBER


def _is_colour(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 3 and all(_is_small(one) for one in value)


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
            f" network on RGB, {_OWN}"
        )
    if not (mode == "squash" or (mode == "center" and height == width)) or interpolation not in ("bilinear", "bicubic"):
        raise JobError(
            f"'{address}': timm's crop_mode '{mode}' at {height} x {width} pixels with interpolation '{interpolation}'"
            " has no differentiable equivalent here; bilinear and bicubic have, with squash, or with center where the"
            " input is square"
        )
    share = config.get("crop_pct")
    if share is not None and not (_is_small(share) and share > 0):
        raise JobError(f"'{address}': crop_pct: {share!r} is not a share of the edge above 0")
    for field in ("mean", "std"):
        value = config.get(field) or [1, 1, 1]
        value = list(value) if isinstance(value, tuple) else value
        if not _is_colour(value) or (field == "std" and min(value) <= 0):
            raise JobError(f"'{address}': {field}: {value!r} is not three numbers, one for each of red, green and blue")
