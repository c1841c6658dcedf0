"""Labelled images from where users have them: a folder by class, WebDataset tars, a run, parquet, or a named set.

What cannot be used is part of what is found: it comes with its name and the reason, and takes nothing else with it.
Nothing is written: members of an archive are read in memory, whatever their names are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import re
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image

from engine.errors import JobError
from engine.plan import class_index
from engine.spec_messages import nearest
from engine.terminal import printable

EXTENSIONS = frozenset({"png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "ppm"})
SOUGHT = (
    "class folders with images (CLASS/*.png, CLASS being a name or an index), WebDataset tars (*.tar with .png and"
    " .cls), a run, parquet files (columns image and label), or a named set such as digits:validation"
)
MAX_FILE_BYTES = 256 * 2**20
MAX_PIXELS = 89_478_485
MIN_SIDE = 4
MAX_ASPECT = 50
PARQUET_ROWS = 64
PART_ROWS = 64
# So many files, or more, in each part of a source make the parts equal enough.
FILES_PER_PART = 4

# Decoders of plain pictures. Others start foreign programs (EPS) or are seldom well tested.
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
_MAX_NAME_CHARS = 300
_MAX_REASON_CHARS = 200
_MAX_SHOWN = 3
_TAR_ERRORS = (tarfile.TarError, OSError, ValueError, OverflowError)


@dataclass(frozen=True, slots=True)
class LabelledImage:
    """An image that can be used: 8-bit RGB, of a class of the target.

    Attributes:
        contexts: in which contexts it stands, for tables by context; empty where nothing is said of them.
    """

    name: str
    image: PIL.Image.Image
    class_index: int
    contexts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Unusable:
    """An image, or a whole file, that cannot be used, and why."""

    name: str
    reason: str


Found = LabelledImage | Unusable
# Makes a finding, which is when an image is decoded; to be called before the next item is asked for, or not at all.
Item = Callable[[], Found]
# Number of the file and of the item in it.
Place = tuple[int, int]


class UnusableImageError(Exception):
    """The bytes are not an image that can be used; the text says why."""


@dataclass(frozen=True, slots=True)
class ImageSource:
    """Where images are read from, one by one.

    Attributes:
        kind: in words.
        num_images: how many there are to try, or None where only reading tells.
        files: each starts from its beginning: a tar, a table, the whole of a folder.
        num_bytes: size of the files, where `num_images` is not known.
    """

    kind: str
    num_images: int | None
    files: tuple[Callable[[], Iterator[Item]], ...]
    num_bytes: int = 0

    def read(self) -> Iterator[Found]:
        """All there is; equal files give equal findings in equal order."""
        return (found for _, found in self.read_part(0, 1))

    def read_part(self, part: int, num_parts: int) -> Iterator[tuple[Place, Found]]:
        """Part `part` of `num_parts`: every so-many-th file where there are many, else batch of `PART_ROWS` items.

        Every finding is in one part alone. Images of the other parts are not decoded; their files are walked through
        where parts share files.
        """
        is_by_file = len(self.files) >= FILES_PER_PART * num_parts
        for number, items in enumerate(self.files):
            if is_by_file and number % num_parts != part:
                continue
            for row, item in enumerate(items()):
                if is_by_file or (number + row // PART_ROWS) % num_parts == part:
                    yield (number, row), item()


# Image sets by name, beside paths: composed digits, split by scan (`engine.digits`).
NAMED = {
    "digits:train": "train scans in mixed contexts",
    "digits:train-seen": "train scans in the contexts that the zoo's `classifier` was trained on",
    "digits:validation": "validation scans in mixed contexts",
    "digits:test": "test scans in mixed contexts",
    "digits:test-single": "test scans, each in every context with one attribute off its default",
}
# Composites of a mixed set.
_NUM_MIXED = {"train": 6000, "validation": 3000, "test": 3470}


def open_images(address: str, labels: tuple[str, ...], option: str = "--data") -> ImageSource:
    """The images at a path, or of a named set.

    Args:
        address: a file, a folder, or a name of `NAMED`.
        labels: class names of the target in index order.
        option: what the user gave the address by, for messages.

    Raises:
        JobError: there is nothing, or nothing of a kind that can be read.
    """
    if address in NAMED:
        return _digits(address, labels, option)
    if "://" in address:
        raise JobError(
            f"{option}: '{address}' is not on this machine; images are read from files and folders alone; "
            "copy them here first, such as with `aws s3 sync`, or `riskforge export` where it is a run"
        )
    try:
        path = Path(address).expanduser()
        if path.is_dir():
            return _of_folder(path, labels)
        if path.is_file():
            return _of_file(path, labels, option)
    except OSError as error:
        raise JobError(f"{option}: '{address}' cannot be read ({error.strerror or error})") from None
    except (RuntimeError, ValueError) as error:
        raise JobError(f"{option}: '{address}' cannot be looked at ({error})") from None
    raise JobError(f"{option}: there is no '{address}'{nearest(address, list(NAMED))}; give {SOUGHT}")


def _of_file(path: Path, labels: tuple[str, ...], option: str) -> ImageSource:
    if path.suffix.lower() == ".tar":
        return webdataset([path], labels)
    if path.suffix.lower() == ".parquet":
        return parquet([path], labels)
    raise JobError(f"{option}: '{path}' is neither a .tar nor a .parquet file; give {SOUGHT}")


def _of_folder(path: Path, labels: tuple[str, ...]) -> ImageSource:
    """Tars come before parquet, because a run has both; a folder without either is one of classes."""
    for folder in (path, path / "shards"):
        if tars := _files(folder, ".tar"):
            return webdataset(tars, labels)
    # Beside class folders a file of this name tells of their images, and holds none.
    if tables := [one for one in _files(path, ".parquet") if one.name != "metadata.parquet"]:
        return parquet(tables, labels)
    return image_folder(path, labels)


def _files(folder: Path, suffix: str) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(one for one in folder.iterdir() if one.suffix.lower() == suffix and one.is_file())


def image_key(image: PIL.Image.Image) -> bytes:
    """Digest of the pixels of an image, whatever its file."""
    return hashlib.sha256(f"{image.width}x{image.height}:".encode() + image.tobytes()).digest()


def nothing_usable(source: ImageSource, option: str, address: str, unusable: Sequence[Unusable]) -> str:
    """What to tell where no image of a source can be used."""
    if not unusable:
        return f"{option}: '{address}' has no image (read as {source.kind}); give {SOUGHT}"
    reasons = "; ".join(f"{one.name}: {one.reason}" for one in unusable[:_MAX_SHOWN])
    more = f"; and {len(unusable) - _MAX_SHOWN} more" if len(unusable) > _MAX_SHOWN else ""
    return f"{option}: '{address}' has no usable image (read as {source.kind}): {reasons}{more}; give {SOUGHT}"


# Named sets ----------------------------------------------------------------------------------------------------------


def _digits(name: str, labels: tuple[str, ...], option: str) -> ImageSource:
    """A set of composed digits.

    Raises:
        JobError: the target's classes are not those of the digits.
    """
    from engine import digits

    if unknown := [one for one in digits.CLASS_NAMES if isinstance(_look_up(one, labels), str)]:
        raise JobError(f"{option}: '{name}' has digits, and the target has no class '{unknown[0]}'; give {SOUGHT}")
    split = name.removeprefix("digits:")
    is_single = split == "test-single"
    if is_single:
        composites = digits.compose_single("test", seed=0)
    elif split == "train-seen":
        composites = digits.compose_seen(_NUM_MIXED["train"], seed=0)
    else:
        composites = digits.compose_split(split, _NUM_MIXED[split], seed=0)

    def one(row: int) -> Found:
        single = (digits.context_text(composites.contexts, row),)
        tags = single if is_single else digits.attribute_texts(composites.contexts, row)
        index = _class_of(digits.CLASS_NAMES[int(composites.labels[row])], labels)
        return LabelledImage(f"{name} {row}", PIL.Image.fromarray(composites.images[row]), index, tags)

    def items() -> Iterator[Item]:
        return (partial(one, row) for row in range(len(composites)))

    return ImageSource(NAMED[name], len(composites), (items,))


# A folder by class ---------------------------------------------------------------------------------------------------


def image_folder(root: Path, labels: tuple[str, ...]) -> ImageSource:
    """Images at `root/CLASS/NAME.EXTENSION`; links are followed, hidden files and other extensions are not looked at.

    Raises:
        OSError: a folder cannot be listed.
    """
    files = [file for entry in sorted(root.iterdir()) for file in _images_below(entry)]

    def items() -> Iterator[Item]:
        for file in files:
            place = file.relative_to(root)
            label = place.parts[0] if len(place.parts) > 1 else None
            yield partial(_found, str(place), label, labels, partial(_file_bytes, file))

    return ImageSource("a folder by class", len(files), (items,))


def _images_below(entry: Path) -> list[Path]:
    """The images in a class folder, with folders that are too deep; or the entry itself where it is an image."""
    if entry.name.startswith("."):
        return []
    if not entry.is_dir():
        return [entry] if _is_image(entry.name) else []
    return sorted(
        one for one in entry.iterdir() if not one.name.startswith(".") and (_is_image(one.name) or one.is_dir())
    )


def _is_image(name: str) -> bool:
    return name.rpartition(".")[2].lower() in EXTENSIONS


def _file_bytes(file: Path) -> bytes:
    if file.is_dir():
        raise UnusableImageError("is a folder; images lie directly in the folder of their class")
    if not file.is_file():
        raise UnusableImageError("is not a file" if file.exists() else "there is no such file")
    _check_bytes(file.stat().st_size)
    return file.read_bytes()


# WebDataset tars -----------------------------------------------------------------------------------------------------


def webdataset(paths: Sequence[Path], labels: tuple[str, ...]) -> ImageSource:
    """Samples of tars: adjacent members that share their name up to the first dot.

    The image is the member with an extension of `EXTENSIONS`; the class stands in `.cls` (an index or a name), else
    as `class_index` in `.json`.
    """

    def items(path: Path) -> Iterator[Item]:
        try:
            yield from _tar_samples(path, labels)
        except _TAR_ERRORS as error:
            reason = f"cut short or damaged from here on ({_brief(error)})"
            yield partial(Unusable, _plain(path.name), reason)

    num_bytes = sum(path.stat().st_size for path in paths)
    return ImageSource("WebDataset tars", None, tuple(partial(items, path) for path in paths), num_bytes)


def _tar_samples(path: Path, labels: tuple[str, ...]) -> Iterator[Item]:
    with tarfile.open(path, "r:") as tar:
        for key, members in _grouped(tar):
            images = [member for extension, member in members.items() if extension in EXTENSIONS]
            if images:
                yield partial(_tar_sample, tar, f"{path.name}/{images[0].name}", members, images[0], labels)
            elif "cls" in members or "json" in members:
                yield partial(Unusable, _plain(f"{path.name}/{key}"), "has a label and no image")
        _check_end(tar)


def _tar_sample(
    tar: tarfile.TarFile,
    name: str,
    members: dict[str, tarfile.TarInfo],
    image: tarfile.TarInfo,
    labels: tuple[str, ...],
) -> Found:
    about = _tar_record(tar, members)
    if about.get("accepted") is False:
        # Of a run that stores them: the label of a rejected sample may well be wrong.
        return Unusable(_plain(name), "was rejected by the rule of its run")
    found = _found(name, _tar_label(tar, members), labels, partial(_member_bytes, tar, image))
    return _in_context(found, about.get("context"))


def _grouped(tar: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Keys and members by extension, in lower case; a member that stands twice counts once."""
    current, members = "", dict[str, tarfile.TarInfo]()
    for member in tar:
        folder, slash, base = member.name.rpartition("/")
        stem, _, extension = base.partition(".")
        # A sparse member promises more bytes than the archive has.
        if not member.isreg() or member.issparse() or not stem or not extension:
            continue
        if (key := folder + slash + stem) != current and members:
            yield current, members
            members = {}
        current = key
        members.setdefault(extension.lower(), member)
    if members:
        yield current, members


