"""Classifiers: temperature, and logits of the wrong shape."""

import json
import shutil

import PIL.Image
import pytest
import torch

from engine.errors import JobError
from engine.models.addresses import resolve
from engine.models.classifier import Classifier
from engine.models.labels import read_labels
from engine.models.preprocessing import Preprocessing
from engine.models.preprocessing_steps import Steps
from tests.program_cases import DIGITS, images


def test_temperature_divides_the_logits(tmp_path):
    """Two copies of a classifier, one at twice the temperature."""
    folder = tmp_path / "copy"
    shutil.copytree(resolve("zoo:digits/classifier"), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"temperature": 2 * config["temperature"]}))
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    first, second = Classifier.load("zoo:digits/classifier"), Classifier.load(str(folder))
    assert torch.allclose(first.logits(images), 2 * second.logits(images), atol=1e-5)
    (folder / "config.json").write_text(json.dumps(config | {"temperature": 0}))
    with pytest.raises(JobError, match="temperature 0 "):
        Classifier.load(str(folder))


@pytest.mark.parametrize("shape", [(3, 9), (3, 11), (2, 10), (4, 10), (3,), (3, 10, 1), (30,)])
def test_logits_of_another_shape_are_refused_whenever_they_come(shape: tuple[int, ...]) -> None:
    """What is tried at loading are black images; a network may answer others otherwise."""
    steps = Steps(resize=None, crop=None, resample=PIL.Image.Resampling.BILINEAR, mean=[0.0] * 3, std=[1.0] * 3)
    of_shape = Classifier(
        lambda pixels: torch.zeros(shape),
        Preprocessing.plain("net", steps),
        name="net",
        labels=DIGITS,
        temperature=1.0,
        device="cpu",
    )
    with pytest.raises(JobError, match=r"'net' gives \[[0-9, ]+\] for 3 images where \[3, 10\] is expected"):
        of_shape.score(images(3))


def test_wrong_kinds_are_refused(tmp_path):
    """A CLIP folder as classifier, an empty folder, broken weights: the error names the problem."""
    with pytest.raises(JobError, match="id2label"):
        read_labels("zoo:digits/clip")
    with pytest.raises(JobError, match=r"no config\.json"):
        read_labels(str(tmp_path))
    folder = tmp_path / "broken"
    shutil.copytree(resolve("zoo:digits/classifier"), folder)
    (folder / "model.safetensors").write_bytes(b"not a model")
    with pytest.raises(JobError, match="cannot be loaded"):
        Classifier.load(str(folder))
