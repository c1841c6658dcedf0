"""The gallery: which samples are shown, their thumbnails, and the texts of each.

The number of samples and the bytes of their images are bounded whatever the run's size, and the choice depends on
the metadata alone, so that equal runs give equal reports.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image

from engine.data.images.decode import MAX_SAMPLE_PIXELS, UnusableImageError, decode_sample, open_image
from engine.data.run.counts import is_joint
from engine.data.run.outcomes import asked_classes, target_errs
from engine.job.columns import BY_NAME, NO_CLASS, Column, Role, by_rank, columns_with, entry_scores_with
from engine.job.records import STATUS_OK, is_scored
from engine.report.data import Rows, name_of, subset_name
from engine.report.oracle_answers import common_answer, independent, summary, validity, validity_text
from engine.report.text import clip, joined, number

MAX_SAMPLES = 320
IMAGE_BUDGET_BYTES = 5_500_000
TINY_PIXELS = 96  # up to here an image is shown as it is, with its pixels visible
# Longest side and JPEG quality, tried in turn until a thumbnail fits its share of the budget.
THUMBNAIL_STEPS = ((256, 85), (192, 80), (160, 70), (128, 60), (96, 40), (64, 30))
MAX_TEXT = 1500
MAX_LIST = 20
NUM_TILE_SCORES = 3

OUTCOMES = {
    "error": "Target errs",
    "valid": "Target errs, oracle agrees",
    "agreed": "Target errs, all oracles agree",
    "strict": "Target errs, label strictly valid",
    "right": "Target predicts what was asked for",
    "doubted": "An oracle disagrees with the label",
}
NO_CONTEXT = "no context"


def select(rows: Rows, limit: int = MAX_SAMPLES) -> list[int]:
    """Rows to show, request by request, each spread over the quantiles of its main score plus its extremes.

    One sample in eight may be one without an image (failed or rejected).
    """
    requests = rows.request.names[:limit]
    chosen: list[int] = []
    for code, _ in enumerate(requests):
        quota = limit // len(requests)
        here = np.flatnonzero(rows.request.codes == code)
        with_image = rows.status.is_one_of(here, STATUS_OK)
        others = here[~with_image][: max(1, quota // 8)]
        scores = rows.numbers[rows.main_score(code).name]
        spread = _spread(here[with_image], scores[here[with_image]], max(quota - len(others), 0))
        chosen += [*spread, *others.tolist()][:quota]
    return chosen


def _spread(numbers: np.ndarray, scores: np.ndarray, quota: int) -> list[int]:
    """Up to `quota` of the row numbers, from the highest score to the lowest."""
    order = numbers[np.lexsort((numbers, -scores))]
    if len(order) <= quota:
        return [int(number) for number in order]
    num_extreme = quota // 8
    even = np.linspace(0, len(order) - 1, max(quota - 2 * num_extreme, 1)).astype(int)
    places = set(even) | set(range(num_extreme)) | set(range(len(order) - num_extreme, len(order)))
    return [int(order[place]) for place in sorted(places)][:quota]


def thumbnail(image: bytes, budget_bytes: int) -> tuple[str, bool]:
    """Data URI of an image, and whether it is tiny (to be enlarged with its pixels visible).

    A tiny image is embedded as it is stored; a larger one as a JPEG that fits the budget. A file that is no image, or
    larger than a sample can be, gives an empty text.
    """
    try:
        with open_image(image, max_pixels=MAX_SAMPLE_PIXELS) as opened:
            tiny = max(opened.size) <= TINY_PIXELS
            kind = (opened.format or "").lower()
        if tiny and len(image) <= budget_bytes and kind in ("png", "jpeg", "webp"):
            return data_uri(image, kind), True
        return data_uri(_fit(decode_sample(image), budget_bytes), "jpeg"), tiny
    except UnusableImageError:
        return "", False


def image_uri(image: Image.Image, budget_bytes: int) -> str:
    """Data URI of a decoded image: a PNG of a tiny one, a JPEG that fits the budget of others."""
    if max(image.size) <= TINY_PIXELS:
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        if buffer.tell() <= budget_bytes:
            return data_uri(buffer.getvalue(), "png")
    return data_uri(_fit(image.convert("RGB"), budget_bytes), "jpeg")


def _fit(image: Image.Image, budget_bytes: int) -> bytes:
    for side, quality in THUMBNAIL_STEPS:
        small = image.copy()
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=quality)
        if buffer.tell() <= budget_bytes:
            break
    return buffer.getvalue()


def data_uri(image: bytes, kind: str) -> str:
    """An image file as the address of itself."""
    return f"data:image/{kind};base64," + base64.b64encode(image).decode()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tile:
    """A sample in the gallery.

    Attributes:
        image: data URI of the thumbnail; empty where there is none.
        blank: text in place of a missing image.
        classes: indices of the classes that it was conditioned on, by which classes are sorted.
        context: of its prompt; empty without one.
        answers: lines about target, oracles and label, each with whether it is as asked.
        oracle: what all oracles predict, or that they disagree; empty without one.
        outcomes: which of `OUTCOMES` hold of it.
        record: all its metadata.
    """

    image: str
    is_tiny: bool
    blank: str
    alt: str
    conditioned: str
    classes: tuple[int, ...]
    context: str
    predicted: str
    answers: list[tuple[str, bool]]
    oracle: str
    outcomes: list[str]
    scores: dict[str, str]
    record: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Group:
    """The tiles of a request, with a line about the choice."""

    request: str
    note: str
    tiles: list[Tile]


def make_groups(rows: Rows, chosen: list[int], tiles: list[Tile], totals: Mapping[str, int]) -> list[Group]:
    """The tiles by request.

    Args:
        chosen: row of each tile.
        totals: samples of each request.
    """
    groups = []
    for code in dict.fromkeys(rows.request.codes[chosen].tolist()):
        some = [tile for row, tile in zip(chosen, tiles, strict=True) if rows.request.codes[row] == code]
        name = rows.request.names[code]
        note = f"{len(some):,} of {totals[name]:,}, by {rows.main_score(code).label} from high to low"
        groups.append(Group(name, note, some))
    return groups


def make_tile(record: dict[str, Any], image: bytes, names: dict[int, str], budget_bytes: int) -> Tile:
    """A tile of a sample's metadata and image file; `image` is empty where none is stored."""
    uri, is_tiny = thumbnail(image, budget_bytes) if image else ("", False)
    predicted = name_of(record["predicted_class"], names)
    conditioned = conditioned_name(record, names)
    scored = is_scored(record)
    return Tile(
        image=uri,
        is_tiny=is_tiny,
        blank=clip(f"{record['status']}: {record['error_message']}".rstrip(": "), 110),
        alt=clip(f"{conditioned}, predicted {predicted}", 200),
        conditioned=clip(conditioned, 60),
        classes=asked_classes(record),
        context=clip(str(record["context"]), 200),
        predicted=clip(predicted, 60) if scored else "",
        answers=_answers(record, names) if scored else [],
        oracle=common_answer(record, names) if scored else "",
        outcomes=_outcomes(record) if scored else [],
        scores={column.title: number(record[column.name]) for column in _tile_scores()} if scored else {},
        record=record,
    )


