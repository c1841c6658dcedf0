"""What closes a run: metadata, summary, manifest, indexes and card, as other tools read them."""

from __future__ import annotations

import hashlib
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from engine.data.images import LabelledImage, digits, open_images
from engine.data.run import metadata_table
from engine.data.run.card import code
from engine.data.run.commits import list_commits
from engine.data.run.file_names import SUCCESS
from engine.data.run.finalise import FinishedRun, finalise, mark_success
from engine.data.run.manifest import software_versions
from engine.data.run.metadata_table import write_metadata
from engine.data.run.schema import arrow_schema
from engine.data.run.shards import read_shard
from engine.data.run.summary import count_classes, read_dials, summarise, summarise_table
from engine.data.stores.base import Store
from engine.data.stores.opening import open_store
from engine.errors import CorruptShardError, OutputError
from engine.job.plan import Plan, ShardSpec
from engine.job.records import SampleResult, failed_record
from tests.composed import composed_job, make_run
from tests.run_cases import commit_one, commit_rest, make_job, make_plan, make_result, open_case

MODELS = {
    "diffusion": [{"address": "zoo:a", "digest": "d0"}],
    "target": {"address": "hub/`x`|<script>alert(1)</script>", "digest": "t0"},
}


def close(store: Store, plan: Plan, **changes: Any) -> FinishedRun:
    """Finalise as the driver would."""
    job = make_job(Path(store.uri), **changes)
    versions, hardware = software_versions(), {"device": "cpu"}
    return finalise(
        store, job, plan, models=MODELS, timing={"total_seconds": 2.0}, versions=versions, hardware=hardware
    )


@pytest.fixture
def run(tmp_path: Path) -> tuple[Store, Plan, FinishedRun]:
    store, plan, _ = open_case(tmp_path / "out", count=20)
    commit_rest(store, plan)
    return store, plan, close(store, plan, count=20)


def rows_of(plan: Plan) -> list[dict[str, Any]]:
    """The records that the run should hold, made again."""
    return [make_result(spec).record for shard in plan.shards() for spec in plan.samples(shard)]


def test_metadata_has_every_attempt_in_the_order_of_the_plan(run: tuple[Store, Plan, FinishedRun]) -> None:
    store, plan, _ = run
    table = pq.read_table(store.path("metadata.parquet"))
    assert table.schema.equals(arrow_schema(surplus=True), check_metadata=True)
    expected = rows_of(plan)
    found = table.to_pylist()
    assert [{name: row[name] for name in expected[0]} for row in found] == expected
    assert not any(row["surplus"] for row in found)
    tars = [store.path(name) for name in store.list("shards") if name.endswith(".tar")]
    images = {key: image for tar in tars for key, image, *_ in read_shard(tar)}
    assert {row["key"]: row["sha256"] for row in found if row["sha256"]} == {
        key: hashlib.sha256(image).hexdigest() for key, image in images.items()
    }


def test_summary_is_what_a_slow_reading_gives(run: tuple[Store, Plan, FinishedRun]) -> None:
    """Each figure again from plain lists, with Python's own statistics."""
    store, plan, done = run
    records = rows_of(plan)
    names = list(dict.fromkeys((record["request"], record["context"]) for record in records))
    assert [(group.request, group.context) for group in done.groups] == names
    for group in done.groups:
        every = [one for one in records if (one["request"], one["context"]) == (group.request, group.context)]
        ok = [one for one in every if one["status"] == "ok"]
        assert (group.attempted, group.ok, group.failed) == (len(every), len(ok), len(every) - len(ok))
        scored = [one for one in every if one["status"] != "failed"]
        assert {"risk", "conformity", "kldb", "entropy"} <= group.scores.keys()
        for name, spread in group.scores.items():
            assert spread is not None
            values = [one[name] for one in scored]
            quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(scored) > 1 else values * 3
            assert [spread.q25, spread.median, spread.q75] == pytest.approx(quartiles)
        errs = [
            one["predicted_class"] not in one["kldb_classes"] if "-mix-" in one["key"] else one["is_error"]
            for one in scored
        ]
        assert group.error_rate == pytest.approx(statistics.mean(errs))
        agrees = [
            one["oracle_class"] in (one["kldb_classes"] if "-mix-" in one["key"] else [one["class_index"]])
            for one in scored
        ]
        assert group.oracle_agreement == pytest.approx(statistics.mean(agrees))
        valid = [agreed and erred for agreed, erred in zip(agrees, errs, strict=True)]
        assert group.valid_failure_rate == pytest.approx(statistics.mean(valid))
        seen = [one["transfer"][0] for one in scored]
        assert group.transfer[0].risk_median == pytest.approx(statistics.median(entry["risk"] for entry in seen))
        asked = [one["kldb_classes"] if "-mix-" in one["key"] else [one["class_index"]] for one in scored]
        errors = [one["transfer"][0]["predicted_class"] not in some for one, some in zip(scored, asked, strict=True)]
        assert group.transfer[0].error_rate == pytest.approx(statistics.mean(errors))
    for name, counts in count_classes(store.path("metadata.parquet")).items():
        for status, count in counts.items():
            assert count == sum((one["class_name"], one["status"]) == (name, status) for one in records)


