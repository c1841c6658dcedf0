"""Charts, gallery and tables of the report, drawn from a few rows whose places are known."""

from __future__ import annotations

import dataclasses
import math
import re
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engine.data.images.decode import decode_sample
from engine.job.columns import BY_NAME
from engine.job.partners import prompt_partners, unguided_partners
from engine.report import gallery, headline, render, scatter, stored_images
from engine.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    LOG_FLOOR,
    RIGHT,
    TOP,
    WIDTH,
    Axis,
    histogram,
    make_axis,
    nice_ticks,
)
from engine.report.data import Categories, Rows, error_pairs
from engine.report.lines import Line, Point, line_chart
from engine.report.partners import partner_table

LINEAR = dataclasses.replace(BY_NAME["conformity"])
POINT = re.compile(r'd="M([\d.]+) ([\d.]+)')


def rows_of(requests: list[str], **numbers: Any) -> Rows:
    """Rows of these requests, all scored; `numbers` are columns and masks."""
    names = list(dict.fromkeys(requests))
    size = len(requests)
    codes = np.array([names.index(name) for name in requests])
    whole = Categories(np.zeros(size, dtype=int), ["ok"])
    fills = {"scored": True, "target_errs": False, "oracle_agrees": True}
    masks = {name: np.array(numbers.pop(name, [fill] * size)) for name, fill in fills.items()}
    subsets = numbers.pop("subsets", [()] * len(names))
    status = numbers.pop("status", whole)
    return Rows(
        request=Categories(codes, names), class_name=whole, status=status, context=whole, worker=whole,
        label_valid=np.full(size, -1.0), weights=np.ones(size, dtype=int), guided=[False] * len(names),
        numbers={name: np.array(values) for name, values in numbers.items()}, subsets=subsets, **masks,
    )  # fmt: skip


# Histograms ----------------------------------------------------------------------------------------------------------


def test_bars_are_shares_that_rise_from_the_floor() -> None:
    """Three of four values in the first bin, one in the last: the path goes up by their shares of the highest."""
    svg = histogram(LINEAR, [("a", np.array([0.0, 0.0, 0.0, 1.0]))])
    heights = [float(text) for text in re.findall(r"V([\d.]+)H", svg)]
    floor, room = HEIGHT - BOTTOM, HEIGHT - TOP - BOTTOM
    assert heights[0] == pytest.approx(floor - room / 1.05, abs=0.1) and max(heights[1:-1]) == floor
    assert heights[-1] == pytest.approx(floor - room / 1.05 / 3, abs=0.1)
    rights = [float(text) for text in re.findall(r"H([\d.]+)", svg.partition('class="area"')[2])]
    assert rights == sorted(rights) and rights[-1] == WIDTH - RIGHT
    ticks = re.findall(r'text-anchor="end">([\d.]+)<', svg)
    assert ticks == ["0", "20", "40", "60"]


def test_two_series_are_shares_of_their_own_samples() -> None:
    """However many samples each has."""
    svg = histogram(LINEAR, [("few", np.array([0.0, 1.0])), ("many", np.tile([0.0, 1.0], 500))])
    first, second = (re.findall(r"V([\d.]+)H", part) for part in svg.split('data-series="1"'))
    assert first == second


def test_the_mark_is_at_the_median_and_names_are_text() -> None:
    svg = histogram(LINEAR, [("<b>", np.array([0.0, 0.25, 1.0]))])
    assert "&lt;b&gt;: median 0.25 cosine" in svg
    [x] = re.findall(r'class="median" d="M([\d.]+)', svg)
    assert float(x) == pytest.approx(LEFT + 0.25 * (WIDTH - LEFT - RIGHT), abs=0.1)


def test_a_logarithmic_axis_spans_whole_decades_around_its_values() -> None:
    axis = make_axis(np.array([0.02, 30.0]), True)
    assert (axis.edges[0], axis.edges[-1]) == (-2.0, 2.0) and axis.value(2.0) == 100.0
    assert axis.ticks() == [(-2.0, "0.01"), (-1.0, "0.1"), (0.0, "1"), (1.0, "10"), (2.0, "100")]
    assert make_axis(np.array([0.0, 1.0]), True).ticks()[0] == (math.log10(LOG_FLOOR), "≤ 0.001")


def test_a_single_value_has_an_axis_around_it() -> None:
    axis = make_axis(np.full(3, 0.25), False)
    assert axis.edges[0] < 0.25 < axis.edges[-1]


def test_values_beyond_an_axis_go_to_its_end() -> None:
    axis = Axis(np.linspace(0.0, 1.0, 5), False)
    assert axis.place(np.array([-1.0, 0.5, 7.0])).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0.0, 1.0, [0.0, 0.5, 1.0]), (0.0, 0.6, [0.0, 0.2, 0.4, 0.6]), (-3.0, 17.0, [0.0, 5.0, 10.0, 15.0])],
)
def test_ticks_are_round_numbers_inside(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high, 4) == ticks