def _tar_label(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> str | int | UnusableImageError:
    """What a sample says of its class, or why it says nothing."""
    try:
        if "cls" in members:
            text = _member_bytes(tar, members["cls"]).decode("utf-8").strip()
            return int(text) if _is_index(text) else text
        if "json" in members:
            return json.loads(_member_bytes(tar, members["json"]))["class_index"]
    except (UnusableImageError, ValueError, KeyError, TypeError, RecursionError):
        return UnusableImageError("has no label: neither a .cls nor a `class_index` in .json can be read")
    return UnusableImageError("has no label: neither .cls nor .json is beside it")


def _tar_record(tar: tarfile.TarFile, members: dict[str, tarfile.TarInfo]) -> dict[str, Any]:
    """A sample's .json, or nothing."""
    try:
        about = json.loads(_member_bytes(tar, members["json"]))
    except (UnusableImageError, ValueError, KeyError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _member_bytes(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    _check_bytes(member.size)
    try:
        file = tar.extractfile(member)
        assert file is not None, "only plain files are grouped"
        return file.read()
    except _TAR_ERRORS as error:
        raise UnusableImageError(f"cannot be read from the archive ({_brief(error)})") from None


def _check_end(tar: tarfile.TarFile) -> None:
    """Tell the end of an archive from a damaged header, at which tarfile stops without a word.

    Raises:
        tarfile.ReadError: the archive does not end here.
    """
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    block = tar.fileobj.read(tarfile.BLOCKSIZE)
    if len(block) < tarfile.BLOCKSIZE or any(block):
        raise tarfile.ReadError("the end of the archive is missing")


# Parquet -------------------------------------------------------------------------------------------------------------


def parquet(paths: Sequence[Path], labels: tuple[str, ...]) -> ImageSource:
    """Rows of parquet files as Hugging Face has them.

    Column `image` holds the bytes of a file, or a struct with `bytes`; column `label` a class name or an index. Where
    the file names its classes, an index is one of those, and its name decides. A text column `context` is taken along.
    """
    sizes = [_num_rows(path) for path in paths]

    def items(path: Path) -> Iterator[Item]:
        import pyarrow as pa

        try:
            yield from _parquet_rows(path, labels)
        except (pa.ArrowException, OSError, ValueError) as error:
            reason = f"cannot be read as parquet from here on ({_brief(error)})"
            yield partial(Unusable, _plain(path.name), reason)

    return ImageSource("parquet", sum(sizes), tuple(partial(items, path) for path in paths))


def _num_rows(path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_metadata(path).num_rows
    except (pa.ArrowException, OSError):
        return 0


def _parquet_rows(path: Path, labels: tuple[str, ...]) -> Iterator[Item]:
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        missing = [name for name in ("image", "label") if name not in file.schema_arrow.names]
        if missing:
            found = ", ".join(file.schema_arrow.names)
            reason = _plain(f"has no column {' and '.join(missing)}; it has {found}")
            yield partial(Unusable, _plain(path.name), reason)
            return
        class_names = _class_names(file.schema_arrow.metadata)
        number = 0
        columns = [name for name in ("image", "label", "context") if name in file.schema_arrow.names]
        for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=columns):
            for row in batch.to_pylist():
                yield partial(_parquet_row, f"{path.name} row {number}", row, class_names, labels)
                number += 1


def _parquet_row(name: str, row: dict[str, Any], class_names: list[str], labels: tuple[str, ...]) -> Found:
    found = _found(name, _named(row["label"], class_names), labels, partial(_cell_bytes, row["image"]))
    return _in_context(found, row.get("context"))


def _class_names(metadata: dict[bytes, bytes] | None) -> list[str]:
    """The class names that Hugging Face datasets keeps in a file's schema, or none."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return [str(name) for name in features["label"]["names"]]
    except (KeyError, TypeError, ValueError, RecursionError):
        return []


def _named(label: Any, class_names: list[str]) -> Any:
    is_index = isinstance(label, int) and 0 <= label < len(class_names)
    return class_names[label] if is_index else label


def _cell_bytes(value: Any) -> bytes:
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise UnusableImageError("holds no bytes of an image file in column image")
    _check_bytes(len(data))
    return data


# What all kinds share ------------------------------------------------------------------------------------------------


def _found(name: str, label: Any, labels: tuple[str, ...], data: Callable[[], bytes]) -> Found:
    """An image with its class; its bytes are only asked for where the class is known."""
    try:
        index = _class_of(label, labels)
        return LabelledImage(_plain(name), decode_rgb(data()), index)
    except UnusableImageError as error:
        return Unusable(_plain(name), _plain(str(error)))
    except OSError as error:
        return Unusable(_plain(name), f"cannot be read ({_brief(error)})")


def _in_context(found: Found, context: Any) -> Found:
    """What was found, with the context that stands beside it, where one does."""
    if isinstance(found, Unusable) or not isinstance(context, str):
        return found
    return dataclasses.replace(found, contexts=(_plain(context),))


def _class_of(label: Any, labels: tuple[str, ...]) -> int:
    """Index of the class that a label names.

    Raises:
        UnusableImageError: no label, or no such class.
    """
    if isinstance(label, UnusableImageError):
        raise label
    if label is None or label == "":
        raise UnusableImageError("has no label")
    if isinstance(label, bool) or not isinstance(label, (int, str)):
        raise UnusableImageError(f"has the label {label!r}, which is neither a class name nor an index")
    found = _look_up(label, labels)
    if isinstance(found, str):
        raise UnusableImageError(found)
    return found


@lru_cache(maxsize=4096)
def _look_up(label: str | int, labels: tuple[str, ...]) -> int | str:
    """Index of a class by name, by a name with underscores for blanks, or by index; or why there is none."""
    names = (label, label.replace("_", " ")) if isinstance(label, str) else ()
    for name in names:
        with contextlib.suppress(JobError):
            return class_index(name, list(labels))
    is_index = isinstance(label, str) and _is_index(label)
    try:
        return class_index(int(label) if is_index else label, list(labels))
    except JobError as error:
        return str(error)


def _is_index(text: str) -> bool:
    return re.fullmatch(r"[0-9]{1,9}", text) is not None


def decode_rgb(data: bytes) -> PIL.Image.Image:
    """The image in the bytes of a file as 8-bit RGB, as torchvision sees it: first frame, alpha dropped, not turned.

    Raises:
        UnusableImageError: not an image, damaged, or of a size that no classifier is made for.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with PIL.Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                _check_shape(*image.size)
                image.load()
                return _rgb(image)
    except UnusableImageError:
        raise
    except PIL.UnidentifiedImageError:
        raise UnusableImageError("is not an image in PNG, JPEG, WebP, BMP, GIF, TIFF or PPM") from None
    except PIL.Image.DecompressionBombError:
        raise UnusableImageError(f"has more than {MAX_PIXELS // 10**6} million pixels") from None
    except Exception as error:  # Decoders raise anything on foreign bytes.
        raise UnusableImageError(f"is damaged ({_brief(error)})") from None


def _check_bytes(num_bytes: int) -> None:
    if num_bytes > MAX_FILE_BYTES:
        raise UnusableImageError(f"is a file of {num_bytes} bytes; up to {MAX_FILE_BYTES // 2**20} MB are read")


def _check_shape(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise UnusableImageError(f"has more than {MAX_PIXELS // 10**6} million pixels")
    if min(width, height) < MIN_SIDE:
        raise UnusableImageError(f"is {width} x {height} pixels; both sides must have {MIN_SIDE} or more")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise UnusableImageError(f"is {width} x {height} pixels; it is too long for any classifier")


def _rgb(image: PIL.Image.Image) -> PIL.Image.Image:
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return PIL.Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        raise UnusableImageError(f"has {image.mode} pixels, whose range is not known; store 8 or 16 bits")
    return image.convert("RGB")


def _brief(error: Exception) -> str:
    """The first line of an error; equal for equal bytes, so without addresses of memory."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    line = (text.strip().splitlines() or [type(error).__name__])[0]
    return _plain(re.sub(r"0x[0-9a-f]{6,}", "0x", line))[:_MAX_REASON_CHARS]


def _plain(text: str) -> str:
    """A text from outside that can be printed and stored: no control characters, no broken Unicode, not too long."""
    shown = printable(text)
    return shown if len(shown) <= _MAX_NAME_CHARS else shown[: _MAX_NAME_CHARS - 3] + "..."
