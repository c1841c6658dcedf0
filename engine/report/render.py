"""The report: the figures of a run and a bounded gallery on one page that loads nothing from anywhere.

Everything that a user wrote (names, prompts, contexts, messages) reaches the page escaped, and the page's content
policy lets no script run but its own. Equal runs give equal bytes.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from markupsafe import Markup

from engine.data.reading.people.card import update_card
from engine.data.reading.people.review import NO_PEOPLE, People, read_people
from engine.data.run.comparison import Comparison, read_pinned
from engine.data.run.file_names import METADATA, REPORT, RESCORED_FROM
from engine.data.run.manifest_reading import check_is_run, manifest_error, read_manifest
from engine.data.run.origin import find_origin
from engine.data.run.study_document import StudyDocument, read_study
from engine.data.run.summary import GroupSummary, shown_scores
from engine.data.run.twins_table import FoundTwins, read_twins, with_twins
from engine.data.stores.base import Store
from engine.errors import CorruptShardError, JobError, OutputError, first_line
from engine.job.class_names import distinct_names
from engine.job.columns import (
    ADVERSARIAL_PSNR_DB,
    MIN_ORACLE_P_LABEL,
    MIN_P_VALID,
    PERCEPTIBLE_PSNR_DB,
    by_rank,
    target_first,
    units_text,
)
from engine.models.factory_folders import runs_code
from engine.models.labels import read_labels
from engine.report.charts import histogram
from engine.report.data import (
    Rows,
    confusion,
    error_pairs,
    failures,
    make_rows,
    names_by_index,
    open_metadata,
    read_samples,
    read_some,
    samples_apart,
)
from engine.report.evaluated import evaluation_context
from engine.report.evaluation import Evaluation, read_evaluation
from engine.report.gallery import (
    IMAGE_BUDGET_BYTES,
    MAX_SAMPLES,
    NO_CONTEXT,
    OUTCOMES,
    Tile,
    gallery_json,
    make_groups,
    make_tile,
    range_titles,
    select,
    sort_titles,
)
from engine.report.headline import summary_table
from engine.report.manifest_parts import manifest_context
from engine.report.nights import SECTION_BUDGET_BYTES, SECTION_SAMPLES, nights_context
from engine.report.oracle_answers import independent
from engine.report.pair_tiles import MAX_GAIN_POWER, PAIRS_BUDGET_BYTES, make_pairs
from engine.report.pairs import PairColumns, PairSection, choose_pairs, find_others, pair_section, with_tiles
from engine.report.people import people_context
from engine.report.row_sums import RowSums, sum_rows
from engine.report.scatter import SHAPES, num_drawn, scatter
from engine.report.stored_images import ImageShards, scored_shards
from engine.report.study import study_context
from engine.report.style import page_style, page_templates
from engine.report.text import clip, many
from engine.report.work import class_table, gradient_table, throughput_table

if TYPE_CHECKING:
    from pyarrow.dataset import Dataset

MAX_BYTES = 9_500_000
MAX_SERIES = 6
MAX_MESSAGE_CHARS = 400
HEAT_LEVELS = 4

_HERE = Path(__file__).parent
# Of a job, as `engine.job.spec` has it: shards are named after it.
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_REMEDY = "remove _SUCCESS, and the run's command writes it again"
# What the page takes from the manifest without asking whether it is there.
_NEEDED: dict[str, type] = {
    "name": str,
    "complete": bool,
    "plan_digest": str,
    "models": dict,
    "versions": dict,
    "hardware": dict,
    "timing": dict,
    "job.models.target": str,
    "counts.samples.attempted": int,
    "counts.samples.ok": int,
    "counts.samples.failed": int,
    "counts.shards.planned": int,
    "counts.shards.committed": int,
}


def write_report(
    store: Store, *, title: str | None = None, labels: list[str] | None = None, into: Store | None = None
) -> str:
    """Write `report.html` of a run whose manifest and metadata are written, with evaluation and people's answers.

    Args:
        title: heading of the page; the job's name when not given.
        labels: the target's class names; looked up from the manifest's address of the target when not given.
        into: where the report goes and the evaluation comes from; the run itself when not given.

    Returns:
        Why no image can be shown, of a rescored folder whose run is gone; empty otherwise.

    Raises:
        OutputError: the run has no manifest or metadata yet, or the store refuses.
        CorruptShardError: one of the two cannot be read.

    Side effects: writes what people say into the run's card, too.
    """
    check_is_run(store, scores=True)
    manifest = _read_manifest(store)
    if not store.exists(METADATA):
        raise OutputError(f"output {store.uri}: has no {METADATA}; finish the run first (`riskforge run`)")
    evaluation, found, pinned, problems = None, None, None, list[str]()
    # The end of a run must not depend on the figures of an earlier evaluation or comparison.
    try:
        evaluation = read_evaluation(into or store)
    except CorruptShardError as error:
        problems.append(str(error))
    try:
        found = read_twins(into or store, manifest["plan_digest"])
    except CorruptShardError as error:
        problems.append(str(error))
    pinned_problem = ""
    try:
        pinned = read_pinned(store)
    except CorruptShardError as error:
        pinned_problem = str(error)
    study, study_problem = _study(store)
    labels = _labels(manifest) if labels is None else labels
    _, lost = find_origin(store, manifest)
    # Answers are those of the run, which is reported once.
    people = NO_PEOPLE if lost else read_people(store, is_rescoring=RESCORED_FROM in manifest)
    with _readable(store.address(METADATA)):
        page = render(
            store, manifest, title or manifest["name"], labels, evaluation, " ".join(problems), found, people,
            pinned=pinned, pinned_problem=pinned_problem, study=study, study_problem=study_problem,
        )  # fmt: skip
    (into or store).replace(REPORT, page)
    if into in (None, store) and (people.results or not people.problems):
        update_card(store, people.results)
    return lost


def _study(store: Store) -> tuple[StudyDocument | None, str]:
    """The study that a run is part of, and why it cannot be shown."""
    try:
        return read_study(store), ""
    except CorruptShardError as error:
        return None, str(error)


def _read_manifest(store: Store) -> dict[str, Any]:
    """The manifest, with all that the page needs of it.

    Raises:
        CorruptShardError: it is not the manifest of a run.
    """
    manifest = read_manifest(store)
    try:
        for place, kind in _NEEDED.items():
            value: Any = manifest
            for key in place.split("."):
                value = value[key]
            if not isinstance(value, kind):
                raise TypeError(f"{place} is not as it should be")
        if not _NAME.fullmatch(manifest["name"]):
            raise TypeError(f"name {manifest['name']!r} is not that of a job")
    except (TypeError, KeyError) as error:
        raise manifest_error(store, error) from error
    return manifest


@contextlib.contextmanager
def _readable(metadata: str) -> Iterator[None]:
    """Turn Arrow's errors about a damaged file into an error that names it."""
    import pyarrow as pa

    try:
        yield
    except (pa.ArrowException, OSError, TypeError, ValueError) as error:
        # Columns of another type fail where they are computed with.
        reason = first_line(error)
        raise CorruptShardError(f"{metadata}: cannot be read as the metadata of a run ({reason}); {_REMEDY}") from error


