"""Files of answers that others send back: read as hostile, all of them checked before the first answer is stored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.data.review.answers import rater_problem
from engine.data.stores.base import Store
from engine.errors import JobError, first_line
from engine.methods.strict_json import parse_json
from engine.models.untrusted_files import read_whole
from engine.studies.review.design import Design, read_design
from engine.studies.review.records import AnswerBook, GivenAnswer, Session

MAX_FILE_BYTES = 64 * 2**20
MAX_ANSWERS = 200_000
# By how much the clock of a rater may be ahead.
MAX_AHEAD_SECONDS = 86_400
_MAX_SHOWN = 40


class ReturnedFile(BaseModel):
    """What the page of a file downloads."""

    model_config = ConfigDict(extra="forbid", strict=True)

    format: Literal["riskforge-review"]
    version: Literal[1]
    design: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    rater: Annotated[str, Field(max_length=100)]
    session: Session
    answers: Annotated[list[GivenAnswer], Field(max_length=MAX_ANSWERS)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Imported:
    """What became of a file.

    Attributes:
        num_answers: in the file, those that were taken back too.
        num_new: of these, stored now; the others were stored before.
        num_answered: items of the design that the rater has answered by now.
        num_items: of the design.
    """

    path: str
    rater: str
    design: str
    num_answers: int
    num_new: int
    num_answered: int
    num_items: int


def import_files(store: Store, paths: Sequence[Path]) -> list[Imported]:
    """Store the answers of some files; those that are stored already are left out.

    Raises:
        JobError: a file is none of ours, is of no design of the run, or has what its design has not; nothing is stored.
        OutputError: a design is damaged, or the store cannot be written to.
    """
    files = [(path, _read(path)) for path in paths]
    books: dict[str, AnswerBook] = {}
    records = []
    for path, returned in files:
        if returned.design not in books:
            books[returned.design] = AnswerBook(store, _design_of(store, path, returned.design), lambda text: None)
        try:
            records.append(books[returned.design].check(returned.rater, returned.session, returned.answers))
        except ValueError as error:
            raise _refused(path, f"{first_line(error)}; take the file as it was downloaded") from None
    imported = []
    for (path, returned), some in zip(files, records, strict=True):
        book = books[returned.design]
        num_new = book.store(returned.rater, some)
        imported.append(
            Imported(
                path=str(path), rater=returned.rater, design=returned.design, num_answers=len(some), num_new=num_new,
                num_answered=len(book.history(returned.rater)), num_items=len(book.design.items),
            )
        )  # fmt: skip
    store.leave()
    return imported


def _refused(path: Path, what: str) -> JobError:
    return JobError(f"--import: {path}: {what}")


def _read(path: Path) -> ReturnedFile:
    try:
        document = parse_json(read_whole(path.expanduser(), MAX_FILE_BYTES), max_depth=4)
        returned = ReturnedFile.model_validate(document)
    except OSError as error:
        raise _refused(path, f"cannot be read ({error.strerror or error}); give a file of answers") from None
    except ValidationError as error:
        what = _problem(error)
        raise _refused(path, f"is no file of answers ({what}); give one as it was downloaded") from None
    except ValueError as error:
        reason = first_line(error)[:200]
        raise _refused(path, f"is no file of answers ({reason}); give one as it was downloaded") from None
    if problem := rater_problem(returned.rater):
        raise _refused(path, f"rater: {problem}")
    _check_times(path, returned.answers)
    return returned


def _problem(error: ValidationError) -> str:
    """Field, value and reason of the first problem; values that are no scalars are not shown."""
    first = error.errors()[0]
    place, value = ".".join(map(str, first["loc"]))[:100], first["input"]
    if not place:
        return "not an object"
    return f"{place}{_shown(value)}: {first['msg'][:100]}"


def _shown(value: Any) -> str:
    if isinstance(value, str):
        return f" = {value if len(value) <= _MAX_SHOWN else value[:_MAX_SHOWN] + '...'!r}"
    return f" = {str(value)[:_MAX_SHOWN]}" if isinstance(value, bool | int | float) else ""


def _check_times(path: Path, answers: Sequence[GivenAnswer]) -> None:
    """Refuse answers of the future, which would count in place of all later ones.

    Raises:
        JobError: one is later than a clock that is a little ahead explains.
    """
    latest = (time.time() + MAX_AHEAD_SECONDS) * 1000
    for place, one in enumerate(answers):
        if one.at > latest:
            at = datetime.fromtimestamp(one.at / 1000, UTC).isoformat(timespec="seconds")
            raise _refused(
                path, f"answers.{place}.at = {one.at} is {at}, in the future; set the clock of this machine right, or"
                " correct the times in the file where the rater's clock was wrong",
            )  # fmt: skip


def _design_of(store: Store, path: Path, digest: str) -> Design:
    try:
        return read_design(store, digest)
    except JobError:
        raise _refused(
            path, f"is of the design {digest}, which is none of {store.uri}; give the run that its page was made of"
        ) from None
