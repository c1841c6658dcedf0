"""The images of a study of rounds: looked for, and not read. No torch."""

from __future__ import annotations

from dataclasses import dataclass

from engine.data.images import ImageSource, open_images
from engine.errors import JobError
from engine.models.labels import target_labels
from engine.studies.rounds.design import Design


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """The image sources of a study, which are there and of a kind that can be read."""

    real: ImageSource
    test: ImageSource
    calibrate: ImageSource | None


def open_sources(design: Design) -> Opened:
    """Look for the images, without reading them.

    Raises:
        JobError: all problems, a line each.
    """
    spec, labels = design.spec, tuple(target_labels(design.job))
    opened: dict[str, ImageSource | None] = {}
    problems: list[str] = []
    for field, address in (("real", spec.real), ("test", spec.test), ("calibrate", spec.calibrate)):
        try:
            opened[field] = open_images(address, labels, field) if address else None
        except JobError as error:
            problems += error.problems
    if problems:
        raise JobError(problems)
    assert opened["real"] and opened["test"]
    return Opened(real=opened["real"], test=opened["test"], calibrate=opened["calibrate"])
