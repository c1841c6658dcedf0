"""Runs as data: rows to filter, and the images behind them as tables, WebDataset pipelines and torch data sets.

    import engine

    corpus = engine.open_run("runs/quickstart").filter("risk > 2 and oracle_agrees")
    corpus.to_table(["key", "risk"]), corpus.to_torch(labels="soft")

Everything is read lazily, and torch is imported by `to_torch` alone. For a run on an object store the files with its
rows are copied when it is opened, and tars when an image in them is read.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from engine.data.reading.filters import Vocabulary, compile_filter, compile_number
from engine.data.reading.row_datasets import rows_dataset, unified_schema, with_scored
from engine.data.reading.source import RunSource, open_source, reading_rows
from engine.data.review.agreements import answered_store, choices, human_agreement
from engine.data.run.schema import check_rows
from engine.errors import JobError, RunWarning
from engine.job.spec_messages import nearest

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.compute import Expression
    from pyarrow.dataset import Dataset

    from engine.data.reading.pairs import Pair
    from engine.data.reading.torch_samples import TorchSamples


# Read at a time.
_ROWS = 1024


def open_run(uri: str, *more: str) -> Corpus:
    """The rows and images of one run or of several, finished or not.

    Args:
        uri: folder of a run, of a merged data set, or of the new scores of a run.

    Raises:
        RiskforgeError: one of them is not there, or cannot be read.
    """
    sources = tuple(open_source(str(address)) for address in (uri, *more))
    places = [source.store.place for source in sources]
    twice = next((source.uri for number, source in enumerate(sources) if places[number] in places[:number]), None)
    if twice is not None:
        raise JobError(f"RUN: '{twice}' is given twice; leave one of them out")
    return Corpus(sources)


class Corpus:
    """The rows of some runs that pass the filters. Immutable: a filter returns a new corpus.

    `len(corpus)` counts rows: attempts of any status, unless the corpus is restricted to those with images by
    `samples`. Rows with `status == 'ok'` have images, and rejected ones of a run with `store_rejected`.

    Attributes:
        runs: the opened runs, each with its `state`.
        conditions: the filters, as texts.
    """

    def __init__(self, sources: tuple[RunSource, ...]) -> None:
        self.runs = sources
        self.conditions: tuple[str, ...] = ()
        self._expression: Expression | None = None
        self._has_images = False
        self._schema = unified_schema(sources)
        self._datasets = tuple(rows_dataset(source, self._schema) for source in sources)

    # What is in it -------------------------------------------------------------------------------------------------

    @property
    def metadata(self) -> Dataset:
        """The rows as a lazy `pyarrow.dataset`; columns that a run's schema version did not have are null.

        So is `scored` there, which filters and tables know of rows of any version.
        """
        import pyarrow.dataset

        whole = pyarrow.dataset.dataset(list(self._datasets))
        return whole if self._expression is None else whole.filter(self._expression)

    @property
    def labels(self) -> tuple[str, ...]:
        """Class names in index order; empty where no run states them.

        Raises:
            JobError: the runs have different classes.
        """
        known = [source for source in self.runs if source.labels]
        for source in known[1:]:
            if source.labels != known[0].labels:
                _refuse_labels(known[0], source)
        return known[0].labels if known else ()

    @property
    def columns(self) -> list[str]:
        """Names of columns that filters and tables accept, derived ones last."""
        return self._vocabulary.names

    def __len__(self) -> int:
        return self._num_rows

    def __repr__(self) -> str:
        runs = ", ".join(f"{source.uri!r} ({source.state})" for source in self.runs)
        return f"Corpus({runs}; {' and '.join(map(repr, self.conditions)) or 'no filter'})"

    @functools.cached_property
    def _num_rows(self) -> int:
        with reading_rows(self.runs[0].uri):
            return sum(dataset.count_rows(filter=self._expression) for dataset in self._datasets)

    @functools.cached_property
    def _vocabulary(self) -> Vocabulary:
        return Vocabulary(self._schema, lambda: self._max_subset, lambda: self._agreements)

    @functools.cached_property
    def _agreements(self) -> dict[str, float]:
        """By key the share of people who say the label; of a rescoring as of the run whose images it scored.

        Raises:
            JobError: two runs have the same keys and different answers.
        """
        shares = [self._agreements_of(source) for source in self.runs]
        for number, source in enumerate(self.runs):
            for other, before in zip(self.runs[:number], shares, strict=False):
                if source.name == other.name and shares[number] != before:
                    raise JobError(
                        f"RUN: '{other.uri}' and '{source.uri}' have samples of the same keys and different answers of"
                        " people; open them one at a time to use human_agreement"
                    )
        return {key: share for some in shares for key, share in some.items()}

    @staticmethod
    def _agreements_of(source: RunSource) -> dict[str, float]:
        store = answered_store(source.stores)
        if store is None:
            return {}
        return human_agreement(choices(store, lambda text: warnings.warn(text, RunWarning, stacklevel=2)))

    @functools.cached_property
    def _max_subset(self) -> int:
        """The largest number of classes that a joint prompt has."""
        import pyarrow.compute as pc

        if "kldb_classes" not in self._schema.names:
            return 0
        largest = 0
        length = {"length": pc.list_value_length(pc.field("kldb_classes"))}
        for dataset in self._datasets:
            with reading_rows(self.runs[0].uri):
                for batch in dataset.to_batches(columns=length):
                    largest = max(largest, pc.max(batch.column("length")).as_py() or 0)
        return largest

    # Choosing ------------------------------------------------------------------------------------------------------

    def filter(self, condition: str, option: str = "filter") -> Corpus:
        """The rows for which a condition holds, of those here; see `docs/reading.md` for the language.

        Args:
            option: the option that gave the text, for messages.

        Raises:
            JobError: the condition cannot be parsed, or uses an unknown name.
        """
        return self._narrowed(compile_filter(condition, self._vocabulary, option), (condition,))

    @property
    def samples(self) -> Corpus:
        """The rows that have an image, are accepted, and are not beyond their quota."""
        return self.with_images()

    def with_images(self, *, rejected: bool = False, surplus: bool = False) -> Corpus:
        """The rows that have an image.

        Args:
            rejected: those too that their request's rule did not accept; a run has their images with `store_rejected`.
            surplus: accepted ones beyond their quota, too.
        """
        import pyarrow.compute as pc

        wanted = pc.field("sha256") != ""
        if not rejected:
            wanted = wanted & pc.field("accepted")
        if not surplus:
            wanted = wanted & ~pc.coalesce(pc.field("surplus"), pc.scalar(False))
        chosen = self._narrowed(wanted, ())
        chosen._has_images = True
        return chosen

    def _narrowed(self, expression: Expression, conditions: tuple[str, ...]) -> Corpus:
        chosen = copy.copy(self)
        chosen.__dict__.pop("_num_rows", None)
        chosen._expression = expression if self._expression is None else self._expression & expression
        chosen.conditions = (*self.conditions, *conditions)
        return chosen

    # Reading -------------------------------------------------------------------------------------------------------

    def to_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows in memory, in the order of the runs.

        Args:
            columns: names, derived ones too; default: all columns of the files.

        Raises:
            JobError: there is no such column.
            CorruptShardError: a file of rows is damaged.
        """
        import pyarrow as pa

        return pa.concat_tables([self.run_table(number, columns) for number in range(len(self.runs))])

    def run_table(self, number: int, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of one of the runs, as `to_table`."""
        wanted = None if columns is None else {name: self._column(name) for name in columns}
        with reading_rows(self.runs[number].uri):
            table = self._datasets[number].to_table(columns=wanted, filter=self._expression)
        check_rows(table, self.runs[number].uri, is_foreign=True)
        return table if columns is not None else with_scored(table)

    def _run_batches(self, number: int) -> Iterator[pa.Table]:
        """The rows of one of the runs, some at a time, with all columns."""
        import pyarrow as pa

        uri = self.runs[number].uri
        with reading_rows(uri):
            for batch in self._datasets[number].to_batches(filter=self._expression, batch_size=_ROWS):
                table = pa.Table.from_batches([batch])
                check_rows(table, uri, is_foreign=True)
                yield with_scored(table)

    def numbers(self, expression: str, option: str) -> Callable[[int], Any]:
        """For a run's number the values of an expression of numbers, one a row, as a numpy array.

        Raises:
            JobError: the expression cannot be read.
        """
        compiled = compile_number(expression, self._vocabulary, option)

        def values(number: int) -> Any:
            with reading_rows(self.runs[number].uri):
                table = self._datasets[number].to_table(columns={"value": compiled}, filter=self._expression)
            return table["value"].to_numpy()

        return values

    def has_number(self, expression: str, option: str) -> Corpus:
        """The rows of which an expression of numbers is known, and those that were scored all the same.

        Raises:
            JobError: the expression cannot be read.
        """
        compiled = compile_number(expression, self._vocabulary, option)
        return self._narrowed(compiled.is_valid() | self._vocabulary.is_scored, ())

    def to_webdataset(self, *, decode: str | None = "pil", **options: Any) -> Any:
        """A `webdataset` pipeline over the tars that yields the selected samples alone.

        Args:
            decode: how images are decoded, as for `WebDataset.decode`; None leaves all members as bytes.
            options: for `webdataset.WebDataset`, such as `shardshuffle=100`, `nodesplitter` or `handler`.

        Raises:
            JobError: no sample is selected, or two of the runs have different classes, or the same images, as a run and
                its rescoring do.
        """
        from engine.data.reading.webdataset_samples import RunSelection, make_pipeline

        chosen = self._chosen()
        runs = []
        for number, source in enumerate(chosen.runs):
            keys = frozenset(chosen.run_table(number, ["key"])["key"].to_pylist())
            rows = chosen.run_table(number).to_pylist() if source.is_rescored and keys else None
            runs.append(RunSelection(source.tars, keys, rows))
        return make_pipeline(runs, decode, options)

    def to_torch(
        self,
        transform: Callable[[Any], Any] | None = None,
        labels: Literal["hard", "soft"] = "hard",
        weights: str | None = None,
    ) -> TorchSamples:
        """A map-style torch data set of `(image, label, weight)` with random access into the tars.

        Args:
            transform: from the PIL image; without it an image is a float tensor [3, H, W] in [0, 1].
            labels: `hard` gives the class as an int, `soft` the training target as a float tensor [n].
            weights: a column or an expression of numbers, such as `"1 + 2 * oracle_agrees"`; without it 1.0. Samples
                that were not scored and of which it is therefore not known are left out, with a warning.

        Raises:
            JobError: no sample is selected, the runs have different classes or the same images, or a weight is negative
                or no number.
            CorruptShardError: a tar is missing, torn, or lacks an image of the rows.
        """
        from engine.data.reading.torch_samples import RunSamples, make_samples

        if labels not in ("hard", "soft"):
            raise JobError(f"labels: {labels!r} is not one of hard, soft")
        chosen, weigh = self._chosen(), None
        if weights is not None:
            chosen = chosen._with_weights(weights)
            weigh = chosen.numbers(weights, "weights")
        columns = ["key", "class_index", *(["soft_label"] if labels == "soft" else [])]
        runs = [
            RunSamples(source.tars, chosen.run_table(number, columns), None if weigh is None else weigh(number))
            for number, source in enumerate(chosen.runs)
        ]
        return make_samples(runs, chosen.labels, transform, weights)

    def pairs(self) -> Iterator[Pair]:
        """The selected samples that have a start or an unguided twin, each with these images, one at a time.

        Raises:
            JobError: no selected sample has one.
            CorruptShardError: now or on the way, an image is missing or damaged.
        """
        from engine.data.reading.pairs import PairRows, read_pairs
        from engine.job.columns import PAIR_COLUMNS

        chosen = self if self._has_images else self.samples
        runs = [
            (PairRows(source, chosen.run_table(number, PAIR_COLUMNS)), chosen._run_batches(number))
            for number, source in enumerate(chosen.runs)
        ]
        return read_pairs(runs, len(chosen))

    def _with_weights(self, weights: str) -> Corpus:
        """The samples that have a weight; unscored ones have none where the expression uses a score."""
        weighted = self.has_number(weights, "weights")
        num_unscored = len(self) - len(weighted)
        summary = f"weights {weights!r}: {num_unscored} of {len(self)} samples were not scored, such as real images"
        remedy = "write such as '1 + 3 * (scored and target_errs)' to keep them"
        if not len(weighted):
            raise JobError(f"{summary}; {remedy}")
        if num_unscored:
            warnings.warn(f"{summary}, and are left out; {remedy}", RunWarning, stacklevel=3)
        return weighted

    def _chosen(self) -> Corpus:
        """The samples, of which there is at least one, of classes that are the same in all runs, each image once."""
        chosen = self if self._has_images else self.samples
        _ = self.labels
        users: dict[str, RunSource] = {}
        for source in self.runs:
            for tar in map(str, source.tars):
                if (other := users.setdefault(tar, source)) is not source:
                    raise JobError(f"RUN: '{other.uri}' and '{source.uri}' have the same images; open one of them")
        chosen.check_any()
        return chosen

    def check_any(self) -> None:
        """Check that anything is selected.

        Raises:
            JobError: nothing is; with the number of rows at each step.
        """
        if len(self):
            return
        whole = Corpus(self.runs)
        texts = " and ".join(self.conditions) or "no filter"
        raise JobError(
            f"filter: no sample is selected: of {len(whole)} rows {len(whole.samples)} are accepted samples with an"
            f" image, and none of them passes ({texts}); loosen the filter"
        )

    def _column(self, name: str) -> Expression:
        import pyarrow.compute as pc

        if name in self._schema.names and name != "scored":
            return pc.field(name)
        if name not in self._vocabulary.types:
            raise JobError(f"columns: there is no column '{name}'{nearest(name, self.columns)}")
        return self._vocabulary.expression(name)


def _refuse_labels(first: RunSource, other: RunSource) -> NoReturn:
    sizes = f"{len(first.labels)} and {len(other.labels)}"
    place = next(
        (number for number, pair in enumerate(zip(first.labels, other.labels, strict=False)) if pair[0] != pair[1]),
        min(len(first.labels), len(other.labels)),
    )
    texts = [repr(source.labels[place]) if place < len(source.labels) else "none" for source in (first, other)]
    raise JobError(
        f"RUN: '{first.uri}' and '{other.uri}' have different classes ({sizes}; class"
        f" {place} is {texts[0]} there and {texts[1]} here); open them one at a time"
    )
