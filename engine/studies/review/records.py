"""From what a browser says to answer records, and the answers that a rater has given so far."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from engine.data.review.answers import (
    PAIR,
    VERSION,
    Answer,
    append_answers,
    last_answers,
    part_names,
    read_parts,
)
from engine.data.stores.base import Store
from engine.studies.review.design import Design, Id, Item

MAX_SECONDS = 86_400.0
# The year 2100, in milliseconds.
MAX_TIME = 4_102_444_800_000
MAX_BATCH = 500

Session = Annotated[str, Field(pattern=r"^[a-z0-9]{8,32}$")]


class GivenAnswer(BaseModel):
    """An answer as a browser has it.

    Attributes:
        choice: class index, or of a pair 0 or 1 for the better image; -1 for none.
        at: milliseconds since 1970.
        seconds: since the image was shown.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    item: Id
    choice: Annotated[int, Field(ge=-1, lt=10**6)]
    at: Annotated[int, Field(ge=0, le=MAX_TIME)]
    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    retracted: bool = False


def answer_record(design: Design, digest: str, item: Item, rater: str, session: str, given: GivenAnswer) -> Answer:
    """An answer with what the design has of its item.

    Raises:
        ValueError: it chooses what the item has not.
    """
    is_pair = design.mode == PAIR
    if given.choice >= (2 if is_pair else len(design.labels)):
        raise ValueError(f"item {item.id}: {given.choice} is no answer to it")
    at = datetime.fromtimestamp(given.at / 1000, UTC)
    return Answer(
        version=VERSION,
        rater=rater,
        session=session,
        item=item.id,
        key=item.key,
        kind=item.kind,
        mode=design.mode,
        answer="" if is_pair or given.choice < 0 else design.labels[given.choice],
        answer_class=given.choice,
        other_key=item.other_key,
        question_class=item.question_class,
        label=item.label,
        subset=list(item.subset),
        stratum=item.stratum,
        weight=item.weight,
        retracted=given.retracted,
        seconds=min(given.seconds, MAX_SECONDS),
        answered_at=at.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        design=digest,
    )


class AnswerBook:
    """The stored answers to a design, for several threads; others may add to them meanwhile.

    Args:
        notice: receives a line for each file of answers that is left out.
        clock: seconds since 1970.
    """

    def __init__(
        self, store: Store, design: Design, notice: Callable[[str], None], clock: Callable[[], float] = time.time
    ) -> None:
        self.design, self.digest = design, design.digest
        self._store, self._notice, self._clock = store, notice, clock
        self._items = design.by_id
        self._known: set[str] = set()
        self._noticed: set[str] = set()
        self._lock = threading.Lock()
        self._table = read_parts(store, [])
        self.refresh()

    def refresh(self) -> None:
        """Read what was stored since."""
        import pyarrow as pa

        with self._lock:
            names = [name for name in part_names(self._store, self._notice_once) if name not in self._known]
            table = pa.concat_tables([self._table, read_parts(self._store, names, self._notice_once)])
            self._known.update(names)
            self._table = table.sort_by([("rater", "ascending"), ("answered_at", "ascending")])

    def _notice_once(self, text: str) -> None:
        if text not in self._noticed:
            self._noticed.add(text)
            self._notice(text)

    def history(self, rater: str) -> list[tuple[str, int]]:
        """Items and choices of a rater's answers that count, in the order in which they were given."""
        import pyarrow.compute as pc

        mine = self._table.filter((pc.field("rater") == rater) & (pc.field("design") == self.digest))
        last = last_answers(mine)
        return list(zip(last["item"].to_pylist(), last["answer_class"].to_pylist(), strict=True))

    def num_answered(self) -> dict[str, int]:
        """How many items of the design each rater has answered."""
        raters = sorted(self._table["rater"].unique().to_pylist())
        counts = {rater: len(self.history(rater)) for rater in raters}
        return {rater: count for rater, count in counts.items() if count}

    def check(self, rater: str, session: str, given: Iterable[GivenAnswer]) -> list[Answer]:
        """Answers as records.

        Raises:
            ValueError: one is to an item that the design has not, or chooses what the item has not.
        """
        records = []
        for one in given:
            if (item := self._items.get(one.item)) is None:
                raise ValueError(f"item {one.item} is none of this design")
            records.append(answer_record(self.design, self.digest, item, rater, session, one))
        return records

    def add(self, rater: str, session: str, given: Sequence[GivenAnswer]) -> int:
        """Store answers durably; those that are stored already are left out.

        Returns:
            How many were new.

        Raises:
            JobError: the name of the rater cannot be one.
            ValueError: as `check`.
            OutputError: the store cannot be written to.
        """
        # A clock that is ahead must not win over all later answers.
        now = int(self._clock() * 1000)
        return self.store(rater, self.check(rater, session, [
            one if one.at <= now else one.model_copy(update={"at": now}) for one in given
        ]))  # fmt: skip

    def store(self, rater: str, records: Sequence[Answer]) -> int:
        """Store records of one rater and session that are not stored yet; how many they are."""
        import pyarrow as pa
        import pyarrow.compute as pc

        with self._lock:
            columns = ["item", "answered_at", "answer_class", "retracted"]
            mine = self._table.filter((pc.field("rater") == rater) & (pc.field("design") == self.digest))
            seen = set(zip(*(mine[name].to_pylist() for name in columns), strict=True))
            fresh: list[Answer] = []
            for record in records:
                identity = (record["item"], record["answered_at"], record["answer_class"], record["retracted"])
                if identity not in seen:
                    seen.add(identity)
                    fresh.append(record)
            self._known.update(append_answers(self._store, rater, fresh))
            added = pa.Table.from_pylist(list(fresh), schema=self._table.schema)
            self._table = pa.concat_tables([self._table, added]).sort_by(
                [("rater", "ascending"), ("answered_at", "ascending")]
            )
            return len(fresh)