# Scatter -------------------------------------------------------------------------------------------------------------


def scatter_of(rows: Rows, shown: dict[int, str]) -> dict[int, list[tuple[float, float]]]:
    """Places of the points by series, those of the gallery first."""
    names = rows.request.names
    svg = scatter.scatter(rows, np.arange(len(names)), names, shown)
    parts = re.split(r'class="dots s\d+" data-series="', svg)[1:]
    return {int(part[0]): [(float(x), float(y)) for x, y in re.findall(r"M([\d.]+) ([\d.]+)m", part)] for part in parts}


def test_risk_goes_up_and_conformity_to_the_right() -> None:
    rows = rows_of(["a", "a"], conformity=[0.1, 0.3], risk=[0.01, 10.0])
    [low, high] = scatter_of(rows, {})[0]
    assert low == (scatter.LEFT, scatter.HEIGHT - scatter.BOTTOM)
    assert high == (scatter.WIDTH - scatter.RIGHT, scatter.TOP)


def test_every_sample_is_one_point_of_its_series() -> None:
    """That of the gallery is drawn for itself, and not again among the others; series are those that are passed."""
    rows = rows_of(["a", "b", "c", "b"], conformity=[0.1, 0.2, 0.3, 0.4], risk=[1.0] * 4)
    points = scatter_of(rows, {1: "key"})
    assert {place: len(some) for place, some in points.items()} == {0: 1, 1: 2, 2: 1}
    svg = scatter.scatter(rows, np.array([0, 1, 1]), ["a", "others"], {1: "key"})
    assert svg.count('data-key="key"') == 1 and svg.count("data-series") == 2
    assert len(re.findall(r"M[\d.]+ [\d.]+m", svg.split('data-series="1"')[1])) == 3


def test_samples_of_the_gallery_are_always_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scatter, "MAX_POINTS", 10)
    rows = rows_of(["a"] * 200, conformity=np.linspace(0, 1, 200), risk=np.ones(200))
    shown = {row: str(row) for row in (7, 91, 133)}
    chosen = scatter._choose(rows, np.zeros(200, dtype=int), shown)
    assert set(shown) <= set(chosen) and len(chosen) == 10 == scatter.num_drawn(rows, shown)


# Gallery -------------------------------------------------------------------------------------------------------------


def test_the_gallery_goes_from_high_to_low_and_keeps_both_ends() -> None:
    """Of samples without an image at most one in eight."""
    size = 100
    status = Categories(np.where(np.arange(size) < 50, 1, 0), ["ok", "failed"])
    rows = rows_of(["a"] * size, risk=np.arange(size, dtype=float), kldb=np.zeros(size), status=status)
    chosen = gallery.select(rows, 16)
    images, others = [row for row in chosen if row >= 50], [row for row in chosen if row < 50]
    assert len(others) == 2 and 12 <= len(images) <= 14
    assert images == sorted(images, reverse=True) and (images[0], images[-1]) == (99, 50)


def test_extremes_are_kept_at_both_ends() -> None:
    """Not the two outermost samples alone: an eighth of the quota each."""
    chosen = gallery._spread(np.arange(1000), np.arange(1000, dtype=float), 32)
    assert chosen[:4] == [999, 998, 997, 996] and {0, 1, 2, 3} <= set(chosen) and len(chosen) <= 32


def test_a_tiny_image_beyond_its_budget_becomes_a_smaller_file() -> None:
    import io

    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 90, 3), dtype=np.uint8)).save(buffer, "PNG")
    uri, is_tiny = gallery.thumbnail(buffer.getvalue(), 8000)
    assert uri.startswith("data:image/jpeg") and is_tiny and len(uri) < 8000 * 4 / 3 + 50
    assert decode_sample(buffer.getvalue()).size == (90, 90)


def test_soft_labels_are_named_by_their_class() -> None:
    names = {0: "zero", 1: "one", 2: "two"}
    assert gallery._field_text("soft_label", [0.0, 0.5, 0.5], names) == "one 0.5, two 0.5"


def test_the_gallery_sorts_by_the_judges_own_score() -> None:
    record = {"risk": 1.0, "conformity": 0.1, "judge": [{"model": "m", "conformity": 0.4, "conformity_margin": 0.2}]}
    scores = gallery.sort_scores(record)
    assert scores["conformity"] == 0.1 and scores["judge_conformity"] == 0.4


# Tables and series ---------------------------------------------------------------------------------------------------


def test_the_shade_of_a_cell_is_its_share() -> None:
    styles = [render._cell_style(share, False) for share in (0.0, 0.01, 0.25, 0.99, 1.0)]
    assert styles == ["zero", "h1", "h2", "h4", "h4"] and render._cell_style(1.0, True) == "h4 own"


