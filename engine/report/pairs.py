"""Pairs and triples: samples beside their start and their unguided twin, and what that says of each request.

They are chosen among the samples of the gallery, so that each opens there. Images are shown without loss, because the
page draws their difference: large ones are reduced, and their difference is that of the reduced ones.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from engine.data.images.decode import UnusableImageError, decode_sample
from engine.data.run.outcomes import asked_classes, predicts_asked
from engine.data.run.twins_table import FoundTwins
from engine.data.stores.base import Store
from engine.job.columns import (
    ADVERSARIAL_PSNR_DB,
    BY_NAME,
    EQUAL_PSNR_DB,
    NO_CLASS,
    PERCEPTIBLE_PSNR_DB,
    TWIN_COLUMNS,
)
from engine.job.records import STARTS, TWINS
from engine.methods.registry import find_method
from engine.report.data import Rows, name_of
from engine.report.gallery import TINY_PIXELS, conditioned_name, data_uri
from engine.report.headline import Heading, Line, Table
from engine.report.stored_images import find_images
from engine.report.text import ABSENT, clip, many, number, percent

if TYPE_CHECKING:
    import pyarrow as pa

MAX_PAIRS = 24
# Of the budget of the gallery's images.
PAIRS_BUDGET_BYTES = 2_200_000
# Longest side, tried in turn until the images of a pair fit their share.
SIDES = (256, 224, 192, 160, 128, 96, 64)
MAX_SENTENCES = 12
MAX_LINES = 100
# The page amplifies differences by powers of two up to this one, and at first so that they are about so many levels.
MAX_GAIN_POWER = 6
_SHOWN_LEVELS = 64
# What the page sorts by, in this order.
SORTS = ("twin_distance", "start_distance", "twin_psnr_db", "risk")
# What people see of a change, by its name.
SEEN = {
    "unchanged": "most samples equal their twin",
    "adversarial": "people hardly tell sample and twin apart",
    "faint": "people see the change in some pairs, and in others not",
    "perceptible": "people can see the change",
}
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the medians say of a request.

    Attributes:
        word: one of `SEEN`, or empty where no twin tells.
        has_doubt: whether the oracle reads most samples as something else than was asked for.
    """

    request: str
    word: str
    text: str
    has_doubt: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PairSection:
    """The section of the page.

    Attributes:
        stale: that the run went on since twins were found; empty where it did not.
        note: how many pairs are shown.
        gain: power of two by which differences are amplified at first.
    """

    verdicts: list[Verdict]
    num_verdicts_left_out: int
    table: Table
    clip: str
    stale: str
    note: str = ""
    tiles: list[PairTile] = field(default_factory=list)
    sorts: list[tuple[str, str]] = field(default_factory=list)
    gain: int = 0

    @property
    def requests(self) -> list[str]:
        """Of the tiles, in order."""
        return list(dict.fromkeys(tile.request for tile in self.tiles))

    @property
    def has_choice(self) -> bool:
        """Whether a sample can be compared with either of two images."""
        return any(len(tile.panels) > 2 for tile in self.tiles)


class PairColumns:
    """The columns of starts and twins of all rows.

    Args:
        table: of the metadata, with the twins that were found.
        rows: the same rows.
    """

    def __init__(self, table: pa.Table, rows: Rows) -> None:
        self.rows = rows
        self._table = table
        self.has_start = self._texts("start_key") & (self.numbers("strength") < 1)
        self.has_twin = self._texts("twin_key")
        self.has_oracle = self.numbers("oracle_class") != NO_CLASS

    @property
    def has_any(self) -> np.ndarray:
        """For each row whether it has a start or a twin."""
        return self.has_start | self.has_twin

    def numbers(self, name: str) -> np.ndarray:
        """A column of numbers, [N]; its empty value in runs of earlier schema versions."""
        if name not in self._table.column_names:
            return np.full(len(self.rows), BY_NAME[name].empty)
        return np.asarray(self._table[name].to_numpy())

    def measured(self, name: str, of: np.ndarray) -> np.ndarray:
        """The values of a score in some rows, without those of rows that do not have it."""
        values = self.numbers(name)[of & self.rows.scored]
        return values[values != BY_NAME[name].empty] if BY_NAME[name].is_paired else values

    def compared(self, of: np.ndarray) -> np.ndarray:
        """Of some rows the scored ones with a twin, so that the two are of the same pairs; all where none has one."""
        scored = of & self.rows.scored
        return scored & self.has_twin if (scored & self.has_twin).any() else scored

    def twin_errs(self, of: np.ndarray) -> np.ndarray:
        """For each of some rows with a twin whether the target predicts a class for it that was not asked for."""
        import pyarrow as pa

        chosen = of & self.has_twin & self.rows.scored
        part = self._table.filter(pa.array(chosen))
        return ~predicts_asked(part, self.numbers("twin_predicted_class")[chosen]) if len(part) else np.array([])

    def rows_of(self, keys: set[str]) -> dict[int, str]:
        """Keys by row number."""
        import pyarrow as pa
        import pyarrow.compute as pc

        wanted = sorted(keys)
        places = pc.index_in(pa.array(wanted, pa.string()), value_set=self._table["key"].combine_chunks()).to_pylist()
        return {place: key for place, key in zip(places, wanted, strict=True) if place is not None}

    def of_twin(self, row: int) -> dict[str, Any]:
        """What a row has of its twin, by column."""
        there = self._table.column_names
        return {name: self._table[name][row].as_py() for name in TWIN_COLUMNS if name in there}

    def _texts(self, name: str) -> np.ndarray:
        import pyarrow.compute as pc

        if name not in self._table.column_names:
            return np.zeros(len(self.rows), dtype=bool)
        return np.asarray(pc.not_equal(self._table[name], "").to_numpy(), dtype=bool)


