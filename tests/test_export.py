"""Merge and export: what is taken, that it is equal each time, and that nothing half-made is left."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import itertools
import json
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import engine
from engine import cli
from engine.data.images import LabelledImage, decode_rgb, digits, image_key, open_images
from engine.data.images.encoding import encode
from engine.data.reading import export as export_module
from engine.data.reading.deduplicate import near_duplicates
from engine.data.reading.export import export
from engine.data.reading.export_options import ExportOptions
from engine.data.reading.formats import class_folders
from engine.data.reading.listing import list_samples, save_images
from engine.data.reading.selection import SampleReader
from engine.data.run import shard_writing
from engine.data.run.shards import inspect_pair, read_shard
from engine.errors import CorruptShardError, JobError, OutputError, RiskforgeError
from engine.job.columns import SCHEMA_VERSION
from engine.job.records import upgraded
from tests.composed import composed_job
from tests.composed import make_run as make_composed
from tests.conftest import REPOSITORY
from tests.corpus_cases import make_run
from tests.run_cases import LABELS
from tests.strike import struck

HOSTILE = ["../x", "a/b", "", "con", "two words", "Ok", "ok", "7", "..", "tab\there", "<b>é", "0001", "null\0"]


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("export") / "first")


@pytest.fixture(scope="module")
def second(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same name as the first, so of the same keys, of schema version 1, and not finished."""
    return make_run(tmp_path_factory.mktemp("export") / "second", version=1, seed=7, finish=False)


@pytest.fixture(scope="module")
def composed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of composed digits, scored by the real target."""
    return make_composed(composed_job(tmp_path_factory.mktemp("export") / "composed", count=2))


def images_of(folder: Path) -> dict[str, tuple[bytes, dict[str, Any]]]:
    """Images and records of the tars, by the strict reader."""
    tars = sorted((folder / "shards").glob("*.tar"))
    return {key: (image, record) for tar in tars for key, image, record, _ in read_shard(tar)}


def tree(folder: Path) -> dict[str, str]:
    """Checksums of all files."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def riskforge(*arguments: str | Path) -> int:
    """The command line in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["riskforge", *map(str, arguments)])
        patch.setattr(signal, "signal", lambda *_: None)
        cli.main()
    return int(end.value.code or 0)


def test_a_merge_has_the_samples_of_its_runs(first: Path, second: Path, tmp_path: Path) -> None:
    """Every accepted image once, with its record, in shards that the strict reader accepts."""
    done = export((str(first), str(second)), ExportOptions(output=str(tmp_path / "out"), samples_per_shard=10))
    out = images_of(tmp_path / "out")
    wanted = {}
    for number, run in enumerate((first, second)):
        for key, (image, record) in images_of(run).items():
            if record["accepted"]:
                wanted[f"r{number + 1}-{key}" if number else key] = (image, record)
    assert {key: image for key, (image, _) in out.items()} == {key: image for key, (image, _) in wanted.items()}
    for key, (_, record) in out.items():
        added = {"key": key, "judge": record["judge"], "scored": True}
        assert record == upgraded(wanted[key][1]) | added
        assert bool(record["judge"]) == (not key.startswith("r2-")), "version 1 had no judge"
    for tar in sorted((tmp_path / "out" / "shards").glob("*.tar")):
        assert inspect_pair(tar, tar.with_suffix(".parquet")).counts.ok in (10, len(out) % 10)
    assert list(out) != sorted(out) and done.manifest["counts"]["images"] == len(out)
    assert done.remarks == (f"{second} is not finished: 3 committed shards so far",)
    [notice] = done.notices
    assert f"{second}: is named 'demo' like {first}, and has other images under " in notice
    assert "in the new data set all its keys begin with r2-, such as r2-demo-000-" in notice


def test_the_folder_is_as_complete_as_a_run(first: Path, tmp_path: Path) -> None:
    export((str(first),), ExportOptions(output=str(tmp_path / "out"), condition="risk > 1", name="some-name"))
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"shards", "metadata.parquet", "manifest.json", "classes.json", "README.md", "_SUCCESS"}
    assert sorted(path.name for path in (tmp_path / "out" / "shards").iterdir()) == [
        "_info.json", "some-name-000000.parquet", "some-name-000000.tar", "wids.json",
    ]  # fmt: skip
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["filter"] == "risk > 1" and manifest["labels"] == LABELS
    source = manifest["sources"][0]
    assert source["rows_sha256"] == hashlib.sha256((first / "metadata.parquet").read_bytes()).hexdigest()
    assert source["num_taken"] == len(engine.open_run(str(first)).filter("risk > 1").samples)
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["configs"][0]["data_files"][0]["path"] == ["shards/*.tar"]
    assert (tmp_path / "out" / "_SUCCESS").read_text().strip() == manifest["digest"]
    info = json.loads((tmp_path / "out" / "shards" / "_info.json").read_text())["splits"]["train"]
    assert info["num_samples"] == manifest["counts"]["images"] == sum(info["shard_lengths"])


def test_the_same_command_gives_the_same_bytes(first: Path, second: Path, tmp_path: Path) -> None:
    for kind in ("webdataset", "imagefolder", "parquet"):
        trees = []
        for number, seed in enumerate((0, 0, 1)):
            out = tmp_path / f"{kind}{number}"
            export((str(first), str(second)), ExportOptions(output=str(out), format=kind, seed=seed))
            trees.append(tree(out))
        assert trees[0] == trees[1] and len(trees[0]) > 3
        assert trees[0] != trees[2], "another seed is another order"


def test_a_merge_can_be_opened_and_merged_again(first: Path, second: Path, tmp_path: Path) -> None:
    export((str(first),), ExportOptions(output=str(tmp_path / "one"), name="one"))
    export((str(tmp_path / "one"), str(second)), ExportOptions(output=str(tmp_path / "two"), name="two"))
    one, two = (engine.open_run(str(tmp_path / name)) for name in ("one", "two"))
    assert one.labels == two.labels == tuple(LABELS) and one.runs[0].targets == two.runs[0].targets == {"t0"}
    assert len(one) == len(one.samples) == len(one.to_torch()) == len(engine.open_run(str(first)).samples)
    assert len(two.samples) == len(one) + len(engine.open_run(str(second)).samples)
    assert len(list(two.filter("risk > 2").to_webdataset())) == len(two.filter("risk > 2"))


def test_what_two_runs_have_in_common_is_taken_once(first: Path, tmp_path: Path) -> None:
    """A run, and a merge that holds some of it."""
    export((str(first),), ExportOptions(output=str(tmp_path / "some"), condition="class_index == 1"))
    done = export((str(first), str(tmp_path / "some")), ExportOptions(output=str(tmp_path / "all")))
    num_some = len(engine.open_run(str(tmp_path / "some")))
    assert done.manifest["sources"][1]["num_identical"] == num_some > 0
    assert len(images_of(tmp_path / "all")) == len(engine.open_run(str(first)).samples)
    assert f"{num_some} samples are in an earlier run too" in done.notices[0]


def test_what_a_third_run_shares_with_a_renamed_one_is_taken_once(first: Path, second: Path, tmp_path: Path) -> None:
    """The second run's keys are taken and become others; the third has some of its images under the old ones."""
    export((str(second),), ExportOptions(output=str(tmp_path / "some"), condition="class_index == 1"))
    runs = (str(first), str(second), str(tmp_path / "some"))
    done = export(runs, ExportOptions(output=str(tmp_path / "all")))
    num_some = len(engine.open_run(str(tmp_path / "some")))
    assert done.manifest["sources"][1]["key_prefix"] == "r2-" and not done.manifest["sources"][2]["key_prefix"]
    assert done.manifest["sources"][2]["num_identical"] == num_some > 0
    images = [image for image, _ in images_of(tmp_path / "all").values()]
    assert len(images) == len(set(images)) == sum(len(engine.open_run(run).samples) for run in runs[:2])


