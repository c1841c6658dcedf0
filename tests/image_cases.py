"""Small sets of labelled images in every layout; an image is of one level, so that it is known again."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from engine.data.images import LabelledImage, ReadResult, Unusable, open_images

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def grey(level: int) -> bytes:
    """A PNG of 8 x 8 pixels of one level."""
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (level, level, level)).save(buffer, "PNG")
    return buffer.getvalue()


def level_of(found: LabelledImage) -> int:
    """The level of an image of `grey`."""
    return int(found.image.getpixel((0, 0))[0])


def write_files(root: Path, files: dict[str, bytes]) -> Path:
    """Files by their path in a folder."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_tar(path: Path, members: Iterable[tuple[str, bytes]], form: int = tarfile.PAX_FORMAT) -> Path:
    """A tar of plain files."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_table(path: Path, images: Sequence[bytes], labels: pa.Array, names: Any = None) -> Path:
    """A parquet file, with class names as Hugging Face stores them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"image": pa.array(images, pa.binary()), "label": labels})
    if names is not None:
        features = {"label": {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return path


def read(path: Path, labels: Sequence[str]) -> list[ReadResult]:
    """Everything that is found."""
    return list(open_images(str(path), tuple(labels)).read())


def split(found: list[ReadResult]) -> tuple[dict[str, int], dict[str, str]]:
    """Classes of the used images by name, and reasons of the others."""
    used = {one.name: one.class_index for one in found if isinstance(one, LabelledImage)}
    return used, {one.name: one.reason for one in found if isinstance(one, Unusable)}


# A file that starts a foreign program where Pillow may open it.
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(x) (r) file\n"


def header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> bytes:
    """The header of a member, whatever it promises."""
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info.tobuf(tarfile.GNU_FORMAT)


def padded(data: bytes) -> bytes:
    """Contents up to a whole block."""
    return data + bytes(-len(data) % 512)


def bomb() -> bytes:
    """A PNG of a few kB with 178 megapixels."""
    buffer = io.BytesIO()
    Image.new("1", (13_400, 13_300)).save(buffer, "PNG")
    return buffer.getvalue()


def file_member(data: bytes) -> Callable[[str], bytes]:
    """A sound member with contents that are not."""
    return lambda name: header(name, size=len(data)) + padded(data)


def bend(run: Path, make: Callable[[str], bytes]) -> None:
    """Put something in the place of the first image of a run's first shard."""
    path = min((run / "shards").glob("*.tar"))
    data = path.read_bytes()
    name = tarfile.TarInfo.frombuf(data[:512], "utf-8", "strict").name
    size = tarfile.TarInfo.frombuf(data[:512], "utf-8", "strict").size
    path.chmod(0o644)
    path.write_bytes(make(name) + data[512 + size + -size % 512 :])
