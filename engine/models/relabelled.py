"""Models whose classes are named or ordered otherwise than the target's, read as the target's."""

from __future__ import annotations

from collections.abc import Sequence

import PIL.Image
import torch
from torch import Tensor

from engine.job.columns import OTHER_CLASS
from engine.job.label_maps import LabelMap
from engine.models.classifier import Classifier
from engine.models.job_label_maps import Maps, label_map_of
from engine.models.oracles import Oracle, load_oracle


class Relabelled:
    """A model with the target's classes in front, and each of its other classes behind them.

    Several classes that mean one of the target's are added up (their probabilities; of logits the logarithm of the sum
    of exponentials). The others stay classes of their own, so that probabilities are those of the model: they are not
    normalised over the target's classes, and an image that shows another class is not one of these.

    Attributes: as `engine.models.oracles.Oracle`; `labels` are the target's n names.

    Args:
        model: a classifier or an oracle.
        label_map: its m classes as the target's.
        labels: the target's class names.
    """

    def __init__(self, model: Oracle, label_map: LabelMap, labels: Sequence[str]) -> None:
        self._model, self._sources, self._others = model, label_map.sources, label_map.others
        self._order = [place for places in self._sources for place in places] + self._others
        self._has_sums = any(len(places) > 1 for places in self._sources)
        self.name, self.labels, self.temperature = model.name, list(labels), model.temperature

    def preprocess(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """As `Oracle.preprocess`."""
        return self._model.preprocess(images)

    def score_pixels(self, pixels: Tensor) -> Tensor:
        """As `Oracle.score_pixels`, with the columns of the other classes: [B, n + k]."""
        return self._read(self._model.score_pixels(pixels))

    def score(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """As `score_pixels`, of 8-bit images."""
        return self._read(self._model.score(images))

    def logits(self, images: Tensor) -> Tensor:
        """As `Oracle.logits`, with the columns of the other classes."""
        return self._read(self._model.logits(images))

    def _read(self, logits: Tensor) -> Tensor:
        """Logits [B, n + k] by those of the model's own classes, [B, m]."""
        if not self._has_sums:
            return logits[:, self._order]
        sums = [logits[:, places].logsumexp(1) if len(places) > 1 else logits[:, places[0]] for places in self._sources]
        return torch.cat([torch.stack(sums, 1), logits[:, self._others]], 1)


def predicted_classes(logits: Tensor, num_classes: int) -> Tensor:
    """The likeliest class [B] by logits [B, n + k]: one of the target's n, or `OTHER_CLASS`."""
    predicted = logits.argmax(1)
    return torch.where(predicted < num_classes, predicted, OTHER_CLASS)


def load_oracle_for(address: str, device: str, labels: Sequence[str], maps: Maps) -> Oracle:
    """An oracle with the target's classes.

    Args:
        labels: the target's class names.
        maps: `models.label_map` of the job.

    Raises:
        JobError: as `load_oracle`, or its classes cannot be read as the target's.
    """
    return with_labels(load_oracle(address, device, labels), labels, maps)


def load_classifier_for(address: str, device: str, labels: Sequence[str], maps: Maps) -> Oracle:
    """A classifier with the target's classes; as `load_oracle_for`."""
    return with_labels(Classifier.load(address, device), labels, maps)


def with_labels(model: Oracle, labels: Sequence[str], maps: Maps) -> Oracle:
    """A loaded model with the target's classes; itself where it has them."""
    label_map = label_map_of(model.name, model.labels, labels, maps)
    return model if label_map is None else Relabelled(model, label_map, labels)
