"""Samples beside their starts and unguided twins, as every reader has them: `twins.parquet`, `pairs()`, exports."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest

import engine
from engine.data.reading.export import export
from engine.data.reading.export_options import ExportOptions
from engine.data.reading.inspection import inspect
from engine.data.run.commits import read_commits
from engine.data.run.file_names import METADATA, TWINS_TABLE
from engine.data.run.foreign_files import sort_files
from engine.data.run.shards import read_shard
from engine.data.run.summary import shown_scores
from engine.data.run.twins_table import FoundTwins, twins_table, write_twins
from engine.data.run.verify import verify
from engine.data.stores.base import Store
from engine.data.stores.opening import open_store
from engine.driver.progress import PlainDisplay, medians_table
from engine.errors import CorruptShardError, JobError
from engine.job.columns import BY_NAME, EQUAL_PSNR_DB, TWIN_COLUMNS, Role, columns_with
from engine.methods.scores import MAX_PSNR_DB
from engine.report.pair_tiles import PAIRS_BUDGET_BYTES, SIDES
from engine.report.pairs import MAX_PAIRS
from engine.report.render import MAX_BYTES, write_report
from engine.studies.compare.program import compare_runs
from engine.studies.compare.scored_run import read_scored_run
from engine.studies.evaluate.options import EvaluateOptions
from engine.studies.evaluate.program import evaluate
from engine.terminal import safe_console
from tests.corpus_cases import make_run
from tests.pair_cases import GROUP, make_drawn_run, make_real_run, noise

NO_PAIRS = "none of the .* selected samples has a start or an unguided twin"
PAIRED = [column.name for column in columns_with(Role.INSPECTED) if column.name.startswith(("twin_", "start_"))]
NBSP = "\N{NO-BREAK SPACE}"
Row = dict[str, Any]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run; one request has twins of its own, two have them among the samples of others."""
    return make_real_run(tmp_path_factory.mktemp("pairs") / "run")


@pytest.fixture(scope="module")
def evaluated(run: Path) -> Path:
    """A copy of the run after an evaluation."""
    copy = shutil.copytree(run, run.parent / "evaluated")
    found = evaluate(str(copy), EvaluateOptions(), display=PlainDisplay(io.StringIO()))
    assert found.twins == str(copy / TWINS_TABLE) and found.num_twins == 6
    return copy


@pytest.fixture
def copy(evaluated: Path, tmp_path: Path) -> Path:
    return shutil.copytree(evaluated, tmp_path / "copy")


def rows_of(run: Path) -> dict[str, Row]:
    return {row["key"]: row for row in pq.read_table(run / METADATA).to_pylist()}


def images_of(run: Path, folder: str = "shards") -> dict[str, bytes]:
    return {key: image for tar in sorted((run / folder).glob("*.tar")) for key, image, _, _ in read_shard(tar)}


def pixels(image: PIL.Image.Image | bytes) -> bytes:
    opened = PIL.Image.open(io.BytesIO(image)) if isinstance(image, bytes) else image
    return opened.convert("RGB").tobytes()


def section_of(store: Store) -> str:
    write_report(store)
    page = store.path("report.html").read_text()
    return re.findall(r'<section id="pairs">.*?</section>', page, re.DOTALL)[0]


# Absent values -------------------------------------------------------------------------------------------------------


def test_a_score_without_a_second_image_is_unknown_to_filters(run: Path) -> None:
    """Neither a comparison nor its opposite selects it; what is stored stays what it is."""
    corpus, rows = engine.open_run(str(run)), rows_of(run).values()
    for name in ("twin_psnr_db", "twin_distance", "twin_risk", "start_distance"):
        known = [row for row in rows if row[name] != -1]
        assert 0 < len(known) < len(rows)
        for condition in (f"{name} > -5", f"{name} < 500", f"not {name} > 500", f"{name} != 3", f"{name} not in [3]"):
            assert len(corpus.filter(condition)) == len(known), condition
        assert len(corpus.filter(f"{name} < 0")) == len(corpus.filter(f"{name} == -1")) == 0
        assert sorted(corpus.to_table([name])[name].to_pylist()) == sorted(row[name] for row in rows)
    assert len(corpus.filter("twin_predicted_class != 99")) == sum(bool(row["twin_key"]) for row in rows)
    # Of a sample without a start the strength is known.
    assert len(corpus.filter("strength == 1")) == sum(not row["start_key"] for row in rows) > 0


