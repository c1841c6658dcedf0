"""Runs of every schema version: each command reads them, alone and together, and none changes what they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

import engine
from engine.data.reading.export import export
from engine.data.reading.export_options import ExportOptions
from engine.data.reading.inspection import inspect
from engine.data.run.schema import arrow_schema
from engine.data.run.shards import read_shard, read_tar
from engine.data.run.verify import verify
from engine.data.stores.opening import open_store
from engine.job.columns import SCHEMA_VERSION
from engine.job.records import check_record, columns_of, failed_record, in_version, upgraded
from engine.report.render import write_report
from engine.studies.compare.program import compare_runs
from engine.studies.compare.scored_run import read_scored_run
from tests.corpus_cases import make_run
from tests.run_cases import LABELS, make_job, make_plan, make_result

VERSIONS = range(1, SCHEMA_VERSION + 1)
# Of the records in the first tar of the runs below, noted before there was a column `scored`.
DIGESTS = {1: "3a7a5d8e7b1903ef", 2: "2f6c7fd015ca11c9"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("versions")
    return {one: make_run(folder / f"v{one}", name=f"v{one}", version=one, seed=one) for one in VERSIONS}


@pytest.mark.parametrize("version", VERSIONS)
def test_a_run_of_a_version_is_read_by_everything(runs: dict[int, Path], version: int) -> None:
    """`verify`, `report`, `compare`, `inspect`, filters and figures; its columns stay those of its version."""
    run = runs[version]
    store = open_store(str(run))
    assert verify(store).findings == ()
    write_report(store, labels=LABELS)
    table = pq.read_table(run / "metadata.parquet")
    assert table.schema.equals(arrow_schema(surplus=True, version=version), check_metadata=True)
    for tar in (run / "shards").glob("*.tar"):
        assert all(list(record) == list(columns_of(version)) for _, _, record, _ in read_shard(tar))
    corpus = engine.open_run(str(run))
    assert inspect(corpus).document["schema_versions"] == {str(version): len(table)}
    num_scored = sum(row["status"] != "failed" for row in table.to_pylist())
    assert len(corpus.filter("scored")) == len(corpus.filter("risk >= 0")) == num_scored < len(table)
    night = read_scored_run(str(run))
    assert len(night.keys) == num_scored and compare_runs(night, night).new_failures == ()
    card = (run / "README.md").read_text()
    for name, column in columns_of(SCHEMA_VERSION).items():
        assert (f"| `{name}` |" in card) == (version >= column.since) == (name in table.column_names)


def test_runs_of_all_versions_are_merged(runs: dict[int, Path], tmp_path: Path) -> None:
    """In the present version, with `scored` of each; a merge of merges too."""
    one = export(tuple(map(str, runs.values())), ExportOptions(output=str(tmp_path / "one"))).path
    two = export((str(one),), ExportOptions(output=str(tmp_path / "two"), name="two")).path
    for folder in (one, two):
        table = pq.read_table(folder / "metadata.parquet")
        assert set(table["schema_version"].to_pylist()) == {SCHEMA_VERSION} and all(table["scored"].to_pylist())
        wanted = sum(len(engine.open_run(str(run)).samples) for run in runs.values())
        assert len(table) == wanted == json.loads((folder / "manifest.json").read_text())["counts"]["images"]
    together = engine.open_run(*map(str, runs.values()), str(two))
    assert len(together.filter("not scored")) == len(together.filter("status == 'failed'")) > 0


@pytest.mark.parametrize("version", VERSIONS)
def test_records_go_from_version_to_version(tmp_path: Path, version: int) -> None:
    """Down and up again nothing is lost but what the version lacks; `scored` comes back as it must be."""
    spec = make_plan(make_job(tmp_path)).requests[0].sample(0)
    for record in (make_result(spec).record, failed_record(spec, "none")):
        lower = in_version(record, version)
        check_record(lower)
        assert list(upgraded(lower)) == list(columns_of(SCHEMA_VERSION))
        lost = columns_of(SCHEMA_VERSION).keys() - columns_of(version).keys() - {"scored"}
        assert {name: value for name, value in upgraded(lower).items() if name not in lost} == {
            name: value for name, value in record.items() if name not in lost
        }
    real = dict.fromkeys(columns_of(version)) | {"method": "real", "status": "ok"}
    assert upgraded({name: value for name, value in real.items() if name != "scored"})["scored"] is False


@pytest.mark.parametrize("version", [1, 2])
def test_records_of_earlier_versions_keep_their_bytes(runs: dict[int, Path], version: int) -> None:
    """New runs have one field more; runs that go on do not."""
    tar = min((runs[version] / "shards").glob("*.tar"))
    records = b"".join(data for name, data in read_tar(tar) if name.endswith(".json"))
    assert b"scored" not in records and hashlib.sha256(records).hexdigest()[:16] == DIGESTS[version]
