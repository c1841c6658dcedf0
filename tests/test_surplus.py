"""The list of surplus keys next to the tars, and the documentation's own lines: exactly what was wanted is read."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

import engine
from engine.data.images import LabelledImage, Unusable, decode_rgb, digits, open_images
from engine.data.reading.export import export
from engine.data.reading.export_options import ExportOptions
from engine.data.run.repair import repair
from engine.data.run.resume import open_output
from engine.data.run.shards import read_shard
from engine.data.run.surplus import surplus_lines
from engine.data.run.verify import verify
from engine.data.stores.opening import open_store
from engine.job.plan import build_plan
from engine.job.spec import JobSpec
from engine.models.digests import model_digests
from tests.composed import composed_job, make_run
from tests.conftest import REPOSITORY
from tests.corpus_cases import make_run as make_case

LIST = "shards/surplus.txt"
WANTED = 24


def quota_job(folder: Path, count: int = 4, *, store_rejected: bool) -> JobSpec:
    """24 accepted samples of three classes, whatever their context, named as the documentation's run."""
    requests = [
        {"name": "read", "method": "prompt", "classes": ["three", "five", "eight"], "count": count,
         "contexts": ["", "small, bottom left"], "accept": {"is_error": True}, "max_attempts": 400}
    ]  # fmt: skip
    return composed_job(
        folder, count=1, name="quickstart", requests=requests, output={
            "uri": str(folder), "samples_per_shard": 16, "store_rejected": store_rejected
        }
    )  # fmt: skip