def test_medians_and_quantiles_leave_absent_values_out(run: Path) -> None:
    """A request without them has a dash, and no value in documents."""
    inspected, rows = inspect(engine.open_run(str(run))), list(rows_of(run).values())
    for group in inspected.groups:
        for name in ("twin_psnr_db", "twin_distance", "start_distance"):
            values = [row[name] for row in rows if row["request"] == group.request and row[name] != -1]
            spread = group.scores[name]
            assert (spread is None) == (not values)
            assert spread is None or spread.median == pytest.approx(np.median(values))
    for name in PAIRED:
        values = [row[name] for row in rows if row[name] != -1]
        assert inspected.document["quantiles"][name][0] == min(values)
        assert inspected.document["quantiles"][name][3] == pytest.approx(np.median(values))
    by_request = {group["request"]: group for group in inspected.document["groups"]}
    assert "twin_psnr_db" in by_request["own"] and "twin_psnr_db" not in by_request["plain"]
    stream = io.StringIO()
    safe_console(stream, width=140).print(medians_table(inspected.groups))
    [line] = [line for line in stream.getvalue().splitlines() if line.split()[:1] == ["between"]]
    assert line.split().count("-") >= 3
    manifest = json.loads((run / "manifest.json").read_text())
    assert [group.get("twin_psnr_db", 1) for group in manifest["summary"]] == [
        pytest.approx(group.get("twin_psnr_db", 1)) for group in inspected.document["groups"]
    ]
    assert "-1" not in (run / "README.md").read_text().partition("## Columns")[0].partition("PSNR to the twin")[2]


def test_a_run_without_pairs_has_no_columns_of_them(tmp_path: Path) -> None:
    """Neither tables, nor card, nor page, nor what the gallery sorts by."""
    plain = {name: value for name, value in GROUP.items() if name != "start"}
    store = make_drawn_run(tmp_path / "run", [{"name": "plain", "method": "prompt"} | plain], noise(8, levels=2))
    write_report(store)
    inspected = inspect(engine.open_run(store.uri))
    shown = {column.name for column in shown_scores(inspected.groups)}
    assert not shown & {"twin_psnr_db", "twin_distance", "start_distance"} and "risk" in shown
    assert not shown_scores([])[-1].is_optional and not set(PAIRED) & set(inspected.document["quantiles"])
    assert "pairs" not in inspected.document
    page = store.path("report.html").read_text()
    card = store.path("README.md").read_text().partition("## Columns")[0]
    for title in (BY_NAME[name].title for name in PAIRED):
        assert title not in page and title.lower() not in card.lower()
    assert 'id="pairs"' not in page and '<option value="twin' not in page
    with pytest.raises(JobError, match=NO_PAIRS):
        engine.open_run(store.uri).pairs()


def test_comparisons_leave_absent_values_out(tmp_path: Path) -> None:
    """Of runs with twins, and of two of which one has none."""
    request = {"name": "own", "method": "risky", "twin": True, "classes": [3], "count": 9}
    far = make_drawn_run(tmp_path / "far", [request], noise(8, levels=8))
    near = make_drawn_run(tmp_path / "near", [request], noise(8, levels=2))
    without = make_drawn_run(tmp_path / "without", [request | {"twin": False}], noise(8, levels=2))
    runs = [read_scored_run(store.uri) for store in (far, near, without)]
    [row, *_] = compare_runs(runs[0], runs[1]).rows
    change = row.differences["twin_psnr_db"]
    assert (change.old, change.new) == (pytest.approx(30.07, abs=0.01), pytest.approx(42.11, abs=0.01))
    assert "start_distance" not in row.differences and "risk" in row.differences
    [row, *_] = compare_runs(runs[1], runs[2]).rows
    assert "twin_psnr_db" not in row.differences and "risk" in row.differences


# Twins that an evaluation finds --------------------------------------------------------------------------------------


