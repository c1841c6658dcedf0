"""Runs read as data: rows of all versions and states, images by number and by stream, loaders with workers."""

from __future__ import annotations

import io
import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

import engine
from engine.data.reading.source import open_source
from engine.data.run.schema import arrow_schema
from engine.data.run.shards import read_shard
from engine.data.stores.opening import open_store
from engine.errors import CorruptShardError, JobError, OutputError, RiskforgeError
from engine.job.columns import COLUMNS
from engine.job.plan import Extent
from engine.report.render import write_report
from engine.studies.compare.scored_run import read_scored_run
from engine.studies.samples import open_study
from tests.conftest import REPOSITORY
from tests.corpus_cases import make_run
from tests.run_cases import LABELS


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("corpus") / "run")


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of schema version 1 with the same names and other seeds."""
    return make_run(tmp_path_factory.mktemp("corpus") / "old", version=1, seed=1)


def stored(run: Path) -> dict[str, tuple[bytes, dict[str, Any]]]:
    """What the tars hold, read by the strict reader."""
    tars = sorted((run / "shards").glob("*.tar"))
    return {key: (image, record) for tar in tars for key, image, record, _ in read_shard(tar)}


def test_rows_of_both_schema_versions_are_one_dataset(run: Path, old: Path) -> None:
    corpus = engine.open_run(str(run), str(old))
    dataset = corpus.metadata
    assert isinstance(dataset, pyarrow.dataset.Dataset)
    assert dataset.schema.names == arrow_schema(surplus=True).names
    new_rows, old_rows = pq.read_table(run / "metadata.parquet"), pq.read_table(old / "metadata.parquet")
    found = dataset.to_table().to_pylist()
    later = {column.name: None for column in COLUMNS if column.since > 1}
    assert found == [*new_rows.to_pylist(), *(later | row for row in old_rows.to_pylist())]
    table = corpus.to_table()
    assert table["scored"].to_pylist() == [row["status"] != "failed" for row in found], (
        "rows of version 1 do not have it"
    )
    assert len(corpus) == len(found) == len(new_rows) + len(old_rows)
    assert corpus.labels == tuple(LABELS) and [one.state for one in corpus.runs] == ["finished"] * 2
    assert repr(corpus) == f"Corpus({str(run)!r} (finished), {str(old)!r} (finished); no filter)"


def test_samples_have_an_image_and_are_accepted(run: Path) -> None:
    corpus = engine.open_run(str(run))
    rows = corpus.to_table().to_pylist()
    accepted = [row["key"] for row in rows if row["sha256"] and row["accepted"]]
    assert corpus.samples.to_table(["key"])["key"].to_pylist() == accepted
    everything = corpus.with_images(rejected=True).to_table(["key", "oracle_agrees", "status"])
    assert set(everything["key"].to_pylist()) == set(stored(run)) > set(accepted)
    assert set(everything["status"].to_pylist()) == {"ok", "rejected"}
    assert len(corpus.filter("status == 'failed'")) > 0, "the run has failures, too"


def test_surplus_is_left_out_unless_asked_for(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "metadata.parquet"
    table = pq.read_table(path)
    flags = pa.array([row["accepted"] and number % 2 == 0 for number, row in enumerate(table.to_pylist())])
    table = table.set_column(table.column_names.index("surplus"), table.schema.field("surplus"), flags)
    pq.write_table(table, path)
    corpus = engine.open_run(str(tmp_path / "run"))
    num_surplus = sum(flags.to_pylist())
    assert len(corpus.with_images(surplus=True)) - len(corpus.samples) == num_surplus > 0
    assert len(corpus.to_torch()) == len(corpus.samples)
    assert len(corpus.with_images(surplus=True).to_torch()) == len(corpus.samples) + num_surplus


def test_rows_without_the_column_of_surplus_are_within_their_quota(run: Path, tmp_path: Path) -> None:
    """As runs have them that were closed before there were quotas."""
    copy = tmp_path / "old"
    shutil.copytree(run, copy)
    path = copy / "metadata.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["surplus"]), path)
    wanted = engine.open_run(str(run)).samples.to_table(["key"])
    assert len(wanted) and engine.open_run(str(copy)).samples.to_table(["key"]).equals(wanted)


def test_an_unfinished_run_is_read_from_its_committed_shards(tmp_path: Path) -> None:
    """Also where the metadata of an earlier closing is there, and more shards are by now."""
    run = make_run(tmp_path / "run", finish=False, num_shards=1)
    (run / "shards" / "demo-000009.parquet").write_bytes(b"of a worker that is writing")
    corpus = engine.open_run(str(run))
    assert corpus.runs[0].state == "not finished: 1 committed shards so far" and not corpus.runs[0].is_finished
    assert len(corpus) == 16 and corpus.labels == ()
    assert len(corpus.to_torch()) == len(corpus.samples) == len(corpus.filter("accepted"))
    make_run(tmp_path / "whole")
    shutil.copy(tmp_path / "whole" / "metadata.parquet", run)
    assert len(engine.open_run(str(run))) == 16
    empty = make_run(tmp_path / "empty", finish=False, num_shards=0)
    with pytest.raises(JobError, match="has no committed shard yet"):
        engine.open_run(str(empty))


def test_an_unfinished_run_knows_what_is_beyond_its_quotas(tmp_path: Path) -> None:
    """As the closed run does, in shards that hold none, some and only such samples; filters go by it."""
    about: dict[str, Any] = {
        "requests": [
            {"name": "free", "method": "prompt", "classes": ["zero"], "count": 5},
            {"name": "all", "method": "prompt", "classes": "all", "count": 4, "accept": {"is_error": True}},
        ],
        "output": {"uri": str(tmp_path / "run"), "samples_per_shard": 3},
        # Of a class four are wanted, and sixteen planned.
        "rounds": tuple(Extent(request=1, cell=cell, start=4, stop=16, samples_per_shard=3) for cell in range(3)),
        "change": lambda record: record | {"accepted": True, "status": "ok"},
    }
    run = make_run(tmp_path / "run", finish=False, **about)
    make_run(tmp_path / "closed", **about | {"output": about["output"] | {"uri": str(tmp_path / "closed")}})
    corpus, closed = engine.open_run(str(run)), engine.open_run(str(tmp_path / "closed"))
    assert not corpus.runs[0].is_finished and closed.runs[0].is_finished
    wanted = closed.to_table(["key", "surplus"])
    assert corpus.to_table(["key", "surplus"]).to_pylist() == wanted.to_pylist()
    assert 0 < sum(wanted["surplus"].to_pylist()) < len(wanted)
    assert corpus.to_table().drop(["sha256"]).to_pylist() == closed.to_table().drop(["sha256"]).to_pylist()
    assert len(corpus.filter("surplus")) == len(closed.filter("surplus"))
    assert len(corpus.filter("not surplus")) == len(closed.filter("not surplus"))
    assert len(corpus.samples) == len(closed.samples) < len(corpus.with_images(surplus=True))
    assert len(corpus.to_torch()) == len(closed.to_torch())


def test_metadata_may_be_a_folder_of_parts(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    path = tmp_path / "run" / "metadata.parquet"
    table = pq.read_table(path)
    path.unlink()
    path.mkdir()
    for number, start in enumerate(range(0, len(table), 9)):
        pq.write_table(table.slice(start, 9), path / f"part-{number:06d}.parquet")
    assert engine.open_run(str(tmp_path / "run")).to_table().equals(engine.open_run(str(run)).to_table())


def test_a_program_that_reads_images_ends_quietly(run: Path) -> None:
    """Modules go before objects at the end of a program, which only a process of its own sees."""
    text = "import sys, engine; data = engine.open_run(sys.argv[1]).to_torch(); print(len(data[0]))"
    done = subprocess.run([sys.executable, "-c", text, str(run)], capture_output=True, text=True, cwd=REPOSITORY)
    assert (done.stdout, done.stderr) == ("3\n", "")


def test_torch_gives_image_label_and_weight_by_number(run: Path, old: Path) -> None:
    """Every sample again from the strict reader of tars."""
    corpus = engine.open_run(str(run), str(old)).filter("risk > 1")
    data = corpus.to_torch(labels="soft", weights="1 + 2 * oracle_agrees")
    hard = corpus.to_torch()
    rows = corpus.samples.to_table([*arrow_schema().names, "oracle_agrees"]).to_pylist()
    assert len(data) == len(hard) == len(rows) and data.keys == [row["key"] for row in rows]
    assert data.class_names == tuple(LABELS)
    images = [stored(run), stored(old)]
    num_new = len(engine.open_run(str(run)).filter("risk > 1").samples)
    assert 0 < num_new < len(rows)
    for number in reversed(range(len(rows))):
        image, label, weight = data[number]
        row = rows[number]
        pixels = np.asarray(Image.open(io.BytesIO(images[number >= num_new][row["key"]][0])).convert("RGB"))
        assert torch.equal((image * 255).round().byte().permute(1, 2, 0), torch.from_numpy(pixels.copy()))
        assert image.dtype == torch.float32 and label.tolist() == row["soft_label"]
        assert weight == 1 + 2 * row["oracle_agrees"]
        assert hard[number][1:] == (row["class_index"], 1.0)


def _shape(image: Image.Image) -> torch.Tensor:
    return torch.tensor(image.size)


def test_a_weight_may_be_zero(run: Path) -> None:
    """A condition alone is a weight of 0 or 1; a negative one is refused elsewhere."""
    corpus = engine.open_run(str(run))
    weights = corpus.to_torch(weights="1 * oracle_agrees").weights
    assert set(weights.tolist()) == {0.0, 1.0} and len(weights) == len(corpus.samples)


def test_a_loader_with_workers_gives_the_same(run: Path) -> None:
    """Files are opened by each worker for itself, whether it is forked or spawned."""
    data = engine.open_run(str(run)).to_torch(weights="risk")
    expected = [data[number] for number in range(len(data))]
    assert len(pickle.dumps(data)) < 100_000
    for context, num_workers in (("fork", 2), ("spawn", 1)):
        loader = DataLoader(data, batch_size=4, num_workers=num_workers, multiprocessing_context=context)
        images, labels, weights = (torch.cat(parts) for parts in zip(*loader, strict=True))
        assert torch.equal(images, torch.stack([one[0] for one in expected]))
        assert labels.tolist() == [one[1] for one in expected]
        assert weights.tolist() == [one[2] for one in expected]
    assert engine.open_run(str(run)).to_torch(_shape)[0][0].tolist() == [4, 4]


def test_webdataset_streams_the_selected_samples_alone(run: Path, old: Path) -> None:
    """Two runs with equal keys: a sample is chosen by its run, not by its key alone."""
    corpus = engine.open_run(str(run), str(old)).filter("risk > 1 and class_index > 0")
    samples = list(corpus.to_webdataset())
    rows = corpus.samples.to_table(["key", "risk", "class_index"]).to_pylist()
    assert [(one["__key__"], one["json"]["risk"], one["cls"]) for one in samples] == [
        (row["key"], row["risk"], row["class_index"]) for row in rows
    ]
    assert samples[0]["png"].size == (4, 4) and len({row["key"] for row in rows}) < len(rows)
    everything = list(engine.open_run(str(run)).with_images(rejected=True).to_webdataset(decode=None))
    assert {one["__key__"]: one["png"] for one in everything} == {key: image for key, (image, _) in stored(run).items()}
    loader = DataLoader(corpus.to_webdataset(decode=None).to_tuple("__key__"), batch_size=None, num_workers=2)
    assert sorted(key for (key,) in loader) == sorted(row["key"] for row in rows)


def test_rescored_scores_inside_a_run_find_it_wherever_it_was_moved(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An address that is relative is so to the folder, not to where the reader stands."""
    shutil.copytree(run, tmp_path / "run")
    inside = tmp_path / "run" / "rescored" / "target-t9"
    inside.mkdir(parents=True)
    shutil.copy(run / "metadata.parquet", inside)
    (inside / "manifest.json").write_text(json.dumps({"rescored_from": {"uri": "../.."}}))
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    corpus = engine.open_run(str(tmp_path / "moved" / "rescored" / "target-t9"))
    assert corpus.labels == tuple(LABELS) and len(list(corpus.to_webdataset())) == len(corpus.samples) > 0
    assert corpus.runs[0].tars[0].fetch().parent == (tmp_path / "moved" / "shards").resolve()


