"""Programs that know nothing of this project read a run, a merge and every format of an export."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import engine
from engine.data.images import digits
from engine.data.reading.export import export
from engine.data.reading.export_options import ExportOptions
from tests.composed import composed_job, make_run
from tests.conftest import REPOSITORY
from tests.corpus_cases import make_run as make_case

NAMES = tuple(digits.CLASS_NAMES)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(composed_job(tmp_path_factory.mktemp("foreign") / "run", count=2, store_rejected=False))


@pytest.fixture(scope="module")
def merged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All samples of the run, in shards of 16."""
    out = tmp_path_factory.mktemp("foreign") / "merged"
    return export((str(run),), ExportOptions(output=str(out), samples_per_shard=16)).path


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return str(tmp_path / "cache")


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """The samples by this project's own reader."""
    return engine.open_run(str(folder)).samples.to_table().to_pylist()


def test_webdataset_reads_a_merge(merged: Path) -> None:
    import webdataset

    rows = rows_of(merged)
    tars = str(merged / "shards" / f"corpus-{{000000..{(len(rows) - 1) // 16:06d}}}.tar")
    samples = list(webdataset.WebDataset(tars, shardshuffle=False).decode("pil"))
    assert [(one["__key__"], one["cls"], one["json"]["risk"]) for one in samples] == [
        (row["key"], row["class_index"], row["risk"]) for row in rows
    ]
    assert len(rows) > 32 and {one["png"].size for one in samples} == {(32, 32)}


def test_datasets_reads_runs_and_merges_by_their_cards(run: Path, merged: Path, cache: str) -> None:
    import datasets

    for folder in (run, merged):
        rows = rows_of(folder)
        loaded = datasets.load_dataset(str(folder), split="train")
        assert [(one["__key__"], one["cls"]) for one in loaded] == [(row["key"], row["class_index"]) for row in rows]
        assert loaded[0]["png"].size == (32, 32)
        assert loaded.features["cls"] == datasets.ClassLabel(names=list(NAMES))
    table = datasets.load_dataset("parquet", data_files=str(run / "metadata.parquet"), split="train")
    assert table["key"][:] == pq.read_table(run / "metadata.parquet")["key"].to_pylist()


@pytest.mark.parametrize("kind", ["imagefolder", "parquet"])
def test_datasets_reads_exports(run: Path, tmp_path: Path, cache: str, kind: str) -> None:
    """By the card, and by the builder's name; with duplicates.csv beside the data."""
    import datasets

    options = ExportOptions(output=str(tmp_path / "out"), format=kind, samples_per_shard=20, deduplicate=0.995)
    out = export((str(run),), options).path
    rows = {row["key"]: row for row in rows_of(run)}
    for loaded in (
        datasets.load_dataset(str(out), split="train"),
        datasets.load_dataset(kind, data_dir=str(out), split="train"),
    ):
        assert len(loaded) == json.loads((out / "manifest.json").read_text())["counts"]["images"] > 20
        for one in loaded:
            row = rows[one["key"]]
            assert (one["label"], one["class_name"], one["risk"]) == (
                row["class_index"],
                row["class_name"],
                row["risk"],
            )
            assert one["image"].size == (32, 32) and one["soft_label"] == row["soft_label"]
        assert loaded.features["label"] == datasets.ClassLabel(names=list(NAMES))