def test_classes_that_are_not_known_are_not_made_up(second: Path, tmp_path: Path) -> None:
    """A run without a manifest whose target is not here: folders are called as its rows say, and nothing says more."""
    options = ExportOptions(
        output=str(tmp_path / "out"), condition="class_index == 1", format="imagefolder", folders="name"
    )
    assert export((str(second),), options).manifest["labels"] == []
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == ["one"]


def test_shards_are_written_sample_by_sample(first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many samples a shard has, one image is read at a time: after it stands in the tar the next one is."""
    events: list[str] = []
    read, add = SampleReader.read, shard_writing._ShardWriter.add
    monkeypatch.setattr(SampleReader, "read", lambda self, one: events.append("read") or read(self, one))
    monkeypatch.setattr(shard_writing._ShardWriter, "add", lambda self, one: events.append("add") or add(self, one))
    done = export((str(first),), ExportOptions(output=str(tmp_path / "out"), samples_per_shard=7))
    assert events == ["read", "add"] * done.manifest["counts"]["images"]


def test_runs_that_do_not_go_together_are_refused(first: Path, tmp_path: Path) -> None:
    other = make_run(tmp_path / "target", name="other", target="t1")
    with pytest.raises(JobError, match=r"are scored by different targets \('t0', 't1'\)"):
        export((str(first), str(other)), ExportOptions(output=str(tmp_path / "out")))
    options = ExportOptions(output=str(tmp_path / "out"), allow_different_targets=True)
    export((str(first), str(other)), options)
    with pytest.raises(JobError, match="different targets"):
        export((str(tmp_path / "out"),), ExportOptions(output=str(tmp_path / "again")))
    classes = make_run(tmp_path / "classes", name="classes", labels=["one", "two", "zero"])
    with pytest.raises(JobError, match="have different classes"):
        export((str(first), str(classes)), ExportOptions(output=str(tmp_path / "again"), allow_different_targets=True))
    assert not (tmp_path / "again").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_shards_have_images_of_one_format(first: Path, tmp_path: Path) -> None:
    """Files stay as they are: nothing is re-encoded to make them fit."""
    webp = make_run(tmp_path / "webp", name="webp", image_format="webp")
    with pytest.raises(JobError, match=r"images of different formats \(png, webp\)"):
        export((str(first), str(webp)), ExportOptions(output=str(tmp_path / "out")))
    export((str(webp),), ExportOptions(output=str(tmp_path / "alone")))
    assert images_of(tmp_path / "alone").keys() <= images_of(webp).keys()
    export((str(first), str(webp)), ExportOptions(output=str(tmp_path / "out"), format="imagefolder"))
    found = Counter(path.suffix for path in (tmp_path / "out").glob("*/*"))
    assert found == {
        f".{kind}": len(engine.open_run(str(run)).samples) for kind, run in (("png", first), ("webp", webp))
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"condition": "risk > 1000"}, r"no sample is selected: .*\(risk > 1000\)"),
        ({"condition": "__import__('os')"}, "--filter .*is not of this language"),
        ({"condition": "rsik > 1"}, "--filter .*did you mean 'risk'"),
        ({"name": "../x"}, "--name: '../x' is not of a-z"),
        ({"name": ""}, "--name"),
        ({"samples_per_shard": 0}, "--samples-per-shard: 0 is not between 1 and 1,000,000,000"),
        ({"samples_per_shard": 10**23}, "--samples-per-shard: 1.* is not between"),
        ({"deduplicate": 1.5}, "--deduplicate: 1.5 is not a cosine"),
        ({"deduplicate": float("nan")}, "--deduplicate: nan is not a cosine"),
        ({"clip": "zoo:digits/clip"}, "--clip: is for --deduplicate"),
        ({"deduplicate": 0.9, "clip": "zoo:digits/nothing"}, "zoo:digits/nothing"),
        ({"real_ratio": 1.0}, "--real-ratio: 1 is not between 0 and 1"),
        ({"real": "s3://b/x"}, "--mix-real: 's3://b/x' is not on this machine; images are read from files and folders"),
        ({"real": "nowhere"}, "--mix-real: there is no 'nowhere'"),
        ({"real": "digits:test"}, "the target has no class 'three'"),
        ({"format": "zip"}, "--format: 'zip' is not one of"),
        ({"output": "{first}/out"}, "--output: .* is in the folder of"),
        ({"output": "{first}"}, "--output: .* is in the folder of"),
        ({"output": "{first}/.."}, "--output: .* or around it"),
        ({"output": "{full}"}, "--output: .* is not empty .'x'.; choose another"),
        ({"output": "{full}/x"}, "is a file, not a folder"),
        ({"output": "{full}/x/y"}, "a part of the path is a file"),
        ({"output": "s4://x"}, "s4:// is not supported"),
    ],
)
def test_what_is_wrong_is_reported_and_leaves_nothing(
    first: Path, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "x").write_text("mine")
    before = tree(first)
    if "output" in changes:
        changes = changes | {"output": changes["output"].format(first=first, full=full)}
    with pytest.raises(RiskforgeError, match=message):
        export((str(first),), ExportOptions(**{"output": str(tmp_path / "out")} | changes))
    assert tree(first) == before and sorted(path.name for path in tmp_path.iterdir()) == ["full"]
    assert [path.name for path in full.iterdir()] == ["x"]


def test_a_torn_tar_and_a_changed_image_stop_an_export(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    tar = sorted((run / "shards").glob("*.tar"))[-1]
    whole = tar.read_bytes()
    place = whole.index(b"IDAT") + 6
    for data, message in (
        (whole[: len(whole) // 3], "cut short"),
        (whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :], "is not the one of its row"),
    ):
        tar.write_bytes(data)
        with pytest.raises(CorruptShardError, match=message):
            export((str(run),), ExportOptions(output=str(tmp_path / "out")))
        assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_rescored_scores_go_into_the_export(first: Path, tmp_path: Path) -> None:
    """The images are the run's, the records those of the new rows."""
    import pyarrow as pa

    table = pq.read_table(first / "metadata.parquet")
    risks = pa.array([100.0 + number for number in range(len(table))])
    (tmp_path / "rescored").mkdir()
    table = table.set_column(table.column_names.index("risk"), table.schema.field("risk"), risks)
    pq.write_table(table, tmp_path / "rescored" / "metadata.parquet")
    about = {"rescored_from": str(first), "models": {"target": {"digest": "t5", "labels": LABELS}}}
    (tmp_path / "rescored" / "manifest.json").write_text(json.dumps(about))
    export((str(tmp_path / "rescored"),), ExportOptions(output=str(tmp_path / "out"), condition="risk > 105"))
    old, out = images_of(first), images_of(tmp_path / "out")
    assert out and all(image == old[key][0] and record["risk"] > 105 for key, (image, record) in out.items())
    with pytest.raises(OutputError, match="is in the folder of"):
        export((str(tmp_path / "rescored"),), ExportOptions(output=str(first / "below")))


def test_folders_of_classes_have_safe_names(tmp_path: Path) -> None:
    """Whatever a class is called, its folder is below the output, and our own reader finds the class again."""
    folders = class_folders(HOSTILE)
    assert len({name.lower() for name in folders}) == len(HOSTILE)
    assert all(Path(name).name == name and name.isprintable() and name.strip(". ") == name for name in folders)
    assert folders[HOSTILE.index("two words")] == "two words" and "../x" not in folders
    labels = HOSTILE[:3]
    run = make_run(
        tmp_path / "run", labels=labels, requests=[{"name": "all", "method": "prompt", "classes": "all", "count": 4}],
        change=lambda record: record | {"class_name": labels[record["class_index"]]},
    )  # fmt: skip
    export((str(run),), ExportOptions(output=str(tmp_path / "out"), format="imagefolder"))
    found = [one for one in open_images(str(tmp_path / "out"), tuple(labels)).read() if isinstance(one, LabelledImage)]
    assert Counter(one.class_index for one in found) == Counter(
        record["class_index"] for _, record in images_of(run).values() if record["accepted"]
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]
    rows = pq.read_table(tmp_path / "out" / "metadata.parquet").to_pylist()
    assert len(rows) == len(found) and {row["class_name"] for row in rows} == set(labels)
    assert all((tmp_path / "out" / row["file_name"]).is_file() for row in rows)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.text(alphabet="aA1é ./\\\0:*-_", max_size=4), min_size=1, max_size=12))
