"""The image processors of transformers that are followed here, and the values they take where their file has none."""

from __future__ import annotations

from dataclasses import dataclass

BILINEAR, BICUBIC = 2, 3

_SUFFIXES = ("Pil", "Fast")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorDefaults:
    """What a class of transformers takes where the file is silent.

    Attributes:
        size, crop_size: as the file may have them.
        crops: whether it crops at the centre.
        square: whether one number for the size is both edges, or the shorter one.
    """

    size: int
    resample: int = BICUBIC
    crop_size: int | None = None
    crops: bool = False
    square: bool = False
    crop_pct: float | None = None
    normalizes: bool = True


DEFAULTS = {
    "BeitImageProcessor": ProcessorDefaults(size=224, crop_size=224, square=True),
    "BitImageProcessor": ProcessorDefaults(size=224, crop_size=224, crops=True),
    "CLIPImageProcessor": ProcessorDefaults(size=224, crop_size=224, crops=True),
    "ConvNextImageProcessor": ProcessorDefaults(size=384, crop_pct=0.875),
    "DeiTImageProcessor": ProcessorDefaults(size=256, crop_size=224, crops=True, square=True),
    "EfficientNetImageProcessor": ProcessorDefaults(size=346, crop_size=289, square=True),
    "LevitImageProcessor": ProcessorDefaults(size=224, crop_size=224, crops=True),
    "MobileNetV1ImageProcessor": ProcessorDefaults(size=256, crop_size=224, crops=True, resample=BILINEAR),
    "MobileNetV2ImageProcessor": ProcessorDefaults(size=256, crop_size=224, crops=True, resample=BILINEAR),
    "MobileViTImageProcessor": ProcessorDefaults(size=224, crop_size=256, crops=True, normalizes=False),
    "PoolFormerImageProcessor": ProcessorDefaults(size=224, crop_size=224, crops=True, crop_pct=0.9),
    "PvtImageProcessor": ProcessorDefaults(size=224, square=True),
    "SegformerImageProcessor": ProcessorDefaults(size=512, square=True, resample=BILINEAR),
    "SiglipImageProcessor": ProcessorDefaults(size=224),
    "ViTImageProcessor": ProcessorDefaults(size=224, square=True, resample=BILINEAR),
}

# What transformers takes where no file names a class, by the type of the model.
CLASS_OF_MODEL = {
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
FIXED_SIZE_MODELS = ("clip", "deit", "ijepa", "metaclip_2", "siglip", "vit", "vit_msn")


def plain_name(kind: str) -> str:
    """The class of a processor without the names of backends: `ViTImageProcessor` of its Fast and its Pil form."""
    for suffix in _SUFFIXES:
        kind = kind.removesuffix(suffix)
    return kind.removesuffix("FeatureExtractor") + "ImageProcessor" if kind.endswith("FeatureExtractor") else kind


# ConvNext's processors resize images to edges below this one with a margin, and crop it.
UNCROPPED = 384
