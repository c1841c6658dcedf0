"""Answers of people, `_review/RATER/SESSION-000001.parquet`: parts, of which each is published once and never changed.

A record is one answer to one item of a design (`engine.studies.review.design`). Whoever answers again adds a record,
and the later one counts.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from engine.data.stores.base import Store
from engine.errors import JobError, OutputError, StoreLostError, first_line
from engine.models.untrusted_files import MAX_DOCUMENT_BYTES

if TYPE_CHECKING:
    import pyarrow as pa

VERSION = 1
REVIEW = "_review"
# The folder of the designs is next to those of the raters.
DESIGNS = "_review/designs"
_RESERVED = "designs"
# As a job's name (`engine.job.spec.NAME_PATTERN`), whose module takes long to import.
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
MAX_RATER_CHARS = 64
RECORDS_PER_PART = 5000
MAX_ROWS = 10**6
_PART = re.compile(r"(?P<session>[a-z0-9-]{1,64})-(?P<number>\d{6})\.parquet")

Kind = Literal["sample", "control-real", "control-plain", "repeat"]
Mode = Literal["choice", "pair"]
SAMPLE: Kind = "sample"
CONTROL_REAL: Kind = "control-real"
CONTROL_PLAIN: Kind = "control-plain"
REPEAT: Kind = "repeat"
KINDS = (SAMPLE, CONTROL_REAL, CONTROL_PLAIN, REPEAT)
CHOICE: Mode = "choice"
PAIR: Mode = "pair"
MODES = (CHOICE, PAIR)


class Answer(TypedDict):
    """An answer record.

    Attributes:
        version: `VERSION`.
        rater: who answered; a name as that of a job.
        session: of the browser and the program; the parts of a session are numbered.
        item: id of the item in the design.
        key: of the sample; of a control the name of its image; of a repeat that of the item it repeats.
        mode: a choice between the classes, or between two images.
        answer: class name; empty for "none of these" and "cannot tell".
        answer_class: its index in the target's labels, -1 for none; of a pair 0 where `key` is the better one, 1 where
            `other_key` is, -1 for equal.
        other_key: second image of a pair, empty otherwise.
        question_class: of a pair, the class that was asked for; -1 otherwise.
        label: class index of the item as stored, which raters do not see; -1 where it is unknown.
        subset: classes that count as the label.
        stratum: of the design.
        weight: items of the stratum for each one that was drawn; 1 of what stands for nothing else.
        retracted: whether the record takes back the answer before it.
        seconds: from the moment the image was shown.
        answered_at: UTC, ISO 8601.
        design: digest of the design.
    """

    version: int
    rater: str
    session: str
    item: str
    key: str
    kind: str
    mode: str
    answer: str
    answer_class: int
    other_key: str
    question_class: int
    label: int
    subset: list[int]
    stratum: str
    weight: float
    retracted: bool
    seconds: float
    answered_at: str
    design: str


def answer_schema() -> pa.Schema:
    """The columns of a part; none is nullable."""
    import pyarrow as pa

    kinds: dict[Any, pa.DataType] = {
        "int": pa.int64(),
        "float": pa.float64(),
        "bool": pa.bool_(),
        "str": pa.string(),
        "list[int]": pa.list_(pa.field("element", pa.int64(), nullable=False)),
    }
    # Annotations are texts here.
    return pa.schema(
        [pa.field(name, kinds[kind.__forward_arg__], nullable=False) for name, kind in Answer.__annotations__.items()]
    )


def check_rater(name: str, option: str = "--rater") -> str:
    """The name of a rater, if it can be one.

    Raises:
        JobError: with the reason and the remedy.
    """
    if problem := rater_problem(name):
        raise JobError(f"{option}: {problem}")
    return name


def rater_problem(name: str) -> str:
    """Why a name cannot be a rater's, and the remedy; empty where it can."""
    if name == _RESERVED:
        return f"'{name}' is the folder of the designs; choose another name"
    if not _NAME.fullmatch(name) or len(name) > MAX_RATER_CHARS:
        shown = name if len(name) <= 60 else name[:57] + "..."
        limits = f"of a-z, 0-9 and hyphens with at most {MAX_RATER_CHARS} characters"
        return f"{shown!r} is not {limits}, such as ann or rater-2"
    return ""


def append_answers(store: Store, rater: str, records: Sequence[Answer]) -> list[str]:
    """Store answers durably as new parts of their session, of which each is visible whole or not at all.

    Args:
        records: of this rater and of one session, in the order in which they were given.

    Returns:
        The names of the parts.

    Raises:
        JobError: the name of the rater cannot be one.
        OutputError: the store cannot be written to.
    """
    check_rater(rater)
    if not records:
        return []
    session = records[0]["session"]
    if {(record["rater"], record["session"]) for record in records} != {(rater, session)}:
        raise ValueError("records of several raters or sessions")
    folder = f"{REVIEW}/{rater}"
    number = 1 + max((found for other, found in _parts(store, folder) if other == session), default=0)
    names: list[str] = []
    for start in range(0, len(records), RECORDS_PER_PART):
        data = _part_bytes(records[start : start + RECORDS_PER_PART])
        # Another process of the session may have taken the number.
        while not store.publish(name := f"{folder}/{session}-{number:06d}.parquet", data):
            number += 1
        names.append(name)
        number += 1
    return names


