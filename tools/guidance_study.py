"""Which guidance changes what people see? Arms from the same noise, measured by networks that guided nothing.

    uv run python tools/guidance_study.py tuning --photographs data/cifar10 --output figures.json
    uv run python tools/guidance_study.py goals --photographs data/cifar10 --output figures.json --into docs/guidance.md

`tuning` makes 100 samples of every arm on the class sets that the default was chosen on; `goals` 200 of the presets on
others, `risky` on the same from other noise. Each measured arm is stored at once: the same command goes on where it was
stopped. `--photographs` is a folder of real ones by class (`tools/zoo/cifar10_folder.py` writes it); without it, digits
alone are measured. `--into` puts the tables between the marks of a page; `--sheet FOLDER` saves the
first samples of each set, an arm a row.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from bench.tables import write_into
from guidance_arms.arms import ARMS, BOUNDARY_ARMS
from guidance_arms.measures import measured
from guidance_arms.sets import SampleSet, Zoo
from guidance_arms.tables import tables_of
from torch import Tensor

from engine.models.library_logging import quiet_libraries

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
DIGIT_SETS: dict[str, list[tuple[str, ...]]] = {
    "tuning": [("four", "nine")],
    "goals": [
        ("three", "eight"),
        ("one", "seven"),
        ("zero", "six"),
        ("two", "seven", "nine"),
        ("zero", "six", "eight"),
    ],
}
# The photographs' diffusion models know four of the ten classes.
PHOTOGRAPHS = ("airplane", "cat", "dog", "ship")
GOAL_ARMS = ("prompt", "adversarial", "perceptible")
SHOWN = 12


def sets(kind: str, count: int, photographs: str | None) -> Iterator[SampleSet]:
    """The sets of samples of a kind of study."""
    digits = Zoo(name="digits", observers=("classifier-b", "oracle"), oracles=("oracle",), real="digits:validation")
    for names in DIGIT_SETS[kind]:
        yield SampleSet(zoo=digits, method="boundary", names=names, count=count)
    # Goals are measured from other noise than what was chosen by.
    seed = 0 if kind == "tuning" else 1_000_000
    yield SampleSet(zoo=digits, method="risky", names=DIGITS, count=count, first_seed=seed)
    if photographs is None:
        return
    readers = ("classifier-b", "oracle", "oracle-b")
    zoo = Zoo(name="cifar10", observers=readers, oracles=readers[1:], real=photographs)
    pairs = [("cat", "dog")] if kind == "tuning" else [("airplane", "ship"), ("cat", "ship"), ("airplane", "dog")]
    for names in pairs:
        yield SampleSet(zoo=zoo, method="boundary", names=names, count=count)
    yield SampleSet(zoo=zoo, method="risky", names=PHOTOGRAPHS, count=count, first_seed=seed)
    yield SampleSet(zoo=zoo, method="risky", names=PHOTOGRAPHS, count=count, first_seed=seed, strength=0.5)


class Results:
    """Measured arms in a JSON file, by set and arm.

    Args:
        path: the file; continued if it is there.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.sets: dict[str, dict[str, dict[str, Any]]] = json.loads(path.read_text()) if path.is_file() else {}

    def add(self, a_set: str, arm: str, figures: dict[str, Any]) -> None:
        """Store an arm, in place of the file at once."""
        self.sets.setdefault(a_set, {})[arm] = figures
        part = self._path.with_suffix(".part")
        part.write_text(json.dumps(self.sets, indent=1) + "\n")
        part.replace(self._path)


def measure(a_set: SampleSet, wanted: list[str], results: Results, sheet: Path | None) -> None:
    """Make and measure the arms of a set that are not measured yet."""
    names = [name for name in wanted if a_set.method == "boundary" or name not in BOUNDARY_ARMS]
    missing = [name for name in names if name not in results.sets.get(a_set.title, {})]
    if not missing:
        return
    # The prompt alone is made again: costs are ratios within one process, and twins are compared with it.
    twins, price = a_set.made_by(ARMS["prompt"])
    rows = [twins]
    for name in missing:
        began = time.monotonic()
        images, cost = (twins, price) if name == "prompt" else a_set.made_by(ARMS[name])
        figures = {"count": a_set.count, "cost": cost / price} | measured(a_set, images, twins)
        results.add(a_set.title, name, figures)
        print(f"{a_set.title}: {name}, {time.monotonic() - began:.0f} s", flush=True)
        rows += [] if name == "prompt" else [images]
    if sheet:
        save_sheet(rows, sheet / f"{a_set.title.replace(': ', '-').replace('/', '-').replace(' ', '-')}.png")


def save_sheet(rows: list[Tensor], path: Path) -> None:
    """The first samples of each arm, a row an arm, three times as large."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = torch.cat([torch.cat(list(images[:SHOWN]), dim=2) for images in rows], dim=1)
    pixels = (shown * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    PIL.Image.fromarray(np.kron(pixels, np.ones((3, 3, 1), dtype=np.uint8))).save(path)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("tuning", "goals"))
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the figures")
    parser.add_argument("--photographs", help="folder of real photographs by class")
    parser.add_argument("--count", type=int, help="samples of a cell; default: 100, for goals 200")
    parser.add_argument("--only", help="sets whose title has this text")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), help="default: all, for goals the presets")
    parser.add_argument("--into", type=Path, help="page with the marks of this kind")
    parser.add_argument("--sheet", type=Path, help="folder for sheets of the samples")
    arguments = parser.parse_args()
    quiet_libraries()
    torch.set_num_threads(1)
    results = Results(arguments.output)
    wanted = arguments.arms or list(ARMS if arguments.kind == "tuning" else GOAL_ARMS)
    count = arguments.count or (100 if arguments.kind == "tuning" else 200)
    for a_set in sets(arguments.kind, count, arguments.photographs):
        if not arguments.only or arguments.only in a_set.title:
            measure(a_set, wanted, results, arguments.sheet)
    tables = tables_of(arguments.kind, results.sets)
    print(tables)
    if arguments.into:
        write_into(arguments.into, arguments.kind, tables)


if __name__ == "__main__":
    main()