def test_found_twins_are_what_a_twin_would_have_recorded(evaluated: Path) -> None:
    """Request `found` is `own` without `twin: true`, so its samples are the same, and so are their twins."""
    rows, table = rows_of(evaluated), pq.read_table(evaluated / TWINS_TABLE)
    found = {row["key"]: row for row in table.to_pylist()}
    assert table.column_names == ["key", *TWIN_COLUMNS]
    assert Counter(rows[key]["request"] for key in found) == {"found": 4, "between": 2}
    own = {row["seed"]: row for row in rows.values() if row["request"] == "own"}
    images = images_of(evaluated)
    for key, row in found.items():
        twin = rows[row["twin_key"]]
        assert (twin["seed"], twin["prompt"], twin["method"]) == (rows[key]["seed"], rows[key]["prompt"], "prompt")
        if rows[key]["request"] == "found":
            same = own[rows[key]["seed"]]
            assert images[key] == images[same["key"]]
            assert images[row["twin_key"]] == images_of(evaluated, "twins")[same["key"]]
            for name in ("twin_psnr_db", "twin_predicted_class", "twin_risk"):
                assert row[name] == same[name]
            # The rows of a batch of CLIP move its last digits.
            assert row["twin_distance"] == pytest.approx(same["twin_distance"], abs=1e-5)


def test_found_twins_win_over_none_alone(copy: Path) -> None:
    """A row that has a twin of its own keeps it, whatever the table says of its key."""
    rows, path = rows_of(copy), copy / TWINS_TABLE
    table, own = pq.read_table(path), next(row for row in rows.values() if row["request"] == "own")
    foreign = table.to_pylist()[0] | {"key": own["key"], "twin_psnr_db": 1.0}
    pq.write_table(type(table).from_pylist([*table.to_pylist(), foreign], schema=table.schema), path)
    pairs = {pair.key: pair.record for pair in engine.open_run(str(copy)).pairs()}
    assert {name: pairs[own["key"]][name] for name in TWIN_COLUMNS} == {name: own[name] for name in TWIN_COLUMNS}


@pytest.mark.parametrize("version", [1, 3])
def test_a_run_of_an_earlier_version_has_found_twins(tmp_path: Path, version: int) -> None:
    """Its rows lack the columns, which readers and page take from the table."""
    uri = make_run(tmp_path / "run", version=version)
    store, rows = open_store(str(uri)), list(rows_of(uri).values())
    stored = [row for row in rows if row["sha256"] and row["accepted"]]
    assert "twin_key" not in rows[0]
    fields = {"twin_psnr_db": 45.0, "twin_distance": 0.25, "twin_predicted_class": 1, "twin_risk": 0.5}
    found = [{"key": row["key"], "twin_key": stored[-1]["key"]} | fields for row in stored[:5]]
    digest = json.loads((uri / "manifest.json").read_text())["plan_digest"]
    write_twins(store, FoundTwins(rows=twins_table(found), plan_digest=digest, num_attempts=len(rows), clip="a"))
    pairs = list(engine.open_run(str(uri)).pairs())
    assert [pair.key for pair in pairs] == [row["key"] for row in stored[:5]]
    for pair in pairs:
        assert {name: pair.record[name] for name in fields} == fields and pair.start is None
        assert pair.twin is not None and pixels(pair.twin) == pixels(images_of(uri)[stored[-1]["key"]])
    section = section_of(store)
    assert "<b>between:</b> 5 samples with a twin, median PSNR 45.0 dB: people hardly tell" in section
    assert "Distance to the twin" in section and "Distance to the start" not in section
    assert section.count("data-twin_psnr_db") == 5 and "zoo:c, of twins that an evaluation found a" in section


def test_the_table_belongs_to_the_run(evaluated: Path, run: Path) -> None:
    store = open_store(str(evaluated))
    own, foreign = sort_files(store, "pairs")
    assert TWINS_TABLE in own and not foreign and not verify(store).findings
    # A run that nobody evaluated has its own twins alone.
    requests = Counter(pair.record["request"] for pair in engine.open_run(str(run)).pairs() if pair.twin)
    assert requests == {"own": 4}


def test_an_evaluation_without_twins_takes_an_old_table_away(copy: Path) -> None:
    """It would be that of a run with other requests."""
    from engine.studies.evaluate import twins

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(twins, "unguided_partners", lambda job: {})
        evaluate(str(copy), EvaluateOptions(), display=PlainDisplay(io.StringIO()))
    assert not (copy / TWINS_TABLE).exists()


