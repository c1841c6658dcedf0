"""What all oracles say of a sample: on its tile, in the gallery's filters, and beside the image of a pair."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.data.run.outcomes import asked_classes
from engine.job.acceptance import label_is_valid
from engine.job.columns import GUIDES, NO_CLASS, UNKNOWN
from engine.report.data import name_of
from engine.report.text import clip, number

DISAGREE = "oracles disagree"
MAX_NAME_CHARS = 60


@dataclass(frozen=True, slots=True)
class Answer:
    """The class that an oracle predicts.

    Attributes:
        oracle: the last part of its address; empty where the record does not name it.
        guides: whether it is a floor of guidance, so that it is no independent evidence.
        is_asked: whether that class was asked for.
    """

    oracle: str
    guides: bool
    class_index: int
    is_asked: bool


def answers(record: Mapping[str, Any]) -> list[Answer]:
    """The answers of all oracles; of a record of an earlier schema version that of the only one that it has."""
    asked = asked_classes(record)
    entries = record.get("oracles") or []
    if not entries and record["oracle_class"] != NO_CLASS:
        entries = [{"model": "", "predicted_class": record["oracle_class"]}]
    return [_answer(str(entry["model"]), entry["predicted_class"], asked) for entry in entries]


def _answer(model: str, index: int, asked: tuple[int, ...]) -> Answer:
    plain = model.removesuffix(GUIDES).rstrip("/")
    return Answer(plain.rsplit("/", 1)[-1], model.endswith(GUIDES), index, index in asked)


def independent(record: Mapping[str, Any]) -> list[Answer]:
    """The answers of the oracles that guided nothing."""
    return [answer for answer in answers(record) if not answer.guides]


def validity(record: Mapping[str, Any]) -> bool | None:
    """Whether the label is valid by the name `label_is_valid`; None where that is unknown."""
    return label_is_valid(record.get("p_valid", UNKNOWN), record.get("oracle_p_label_min", UNKNOWN))


def common_answer(record: Mapping[str, Any], names: dict[int, str]) -> str:
    """The class that all independent oracles predict, or that they disagree; empty without one."""
    classes = {answer.class_index for answer in independent(record)}
    if len(classes) > 1:
        return DISAGREE
    return "".join(clip(name_of(index, names), MAX_NAME_CHARS) for index in classes)


def summary(record: Mapping[str, Any], names: dict[int, str]) -> tuple[str, bool]:
    """A line about all independent oracles, and whether every one predicts a class that was asked for."""
    own = independent(record)
    if not own:
        return "", False
    counts = Counter(answer.class_index for answer in own)
    texts = {index: clip(name_of(index, names), MAX_NAME_CHARS) for index in counts}
    if len(counts) == 1:
        who = "oracle" if len(own) == 1 else "both oracles" if len(own) == 2 else f"all {len(own)} oracles"
        said = "".join(texts.values())
    else:
        who, said = "oracles", ", ".join(f"{count} {texts[index]}" for index, count in counts.most_common())
    return f"{who}: {said}", all(answer.is_asked for answer in own)


def validity_text(record: Mapping[str, Any]) -> tuple[str, bool]:
    """A line about the label, and whether it is strictly valid; empty where that is unknown."""
    is_valid = validity(record)
    if is_valid is None:
        return "", False
    estimate = record.get("p_valid", UNKNOWN)
    value = record["oracle_p_label_min"] if estimate == UNKNOWN else estimate
    return f"{'' if is_valid else 'not '}strictly valid (p\N{NO-BREAK SPACE}{number(value)})", is_valid
