"""The price of guidance through a tiny decoder: KLDB of two runs of one job, one behind each decoder.

    uv run python tools/decoder_price.py RUN RUN-WITH-TINY-DECODER [--write]

Every stored image of a guided joint request is scored again; the runs have the same samples, so differences are of
pairs. Prints a Markdown table of medians with 95 % bootstrap intervals; --write stores the figures that
`riskforge plan --calibrate` quotes.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from engine.data.images import decode_rgb
from engine.data.run.counts import is_joint
from engine.data.run.shards import read_shard
from engine.generation.decoder_advice import PRICE_FILE
from engine.methods.scores import kldb
from engine.models.classifier import Classifier
from engine.models.library_logging import quiet_libraries

NUM_RESAMPLES = 10_000
Values = NDArray[np.float64]


def joint_requests(run: Path) -> dict[str, tuple[list[int], list[PIL.Image.Image]]]:
    """Subset and images of every request with a joint prompt."""
    requests: dict[str, tuple[list[int], list[PIL.Image.Image]]] = {}
    for path in sorted(run.glob("shards/*.tar")):
        for key, data, record, _ in read_shard(path):
            if is_joint(key):
                requests.setdefault(record["request"], (record["kldb_classes"], []))[1].append(decode_rgb(data))
    return requests


def kldb_of(run: Path, request: str, address: str) -> Values:
    """KLDB of the stored images of a request under a classifier, in the order of their keys."""
    subset, images = joint_requests(run)[request]
    return kldb(Classifier.load(address).score(images), subset).double().numpy()


def median_interval(values: Values) -> list[float]:
    """Median with its 95 % percentile bootstrap interval."""
    picks = np.random.default_rng(0).integers(0, len(values), (NUM_RESAMPLES, len(values)))
    return [
        float(np.median(values)),
        *(float(end) for end in np.quantile(np.median(values[picks], axis=1), (0.025, 0.975))),
    ]


def figures(full: Path, tiny: Path, request: str, classifiers: dict[str, str]) -> dict[str, Any]:
    """Medians by classifier and decoder, and of the differences between the two samples of a pair."""
    found: dict[str, Any] = {}
    for role, address in classifiers.items():
        pair = [kldb_of(run, request, address) for run in (full, tiny)]
        if len(pair[0]) != len(pair[1]):
            raise SystemExit(f"{full} and {tiny} have {len(pair[0])} and {len(pair[1])} samples of '{request}'")
        found[role] = {
            "address": address,
            "samples": len(pair[0]),
            "full": median_interval(pair[0]),
            "tiny": median_interval(pair[1]),
            "difference": median_interval(pair[1] - pair[0]),
        }
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("full", type=Path)
    parser.add_argument("tiny", type=Path)
    parser.add_argument("--request", default="between")
    parser.add_argument("--target", default="zoo:digits/classifier")
    parser.add_argument("--other", default="zoo:digits/classifier-b", help="a classifier that guided nothing")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    quiet_libraries()
    classifiers = {"target": arguments.target, "other": arguments.other}
    found = figures(arguments.full, arguments.tiny, arguments.request, classifiers)
    print("| KLDB on | samples | the pipeline's decoder | tiny decoder | difference of a pair |\n|---|---|---|---|---|")
    for row in found.values():
        cells = ["{:.3f} ({:.3f} to {:.3f})".format(*row[name]) for name in ("full", "tiny", "difference")]
        print(f"| {row['address'].removeprefix('zoo:')} | {row['samples']} | {' | '.join(cells)} |")
    if arguments.write:
        PRICE_FILE.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