def test_summary_does_not_depend_on_how_the_rows_are_cut(run: tuple[Store, Plan, FinishedRun]) -> None:
    """Tables come in chunks and with or without dictionaries; lists in chunks have offsets of their own."""
    store, _, done = run
    table = pq.read_table(store.path("metadata.parquet"))
    cut = pa.concat_tables([table.slice(start, 7) for start in range(0, len(table), 7)])
    assert summarise_table(table) == summarise_table(cut) == done.groups
    assert summarise_table(table.slice(0, 0)) == []


def test_summary_without_images_oracle_and_transfer(tmp_path: Path) -> None:
    """Unknown figures are None, never a number that looks like one."""
    spec = make_plan(make_job(tmp_path)).requests[0].sample(5)
    run_fields = {"batch_size": 1, "duration_seconds": 0.0, "attempt": 1, "worker": "", "sha256": "", "surplus": False}
    row = make_result(spec).record | run_fields
    pq.write_table(pa.Table.from_pylist([row], schema=arrow_schema(surplus=True)), tmp_path / "m.parquet")
    (group,) = summarise(tmp_path / "m.parquet")
    assert (group.attempted, group.ok, group.failed) == (1, 0, 1)
    assert (group.scores["risk"], group.error_rate, group.oracle_agreement, group.transfer) == (None, None, None, ())
    assert group.valid_failure_rate is None


def test_only_what_was_guided_is_near_a_risk_target(tmp_path: Path) -> None:
    """At strength 0 no step is taken: the risk of a reconstruction says nothing of the target."""
    start = {"images": "digits:test", "strength": [0, 0.5]}
    request = {"name": "risky", "method": "risky", "classes": "all", "count": 1, "start": start}
    job = make_job(tmp_path, requests=[request | {"guidance": {"risky": {"target_risk": 2.0}}}])
    rows = [
        {"request": f"risky-{name}", "status": "ok", "risk": risk, "guided_steps": steps}
        for name, risk, steps in (("s000", 0.1, 0), ("s050", 1.5, 8))
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "m.parquet")
    dials = read_dials(tmp_path / "m.parquet", job)
    assert list(dials) == ["risky-s050"] and dials["risky-s050"]["risk_median"] == 1.5


def test_manifest_counts_and_checksums(run: tuple[Store, Plan, FinishedRun]) -> None:
    store, plan, done = run
    manifest = json.loads(store.read("manifest.json"), parse_constant=lambda text: pytest.fail(text))
    assert manifest == done.manifest and b"null" not in store.read("manifest.json")
    assert manifest["plan_digest"] == plan.digest and manifest["complete"] and done.complete
    samples = manifest["counts"]["samples"]
    assert samples["planned"] == samples["attempted"] == plan.num_samples == samples["ok"] + samples["failed"]
    for name in ("requests", "classes"):
        assert sum(one["ok"] for one in manifest["counts"][name].values()) == samples["ok"]
    for shard in manifest["shards"]:
        tar = store.read(f"shards/{shard['name']}.tar")
        assert (len(tar), hashlib.sha256(tar).hexdigest()) == (shard["tar_bytes"], shard["tar_sha256"])
    assert len(manifest["shards"]) == plan.num_shards and manifest["versions"]["pyarrow"] == pa.__version__


