"""Starts and twins of the rows that a corpus selects, and of the samples of an export."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from engine.data.reading.pairs import ImageFile, PairRows, check_any
from engine.errors import CorruptShardError
from engine.job.columns import PAIR_COLUMNS
from engine.job.records import check_record

if TYPE_CHECKING:
    from engine.data.reading.corpus import Corpus
    from engine.data.reading.selection import Selection


def pair_rows(corpus: Corpus) -> Iterator[PairRows]:
    """What rows of each run say of starts and twins, without their other columns."""
    for number, source in enumerate(corpus.runs):
        yield PairRows(source, corpus.run_table(number, PAIR_COLUMNS))


class SelectedPairs:
    """The pairs of the samples of an export, by the keys that they have there.

    Raises:
        JobError: none of the samples has a start or a twin.
        CorruptShardError: as `PairRows`.

    Side effects:
        Samples without a pair are taken out of the selection.
    """

    def __init__(self, corpus: Corpus, selection: Selection) -> None:
        self._runs = list(pair_rows(corpus))
        keys = [corpus.run_table(number, ["key"])["key"].to_pylist() for number in range(len(corpus.runs))]
        samples = (*selection.samples, *selection.spare)
        own = {sample.key: (sample.run, keys[sample.run][sample.row]) for sample in samples}
        self._places = {key: (run, name) for key, (run, name) in own.items() if name in self._runs[run]}
        selection.samples = [sample for sample in selection.samples if sample.key in self._places]
        selection.spare = [sample for sample in selection.spare if sample.key in self._places]
        check_any(self._runs, len(selection.samples), len(corpus))

    def images(self, key: str) -> tuple[ImageFile | None, ImageFile | None]:
        """Start and twin of a sample.

        Raises:
            CorruptShardError: one is no image.
        """
        run, name = self._places[key]
        files = {"start": self._runs[run].start(name), "twin": self._runs[run].twin(name)}
        for what, file in files.items():
            if file is not None:
                self._runs[run].decoded(name, what, file)
        return files["start"], files["twin"]

    def with_twin(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record of a sample with what its run has of its twin.

        Raises:
            CorruptShardError: that is nothing that a record can have.
        """
        run, name = self._places[record["key"]]
        told = record | self._runs[run].twin_fields(name)
        try:
            check_record(told)
        except ValueError as error:
            remedy = "`riskforge verify` reports what is damaged"
            raise CorruptShardError(f"{self._runs[run].source.uri}: {error}; {remedy}") from None
        return told

    def close(self) -> None:
        """Close the tars."""
        for pairs in self._runs:
            pairs.close()