def _answers(record: dict[str, Any], names: dict[int, str]) -> list[tuple[str, bool]]:
    """The lines of a tile about what models say: the target, the oracles, and the label."""
    target = f"target: {clip(name_of(record['predicted_class'], names), 60)}", not target_errs(record)
    return [line for line in (target, summary(record, names), validity_text(record)) if line[0]]


def _tile_scores() -> tuple[Column, ...]:
    """The scores below an image; every schema version has them."""
    return tuple(column for column in by_rank(columns_with(Role.SORTS)) if column.since == 1)[:NUM_TILE_SCORES]


def conditioned_name(record: dict[str, Any], names: dict[int, str]) -> str:
    """What a sample was conditioned on; the record of a joint prompt names only the class it came closest to."""
    if is_joint(record["key"]) and record["kldb_classes"]:
        return subset_name(tuple(record["kldb_classes"]), names)
    return names.get(record["class_index"], str(record["class_name"]))


def _outcomes(record: dict[str, Any]) -> list[str]:
    """Which outcomes hold, as in the tables: of a joint prompt an oracle may predict any class of the subset."""
    oracles = independent(record)
    doubted = [] if all(answer.is_asked for answer in oracles) else ["doubted"]
    if not target_errs(record):
        return ["right", *doubted]
    holds = {
        "error": True,
        "valid": record["oracle_class"] in asked_classes(record),
        "agreed": len(oracles) > 1 and not doubted,
        "strict": validity(record) is True,
    }
    return [*(name for name, is_so in holds.items() if is_so), *doubted]