def test_indexes_count_what_is_in_the_tars(tmp_path: Path) -> None:
    """With `store_rejected` the tars hold more than the accepted images; an index by number would stop too early."""
    job = composed_job(tmp_path / "run", count=1)
    store = open_store(str(make_run(job)))
    split = json.loads(store.read("shards/_info.json"))["splits"]["train"]
    wids = json.loads(store.read("shards/wids.json"))["shardlist"]
    in_tars = {
        Path(name).name: len(list(read_shard(store.path(name)))) for name in store.list("shards") if ".tar" in name
    }
    assert sum(in_tars.values()) == 70
    assert dict(zip(split["filenames"], split["shard_lengths"], strict=True)) == in_tars
    assert {entry["url"]: entry["nsamples"] for entry in wids} == in_tars and split["num_samples"] == 70
    manifest = json.loads(store.read("manifest.json"))
    assert {f"{one['name']}.tar": one["num_images"] for one in manifest["shards"]} == in_tars
    assert "rejected images are stored too" in store.read("README.md").decode()
    found = list(open_images(str(tmp_path / "run"), tuple(digits.CLASS_NAMES)).read())
    usable = [one for one in found if isinstance(one, LabelledImage)]
    assert len(usable) == manifest["counts"]["samples"]["accepted"] < len(found) == 70


def test_indexes_of_wids_and_timm(run: tuple[Store, Plan, FinishedRun]) -> None:
    store, _, _ = run
    wids = json.loads(store.read("shards/wids.json"))
    assert (wids["__kind__"], wids["wids_version"]) == ("wids-shard-index-v1", 1)
    for entry in wids["shardlist"]:
        tar = store.read(f"shards/{entry['url']}")
        assert (hashlib.md5(tar).hexdigest(), len(tar)) == (entry["md5sum"], entry["filesize"])
        assert entry["nsamples"] == len(list(read_shard(store.path(f"shards/{entry['url']}"))))
    split = json.loads(store.read("shards/_info.json"))["splits"]["train"]
    assert split["filenames"] == [entry["url"] for entry in wids["shardlist"]]
    assert split["shard_lengths"] == [entry["nsamples"] for entry in wids["shardlist"]]
    assert (split["name"], split["num_samples"]) == ("train", sum(split["shard_lengths"]))


