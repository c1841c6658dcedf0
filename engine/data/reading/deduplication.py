"""An export without near duplicates: what was dropped, what took its place, and how far below its quota a class is."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from engine.data.reading.corpus import Corpus
from engine.data.reading.deduplicate import Duplicate, embed, near_duplicates, replacements
from engine.data.reading.selection import Chosen, SampleReader, Selection
from engine.data.run.counts import class_code
from engine.job.plan import JOINT_CODE
from engine.job.spec import JOINT_SEPARATOR, RequestSpec

# Of the classes below their quota, on a terminal.
MAX_SHORT = 10


class Cell(NamedTuple):
    """What a quota counts: the samples of a request and a class, or of its joint prompt, in one run."""

    run: int
    request: str
    code: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Deduplicated:
    """The outcome.

    Attributes:
        kept: the samples that stay, then those that took the place of others.
        rows: of the list of duplicates: dropped key, kept key, cosine.
        cells: by cell with dropped samples how many are there, were asked for (0: unknown), dropped, and replaced.
    """

    kept: list[Chosen]
    rows: list[tuple[str, str, str]]
    cells: list[dict[str, Any]]
    num_dropped: int
    num_topped_up: int


def deduplicate(
    corpus: Corpus,
    selection: Selection,
    reader: SampleReader,
    names: Mapping[int, str],
    threshold: float,
    address: str,
    advance: Callable[[str], None],
) -> Deduplicated:
    """Leave near duplicates out, and fill their places with spare samples of their cells.

    Args:
        names: of the classes by index.
        address: of the CLIP model.

    Raises:
        JobError, CorruptShardError: as `embed` and `SampleReader.images`.
    """
    samples = selection.samples
    cells = _Cells(corpus)
    classes = [sample.class_index for sample in samples]
    embeddings = embed(reader.images(samples), address, advance)
    duplicates = near_duplicates(embeddings, classes, threshold)
    dropped = {duplicate.dropped for duplicate in duplicates}
    missing = Counter(cells.of(samples[number]) for number in dropped)
    spare = [sample for sample in selection.spare if cells.of(sample) in missing]
    everything, taken = [*samples, *spare], list[int]()
    if spare:
        everything_embedded = np.concatenate([embeddings, embed(reader.images(spare), address, advance)])
        all_classes, all_cells = [sample.class_index for sample in everything], list(map(cells.of, everything))
        taken = replacements(everything_embedded, all_classes, all_cells, len(samples), dropped, threshold)
    chosen = [sample for number, sample in enumerate(samples) if number not in dropped]
    chosen += [everything[number] for number in taken]
    there = Counter(map(cells.of, chosen))
    filled = Counter(cells.of(everything[number]) for number in taken)
    return Deduplicated(
        kept=chosen,
        rows=list(_rows(samples, duplicates)),
        cells=[cells.document(cell, names, there[cell], missing[cell], filled[cell]) for cell in sorted(missing)],
        num_dropped=len(dropped),
        num_topped_up=len(taken),
    )


def deduplication_lines(summary: Mapping[str, Any], num_samples: int) -> Iterator[str]:
    """What to say of it: the total, and the classes that are below their quota now."""
    text = f"{summary['dropped']} of {num_samples} samples were near duplicates; {summary['list']} names them"
    if summary["topped_up"]:
        text += f"; {summary['topped_up']} from beyond the quotas took their place"
    yield text
    short = [cell for cell in summary["cells"] if cell["missing"]]
    runs = {cell["run"] for cell in summary["cells"]}
    for cell in short[:MAX_SHORT]:
        where = f"{cell['run']}, " if len(runs) > 1 else ""
        wanted = f" of {cell['wanted']}" if cell["wanted"] else ""
        yield (
            f"  {where}request {cell['request']}, class {cell['class']}: {cell['kept']}{wanted} left"
            f" ({cell['dropped']} dropped, {cell['topped_up']} replaced)"
        )
    if len(short) > MAX_SHORT:
        yield f"  and {len(short) - MAX_SHORT} more, which README.md and manifest.json list"


def _rows(samples: list[Chosen], duplicates: list[Duplicate]) -> Iterator[tuple[str, str, str]]:
    for dropped, kept, similarity in duplicates:
        yield samples[dropped].key, samples[kept].key, f"{similarity:.6f}"


class _Cells:
    """The cells of the samples of some runs."""

    def __init__(self, corpus: Corpus) -> None:
        self._corpus = corpus
        has_requests = "request" in corpus.columns
        columns = ["key", *(["request"] if has_requests else [])]
        tables = [corpus.run_table(number, columns) for number in range(len(corpus.runs))]
        self._keys = [table["key"].to_pylist() for table in tables]
        self._requests = [table["request"].to_pylist() if has_requests else None for table in tables]

    def of(self, sample: Chosen) -> Cell:
        requests = self._requests[sample.run]
        request = None if requests is None else requests[sample.row]
        return Cell(sample.run, request or "", class_code(self._keys[sample.run][sample.row]))

    def document(self, cell: Cell, names: Mapping[int, str], kept: int, dropped: int, topped_up: int) -> dict[str, Any]:
        """What the manifest has of a cell."""
        spec = self._spec(cell)
        return {
            "run": self._corpus.runs[cell.run].uri,
            "request": cell.request,
            "class": _class_text(cell, names, spec),
            "wanted": spec.num_wanted if spec else 0,
            "kept": kept,
            "dropped": dropped,
            "topped_up": topped_up,
            "missing": dropped - topped_up,
        }

    def _spec(self, cell: Cell) -> RequestSpec | None:
        """The request of a run itself: what a merged data set was asked for is not known."""
        source = self._corpus.runs[cell.run]
        job = None if source.is_export else source.origins[0].parsed_job()
        return next((spec for spec in job.requests if spec.name == cell.request), None) if job else None


def _class_text(cell: Cell, names: Mapping[int, str], spec: RequestSpec | None) -> str:
    if cell.code == JOINT_CODE and spec is not None and spec.boundary:
        return JOINT_SEPARATOR.join(map(str, spec.boundary))
    return names.get(int(cell.code), cell.code) if cell.code.isdecimal() else cell.code