def render(
    store: Store,
    manifest: dict[str, Any],
    title: str,
    labels: list[str],
    evaluation: Evaluation | None = None,
    problem: str = "",
    found: FoundTwins | None = None,
    people: People = NO_PEOPLE,
    *,
    pinned: Comparison | None = None,
    pinned_problem: str = "",
    study: StudyDocument | None = None,
    study_problem: str = "",
) -> bytes:
    """The page; its gallery is halved until the page is below 10 MB.

    Args:
        problem: why there is no evaluation, where there should be one.
        found: twins that it found.
        people: what people say of the images.
        pinned: how the run differs from its baseline.
        pinned_problem: why that is not known, where it should be.
        study: that the run is part of.
        study_problem: why that is not known, where it should be.
    """
    path = store.fetch(METADATA, keep=True)
    sums, metadata = sum_rows(path), open_metadata(path)
    counted, totals = sums.outcomes, sums.totals.groups()
    some, places = read_some(path, {total.request: total.attempted for total in totals})
    table = with_twins(some, found)
    rows = make_rows(table, sums.texts)
    pairs = PairColumns(table, rows, places, path)
    names = distinct_names(names_by_index(counted, labels))
    context = {
        "title": title,
        **manifest_context(store, manifest, counted, names, rows),
        **_tables(sums, counted, totals, metadata, names),
        **_distributions(rows),
        "some_note": _some_note(len(rows), sums.num_rows),
        "evaluation": evaluation_context(evaluation, sums.num_rows),
        "evaluation_problem": problem,
        "tonight": None if pinned is None else _tonight(pinned, store, counted),
        "tonight_problem": pinned_problem,
        "study": None if study is None else study_context(study),
        "study_problem": study_problem,
        "people": people_context(people.results),
        "people_problems": people.problems,
        "adversarial_psnr": f"{ADVERSARIAL_PSNR_DB:g}",
        "perceptible_psnr": f"{PERCEPTIBLE_PSNR_DB:g}",
        "max_gain": MAX_GAIN_POWER,
        "style": page_style(),
        **_script(),
    }
    images, problem = _image_shards(store, manifest)
    context["image_problem"] = problem
    template, section = page_templates().get_template("report.html.j2"), pair_section(
        pairs, manifest, found, sums.num_rows
    )  # fmt: skip
    return _fitting(
        lambda limit: template.render(context | _gallery(images, metadata, pairs, counted, names, limit, section)),
        MAX_SAMPLES,
    )