@pytest.mark.parametrize("damage", ["cut", "pipe", "other-run", "column", "twice", "infinite"])
def test_a_damaged_table_is_refused_by_name(copy: Path, damage: str) -> None:
    """`verify` and the page say so, and the page is there nevertheless."""
    path = copy / TWINS_TABLE
    table = pq.read_table(path)
    about = table.schema.metadata
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:200])
    elif damage == "pipe":
        path.unlink()
        os.mkfifo(path)
    elif damage == "other-run":
        about = {key: value.replace(b'"plan_digest": "', b'"plan_digest": "0') for key, value in about.items()}
        pq.write_table(table.replace_schema_metadata(about), path)
    elif damage == "column":
        pq.write_table(table.drop_columns(["twin_risk"]), path)
    else:
        rows = table.to_pylist()
        rows += rows[:1] if damage == "twice" else []
        rows[0]["twin_risk"] = float("inf") if damage == "infinite" else 1.0
        pq.write_table(type(table).from_pylist(rows, schema=table.schema), path)
    with pytest.raises(CorruptShardError, match=r"twins\.parquet: cannot be read as the twins of this run"):
        engine.open_run(str(copy)).pairs()
    store = open_store(str(copy))
    assert [finding.kind for finding in verify(store).findings] == ["damage"]
    if damage not in ("cut", "pipe"):
        return
    write_report(store)
    page = (copy / "report.html").read_text()
    assert "cannot be read as the twins of this run" in page and 'id="pairs"' in page


def test_the_page_says_that_the_run_went_on(copy: Path) -> None:
    path = copy / TWINS_TABLE
    table = pq.read_table(path)
    about = {
        key: value.replace(b'"num_attempts": 20', b'"num_attempts": 10') for key, value in table.schema.metadata.items()
    }
    assert about != table.schema.metadata
    pq.write_table(table.replace_schema_metadata(about), path)
    write_report(open_store(str(copy)))
    assert "when the run had 10 attempts; there are 20 now" in (copy / "report.html").read_text()


# Reading -------------------------------------------------------------------------------------------------------------


def test_pairs_are_the_stored_images(evaluated: Path) -> None:
    """Own twins and starts from their tars, found twins from the samples, with the columns that belong to them."""
    rows, samples, twins = rows_of(evaluated), images_of(evaluated), images_of(evaluated, "twins")
    starts, seen = images_of(evaluated, "starts"), Counter[str]()
    for pair in engine.open_run(str(evaluated)).pairs():
        row = rows[pair.key]
        seen[row["request"]] += 1
        assert pair.record["key"] == pair.key and pixels(pair.image) == pixels(samples[pair.key])
        assert (pair.start is not None) == bool(row["start_key"])
        assert pair.start is None or pixels(pair.start) == pixels(starts[pair.key])
        if row["request"] in ("own", "found", "between"):
            twin = twins[pair.key] if row["request"] == "own" else samples[pair.record["twin_key"]]
            assert pair.twin is not None and pixels(pair.twin) == pixels(twin)
            assert pair.record["twin_psnr_db"] > 0
        else:
            assert pair.twin is None and pair.record["twin_psnr_db"] == -1
    assert seen == {"own": 4, "found": 4, "other": 2, "worded": 2, "plain": 4, "between": 2}


def test_pairs_of_a_filter_over_several_runs(evaluated: Path, tmp_path: Path) -> None:
    other = make_drawn_run(
        tmp_path / "drawn", [{"name": "own", "method": "risky", "twin": True} | GROUP], noise(8, levels=2)
    )
    corpus = engine.open_run(str(evaluated), other.uri)
    keys = [pair.key for pair in corpus.filter("request == 'own' and class_index == 3").pairs()]
    assert [key.partition("-")[0] for key in keys] == ["pairs"] * 2 + ["drawn"] * 3
    with pytest.raises(JobError, match=NO_PAIRS):
        corpus.filter("request == 'between-plain'").pairs()
    # Nothing is read before it is asked for.
    assert next(corpus.pairs()).key


