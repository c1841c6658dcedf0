"""Labelled images from where users have them: a folder by class, WebDataset tars, a run, parquet, or a named set.

Every file under a path is used, or is reported with its name and the reason. Labels of a set are read in one way.
Nothing is written: members of an archive are read in memory, whatever their names are.
"""

from engine.data.images.decode import UnusableImageError, decode_rgb, decode_sample, decode_stored, open_image
from engine.data.images.image_source import (
    PART_ROWS,
    SOUGHT,
    ImageSource,
    Item,
    LabelledImage,
    Place,
    ReadResult,
    Unusable,
    image_key,
    nothing_usable,
    some_of,
)
from engine.data.images.opening import NAMED, open_images
from engine.data.images.parquet_files import parquet
from engine.data.images.webdataset_tars import webdataset

__all__ = [
    "NAMED", "PART_ROWS", "SOUGHT", "ReadResult", "ImageSource", "Item", "LabelledImage", "Place", "Unusable",
    "UnusableImageError", "decode_rgb", "decode_sample", "decode_stored", "image_key", "nothing_usable", "open_image",
    "open_images", "parquet", "some_of", "webdataset",
]  # fmt: skip