def _some_note(num_rows: int, num_attempts: int) -> str:
    """What charts, pairs and gallery are made of, where that is not everything."""
    if num_rows == num_attempts:
        return ""
    return (
        f"Of {num_rows:,} of the {num_attempts:,} attempts, chosen evenly by their seeds, as are the pairs and the"
        " gallery. Counts and rates in tables are of all attempts; medians and quartiles there are read off a sketch of"
        " all. The same bins for every request; each curve is the share of its own request. A dotted line marks the"
        " median."
    )


def _image_shards(store: Store, manifest: dict[str, Any]) -> tuple[ImageShards, str]:
    """Where the images of the rows are, of a rescored folder those of its run, and why they are nowhere."""
    run, problem = find_origin(store, manifest)
    own = RESCORED_FROM not in manifest
    return ImageShards(run, manifest["name"], None if own else scored_shards(store) or None), problem


def _tonight(pinned: Comparison, store: Store, rows: Rows) -> dict[str, Any]:
    """The comparison with the baseline; it says where the run has grown since."""
    context = nights_context(pinned, limit=SECTION_SAMPLES, budget_bytes=SECTION_BUDGET_BYTES, address=store.uri)
    num_scored, stale = rows.count(rows.scored), ""
    if num_scored != pinned.new.num_samples:
        stale = (
            f"The comparison is of {pinned.new.num_samples:,} scored samples, and the run has {num_scored:,} now."
            f" `riskforge compare RUN --baseline {pinned.baseline}` compares again."
        )
    return context | {"stale": stale}


def _tables(
    sums: RowSums, rows: Rows, totals: list[GroupSummary], metadata: Dataset, names: dict[int, str]
) -> dict[str, Any]:
    """The tables that are made of the metadata."""
    return {
        "table": summary_table(sums.groups.groups(), totals),
        "min_p_valid": MIN_P_VALID,
        "min_oracle_p_label": MIN_ORACLE_P_LABEL,
        "units": units_text(target_first(by_rank(shown_scores(totals))), is_full=False),
        "classes": class_table(sums.class_groups(), rows, totals, names),
        "errors": _errors(rows, names),
        "failures": [(clip(message, MAX_MESSAGE_CHARS), count) for message, count in failures(metadata)],
        "gradients": gradient_table(sums.steps),
        "throughput": throughput_table(sums.speeds, sums.texts),
    }


def comparison_page(comparison: Comparison, limit: int) -> bytes:
    """The page of two runs that were compared; its images are halved in number until it is below 10 MB.

    Args:
        limit: samples of each kind that are shown.
    """
    template, style = page_templates().get_template("comparison.html.j2"), page_style()
    return _fitting(lambda limit: template.render(tonight=nights_context(comparison, limit=limit), style=style), limit)


