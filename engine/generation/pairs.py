"""Samples beside a second image: the unguided twin, and the real image that a sample started from.

What is measured of two images is measured of both as they are stored. A second image that cannot be scored leaves its
sample as it is, without the scores of the two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch import Tensor

from engine.generation.plain_values import plain
from engine.generation.scorer import soft_label
from engine.generation.starts import StartImage
from engine.job.columns import BY_NAME, TWIN_COLUMNS, UNKNOWN
from engine.job.plan import Cell, SampleSpec
from engine.job.records import REAL, STATUS_OK, new_record
from engine.methods import scores
from engine.methods.registry import UNGUIDED


def twin_spec(spec: SampleSpec) -> SampleSpec:
    """The twin of a sample: under its key, by no method."""
    return dataclasses.replace(spec, method=UNGUIDED.name)


def distances(first: Tensor, second: Tensor) -> list[float]:
    """Distances of images by their CLIP embeddings [B, d]; `UNKNOWN` where one is not finite."""
    measured = scores.embedding_distance(first, second)
    return [plain(value) if value.isfinite() else UNKNOWN for value in measured]


def twin_fields(
    image: PIL.Image.Image, distance: float, twin_image: PIL.Image.Image, twin: dict[str, Any]
) -> dict[str, Any]:
    """What the record of a sample has of its twin.

    Args:
        image, twin_image: as stored.
        distance: of the two, by their CLIP embeddings.
        twin: the record of the twin, scored.
    """
    return {
        "twin_key": twin["key"],
        "twin_psnr_db": psnr_db(image, twin_image),
        "twin_distance": distance,
        "twin_predicted_class": twin["predicted_class"],
        "twin_risk": twin["risk"],
    }


def no_twin() -> dict[str, Any]:
    """What a record has of its twin where there is none."""
    return {name: BY_NAME[name].empty for name in TWIN_COLUMNS}


def psnr_db(first: PIL.Image.Image, second: PIL.Image.Image) -> float:
    """Peak signal-to-noise ratio of two 8-bit images of one size, in dB; see `engine.methods.scores.psnr_db`."""
    one, other = (torch.from_numpy(np.array(image.convert("RGB"))) for image in (first, second))
    return plain(scores.psnr_db(one[None], other[None])[0].float())


def start_record(spec: SampleSpec, start: StartImage, labels: Sequence[str]) -> dict[str, Any]:
    """The record of the real image that a sample started from, which no model scores.

    Args:
        labels: class names of the target.
    """
    label = start.class_index
    cell = Cell(classes=(label,), names=(labels[label],))
    bare = dataclasses.replace(spec, method=REAL, cell=cell, prompt="", context="", seed=0)
    return new_record(bare) | {
        "status": STATUS_OK,
        "accepted": True,
        "scored": False,
        "soft_label": soft_label(cell, len(labels)),
        "start_key": start.key,
        "start_sha256": start.sha256,
    }