def test_pairs_of_an_object_store(s3_server: str, evaluated: Path) -> None:
    """Copied file by file into a bucket, as by `aws s3 sync`."""
    from tests.s3_cases import BUCKET, connected

    connected("pairs").client.fs.put(f"{evaluated}/", f"{BUCKET}/pairs/", recursive=True)
    ours, theirs = (engine.open_run(uri).pairs() for uri in (str(evaluated), f"s3://{BUCKET}/pairs"))
    for one, other in zip(ours, theirs, strict=True):
        assert (one.key, pixels(one.image), one.record) == (other.key, pixels(other.image), other.record)
        for name in ("twin", "start"):
            first, second = getattr(one, name), getattr(other, name)
            assert (first is None) == (second is None) and (first is None or pixels(first) == pixels(second))


@pytest.mark.parametrize("folder", ["twins", "starts"])
@pytest.mark.parametrize("damage", ["folder", "member", "image"])
def test_missing_and_broken_images_are_refused_by_name(copy: Path, tmp_path: Path, folder: str, damage: str) -> None:
    """By readers and exports, of which nothing is left; the page leaves the pair out."""
    tars = sorted((copy / folder).glob("*.tar"))
    if damage == "folder":
        shutil.rmtree(copy / folder)
    elif damage == "member":
        tars[0].unlink()
    else:
        data = tars[0].read_bytes()
        place = data.index(b"IDAT")
        tars[0].write_bytes(data[: place + 4] + bytes(40) + data[place + 44 :])
    what = {"folder": f"has no tar in {folder}/", "member": "no tar has the image of", "image": "is damaged"}[damage]
    with pytest.raises(CorruptShardError, match=f"{what}.*riskforge verify"):
        list(engine.open_run(str(copy)).pairs())
    with pytest.raises(CorruptShardError, match=what):
        export((str(copy),), ExportOptions(output=str(tmp_path / "out"), format="pairs"))
    assert not (tmp_path / "out").exists()
    if damage == "member":
        return
    section = section_of(open_store(str(copy)))
    if damage == "folder":
        # The sample itself is not taken for its twin.
        [own] = re.findall(r'<h3 data-request="own">.*?<h3', section, re.DOTALL)
        assert f'data-kind="{folder}"' not in own and 'data-kind="sample"' in own
    assert damage != "image" or "could not be read" in section


# Inspecting and exporting --------------------------------------------------------------------------------------------


def test_inspect_shows_starts_and_twins(evaluated: Path, call: Any, tmp_path: Path) -> None:
    code, out, _ = call("inspect", evaluated)
    assert not code and "with a start 16, with an unguided twin 10" in out
    [key] = [row["key"] for row in rows_of(evaluated).values() if row["request"] == "found"][:1]
    twin = {row["key"]: row for row in pq.read_table(evaluated / TWINS_TABLE).to_pylist()}[key]
    for which, expected in (
        ("start", images_of(evaluated, "starts")[key]),
        ("twin", images_of(evaluated)[twin["twin_key"]]),
    ):
        code, out, _ = call("inspect", evaluated, "--key", key, "--save", tmp_path / f"{which}.png", "--image", which)
        assert not code and (tmp_path / f"{which}.png").read_bytes() == expected
        assert f"{'twin_key':<20} {twin['twin_key']}" in out
    key = next(key for key, row in rows_of(evaluated).items() if row["request"] == "between-plain")
    code, _, err = call("inspect", evaluated, "--key", key, "--save", tmp_path / "x.png", "--image", "twin")
    assert code and f"--image: no twin of '{key}' is stored" in err and not (tmp_path / "x.png").exists()
    code, _, err = call("inspect", evaluated, "--key", key, "--image", "start")
    assert code and "--image start: says what --save writes" in err


def test_inspect_shows_the_beginning_of_a_long_text(copy: Path, call: Any) -> None:
    """Names of images are their owners'; JSON has them whole."""
    table = pq.read_table(copy / METADATA)
    place = table.column_names.index("start_key")
    texts = ["\x1b" + "k" * 5000] * len(table)
    pq.write_table(table.set_column(place, table.schema.field(place), [texts]), copy / METADATA)
    key = table["key"][0].as_py()
    code, out, _ = call("inspect", copy, "--key", key)
    [line] = [line for line in out.splitlines() if line.startswith("start_key")]
    assert not code and line.endswith("kkk… (5,004 characters; --json prints them all)") and len(line) < 1100
    code, out, _ = call("inspect", copy, "--key", key, "--json")
    assert not code and json.loads(out)["start_key"] == texts[0]