def test_rescored_scores_come_with_the_images_of_their_run(run: Path, tmp_path: Path) -> None:
    """Of a folder with `rescored_from`, rows are its own and images the run's, for every way of reading."""
    table = pq.read_table(run / "metadata.parquet")
    risks = pa.array([100 + number for number in range(len(table))], pa.float64())
    table = table.set_column(table.column_names.index("risk"), table.schema.field("risk"), risks)
    (tmp_path / "rescored").mkdir()
    pq.write_table(table, tmp_path / "rescored" / "metadata.parquet")
    manifest = {"name": "rescored", "rescored_from": str(run), "models": {"target": {"digest": "t9", "labels": LABELS}}}
    (tmp_path / "rescored" / "manifest.json").write_text(json.dumps(manifest))
    corpus = engine.open_run(str(tmp_path / "rescored")).filter("risk > 110")
    keys = corpus.samples.to_table(["key"])["key"].to_pylist()
    assert keys and corpus.runs[0].targets == {"t9"}
    assert [one["json"]["risk"] for one in corpus.to_webdataset()] == corpus.samples.to_table(["risk"])[
        "risk"
    ].to_pylist()
    data = corpus.to_torch()
    images = stored(run)
    assert data.keys == keys
    both = engine.open_run(str(run), str(tmp_path / "rescored"))
    for reading in (both.to_torch, both.to_webdataset):
        with pytest.raises(JobError, match=r"have the same images; open one of them"):
            reading()
    first = np.asarray(Image.open(io.BytesIO(images[keys[0]][0])).convert("RGB"))
    assert np.array_equal((data[0][0] * 255).round().byte().permute(1, 2, 0).numpy(), first)
    (tmp_path / "rescored" / "manifest.json").write_text(
        json.dumps(manifest | {"rescored_from": str(tmp_path / "gone")})
    )
    with pytest.raises(JobError, match=r"was scored from .*gone.*which cannot be opened"):
        engine.open_run(str(tmp_path / "rescored"))
    (tmp_path / "rescored" / "manifest.json").write_text(
        json.dumps(manifest | {"rescored_from": str(tmp_path / "rescored")})
    )
    with pytest.raises(RiskforgeError, match="rescored_from is not the address of a run"):
        engine.open_run(str(tmp_path / "rescored"))


