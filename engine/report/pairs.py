"""Pairs and triples: samples beside their start and their unguided twin, and what that says of each request.

They are chosen among the samples of the gallery, so that each opens there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engine.data.run.outcomes import predicts_asked
from engine.data.run.summary import read_tables
from engine.data.run.twins_table import FoundTwins
from engine.job.columns import (
    ADVERSARIAL_PSNR_DB,
    BY_NAME,
    EQUAL_PSNR_DB,
    NO_CLASS,
    PERCEPTIBLE_PSNR_DB,
    TWIN_COLUMNS,
)
from engine.job.records import STARTS, TWINS
from engine.report.data import Rows
from engine.report.headline import Heading, Line, Table
from engine.report.pair_tiles import SORTS, PairTile, first_gain
from engine.report.stored_images import ImageShards
from engine.report.text import ABSENT, clip, many, number, percent

if TYPE_CHECKING:
    import pyarrow as pa

MAX_PAIRS = 24
MAX_SENTENCES = 12
MAX_LINES = 100
# What people see of a change, by its name.
SEEN = {
    "unchanged": "most samples equal their twin",
    "adversarial": "people hardly tell sample and twin apart",
    "faint": "people see the change in some pairs, and in others not",
    "perceptible": "people can see the change",
}


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
    """The columns of starts and twins of rows.

    Args:
        table: of the metadata, with the twins that were found.
        rows: the same rows.
        places: their numbers in the run.
        metadata: all rows of the run.
    """

    def __init__(self, table: pa.Table, rows: Rows, places: np.ndarray, metadata: Path) -> None:
        self.rows = rows
        self._table, self._metadata = table, metadata
        self.places = places
        self.has_start = self._texts("start_key")
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
        values: np.ndarray = BY_NAME[name].known(self.numbers(name)[of & self.rows.scored])
        return values

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

    def placed(self, keys: Mapping[int, str]) -> dict[int, str]:
        """Keys by their row in the run, of keys by row."""
        return {int(self.places[row]): key for row, key in keys.items()}

    def places_of(self, keys: set[str]) -> dict[int, str]:
        """Keys by their row in the run, in which any row may have them."""
        import pyarrow as pa
        import pyarrow.compute as pc

        found, start, wanted = dict[int, str](), 0, pa.array(sorted(keys), pa.string())
        for table in read_tables(self._metadata, ["key"]) if keys else ():
            rows = np.flatnonzero(pc.is_in(table["key"], value_set=wanted).to_numpy())
            found |= dict(zip((start + rows).tolist(), table["key"].take(rows).to_pylist(), strict=True))
            start += len(table)
        return found

    def of_twin(self, row: int) -> dict[str, Any]:
        """What a row has of its twin, by column."""
        there = self._table.column_names
        return {name: self._table[name][row].as_py() for name in TWIN_COLUMNS if name in there}

    def _texts(self, name: str) -> np.ndarray:
        import pyarrow.compute as pc

        if name not in self._table.column_names:
            return np.zeros(len(self.rows), dtype=bool)
        return np.asarray(pc.not_equal(self._table[name], "").to_numpy(), dtype=bool)


def pair_section(
    columns: PairColumns, manifest: Mapping[str, Any], found: FoundTwins | None, num_attempts: int
) -> PairSection | None:
    """Sentences and table of all requests with starts or twins; None where none has any.

    Args:
        num_attempts: of the run.
    """
    rows, verdicts, lines = columns.rows, list[Verdict](), list[Line]()
    for code, name in enumerate(rows.request.names):
        here = columns.has_any & (rows.request.codes == code)
        if here.any():
            verdicts.append(_verdict(columns, name, here))
            lines.append(_line(columns, name, here, verdicts[-1].word))
    if not verdicts:
        return None
    headings = [
        Heading("Request"), Heading("Errors", "of the target"), Heading("Valid failures"), Heading("Oracle agrees"),
        Heading("Pairs"), Heading("PSNR to the twin", "in dB; median, quartiles"),
        Heading("Distance to the twin", "median"), Heading("Distance to the start", "median"),
        Heading("Risk", "in nats; median"),
    ]  # fmt: skip
    return PairSection(
        verdicts=verdicts[:MAX_SENTENCES],
        num_verdicts_left_out=len(verdicts[MAX_SENTENCES:]),
        table=_without_absent(Table(headings, lines[:MAX_LINES], len(lines[MAX_LINES:]))),
        clip=_clip_text(manifest, found),
        stale=_stale(found, num_attempts),
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
        (_share(rows.target_errs[compared]), _of_twins(_share(columns.twin_errs(compared)))),
        (_share((rows.oracle_agrees & rows.target_errs)[judged]), ""),
        (_share(rows.oracle_agrees[judged]), ""),
        (f"{int(here.sum()):,}", ""),
        (spread[1], f"{spread[0]} to {spread[2]}") if spread else (ABSENT, ""),
        (_median(columns.measured("twin_distance", here)), ""),
        (_median(columns.measured("start_distance", here)), ""),
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
    """Rows of the pairs to show, of those in the gallery: of each request some from near to far.

    Args:
        shown: rows of the gallery's samples.
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
    shards: ImageShards, columns: PairColumns, records: Mapping[int, dict[str, Any]]
) -> dict[str, Mapping[str, bytes]]:
    """Image files of starts and twins by the keys of their samples, under `STARTS` and `TWINS`.

    Args:
        records: metadata of the samples by row, with the twins that were found.
    """
    keys = columns.placed({row: record["key"] for row, record in records.items()})
    twins = shards.find(keys, TWINS)
    # The twin that an evaluation found is another sample; one of its own has the key of its sample.
    others = {record["key"]: str(record.get("twin_key", "")) for record in records.values()}
    others = {key: other for key, other in others.items() if other not in ("", key)}
    samples = shards.find(columns.places_of(set(others.values())))
    found = {key: samples[other] for key, other in others.items() if other in samples}
    return {STARTS: shards.find(keys, STARTS), TWINS: {key: twins[key] for key in twins} | found}