def _fitting(render: Callable[[int], str], limit: int) -> bytes:
    """A page below 10 MB: what it shows is halved until it is."""
    while True:
        page = render(limit).encode()
        if len(page) <= MAX_BYTES or not limit:
            return page
        limit //= 2


def _labels(manifest: dict[str, Any]) -> list[str]:
    """The target's labels as the run noted them, else those of the model, or none where it is not on this machine.

    A factory is not asked: a report must not run code because a manifest names it.
    """
    target = manifest["models"].get("target")
    noted = target.get("labels") if isinstance(target, dict) else None
    if isinstance(noted, list) and all(isinstance(label, str) for label in noted):
        return noted
    address = manifest["job"]["models"]["target"]
    try:
        return [] if runs_code(address) else read_labels(address) or []
    except JobError:
        return []


def _script() -> dict[str, str]:
    """The page's script and its checksum for the content policy."""
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return {"script": Markup(script), "script_hash": f"sha256-{digest}"}


def _series(rows: Rows) -> tuple[list[int], list[str]]:
    """The requests that are drawn for themselves, and the names of all series: the last one may be all others."""
    first = list(range(len(rows.request.names)))[: MAX_SERIES if len(rows.request.names) > MAX_SERIES + 1 else None]
    num_others = len(rows.request.names) - len(first)
    return first, [rows.request.names[code] for code in first] + (
        [f"{num_others} other requests"] if num_others else []
    )


def _distributions(rows: Rows) -> dict[str, Any]:
    """Names of the series and the charts."""
    first, series = _series(rows)
    rest = len(series) > len(first)
    charts = []
    for score in rows.drawn_scores():
        values = [rows.scores_of(code, score.name) for code in first]
        if rest:  # All others as one series.
            values.append(rows.numbers[score.name][rows.scored & (rows.request.codes >= len(first))])
        charts.append({"score": score, "svg": histogram(score, list(zip(series, values, strict=True)))})
    return {"series": series, "charts": charts}


def _errors(rows: Rows, names: dict[int, str]) -> list[dict[str, Any]]:
    """Where the errors of samples go that may be pooled, prompt-only ones first: a confusion table, or pairs."""
    return [
        {"title": clip(title, 120), "confusion": _confusion(rows, names, here), "pairs": error_pairs(rows, names, here)}
        for title, here in samples_apart(rows)
        if (rows.scored & here).any()
    ]


def _confusion(rows: Rows, names: dict[int, str], among: np.ndarray) -> dict[str, Any] | None:
    """The confusion table with the style of each cell: the shade is its share of the row."""
    table = confusion(rows, names, among)
    if table is None:
        return None
    lines = []
    for name, counts, own in table.rows:
        shares = np.array(counts) / max(sum(counts), 1)
        styles = [_cell_style(float(share), place in own) for place, share in enumerate(shares)]
        cells = [{"count": f"{count:,}", "style": style} for count, style in zip(counts, styles, strict=True)]
        lines.append({"name": clip(name, 120), "cells": cells})
    return {"columns": [clip(name, 60) for name in table.columns], "lines": lines}


def _cell_style(share: float, is_own: bool) -> str:
    heat = "zero" if share == 0 else f"h{min(int(share * HEAT_LEVELS) + 1, HEAT_LEVELS)}"
    return f"{heat} own" if is_own else heat


