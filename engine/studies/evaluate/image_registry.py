"""The images that the report shows, each stored once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from engine.data.run.outcomes import asked_classes
from engine.job.spec import JOINT_SEPARATOR
from engine.report.evaluation import (
    Shown,
)
from engine.report.text import clip as clipped
from engine.studies.evaluate.inputs import RunSamples

if TYPE_CHECKING:
    pass


@dataclass(slots=True)
class ImageRegistry:
    """The images that the report shows, each stored once."""

    names: dict[int, str]
    images: dict[str, str] = field(default_factory=dict)

    def show(self, kind: Literal["sample", "real", "train"], name: str, uri: str, text: str) -> Shown:
        """Put an image in, with what is said below it; a real image and a training image may have one name."""
        place = f"{kind}:{name}" if uri else ""
        if uri:
            self.images[place] = uri
        return Shown(image=place, name=clipped(name, 200), text=clipped(text, 200), is_sample=kind == "sample")

    def sample(self, samples: RunSamples, row: int, text: str = "") -> Shown:
        """A sample of the run."""
        record = samples.records[row]
        about = f"{self.name_asked(record)} → {self.name_of(record['predicted_class'])}"
        text = f"{about}, {text}" if text else about
        return self.show("sample", record["key"], samples.pictures.thumbnails[row], text)

    def name_of(self, index: int) -> str:
        """A class for a reader."""
        return self.names.get(index, f"class {index}")

    def name_asked(self, record: Mapping[str, Any]) -> str:
        """What a sample was conditioned on, for a reader: a class, or those of a joint prompt."""
        return JOINT_SEPARATOR.join(map(self.name_of, asked_classes(record)))
