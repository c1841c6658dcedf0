"""Write photographs of CIFAR-10 for `jobs/rounds-cifar10.yaml`, as folders CLASS/CONTEXT/ROW.png.

    export RISKFORGE_DATA=FOLDER        # holds cifar10/
    uv run python tools/zoo/cifar10_rounds.py

`real` has training images of ten classes that the zoo's target can have learnt from: none is dark or on a green ground.
`test` has rows 2,500 to 4,999 of the test file and `tuning` rows 0 to 2,499: of ten classes what the target knows, and
of the four classes that the zoo can generate what it has never seen. Dark images and green grounds are those of the
file; all images of the four classes are blurred and cut to close-ups, as in the zoo's own figures. Each folder appears
whole or not at all; one that holds these images already is left alone, any other is refused.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import numpy as np
from cifar10_captions import UNSEEN_BY_TARGET
from cifar10_contexts import Thresholds, close_ups, measure, middles
from cifar10_data import CLASS_NAMES, NUM_TUNING_ROWS, Photographs, blur, load_test_rows, load_train
from cifar10_folder import ENVIRONMENT, NUM_ROWS, Images, positive, write_folder
from cifar10_readers import Teacher
from numpy.typing import NDArray

from engine.models.addresses import resolve

DEFAULT_OUTPUT = Path("runs/rounds-photographs")
GENERATED_CLASSES = ("airplane", "cat", "dog", "ship")
ROWS = {"tuning": slice(0, NUM_TUNING_ROWS), "test": slice(NUM_TUNING_ROWS, NUM_ROWS)}
Bytes = NDArray[np.uint8]


def phrases_of(images: Bytes, thresholds: Thresholds) -> list[frozenset[str]]:
    """What can be said of each image that the target has never seen."""
    contexts = thresholds.contexts(measure(images))
    return [UNSEEN_BY_TARGET & set(contexts.phrases(row)) for row in range(len(contexts))]


def real_folder(train: Photographs, thresholds: Thresholds, count: int) -> Images:
    """The first `count` training images that have none of the contexts."""
    found: dict[str, Bytes] = {}
    for row, phrases in enumerate(phrases_of(train.images[: 2 * count], thresholds)):
        if not phrases and len(found) < count:
            found[f"{CLASS_NAMES[train.labels[row]]}/{row:05d}.png"] = train.images[row]
    return found


def test_folder(photographs: Photographs, first_row: int, thresholds: Thresholds, teacher: Teacher) -> Images:
    """Test images by class and context."""
    images, labels = photographs.images, photographs.labels
    found: dict[str, Bytes] = {}
    blurred, near = blur(images), close_ups(images, middles(teacher.activation(images, labels)))
    for row, phrases in enumerate(phrases_of(images, thresholds)):
        name, file = CLASS_NAMES[labels[row]], f"{first_row + row:05d}.png"
        if not phrases:
            found[f"{name}/{file}"] = images[row]
        if name in GENERATED_CLASSES:
            found |= {f"{name}/{phrase}/{file}": images[row] for phrase in sorted(phrases)}
            found |= {f"{name}/blurry/{file}": blurred[row], f"{name}/close up/{file}": near[row]}
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = os.environ.get(ENVIRONMENT) or None
    parser.add_argument("--data", type=Path, default=known, help=f"folder with cifar10/; default: {ENVIRONMENT}")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--real", type=positive, default=4000, metavar="N", help="training images")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error(f"set {ENVIRONMENT} to the folder that holds cifar10/, or give --data")
    try:
        train = load_train(arguments.data)
        thresholds = Thresholds.of(measure(train.images))
        teacher = Teacher(resolve("zoo:cifar10/classifier-b"))
        folders = {"real": real_folder(train, thresholds, arguments.real)}
        for name, rows in ROWS.items():
            folders[name] = test_folder(load_test_rows(arguments.data, rows), rows.start, thresholds, teacher)
        for name, images in folders.items():
            is_new = write_folder(images, arguments.output / name)
            print(f"{arguments.output / name}: {len(images)} images, {'written' if is_new else 'already there'}")
    except FileExistsError as error:
        sys.exit(f"error: --output: {error}")
    except OSError as error:
        sys.exit(f"error: {error.filename}: {error.strerror}")


if __name__ == "__main__":
    main()