def test_pairs_are_exported_for_datasets(evaluated: Path, tmp_path: Path) -> None:
    """Read back by Hugging Face `datasets`, whose nulls are missing images; the same command gives the same bytes."""
    options = {"format": "pairs", "samples_per_shard": 10, "condition": "request != 'plain'"}
    made = [export((str(evaluated),), ExportOptions(output=str(tmp_path / name), **options)) for name in ("a", "b")]
    files = [sorted(path for path in (tmp_path / name).rglob("*") if path.is_file()) for name in ("a", "b")]
    assert [path.read_bytes() for path in files[0]] == [path.read_bytes() for path in files[1]]
    assert (
        made[0].manifest["counts"]["images"] == 14
        and "`start`, the real image" in (tmp_path / "a/README.md").read_text()
    )
    loaded = datasets.load_dataset(str(tmp_path / "a"), split="train", cache_dir=str(tmp_path / "cache"))
    assert list(loaded.features)[:4] == ["start", "twin", "image", "label"] and len(loaded) == 14
    pairs = {pair.key: pair for pair in engine.open_run(str(evaluated)).pairs()}
    for row in loaded:
        pair = pairs[row["key"]]
        assert row["class_name"] == loaded.features["label"].int2str(row["label"]) and row["prompt"]
        assert pixels(row["image"]) == pixels(pair.image)
        for name in ("start", "twin"):
            second = getattr(pair, name)
            assert (row[name] is None) == (second is None)
            assert second is None or pixels(row[name]) == pixels(second)
        assert {name: row[name] for name in TWIN_COLUMNS} == {name: pair.record[name] for name in TWIN_COLUMNS}
    assert {row["twin"] is None for row in loaded} == {row["start"] is None for row in loaded} == {True, False}


def test_twins_are_named_by_the_keys_that_samples_have_in_an_export(tmp_path: Path) -> None:
    """Of a run whose keys were taken already, the key of a twin changes with that of its sample."""
    request = {"name": "own", "method": "risky", "twin": True, "classes": [3], "count": 2}
    runs = [make_drawn_run(tmp_path / f"{levels}", [request], noise(8, levels=levels)) for levels in (2, 8)]
    for name in ("pairs", "webdataset"):
        out = export(tuple(run.uri for run in runs), ExportOptions(output=str(tmp_path / name), format=name)).path
        [table] = [pq.read_table(path) for path in out.glob("*.parquet")]
        keys = table["key"].to_pylist()
        assert sorted(key.startswith("r2-") for key in keys) == [False] * 2 + [True] * 2
        assert table["twin_key"].to_pylist() == keys


def test_a_plain_export_has_no_pairs(evaluated: Path, tmp_path: Path) -> None:
    """Its rows say what they had, and its readers find no second images, which is no damage."""
    out = export((str(evaluated),), ExportOptions(output=str(tmp_path / "out"), condition="request == 'own'")).path
    corpus = engine.open_run(str(out))
    assert len(corpus.filter("twin_psnr_db > 0 and start_distance >= 0")) == 4
    assert "pairs" not in inspect(corpus).document
    with pytest.raises(JobError, match=f"{NO_PAIRS}; .*/out is an export, which keeps no second images"):
        corpus.pairs()


def test_only_pairs_are_exported_as_pairs(evaluated: Path, tmp_path: Path) -> None:
    options = {"output": str(tmp_path / "out"), "format": "pairs"}
    with pytest.raises(JobError, match=NO_PAIRS):
        export((str(evaluated),), ExportOptions(condition="request == 'between-plain'", **options))
    with pytest.raises(JobError, match="--mix-real: real images have no pair"):
        export((str(evaluated),), ExportOptions(real="digits:test", **options))
    assert not (tmp_path / "out").exists()


def test_every_shard_of_a_request_has_its_companions(evaluated: Path) -> None:
    """What the tests above rely on: a start below strength 1, a twin where it is asked for."""
    records = list(read_commits(open_store(str(evaluated))))
    assert {tuple(record.companions) for record in records} == {("starts", "twins"), ("starts",), ()}


# The page ------------------------------------------------------------------------------------------------------------


