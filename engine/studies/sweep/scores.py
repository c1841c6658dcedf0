"""Stored images scored again: CLIP embeddings, and of joint prompts the target and classifiers that guided nothing.

A run keeps only the class and the risk that a transfer classifier predicts; its KLDB takes the images. What is found is
kept cell by cell, as a step of the study.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray

from engine.data.images import LabelledImage, Unusable, decode_stored, nothing_usable, open_images
from engine.data.run.counts import is_joint
from engine.errors import JobError
from engine.methods.scores import entropy, kldb
from engine.models.digests import model_digest
from engine.models.hardware import choose_hardware
from engine.models.library_logging import quiet_libraries
from engine.studies.evaluate.image_features import batched, unit
from engine.studies.samples import StudiedRun, read_samples

if TYPE_CHECKING:
    from engine.models.clip import Clip
    from engine.models.oracles import Oracle
    from engine.studies.experiments.program import StudyContext

# Real images of a class that are compared with, and images of a source that are read for them.
MAX_REAL = 500
MAX_READ = 20_000
_VERSION = 1
Features = NDArray[np.float32]


class Rescorer:
    """Scores the stored images of a run; models are loaded when the first one is needed.

    Args:
        labels: class names of the target.
    """

    def __init__(self, run: StudiedRun, labels: Sequence[str], context: StudyContext) -> None:
        self._run, self._labels, self._context = run, labels, context
        models = run.job.models
        self.clip_address = models.judge or models.clip
        addresses = [self.clip_address, models.target, *models.transfer]
        self._digests = {address: model_digest(address) for address in dict.fromkeys(addresses)}
        self._clip: Clip | None = None
        self._classifiers: list[tuple[str, Oracle]] | None = None

    def cell(self, request: str) -> dict[str, Any]:
        """Keys, measures of joint prompts by name, and features, of the stored images of a request."""
        tars = "".join(record.tar_sha256 for record in self._run.commits_of([request]))
        inputs = {
            "version": _VERSION,
            "tars": hashlib.sha256(tars.encode()).hexdigest(),
            "digests": self._digests,
            "temperature": self._run.temperature,
        }
        found: dict[str, Any] = self._context.once(f"scores/{request}", inputs, lambda: self._score(request))
        return found

    def _score(self, request: str) -> dict[str, Any]:
        keys: list[str] = []
        values: dict[str, list[float]] = {}
        features: list[Features] = []
        for batch in batched(read_samples(self._run, [request])):
            keys += [record["key"] for _, record in batch]
            images = [decode_stored(data, f"{self._run.store.uri}: sample {record['key']}") for data, record in batch]
            features.append(self.embed(images))
            if is_joint(keys[0]):
                for name, column in self._subset_values(images, batch[0][1]["kldb_classes"]).items():
                    values.setdefault(name, []).extend(column)
        return {"keys": keys, "values": values, "features": packed(np.concatenate(features or [_none()]))}

    def embed(self, images: Sequence[PIL.Image.Image]) -> Features:
        """CLIP embeddings of length one, [B, d]."""
        if self._clip is None:
            from engine.models.clip import Clip

            quiet_libraries()
            self._clip = Clip.load(self.clip_address, choose_hardware(self._run.job.runtime).device)
        return unit(self._clip.image_embeds(images).numpy())

    def _subset_values(self, images: Sequence[PIL.Image.Image], subset: Sequence[int]) -> dict[str, list[float]]:
        values: dict[str, list[float]] = {}
        for name, classifier in self._load():
            logits = classifier.score(images)
            end = f"_{name.partition('_')[2]}" if "_" in name else ""
            in_subset = top_in_subset(logits, subset)
            if name == "target":
                values["top_in_subset"] = in_subset
                continue
            values[f"transfer_kldb{end}"] = kldb(logits, subset).tolist()
            values[f"transfer_entropy{end}"] = entropy(logits).tolist()
            values[f"transfer_top_in_subset{end}"] = in_subset
        return values

    def _load(self) -> list[tuple[str, Oracle]]:
        """The target, and the classifiers that guided nothing as the target's classes."""
        if self._classifiers is None:
            from engine.models.classifier import Classifier
            from engine.models.relabelled import load_classifier_for

            quiet_libraries()
            models, device = self._run.job.models, choose_hardware(self._run.job.runtime).device
            loaded: list[tuple[str, Oracle]] = [
                ("target", Classifier.load(models.target, device, self._run.temperature))
            ]
            for number, address in enumerate(models.transfer):
                name = "transfer" if number == 0 else f"transfer_{number + 1}"
                loaded.append((name, load_classifier_for(address, device, self._labels, models.label_map)))
            self._classifiers = loaded
        return self._classifiers

    def real(self, address: str, classes: Sequence[int]) -> dict[int, Features]:
        """Features of real images by class, at most `MAX_REAL` of each."""
        inputs = {
            "version": _VERSION,
            "address": address,
            "classes": list(classes),
            "clip": self._digests[self.clip_address],
        }
        source = open_images(address, tuple(self._labels), "--real")
        inputs |= {"kind": source.kind, "num_images": source.num_images, "num_bytes": source.num_bytes}
        kept = self._context.once("real", inputs, lambda: self._embed_real(address, set(classes)))
        return {int(index): unpacked(text) for index, text in kept.items()}

    def _embed_real(self, address: str, classes: set[int]) -> dict[str, str]:
        features: dict[int, list[Features]] = {index: [] for index in classes}
        for batch in batched(real_images(address, self._labels, classes, self._context.display.advance)):
            embedded = self.embed([item.image for item in batch])
            for row, item in enumerate(batch):
                features[item.class_index].append(embedded[row])
        return {str(index): packed(np.stack(rows)) for index, rows in features.items() if rows}


