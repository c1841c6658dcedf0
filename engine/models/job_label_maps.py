"""Label maps of the models of a job, by their files. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from engine.errors import JobError
from engine.job.label_maps import LabelMap, match_labels
from engine.job.oracles import oracle_fields
from engine.job.spec import ModelsSpec
from engine.models.labels import oracle_labels, read_labels
from engine.models.oracle_kinds import oracle_kind

# In an identity's `models`: by field, which of the target's classes each class of a model is.
LABEL_MAPS = "label_maps"
# A job's `models.label_map`.
Maps = Mapping[str, Mapping[str, str | None]]


def mapped_fields(models: ModelsSpec) -> Iterator[tuple[str, str, Callable[[str], list[str] | None]]]:
    """Field, address and reader of class names of every model that is compared with the target."""
    for number, address in enumerate(models.further_targets, 1):
        yield f"models.target.{number}", address, read_labels
    for number, address in enumerate(models.transfer):
        yield f"models.transfer.{number}", address, read_labels
    for field, address in oracle_fields(models):
        yield field, address, oracle_labels


def label_map_of(
    address: str, theirs: Sequence[str] | None, ours: Sequence[str], maps: Maps, place: str = ""
) -> LabelMap | None:
    """How a model's classes are read as the target's; None where they are the same, or not known yet.

    Args:
        theirs: its class names; None for a CLIP model, which takes any, and for a model that is not on this machine.
        ours: the target's.
        maps: of the job.
        place: as in `match_labels`.

    Raises:
        JobError: as `engine.job.label_maps.match_labels`.
    """
    if theirs is None:
        return None
    return match_labels(theirs, ours, maps.get(address), address, f"models.label_map.{address}", place)


def label_problems(models: ModelsSpec, ours: Sequence[str] | None) -> list[str]:
    """Models whose classes cannot be read as the target's, a line each.

    Args:
        ours: the target's class names; None where it is not on this machine.
    """
    problems: list[str] = []
    for field, address, labels_of in mapped_fields(models):
        try:
            theirs = labels_of(address)
            if takes_any := labels_of is oracle_labels and oracle_kind(address) == "clip":
                problems += _of_any(address, models)
        except JobError as error:
            problems.append(f"{field}: {error}")
            continue
        if ours is None or theirs is None or takes_any:
            continue
        try:
            label_map_of(address, theirs, ours, models.label_map)
        except JobError as error:
            given = address in models.label_map
            problems += [problem if given else f"{field}: {problem}" for problem in error.problems]
    return problems


def _of_any(address: str, models: ModelsSpec) -> list[str]:
    """The problem of a label map of a CLIP model."""
    if address not in models.label_map:
        return []
    return [f"models.label_map.{address}: a CLIP model is asked for the target's own classes; leave it out"]


def job_label_maps(models: ModelsSpec, ours: Sequence[str]) -> dict[str, LabelMap]:
    """By field the label maps of a job's models that have other classes than the target, or another order.

    Raises:
        JobError: as `label_map_of`, or a model's classes cannot be read.
    """
    found = {
        field: label_map_of(address, labels_of(address), ours, models.label_map)
        for field, address, labels_of in mapped_fields(models)
    }
    return {field: label_map for field, label_map in found.items() if label_map is not None}


def label_map_identity(models: ModelsSpec, ours: Sequence[str]) -> dict[str, Any]:
    """The part of a plan's identity that label maps decide; none where all models have the target's classes."""
    maps = job_label_maps(models, ours)
    return {LABEL_MAPS: {field: list(one.places) for field, one in maps.items()}} if maps else {}


def label_map_lines(models: ModelsSpec, ours: Sequence[str]) -> list[str]:
    """What label maps do, in words, a line for each model."""
    addresses = {field: address for field, address, _ in mapped_fields(models)}
    return [
        f"{addresses[field]}: {_described(one, 'label_map' if addresses[field] in models.label_map else 'name')}"
        for field, one in job_label_maps(models, ours).items()
    ]


def _described(label_map: LabelMap, matched_by: str) -> str:
    num_theirs, num_others = len(label_map.places), len(label_map.others)
    if label_map.is_reordering:
        return f"its {num_theirs} classes are matched with the target's by {matched_by}"
    text = f"{num_theirs - num_others} of its {num_theirs} classes are matched with the target's"
    text += f" {label_map.num_classes} by {matched_by}"
    return f"{text}, {num_others} with none" if num_others else text