def _gallery(
    shards: ImageShards,
    metadata: Dataset,
    pairs: PairColumns,
    counted: Rows,
    names: dict[int, str],
    limit: int,
    section: PairSection | None,
) -> dict[str, Any]:
    """What the template needs for the gallery, and for the pairs among its samples."""
    rows = pairs.rows
    chosen = select(rows, limit) if limit and len(rows) else []
    whole = read_samples(metadata, pairs.places[chosen].tolist())
    records = [record | pairs.of_twin(row) for row, record in zip(chosen, whole, strict=True)]
    keys = {row: record["key"] for row, record in zip(chosen, records, strict=True)}
    images = shards.find(pairs.placed(keys))
    if section is not None:
        in_pairs = set(choose_pairs(pairs, [row for row in chosen if keys[row] in images]))
        shown = {row: record for row, record in zip(chosen, records, strict=True) if row in in_pairs}
        duos = make_pairs(list(shown.values()), images, find_others(shards, pairs, shown), names)
        section = with_tiles(section, duos, len(in_pairs), int(pairs.has_any.sum()))
    budget = (IMAGE_BUDGET_BYTES - (PAIRS_BUDGET_BYTES if section else 0)) // max(len(chosen), 1)
    tiles = [make_tile(record, images.get(record["key"], b""), names, budget) for record in records]
    return {
        "duos": section,
        "groups": make_groups(rows, chosen, tiles, _per_request(counted)),
        "gallery_note": (
            f"{len(tiles):,} of {many(int(counted.weights.sum()), 'sample')}: of each request some from every part of"
            " the range of its main score (KLDB with a joint prompt, risk otherwise), and its extremes. Open one for"
            " its metadata; the arrow keys step through."
        ),
        "selects": _selects(tiles, names),
        "ranges": list(range_titles([tile.record for tile in tiles]).items()),
        "shapes": SHAPES,
        "scatter": scatter(rows, _series_of(rows), _series(rows)[1], keys),
        "scatter_note": _scatter_note(rows, counted.count(counted.scored), keys),
        "gallery_json": gallery_json(tiles, names),
    }


def _series_of(rows: Rows) -> np.ndarray:
    """The number of the series of each request."""
    first, _ = _series(rows)
    return np.minimum(np.arange(max(len(rows.request.names), 1)), len(first))


def _per_request(rows: Rows) -> dict[str, int]:
    """Samples of each request."""
    counts = np.bincount(rows.request.codes, rows.weights, minlength=len(rows.request.names))
    return {name: int(count) for name, count in zip(rows.request.names, counts, strict=True)}


def _scatter_note(rows: Rows, total: int, shown: dict[int, str]) -> str:
    drawn = num_drawn(rows, shown)
    which = f"All {many(total, 'scored sample')}" if drawn == total else f"{drawn:,} of {many(total, 'scored sample')}"
    return (
        f"{which}, a colour and a shape for each request. Wanted failures lie high and to the right: the target errs,"
        " and the image still looks like its class. Strong points are in the gallery below and open on a click."
    )


def _selects(tiles: list[Tile], names: dict[int, str]) -> list[dict[str, Any]]:
    """The filters of the gallery with their choices, classes in the order of labels; those without any are left out."""
    records = [tile.record for tile in tiles]
    place = {clip(name, 60): number for number, name in enumerate(names.values())}

    def distinct(texts: Iterable[str]) -> list[tuple[str, str]]:
        return [(text, text) for text in dict.fromkeys(texts) if text]

    def classes(texts: Iterable[str]) -> list[tuple[str, str]]:
        return distinct(sorted(texts, key=lambda text: (place.get(text, len(place)), text)))

    asked = sorted(tiles, key=lambda tile: (len(tile.classes) != 1, tile.classes))
    outcomes = {name for tile in tiles for name in tile.outcomes}
    contexts = distinct(tile.context or NO_CONTEXT for tile in tiles)
    choices = [
        ("sort", "Sort by", "Request", list(sort_titles(records).items())),
        ("request", "Request", "All", distinct(record["request"] for record in records)),
        ("class", "Class", "All", distinct(tile.conditioned for tile in asked)),
        ("context", "Context", "All", contexts if any(tile.context for tile in tiles) else []),
        ("target", "Target predicts", "All", classes(tile.predicted for tile in tiles)),
        ("oracle", _oracle_title(records), "All", classes(tile.oracle for tile in tiles)),
        ("outcome", "Outcome", "All", [(name, text) for name, text in OUTCOMES.items() if name in outcomes]),
        ("status", "Status", "All", distinct(record["status"] for record in records)),
    ]
    return [
        {"name": name, "title": title, "all": every, "options": options}
        for name, title, every, options in choices
        if options
    ]


def _oracle_title(records: list[dict[str, Any]]) -> str:
    return "Oracles predict" if any(len(independent(record)) > 1 for record in records) else "Oracle predicts"
