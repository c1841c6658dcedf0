"""Write test photographs of CIFAR-10 as class folders of PNG files, for jobs that start from real images.

    export RISKFORGE_DATA=FOLDER        # holds cifar10/cifar10_test_5000.npz
    uv run python tools/zoo/cifar10_folder.py

Rows 2,500 to 4,999 by default: no model of the zoo was trained or tuned on them. A file is named after its row. The
folder appears whole or not at all; one that holds these images already is left alone, any other is refused.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import PIL.Image
from cifar10_data import CLASS_NAMES, Photographs, load_test_rows
from numpy.typing import NDArray

from engine.data.images import UnusableImageError, decode_rgb

ENVIRONMENT = "RISKFORGE_DATA"
NUM_ROWS = 5000
DEFAULT_OUTPUT = Path("runs/cifar10-photographs")
# By their paths in the folder, [32, 32, 3].
Images = Mapping[str, NDArray[np.uint8]]


def by_path(photographs: Photographs, *, first_row: int = 0, per_class: int | None = None) -> Images:
    """Photographs by their paths, `CLASS/ROW.png`.

    Args:
        first_row: number of the first one in the file that they are from.
        per_class: at most so many of each class, the first ones.
    """
    images: dict[str, NDArray[np.uint8]] = {}
    counts = dict.fromkeys(CLASS_NAMES, 0)
    for row, (image, label) in enumerate(zip(photographs.images, photographs.labels, strict=True), start=first_row):
        name = CLASS_NAMES[label]
        if per_class is None or counts[name] < per_class:
            counts[name] += 1
            images[f"{name}/{row:05d}.png"] = image
    return images


def save_images(images: Images, folder: Path) -> None:
    """One PNG file an image, in new folders."""
    for place, image in images.items():
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(image).save(path)


def write_folder(images: Images, output: Path) -> bool:
    """Publish a folder that holds these images and nothing else; returns whether it had to be written.

    Raises:
        FileExistsError: there is something else.
    """
    if output.is_dir() and any(output.iterdir()):
        if problem := _difference(images, output):
            raise FileExistsError(f"{output}: {problem}; remove it, or choose another --output")
        return False
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"{output}: is a file; choose another --output")
    output.parent.mkdir(parents=True, exist_ok=True)
    staged = output.with_name(f".{output.name}-{secrets.token_hex(4)}")
    try:
        save_images(images, staged)
        # An empty folder is replaced.
        staged.rename(output)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return True


def _difference(images: Images, folder: Path) -> str:
    """How a folder differs from the one that would be written; empty where it does not."""
    found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}
    if others := sorted(found - images.keys()):
        return f"holds files that do not belong to the selection ({others[0]!r} of {len(others)})"
    if missing := sorted(images.keys() - found):
        return f"lacks files of the selection ({missing[0]!r} of {len(missing)})"
    changed = (place for place, image in images.items() if not _is_same((folder / place).read_bytes(), image))
    return next((f"{place!r} is another image" for place in changed), "")


def _is_same(data: bytes, image: NDArray[np.uint8]) -> bool:
    try:
        return bool(np.array_equal(np.asarray(decode_rgb(data)), image))
    except UnusableImageError:
        return False


def parse_rows(text: str) -> range:
    """`FIRST:END` as rows of the test file.

    Raises:
        ArgumentTypeError: no such rows.
    """
    first, _, end = text.partition(":")
    rows = range(int(first), int(end)) if first.isdecimal() and end.isdecimal() else range(0)
    if not rows or rows.stop > NUM_ROWS:
        raise argparse.ArgumentTypeError(f"{text!r}: give FIRST:END, 0:{NUM_ROWS} at most")
    return rows


def positive(text: str) -> int:
    """A number above 0.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}: give a number from 1")
    return int(text)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = os.environ.get(ENVIRONMENT) or None
    parser.add_argument("--data", type=Path, default=known, help=f"folder with cifar10/; default: {ENVIRONMENT}")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--rows", type=parse_rows, default="2500:5000", metavar="FIRST:END", help="of the 5,000")
    parser.add_argument("--per-class", type=positive, metavar="N", help="only the first N of each class")
    arguments = parser.parse_args()
    rows = arguments.rows
    if arguments.data is None:
        parser.error(f"set {ENVIRONMENT} to the folder that holds cifar10/, or give --data")
    try:
        photographs = load_test_rows(arguments.data, slice(rows.start, rows.stop))
        images = by_path(photographs, first_row=rows.start, per_class=arguments.per_class)
        is_new = write_folder(images, arguments.output)
    except FileExistsError as error:
        sys.exit(f"error: --output: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}")
    state = "written" if is_new else "already there, unchanged"
    print(f"{arguments.output}: {len(images)} photographs of rows {rows.start} to {rows.stop - 1}, {state}")


if __name__ == "__main__":
    main()
