"""What becomes of real images: samples that start from them, by request and strength, from the files of a run.

    uv run python tools/counterfactual_figures.py RUN --judges zoo:digits/oracle zoo:digits/classifier-b

Judges are networks that guided nothing; every stored image is shown to them. A valid failure is a sample on which the
target errs while all of them predict its class. The first row is of the real images themselves, as the pipeline saw
them; at strength 0 a sample is their reconstruction, which bounds what can be said of the others. Prints a Markdown
table with 95 % Wilson intervals; risk, distances and PSNR are medians.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from risky_figures import read_job, share

from engine.commands.jobfile import import_factories
from engine.data.images import decode_rgb
from engine.data.run.shards import SHARDS, read_shard
from engine.job.columns import UNKNOWN
from engine.job.records import STARTS
from engine.methods.scores import risk
from engine.models.classifier import Classifier
from engine.models.library_logging import quiet_libraries

BATCH_ROWS = 250
# Columns with a value of two images: title, digits.
PAIRED = {
    "start_distance": ("distance to start", 3),
    "twin_distance": ("distance to twin", 3),
    "twin_psnr_db": ("PSNR to twin, dB", 1),
}


@dataclass(frozen=True, slots=True)
class Cell:
    """The samples of a request, with their records."""

    records: list[dict[str, Any]] = field(default_factory=list)
    images: list[PIL.Image.Image] = field(default_factory=list)

    def add(self, record: dict[str, Any], data: bytes) -> None:
        """Append a sample."""
        self.records.append(record)
        self.images.append(decode_rgb(data))

    def column(self, name: str) -> NDArray[Any]:
        """A column of the records, [N]."""
        return np.array([record[name] for record in self.records])

    def median(self, name: str, digits: int) -> str:
        """Median of a column's known values; empty without any."""
        values = self.column(name)
        known = values[values != UNKNOWN]
        return f"{np.median(known):.{digits}f}" if len(known) else ""


def read_cells(run: Path) -> dict[str, Cell]:
    """The samples of every request, in the order of the job."""
    cells = {request.name: Cell() for request in read_job(run).requests}
    for path in sorted((run / SHARDS).glob("*.tar")):
        for _, data, record, _ in read_shard(path):
            cells[record["request"]].add(record, data)
    return {name: cell for name, cell in cells.items() if cell.records}


def read_starts(run: Path, cells: dict[str, Cell]) -> Cell:
    """The real images that samples started from, each once."""
    names = {record["key"]: record["start_key"] for cell in cells.values() for record in cell.records}
    starts, seen = Cell(), set[str]()
    for path in sorted((run / STARTS).glob("*.tar")):
        for key, data, record, _ in read_shard(path):
            if names[key] not in seen:
                seen.add(names[key])
                starts.add(record, data)
    return starts


def check_starts(cells: dict[str, Cell]) -> None:
    """Check that all requests with starts have the same ones, so that their rows can be compared.

    Raises:
        ValueError: they have not.
    """
    keys = {name: sorted(cell.column("start_key")) for name, cell in cells.items() if cell.records[0]["start_key"]}
    first = next(iter(keys), "")
    for name, own in keys.items():
        if own != keys[first]:
            raise ValueError(f"{name} has {len(own)} samples from other images than the {len(keys[first])} of {first}")


def logits_of(classifier: Classifier, images: Sequence[PIL.Image.Image]) -> torch.Tensor:
    """Scaled logits [N, n]."""
    return torch.cat([classifier.score(images[row : row + BATCH_ROWS]) for row in range(0, len(images), BATCH_ROWS)])


def agreements(judges: Sequence[Classifier], cell: Cell) -> NDArray[np.bool_]:
    """Whether each judge predicts the class of each image, [judges, N]."""
    labels = torch.from_numpy(cell.column("class_index"))
    return np.stack([(logits_of(judge, cell.images).argmax(1) == labels).numpy() for judge in judges])


def with_target(starts: Cell, target: Classifier) -> Cell:
    """Real images with the scores that records of samples have."""
    logits, labels = logits_of(target, starts.images), torch.from_numpy(starts.column("class_index"))
    scores = zip((logits.argmax(1) != labels).tolist(), risk(logits, labels).tolist(), strict=True)
    scored = [
        record | {"is_error": is_error, "risk": value}
        for record, (is_error, value) in zip(starts.records, scores, strict=True)
    ]
    return Cell(scored, starts.images)


def table(run: Path, judges: Sequence[Classifier]) -> list[str]:
    """The lines of the table of a run.

    Raises:
        ValueError: its requests have different starts.
    """
    names = [judge.name.rpartition("/")[2].rpartition(":")[2] for judge in judges]
    heads = ["request", "strength", "n", "target errs", "valid failures", *(f"{name} agrees" for name in names)]
    heads += ["risk", *(title for title, _ in PAIRED.values())]
    lines = [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
    cells = read_cells(run)
    check_starts(cells)
    starts = read_starts(run, cells)
    if starts.records:
        target = Classifier.load(read_job(run).models.target)
        lines.append(_row("the real images", "", with_target(starts, target), judges))
    lines += [_row(name, f"{cell.records[0]['strength']:g}", cell, judges) for name, cell in cells.items()]
    return lines


def _row(name: str, strength: str, cell: Cell, judges: Sequence[Classifier]) -> str:
    """A line of the table; values that are not there are left empty."""
    is_error, agrees = cell.column("is_error"), agreements(judges, cell)
    shares = [share(is_error), share(is_error & agrees.all(0)), *map(share, agrees)]
    medians = [cell.median(column, digits) for column, (_, digits) in PAIRED.items()]
    return f"| {' | '.join([name, strength, str(len(is_error)), *shares, cell.median('risk', 2), *medians])} |"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--judges", nargs="+", required=True, help="classifiers that guided nothing")
    arguments = parser.parse_args()
    quiet_libraries()
    import_factories(arguments.judges, Path.cwd())
    judges = [Classifier.load(address) for address in arguments.judges]
    for run in arguments.runs:
        try:
            print("\n".join([f"\n{run}\n", *table(run, judges)]))
        except ValueError as error:
            sys.exit(f"error: {run}: {error}")


if __name__ == "__main__":
    main()