@pytest.mark.parametrize("kind", ["imagefolder", "parquet"])
def test_a_class_called_train_hides_no_other(
    tmp_path: Path, cache: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Builders of `datasets` take folders and files called train or test for splits; the card's lines do not."""
    labels = ["bullet train", "one", "two"]
    run = make_case(
        tmp_path / "run", name="stress-test", labels=labels, requests=[
            {"name": "all", "method": "prompt", "classes": "all", "count": 4}
        ],
        change=lambda record: record | {"class_name": labels[record["class_index"]]},
    )  # fmt: skip
    done = export((str(run),), ExportOptions(output=str(tmp_path / "out"), format=kind))
    monkeypatch.chdir(done.path)
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", (done.path / "README.md").read_text(), re.DOTALL):
        exec(block, names)
    assert Counter(names["samples"]["class_name"][:]) == Counter(row["class_name"] for row in rows_of(run))
    assert set(names["samples"]["label"][:]) == {0, 1, 2}


@pytest.mark.parametrize("kind", ["run", "webdataset", "imagefolder", "parquet"])
def test_what_takes_the_place_of_other_data_is_read_anew(tmp_path: Path, cache: str, kind: str) -> None:
    """`datasets` caches by path and version, not by what the files hold."""
    import datasets

    folder = tmp_path / "data"
    for count in (4, 6):
        if kind == "run":
            made = make_case(folder, count=count)
            num_stored = sum(bool(row["sha256"]) for row in pq.read_table(made / "metadata.parquet").to_pylist())
        else:
            run = make_case(tmp_path / f"run-{count}", count=count)
            done = export((str(run),), ExportOptions(output=str(folder), format=kind))
            num_stored = done.manifest["counts"]["images"]
        assert len(datasets.load_dataset(str(folder), split="train")) == num_stored
        shutil.rmtree(folder)


def test_parquet_exports_load_with_equal_class_names(tmp_path: Path, cache: str) -> None:
    """ImageNet has two classes called crane; `datasets` refuses names that are equal."""
    import datasets

    run = make_case(tmp_path / "run", labels=["crane", "one", "crane"], requests=[
        {"name": "all", "method": "prompt", "classes": "all", "count": 4}
    ])  # fmt: skip
    out = export((str(run),), ExportOptions(output=str(tmp_path / "out"), format="parquet")).path
    loaded = datasets.load_dataset(str(out), split="train")
    assert loaded.features["label"].names == ["crane (0)", "one", "crane (2)"]
    assert loaded["class_index"][:] == loaded["label"][:]


@pytest.mark.parametrize("kind", ["webdataset", "parquet"])
def test_the_lines_of_a_merged_card_run(run: Path, tmp_path: Path, cache: str, monkeypatch, kind: str) -> None:
    """Every one of them, and what they read is what was taken."""
    done = export((str(run),), ExportOptions(output=str(tmp_path / "out"), format=kind, with_surplus=True))
    monkeypatch.chdir(done.path)
    keys = {row["key"] for row in rows_of(run)}
    blocks = re.findall(r"```python\n(.*?)```", (done.path / "README.md").read_text(), re.DOTALL)
    assert len(blocks) == {"webdataset": 3, "parquet": 1}[kind]
    for block in blocks:
        names: dict[str, Any] = {}
        exec(block, names)
        if "samples" in names:
            assert {one.get("__key__") or one["key"] for one in names["samples"]} == keys


# Digits, cases, none of ASCII, names of YAML, markup, and two that are equal.
ODD = ["10", "9", "b", "B", "é", "null", "- a: b # c", "crane", "crane", "a\u2028\n---\nb", ""]


def test_odd_classes_have_their_labels_everywhere(tmp_path: Path, cache: str, monkeypatch) -> None:
    """By the card's lines `datasets`, torchvision and timm give the index of `.cls`, also without some classes."""
    import datasets
    import timm.data
    import torchvision

    made = make_case(
        tmp_path / "run", labels=ODD, requests=[{"name": "all", "method": "prompt", "classes": "all", "count": 2}],
        change=lambda record: record | {"class_name": ODD[record["class_index"]]},
    )  # fmt: skip
    condition = "class_index not in [0, 4]"
    rows = engine.open_run(str(made)).filter(condition).samples.to_table().to_pylist()
    wanted = {row["key"]: row["class_index"] for row in rows}
    shards = export((str(made),), ExportOptions(output=str(tmp_path / "shards"), condition=condition)).path
    loaded = datasets.load_dataset(str(shards), split="train")
    assert dict(zip(loaded["__key__"], loaded["cls"], strict=True)) == wanted
    names = loaded.features["cls"].names
    assert len(set(names)) == len(ODD) and names[:7] == ODD[:7] and names[7:9] == ["crane (7)", "crane (8)"]
    for folders in ("index", "name"):
        options = ExportOptions(
            output=str(tmp_path / folders), format="imagefolder", folders=folders, condition=condition
        )
        out = export((str(made),), options).path
        assert json.loads((out / "classes.json").read_text()) == {str(n): name for n, name in enumerate(ODD)}
        monkeypatch.chdir(out)
        found: dict[str, Any] = {}
        for block in re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1:]:
            exec(block, found)
        folder, images = found["folder"], found["images"]
        assert isinstance(folder, torchvision.datasets.ImageFolder) and isinstance(images, timm.data.ImageDataset)
        assert {Path(path).stem: label for path, label in folder.samples} == wanted
        assert {Path(images.filename(n)).stem: images[n][1] for n in range(len(images))} == wanted
        assert folder.targets == [label for _, label in folder.samples] and len(folder.classes) == len(ODD)


