"""The images that the report shows, each stored once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engine.data.run.outcomes import asked_classes
from engine.job.spec import JOINT_SEPARATOR
from engine.report.evaluation import Shown
from engine.report.text import clip as clipped
from engine.studies.evaluate.inputs import StudiedSamples


@dataclass(slots=True)
class ImageRegistry:
    """Collects the images that the report shows, each stored once.

    Attributes:
        names: of classes, by index.
        images: data URIs, by the name under which the report refers to them.
    """

    names: dict[int, str]
    images: dict[str, str] = field(default_factory=dict)

    def show(self, kind: Literal["sample", "real", "train"], name: str, uri: str, text: str) -> Shown:
        """Add an image with its caption; a real image and a training image of one name are kept apart."""
        reference = f"{kind}:{name}" if uri else ""
        if uri:
            self.images[reference] = uri
        return Shown(image=reference, name=clipped(name, 200), text=clipped(text, 200), is_sample=kind == "sample")

    def sample(self, samples: StudiedSamples, row: int, text: str = "") -> Shown:
        """Add a sample of the run, with the classes that were asked for and predicted in its caption."""
        record = samples.records[row]
        classes = f"{self.name_asked(record)} → {self.name_of(record['predicted_class'])}"
        text = f"{classes}, {text}" if text else classes
        return self.show("sample", record["key"], samples.images.thumbnails[row], text)

    def name_of(self, index: int) -> str:
        """The displayed name of a class."""
        return self.names.get(index, f"class {index}")

    def name_asked(self, record: Mapping[str, Any]) -> str:
        """The displayed name of what a sample was conditioned on: a class, or those of a joint prompt."""
        return JOINT_SEPARATOR.join(map(self.name_of, asked_classes(record)))