def gallery_json(tiles: list[Tile], names: dict[int, str]) -> Markup:
    """What the page's script needs of each tile, safe inside a script element whatever the texts hold."""
    fields = list(tiles[0].record) if tiles else []
    payload = {
        "fields": fields,
        "samples": [
            {
                "key": tile.record["key"],
                "request": tile.record["request"],
                "class": tile.conditioned,
                "context": tile.context or NO_CONTEXT,
                "target": tile.predicted,
                "oracle": tile.oracle,
                "status": tile.record["status"],
                "outcomes": tile.outcomes,
                "scores": sort_scores(tile.record) if tile.scores else {},
                "values": [_field_text(name, tile.record[name], names) for name in fields],
            }
            for tile in tiles
        ],
    }
    text = json.dumps(payload, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Markup(text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e"))


def sort_scores(record: dict[str, Any]) -> dict[str, float]:
    """The scores of a sample that the gallery sorts by; those of entries, such as the judge's, where it has any."""
    scores = {name: float(record[name]) for name in sort_titles([record]) if name in record}
    for name, entry in entry_scores_with(Role.SORTS).items():
        if entries := record.get(entry.column.name):
            scores[name] = float(entries[0][entry.part.name])
    return scores


def sort_titles(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The scores that records can be sorted by, with their titles: those that any of them has."""
    columns = [column for column in by_rank(columns_with(Role.SORTS)) if _is_stored(column, records)]
    entries = {
        name: entry.title
        for name, entry in entry_scores_with(Role.SORTS).items()
        if any(record.get(entry.column.name) for record in records)
    }
    return {column.name: column.title for column in columns} | entries


def range_titles(records: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The scores that records can be limited by, with their titles: first those of the charts."""
    columns = sorted(columns_with(Role.RANGES), key=lambda column: column.rank is None)
    return {column.name: column.title for column in columns if _is_stored(column, records)}


def _is_stored(column: Column, records: Sequence[dict[str, Any]]) -> bool:
    """Whether records have a score; those of an earlier schema version lack later ones, most have no second image."""
    return column.since == 1 or any(column.name in one and column.is_known(one[column.name]) for one in records)


def _field_text(name: str, value: Any, names: dict[int, str]) -> str:
    """A field of the metadata for a reader; long lists and texts are cut, and end in an ellipsis."""
    column = BY_NAME.get(name)
    if isinstance(value, list):
        return joined(_item_texts(column, value, names), MAX_LIST)
    if column is not None and not column.is_known(value):
        return "none"
    if column is not None and column.is_class:
        return _class_text(value, names)
    return _plain_text(value)


def _item_texts(column: Column | None, values: list[Any], names: dict[int, str]) -> Iterator[str]:
    """The items of a list for a reader: entries of models, classes, or shares of the classes."""
    if column is not None and column.parts:
        return (_entry_text(column, entry, names) for entry in values)
    if column is not None and column.is_class:
        return (_class_text(index, names) for index in values)
    return (f"{name_of(index, names)} {share:.4g}" for index, share in enumerate(values) if share)


def _class_text(index: int, names: dict[int, str]) -> str:
    return "none" if index == NO_CLASS else f"{index} ({name_of(index, names)})"


def _entry_text(column: Column, entry: dict[str, Any], names: dict[int, str]) -> str:
    """An entry of a list: the model, then what it measured."""
    model, *measured = column.parts
    texts = [
        _class_text(entry[part.name], names) if part.is_class else f"{part.label} {_plain_text(entry[part.name])}"
        for part in measured
    ]
    return f"{entry[model.name]}: {', '.join(texts)}"


def _plain_text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else clip(str(value), MAX_TEXT)