def test_folders_of_any_classes_differ_and_stay_inside(labels: list[str]) -> None:
    folders = class_folders(labels)
    assert len({name.lower() for name in folders}) == len(labels)
    assert all(name not in ("", ".", "..") and not set(name) & set('/\\:*?"<>|\0') for name in folders)


def test_real_images_are_mixed_in_at_the_ratio(composed: Path, tmp_path: Path) -> None:
    """Each set of pixels once, labels matched by name, never a score, and equal bytes each time."""
    trees = []
    for number in range(2):
        options = ExportOptions(
            output=str(tmp_path / f"out{number}"), real="digits:validation", real_ratio=0.25, name="mixed"
        )
        done = export((str(composed),), options)
        trees.append(tree(tmp_path / f"out{number}"))
    assert trees[0] == trees[1]
    counts = done.manifest["counts"]
    assert counts["real"] == round(counts["generated"] / 3) and counts["images"] == counts["real"] + counts["generated"]
    corpus = engine.open_run(str(tmp_path / "out0"))
    real = corpus.filter("method == 'real'")
    assert len(real) == counts["real"] and len(corpus.filter("oracle_agrees and method == 'real'")) == 0
    source = open_images("digits:validation", tuple(digits.CLASS_NAMES))
    known = {image_key(one.image): one.class_index for one in source.read() if isinstance(one, LabelledImage)}
    data = real.to_torch(transform=image_key)
    assert all(known[key] == label for key, label, _ in (data[number] for number in range(len(data))))
    assert len({key for key, *_ in (data[number] for number in range(len(data)))}) == len(data)
    order = corpus.to_table(["method"])["method"].to_pylist()
    assert sum(a != b for a, b in itertools.pairwise(order)) > 1, "mixed, not one after the other"
    options = ExportOptions(output=str(tmp_path / "never"), real="digits:validation", real_ratio=0.999)
    with pytest.raises(JobError, match=r"--real-ratio: asks for [0-9]+ real images, and 'digits:validation' has"):
        export((str(composed),), options)
    assert not (tmp_path / "never").exists()


