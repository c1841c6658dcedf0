"""The samples that a filter selects, one by one: what a reader wants to know of each first, and their image files."""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.reading.corpus import Corpus
from engine.data.reading.pairs import PairRows
from engine.data.run.counts import is_joint
from engine.data.run.file_names import PLANS
from engine.data.run.tar_index import TarReader, find_in_tars
from engine.data.stores.file_errors import explained
from engine.errors import CorruptShardError, OutputError, StoreLostError
from engine.job.class_names import distinct_names
from engine.job.columns import NO_CLASS, PAIR_COLUMNS
from engine.models.untrusted_files import UnsuitableFileError, read_whole

if TYPE_CHECKING:
    import pyarrow as pa

_COLUMNS = (
    "key", "request", "class_name", "class_index", "kldb_classes", "context", "status", "accepted", "scored", "risk",
    "predicted_class", "sha256",
)  # fmt: skip
SAMPLE = "sample"
# What keys of runs are; others may be names of files elsewhere.
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,180}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedSample:
    """A row that a filter selects.

    Attributes:
        run: number of the run, as they were opened.
        class_name: what it was conditioned on, of a joint prompt all of its classes.
        predicted_class, predicted: index and name of the class that the target predicts; `NO_CLASS` and empty of a row
            that was not scored.
        risk: None of a row that was not scored.
        sha256: checksum of its image file; empty where none is stored.
    """

    run: int
    key: str
    request: str
    class_name: str
    context: str
    status: str
    accepted: bool
    predicted_class: int
    predicted: str
    risk: float | None
    sha256: str

    def to_document(self, uri: str) -> dict[str, Any]:
        """As plain data.

        Args:
            uri: of its run.
        """
        names = (
            "key",
            "request",
            "class_name",
            "context",
            "status",
            "accepted",
            "predicted_class",
            "predicted",
            "risk",
        )
        return {"run": uri} | {name: getattr(self, name) for name in names} | {"has_image": bool(self.sha256)}


def list_samples(corpus: Corpus, limit: int | None = None) -> list[ListedSample]:
    """The rows of a corpus from the highest risk to the lowest, then those without one; equal ones by key.

    Args:
        limit: how many at most; all where not given.

    Raises:
        CorruptShardError: rows cannot be read.
    """
    import pyarrow as pa

    tables = []
    for number in range(len(corpus.runs)):
        table = corpus.run_table(number, [name for name in _COLUMNS if name in corpus.columns])
        tables.append(table.append_column("run", pa.array([number] * len(table), pa.int64())))
    table = pa.concat_tables(tables, promote_options="permissive")
    chosen = table.take(_by_risk(table)[:limit]).to_pylist()
    names = [distinct_names(dict(enumerate(source.labels))) for source in corpus.runs]
    return [_listed(row, names[row["run"]]) for row in chosen]


def _by_risk(table: pa.Table) -> pa.Array:
    """Numbers of the rows in the order of the list."""
    import pyarrow as pa
    import pyarrow.compute as pc

    scored = pc.fill_null(table["scored"], False)
    risk = pc.if_else(scored, table["risk"], pa.scalar(None, pa.float64()))
    keys = pa.table({"risk": risk, "key": table["key"], "run": table["run"]})
    return pc.sort_indices(keys, [("risk", "descending"), ("key", "ascending"), ("run", "ascending")])


def _listed(row: dict[str, Any], names: dict[int, str]) -> ListedSample:
    def name_of(index: int) -> str:
        return "none" if index == NO_CLASS else names.get(index, f"class {index}")

    asked = str(row["class_name"])
    if is_joint(row["key"]) and row["kldb_classes"]:
        asked = " and ".join(name_of(index) for index in row["kldb_classes"])
    scored = bool(row["scored"])
    return ListedSample(
        run=row["run"],
        key=row["key"],
        request=row["request"],
        class_name=asked,
        context=row["context"] or "",
        status=row["status"],
        accepted=bool(row["accepted"]),
        predicted_class=row["predicted_class"] if scored else NO_CLASS,
        predicted=name_of(row["predicted_class"]) if scored else "",
        risk=float(row["risk"]) if scored else None,
        sha256=row["sha256"] or "",
    )


# Image files ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedImages:
    """What became of the images of a list.

    Attributes:
        num_equal: files that were there already, with the same content.
        missing: keys of samples without an image, each with the reason.
        is_damaged: whether one is missing although the run should have it.
    """

    num_written: int = 0
    num_equal: int = 0
    missing: list[tuple[str, str]] = field(default_factory=list)
    is_damaged: bool = False


