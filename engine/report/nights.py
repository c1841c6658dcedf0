"""What is new tonight: two runs compared, with the images of both nights side by side.

It is a page of its own (`riskforge compare A B --html FILE`) and a section in the report of a run that was compared
with its baseline. Both are made from a `Comparison` and the images that the two runs still have.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from engine.data.run.comparison import ChangedSample, ComparedMetric, ComparedRow, Comparison, UnpairedFailure, sentence
from engine.report.gallery import thumbnail
from engine.report.night_images import NightImages, find_night_images
from engine.report.text import ABSENT, clip, number, percent

# How the page begins, so that `--html` writes over its own files only.
PAGE_BEGINNING = "<!doctype html>\n<!-- riskforge compare -->"
NIGHTS_BUDGET_BYTES = 6_000_000
# In the report of a run, beside everything else.
SECTION_BUDGET_BYTES = 900_000
SECTION_SAMPLES = 12
MAX_ROWS = 200
MAX_NOTES = 40
MAX_TEXT = 120
_SHARES = ("error_rate", "valid_failures", "strictly_valid_failures")


@dataclass(frozen=True, slots=True, kw_only=True)
class NightPanel:
    """An image of one night.

    Attributes:
        image: data URI; empty where there is none.
        blank: text in place of a missing image.
        mark: ✓ where the target predicts what was asked for, ✗ where not.
    """

    night: str
    image: str
    is_tiny: bool
    blank: str
    mark: str
    predicted: str
    risk: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NightCard:
    """A sample whose failure is new, fixed or without a pair."""

    key: str
    request: str
    sentence: str
    context: str
    panels: list[NightPanel]


@dataclass(frozen=True, slots=True, kw_only=True)
class NightList:
    """Samples of one kind, the largest risk first.

    Attributes:
        name: of the list, for links.
        num_left_out: samples that are not shown.
        page_command: that writes the page with all of them.
        command: that lists all failures of the newer run from the first one on that is not shown.
    """

    name: str
    title: str
    note: str
    cards: list[NightCard]
    total: int
    num_left_out: int
    page_command: str
    command: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NightCell:
    """A figure in both runs.

    Attributes:
        note: the interval of the difference.
    """

    text: str
    note: str
    is_crossed: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class NightRow:
    """A request, or under it a class or a context.

    Attributes:
        crossed: names of the metrics in which a limit is exceeded.
    """

    name: str
    is_part: bool
    crossed: str
    samples: str
    cells: list[NightCell]
    counts: tuple[str, str]


def nights_context(
    comparison: Comparison, *, limit: int, budget_bytes: int = NIGHTS_BUDGET_BYTES, address: str = ""
) -> dict[str, Any]:
    """What the template needs of a comparison, with the images that its runs still have.

    Args:
        limit: samples of each kind that are shown.
        budget_bytes: of all images.
        address: of the newer run, which may have been moved since it was compared.
    """
    if address:
        comparison = comparison.model_copy(update={"new": comparison.new.model_copy(update={"address": address})})
    album = _Album(comparison, limit, budget_bytes)
    rows = _chosen(comparison.rows)
    metrics = _shown_metrics(comparison)
    return {
        "comparison": comparison,
        "nights": (comparison.old.night, comparison.new.night),
        "lists": album.lists(),
        "problems": album.problems,
        "metrics": list(metrics.values()),
        "equal_metrics": [name for name in comparison.metric_names.values() if name not in metrics.values()],
        "rows": [_row(row, metrics) for row in rows],
        "num_rows_left_out": len(comparison.rows) - len(rows),
        "crossed": comparison.crossed[:MAX_NOTES],
        "num_crossed_left_out": len(comparison.crossed[MAX_NOTES:]),
        "notes": [clip(note, 4000) for note in comparison.notes[:MAX_NOTES]],
        "level": f"{comparison.confidence:.0%}",
        "alpha": f"{1 - comparison.confidence:.2g}",
    }


class _Album:
    """The lists of samples with their images, which are looked up once for each night."""

    def __init__(self, comparison: Comparison, limit: int, budget_bytes: int) -> None:
        self._comparison = comparison
        pairs = [*comparison.new_failures[:limit], *comparison.mended[:limit]]
        alone = comparison.unpaired_failures[:limit]
        self._limit, self._share = limit, budget_bytes // max(2 * len(pairs) + len(alone), 1)
        self._old = _images(comparison, {sample.old_key: sample.old_risk for sample in pairs}, is_old=True)
        new = {pair.key: pair.new_risk for pair in pairs} | {failure.key: failure.new_risk for failure in alone}
        self._new = _images(comparison, new, is_old=False)

    @property
    def problems(self) -> list[str]:
        """Why one of the nights has no images, a line each."""
        sides = ((self._comparison.old, self._old), (self._comparison.new, self._new))
        return [f"{run.night}: {images.problem}." for run, images in sides if images.problem]

    def lists(self) -> list[NightList]:
        """New failures, fixed ones, and failures of samples without a pair; empty kinds but the first are left out."""
        comparison, limit = self._comparison, self._limit
        lists = [
            self._list(
                "new-failures", "New failures",
                "Pairs of one prompt and seed that were right and are wrong now, also of requests and classes with too"
                " few samples for a row below.",
                comparison.num_new_failures, [self._pair(sample, "now") for sample in comparison.new_failures[:limit]],
                comparison.new_failures[limit:],
            ),
            self._list(
                "fixed", "Fixed", "Pairs that were wrong and are right now.",
                comparison.num_mended, [self._pair(sample, "no longer") for sample in comparison.mended[:limit]], (),
            ),
            self._list(
                "unpaired", "Failures without a pair",
                "Failures of the newer night among samples whose prompt and seed the older one does not have, such as"
                " fresh ones.",
                comparison.num_unpaired_failures,
                [self._single(sample) for sample in comparison.unpaired_failures[:limit]],
                comparison.unpaired_failures[limit:],
            ),
        ]  # fmt: skip
        return [one for one in lists if one.total or one.name == "new-failures"]

    def _list(
        self,
        name: str,
        title: str,
        note: str,
        total: int,
        cards: list[NightCard],
        rest: Sequence[ChangedSample | UnpairedFailure],
    ) -> NightList:
        left_out = total - len(cards)
        return NightList(
            name=name, title=title, note=note, cards=cards, total=total, num_left_out=left_out,
            page_command=_compare(self._comparison, total) if left_out else "",
            command=_inspect(self._comparison.new.address, rest[0].new_risk) if left_out and rest else "",
        )  # fmt: skip

    def _pair(self, sample: ChangedSample, how: str) -> NightCard:
        comparison, is_new = self._comparison, how == "now"
        predicted = sample.predicted_class_name if is_new else sample.old_predicted_class_name
        panels = [
            self._panel(
                comparison.old.night, self._old, sample.old_key, sample.old_predicted_class_name, sample.old_risk,
                is_right=is_new,
            ),
            self._panel(
                comparison.new.night, self._new, sample.key, sample.predicted_class_name, sample.new_risk,
                is_right=not is_new,
            ),
        ]  # fmt: skip
        return _card(sample, sentence(sample.class_name, predicted, how), panels)

    def _single(self, sample: UnpairedFailure) -> NightCard:
        panel = self._panel(
            self._comparison.new.night, self._new, sample.key, sample.predicted_class_name, sample.new_risk,
            is_right=False,
        )  # fmt: skip
        return _card(sample, sentence(sample.class_name, sample.predicted_class_name, ""), [panel])

    def _panel(
        self, night: str, images: NightImages, key: str, predicted: str, risk: float, *, is_right: bool
    ) -> NightPanel:
        data = images.of(key)
        uri, is_tiny = thumbnail(data, self._share) if data else ("", False)
        return NightPanel(
            night=night,
            image=uri,
            is_tiny=is_tiny,
            blank="no image" if images.problem else "image not stored",
            mark="✓" if is_right else "✗",
            predicted=clip(predicted, MAX_TEXT) or ("right" if is_right else "wrong"),
            risk=number(risk),
        )


def _images(comparison: Comparison, risks: dict[str, float], *, is_old: bool) -> NightImages:
    run = comparison.old if is_old else comparison.new
    return find_night_images(run.address, risks, is_baseline=run.is_baseline) if risks else NightImages({})


def _card(sample: ChangedSample | UnpairedFailure, words: str, panels: list[NightPanel]) -> NightCard:
    return NightCard(
        key=sample.key,
        request=sample.request,
        sentence=clip(words, 2 * MAX_TEXT),
        context=clip(sample.context, 2 * MAX_TEXT),
        panels=panels,
    )


def _compare(comparison: Comparison, examples: int) -> str:
    """The command that writes the page with so many samples of each kind."""
    new = shlex.quote(comparison.new.address)
    runs = (
        f"{new} --baseline {shlex.quote(comparison.baseline)}"
        if comparison.baseline
        else (f"{shlex.quote(comparison.old.address)} {new}")
    )
    return f"riskforge compare {runs} --html FILE --examples {examples}"


def _inspect(address: str, risk: float) -> str:
    """The command that lists the failures of a run up to a risk."""
    condition = shlex.quote(f"target_errs and risk <= {math.ceil(risk * 1000) / 1000}")
    return f"riskforge inspect {shlex.quote(address)} --filter {condition}"


def _chosen(rows: Sequence[ComparedRow]) -> list[ComparedRow]:
    """All rows where they fit, else those that crossed a limit, requests and those that differ, in their order."""
    rank = sorted(rows, key=lambda row: (not _is_crossed(row), row.level != "request", not _differs(row)))
    kept = set(map(id, rank[:MAX_ROWS]))
    return [row for row in rows if id(row) in kept]


def _is_crossed(row: ComparedRow) -> bool:
    return any(metric.crossed for metric in row.metrics.values())


def _differs(row: ComparedRow) -> bool:
    return any(metric.significant for metric in row.metrics.values())


def _shown_metrics(comparison: Comparison) -> dict[str, str]:
    """All metrics but medians that are equal in both runs in every row, as the terminal has them."""

    def differs(name: str) -> bool:
        found = [row.metrics[name] for row in comparison.rows if name in row.metrics]
        return any(one.old != one.new or one.crossed for one in found) or not found

    return {
        name: title
        for name, title in comparison.metric_names.items()
        if not title.startswith("median") or differs(name)
    }


def _row(row: ComparedRow, metrics: Mapping[str, str]) -> NightRow:
    is_part = row.level != "request"
    counts = (row.num_new_failures, row.num_mended)
    return NightRow(
        name=clip(f"{row.level} {row.group or 'none'}" if is_part else row.request, MAX_TEXT),
        is_part=is_part,
        crossed=", ".join(
            title for name, title in metrics.items() if name in row.metrics and row.metrics[name].crossed
        ),
        samples=f"{row.num_pairs:,} pairs" if row.num_pairs else f"{row.num_old:,} and {row.num_new:,}",
        cells=list(_cells(row, list(metrics))),
        counts=(_count(counts[0]), _count(counts[1])),
    )


def _count(count: int | None) -> str:
    return ABSENT if count is None else f"{count:,}"


def _cells(row: ComparedRow, metrics: Sequence[str]) -> Iterator[NightCell]:
    for name in metrics:
        metric = row.metrics.get(name)
        if metric is None:
            yield NightCell(text=ABSENT, note="", is_crossed=False)
            continue
        star = " *" if metric.significant else ""
        old, new = (percent(value) if name in _SHARES else f"{value:.3g}" for value in (metric.old, metric.new))
        yield NightCell(
            text=f"{old} → {new}{star}",
            note=_interval(metric, is_share=name in _SHARES),
            is_crossed=metric.crossed,
        )


def _interval(metric: ComparedMetric, *, is_share: bool) -> str:
    if metric.low == metric.high:
        return ""
    if is_share:
        low, high = (f"{round(100 * bound) + 0:+d}" for bound in (metric.low, metric.high))
        return f"{low} to {high} points"
    return f"{metric.low:+.2g} to {metric.high:+.2g}"