def real_folder(folder: Path, counts: dict[str, int]) -> Path:
    """Class folders of noise, so many images in each."""
    for name, count in counts.items():
        (folder / name).mkdir(parents=True)
        for number in range(count):
            noise = np.random.default_rng([sum(map(ord, name)), number]).integers(0, 256, (4, 4, 3), dtype=np.uint8)
            (folder / name / f"photo {number}.png").write_bytes(encode(noise, "png"))
    return folder


def test_real_images_are_of_the_corpus_and_balanced_by_class(first: Path, tmp_path: Path) -> None:
    """Whatever a set has many of; each row names its file and the checksum of its pixels."""
    real = real_folder(tmp_path / "real", {"zero": 30, "one": 3, "two": 12, "seven": 2})
    base = {"condition": "class_index in [1, 2]", "real": str(real), "real_ratio": 0.4}
    done = export((str(first),), ExportOptions(output=str(tmp_path / "ratio"), **base))
    counts = done.manifest["counts"]
    reals = {name: row["real"] for name, row in counts["classes"].items()}
    assert reals == {"one": 3, "two": counts["real"] - 3} and counts["real"] == round(counts["generated"] / 1.5)
    assert any("30 real images are of classes that no sample has" in remark for remark in done.remarks)
    rows = engine.open_run(str(done.path)).filter("method == 'real'").to_table().to_pylist()
    for row in rows:
        with Image.open(real / row["start_key"]) as image:
            assert Path(row["start_key"]).parts[-2] == row["class_name"]
            assert image_key(image.convert("RGB")).hex() == row["start_sha256"]
    assert len({row["start_key"] for row in rows}) == len(rows)

    per_class = ExportOptions(output=str(tmp_path / "each"), name="each", real_per_class=3, **base)
    done = export((str(first),), per_class)
    assert {name: row["real"] for name, row in done.manifest["counts"]["classes"].items()} == {"one": 3, "two": 3}
    card = (done.path / "README.md").read_text()
    assert "Real images: 3 of each class, balanced by class, of the classes of the synthetic ones alone" in card
    topped = ExportOptions(output=str(tmp_path / "top"), name="top", real=str(real), real_per_class=3)
    assert export((str(done.path),), topped).manifest["counts"] == done.manifest["counts"], "three are there already"
    everything = ExportOptions(output=str(tmp_path / "all"), name="all", real_classes="all", real_per_class=3, **base)
    classes = export((str(first),), everything).manifest["counts"]["classes"]
    assert {name: row["real"] for name, row in classes.items()} == {"zero": 3, "one": 3, "two": 3}
    for number, message in ((4, "asks for 4 real images of class 'one', and .* has 3"), (13, "of 1 more classes")):
        with pytest.raises(JobError, match=message):
            export((str(first),), ExportOptions(output=str(tmp_path / "no"), real_per_class=number, **base))
    with pytest.raises(JobError, match=r"has 15 that can be used \(and 30 of classes that no sample has"):
        export((str(first),), ExportOptions(output=str(tmp_path / "no"), **base | {"real_ratio": 0.9}))
    shutil.rmtree(real / "one")
    none = ExportOptions(output=str(tmp_path / "no"), **base | {"condition": "class_index == 1"})
    with pytest.raises(JobError, match=r"has no image of a class that the samples have; --real-classes all"):
        export((str(first),), none)