def save_images(corpus: Corpus, samples: Sequence[ListedSample], folder: Path, which: str = SAMPLE) -> SavedImages:
    """Write the images of listed samples into a folder, each called by its key.

    Args:
        which: `sample`, or what it is compared with: `start` or `twin`, which has that in its name.

    Raises:
        OutputError: the folder lies in a run, or a file of another content has one of the names, before anything is
            written; or one cannot be written.

    Side effects: makes the folder.
    """
    if any((parent / PLANS).exists() for parent in (folder, *folder.resolve().parents)):
        raise OutputError(f"--save: {folder} lies in the folder of a run, which holds its own files; give another")
    with explained(f"--save: {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    names, missing, is_damaged, num_written, num_equal = _file_names(samples), [], False, 0, 0
    readers = _sample_files if which == SAMPLE else _second_files
    suffix = "" if which == SAMPLE else f".{which}"
    # First those whose name is taken: nothing is written where one of them is another file.
    taken = {path.name.partition(".")[0] for path in folder.iterdir()}
    for is_first in (True, False):
        some = [sample for sample in samples if ((names[sample.run, sample.key] or "") in taken) == is_first]
        for number in range(len(corpus.runs)):
            own = [sample for sample in some if sample.run == number]
            for sample, file, reason in readers(corpus, number, own, which) if own else ():
                name = names[number, sample.key]
                if file is None or name is None:
                    missing.append((sample.key, reason or "its key is no file name"))
                    is_damaged |= file is None and bool(sample.sha256) and which == SAMPLE
                elif _write(folder / f"{name}{suffix}.{file[1]}", file[0]):
                    num_written += 1
                else:
                    num_equal += 1
    return SavedImages(num_written=num_written, num_equal=num_equal, missing=missing, is_damaged=is_damaged)


def _file_names(samples: Sequence[ListedSample]) -> dict[tuple[int, str], str | None]:
    """By run and key the name of a file without its extension; None of a key that is no file name.

    Runs that share a key have it with the number of the run before it, but for the first, as exports do.
    """
    users: dict[str, set[int]] = defaultdict(set)
    for sample in samples:
        users[sample.key].add(sample.run)
    return {
        (sample.run, sample.key): None
        if _FILE_NAME.fullmatch(sample.key) is None
        else sample.key
        if sample.run == min(users[sample.key])
        else f"r{sample.run + 1}-{sample.key}"
        for sample in samples
    }


_File = tuple[ListedSample, tuple[bytes, str] | None, str]


def _sample_files(corpus: Corpus, number: int, samples: Sequence[ListedSample], which: str) -> Iterator[_File]:
    """The image files of samples of a run with their extensions, or why there is none."""
    source = corpus.runs[number]
    stored = [sample.key for sample in samples if sample.sha256]
    places, problems = find_in_tars(source.tars, stored)
    reader = TarReader(source.tars)
    for sample in samples:
        if not sample.sha256:
            yield sample, None, f"{sample.status}, no image is stored"
        elif (place := places.find(sample.key)) is None:
            yield sample, None, problems[0] if problems else "no tar has it; `riskforge verify` reports what is damaged"
        else:
            data = reader.read(place.image)
            is_whole = hashlib.sha256(data).hexdigest() == sample.sha256
            reason = "" if is_whole else "its file has another checksum; `riskforge verify` reports what is damaged"
            yield sample, (data, place.image_format) if is_whole else None, reason
    reader.close()


def _second_files(corpus: Corpus, number: int, samples: Sequence[ListedSample], which: str) -> Iterator[_File]:
    """The starts or twins of samples of a run, as `_sample_files`."""
    stored = corpus.with_images(rejected=True, surplus=True)
    pairs = PairRows(corpus.runs[number], stored.run_table(number, PAIR_COLUMNS))
    read: Callable[[str], Any] = pairs.start if which == "start" else pairs.twin
    for sample in samples:
        try:
            file = read(sample.key)
            yield sample, None if file is None else (file.data, file.image_format), f"no {which} is stored"
        except StoreLostError:
            raise
        except (CorruptShardError, OutputError) as error:
            yield sample, None, str(error)
    pairs.close()


def _write(path: Path, data: bytes) -> bool:
    """Write a file that is not there; returns whether it was written, false where it is there with this content.

    Raises:
        OutputError: something else has its name.
    """
    with explained(f"--save: {path}"):
        if os.path.lexists(path):
            if path.is_symlink() or not _holds(path, data):
                raise OutputError(f"--save: {path} is there already, with other content; choose another folder")
            return False
        with path.open("xb") as file:
            try:
                file.write(data)
            except BaseException:
                # A torn file would be refused by the next call.
                path.unlink()
                raise
    return True


def _holds(path: Path, data: bytes) -> bool:
    """Whether a path is a file with this content."""
    try:
        return read_whole(path, len(data)) == data
    except UnsuitableFileError:
        return False