@pytest.fixture(scope="module", params=[False, True], ids=["plain", "store_rejected"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("surplus") / "runs" / "quickstart"
    return make_run(quota_job(folder, store_rejected=request.param))


def rows_of(run: Path) -> list[dict[str, Any]]:
    return pq.read_table(run / "metadata.parquet").to_pylist()


def wanted_keys(run: Path) -> set[str]:
    return {row["key"] for row in rows_of(run) if row["accepted"] and not row["surplus"]}


def stores_rejected(run: Path) -> bool:
    return bool(json.loads((run / "manifest.json").read_text())["job"]["output"]["store_rejected"])


def python_blocks(text: str, word: str) -> list[str]:
    return [one for one in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if word in one]


def test_the_list_holds_the_surplus_of_the_tars(run: Path) -> None:
    """Every key is in a tar, is accepted, and is one that the metadata marks; without them the quota is filled."""
    listed = (run / LIST).read_text().splitlines()
    assert listed == [row["key"] for row in rows_of(run) if row["surplus"]] and listed
    stored = {key: record for tar in (run / "shards").glob("*.tar") for key, _, record, _ in read_shard(tar)}
    assert all(stored[key]["accepted"] for key in listed)
    kept = Counter(record["class_name"] for key, record in stored.items() if record["accepted"] and key not in listed)
    assert kept == {"three": 8, "five": 8, "eight": 8}
    assert verify(open_store(str(run))).findings == ()


@pytest.mark.parametrize("page", ["docs/output.md", "docs/reading.md"])
def test_the_lines_of_the_documentation_read_what_was_wanted(
    run: Path, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first shard's name is in them, and so is the last; a run of this test has others."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(run.parent.parent)
    last = len(list((run / "shards").glob("*.tar"))) - 1
    text = (REPOSITORY / page).read_text().replace("{000000..000003}", f"{{000000..{last:06d}}}")
    [code] = python_blocks(text, "import webdataset")
    names: dict[str, Any] = {"seen": []}
    loop, body = code.rstrip().rsplit("\n", 1)
    exec(f"{loop}\n    seen.append(sample['__key__'])\n{body}", names)
    assert len(names["seen"]) == WANTED and set(names["seen"]) == wanted_keys(run)
    for code in python_blocks(text, "import load_dataset"):
        exec(code, names)
        assert set(names["run"]["__key__"]) == wanted_keys(run) and len(names["run"]) == WANTED


def test_the_lines_of_the_card_read_what_was_wanted(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the card says how many images in the tars are none of them."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(run)
    card = (run / "README.md").read_text()
    found: list[dict[str, Any]] = []
    for code in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
        found.append({})
        exec(code, found[-1])
    assert {one["__key__"] for one in found[0]["samples"]} == wanted_keys(run)
    assert set(found[1]["samples"]["__key__"]) == wanted_keys(run) and len(found[1]["samples"]) == WANTED
    assert set(found[2]["rows"]["key"].to_pylist()) <= wanted_keys(run)
    num_surplus = sum(row["surplus"] for row in rows_of(run))
    assert f"**The tars hold {num_surplus} accepted images beyond the quotas.**" in card
    num_stored = sum(row["status"] == "rejected" and bool(row["sha256"]) for row in rows_of(run))
    assert (f"**The {num_stored} rejected images are stored too.**" in card) == bool(num_stored)


def test_every_other_reader_gives_what_was_wanted(run: Path, tmp_path: Path) -> None:
    """By this package, and a merge for readers of whole tars."""
    corpus = engine.open_run(str(run))
    assert {one["__key__"] for one in corpus.to_webdataset(decode=None)} == wanted_keys(run)
    assert set(corpus.to_torch().keys) == wanted_keys(run)
    out = export((str(run),), ExportOptions(output=str(tmp_path / "out"))).path
    assert json.loads((out / "shards" / "_info.json").read_text())["splits"]["train"]["num_samples"] == WANTED


def test_surplus_takes_the_place_of_near_duplicates(run: Path, tmp_path: Path) -> None:
    """In the order of indices, where it resembles nothing that is kept, by plain loops; what is missing is told."""
    from engine.models.clip import Clip

    threshold = 0.93
    outs = [
        export((str(run),), ExportOptions(output=str(tmp_path / name), deduplicate=threshold, seed=seed))
        for seed, name in enumerate("ab")
    ]
    rows = engine.open_run(str(run)).with_images(surplus=True).to_table(["key", "class_name", "surplus"]).to_pylist()
    stored = {key: image for tar in (run / "shards").glob("*.tar") for key, image, *_ in read_shard(tar)}
    clip = Clip.load("zoo:digits/clip")
    units = {row["key"]: clip.image_embeds([decode_rgb(stored[row["key"]])])[0] for row in rows}
    units = {key: unit / unit.norm() for key, unit in units.items()}
    kept: dict[str, list[str]] = {"three": [], "five": [], "eight": []}
    dropped, filled = Counter[str](), Counter[str]()
    for row in [*(row for row in rows if not row["surplus"]), *(row for row in rows if row["surplus"])]:
        name, key = row["class_name"], row["key"]
        if row["surplus"] and filled[name] == dropped[name]:
            continue
        if any(float(units[key] @ units[other]) >= threshold for other in kept[name]):
            dropped[name] += not row["surplus"]
            continue
        filled[name] += row["surplus"]
        kept[name].append(key)
    assert 0 < filled.total() < dropped.total()
    for out in outs:
        assert set(pq.read_table(out.path / "metadata.parquet")["key"].to_pylist()) == set().union(*kept.values())
        about = out.manifest["deduplication"]
        assert (about["dropped"], about["topped_up"]) == (dropped.total(), filled.total())
        cells = {cell["class"]: cell for cell in about["cells"]}
        assert cells.keys() == dropped.keys() - {name for name, count in dropped.items() if not count}
        for name, cell in cells.items():
            numbers = [cell[key] for key in ("wanted", "kept", "dropped", "topped_up", "missing")]
            assert numbers == [8, len(kept[name]), dropped[name], filled[name], 8 - len(kept[name])]
        short = [name for name, cell in cells.items() if cell["missing"]]
        for name in short:
            line = f"class {name}: {len(kept[name])} of 8 left ({dropped[name]} dropped, {filled[name]} replaced)"
            assert any(line in remark for remark in out.remarks)
            row = f"| `{name}` | {len(kept[name])} | 8 | {dropped[name]} | {filled[name]} |"
            assert row in (out.path / "README.md").read_text()
        assert short
    assert outs[0].manifest["counts"] == outs[1].manifest["counts"]


@pytest.mark.parametrize("change", ["missing", "shorter", "other"])
def test_a_list_that_is_wrong_is_damage_and_is_repaired(run: Path, tmp_path: Path, change: str) -> None:
    """`repair` takes the marker away, so that the same command closes the run once more."""
    copy = shutil.copytree(run, tmp_path / "run")
    path, lines = copy / LIST, (copy / LIST).read_text().splitlines()
    if change == "missing":
        path.unlink()
    else:
        others = {"shorter": lines[1:], "other": ["none", *lines[1:]]}[change]
        path.write_text("".join(f"{one}\n" for one in others))
    store = open_store(str(copy))
    [finding] = verify(store).damage
    assert LIST in finding.text and finding.shard is None
    assert repair(store).to_make == () and not (copy / "_SUCCESS").exists()
    make_run(quota_job(copy, store_rejected=stores_rejected(run)))
    assert path.read_text().splitlines() == lines and verify(store).findings == ()


@pytest.mark.parametrize("kind", ["folder", "fifo", "device", "column", "bytes"])
def test_what_cannot_be_read_is_damage(tmp_path: Path, kind: str) -> None:
    """Something else in the place of the list, rows without the column, rows that are damaged: never a traceback."""
    run = make_case(tmp_path / "run", count=4)
    path, metadata = run / LIST, run / "metadata.parquet"
    if kind in ("folder", "fifo", "device"):
        path.unlink()
        {"folder": path.mkdir, "fifo": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero")}[kind]()
    elif kind == "column":
        pq.write_table(pq.read_table(metadata).drop_columns(["surplus"]), metadata)
    else:
        data = metadata.read_bytes()
        metadata.write_bytes(data[:4] + bytes(len(data) // 2) + data[4 + len(data) // 2 :])
    assert [one.kind for one in verify(open_store(str(run))).findings] == ["damage"]


def test_a_grown_count_writes_the_list_again(run: Path, tmp_path: Path) -> None:
    """What was surplus counts now."""
    copy = shutil.copytree(run, tmp_path / "run")
    before = (copy / LIST).read_text().splitlines()
    make_run(quota_job(copy, 6, store_rejected=stores_rejected(run)))
    after = (copy / LIST).read_text().splitlines()
    assert after == [row["key"] for row in rows_of(copy) if row["surplus"]] and after != before
    assert len(wanted_keys(copy)) == 36 and verify(open_store(str(copy))).findings == ()


def test_the_list_belongs_to_the_run(run: Path, tmp_path: Path) -> None:
    """`--resume overwrite` removes it with the rest, and does not treat it as a foreign file."""
    copy = shutil.copytree(run, tmp_path / "run")
    job = quota_job(copy, 2, store_rejected=False)
    plan = build_plan(job, list(digits.CLASS_NAMES), model_digests(job))
    open_output(open_store(str(copy)), plan, job, "overwrite", confirmed=True)
    assert not (copy / LIST).exists()


@pytest.mark.parametrize("version", [1, 2])
def test_runs_closed_by_earlier_versions_have_no_list(tmp_path: Path, version: int) -> None:
    """Which is no damage; one that was closed since is checked as any."""
    run = make_case(tmp_path / "run", version=version, count=4)
    assert (run / LIST).read_bytes() == b"" and verify(open_store(str(run))).findings == ()
    (run / LIST).unlink()
    assert verify(open_store(str(run))).findings == ()
    (run / LIST).write_text("none\n")
    assert [one.kind for one in verify(open_store(str(run))).findings] == ["damage"]


def test_a_folder_of_parts_is_read_in_order(run: Path, tmp_path: Path) -> None:
    table = pq.read_table(run / "metadata.parquet")
    for number, start in enumerate(range(0, len(table), 20)):
        (tmp_path / "parts").mkdir(exist_ok=True)
        pq.write_table(table.slice(start, 20), tmp_path / "parts" / f"part-{number:06d}.parquet")
    assert b"".join(surplus_lines(tmp_path / "parts")) == (run / LIST).read_bytes()


@pytest.mark.parametrize("given", [".", "shards", "in a folder"])
@pytest.mark.parametrize("is_listed", [True, False], ids=["list", "rows"])
def test_images_are_read_without_the_surplus(run: Path, tmp_path: Path, given: str, is_listed: bool) -> None:
    """Wherever images are read from a run, also one that was closed without a list: what is left out is named."""
    copy = tmp_path / "set" / "quickstart"
    shutil.copytree(run, copy)
    if not is_listed:
        (copy / LIST).unlink()
    found = list(open_images(str(copy.parent if given == "in a folder" else copy / given), digits.CLASS_NAMES).read())
    used = [Path(one.name).stem for one in found if isinstance(one, LabelledImage)]
    assert len(used) == WANTED and set(used) == wanted_keys(run)
    named = [one for one in found if isinstance(one, Unusable) and "is beyond the quota" in one.reason]
    assert {Path(one.name).stem for one in named} == {row["key"] for row in rows_of(run) if row["surplus"]}


def test_images_of_one_tar_are_read_without_its_surplus(run: Path) -> None:
    """The list lies beside it."""
    keys = [Path(one.name).stem for tar in (run / "shards").glob("*.tar")
            for one in open_images(str(tar), digits.CLASS_NAMES).read() if isinstance(one, LabelledImage)]  # fmt: skip
    assert len(keys) == WANTED and set(keys) == wanted_keys(run)


@pytest.mark.parametrize("kind", ["webdataset", "imagefolder", "parquet"])
def test_images_of_an_export_are_read_without_the_rejected_ones(run: Path, tmp_path: Path, kind: str) -> None:
    """In every format alike."""
    options = ExportOptions(output=str(tmp_path / "out"), format=kind, with_rejected=True)
    out = export((str(run),), options).path
    found = list(open_images(str(out), digits.CLASS_NAMES).read())
    assert sum(isinstance(one, LabelledImage) for one in found) == WANTED
    reasons = [one.reason for one in found if isinstance(one, Unusable)]
    num_stored = sum(row["status"] == "rejected" and bool(row["sha256"]) for row in rows_of(run))
    assert reasons == ["was rejected by the rule of its run"] * num_stored