def test_what_changes_is_told_before_anything_is_written(first: Path, second: Path, tmp_path: Path, call) -> None:
    """Keys of a run that is named alike, and a copy of a run; a link to a run is that run."""
    out, told = tmp_path / "out", []

    def notify(text: str) -> None:
        told.append(text)
        assert not list(tmp_path.glob("*out*"))

    done = export((str(first), str(second)), ExportOptions(output=str(out)), notify=notify)
    assert tuple(told) == done.notices and len(told) == 1
    card = (out / "README.md").read_text()
    assert "| begin with `r2-` |" in card and "Runs of one job name have other images under the same keys" in card
    code, printed, _ = call("merge", first, second, "--output", tmp_path / "dry", "--dry-run")
    text = " ".join(printed.split())
    assert code == 0 and all(" ".join(notice.split()) in text for notice in told) and not (tmp_path / "dry").exists()
    assert f"{done.manifest['counts']['images']} images would be in {tmp_path / 'dry'}; nothing is written" in text
    copy, link = tmp_path / "copy", tmp_path / "link"
    shutil.copytree(first, copy)
    link.symlink_to(first)
    code, _, errors = call("export", first, link, "--output", tmp_path / "never", "--dry-run")
    assert code == 2 and f"RUN: '{link}' is given twice" in errors
    code, printed, errors = call("export", first, copy, "--output", tmp_path / "one", "--json")
    num_samples = len(engine.open_run(str(first)).samples)
    manifest = json.loads(printed)
    assert code == 0 and manifest["counts"]["images"] == num_samples and len(manifest["origins"]) == 1
    assert (
        f"{copy}: has the plan of {first}; {num_samples} samples are in an earlier run too, and are taken once, and"
        " nothing else is in it"
    ) in " ".join(errors.split())