def real_images(address: str, labels: Sequence[str], classes: set[int], advance: Any) -> Iterator[LabelledImage]:
    """Real images of some classes, evenly drawn, at most `MAX_REAL` of each.

    Raises:
        JobError: there is none.
    """
    from engine.studies.evaluate.inputs import draw_images

    source, others = open_images(address, tuple(labels), "--real"), list[Unusable]()
    by_class: dict[int, list[LabelledImage]] = {}
    rng = np.random.default_rng(0)
    seen = dict.fromkeys(classes, 0)
    for item in draw_images(source, MAX_READ, 0, lambda text: advance(f"reading --real: {text}")):
        if isinstance(item, Unusable):
            others.append(item)
        elif item.class_index in classes:
            own = by_class.setdefault(item.class_index, [])
            seen[item.class_index] += 1
            # A reservoir: every image of a class is kept with equal probability.
            place = len(own) if len(own) < MAX_REAL else int(rng.integers(seen[item.class_index]))
            own[place : place + 1] = [item] if place < MAX_REAL else []
    if not by_class:
        names = ", ".join(labels[index] for index in sorted(classes))
        if others:
            raise JobError(nothing_usable(source, "--real", address, others))
        raise JobError(f"--real: '{address}' has no image of {names}; give images of these classes")
    yield from itertools.chain.from_iterable(by_class.values())


def top_in_subset(logits: torch.Tensor, subset: Sequence[int]) -> list[float]:
    """1.0 where the |C| likeliest classes [B, n] are those of C, else 0.0."""
    top = logits.topk(len(subset), dim=1).indices
    return torch.isin(top, torch.tensor(list(subset))).all(1).double().tolist()


def packed(features: Features) -> str:
    """Features [N, d] as text: their number of columns, and float32 in base64."""
    data = np.ascontiguousarray(features, "<f4").tobytes()
    return f"{features.shape[1]}:{base64.b64encode(data).decode()}"


def unpacked(text: str) -> Features:
    """The features of `packed`, [N, d]."""
    columns, _, data = text.partition(":")
    return np.frombuffer(base64.b64decode(data), "<f4").reshape(-1, int(columns)).astype(np.float32)


def _none() -> Features:
    return np.empty((0, 1), np.float32)