def pair_section(columns: PairColumns, manifest: Mapping[str, Any], found: FoundTwins | None) -> PairSection | None:
    """Sentences and table of all requests with starts or twins; None where none has any."""
    rows, verdicts, lines = columns.rows, list[Verdict](), list[Line]()
    for code, name in enumerate(rows.request.names):
        here = columns.has_any & (rows.request.codes == code)
        if here.any():
            verdicts.append(_verdict(columns, name, here))
            lines.append(_line(columns, name, here, verdicts[-1].word))
    if not verdicts:
        return None
    headings = [
        Heading("Request"), Heading("Pairs"), Heading("PSNR to the twin", "in dB; median, quartiles"),
        Heading("Distance to the twin", "median"), Heading("Distance to the start", "median"),
        Heading("Errors", "of the target"), Heading("Oracle agrees"), Heading("Valid failures"),
        Heading("Risk", "in nats; median"),
    ]  # fmt: skip
    return PairSection(
        verdicts=verdicts[:MAX_SENTENCES],
        num_verdicts_left_out=len(verdicts[MAX_SENTENCES:]),
        table=_without_absent(Table(headings, lines[:MAX_LINES], len(lines[MAX_LINES:]))),
        clip=_clip_text(manifest, found),
        stale=_stale(found, len(rows)),
    )


def _without_absent(table: Table) -> Table:
    """The table without columns that no line has a figure in."""
    kept = [
        place for place in range(len(table.columns) - 1) if any(line.cells[place][0] != ABSENT for line in table.lines)
    ]
    lines = [replace(line, cells=[line.cells[place] for place in kept]) for line in table.lines]
    return Table([table.columns[0], *(table.columns[1 + place] for place in kept)], lines, table.num_left_out)


def _clip_text(manifest: Mapping[str, Any], found: FoundTwins | None) -> str:
    own = str(manifest["job"]["models"].get("clip", ""))
    return own if found is None or found.clip == own else f"{own}, of twins that an evaluation found {found.clip}"


def _stale(found: FoundTwins | None, num_attempts: int) -> str:
    if found is None or found.num_attempts == num_attempts:
        return ""
    return (
        f"Twins were last looked for when the run had {found.num_attempts:,} attempts; there are {num_attempts:,} now."
        " `riskforge evaluate` looks again."
    )


def _verdict(columns: PairColumns, request: str, here: np.ndarray) -> Verdict:
    """Whether people see what guidance changed, and whether the label still holds."""
    psnr, compared = columns.measured("twin_psnr_db", here), columns.compared(here)
    agrees = columns.rows.oracle_agrees[compared & columns.has_oracle]
    if len(psnr):
        median = float(np.median(psnr))
        word = _visibility(median)
        text = f"{many(len(psnr), 'sample')} with a twin, median PSNR {median:.1f} dB: {SEEN[word]}."
    else:
        word, text = "", f"{many(int(here.sum()), 'sample')} with a start."
    return Verdict(
        request=request,
        word=word,
        text=text + _outcome_text(columns, compared, agrees),
        has_doubt=bool(len(agrees)) and bool(agrees.mean() < 0.5),
    )


def _outcome_text(columns: PairColumns, compared: np.ndarray, agrees: np.ndarray) -> str:
    """How often the target errs with guidance and without, and how often the oracle reads what was asked for."""
    samples, twins = _share(columns.rows.target_errs[compared]), _share(columns.twin_errs(compared))
    if samples == ABSENT:
        return ""
    errors = f" The target errs on {samples}" + (f", on {twins} of the twins" if twins != ABSENT else "")
    text = f"{errors}; the oracle reads {_share(agrees)} as asked." if len(agrees) else f"{errors}."
    return text.replace(" %", "\N{NO-BREAK SPACE}%")


def _visibility(psnr_db: float) -> str:
    """Whether people see a change, by the PSNR: one of `SEEN`."""
    if psnr_db >= EQUAL_PSNR_DB:
        return "unchanged"
    if psnr_db >= ADVERSARIAL_PSNR_DB:
        return "adversarial"
    return "perceptible" if psnr_db < PERCEPTIBLE_PSNR_DB else "faint"