def test_licences_and_authors_are_checked(first: Path, tmp_path: Path, call) -> None:
    for options, message in (
        (("--license", "cc-by"), "--license: 'cc-by' is not a licence of SPDX; did you mean 'CC-BY-4.0'?"),
        (("--license", "(" * 5000), "is not a licence of SPDX"),
        (("--license", "MIT\nOR"), "is not a licence of SPDX"),
        (("--author", " "), "--author: ' ' is not a name"),
        (("--author", "a\x1b[31m"), "is not a name"),
        (("--author", "a", "--author", "b" * 201), "is not a name of 1 to 200"),
        (("--real-per-class", "3"), "--real-per-class: requires --mix-real"),
        (("--real-classes", "all"), "--real-classes: requires --mix-real"),
        (("--mix-real", "x", "--real-ratio", "0.5", "--real-per-class", "3"), "give one of them"),
        (("--mix-real", "x", "--real-per-class", "0"), "--real-per-class: 0 is not between 1 and"),
    ):
        code, _, errors = call("merge", first, "--output", tmp_path / "never", *options)
        assert code == 2 and message in errors and "Traceback" not in errors, options
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("shape", "marks"), [("webdataset", True), ("webdataset", False), ("imagefolder", True)])
def test_generated_images_are_not_mixed_in_as_real(composed: Path, tmp_path: Path, shape: str, marks: bool) -> None:
    """By the mark in their files, or by the record beside them; the real ones of a mixed data set are taken."""
    made = make_composed(
        composed_job(tmp_path / "run", count=2, output={"uri": str(tmp_path / "run"), "provenance": marks})
    )
    export((str(made),), ExportOptions(output=str(tmp_path / "generated"), name="generated", format=shape))
    with pytest.raises(JobError, match="not real; give runs as RUN"):
        export(
            (str(composed),),
            ExportOptions(output=str(tmp_path / "never"), real=str(tmp_path / "generated"), real_ratio=0.1),
        )
    mixed = ExportOptions(
        output=str(tmp_path / "mixed"), name="mixed", format=shape, real="digits:test", real_ratio=0.2
    )
    num_real = export((str(made),), mixed).manifest["counts"]["real"]
    again = ExportOptions(output=str(tmp_path / "again"), name="again", real=str(tmp_path / "mixed"), real_ratio=0.01)
    done = export((str(composed),), again)
    assert 0 < done.manifest["counts"]["real"] <= num_real


def test_near_duplicates_go_and_are_listed(composed: Path, tmp_path: Path) -> None:
    """Nothing that stays is as near as the threshold to an earlier one of its class, by plain loops over all pairs."""
    from engine.models.clip import Clip

    options = ExportOptions(output=str(tmp_path / "out"), deduplicate=0.95)
    done = export((str(composed),), options)
    with (tmp_path / "out" / "duplicates.csv").open(newline="") as file:
        gone = {row["dropped"]: row for row in csv.DictReader(file)}
    about = done.manifest["deduplication"]
    cells = about.pop("cells")
    assert about == {
        "threshold": 0.95, "clip": "zoo:digits/clip", "dropped": len(gone), "topped_up": 0, "list": "duplicates.csv"
    }  # fmt: skip
    assert sum(cell["dropped"] for cell in cells) == len(gone)
    for cell in cells:
        assert cell["kept"] + cell["missing"] <= cell["wanted"] and cell["missing"] == cell["dropped"]
    rows = engine.open_run(str(composed)).samples.to_table(["key", "class_index"]).to_pylist()
    clip, images = Clip.load("zoo:digits/clip"), images_of(composed)
    embeds = [clip.image_embeds([decode_rgb(images[row["key"]][0])])[0] for row in rows]
    kept: list[int] = []
    for number, row in enumerate(rows):
        unit = embeds[number] / embeds[number].norm()
        near = {
            other: float(unit @ (embeds[other] / embeds[other].norm()))
            for other in kept
            if rows[other]["class_index"] == row["class_index"]
        }
        best = max(near, key=near.__getitem__, default=None)
        if best is not None and near[best] >= 0.95:
            assert gone[row["key"]]["kept"] == rows[best]["key"]
            assert float(gone[row["key"]]["similarity"]) == pytest.approx(near[best], abs=1e-5)
        else:
            kept.append(number)
    assert {rows[number]["key"] for number in kept} == set(images_of(tmp_path / "out"))
    assert 0 < len(gone) < len(rows)


