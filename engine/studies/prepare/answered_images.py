"""Answers of people about labelled images, with what the job's oracles and its target say of them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from engine.data.images import ImageSource, LabelledImage, Unusable, image_key, nothing_usable, open_images
from engine.driver.progress import Display
from engine.errors import JobError
from engine.generation.oracle_scoring import oracle_scores
from engine.generation.plain_values import plain
from engine.job.spec import JobSpec
from engine.job.spec_messages import nearest
from engine.methods.finiteness import Faults
from engine.models.classifier import Classifier
from engine.models.digests import model_digest, oracle_digest
from engine.models.hardware import choose_hardware, fix_threads
from engine.models.library_logging import quiet_libraries
from engine.models.oracles import Oracle
from engine.models.relabelled import load_oracle_for
from engine.models.validity import ModelIdentity
from engine.studies.prepare.answer_tables import MAX_PROBLEMS, OPTION, AnswerTable, shown
from engine.studies.prepare.answered import AnsweredImage, AnsweredImages
from engine.studies.prepare.observation import batch_size, progress_text


def answers_of_images(
    job: JobSpec, data: str, table: AnswerTable, path: Path, labels: tuple[str, ...], display: Display
) -> AnsweredImages:
    """The images that a table has answers for; their labels are those of the data.

    Args:
        data: a path or a named set, as in `engine.data.images.open_images`.
        path: of the table, for messages.
        labels: class names of the target.

    Raises:
        JobError: a key is no image of the data, or the name of two; no image can be used; a model cannot be loaded.
    """
    source = open_images(data, labels)
    oracles = tuple(ModelIdentity(address, oracle_digest(address)) for address in job.independent_oracles)
    target = ModelIdentity(job.models.target, model_digest(job.models.target))
    display.phase("loading models")
    judges = _Judges(job, labels)
    unused, seen = list[Unusable](), dict[str, int]()
    chosen = _chosen(source, table, seen, unused, display)
    images = [image for batch in _batches(chosen, judges.num_rows) for image in judges.judge(batch, unused)]
    _check_keys(table, path, data, seen)
    if not images:
        raise JobError(nothing_usable(source, "--data", data, unused))
    notes = [f"columns that are not read: {', '.join(sorted(table.left_out))}"] if table.left_out else []
    return AnsweredImages(
        images=tuple(sorted(images)),
        oracles=oracles,
        target=target,
        num_raters=None,
        source=source.kind,
        unused=tuple(unused),
        notes=tuple(notes),
    )


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """An image that people were asked about, with its answers by class."""

    item: LabelledImage
    num_agreeing: int
    num_asked: int


def _chosen(
    source: ImageSource, table: AnswerTable, seen: dict[str, int], unused: list[Unusable], display: Display
) -> Iterator[_Asked]:
    """The images with answers; what has some and cannot be used is added to `unused`.

    Args:
        seen: how many images of the source have a key of the table for their name; counted here.
    """
    started = time.monotonic()
    for number, item in enumerate(source.read(), 1):
        display.advance(progress_text(number, source.num_images, time.monotonic() - started))
        if item.name not in table.counts:
            continue
        seen[item.name] = seen.get(item.name, 0) + 1
        if isinstance(item, Unusable):
            unused.append(item)
        elif not (num_asked := int((counts := table.counts[item.name]).sum())):
            unused.append(Unusable(item.name, "nobody answered about it"))
        else:
            yield _Asked(item, int(counts[item.class_index]), num_asked)


def _batches(images: Iterator[_Asked], num_rows: int) -> Iterator[list[_Asked]]:
    batch = list[_Asked]()
    for image in images:
        batch.append(image)
        if len(batch) == num_rows:
            yield batch
            batch = []
    if batch:
        yield batch


def _check_keys(table: AnswerTable, path: Path, data: str, seen: dict[str, int]) -> None:
    """Refuse keys that name no image, or several.

    Raises:
        JobError: the first of them, a line each.
    """
    names = list(seen)
    problems = []
    for key, row in table.rows.items():
        if seen.get(key) != 1:
            what = f"is the name of {seen[key]} images" if key in seen else f"is no image{nearest(key, names[:1000])}"
            problems.append(f"{OPTION}: {path}: row {row}, column 'key': {shown(key)} {what} of --data '{data}'")
    if (more := len(problems) - MAX_PROBLEMS) > 0:
        problems[MAX_PROBLEMS:] = [f"{OPTION}: {path}: has {more} more keys like these"]
    if problems:
        problems[0] += "; keys are names of images as messages have them: paths below --data, or 'FILE row NUMBER'"
        raise JobError(problems)


class _Judges:
    """The target and the oracles of a job, on the hardware of this process.

    Raises:
        JobError: one cannot be loaded, or `runtime` asks for what is impossible here.
    """

    def __init__(self, job: JobSpec, labels: Sequence[str]) -> None:
        quiet_libraries()
        hardware = choose_hardware(job.runtime)
        fix_threads(hardware)
        self.num_rows = batch_size(job, hardware)
        self._target = Classifier.load(job.models.target, hardware.device)
        self._num_classes, maps = len(labels), job.models.label_map
        self._oracles: list[Oracle] = [
            load_oracle_for(address, hardware.device, labels, maps) for address in job.independent_oracles
        ]

    def judge(self, batch: list[_Asked], unused: list[Unusable]) -> Iterator[AnsweredImage]:
        """The images of a batch that the models give finite values for; the others are added to `unused`."""
        images = [asked.item.image for asked in batch]
        # Every call has the same number of rows: kernels choose their order of summation by the shape.
        padded = [*images, *[images[-1]] * (self.num_rows - len(images))]
        faults, num = Faults(len(images)), len(images)
        of_target = self._target.score(padded)[:num]
        faults.check_logits(of_target, "models.target", self._target.name)
        logits = [oracle.score(padded)[:num] for oracle in self._oracles]
        for oracle, own in zip(self._oracles, logits, strict=True):
            faults.check_logits(own, "models.oracle", oracle.name)
        asked_classes = [[asked.item.class_index] for asked in batch]
        p_labels = oracle_scores(logits, asked_classes, self._num_classes).p_label
        for row, asked in enumerate(batch):
            if faults[row]:
                unused.append(Unusable(asked.item.name, faults[row]))
                continue
            yield AnsweredImage(
                order=(asked.item.class_index, image_key(asked.item.image).hex()),
                p_labels=tuple(plain(p) for p in p_labels[row]),
                target_errs=int(torch.argmax(of_target[row])) != asked.item.class_index,
                num_agreeing=asked.num_agreeing,
                num_asked=asked.num_asked,
            )
