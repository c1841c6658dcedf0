"""Write PACS as class folders of PNG files, a folder a domain: photographs, art, cartoons and sketches at 64 pixels.

    export RISKFORGE_DATA=FOLDER        # holds shift/pacs_64px_100percell.npz
    uv run python tools/zoo/pacs_folders.py

Seven classes (dog, elephant, giraffe, guitar, horse, house, person), up to 100 images of each in a domain (Li et al.,
"Deeper, Broader and Artier Domain Generalization", ICCV 2017). A folder appears whole or not at all; one that holds
these images already is left alone, any other is refused.
"""

from __future__ import annotations

import argparse
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
from cifar10_folder import ENVIRONMENT, Images, write_folder

DEFAULT_OUTPUT = Path("runs/pacs")
FILE = Path("shift/pacs_64px_100percell.npz")
# Names of domains in the file, by those of the folders.
DOMAINS = {"photo": "photo", "art": "art_painting", "cartoon": "cartoon", "sketch": "sketch"}


def by_domain(data: Path) -> dict[str, Images]:
    """The images of each domain by their paths in its folder, `CLASS/ROW.png`.

    Raises:
        OSError, ValueError, KeyError, zipfile.BadZipFile: the file is missing, or another one.
    """
    with np.load(data / FILE, allow_pickle=False) as file:
        images, labels, domains = file["images"], file["labels"], file["domains"]
        classes, names = file["classes"].tolist(), file["domain_names"].tolist()
    return {
        folder: {
            f"{classes[labels[row]]}/{row:05d}.png": images[row]
            for row in np.flatnonzero(domains == names.index(name)).tolist()
        }
        for folder, name in DOMAINS.items()
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = os.environ.get(ENVIRONMENT) or None
    parser.add_argument("--data", type=Path, default=known, help=f"folder with shift/; default: {ENVIRONMENT}")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="holds a folder for each domain")
    arguments = parser.parse_args()
    if arguments.data is None:
        parser.error(f"set {ENVIRONMENT} to the folder that holds shift/, or give --data")
    try:
        domains = by_domain(arguments.data)
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        sys.exit(f"error: --data: {arguments.data / FILE} cannot be read ({error})")
    for name, images in domains.items():
        try:
            is_new = write_folder(images, arguments.output / name)
        except OSError as error:
            sys.exit(f"error: --output: {error}")
        state = "written" if is_new else "already there, unchanged"
        print(f"{arguments.output / name}: {len(images)} images, {state}")


if __name__ == "__main__":
    main()