def test_a_confusion_row_is_shaded_by_its_own_sum() -> None:
    """Not by its largest count."""
    rows = rows_of(["a"] * 4, class_index=[0] * 4, predicted_class=[0, 1, 0, 1])
    table = render._confusion(rows, {0: "zero", 1: "one"}, np.ones(len(rows), dtype=bool))
    assert table is not None
    assert [cell["style"] for cell in table["lines"][0]["cells"]] == ["h3 own", "h3"]


def test_requests_beyond_the_colours_are_one_series() -> None:
    """The last one, with the samples of all of them."""
    num = render.MAX_SERIES + 3
    requests = [f"r{place}" for place in range(num)]
    scores = {name: np.ones(num) for name in ("risk", "kldb", "conformity", "entropy")}
    rows = rows_of(requests, **scores)
    first, names = render._series(rows)
    assert first == list(range(render.MAX_SERIES)) and names[-1] == "3 other requests"
    assert render._series_of(rows).tolist() == [*range(render.MAX_SERIES), *[render.MAX_SERIES] * 3]
    drawn: list[list[int]] = []
    original = render.histogram
    try:
        render.histogram = lambda score, series: drawn.append([len(values) for _, values in series])  # type: ignore
        render._distributions(rows)
    finally:
        render.histogram = original
    assert drawn and all(counts == [*[1] * render.MAX_SERIES, 3] for counts in drawn)


def test_a_factory_is_not_asked_for_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report runs no code because a manifest names it; labels that the run noted come first."""
    monkeypatch.setattr(render, "read_labels", lambda address: [address])
    manifest = {"models": {"target": {}}, "job": {"models": {"target": "module:factory"}}}
    assert render._labels(manifest) == []
    assert render._labels(manifest | {"job": {"models": {"target": "zoo:t"}}}) == ["zoo:t"]
    assert render._labels(manifest | {"models": {"target": {"labels": ["a"]}}}) == ["a"]


def test_the_policy_admits_the_script_of_the_page_alone() -> None:
    import base64
    import hashlib

    made = render._script()
    digest = base64.b64encode(hashlib.sha256(str(made["script"]).encode()).digest()).decode()
    assert made["script_hash"] == f"sha256-{digest}"


def test_scores_and_the_main_score_are_of_scored_samples_and_the_kind_of_request() -> None:
    rows = rows_of(["a", "a", "b"], risk=[1.0, 2.0, 3.0], scored=[True, False, True], subsets=[(), (3, 8)])
    assert rows.scores_of(0, "risk").tolist() == [1.0]
    assert [rows.main_score(code).name for code in (0, 1)] == ["risk", "kldb"]


def test_the_most_frequent_errors_come_first() -> None:
    rows = rows_of(["a"] * 4, class_index=[0, 1, 1, 2], predicted_class=[1, 2, 2, 2], target_errs=[True] * 3 + [False])
    assert error_pairs(rows, {0: "zero", 1: "one", 2: "two"}, np.ones(len(rows), dtype=bool)) == [
        ("one", "two", 2),
        ("zero", "one", 1),
    ]


def test_a_partner_is_the_first_plain_request_of_the_group() -> None:
    """Neither one that is conditioned on embeddings, nor a guided one."""
    plain = {"method": "prompt", "seed_group": "g"}
    requests = [
        {"name": "embedded", "conditioning": "x"} | plain,
        {"name": "first"} | plain,
        {"name": "second"} | plain,
        {"name": "guided", "method": "risky", "seed_group": "g"},
        {"name": "alone", "method": "risky"},
    ]
    assert prompt_partners(requests) == [("embedded", "first"), ("guided", "first")]


def test_partners_share_their_start() -> None:
    """Of images and strength; at strength 1 the images are left out, so it is none."""
    start = {"images": "photographs", "strength": 0.5}
    plain = {"method": "prompt", "seed_group": "g"}
    guided = {"method": "risky", "seed_group": "g"}
    requests = [
        {"name": "noise"} | plain,
        {"name": "half", "start": start} | plain,
        {"name": "from-noise"} | guided,
        {"name": "from-half", "start": start} | guided,
        {"name": "from-whole", "start": start | {"strength": 1.0}} | guided,
        {"name": "from-other", "start": start | {"images": "others"}} | guided,
    ]
    expected = [("from-noise", "noise"), ("from-half", "half"), ("from-whole", "noise")]
    assert prompt_partners(requests) == expected


def test_an_unguided_partner_differs_in_guidance_alone() -> None:
    """Sampling that is stated and the job's own are the same; embeddings pair with embeddings."""
    plain = {"method": "prompt", "seed_group": "g"}
    guided = {"method": "risky", "seed_group": "g"}
    requests = [
        {"name": "plain"} | plain,
        {"name": "again", "sampling": {"eta": 0.0}} | plain,
        {"name": "embedded", "conditioning": {"artefact": "a"}} | plain,
        {"name": "long", "sampling": {"num_inference_steps": 50}} | plain,
        {"name": "one", "twin": False} | guided,
        {"name": "two", "conditioning": {"artefact": "a"}} | guided,
        {"name": "three", "conditioning": {"artefact": "b"}} | guided,
        {"name": "four", "diffusion": "other"} | guided,
        {"name": "five", "diffusion": "own", "sampling": {"num_inference_steps": 50}} | guided,
        {"name": "six", "method": "prompt"},
    ]
    job = {"models": {"diffusion": "own"}, "sampling": {"num_inference_steps": 20, "eta": 0.0}, "requests": requests}
    assert unguided_partners(job) == {"one": ["plain", "again"], "two": ["embedded"], "five": ["long"]}


