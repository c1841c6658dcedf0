"""Embeddings that condition samples: each of its own sample or image, and checked for every class that is asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from torch import Tensor

from engine.data.images import LabelledImage
from engine.errors import JobError
from engine.generation import conditioner
from engine.generation.artefact import Conditioning, load_conditioning, save_conditioning
from engine.generation.conditioner import DrawnEmbeddings, conditioning_digests
from engine.generation.given_images import CheckedImages, read_given
from engine.job.parsing import parse_job
from engine.job.plan import resolve_requests
from engine.job.spec import ConditioningSpec
from engine.models.artefacts import find_artefact
from engine.models.hardware import CPU_ROWS
from engine.models.labels import read_labels

ARTEFACT = "zoo:digits/conditioning"


@pytest.fixture(scope="module")
def conditioning() -> Conditioning:
    """That of the digits."""
    folder = find_artefact(ARTEFACT)
    assert folder is not None
    return load_conditioning(folder)


def notices(conditioning: str, classes: Sequence[str] = ("one", "three")) -> list[str]:
    """What the check of a job with these statistics tells the user."""
    models = {"diffusion": "zoo:digits/stable-unclip", "clip": "zoo:digits/clip", "target": "zoo:digits/classifier"}
    request = {"name": "a", "method": "prompt", "classes": list(classes), "count": 2, "conditioning": conditioning}
    job = parse_job({"name": "job", "models": models, "requests": [request], "output": {"uri": "out"}})
    labels = read_labels(job.models.target)
    assert labels is not None
    lines: list[str] = []
    conditioning_digests(job, resolve_requests(job, labels), CheckedImages(labels, str, lines.append), lines.append)
    return lines


class Encoder:
    """An image encoder: the grey level of an image, in calls of the fixed number of rows."""

    def image_embeds(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """[B, 1]."""
        assert len(images) == CPU_ROWS
        return torch.tensor([[float(image.getpixel((0, 0))[0])] for image in images])  # type: ignore[index]


def image_of(level: int, label: int) -> LabelledImage:
    return LabelledImage(name=str(level), image=PIL.Image.new("RGB", (2, 2), (level, 0, 0)), class_index=label)


def test_the_first_images_of_every_class_are_embedded_in_their_order() -> None:
    """As many as are needed of each, over several calls."""
    num = CPU_ROWS + 3
    embedder = conditioner._Embedder(Encoder(), {1: num, 2: 2})  # type: ignore[arg-type]
    for level in range(num + 5):
        for label in (1, 2, 3):
            embedder.take(image_of(level, label))
    embeds = embedder.embeds()
    assert {label: rows[:, 0].tolist() for label, rows in embeds.items()} == {1: [*range(num)], 2: [0, 1]}


def test_the_digest_of_given_images_covers_their_classes(tmp_path: Path) -> None:
    """The same pictures of other classes give other samples."""
    digests = set()
    for name in ("zero", "one"):
        folder = tmp_path / name / name
        folder.mkdir(parents=True)
        PIL.Image.new("RGB", (4, 4), (9, 9, 9)).save(folder / "a.png")
        digests.add(read_given(str(tmp_path / name), ["zero", "one"], "images").digest)
    assert len(digests) == 2


def test_a_draw_is_of_the_samples_own_seed(conditioning: Conditioning) -> None:
    """Not of its index, which samples of other classes and requests share."""
    drawn = DrawnEmbeddings(conditioning, ConditioningSpec(artefact=ARTEFACT))
    job = {"name": "j", "models": {"diffusion": "d", "clip": "c", "target": "t"}, "output": {"uri": "out"},
           "requests": [{"name": "a", "method": "prompt", "classes": "all", "count": 1}]}  # fmt: skip
    spec = resolve_requests(parse_job(job), list(conditioning.labels))[0].sample(3)
    first, other, again = (
        drawn.draw(dataclasses.replace(spec, seed=seed, index=index)).embedding
        for seed, index in ((5, 0), (6, 0), (5, 1))
    )
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_a_target_that_changed_under_its_address_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one that was trained again in its folder."""
    assert notices(ARTEFACT) == []
    monkeypatch.setattr(conditioner, "model_digest", lambda address: "another")
    [line] = notices(ARTEFACT)
    assert "was prepared with another target" in line


@pytest.mark.parametrize("label", [1, 3])
def test_every_class_of_a_request_needs_statistics(conditioning: Conditioning, tmp_path: Path, label: int) -> None:
    statistics: Any = dataclasses.replace(conditioning.statistics, count=conditioning.statistics.count.clone())
    statistics.count[label] = 0
    folder, _ = save_conditioning(dataclasses.replace(conditioning, statistics=statistics), tmp_path)
    for classes in (("one", "three"), ("three", "one")):
        with pytest.raises(JobError, match="has no image"):
            notices(str(folder), classes)