def _parts(store: Store, folder: str) -> Iterator[tuple[str, int]]:
    """Session and number of every part in a rater's folder."""
    for name in store.list(folder):
        if match := _PART.fullmatch(name.rpartition("/")[2]):
            yield match["session"], int(match["number"])


def _part_bytes(records: Sequence[Answer]) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    buffer = io.BytesIO()
    table = pa.Table.from_pylist(list(records), schema=answer_schema())
    # Most parts hold one record, so that what describes columns is most of their bytes.
    pq.write_table(table, buffer, compression="zstd", write_statistics=False, store_schema=False, use_dictionary=False)
    return buffer.getvalue()


def has_answers(store: Store) -> bool:
    """Whether anybody has answered; one listing of the folder and one for each rater, and nothing is read."""
    return any(True for folder in _rater_folders(store) for _ in _parts(store, folder))


def _rater_folders(store: Store) -> list[str]:
    return [name for name in store.list(REVIEW) if not rater_problem(name.rpartition("/")[2])]


def read_answers(store: Store, notice: Callable[[str], None] = lambda text: None) -> pa.Table:
    """All answers of all raters, by rater in the order in which they were given; `answer_schema`.

    Args:
        notice: receives a line for each file that is left out since it is damaged, or is none of ours.

    Raises:
        OutputError: the store cannot be read.
    """
    return read_parts(store, part_names(store, notice), notice)


def read_parts(store: Store, names: Iterable[str], notice: Callable[[str], None] = lambda text: None) -> pa.Table:
    """As `read_answers`, of some parts alone."""
    import pyarrow as pa

    schema = answer_schema()
    tables: list[pa.Table] = []
    for name, data in store.read_each(names, MAX_DOCUMENT_BYTES):
        if isinstance(data, StoreLostError):
            raise data
        try:
            if isinstance(data, OutputError):
                raise ValueError(f"cannot be read ({first_line(data)})")
            tables.append(parse_records(data, rater=name.split("/")[-2]))
        except ValueError as error:
            notice(f"{store.address(name)}: {error}; its answers are left out")
    table = pa.concat_tables([schema.empty_table(), *tables])
    # The sort is stable, and parts are read by session and number.
    return table.sort_by([("rater", "ascending"), ("answered_at", "ascending")])


def part_names(store: Store, notice: Callable[[str], None] = lambda text: None) -> Iterator[str]:
    """Names of the files that are parts by their names; a notice about each other one."""
    folders = _rater_folders(store)
    for name in store.list(REVIEW):
        if name != DESIGNS and name not in folders:
            notice(f"{store.address(name)}: is neither the folder of a rater nor of the designs; it is left out")
    for folder in folders:
        for name in store.list(folder):
            if _PART.fullmatch(name.rpartition("/")[2]):
                yield name
            else:
                notice(f"{store.address(name)}: is no file of answers by its name; it is left out")


def parse_records(data: bytes, rater: str | None = None) -> pa.Table:
    """The records of a part, or of a file with those of several raters; `answer_schema`.

    Args:
        rater: whose they have to be.

    Raises:
        ValueError: they are damaged, or not such as are written here.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    schema = answer_schema()
    try:
        with pq.ParquetFile(io.BytesIO(data)) as file:
            if file.metadata.num_rows > MAX_ROWS:
                raise ValueError(f"has {file.metadata.num_rows:,} rows, more than the {MAX_ROWS:,} that are read")
            if missing := [field.name for field in schema if field.name not in file.schema_arrow.names]:
                raise ValueError(f"is no file of answers: it lacks {', '.join(missing)}")
            table = file.read(columns=schema.names).select(schema.names).cast(schema)
        table.validate(full=True)
    except (pa.ArrowException, OSError, OverflowError) as error:
        raise ValueError(f"is damaged ({first_line(error)})") from None
    if any(column.null_count for column in [*table.columns, pc.list_flatten(table["subset"])]):
        raise ValueError("lacks values")
    if not pc.all(pc.is_finite(pa.chunked_array([*table["weight"].chunks, *table["seconds"].chunks], pa.float64()))):
        raise ValueError("has numbers that are not finite")
    wanted: dict[str, Collection[Any]] = {"version": {VERSION}, "kind": KINDS, "mode": MODES}
    if rater is not None:
        wanted["rater"] = {rater}
    for column, known in wanted.items():
        if others := sorted(set(table[column].unique().to_pylist()) - set(known)):
            raise ValueError(f"has the {column} {others[0]!r}, which is not of {', '.join(map(str, known))}")
    return table


def last_answers(table: pa.Table) -> pa.Table:
    """The answers that count: of each rater and item the last record, unless it was retracted.

    Args:
        table: as `read_answers` returns it.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    place = pa.array(range(len(table)), pa.int64())
    groups = table.select(["rater", "design", "item"]).append_column("place", place)
    last = groups.group_by(["rater", "design", "item"]).aggregate([("place", "max")])["place_max"]
    chosen = table.take(last.take(pc.array_sort_indices(last.combine_chunks())))
    return chosen.filter(pc.invert(chosen["retracted"]))
