"""`datasets.load_dataset` reads every data set by its card, whatever its first samples are: types are declared.

Left to itself it takes the types of the first five samples for those of all, and fails at the first list that is not
empty after five that are.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from engine.data.images.encoding import encode
from engine.data.reading.export import export
from engine.data.reading.export_options import ExportOptions
from engine.data.run.shards import IMAGE_FORMATS, read_shard
from engine.job.columns import RECORD_COLUMNS
from engine.job.records import columns_of
from tests.corpus_cases import make_run

Change = Callable[[dict[str, Any]], dict[str, Any]]
NUM_FIRST = 6


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("real")
    for number in range(60):
        place = folder / ("zero", "one", "two")[number % 3] / f"{number}.png"
        place.parent.mkdir(exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        place.write_bytes(encode(noise, "png"))
    return folder


def stored(folder: Path) -> dict[str, dict[str, Any]]:
    """Records of the tars by key, in order."""
    tars = sorted((folder / "shards").glob("*.tar"))
    return {key: record for tar in tars for key, _, record, _ in read_shard(tar)}


def check_shards(folder: Path, *, streaming: bool) -> None:
    """Every sample comes as it is stored, with the types that the schema has."""
    import datasets

    loaded = datasets.load_dataset(str(folder), split="train", streaming=streaming)
    rows, records = list(loaded), stored(folder)
    assert [row["__key__"] for row in rows] == list(records) and rows
    assert [row["json"] for row in rows] == list(records.values())
    assert [row["cls"] for row in rows] == [record["class_index"] for record in records.values()]
    version = rows[0]["json"]["schema_version"]
    assert {name: check_type(loaded.features["json"][name]) for name in columns_of(version)} == {
        name: column.is_list for name, column in columns_of(version).items()
    }


def check_type(feature: Any) -> bool:
    """Whether a feature is a list; none is of nulls."""
    is_list = hasattr(feature, "feature")
    inner = feature.feature if is_list else feature
    parts = inner.values() if isinstance(inner, dict) else [inner]
    assert all(part.dtype in ("int64", "float64", "bool", "string") for part in parts)
    return is_list


def without(*names: str) -> Change:
    """The first samples lack the entries of these models, later ones have them."""

    def change(record: dict[str, Any]) -> dict[str, Any]:
        return record | {name: [] for name in names} if record["index"] < NUM_FIRST else record

    return change


def rejected_first(record: dict[str, Any]) -> dict[str, Any]:
    """Rejected images that are stored stand before all others."""
    return record | ({"status": "rejected", "accepted": False} if record["index"] < NUM_FIRST else {})


def whole_first(record: dict[str, Any]) -> dict[str, Any]:
    """Numbers that are whole, or texts that look like numbers, say nothing of the others."""
    return record | ({"risk": 0.0, "context": "7"} if record["index"] < NUM_FIRST else {})


VARIANTS: dict[str, Change] = {
    "as they are": lambda record: record,
    "no judge at first": without("judge"),
    "no transfer at first": without("transfer"),
    "neither at first": without("judge", "transfer", "kldb_classes", "soft_label"),
    "no list anywhere": lambda record: record | {"judge": [], "transfer": [], "kldb_classes": [], "soft_label": []},
    "rejected first": rejected_first,
    "whole numbers first": whole_first,
}


@pytest.mark.parametrize("version", [1, 2, 3])
@pytest.mark.parametrize("variant", VARIANTS)
def test_runs_of_every_version_load(tmp_path: Path, variant: str, version: int) -> None:
    """Streamed, which infers types the same way, in every other variant."""
    run = make_run(tmp_path / "run", version=version, count=9, change=VARIANTS[variant])
    check_shards(run, streaming=list(VARIANTS).index(variant) % 2 == version % 2)


@pytest.mark.parametrize("image_format", IMAGE_FORMATS)
def test_images_of_every_format_load(tmp_path: Path, image_format: str) -> None:
    run = make_run(tmp_path / "run", count=3, image_format=image_format)
    check_shards(run, streaming=False)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("version", "ratio"), [(1, 0.9), (2, 0.5), (3, 0.9)])
def test_mixed_exports_load(tmp_path: Path, real: Path, version: int, ratio: float, streaming: bool) -> None:
    """Any ratio and order of real images, from runs of any version; those that begin with real ones among them."""
    run = make_run(tmp_path / "run", version=version, count=6)
    orders = set()
    for seed in range(3):
        options = ExportOptions(
            output=str(tmp_path / f"out{seed}"), condition="request == 'between'", samples_per_shard=9, seed=seed,
            real=str(real), real_ratio=ratio, real_classes="all", with_rejected=seed % 2 == 0,
        )  # fmt: skip
        out = export((str(run),), options).path
        orders.add(all(record["method"] == "real" for record in list(stored(out).values())[:5]))
        check_shards(out, streaming=streaming)
    assert True in orders or ratio < 0.9


@pytest.mark.parametrize("kind", ["imagefolder", "parquet"])
@pytest.mark.parametrize("streaming", [False, True])
def test_other_formats_load(tmp_path: Path, real: Path, kind: str, streaming: bool) -> None:
    """Merged from runs of all versions, most of the images real ones."""
    import datasets

    runs = [str(make_run(tmp_path / f"v{one}", name=f"v{one}", version=one, seed=one, count=3)) for one in (1, 2, 3)]
    options = ExportOptions(
        output=str(tmp_path / "out"), format=kind, condition="request == 'between'", real=str(real), real_ratio=0.8
    )
    out = export(tuple(runs), options).path
    loaded = datasets.load_dataset(str(out), split="train", streaming=streaming)
    rows = list(loaded)
    assert len(rows) > 20 and {row["scored"] for row in rows} == {True, False}
    assert all(row["label"] == row["class_index"] and row["image"].size == (4, 4) for row in rows)
    assert {row["method"] == "real" for row in rows if not row["scored"]} == {True}
    for column in RECORD_COLUMNS:
        assert check_type(loaded.features[column.name]) == column.is_list, column.name


def test_pixels_come_as_they_are(tmp_path: Path) -> None:
    import datasets

    run = make_run(tmp_path / "run", count=3)
    tars = sorted((run / "shards").glob("*.tar"))
    wanted = [np.asarray(Image.open(io.BytesIO(image))) for tar in tars for _, image, _, _ in read_shard(tar)]
    found = [np.asarray(one["png"]) for one in datasets.load_dataset(str(run), split="train")]
    digests = [[hashlib.sha256(one.tobytes()).hexdigest() for one in side] for side in (wanted, found)]
    assert digests[0] == digests[1]