def _line(columns: PairColumns, request: str, here: np.ndarray, word: str) -> Line:
    psnr, compared, rows = columns.measured("twin_psnr_db", here), columns.compared(here), columns.rows
    spread = [f"{value:.1f}" for value in np.quantile(psnr, [0.25, 0.5, 0.75])] if len(psnr) else []
    judged = compared & columns.has_oracle
    cells = [
        (f"{int(here.sum()):,}", ""),
        (spread[1], f"{spread[0]} to {spread[2]}") if spread else (ABSENT, ""),
        (_median(columns.measured("twin_distance", here)), ""),
        (_median(columns.measured("start_distance", here)), ""),
        (_share(rows.target_errs[compared]), _of_twins(_share(columns.twin_errs(compared)))),
        (_share(rows.oracle_agrees[judged]), ""),
        (_share((rows.oracle_agrees & rows.target_errs)[judged]), ""),
        (_median(columns.measured("risk", compared)), _of_twins(_median(columns.measured("twin_risk", compared)))),
    ]
    return Line(clip(request, 120), word, False, cells)


def _of_twins(figure: str) -> str:
    return "" if figure == ABSENT else f"twins {figure}"


def _median(values: np.ndarray) -> str:
    return number(float(np.median(values))) if len(values) else ABSENT


def _share(flags: np.ndarray) -> str:
    return percent(float(flags.mean())) if len(flags) else ABSENT


def with_tiles(section: PairSection, tiles: list[PairTile], num_chosen: int, num_pairs: int) -> PairSection:
    """The section with pairs to look at.

    Args:
        num_chosen: pairs that were to be shown.
        num_pairs: of the run.
    """
    unreadable = num_chosen - len(tiles)
    left_out = f"; {many(unreadable, 'pair')} could not be read" if unreadable else ""
    has_scores = {name for tile in tiles for name in tile.scores}
    return replace(
        section,
        tiles=tiles,
        sorts=[(name, BY_NAME[name].title) for name in SORTS if name in has_scores],
        gain=first_gain(tiles),
        note=f"{len(tiles):,} of {many(num_pairs, 'pair')}{left_out}.",
    )


def choose_pairs(columns: PairColumns, shown: Sequence[int], limit: int = MAX_PAIRS) -> list[int]:
    """Row numbers of the pairs to show, of those in the gallery: of each request some from near to far.

    Args:
        shown: row numbers of the gallery's samples.
    """
    rows, has_any = columns.rows, columns.has_any
    by_request: dict[int, list[int]] = {}
    for row in shown:
        if has_any[row] and rows.scored[row]:
            by_request.setdefault(int(rows.request.codes[row]), []).append(row)
    chosen: list[int] = []
    for some in list(by_request.values())[:limit]:
        name = "twin_distance" if columns.has_twin[some].any() else "start_distance"
        order = sorted(some, key=lambda row: (-columns.numbers(name)[row], row))
        places = np.linspace(0, len(order) - 1, min(len(order), limit // min(len(by_request), limit)))
        chosen += [order[int(place)] for place in places]
    return chosen


def find_others(
    store: Store, job_name: str, columns: PairColumns, records: Mapping[int, dict[str, Any]]
) -> dict[str, Mapping[str, bytes]]:
    """Image files of starts and twins by the keys of their samples, under `STARTS` and `TWINS`.

    Args:
        records: metadata of the samples by row number, with the twins that were found.
    """
    keys = {row: record["key"] for row, record in records.items()}
    twins = find_images(store, job_name, keys, TWINS)
    # The twin that an evaluation found is another sample; one of its own has the key of its sample.
    others = {record["key"]: str(record.get("twin_key", "")) for record in records.values()}
    others = {key: other for key, other in others.items() if other not in ("", key)}
    samples = find_images(store, job_name, columns.rows_of(set(others.values())))
    found = {key: samples[other] for key, other in others.items() if other in samples}
    return {STARTS: find_images(store, job_name, keys, STARTS), TWINS: {key: twins[key] for key in twins} | found}


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
    """What a person, the target and the oracle call an image."""
    asked = asked_classes(record)
    if kind == STARTS:
        return [Reading(clip(f"labelled {name_of(asked[0], names)}", 80) if len(asked) == 1 else "real image")]
    of = {"": record["predicted_class" if kind == "sample" else "twin_predicted_class"]}
    if kind == "sample" and record["oracle_class"] != NO_CLASS:
        of["oracle: "] = record["oracle_class"]
    return [
        Reading(clip(f"{who}{name_of(index, names)}", 80), "✓" if index in asked else "✗") for who, index in of.items()
    ]


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
    column = BY_NAME[name]
    return not column.is_paired or record.get(name, column.empty) != column.empty


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