@pytest.mark.parametrize("folders", ["index", "name"])
@pytest.mark.parametrize("condition", ["", "class_index in [8, 3]"])
def test_torchvision_gives_the_labels_of_the_shards(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: str, condition: str
) -> None:
    """By the lines of the card, also of some of the classes; of all of them whatever reads folders in their order."""
    import torchvision

    options = ExportOptions(output=str(tmp_path / "out"), format="imagefolder", folders=folders, condition=condition)
    done = export((str(run),), options)
    out = done.path
    wanted = {row["key"]: row["class_index"] for row in engine.open_run(str(run)).samples.to_table().to_pylist()}
    monkeypatch.chdir(out)
    names: dict[str, Any] = {}
    exec(re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)[1], names)
    data = names["folder"]
    found = {Path(path).stem: data[number][1] for number, (path, _) in enumerate(data.samples)}
    assert found == {key: label for key, label in wanted.items() if key in found} and len(found) >= 4
    labels = json.loads((out / "folders.json").read_text())
    assert list(labels.values()) == list(range(10)) and (list(labels) == list(NAMES)) == (folders == "name")
    plain = torchvision.datasets.ImageFolder(out)
    is_plain = [label for _, label in plain.samples] == [wanted[Path(path).stem] for path, _ in plain.samples]
    assert is_plain == (folders == "index" and not condition)
    assert any("folders.json" in remark for remark in done.remarks) == (not is_plain)


@pytest.mark.parametrize("which", ["run", "merged"])
def test_timm_reads_shards_by_their_info(which: str, request: pytest.FixtureRequest) -> None:
    """timm finds the shards and their lengths in `_info.json`."""
    import timm.data

    folder: Path = request.getfixturevalue(which)
    data = timm.data.create_dataset("wds/", root=str(folder / "shards"), split="train", batch_size=1, is_training=False)
    rows = rows_of(folder)
    assert len(data) == len(rows)
    assert [label for _, label in data] == [row["class_index"] for row in rows]
    assert next(iter(data))[0].size == (32, 32)


def test_duckdb_reads_runs_of_two_schema_versions(tmp_path: Path) -> None:
    import duckdb

    new = make_case(tmp_path / "new", name="new")
    old = make_case(tmp_path / "old", name="old", version=1)
    files = [str(one / "metadata.parquet") for one in (old, new)]
    found = duckdb.execute(
        "select key, risk, judge from read_parquet(?, union_by_name = true) where status = 'ok' and risk > 2", [files]
    ).fetchall()
    corpus = engine.open_run(str(old), str(new)).filter("status == 'ok' and risk > 2")
    assert found == [tuple(row.values()) for row in corpus.to_table(["key", "risk", "judge"]).to_pylist()]
    assert {judge is None for *_, judge in found} == {True, False}


def test_the_retraining_example_of_the_docs_works(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it stands in docs/reading.md, on a small run; what it trained knows the samples better than before."""
    import torch
    from transformers import AutoModelForImageClassification

    text = (REPOSITORY / "docs" / "reading.md").read_text()
    section = text[text.index("## Retraining") :]
    code = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[0]
    assert len(code.strip().splitlines()) <= 20
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "quickstart").symlink_to(run)
    (tmp_path / "engine").symlink_to(REPOSITORY / "engine")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(code, names)
    images, labels = zip(*((image, label) for image, label, _ in names["data"]), strict=True)
    losses = []
    for folder in (names["folder"], "retrained"):
        model = AutoModelForImageClassification.from_pretrained(folder).eval()
        with torch.no_grad():
            losses.append(float(model(pixel_values=torch.stack(images), labels=torch.tensor(labels)).loss))
    assert len(labels) > 40 and losses[1] < losses[0] / 2


def test_the_first_example_of_the_docs_works(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "runs").mkdir()
    shutil.copytree(run, tmp_path / "runs" / "quickstart")
    monkeypatch.chdir(tmp_path)
    code = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "reading.md").read_text(), re.DOTALL)[0]
    names: dict[str, Any] = {}
    exec(code, names)
    assert 0 < len(names["hard"]) < len(names["corpus"])
