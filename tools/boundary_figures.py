"""Does boundary guidance work? KLDB of a run's joint requests on its target and on other classifiers, from the files.

    uv run python tools/boundary_figures.py RUN --classifiers zoo:digits/classifier zoo:digits/classifier-b

Every stored image is decoded and scored again; prints a Markdown table.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import PIL.Image
import torch

from engine.data.images import decode_rgb
from engine.data.run.counts import is_joint
from engine.data.run.shards import read_shard
from engine.methods.scores import kldb
from engine.models.classifier import Classifier
from engine.models.library_logging import quiet_libraries


def joint_requests(run: Path) -> dict[str, tuple[list[int], list[PIL.Image.Image]]]:
    """Subset and images of every request with a joint prompt."""
    requests: dict[str, tuple[list[int], list[PIL.Image.Image]]] = {}
    for path in sorted(run.glob("shards/*.tar")):
        for key, data, record, _ in read_shard(path):
            if is_joint(key):
                requests.setdefault(record["request"], (record["kldb_classes"], []))[1].append(decode_rgb(data))
    return requests


def quartiles(values: torch.Tensor) -> str:
    """Median with the quartiles next to it."""
    low, median, high = torch.quantile(values, torch.tensor([0.25, 0.5, 0.75])).tolist()
    return f"{median:.3f} ({low:.3f} to {high:.3f})"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--classifiers", nargs="+", default=["zoo:digits/classifier", "zoo:digits/classifier-b"])
    parser.add_argument("--oracle", default="zoo:digits/oracle")
    arguments = parser.parse_args()
    requests = joint_requests(arguments.run)
    if not requests:
        parser.error(f"{arguments.run} has no samples of a joint prompt")
    quiet_libraries()
    classifiers = [Classifier.load(address) for address in arguments.classifiers]
    oracle = Classifier.load(arguments.oracle)
    names = [address.removeprefix("zoo:") for address in arguments.classifiers]
    print("| request | images |" + "".join(f" KLDB on {name} |" for name in names) + " oracle sees a class of C |")
    print("|---|---|" + "---|" * (len(names) + 1))
    for request, (subset, images) in requests.items():
        cells = [quartiles(kldb(classifier.score(images), subset)) for classifier in classifiers]
        seen = torch.isin(oracle.score(images).argmax(1), torch.tensor(subset)).float().mean()
        print(f"| {request} | {len(images)} | " + " | ".join(cells) + f" | {seen:.0%} |")


if __name__ == "__main__":
    main()
