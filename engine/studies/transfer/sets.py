"""Real labelled image sets under the same classifiers: accuracy by data set, over the classes that all of them have."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.images import LabelledImage, Unusable, nothing_usable, open_images, some_of
from engine.driver.progress import Display
from engine.errors import JobError, first_line
from engine.job.spec import JobSpec
from engine.models.digests import model_digest
from engine.models.labels import target_labels
from engine.studies.experiments.program import StudyContext
from engine.studies.transfer.rows import Design
from engine.studies.transfer.spec import TransferSpec

BATCH = 64
RIGHT, WRONG = "1", "0"
_MAX_NAMED = 8


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SetScores:
    """A set of N images, of the classes that all sets have, under K classifiers.

    Attributes:
        classes: their names.
        right: whether the likeliest of all classes of a classifier is the label, [N, K].
        right_among: the same among `classes` alone.
        notes: which images of the set are not among the N, and why.
    """

    name: str
    classes: tuple[str, ...]
    right: NDArray[np.bool_]
    right_among: NDArray[np.bool_]
    notes: tuple[str, ...]


def score_sets(spec: TransferSpec, job: JobSpec, design: Design, context: StudyContext) -> list[SetScores]:
    """All sets of a study, each classified once and kept.

    Args:
        job: of a row, whose target has the classes.

    Raises:
        JobError: a set has no usable image, the sets have no class in common, or a classifier cannot score them.
    """
    if not spec.sets:
        return []
    labels = target_labels(job)
    counted = {
        name: context.once(
            f"sets/{name}-classes",
            {"files": _fingerprint(address), "labels": labels},
            partial(_count_classes, name, address, labels, context.display),
        )
        for name, address in spec.sets.items()
    }
    shared = [label for label in labels if all(label in one["classes"] for one in counted.values())]
    if not shared:
        found = "; ".join(f"{name}: {', '.join(one['classes'])}" for name, one in counted.items())
        raise JobError(f"sets: have no class of the targets in common ({found}); leave one out, or give other images")
    inputs = {
        "labels": labels,
        "classes": shared,
        "models": {name: model_digest(address) for name, address in design.classifiers.items()},
        "label_map": {address: dict(entries) for address, entries in design.label_map.items()},
    }
    classifiers = _Classifiers(job, design, labels, context.display)
    found_scores = []
    for name, address in spec.sets.items():
        scored = context.once(
            f"sets/{name}",
            inputs | {"files": _fingerprint(address)},
            partial(_score, name, address, labels, shared, classifiers),
        )
        found_scores.append(_scores(name, counted[name], scored, shared, design))
    return found_scores


def in_words(classes: Sequence[str]) -> str:
    """Names of classes; of many the first ones and their number."""
    if len(classes) <= _MAX_NAMED:
        return ", ".join(classes)
    return f"{len(classes)} classes ({', '.join(classes[:3])}, ...)"


def _scores(
    name: str, counted: dict[str, Any], scored: dict[str, Any], shared: Sequence[str], design: Design
) -> SetScores:
    """The scores of a set by its kept steps."""
    notes = [*counted["notes"], *scored["notes"]]
    if left_out := [label for label in counted["classes"] if label not in shared]:
        num = sum(counted["classes"][label] for label in left_out)
        notes.append(f"{name}: {num} images of classes that not all sets have are left out: {', '.join(left_out)}")
    return SetScores(
        name=name,
        classes=tuple(shared),
        right=_flags(scored["right"], design),
        right_among=_flags(scored["right_among"], design),
        notes=tuple(notes),
    )


def _fingerprint(address: str) -> list[Any]:
    """What shows that the files of a set have changed: their names, sizes and times; the name of a named set."""
    path = Path(address).expanduser()
    if path.is_file():
        paths = [path]
    elif path.is_dir():
        paths = sorted(Path(folder) / name for folder, _, names in os.walk(path) for name in names)
    else:
        return [address]
    states = ((str(one.relative_to(path)), one.stat()) for one in paths)
    return [[name, state.st_size, state.st_mtime_ns] for name, state in states]


def _read(name: str, address: str, labels: Sequence[str]) -> tuple[Any, Iterator[LabelledImage | Unusable]]:
    source = open_images(address, tuple(labels), f"sets.{name}")
    return source, source.read()


def _count_classes(name: str, address: str, labels: Sequence[str], display: Display) -> dict[str, Any]:
    """How many images of a set have each class, and what cannot be used of it."""
    source, items = _read(name, address, labels)
    counts, unusable = Counter[str](), list[Unusable]()
    for item in items:
        if isinstance(item, Unusable):
            unusable.append(item)
        else:
            counts[labels[item.class_index]] += 1
            display.advance(f"reading {name}: {counts.total()} images")
    if not counts:
        raise JobError(nothing_usable(source, f"sets.{name}", address, unusable))
    notes = [f"{name}: {len(unusable)} images are left out: {some_of(unusable)}"] if unusable else []
    return {"classes": dict(counts), "notes": notes}


class _Classifiers:
    """The classifiers of a study, loaded when the first image is scored."""

    def __init__(self, job: JobSpec, design: Design, labels: Sequence[str], display: Display) -> None:
        self._job, self._design, self._labels, self.display = job, design, labels, display
        self._loaded: list[Any] = []

    def score(self, images: Sequence[Any]) -> list[Any]:
        """Logits [B, n + k] of each classifier, in its order."""
        if not self._loaded:
            import torch

            from engine.models.library_logging import quiet_libraries
            from engine.models.relabelled import load_classifier_for

            quiet_libraries()
            device = "cuda" if torch.cuda.is_available() and self._job.runtime.device != "cpu" else "cpu"
            maps = self._design.label_map
            self._loaded = [
                load_classifier_for(address, device, self._labels, maps)
                for address in self._design.classifiers.values()
            ]
        return [model.score(images) for model in self._loaded]

    @property
    def names(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(self._design.classifiers)


def _score(
    name: str, address: str, labels: Sequence[str], shared: Sequence[str], classifiers: _Classifiers
) -> dict[str, Any]:
    """By classifier a text with a sign for each image: whether it is right among all classes, and among the shared."""
    places = [place for place, label in enumerate(labels) if label in shared]
    right, right_among = (dict.fromkeys(classifiers.names, "") for _ in range(2))
    num_faults = done = 0
    for batch in _batches(name, address, labels, places):
        scored, usable = _predictions(name, batch, places, len(labels), classifiers)
        num_faults += int((~usable).sum())
        wanted = np.array([item.class_index for item in batch])[usable]
        for one, (among_all, among_shared) in zip(classifiers.names, scored, strict=True):
            right[one] += _signs(among_all[usable] == wanted)
            right_among[one] += _signs(among_shared[usable] == wanted)
        done += len(batch)
        classifiers.display.advance(f"classifying {name}: {done} images")
    notes = [f"{name}: {num_faults} images are left out, as a classifier gives values that are not finite"]
    if done == num_faults:
        raise JobError(f"sets.{name}: no classifier gives finite values for any image of '{address}'")
    return {"right": right, "right_among": right_among, "notes": notes if num_faults else []}


def _batches(name: str, address: str, labels: Sequence[str], places: Sequence[int]) -> Iterator[list[LabelledImage]]:
    """Images of the shared classes; those of one batch have one size."""
    waiting: dict[tuple[int, int], list[LabelledImage]] = {}
    for item in _read(name, address, labels)[1]:
        if isinstance(item, LabelledImage) and item.class_index in places:
            batch = waiting.setdefault(item.image.size, [])
            batch.append(item)
            if len(batch) == BATCH:
                yield waiting.pop(item.image.size)
    yield from waiting.values()


def _predictions(
    name: str, batch: Sequence[LabelledImage], places: Sequence[int], num_classes: int, classifiers: _Classifiers
) -> tuple[list[tuple[NDArray[np.int64], NDArray[np.int64]]], NDArray[np.bool_]]:
    """Of each classifier the classes [B] among all and among the shared ones, and which images all of them can score.

    Raises:
        JobError: images do not go through a classifier.
    """
    import torch

    from engine.methods.finiteness import usable_logits
    from engine.models.relabelled import predicted_classes

    try:
        of_models = classifiers.score([item.image for item in batch])
    except (ValueError, RuntimeError) as error:
        width, height = batch[0].image.size
        raise JobError(
            f"sets.{name}: a classifier cannot score its images of {width} x {height} pixels ({first_line(error)});"
            " give images of the size that the classifiers were trained on"
        ) from None
    usable = torch.stack([usable_logits(logits) for logits in of_models]).all(0).numpy()
    chosen = torch.tensor(places)
    pairs = [
        (predicted_classes(logits, num_classes).numpy(), chosen[logits[:, places].argmax(1)].numpy())
        for logits in of_models
    ]
    return pairs, usable


def _signs(right: NDArray[np.bool_]) -> str:
    return "".join(RIGHT if one else WRONG for one in right.tolist())


def _flags(texts: dict[str, str], design: Design) -> NDArray[np.bool_]:
    """[N, K] booleans by the texts of each classifier."""
    return np.array([[sign == RIGHT for sign in texts[name]] for name in design.classifiers], dtype=bool).T
