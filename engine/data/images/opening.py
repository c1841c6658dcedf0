"""Opening labelled images by an address: a path or the name of a set."""

from __future__ import annotations

import contextlib
import glob
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import PIL.Image

from engine.data.images.folders import open_folder
from engine.data.images.image_source import SOUGHT, ImageSource, Item, LabelledImage, ReadResult
from engine.data.images.label_files import read_label_map
from engine.data.images.labelling import Labelling
from engine.data.images.parquet_files import parquet
from engine.data.images.splits import card_class_names, has_splits
from engine.data.images.webdataset_tars import webdataset
from engine.errors import JobError
from engine.job.spec_messages import nearest

# Image sets that are given by name instead of by path: composed digits, split by scan (`engine.data.images.digits`).
NAMED = {
    "digits:train": "train scans in mixed contexts",
    "digits:train-seen": "train scans in the contexts that the zoo's `classifier` was trained on",
    "digits:validation": "validation scans in mixed contexts",
    "digits:validation-single": "validation scans, each in every context with one attribute off its default",
    "digits:test": "test scans in mixed contexts",
    "digits:test-plain": "test scans in no context: white ink, black ground, normal size, in the centre",
    "digits:test-single": "test scans, each in every context with one attribute off its default",
}
# Composites of a mixed set.
_NUM_MIXED = {"train": 6000, "validation": 3000, "test": 3470}
_NUM_PLAIN = 347


def open_images(address: str, labels: tuple[str, ...], option: str = "--data") -> ImageSource:
    """The images at a path, or of a named set.

    Args:
        address: a file, a folder, a split of a folder of tars or parquet files (`FOLDER/train`), or a name of `NAMED`.
        labels: class names of the target in index order.
        option: the option that gave the address, for messages.

    Raises:
        JobError: there is nothing, nothing of a kind that can be read, or several splits.
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
            return open_folder(path, labels, option, address)
        if path.is_file():
            return _of_file(path, labels, option)
        if (folder := _folder_of_splits(path)) is not None:
            return open_folder(folder, labels, option, address, str(path.relative_to(folder)))
    except OSError as error:
        raise JobError(f"{option}: '{address}' cannot be read ({error.strerror or error})") from None
    except (RuntimeError, ValueError) as error:
        raise JobError(f"{option}: '{address}' cannot be looked at ({error})") from None
    if path.exists():
        raise JobError(f"{option}: '{address}' is neither a file nor a folder; give {SOUGHT}")
    hint = nearest(address, list(NAMED))
    raise JobError(f"{option}: there is no '{address}'{f'{hint} Or' if hint else ';'} give {SOUGHT}")


def _of_file(path: Path, labels: tuple[str, ...], option: str) -> ImageSource:
    if path.suffix.lower() == ".tar":
        return webdataset([path], _labelling(path, labels, option))
    if path.suffix.lower() == ".parquet":
        return parquet([path], _labelling(path, labels, option), card_class_names(path.parent))
    raise JobError(f"{option}: '{path}' is neither a .tar nor a .parquet file; give {SOUGHT}")


def _labelling(path: Path, labels: tuple[str, ...], option: str) -> Labelling:
    """How the labels of a file are read."""
    return Labelling(labels, read_label_map(path.parent, labels, option), path.parent)


def _folder_of_splits(path: Path) -> Path | None:
    """The folder that a path which is not there may name a split of, or a configuration and a split.

    A wrong path must not start a walk over everything next to it, so the split must appear in a card or in names.
    """
    for folder in (path.parent, path.parent.parent):
        if folder.is_dir():
            return folder if _shows_split(folder, path) else None
    return None


def _shows_split(folder: Path, path: Path) -> bool:
    if has_splits(folder):
        return True
    name = glob.escape(path.name)
    patterns = (
        f"{above}*{name}*{kind}" for above in ("", "*/") for kind in (".tar", ".parquet", "/*.tar", "/*.parquet")
    )
    with contextlib.suppress(OSError):
        return any(True for pattern in patterns for _ in folder.glob(pattern))
    return False


def _digits(name: str, labels: tuple[str, ...], option: str) -> ImageSource:
    """A set of composed digits.

    Raises:
        JobError: the target's classes are not those of the digits.
    """
    from engine.data.images import digits

    labelling = Labelling(labels)
    if unknown := [name for name in digits.CLASS_NAMES if not labelling.is_class(name)]:
        raise JobError(f"{option}: '{name}' has digits, and the target has no class '{unknown[0]}'; give {SOUGHT}")
    split = name.removeprefix("digits:")
    is_single = split.endswith("-single")
    num_contexts = len(digits.single_contexts())
    if is_single:
        composites = digits.compose_single(split.removesuffix("-single"), seed=0)
    elif split == "test-plain":
        composites = digits.compose_split("test", _NUM_PLAIN, seed=0, plain=True)
    elif split == "train-seen":
        composites = digits.compose_seen(_NUM_MIXED["train"], seed=0)
    else:
        composites = digits.compose_split(split, _NUM_MIXED[split], seed=0)

    def read_row(row: int) -> ReadResult:
        single = (digits.context_text(composites.contexts, row),)
        tags = single if is_single else digits.attribute_texts(composites.contexts, row)
        index = labelling.of_name(digits.CLASS_NAMES[int(composites.labels[row])])
        image = PIL.Image.fromarray(composites.images[row])
        return LabelledImage(
            f"{name} {row}", image, index, tags, origin=f"scan {row // num_contexts}" if is_single else ""
        )

    def items() -> Iterator[Item]:
        return (partial(read_row, row) for row in range(len(composites)))

    return ImageSource(NAMED[name], len(composites), (items,))
