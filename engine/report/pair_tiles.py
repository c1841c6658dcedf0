"""The tiles of pairs: the images of a sample, its start and its unguided twin, and their figures.

Images are shown without loss, because the page draws their difference: large ones are reduced, and their difference is
that of the reduced ones.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from engine.data.images.decode import UnusableImageError, decode_sample
from engine.data.run.outcomes import asked_classes
from engine.job.columns import BY_NAME, GUIDES
from engine.job.records import STARTS, TWINS
from engine.methods.registry import find_method
from engine.report.data import name_of
from engine.report.gallery import TINY_PIXELS, conditioned_name, data_uri
from engine.report.oracle_answers import Answer, answers, validity_text
from engine.report.text import clip, number

# Of the budget of the gallery's images.
PAIRS_BUDGET_BYTES = 2_200_000
# Longest side, tried in turn until the images of a pair fit their share.
SIDES = (256, 224, 192, 160, 128, 96, 64)
# The page amplifies differences by powers of two up to this one, and at first so that they are about so many levels.
MAX_GAIN_POWER = 6
_SHOWN_LEVELS = 64
# What the page sorts by, in this order.
SORTS = ("twin_distance", "start_distance", "twin_psnr_db", "risk")
TITLES = {STARTS: "Start", TWINS: "Unguided"}


@dataclass(frozen=True, slots=True)
class Reading:
    """What an image is read as.

    Attributes:
        mark: ✓ where that is what was asked for, ✗ where not, empty where nobody asked.
    """

    text: str
    mark: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """An image of a pair.

    Attributes:
        kind: `starts`, `twins` or `sample`.
        title: what it is.
        image: data URI.
        readings: what a person, or each model, calls it.
    """

    kind: str
    title: str
    image: str
    readings: list[Reading]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTile:
    """A sample with what it is compared with.

    Attributes:
        conditioned: what it was conditioned on.
        scores: that the page sorts by.
        facts: names and texts of its figures.
    """

    key: str
    request: str
    conditioned: str
    is_tiny: bool
    panels: list[Panel]
    scores: dict[str, float]
    facts: list[tuple[str, str]]


def make_pairs(
    records: Sequence[dict[str, Any]],
    images: Mapping[str, bytes],
    others: Mapping[str, Mapping[str, bytes]],
    names: dict[int, str],
    budget_bytes: int = PAIRS_BUDGET_BYTES,
) -> list[PairTile]:
    """The tiles of samples; one whose images cannot be read is left out.

    Args:
        images: of the samples by key.
        others: of their starts and twins, by `STARTS` and `TWINS`.
        budget_bytes: of all images.
    """
    share = budget_bytes // max(len(records), 1)
    tiles = (_tile(record, images, others, names, share) for record in records)
    return [tile for tile in tiles if tile is not None]


def _tile(
    record: dict[str, Any],
    images: Mapping[str, bytes],
    others: Mapping[str, Mapping[str, bytes]],
    names: dict[int, str],
    budget_bytes: int,
) -> PairTile | None:
    key = record["key"]
    files = {kind: some[key] for kind, some in others.items() if key in some}
    if not files or key not in images:
        return None
    files["sample"] = images[key]
    try:
        uris, is_tiny = lossless(list(files.values()), budget_bytes)
    except UnusableImageError:
        return None
    panels = [
        Panel(kind=kind, title=_title(kind, record), image=uri, readings=_readings(kind, record, names))
        for kind, uri in zip(files, uris, strict=True)
    ]
    return PairTile(
        key=key,
        request=record["request"],
        conditioned=clip(conditioned_name(record, names), 60),
        is_tiny=is_tiny,
        panels=panels,
        scores={name: float(record[name]) for name in SORTS if _has(name, record)},
        facts=list(_facts(record)),
    )


def _title(kind: str, record: dict[str, Any]) -> str:
    method = find_method(record["method"])
    return TITLES.get(kind) or ("Guided" if method is not None and method.is_guided else "Sample")


def _readings(kind: str, record: dict[str, Any], names: dict[int, str]) -> list[Reading]:
    """What a person, the target and every oracle call an image."""
    asked = asked_classes(record)
    if kind == STARTS:
        return [Reading(clip(f"labelled {name_of(asked[0], names)}", 80) if len(asked) == 1 else "real image")]
    read = [("", record["predicted_class" if kind == "sample" else "twin_predicted_class"])]
    if kind == "sample":
        read += [(f"{_who(answer)}: ", answer.class_index) for answer in answers(record)]
    readings = [
        Reading(clip(f"{who}{name_of(index, names)}", 80), "✓" if index in asked else "✗") for who, index in read
    ]
    text, is_valid = validity_text(record) if kind == "sample" else ("", False)
    return [*readings, *([Reading(f"label {text}", "✓" if is_valid else "✗")] if text else [])]


def _who(answer: Answer) -> str:
    """An oracle by its short name, and whether it guided."""
    name = answer.oracle if answer.oracle.startswith("oracle") else f"oracle {answer.oracle}".rstrip()
    return f"{clip(name, 40)}{GUIDES if answer.guides else ''}"


def _facts(record: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The figures of a pair."""
    if _has("twin_psnr_db", record):
        yield "PSNR to the twin", f"{record['twin_psnr_db']:.1f} dB"
    for name, title in (("twin_distance", "Distance to the twin"), ("start_distance", "to the start")):
        if _has(name, record):
            yield title if _has("twin_distance", record) else "Distance to the start", number(record[name])
    if _has("twin_risk", record):
        yield "Risk, twin → sample", f"{number(record['twin_risk'])} → {number(record['risk'])}"
    else:
        yield "Risk", number(record["risk"])


def _has(name: str, record: dict[str, Any]) -> bool:
    """Whether a record has a score that some lack."""
    return BY_NAME[name].is_known(record.get(name, BY_NAME[name].empty))


def lossless(files: Sequence[bytes], budget_bytes: int) -> tuple[list[str], bool]:
    """Data URIs of images of one pair without loss, and whether they are tiny, so that their pixels are to be visible.

    Tiny images are embedded at their size, larger ones reduced together until they fit the budget, if any size does.

    Raises:
        UnusableImageError: one is no image, or larger than a sample can be.
    """
    images = [decode_sample(file) for file in files]
    largest = max(max(image.size) for image in images)
    is_tiny = largest <= TINY_PIXELS
    for side in (largest,) if is_tiny else [side for side in SIDES if side < largest] or (largest,):
        encoded = [_encoded(image, side) for image in images]
        if sum(map(len, encoded)) <= budget_bytes:
            break
    return [data_uri(data, "webp") for data in encoded], is_tiny


def _encoded(image: Image.Image, side: int) -> bytes:
    small = image.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", lossless=True)
    return buffer.getvalue()


def first_gain(tiles: Sequence[PairTile]) -> int:
    """The power of two by which the difference of a median pair becomes visible."""
    psnr = [tile.scores["twin_psnr_db"] for tile in tiles if "twin_psnr_db" in tile.scores]
    if not psnr:
        return 0
    levels = 255 * 10 ** (-float(np.median(psnr)) / 20)
    return min(max(round(math.log2(_SHOWN_LEVELS / levels)), 0), MAX_GAIN_POWER)
