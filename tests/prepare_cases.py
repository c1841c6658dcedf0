"""Labelled images in all forms that `prepare` reads, and the call of it."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
from sklearn.datasets import load_digits

from engine.commands.jobfile import read_job
from engine.driver.progress import PlainDisplay
from engine.generation import artefact
from engine.studies.prepare.program import prepare_conditioning
from tests.conftest import REPOSITORY

QUICKSTART = REPOSITORY / "jobs/quickstart.yaml"
LABELS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NUM_IMAGES = 240

Sample = tuple[PIL.Image.Image, int]


def drawn_digits(number: int) -> list[Sample]:
    """Digits of 32 x 32, every other one with noise that makes the target err now and then."""
    scans, classes = load_digits(return_X_y=True)
    rng = np.random.default_rng(3)
    samples = []
    for row in range(number):
        scan = PIL.Image.fromarray((scans[row].reshape(8, 8) / 16 * 255).astype(np.uint8))
        pixels = np.asarray(scan.resize((32, 32), PIL.Image.Resampling.BICUBIC).convert("RGB"), dtype=np.float64)
        if row % 2:
            pixels = 0.3 * pixels + rng.uniform(0, 180, (32, 32, 3))
        samples.append((PIL.Image.fromarray(pixels.clip(0, 255).astype(np.uint8)), int(classes[row])))
    return samples


def png(image: PIL.Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def plain_image(mode: str = "RGB", size: tuple[int, int] = (8, 8)) -> PIL.Image.Image:
    return PIL.Image.new(mode, size)


def write_folder(root: Path, samples: list[Sample]) -> Path:
    for number, (image, index) in enumerate(samples):
        (root / LABELS[index]).mkdir(parents=True, exist_ok=True)
        (root / LABELS[index] / f"{number:04d}.png").write_bytes(png(image))
    return root


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_parquet(path: Path, rows: list[tuple[object, object]], names: list[str] | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": [image for image, _ in rows], "label": [label for _, label in rows]})
    if names:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path, row_group_size=50)
    return path


def write_run(root: Path, samples: list[Sample]) -> Path:
    """Tars as a run has them, in another order, labels as `.cls` here and in `.json` there."""
    members = [
        [
            (f"digits-{number:04d}.png", png(image)),
            (f"digits-{number:04d}.json", json.dumps({"class_index": index}).encode()),
            *([(f"digits-{number:04d}.cls", str(index).encode())] if number % 2 else []),
        ]
        for number, (image, index) in reversed(list(enumerate(samples)))
    ]
    write_tar(root / "shards/a-000000.tar", [one for group in members[:100] for one in group])
    write_tar(root / "shards/a-000001.tar", [one for group in members[100:] for one in group])
    write_parquet(root / "metadata.parquet", [(b"", 0)])
    return root


def write_tables(root: Path, samples: list[Sample]) -> Path:
    """Hugging Face style, in another order, with indices into names of its own."""
    names = list(reversed(LABELS))
    order = np.random.default_rng(0).permutation(len(samples)).tolist()
    rows = [({"bytes": png(samples[one][0]), "path": None}, names.index(LABELS[samples[one][1]])) for one in order]
    write_parquet(root / "validation-00000-of-00002.parquet", rows[:90], names)
    write_parquet(root / "validation-00001-of-00002.parquet", rows[90:], names)
    return root


def prepare(data: Path | str, home: Path, *, stream: io.StringIO | None = None, changes=(), **options: object):
    job = read_job(QUICKSTART, [("runtime.device", "cpu"), *changes])
    display = PlainDisplay(stream or io.StringIO(), every_seconds=0.0)
    return prepare_conditioning(job, str(data), display=display, folder=str(home), **options)


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two artefacts are equal, file by file."""
    return all(
        (one / name).read_bytes() == (other / name).read_bytes() for name in (artefact.STATISTICS, artefact.DOCUMENT)
    )