def test_the_page_says_of_each_request_what_people_see(evaluated: Path, tmp_path: Path) -> None:
    """A change of two levels is adversarial, of five faint, of ten perceptible; without a twin nothing tells.

    Models say whether the label still holds.
    """
    own = {"name": "own", "method": "risky", "twin": True} | GROUP
    for levels, word in ((0, "unchanged"), (2, "adversarial"), (5, "faint"), (10, "perceptible")):
        section = section_of(make_drawn_run(tmp_path / word, [own], noise(8, levels=levels)))
        assert f'<b class="verdict {word}">{word}</b><span><b>own:</b> 6 samples with a twin, median PSNR' in section
    outcome = " The target errs on 100.0 %, on 0.0 % of the twins; the oracle reads 66.7 % as asked."
    assert outcome.replace(" %", f"{NBSP}%") in section
    assert "<td>100.0 %<small>twins 0.0 %</small></td><td>66.7 %</td><td>66.7 %</td>" in section
    wrong, right = '<span class="wrong">✗ ', '<span class="right">✓ '
    assert f"{wrong}nine</span>{right}oracle: eight</span>" in section and f"{wrong}oracle: nine</span>" in section
    assert f"{right}eight</span></figcaption>" in section and "<span>labelled eight</span>" in section
    assert "in doubt" not in section
    # Where few samples have a twin, the two are compared on these.
    store = make_drawn_run(tmp_path / "few", [own | {"twin": False}], noise(8, levels=2))
    fields = {"twin_key": "t", "twin_psnr_db": 45.0, "twin_distance": 0.25, "twin_predicted_class": 9, "twin_risk": 0.5}
    keys = {row["oracle_class"] == row["class_index"]: row["key"] for row in rows_of(Path(store.uri)).values()}
    digest = json.loads(store.path("manifest.json").read_text())["plan_digest"]
    for agrees, share, doubt in ((True, "100.0", ""), (False, "0.0", ' <b class="wrong">Labels are in doubt.</b>')):
        table = twins_table([{"key": keys[agrees]} | fields])
        write_twins(store, FoundTwins(rows=table, plan_digest=digest, num_attempts=6, clip="a"))
        section = section_of(store)
        assert f"on 100.0{NBSP}% of the twins; the oracle reads {share}{NBSP}% as asked.{doubt}</span>" in section
    text = section_of(open_store(str(evaluated)))
    rows = rows_of(evaluated)
    found = {row["key"]: row for row in pq.read_table(evaluated / TWINS_TABLE).to_pylist()}
    for request in ("own", "found", "between"):
        values = [(found.get(row["key"]) or row)["twin_psnr_db"] for row in rows.values() if row["request"] == request]
        assert f"<b>{request}:</b> {len(values)} samples with a twin, median PSNR {np.median(values):.1f} dB" in text
    assert '<b class="verdict">no twin</b><span><b>plain:</b> 4 samples with a start.' in text
    assert EQUAL_PSNR_DB == MAX_PSNR_DB
    assert "between-plain" not in text and '<span class="mono">zoo:digits/clip</span>' in text


def test_the_page_stays_bounded(tmp_path: Path) -> None:
    """Of noise, which nothing compresses, and larger than is shown; without loss, as differences are drawn."""
    request = {"name": "own", "method": "risky", "twin": True} | GROUP | {"classes": list(range(8))}
    store = make_drawn_run(tmp_path / "run", [request], noise(140, levels=2))
    section = section_of(store)
    images = [base64.b64decode(data) for data in re.findall(r"data:image/webp;base64,([^\"]+)", section)]
    assert len(images) == 3 * MAX_PAIRS and sum(map(len, images)) <= PAIRS_BUDGET_BYTES
    assert all(max(PIL.Image.open(io.BytesIO(image)).size) in SIDES and image[12:16] == b"VP8L" for image in images)
    assert store.path("report.html").stat().st_size <= MAX_BYTES


def test_a_tiny_pair_is_shown_as_it_is_stored(evaluated: Path) -> None:
    section = section_of(open_store(str(evaluated)))
    shown = {pixels(base64.b64decode(data)) for data in re.findall(r"data:image/webp;base64,([^\"]+)", section)}
    folders = ("shards", "twins", "starts")
    stored = {pixels(image) for folder in folders for image in images_of(evaluated, folder).values()}
    assert shown and shown <= stored and section.count("<img") == section.count('class="tiny"')
