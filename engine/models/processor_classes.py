"""The image processors of transformers that are supported, and the values they take where their file has none."""

from __future__ import annotations

from dataclasses import dataclass

# PIL's numbers of the filters.
BILINEAR, BICUBIC = 2, 3
# The shortest edge from which on ConvNext's processor does not crop; below it resizes to a larger edge and crops.
UNCROPPED = 384
_SUFFIXES = ("Pil", "Fast")


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessorDefaults:
    """The values that a class of transformers takes where the file has none.

    Attributes:
        size, crop_size: in pixels.
        resample: PIL's number of the filter.
        crops: whether it crops at the centre.
        square: whether a single number for the size stands for both edges; else for the shorter one.
        crop_pct: fraction of the resized edge that the crop leaves; None where the class has no such option.
        normalizes: whether it subtracts a mean and divides by a standard deviation.
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

# The class that transformers takes where no file names one, by the type of the model.
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

# Types of models whose position embeddings fit images of a single size.
FIXED_SIZE_MODELS = ("clip", "deit", "ijepa", "metaclip_2", "siglip", "vit", "vit_msn")


def plain_name(kind: str) -> str:
    """The class of a processor without suffixes of backends: `ViTImageProcessor` for `ViTImageProcessorFast`."""
    for suffix in _SUFFIXES:
        kind = kind.removesuffix(suffix)
    return kind.removesuffix("FeatureExtractor") + "ImageProcessor" if kind.endswith("FeatureExtractor") else kind