def test_what_cannot_be_opened_is_reported(run: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    for uri, message in (
        ("nowhere", "there is no folder 'nowhere'"),
        (str(tmp_path / "empty"), "holds no run"),
        (str(tmp_path / "file"), "is a file, not a folder"),
        ("s4://bucket", "s4:// is not supported"),
    ):
        with pytest.raises(RiskforgeError, match=message):
            engine.open_run(uri)
    with pytest.raises(JobError, match="is given twice"):
        engine.open_run(str(run), f"{run}/../{run.name}")
    copied = tmp_path / "copied"
    copied.mkdir()
    pq.write_table(pq.read_table(run / "metadata.parquet").drop_columns(["sha256", "key"]), copied / "metadata.parquet")
    with pytest.raises(JobError, match="has no column key, sha256"):
        engine.open_run(str(copied))
    pq.write_table(
        pq.read_table(run / "metadata.parquet").drop_columns(["risk", "judge", "is_error"]), copied / "metadata.parquet"
    )
    assert len(engine.open_run(str(copied)).filter("oracle_agrees")) > 0
    assert len(engine.open_run(str(copied)).filter("judge_conformity > 0")) == 0
    for condition in ("risk > 1", "valid_failure"):
        with pytest.raises(JobError, match=rf"at character 1: '{condition.split()[0]}' is not a column"):
            engine.open_run(str(copied)).filter(condition)
    (copied / "metadata.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(CorruptShardError, match="the rows cannot be read"):
        engine.open_run(str(copied))
    for text in ("{", "[]", '{"models": [], "sources": 3}'):
        shutil.copy(run / "metadata.parquet", copied)
        (copied / "manifest.json").write_text(text)
        if text.startswith('{"'):
            assert engine.open_run(str(copied)).labels == ()
            continue
        with pytest.raises(CorruptShardError, match=r"manifest\.json: .*restore the file"):
            engine.open_run(str(copied))


@pytest.mark.parametrize("text", ["{", "[]", "[" * 100_000])
def test_a_damaged_manifest_is_reported_alike_by_all(run: Path, tmp_path: Path, text: str) -> None:
    """With the path and the remedy, whoever reads it."""
    copied = shutil.copytree(run, tmp_path / "run")
    (copied / "manifest.json").write_text(text)
    messages = set()
    for read in (open_source, read_scored_run, open_study, lambda uri: write_report(open_store(uri))):
        with pytest.raises(CorruptShardError, match=r"^.*/run/manifest\.json: .*; restore the file") as caught:
            read(str(copied))
        messages.add(str(caught.value))
    assert len(messages) == 1


def test_wrong_choices_are_reported(run: Path, tmp_path: Path) -> None:
    corpus = engine.open_run(str(run))
    with pytest.raises(JobError, match=r"no column 'rsik'; did you mean 'risk'\?"):
        corpus.to_table(["rsik"])
    with pytest.raises(JobError, match=r"no sample is selected: of 26 rows [0-9]+ are accepted .*\(risk > 100\)"):
        corpus.filter("risk > 100").to_torch()
    with pytest.raises(JobError, match="no sample is selected"):
        corpus.filter("status == 'failed'").to_webdataset()
    with pytest.raises(JobError, match="labels: 'medium' is not one of hard, soft"):
        corpus.to_torch(labels="medium")  # type: ignore[arg-type]
    for weights, message in (("-risk", "finite and not negative"), ("risk / (risk - risk)", "finite and not")):
        with pytest.raises(JobError, match=message):
            corpus.to_torch(weights=weights)
    requests = [{"name": "all", "method": "prompt", "classes": ["zero", "one"], "count": 4}]
    other = make_run(tmp_path / "other", labels=["zero", "one", "two", "three"], seed=2, requests=requests)
    both = engine.open_run(str(run), str(other))
    assert len(both) > len(corpus), "rows of different classes can be looked at"
    with pytest.raises(JobError, match=r"have different classes .3 and 4; class 3 is none there and 'three' here"):
        both.to_torch()


def test_torn_and_missing_tars_are_reported(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    tar = sorted((tmp_path / "run" / "shards").glob("*.tar"))[0]
    whole = tar.read_bytes()
    corpus = engine.open_run(str(tmp_path / "run"))
    data = corpus.to_torch()
    tar.write_bytes(whole[:2000])
    with pytest.raises(CorruptShardError, match=r"000000\.tar: cut short"):
        corpus.to_torch()
    with pytest.raises(CorruptShardError, match="is shorter than when it was opened"):
        [data[number] for number in range(len(data))]
    tar.unlink()
    with pytest.raises(CorruptShardError, match=r"000000\.tar: is missing"):
        corpus.to_torch()
    with pytest.raises(OutputError, match=r"000000\.tar: there is no such file"):
        pickle.loads(pickle.dumps(data))[0]
    tar.write_bytes((tmp_path / "run" / "shards" / tar.name.replace("000000", "000001")).read_bytes())
    with pytest.raises(CorruptShardError, match="no tar has the image of"):
        corpus.to_torch()
    tar.write_bytes(whole.replace(b"\x89PNG", b"\x00\x00\x00\x00", 1))
    with pytest.raises(CorruptShardError, match=r"the image of 'demo-.*' is not an image"):
        [corpus.to_torch()[number] for number in range(len(data))]