def test_partners_are_pairs_of_one_seed() -> None:
    """Whatever the order and the number of samples on either side."""
    seeds, risk = [1, 2, 3, 3, 1], [10.0, 20.0, 30.0, 1.0, 2.0]
    rows = rows_of(["guided", "guided", "guided", "plain", "plain"], seed=seeds, risk=risk)
    requests = [{"name": "plain", "method": "prompt", "seed_group": "g"},
                {"name": "guided", "method": "risky", "seed_group": "g"}]  # fmt: skip
    table = partner_table(rows, requests)
    assert table is not None
    assert table.lines[0].cells == [("2", ""), ("100.0 %", "+18.5")]


def test_a_cell_has_the_median_and_below_it_the_quartiles() -> None:
    group: Any = SimpleNamespace(scores={"kldb": SimpleNamespace(q25=1.0, median=2.0, q75=3.0)})
    assert headline._quartiles("kldb", group) == ("2.000", "1.000 to 3.000")
    assert headline._median("kldb", group) == ("2.000", "")


def test_images_are_looked_for_in_the_shard_of_their_row(monkeypatch: pytest.MonkeyPatch) -> None:
    """Failed samples have rows, too; the first row after a shard is of the next one."""
    counts = [SimpleNamespace(counts=SimpleNamespace(attempted=4, ok=2)) for _ in range(3)]
    monkeypatch.setattr(stored_images, "list_commits", lambda store: dict(enumerate(counts)))
    asked: dict[str, set[str]] = {}
    monkeypatch.setattr(stored_images, "StoredFile", lambda store, name: name)
    monkeypatch.setattr(stored_images, "TarReader", lambda tars: None)
    monkeypatch.setattr(stored_images, "_places", lambda tar, number, keys: asked.update({tar: keys}) or {})
    stored_images.find_images(None, "job", {0: "a", 3: "b", 4: "c", 11: "d"})  # type: ignore[arg-type]
    assert [sorted(keys) for keys in asked.values()] == [["a", "b"], ["c"], ["d"]]
    assert [re.sub(r"\D", "", name).lstrip("0") for name in asked] == ["", "1", "2"]


def test_only_image_files_of_the_wanted_samples_are_images(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [("a.json", 0, 1), ("a.png", 2, 3), ("b.png", 4, 5), ("c.cls", 6, 7)]
    monkeypatch.setattr(stored_images, "tar_entries", lambda path: iter(entries))
    places = stored_images._places(SimpleNamespace(fetch=lambda: None), 1, {"a", "c"})  # type: ignore[arg-type]
    assert {key: (place.offset, place.size) for key, place in places.items()} == {"a": (2, 3)}


def test_lines_have_a_band_each_and_escape_what_others_wrote():
    """A single round shows as a dot; series without a point are left out and keep the colours of the others."""
    points = tuple(Point(x, x / 2, x / 2 - 0.1, x / 2 + 0.1) for x in range(3))
    lines = [Line("a<b", 0, points), Line("none", 1, ()), Line("one", 8, (Point(0, 5.0, 5.0, 5.0),))]
    svg = str(line_chart(lines, title='"x"', x_title="round", y_title="reward", mark=1.0))
    assert svg.count('class="band"') == 2 and svg.count("<circle") == 4 and "line s1" in svg
    assert "a&lt;b" in svg and "a<b" not in svg and "&#34;x&#34;" in svg
    assert all(0 <= float(y) <= HEIGHT for y in re.findall(r'cy="([-0-9.]+)"', svg))
    # The higher value is drawn above.
    heights = [float(y) for y in re.findall(r'cy="([-0-9.]+)"', svg)]
    assert heights[3] < heights[2] < heights[1] < heights[0]
    assert "Not measured" in str(line_chart([], title="", x_title="", y_title=""))