def test_the_card_loads_the_data_as_it_states(
    run: tuple[Store, Plan, FinishedRun], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lines are copied out of the card and run in the folder of the data set."""
    import datasets

    store, plan, done = run
    monkeypatch.chdir(store.uri)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    names: list[dict[str, Any]] = []
    for block in re.findall(r"```python\n(.*?)```", store.read("README.md").decode(), re.DOTALL):
        names.append({})
        exec(block, names[-1])
    num_images = done.manifest["counts"]["samples"]["ok"]
    assert len(list(names[0]["samples"])) == len(names[1]["samples"]) == num_images
    assert len(names[2]["rows"]) == len([row for row in rows_of(plan) if row["risk"] > 2])
    assert (tmp_path / "cache").is_dir()


def test_the_card_header_and_text(run: tuple[Store, Plan, FinishedRun]) -> None:
    """The header is YAML as the Hub wants it; text of others stands in code spans, where it does nothing."""
    store, plan, done = run
    text = store.read("README.md").decode()
    header = yaml.safe_load(text.split("---\n")[1])
    assert header["license"] == "other" and header["size_categories"] == ["n<1K"]
    assert header["configs"][0]["data_files"] == [{"split": "train", "path": ["shards/*.tar"]}]
    assert {"synthetic", "guidance-boundary", "guidance-prompt"} <= set(header["tags"])
    assert "Every image is synthetic" in text and plan.digest in text and "Not complete" not in text
    assert "``hub/`x`\\|<script>alert(1)</script>``" in text and "``red \\| <b>`ink`</b>``" in text
    outside = re.sub(r"(`+)(?!`).*?(?<!`)\1(?!`)", "", text)
    assert "<" not in outside.split("---\n", 2)[2].replace("n<1K", "")
    table = [line for line in text.splitlines() if line.startswith("| between |")]
    assert f"{done.groups[0].scores['kldb'].median:.3g}" in table[0]  # type: ignore[union-attr]
    assert all(f"| `{name}` |" in text for name in arrow_schema(surplus=True).names)


def test_code_spans_hold_anything() -> None:
    assert code("a`b``c") == "```a`b``c```"
    assert code("`a") == "`` `a ``"
    assert code("x\n# y\x1b\u202e|", table=False) == "`x # y |`"
    assert code("") == "` `"


def test_success_comes_last_and_only_when_all_is_there(tmp_path: Path) -> None:
    store, plan, _ = open_case(tmp_path)
    commit_one(store, plan, 2)
    done = close(store, plan)
    assert not done.complete and b"Not complete" in store.read("README.md")
    with pytest.raises(OutputError, match="3 of 4 shards are not committed"):
        mark_success(store, plan)
    for number in (0, 1):
        commit_one(store, plan, number)
    with pytest.raises(OutputError, match="1 of 4 shards are not committed"):
        mark_success(store, plan)
    commit_rest(store, plan)
    assert close(store, plan).complete and not store.exists(SUCCESS)
    mark_success(store, plan)
    assert store.read(SUCCESS).decode().strip() == plan.digest
    first = {name: store.read(name) for name in ("metadata.parquet", "manifest.json", "README.md", "shards/wids.json")}
    close(store, plan)
    assert {name: store.read(name) for name in first} == first, "the same run closes with the same bytes"


def test_nothing_committed_yet_closes_too(tmp_path: Path) -> None:
    store, plan, _ = open_case(tmp_path)
    done = close(store, plan)
    assert done.groups == [] and not done.complete
    assert pq.read_table(store.path("metadata.parquet")).num_rows == 0


def test_shards_without_an_image_are_left_out_of_the_indexes(tmp_path: Path) -> None:
    """A reader that looks into the first tar to learn the columns must not meet an empty one."""
    import datasets

    store, plan, _ = open_case(tmp_path / "out", count=6)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tests.run_cases.make_results", _all_failed)
        commit_one(store, plan, 0)
    commit_rest(store, plan)
    close(store, plan)
    assert len(json.loads(store.read("shards/wids.json"))["shardlist"]) == plan.num_shards - 1
    loaded = datasets.load_dataset(store.uri, cache_dir=str(tmp_path / "cache"), split="train")
    assert len(loaded) == sum(commit.counts.ok for commit in list_commits(store).values())


def _all_failed(plan: Plan, shard: ShardSpec) -> Iterator[SampleResult]:
    for spec in plan.samples(shard):
        yield SampleResult(record=failed_record(spec, "none"), run=make_result(spec).run)


def test_a_committed_shard_that_is_lost_or_changed_is_reported(tmp_path: Path) -> None:
    store, plan, _ = open_case(tmp_path)
    commit_rest(store, plan)
    close(store, plan)
    mark_success(store, plan)
    path = store.path("shards/demo-000001.parquet")
    whole = path.read_bytes()
    path.write_bytes(store.read("shards/demo-000000.parquet"))
    with pytest.raises(CorruptShardError, match=r"demo-000001\.parquet: has 4 rows, not the 2 committed"):
        close(store, plan)
    assert not store.exists(SUCCESS), "the marker does not outlive a closing that fails"
    path.write_bytes(whole[:-1])
    with pytest.raises(CorruptShardError, match=r"demo-000001\.parquet: cannot be read"):
        close(store, plan)
    path.unlink()
    with pytest.raises(CorruptShardError, match=r"demo-000001\.parquet: is missing"):
        close(store, plan)


def test_many_rows_become_a_folder_of_parts_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata_table, "ROWS_PER_GROUP", 4)
    store, plan, _ = open_case(tmp_path, count=20)
    commit_rest(store, plan)
    commits = list_commits(store)
    write_metadata(store, "demo", commits)
    whole = pq.read_table(store.path("metadata.parquet"))
    write_metadata(store, "demo", commits, rows_per_file=9)
    parts = store.list("metadata.parquet")
    assert [pq.read_metadata(store.path(part)).num_rows for part in parts] == [8, 8, 8, 2]
    assert pq.read_table(store.path("metadata.parquet")).equals(whole)
    assert summarise(store.path("metadata.parquet")) == summarise_table(whole)
    write_metadata(store, "demo", commits, rows_per_file=16)
    parts = store.list("metadata.parquet")
    assert [pq.read_metadata(store.path(part)).num_rows for part in parts] == [16, 10]
    write_metadata(store, "demo", commits)
    assert pq.read_table(store.path("metadata.parquet")).equals(whole)


def test_a_path_that_looks_like_a_partition_adds_no_column(tmp_path: Path) -> None:
    """`key=value` in the output's path is not data."""
    store, plan, _ = open_case(tmp_path / "risk=9" / "out")
    commit_rest(store, plan)
    assert close(store, plan).groups[0].scores["risk"].median <= 4  # type: ignore[union-attr]
