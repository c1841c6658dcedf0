"""The report of a run: what it says, that it stays bounded and safe, and that it works in a browser.

The runs are made of noise images and drawn scores, and written by the real shard writer.
"""

from __future__ import annotations

import base64
import html
import io
import json
import math
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

from engine.data.run.commit_shard import commit_shard
from engine.data.run.commits import list_commits
from engine.data.run.file_names import METADATA
from engine.data.run.finalise import finalise
from engine.data.run.metadata_table import write_metadata
from engine.data.run.shard_writing import stage_shard
from engine.data.run.shards import shard_name
from engine.data.stores.base import Store
from engine.data.stores.opening import open_store
from engine.errors import CorruptShardError, OutputError
from engine.job.columns import Role, columns_with
from engine.job.parsing import parse_job
from engine.job.plan import Plan, SampleSpec, build_plan
from engine.job.records import SampleResult, failed_record, new_record
from engine.job.spec import JobSpec
from engine.report.charts import NUM_BINS, make_axis
from engine.report.data import make_rows
from engine.report.gallery import IMAGE_BUDGET_BYTES, MAX_SAMPLES, select, thumbnail
from engine.report.headline import summary_table
from engine.report.partners import partner_table
from engine.report.render import render, write_report
from engine.report.row_sums import RowSums
from engine.report.scatter import MAX_POINTS
from engine.report.text import clip, joined, number, percent, signed
from engine.report.work import acceptance_table, gradient_table, throughput_table

DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
HOSTILE = ["<script>alert(1)</script>", '"><img src=x onerror=alert(2)>', "</script><!--<script>", "{{ 7 * 7 }}"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BETWEEN = {"name": "between", "method": "boundary", "boundary": ["three", "eight"], "count": 24}
PLAIN = BETWEEN | {"name": "between-plain", "method": "prompt", "seed_group": "between"}
EVERYTHING = {
    "name": "everything", "method": "prompt", "classes": "all", "count": 2,
    "contexts": ["", "red ink on a white background"],
}  # fmt: skip

Change = Callable[[dict[str, Any]], dict[str, Any]]


def make_job(requests: list[dict[str, Any]], uri: Path) -> JobSpec:
    models = {"diffusion": "made/sd", "clip": "made/clip", "target": "made/target"}
    return parse_job(
        {
            "name": "sheet",
            "models": models | {"transfer": ["made/other"], "oracle": "made/oracle"},
            "requests": requests,
            "output": {"uri": str(uri), "samples_per_shard": 64},
        }
    )


def make_run(
    folder: Path, requests: list[dict[str, Any]], labels: list[str] = DIGITS, change: Change = lambda record: record,
    size: int = 8,
) -> Store:  # fmt: skip
    """A finished run without a report; `change` may alter each record before it is written."""
    job = make_job(requests, folder)
    names = {"clip": "c", "target": "t", "transfer": ["o"], "oracle": "j"}
    plan = build_plan(job, labels, {"diffusion": {"made/sd": "d"}} | names)
    store = open_store(str(folder))
    for shard in plan.shards():
        results = [make_sample(spec, labels, change, size) for spec in plan.samples(shard)]
        name = shard_name(job.name, shard.number)
        staged = stage_shard(store.staging(), name, results, "png")
        commit_shard(store, plan.digest, shard, name, staged, 1, "w0", {"total_seconds": 1.0})
    close_run(store, job, plan)
    return store


def close_run(store: Store, job: JobSpec, plan: Plan) -> None:
    models = {
        "diffusion": {"address": "made/sd", "digest": "dddd"},
        "target": {"address": "made/target", "digest": "tttt"},
        "transfer": [{"address": "made/other", "digest": "oooo"}],
    }
    timing = {"finished": 1_760_000_000.0, "sampling_seconds": 12.5}
    finalise(store, job, plan, models=models, timing=timing, versions={"torch": "2.10.0"}, hardware={"device": "cpu"})


def make_sample(spec: SampleSpec, labels: list[str], change: Change, size: int) -> SampleResult:
    """A sample with noise for an image and scores of drawn logits; guided ones lie closer to the boundary."""
    rng = np.random.default_rng(spec.seed)
    run = {"batch_size": 4, "duration_seconds": 0.1, "attempt": 1, "worker": "w0"}
    record = change(new_record(spec) | _scores(spec, labels, rng))
    if record["status"] != "ok":
        return SampleResult(failed_record(spec, record["error_message"]), b"", run)
    pixels = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    return SampleResult(record, as_png(pixels), run)


def as_png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def _scores(spec: SampleSpec, labels: list[str], rng: np.random.Generator) -> dict[str, Any]:
    logits = rng.normal(0, 1.5, len(labels))
    logits[list(spec.cell.classes)] += 5.0
    if spec.method == "boundary":
        logits[list(spec.cell.classes)] = 8.0 + rng.normal(0, 0.2, len(spec.cell.classes))
    log_p = logits - logits.max() - math.log(np.exp(logits - logits.max()).sum())
    label = spec.cell.classes[0]
    rival = int(np.argsort(log_p)[-2 if log_p.argmax() == label else -1]) if len(labels) > 1 else label
    subset = list(spec.cell.classes) if spec.cell.is_joint else [label, rival][: len(labels)]
    kldb = float(-np.mean(log_p[subset]) - math.log(len(subset)))
    soft = np.zeros(len(labels))
    soft[list(spec.cell.classes)] = 1 / len(spec.cell.classes)
    other = {"model": "made/other", "predicted_class": rival, "risk": float(rng.exponential())}
    return {
        "status": "ok",
        "class_name": labels[label],
        "class_index": label,
        "risk": float(-log_p[label]),
        "is_error": bool(log_p.argmax() != label),
        "predicted_class": int(log_p.argmax()),
        "p_label": float(np.exp(log_p[label])),
        "conformity": float(rng.normal(0.27, 0.02)),
        "kldb": max(kldb, 0.0),
        "kldb_classes": subset,
        "entropy": float(-(np.exp(log_p) * log_p).sum()),
        "soft_label": soft.tolist(),
        "temperature": 1.0,
        "oracle_class": label if rng.random() < 0.9 else rival,
        "accepted": True,
        "transfer": [other],
    }


def failing(share: float, message: str = "the classifier gave no finite output") -> Change:
    """Let a share of the samples fail."""

    def change(record: dict[str, Any]) -> dict[str, Any]:
        fails = record["seed"] % 1000 < share * 1000
        return record | ({"status": "failed", "error_message": message} if fails else {})

    return change


def page_of(store: Store, **options: Any) -> str:
    write_report(store, **options)
    return store.read("report.html").decode()


def gallery_of(page: str) -> dict[str, Any]:
    return json.loads(page.split('id="gallery-data">', 1)[1].split("</script>", 1)[0])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The run of a quickstart: two joint requests and one over all classes, a tenth of it failed."""
    folder = tmp_path_factory.mktemp("report") / "run"
    store = make_run(folder, [BETWEEN, PLAIN, EVERYTHING], change=failing(0.1), size=32)
    write_report(store, labels=DIGITS)
    return store


@pytest.fixture(scope="module")
def page(run: Store) -> str:
    return run.read("report.html").decode()


def test_the_page_says_what_was_made_of_what(page: str, run: Store) -> None:
    manifest = json.loads(run.read("manifest.json"))
    models = ("made/sd", "dddd", "tttt", "oooo")
    for text in (manifest["plan_digest"], *models, "torch 2.10.0", "Finished 2025-10-09 08:53:20 UTC."):
        assert text in page
    samples = manifest["counts"]["samples"]
    assert f"{samples['ok']} images of {samples['attempted']} attempts in 3 requests" in page


def test_the_summary_agrees_with_the_manifest(page: str, run: Store) -> None:
    """Every group of the manifest stands in the table with its counts and its median risk."""
    first = page.split('aria-label="Summary table"', 1)[1].split("</table>", 1)[0]
    lines = re.findall(r'<tr class="(?:total|part)"><th[^>]*><span[^>]*>([^<]*)</span>.*?</th>(.*?)</tr>', first)
    table = {html.unescape(name): re.findall(r"<td>([^<]*)<", cells) for name, cells in lines}
    summary = json.loads(run.read("manifest.json"))["summary"]
    assert len(lines) == 5, "three requests, and the two contexts of the last one"
    red = next(group for group in summary if group["context"])
    assert table["red ink on a white background"][3:6] == [str(red[name]) for name in ("ok", "attempted", "failed")]
    assert table["red ink on a white background"][6] == number(red["risk"]["median"])
    assert table["everything"][4] == "40"
    guided, plain = (float(table[name][7]) for name in ("between", "between-plain"))
    assert guided < plain


def test_the_headline_means_what_the_table_means(page: str, run: Store) -> None:
    """Errors and valid failures of prompt-only and of guided samples, joint prompts too, by the rule of the table."""
    groups = json.loads(run.read("manifest.json"))["summary"]
    for title, name in (("Target errors", "error_rate"), ("Valid failures", "valid_failure_rate")):
        figure = page.split(f"<dt>{title}</dt>", 1)[1].split("</div>", 1)[0]
        shown = {kind: value for value, kind in re.findall(r"<dd>([^<]*) <span>([^<]*)<", figure)}
        assert list(shown) == ["prompt only", "guided"]
        for kind, value in shown.items():
            some = [one for one in groups if (one["method"] == "prompt") == (kind == "prompt only")]
            scored = [one["attempted"] - one["failed"] for one in some]
            mean = sum(one[name] * num for one, num in zip(some, scored, strict=True)) / sum(scored)
            assert value == percent(mean), (title, kind)


def test_the_gallery_holds_the_stored_images_and_all_their_metadata(page: str, run: Store) -> None:
    gallery = gallery_of(page)
    rows = {row["key"]: row for row in read_metadata(run)}
    assert {sample["key"] for sample in gallery["samples"]} <= set(rows)
    assert gallery["fields"] == list(next(iter(rows.values())))
    shown = {sample["key"]: base64_of(page, sample["key"]) for sample in gallery["samples"]}
    for key, image in shown.items():
        assert sha256_of(image) == rows[key]["sha256"]
    assert sum(not image for image in shown.values()) == sum(one["status"] == "failed" for one in gallery["samples"])


def test_equal_runs_give_equal_pages(run: Store, page: str) -> None:
    assert page_of(run, labels=DIGITS) == page


def test_a_folder_of_parts_gives_the_same_page(page: str, run: Store, tmp_path: Path) -> None:
    """The metadata of a very large run is a folder; its rows are the same."""
    store = open_store(str(shutil.copytree(run.root, tmp_path / "run")))
    write_metadata(store, "sheet", list_commits(store), rows_per_file=30)
    assert store.path(METADATA).is_dir()
    assert page_of(store, labels=DIGITS) == page


def test_the_gallery_shrinks_until_the_page_fits(run: Store, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.report.render.MAX_BYTES", len(page.encode()) * 2 // 3)
    manifest = json.loads(run.read("manifest.json"))
    small = render(run, manifest, "sheet", DIGITS)
    assert len(small) <= len(page.encode()) * 2 // 3
    assert 0 < len(gallery_of(small.decode())["samples"]) < len(gallery_of(page)["samples"])


def test_joint_prompts_are_one_class_of_their_own(page: str) -> None:
    """The record of a joint sample names the closest class alone; tables and filters keep the subset together."""
    samples = gallery_of(page)["samples"]
    assert {one["class"] for one in samples if one["request"] == "between"} == {"three and eight"}
    confusion = page.split('class="confusion"', 1)[1].split("</table>", 1)[0]
    row = confusion.split("three and eight", 1)[1].split("</tr>", 1)[0]
    assert [place for place, cell in enumerate(re.findall(r'<td class="([^"]*)"', row)) if "own" in cell] == [3, 8]


def test_nothing_is_loaded_and_no_planted_script_survives(tmp_path: Path) -> None:
    """Prompts, contexts, class names and messages are text wherever they stand, the embedded JSON included."""
    labels = [*DIGITS[:8], *HOSTILE[:2]]
    request = {"name": "all", "method": "prompt", "classes": "all", "count": 1, "contexts": HOSTILE}

    def change(record: dict[str, Any]) -> dict[str, Any]:
        record["transfer"] = [record["transfer"][0] | {"model": HOSTILE[0]}]
        return failing(0.3, "boom " + " ".join(HOSTILE))(record | {"prompt": HOSTILE[record["index"] % 4]})

    text = page_of(make_run(tmp_path / "run", [request], labels, change), labels=labels, title=HOSTILE[0])
    assert text.count("<script") == 2 and text.count("</script") == 2
    assert "<img src=x" not in text and "49" not in re.findall(r"<h1>(.*)</h1>", text)
    assert all(address.startswith("data:") for address in re.findall(r'(?:src|href)="([^#"][^"]*)"', text))
    assert "url(" not in text and "@import" not in text
    values = " ".join(value for sample in gallery_of(text)["samples"] for value in sample["values"])
    assert all(one in values for one in HOSTILE)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_one_class_and_no_image_at_all(tmp_path: Path, share: float) -> None:
    request = {"name": "only", "method": "prompt", "classes": ["zero"], "count": 3}
    text = page_of(make_run(tmp_path / "run", [request], ["zero"], failing(share)))
    assert len(gallery_of(text)["samples"]) == 3
    assert ("the classifier gave no finite output" in text) == bool(share)
    assert ("<svg viewBox" in text.split('class="charts"')[1].split('id="scatter"')[0]) == (not share)


def test_a_thousand_classes_and_very_long_texts(tmp_path: Path) -> None:
    """Too many classes for a table give the most frequent errors; texts without end are cut."""
    labels = [f"class number {index}" for index in range(1000)]
    request = {
        "name": "wide",
        "method": "prompt",
        "classes": list(range(0, 1000, 7)),
        "count": 1,
        "contexts": ["c" * 400],
    }
    long = failing(0.02, "m" * 100_000)
    store = make_run(tmp_path / "run", [request], labels, lambda record: long(record | {"prompt": "p" * 50_000}), 4)
    text = page_of(store, labels=labels)
    assert 'class="confusion"' not in text and "The most frequent errors" in text
    assert len(text) < 3_000_000


def test_a_run_without_its_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"manifest\.json; finish the run first"):
        write_report(open_store(str(tmp_path)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", b"{"),
        ("manifest.json", b"[]"),
        ("manifest.json", b'{"name": "sheet"}'),
        ("metadata.parquet", b"PAR1"),
        ("metadata.parquet", None),
        ("metadata.parquet", "risk"),
    ],
)
def test_a_damaged_run_is_named_not_a_traceback(
    run: Store, tmp_path: Path, name: str, content: bytes | str | None
) -> None:
    """No JSON, keys that are missing, no parquet, columns that are missing or of another type."""
    shutil.copytree(run.root, tmp_path / "copy")
    if content is None:
        pyarrow.parquet.write_table(pyarrow.table({"key": ["a"]}), tmp_path / "copy" / name)
    elif isinstance(content, str):
        table = pyarrow.parquet.read_table(run.path(METADATA))
        texts = pyarrow.array(["x"] * len(table))
        table = table.set_column(table.schema.get_field_index(content), content, texts)
        pyarrow.parquet.write_table(table, tmp_path / "copy" / name)
    else:
        (tmp_path / "copy" / name).write_bytes(content)
    with pytest.raises(CorruptShardError, match=re.escape(str(tmp_path / "copy" / name))):
        write_report(open_store(str(tmp_path / "copy")))


def big_table(store: Store, num_rows: int, requests: int = 1) -> Any:
    """The metadata of a run repeated to many rows with other scores, request names dealt out in blocks."""
    import pyarrow as pa

    table = pyarrow.parquet.read_table(store.path(METADATA))
    rng = np.random.default_rng(0)
    table = table.take(pa.array(np.arange(num_rows) % len(table)))
    names = pa.array([f"request-{place * requests // num_rows}" for place in range(num_rows)])
    table = table.set_column(table.schema.get_field_index("request"), "request", names)
    return table.set_column(table.schema.get_field_index("risk"), "risk", pa.array(rng.exponential(size=num_rows)))


@pytest.mark.parametrize("requests", [1, 7, 1000])
def test_the_choice_is_bounded_spread_and_keeps_the_extremes(tmp_path: Path, requests: int) -> None:
    """Of 100,000 rows at most 320 are chosen, the highest and the lowest among them, whatever the requests."""
    store = make_run(tmp_path / "run", [EVERYTHING])
    rows = make_rows(big_table(store, 100_000, requests))
    chosen = select(rows)
    assert len(chosen) == len(set(chosen)) <= MAX_SAMPLES
    first = [row for row in chosen if rows.request.codes[row] == 0]
    risk = rows.numbers[rows.main_score(0).name]
    inside = np.flatnonzero(rows.request.codes == 0)
    assert inside[risk[inside].argmax()] in first
    if requests <= 7:
        assert inside[risk[inside].argmin()] in first
        quarters = np.quantile(risk[inside], [0.25, 0.5, 0.75])
        assert np.bincount(np.searchsorted(quarters, risk[first]), minlength=4).min() >= len(first) // 6


def change_columns(store: Store, columns: dict[str, Callable[[np.ndarray], Any]]) -> Any:
    """The table of a run with other values in some columns."""
    import pyarrow as pa

    table = pyarrow.parquet.read_table(store.path(METADATA))
    for name, change in columns.items():
        values = pa.array(change(table[name].to_numpy(zero_copy_only=False)))
        table = table.set_column(table.schema.get_field_index(name), name, values)
    return table


def cells_of(table: Any) -> dict[str, list[tuple[str, str]]]:
    assert table is not None
    return {line.name: line.cells for line in table.lines}


def test_samples_are_held_against_their_prompt_only_partners(run: Store) -> None:
    """Pairs of equal seed and context, scored on both sides: what share lies above, and the median change."""
    job = json.loads(run.read("manifest.json"))["job"]
    cells = cells_of(partner_table(make_rows(pyarrow.parquet.read_table(run.path(METADATA))), job["requests"]))
    assert list(cells) == ["between"]
    sides: dict[str, dict[int, float]] = {"between": {}, "between-plain": {}}
    for row in read_metadata(run):
        if row["request"] in sides and row["status"] == "ok":
            sides[row["request"]][row["seed"]] = row["kldb"]
    both = sorted(sides["between"].keys() & sides["between-plain"].keys())
    changes = np.array([sides["between"][seed] - sides["between-plain"][seed] for seed in both])
    pairs, _, kldb, *_ = cells["between"]
    assert pairs[0] == str(len(both))
    assert kldb == (percent(float((changes > 0).mean())), signed(float(np.median(changes))))


def test_partners_with_other_contexts_are_none(tmp_path: Path) -> None:
    """Equal noise under another text is another picture; and guided requests alone have nothing to be held against."""
    plain = {"name": "plain", "method": "prompt", "classes": ["three"], "count": 4, "contexts": ["red"]}
    guided = plain | {"name": "guided", "method": "risky", "seed_group": "plain", "contexts": ["blue"]}
    store = make_run(tmp_path / "run", [plain, guided])
    rows, requests = (
        make_rows(pyarrow.parquet.read_table(store.path(METADATA))),
        make_job([plain, guided], tmp_path).requests,
    )
    data = [one.model_dump(mode="json") for one in requests]
    assert partner_table(rows, data) is None and partner_table(rows, data[1:]) is None


def test_every_request_has_its_classes_and_prompt_only_ones_come_first(page: str) -> None:
    """Never a rate over guided and plain samples together; a joint prompt is the only class of its request."""
    lines = page.split('aria-label="Summary by class"', 1)[1].split("</table>", 1)[0]
    names = re.findall(r'<span class="clamp" title="([^"]*)"', lines)
    assert names == ["between-plain", "everything", *DIGITS, "between"]
    notes = re.findall(r'<small class="clamp">([^<]*)<', lines)
    assert notes == ["prompt, three and eight", "prompt", "boundary, three and eight"]
    titles = re.findall(r"<h3>([^<]*)</h3>", page.split('id="errors"', 1)[1].split("</section>", 1)[0])
    assert titles == ["between-plain", "everything", "between"]


def test_acceptance_adds_up(tmp_path: Path) -> None:
    """Attempts by what became of them, by class where there is a quota, with what is missing."""
    request = {"name": "all", "method": "prompt", "classes": ["three", "eight"], "count": 10}
    store = make_run(tmp_path / "run", [request], change=failing(0.2))
    failed = np.array([row["status"] == "failed" for row in read_metadata(store)])
    rejected = ~failed & (np.arange(20) % 3 == 0)
    table = change_columns(
        store,
        {
            "status": lambda old: np.where(rejected, "rejected", old).tolist(),
            "accepted": lambda old: ~failed & ~rejected,
            "surplus": lambda old: np.arange(20) == np.flatnonzero(~failed & ~rejected)[-1],
        },
    )
    quotas = {
        "all": [
            {"class": name, "code": code, "wanted": 9, "missing": 2}
            for name, code in (("three", "003"), ("eight", "008"))
        ]
    }
    cells = cells_of(acceptance_table(make_rows(table), quotas))
    values = {name: [int(one[0]) for one in some] for name, some in cells.items()}
    kept = int((~failed & ~rejected).sum())
    assert values["all"] == [20, kept, int(rejected.sum()), int(failed.sum()), 1, 18, 4]
    assert [sum(one) for one in zip(values["three"], values["eight"], strict=True)] == values["all"]
    assert acceptance_table(make_rows(pyarrow.parquet.read_table(store.path(METADATA))), {}) is None


def test_gradients_and_speed_are_counted(run: Store) -> None:
    """Only what was guided has gradients; the rates of the workers are of their own samples."""
    size = len(read_metadata(run))
    table = change_columns(
        run,
        {
            "guided_steps": lambda old: np.where(np.arange(size) < 24, 8, 0),
            "zero_gradients": lambda old: np.select([np.arange(size) < 6, np.arange(size) < 16], [8, 1], 0),
            "nonfinite_gradients": lambda old: np.where(np.arange(size) == 7, 2, 0),
            "duration_seconds": lambda old: np.where(np.arange(size) % 2, 0.1, 0.3),
            "worker": lambda old: ["a" if place % 2 else "b" for place in range(size)],
        },
    )
    sums = RowSums()
    for half in (table.slice(0, 9), table.slice(9)):
        sums.add(half)
    gradients = cells_of(gradient_table(sums.steps))
    scored = [row["status"] == "ok" for row in read_metadata(run)][:24]
    assert list(gradients) == ["between"]
    assert gradients["between"][0][0] == str(sum(scored))
    assert gradients["between"][2][1] == f"{sum(scored[:6])} samples at every step"
    assert gradients["between"][3] == (percent(2 * scored[7] / (8 * sum(scored))), f"{int(scored[7])} samples")
    speed = cells_of(throughput_table(sums.speeds, sums.texts))
    assert speed["worker a"][-1][0] == "10.00" and speed["worker b"][-1][0] == "3.33"
    assert speed["all workers"][0][0] == str(size)


def test_a_hundred_thousand_samples_give_a_small_page(run: Store, tmp_path: Path) -> None:
    """Below 10 MB and in seconds, with a bounded number of points and tiles, whatever the number of rows."""
    import time

    import pyarrow as pa
    import pyarrow.parquet as pq

    store = open_store(str(shutil.copytree(run.root, tmp_path / "run")))
    small = pq.read_table(store.path(METADATA))
    rng, size = np.random.default_rng(0), 100_000
    large = small.take(pa.array(np.arange(size) % len(small)))
    for name in ("risk", "conformity", "kldb", "entropy"):
        values = np.asarray(large[name]) * rng.uniform(0.5, 1.5, size)
        large = large.set_column(large.schema.get_field_index(name), small.schema.field(name), pa.array(values))
    pq.write_table(large, store.path(METADATA))
    started = time.process_time()
    page = render(store, json.loads(store.read("manifest.json")), "large", DIGITS).decode()
    seconds = time.process_time() - started
    assert len(page.encode()) < 10_000_000 and seconds < 30
    assert len(gallery_of(page)["samples"]) <= MAX_SAMPLES
    plot = page.split('class="plot"', 1)[1].split("</figure>", 1)[0]
    assert plot.count("M") <= 2 * MAX_POINTS and "1,500 of" in page


def test_the_summary_table_is_bounded(tmp_path: Path) -> None:
    """Beyond the bound the contexts with the highest error rates are kept, in their order."""
    from engine.data.run.summary import summarise

    contexts = {"contexts": [f"context {place}" for place in range(8)]}
    store = make_run(tmp_path / "run", [EVERYTHING | contexts])
    groups = summarise(store.path(METADATA))
    table = summary_table(groups, groups[:1], max_lines=4)
    worst = sorted(groups, key=lambda group: -(group.error_rate or 0))[:3]
    assert {line.name for line in table.lines[1:]} == {group.context for group in worst}
    assert table.num_left_out == 5


def test_thumbnails_fit_their_budget() -> None:
    """Noise is the worst case of a JPEG; tiny images stay as stored, and what is no image is left out."""
    noise = np.random.default_rng(0).integers(0, 256, (512, 640, 3), dtype=np.uint8)
    budget = IMAGE_BUDGET_BYTES // MAX_SAMPLES
    uri, is_tiny = thumbnail(as_png(noise), budget)
    assert uri.startswith("data:image/jpeg") and len(base64.b64decode(uri.split(",")[1])) <= budget and not is_tiny
    tiny = as_png(noise[:32, :32])
    assert thumbnail(tiny, budget) == ("data:image/png;base64," + base64.b64encode(tiny).decode(), True)
    assert thumbnail(b"no image", budget) == ("", False)


@pytest.mark.parametrize("score", columns_with(Role.DRAWN), ids=lambda score: score.name)
def test_every_value_falls_into_a_bin(score: Any) -> None:
    """Zeros on a logarithmic axis and a single value repeated are drawn like any other."""
    for values in (np.zeros(5), np.full(3, 0.25), np.array([0.0, 1e-9, 0.3, 80.0])):
        axis = make_axis(values, score.axis == "log")
        assert np.histogram(axis.place(values), bins=axis.edges)[0].sum() == len(values)
        assert len(axis.edges) == NUM_BINS + 1 and len(axis.ticks()) >= 2


def test_numbers_and_texts_are_cut_for_a_reader() -> None:
    assert [number(value) for value in (0.0, 1e-9, -1e-9, 0.1234, 12.34)] == [
        "0.000",
        "<0.001",
        ">-0.001",
        "0.123",
        "12.3",
    ]
    assert clip("abcdef", 4) == "abc…" and joined("abc", 2) == "a, b, …"


def browse(path: Path, fragment: str, profile: Path) -> tuple[str, str]:
    """The document as it stands after its script has run, and what the console said."""
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
    options += ["--disable-component-update", "--no-first-run", "--enable-logging=stderr", "--virtual-time-budget=3000"]
    command = [str(CHROMIUM), *options, f"--user-data-dir={profile}", "--dump-dom", f"{path.as_uri()}#{fragment}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=True)
    return done.stdout, "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)


def tiles_of(document: str) -> list[str]:
    """Keys of the visible tiles in their order."""
    grid = document.split('id="tiles"', 1)[1].split("<section", 1)[0]
    return re.findall(r'class="tile" data-key="([^"]*)">', grid)


def read_metadata(store: Store) -> list[dict[str, Any]]:

    return pyarrow.parquet.read_table(store.path(METADATA)).to_pylist()


def base64_of(page: str, key: str) -> bytes:
    tile = page.split(f'data-key="{key}">', 1)[1].split("</button>", 1)[0]
    found = re.search(r'src="data:image/png;base64,([^"]*)"', tile)
    return base64.b64decode(found[1]) if found else b""


def sha256_of(image: bytes) -> str:
    import hashlib

    return hashlib.sha256(image).hexdigest() if image else ""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_the_page_works_in_a_browser(run: Store, tmp_path: Path) -> None:
    """Sorting, filtering and opening a sample by the address's fragment; no error reaches the console."""
    rows = {row["key"]: row for row in read_metadata(run)}
    path = run.path("report.html")
    document, console = browse(path, "sort=risk&order=asc&status=ok&request=everything", tmp_path / "first")
    assert console == ""
    keys = tiles_of(document)
    assert keys == sorted(keys, key=lambda key: rows[key]["risk"])
    assert set(keys) == {key for key, row in rows.items() if row["status"] == "ok" and row["request"] == "everything"}

    target = max(rows, key=lambda key: rows[key]["kldb"])
    document, console = browse(path, f"sort=kldb&class=three+and+eight&open={target}", tmp_path / "second")
    assert console == ""
    keys = tiles_of(document)
    scored = [key for key in keys if rows[key]["status"] == "ok"]
    assert keys[: len(scored)] == sorted(scored, key=lambda key: -rows[key]["kldb"])
    assert all(rows[key]["request"] != "everything" for key in keys)
    dialog = document.split("<dialog", 1)[1].split("</dialog>", 1)[0]
    assert 'open=""' in dialog and target in dialog and rows[target]["sha256"] in dialog


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_planted_markup_stays_text_in_a_browser(tmp_path: Path) -> None:
    """Each hostile text is opened in the dialog, which the script fills, and nothing runs or breaks out."""
    request = {"name": "all", "method": "prompt", "classes": ["three"], "count": 1, "contexts": HOSTILE}
    store = make_run(tmp_path / "run", [request])
    text = page_of(store, labels=DIGITS)
    key = gallery_of(text)["samples"][0]["key"]
    document, console = browse(store.path("report.html"), f"open={key}", tmp_path / "profile")
    assert console == "" and document.count("<script") == 2 and "<img src=x" not in document
