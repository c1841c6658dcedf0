"""What else is asked of the photographs' generator: does it obey contexts, keep real starts, and copy no image?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar10_autoencoder import reconstruct
from cifar10_captions import Copies, framed
from cifar10_contexts import ATTRIBUTES, Thresholds, measure
from cifar10_data import CLASS_NAMES, Photographs, scaled, stacked
from cifar10_readers import Teacher
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from drawing import Bytes, Sampling, draw, percent, sample, save_sheet
from numpy.typing import NDArray
from PIL import Image
from residual_networks import ResidualNetwork
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from training import batches

from engine.studies.evaluate.nearest_images import QUANTILE

TEMPLATE = "a photo of a {}"
STRENGTH = 0.3
COLUMNS = 20
_PROBE_IMAGES = 2000  # Of each kind.


def prompts_of(labels: NDArray[np.int64]) -> list[str]:
    """The prompt that names the class of each label."""
    return [TEMPLATE.format(CLASS_NAMES[label]) for label in labels]


def balanced_labels(names: Sequence[str], count: int) -> NDArray[np.int64]:
    """`count` labels that take turns over the classes `names`."""
    return np.array([CLASS_NAMES.index(name) for name in names])[np.arange(count) % len(names)]


class ContextReader:
    """Reads the contexts of images: what is measured as of training images, distance and side by a linear probe.

    The probe reads the teacher's last feature maps; it learns from copies of training images that were framed anew.

    Args:
        train: images that the generator has learnt from.
        teacher: whose features are read.
    """

    def __init__(self, train: Photographs, teacher: Teacher, thresholds: Thresholds) -> None:
        self.teacher, self.thresholds = teacher, thresholds
        copies = _probe_copies(train, teacher, seed=1)
        features = self._features(copies.photographs.images)
        self._probes = {
            name: make_pipeline(StandardScaler(), LogisticRegression(C=1e-3, max_iter=300)).fit(features, values)
            for name, values in (("distance", copies.distance), ("side", copies.side))
        }

    def accuracy(self, test: Photographs) -> dict[str, float]:
        """Share (%) of copies of test images whose distance and side the probe reads rightly."""
        copies = _probe_copies(test, self.teacher, seed=2)
        found = self._placed(copies.photographs.images)
        return {name: percent(found[name] == getattr(copies, name)) for name in found}

    def phrases(self, images: Bytes) -> list[list[str]]:
        """What can be said of each image."""
        contexts = self.thresholds.contexts(measure(images), **self._placed(images))
        return [contexts.phrases(row) for row in range(len(contexts))]

    def _placed(self, images: Bytes) -> dict[str, NDArray[np.int64]]:
        features = self._features(images)
        return {name: probe.predict(features) for name, probe in self._probes.items()}

    @torch.no_grad()
    def _features(self, images: Bytes) -> NDArray[np.float32]:
        parts = (scaled(stacked(images[part], "cpu")) for part in batches(len(images), 250))
        return np.concatenate([self.teacher.features(part)[0][-1].flatten(1).numpy() for part in parts])


def _probe_copies(data: Photographs, teacher: Teacher, seed: int) -> Copies:
    """As many images as they are as framed anew in each way."""
    share = min(1.0, _PROBE_IMAGES / len(data.labels))
    rows = np.random.default_rng(seed).permutation(len(data.labels))[: round(share * len(data.labels))]
    _, *others = framed(data, teacher.activation, share, seed)
    return Copies.joined([Copies.of(data.images[rows], data.labels[rows]), *others])


def obedience(
    pipeline: StableDiffusionPipeline, names: Sequence[str], reader: ContextReader, sampling: Sampling, count: int
) -> dict[str, dict[str, float]]:
    """Of `count` samples a phrase, the share (%) that has what the phrase says; and of samples with no phrase."""
    labels = balanced_labels(names, count)

    def said(phrase: str) -> list[list[str]]:
        prompts = [f"{prompt}, {phrase}" if phrase else prompt for prompt in prompts_of(labels)]
        return reader.phrases(sample(pipeline, prompts, sampling, seed=3000))

    def share(phrase: str, found: list[list[str]]) -> float:
        return percent(np.array([phrase in some for some in found]))

    unasked = said("")
    return {
        phrase: {"asked": share(phrase, said(phrase)), "not asked": share(phrase, unasked)} for phrase in _phrases()
    }


def _phrases() -> list[str]:
    return [value for values in ATTRIBUTES.values() for value in values if value]


def kept_starts(
    pipeline: StableDiffusionPipeline, referee: ResidualNetwork, test: Photographs, sampling: Sampling, count: int
) -> dict[str, Any]:
    """From real starts at strength 0.3, guided by the prompt alone: how often the referee still reads the label.

    Only starts whose reconstruction it reads rightly count.
    """
    kept = np.flatnonzero(referee.read(reconstruct(pipeline.vae, test.images))[1] == test.labels)
    rows = np.random.default_rng(0).permutation(kept)[:count]
    if not len(rows):
        return {"strength": STRENGTH, "count": 0}
    drawn = from_starts(pipeline, test.images[rows], prompts_of(test.labels[rows]), sampling, seed=4000)
    hits = referee.read(drawn)[1] == test.labels[rows]
    distance = np.abs(drawn.astype(float) - test.images[rows]).mean()
    return {
        "strength": STRENGTH,
        "count": len(rows),
        "resnet32": percent(hits),
        "mean change of 255": round(distance, 1),
    }


def from_starts(
    pipeline: StableDiffusionPipeline, images: Bytes, prompts: Sequence[str], sampling: Sampling, *, seed: int
) -> Bytes:
    """Samples [N, 32, 32, 3] that start from images with noise of strength 0.3."""
    starter = StableDiffusionImg2ImgPipeline(**pipeline.components, requires_safety_checker=False)
    starter.set_progress_bar_config(disable=True)

    def inputs(part: slice) -> dict[str, Any]:
        starts = [Image.fromarray(image) for image in images[part]]
        return {"prompt": list(prompts[part]), "image": starts, "strength": STRENGTH}

    return draw(starter, inputs, len(prompts), sampling, seed=seed)


def memorisation(
    drawn: Bytes, train: Photographs, test: Photographs, referee: ResidualNetwork, sheet: Path
) -> dict[str, Any]:
    """How near samples are to training images, in comparison with test images, which cannot be copies.

    A sample is suspect if it is nearer than `QUANTILE` of the test images both in the referee's features and in
    pixels, as `riskforge evaluate --train` has it. Side effects: writes the nearest pairs to `sheet`, samples above.
    """
    everything = np.concatenate([train.images, train.images[:, :, ::-1]])
    features = _unit(referee.read(everything)[0].numpy())
    distances, rows = _nearest(drawn, everything, features, referee)
    usual, _ = _nearest(test.images, everything, features, referee)
    limits = np.quantile(usual, QUANTILE, axis=1)
    suspect = np.all(distances <= limits[:, None], axis=0)
    order = np.argsort(distances[0])[:COLUMNS]
    save_sheet(np.stack([drawn[order], everything[rows[order]]]), sheet)
    return {
        "suspects": percent(np.asarray(suspect)),
        "median distance of features": [round(float(np.median(some[0])), 4) for some in (distances, usual)],
        "median distance of pixels": [round(float(np.median(some[1])), 4) for some in (distances, usual)],
        "order": ["samples", "test images"],
    }


def _nearest(
    images: Bytes, train: Bytes, features: NDArray[np.float32], referee: ResidualNetwork
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Distances [2, N] by features (one minus the cosine) and pixels (root mean square), and the nearest rows."""
    cosines = _unit(referee.read(images)[0].numpy()) @ features.T
    rows = cosines.argmax(1)
    difference = (images.astype(np.float32) - train[rows]) / 255
    pixels = np.sqrt((difference**2).mean((1, 2, 3)))
    return np.stack([1 - cosines[np.arange(len(rows)), rows], pixels]).astype(np.float64), rows


def _unit(features: NDArray[np.float32]) -> NDArray[np.float32]:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def save_blind_sheet(pipeline: StableDiffusionPipeline, sampling: Sampling, sheet: Path, key: Path) -> None:
    """Forty cats and forty dogs in random order, for a reader to name; what they were asked to be goes to `key`."""
    labels = np.random.default_rng(7).permutation(balanced_labels(("cat", "dog"), 80))
    drawn = sample(pipeline, prompts_of(labels), sampling, seed=6000)
    sheet_of = drawn.reshape(8, 10, 32, 32, 3).transpose(0, 2, 1, 3, 4).reshape(256, 320, 3)
    Image.fromarray(sheet_of).resize((1280, 1024), Image.Resampling.NEAREST).save(sheet)
    rows = [" ".join(CLASS_NAMES[label] for label in row) for row in labels.reshape(8, 10)]
    key.write_text("\n".join(rows) + "\n")