def test_blocks_of_products_find_what_one_product_finds(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(60, 4)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    classes = list(rng.integers(0, 3, size=60))
    whole = near_duplicates(embeddings, classes, 0.8)
    monkeypatch.setattr("engine.data.reading.deduplicate.ROWS", 5)
    monkeypatch.setattr("engine.data.reading.deduplicate.COLUMNS", 3)
    cut = near_duplicates(embeddings, classes, 0.8)
    assert [one[:2] for one in whole] == [one[:2] for one in cut] and 0 < len(whole) < 60
    assert [one.similarity for one in whole] == pytest.approx([one.similarity for one in cut], abs=1e-6)


def test_an_interrupted_export_leaves_nothing(
    first: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "export_card", stop)
    assert riskforge("merge", first, "--output", tmp_path / "out") == 75
    assert "nothing is stored" in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_signal_in_a_real_process_leaves_nothing(composed: Path, tmp_path: Path) -> None:
    """Sent when the first shard is opened, in the folder that is to become the output."""
    pattern, out = f"{tmp_path}/.out-*.tar", tmp_path / "out"
    process = struck(signal.SIGTERM, "open", pattern, 1, "merge", composed, "--output", out)
    _, errors = process.communicate()
    assert process.returncode == 75 and "Traceback" not in errors
    assert list(tmp_path.iterdir()) == []


def test_the_commands(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ("export", first, "--filter", "risk > 1", "--format", "parquet", "--output", out)
    assert riskforge(*command) == 0
    num_images = len(engine.open_run(str(first)).filter("risk > 1").samples)
    assert capsys.readouterr().out == f"{num_images} images in {out}\n"
    assert riskforge(*command) == 2 and "is not empty" in capsys.readouterr().err
    assert riskforge("export", first, "--real-ratio", "0.3", "--output", tmp_path / "none") == 2
    assert "--real-ratio: requires --mix-real" in capsys.readouterr().err and not (tmp_path / "none").exists()
    assert riskforge("merge", first, "--output", tmp_path / "json", "--with-rejected", "--json") == 0
    manifest = json.loads(capsys.readouterr().out)
    assert manifest["counts"]["samples"]["rejected"] > 0
    assert len(images_of(tmp_path / "json")) == len(images_of(first))


def test_commands_for_runs_refuse_a_merged_data_set(
    first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """They say what it is, and leave nothing in it: no lock, no report."""
    merged = tmp_path / "merged"
    assert riskforge("merge", first, "--output", merged) == 0
    before = tree(merged)
    data = ("--real", "digits:train", "--test", "digits:test")
    for command, *options in (
        ("status",), ("verify",), ("repair",), ("retry",), ("report",), ("evaluate",), ("rescore", "--target", "x"),
        ("retrain", *data),
    ):  # fmt: skip
        assert riskforge(command, merged, *options) == 2, command
        assert "is a merged or exported data set, not a run" in capsys.readouterr().err, command
    assert tree(merged) == before and not (merged / "_state").exists()


def test_inspect_shows_what_is_there(first: Path, second: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert riskforge("inspect", first, second, "--json") == 0
    document = json.loads(capsys.readouterr().out)
    rows = engine.open_run(str(first), str(second)).to_table().to_pylist()
    assert document["rows"] == len(rows) and document["schema_versions"] == {"1": 26, str(SCHEMA_VERSION): 26}
    assert document["status"] == dict(sorted(Counter(row["status"] for row in rows).items()))
    assert document["classes"] == dict(sorted(Counter(row["class_name"] for row in rows).items()))
    scored = [row["risk"] for row in rows if row["status"] != "failed"]
    assert document["quantiles"]["risk"] == pytest.approx(np.quantile(scored, [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1]))
    assert document["image"] == {
        "width": 4, "height": 4, "format": "png", "bytes": document["image"]["bytes"],
    }  # fmt: skip
    assert [run["state"] for run in document["runs"]] == ["finished", "not finished: 3 committed shards so far"]
    assert document["runs"][0]["disk_bytes"] == sum(path.stat().st_size for path in first.rglob("*") if path.is_file())
    assert riskforge("inspect", first, "--filter", "risk > 3") == 0
    text = capsys.readouterr().out
    assert "red | <b>`ink`</b>" in text and "Quantiles over scored rows" in text
    assert f"rows         {len(engine.open_run(str(first)).filter('risk > 3'))}," in text


def test_inspect_shows_and_saves_one_sample(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    key, (image, record) = next(iter(images_of(first).items()))
    assert riskforge("inspect", first, "--key", key, "--save", tmp_path / "one.png") == 0
    text = capsys.readouterr().out
    assert (tmp_path / "one.png").read_bytes() == image and f"seed                 {record['seed']}" in text
    assert riskforge("inspect", first, "--key", key, "--json") == 0
    assert json.loads(capsys.readouterr().out)["risk"] == record["risk"]
    assert riskforge("inspect", first, "--key", key, "--save", tmp_path / "one.png") == 2
    assert "is there already" in capsys.readouterr().err
    assert riskforge("inspect", first, "--key", key + "x") == 2
    assert f"did you mean '{key}'?" in capsys.readouterr().err
    failed = engine.open_run(str(first)).filter("status == 'failed'").to_table(["key"])["key"][0].as_py()
    assert riskforge("inspect", first, "--key", failed, "--save", tmp_path / "two.png") == 2
    assert "no image of" in capsys.readouterr().err and not (tmp_path / "two.png").exists()
    assert riskforge("inspect", first, "--save", tmp_path / "two.png") == 2
    assert riskforge("inspect", first, "--filter", "risk > 1000") == 0


def test_inspect_lists_what_a_filter_selects(first: Path, second: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Keys from the highest risk on, with class, context, prediction and risk; no more than asked for."""
    chosen = engine.open_run(str(first)).filter("scored and risk > 1").to_table().to_pylist()
    chosen.sort(key=lambda row: (-row["risk"], row["key"]))
    assert riskforge("inspect", first, "--filter", "scored and risk > 1", "--limit", "3") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].startswith(f"3 of {len(chosen)} samples, from the highest risk on")
    assert lines[-5].split()[:2] == ["key", "class"] and max(map(len, lines[-5:])) <= 100
    for line, row in zip(lines[-4:-1], chosen[:3], strict=True):
        assert line.startswith(row["key"]) and f"{row['risk']:.3g}" in line
        assert LABELS[row["predicted_class"]] in line and (row["context"][:20] or "-") in line
    assert riskforge("inspect", first, second, "--filter", "risk > 1", "--json") == 0
    listed = json.loads(capsys.readouterr().out)["listed"]
    both = engine.open_run(str(first), str(second)).filter("risk > 1").to_table().to_pylist()
    assert len(listed) == len(both) and {one["run"] for one in listed} == {str(first), str(second)}
    assert [one["risk"] for one in listed] == sorted((row["risk"] for row in both), reverse=True)
    assert riskforge("inspect", first, "--filter", "risk > 1000") == 0
    assert capsys.readouterr().out.endswith("no sample passes the filter\n")


def test_inspect_saves_what_it_lists(
    first: Path, second: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By key, byte for byte; again without harm; never over another file; what has no image is named."""
    home, stored = tmp_path / "images", images_of(first)
    missing = engine.open_run(str(first)).filter("status == 'failed'").to_table(["key"])["key"].to_pylist()
    assert riskforge("inspect", first, "--limit", "100", "--save", home) == 0
    printed = capsys.readouterr()
    assert f"{len(stored)} images written to {home}" in printed.out
    assert f"no image of {len(missing)} samples" in printed.err
    assert f"{missing[0]}: failed, no image is stored" in printed.err
    assert {path.stem: path.read_bytes() for path in home.iterdir()} == {
        key: image for key, (image, _) in stored.items()
    }
    other = tmp_path / "other"
    other.mkdir()
    (other / f"{max(stored)}.png").write_bytes(b"mine")
    assert riskforge("inspect", first, "--filter", "status != 'failed'", "--save", home) == 0
    assert f"0 images written to {home}, {len(stored)} were there already" in capsys.readouterr().out
    assert riskforge("inspect", first, "--filter", "status != 'failed'", "--save", other) == 2
    assert "is there already, with other content" in capsys.readouterr().err
    assert [path.read_bytes() for path in other.iterdir()] == [b"mine"]
    assert riskforge("inspect", first, second, "--filter", "accepted", "--save", tmp_path / "both", "--json") == 0
    saved = json.loads(capsys.readouterr().out)["saved"]
    assert saved["written"] == len(list((tmp_path / "both").glob("*.png"))) and saved["missing"] == []
    assert list((tmp_path / "both").glob("r2-*"))
    monkeypatch.chdir(tmp_path)  # a folder that is called as a scheme is
    assert riskforge("inspect", first, "--filter", "accepted", "--limit", "1", "--save", "s3") == 0
    assert "1 image written to s3\n" in capsys.readouterr().out and len(list((tmp_path / "s3").iterdir())) == 1
    for options, reason in (
        (("--key", "x", "--limit", "2"), "--limit: lists several samples"),
        (("--save", tmp_path / "a"), "--save: select samples with --filter"),
        (("--filter", "accepted", "--save", "s3://bucket/a"), "is written on this machine alone"),
        (("--filter", "accepted", "--save", first / "manifest.json"), "--save"),
        (("--filter", "accepted", "--save", first / "shards/mine"), "lies in the folder of a run"),
    ):
        assert riskforge("inspect", first, *options) == 2
        assert reason in capsys.readouterr().err
    assert not (first / "shards/mine").exists()


def test_images_of_a_damaged_tar_are_named(first: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The others are written; a key that leads out of the folder is no name of a file."""
    run = shutil.copytree(first, tmp_path / "run")
    [tar, *_] = sorted((run / "shards").glob("*.tar"))
    lost = [key for key, _, _, _ in read_shard(tar)]
    tar.unlink()
    assert riskforge("inspect", run, "--filter", "status != 'failed'", "--save", tmp_path / "some") == 2
    err = capsys.readouterr().err
    assert f"no image of {len(lost)} samples" in err and f"error: {tar}: is missing" in err
    assert all(f"{key}: " in err for key in lost[:20])
    assert len(list((tmp_path / "some").iterdir())) == len(images_of(first)) - len(lost)
    samples = list_samples(engine.open_run(str(first)).filter("accepted"), 1)
    planted = [dataclasses.replace(sample, key="../planted") for sample in samples]
    saved = save_images(engine.open_run(str(first)), planted, tmp_path / "planted")
    assert saved.num_written == 0 and saved.missing and not (tmp_path / "planted.png").exists()


def test_looking_needs_no_torch(first: Path) -> None:
    """A laptop without a GPU stack looks into a run in a second."""
    code = (
        "import sys, engine; assert 'pyarrow' not in sys.modules;"
        "from engine.cli import main; sys.argv = ['riskforge', 'inspect', sys.argv[1]]\n"
        "try: main()\nexcept SystemExit as end: assert not end.code\n"
        "engine.open_run(sys.argv[2]).filter('risk > 1').to_table();"
        "assert not {'torch', 'transformers', 'ray'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, first], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
