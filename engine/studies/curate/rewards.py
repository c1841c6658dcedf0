"""Rewards that are given, not learned: a column of the records, or a function in the user's own code."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.data.run.curated import RewardRecord
from engine.driver.progress import Display
from engine.errors import MAX_REASON_CHARS, JobError
from engine.job.columns import COLUMNS
from engine.job.json_values import digest_of
from engine.job.spec_messages import nearest
from engine.models.custom_methods import method_digest
from engine.models.factories import find_factory, is_factory, reason_of
from engine.studies.curate.candidates import Candidates

if TYPE_CHECKING:
    import PIL.Image

CLASS_INDEX = "class-index"
# Numbers of the records that order samples by no property of theirs, or are equal for all candidates.
_NOT_PROPERTIES = (
    "schema_version", "seed", "index", "batch_size", "duration_seconds", "attempt", "scored", "accepted", "surplus",
)  # fmt: skip
# Images that a function is given at a time.
BATCH = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardSource:
    """A reward that is given.

    Attributes:
        record: its description.
        rewards: of candidates, [N].
    """

    record: RewardRecord
    rewards: Callable[[Candidates], Sequence[float]]


def reward_names() -> list[str]:
    """The rewards that have a name: minus the class index, and the numeric columns of the records."""
    columns = (
        column.name
        for column in COLUMNS
        if column.type in ("float", "int", "bool") and not column.is_class and column.name not in _NOT_PROPERTIES
    )
    return [CLASS_INDEX, *columns]


def find_reward(name: str, display: Display) -> RewardSource:
    """The reward that `--reward` names.

    Raises:
        JobError: there is none of this name, or the user's module cannot be imported.

    Side effects: imports the module of a function.
    """
    if is_factory(name):
        try:
            function, digest = find_factory(name), method_digest(name)
        except JobError as error:
            raise JobError([f"--reward: {problem}" for problem in error.problems]) from None
        return RewardSource(
            record=RewardRecord(name=name, kind="function", digest=digest),
            rewards=lambda candidates: function_rewards(name, function, candidates, display),
        )
    names = reward_names()
    if name not in names:
        raise JobError(
            f"--reward: there is no reward '{name}'{nearest(name, names)}; give one of {', '.join(names)}, or a"
            " function as package.module:function"
        )
    return RewardSource(
        record=RewardRecord(name=name, kind="column", digest=digest_of({"column": name})),
        rewards=lambda candidates: column_rewards(name, candidates),
    )


def column_rewards(name: str, candidates: Candidates) -> list[float]:
    """A numeric column of the candidates; minus the class index for `class-index`.

    Raises:
        JobError: the run has no such column, or a sample no finite value in it.
    """
    if name == CLASS_INDEX:
        return [-float(index) for index in candidates.class_indices]
    if name not in candidates.column_names:
        raise JobError(f"--reward: the records of the run have no column '{name}'; `riskforge rescore` adds scores")
    values = candidates.column(name)
    for key, value in zip(candidates.keys, values, strict=True):
        if value is None or not math.isfinite(value):
            raise JobError(
                f"--reward: sample '{key}' has the {name} {value}, which is no finite number; choose another reward"
            )
    return [float(value) for value in values]


def function_rewards(
    address: str, function: Callable[..., Any], candidates: Candidates, display: Display
) -> list[float]:
    """The rewards that a user's function gives, called as `function(images, records)` for some samples at a time.

    Raises:
        JobError: it raises, or gives something else than a finite number for each image.
        CorruptShardError: an image cannot be read.
    """
    rewards: list[float] = []
    records = candidates.records
    for keys, images in _batches(candidates.images()):
        display.advance(f"computing rewards: {len(rewards)}/{len(candidates)}")
        part = [dict(record) for record in records[len(rewards) : len(rewards) + len(keys)]]
        try:
            given = function(images, part)
        except (Exception, SystemExit) as error:
            raise JobError(
                f"--reward: '{address}' failed on {len(keys)} samples from '{keys[0]}' on: {reason_of(error)}; it is"
                " called as function(images, records) with two lists"
            ) from error
        rewards += _numbers(address, given, keys)
    return rewards


def _batches(images: Iterator[tuple[str, PIL.Image.Image]]) -> Iterator[tuple[list[str], list[PIL.Image.Image]]]:
    batch: list[tuple[str, PIL.Image.Image]] = []
    for pair in images:
        batch.append(pair)
        if len(batch) == BATCH:
            yield [key for key, _ in batch], [image for _, image in batch]
            batch = []
    if batch:
        yield [key for key, _ in batch], [image for _, image in batch]


def _numbers(address: str, given: Any, keys: Sequence[str]) -> list[float]:
    """What a function gave, as a finite number for each key: a list, an array or a tensor [n].

    Raises:
        JobError: it is something else.
    """
    wanted = f"return a finite number for each of the {len(keys)} images"
    values = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(values, str | bytes | dict) or not isinstance(values, Sequence):
        raise JobError(f"--reward: '{address}' returned {_kind(given)}; {wanted}")
    # As a plain list: a user's own class may state another length than it has.
    values = list(values)
    if len(values) != len(keys):
        raise JobError(f"--reward: '{address}' returned {len(values)} values; {wanted}")
    return [_number(address, value, key, wanted) for key, value in zip(keys, values, strict=True)]


def _number(address: str, value: Any, key: str, wanted: str) -> float:
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not math.isfinite(number):
        shown = repr(value) if isinstance(value, str | bytes | float | int | None) else _kind(value)
        raise JobError(f"--reward: '{address}' returned {shown[:MAX_REASON_CHARS]} for sample '{key}'; {wanted}")
    return number


def _kind(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"a {type(value).__name__}" + (f" of shape {list(shape)}" if isinstance(shape, tuple) and shape else "")
