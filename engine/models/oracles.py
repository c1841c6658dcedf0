"""Oracles: models that name the class of a stored image and guide nothing, whatever kind they are."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import PIL.Image
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from engine.job.plan import class_prompt
from engine.methods.neighbours import Vote, unit_features, vote_logits
from engine.models.addresses import resolve
from engine.models.artefact_documents import malformed, unreadable
from engine.models.classifier import Classifier
from engine.models.classifier_checks import read_temperature
from engine.models.clip import Clip, ImageEncoder, load_image_encoder
from engine.models.configurations import NEIGHBOURS_DOCUMENT
from engine.models.digests import oracle_digest
from engine.models.kernels import full_float32
from engine.models.neighbour_documents import (
    FEATURES,
    MAX_VALUES,
    NeighboursDocument,
    changed_features,
    find_neighbours,
    read_neighbours,
)
from engine.models.open_clip_checks import clip_config
from engine.models.oracle_kinds import kind_in
from engine.models.programs import is_program
from engine.models.untrusted_files import read_whole

# Features are stored in float16, after a header.
_MAX_FEATURE_BYTES = 2 * MAX_VALUES + 2**20


class Oracle(Protocol):
    """What scoring and guidance need of an oracle. `Classifier` is one.

    A row that cannot be scored has logits that are not finite.

    Attributes:
        name: the address from which it was loaded.
        labels: class names in index order.
        temperature: by which its logits are divided already.
    """

    name: str
    labels: list[str]
    temperature: float

    def preprocess(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """The model's input [B, 3, h, w] for 8-bit images, on the CPU; may run on any thread."""
        ...

    def score_pixels(self, pixels: Tensor) -> Tensor:
        """Scaled logits [B, n], on the CPU, of what `preprocess` gave."""
        ...

    def score(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """Scaled logits [B, n] of 8-bit images, on the CPU."""
        ...

    def logits(self, images: Tensor) -> Tensor:
        """Scaled logits [B, n] of images [B, 3, H, W] in [0, 1]; differentiable."""
        ...


def load_oracle(address: str, device: str, labels: Sequence[str]) -> Oracle:
    """Load an oracle of any kind: classifier, CLIP model (zero-shot), or *neighbours* artefact, with its own classes.

    Args:
        labels: class names of the target in index order, which a CLIP model takes.

    Raises:
        JobError: it cannot be loaded, or is not known to be scored with correctly.
    """
    if is_program(address):
        return Classifier.load(address, device)
    folder = find_neighbours(address) or resolve(address)
    kind = kind_in(folder)
    if kind == "classifier":
        return Classifier.load(address, device)
    return _zero_shot(address, device, labels) if kind == "clip" else _neighbours(address, folder, device)


class EmbeddingOracle:
    """An oracle that scores the embeddings of an image encoder, such as a CLIP model.

    Attributes: as `Oracle`.

    Args:
        logits_of: logits [B, n], not divided by the temperature, of embeddings [B, d] that are of length 1, or NaN.
    """

    def __init__(
        self,
        encoder: ImageEncoder,
        logits_of: Callable[[Tensor], Tensor],
        *,
        name: str,
        labels: Sequence[str],
        temperature: float,
        device: str,
    ) -> None:
        self._encoder = encoder
        self._logits_of = logits_of
        self._device = device
        self.name = name
        self.labels = list(labels)
        self.temperature = temperature

    def preprocess(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """As `Oracle.preprocess`."""
        return self._encoder.preprocess(images)

    @torch.no_grad()
    def score_pixels(self, pixels: Tensor) -> Tensor:
        """As `Oracle.score_pixels`."""
        embeds = self._encoder.embeds_of_pixels(pixels).to(self._device)
        with full_float32(self._device):
            return self._scaled(embeds).cpu()

    def score(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """As `Oracle.score`."""
        return self.score_pixels(self.preprocess(images))

    def logits(self, images: Tensor) -> Tensor:
        """As `Oracle.logits`; of neighbours the gradient is that of the votes of those that an image has now."""
        return self._scaled(self._encoder.embeds_of_tensor(images))

    def _scaled(self, embeds: Tensor) -> Tensor:
        return self._logits_of(unit_features(embeds)) / self.temperature


def _zero_shot(address: str, device: str, labels: Sequence[str]) -> EmbeddingOracle:
    """CLIP as a classifier: cosines with the prompts of the classes, times the factor that it was trained with.

    Radford et al., "Learning transferable visual models from natural language supervision" (ICML 2021), section 3.1.
    Of SigLIP the logits are those of its sigmoids; one class is right here, so that their softmax is taken, too, which
    the bias does not change.
    The temperature is the field `temperature` of its config.json, 1 without it.
    """
    temperature = read_temperature(clip_config(resolve(address)), address)
    clip = Clip.load(address, device)
    prompts = unit_features(clip.text_embeds([class_prompt(label) for label in labels])).to(device)
    scale, bias = clip.logit_scale, clip.logit_bias
    return EmbeddingOracle(
        clip,
        lambda features: scale * features @ prompts.T + bias,
        name=address,
        labels=labels,
        temperature=temperature,
        device=device,
    )


def _neighbours(address: str, folder: Path, device: str) -> EmbeddingOracle:
    """The vote of the most similar of labelled images; see `engine.methods.neighbours`."""
    document = read_neighbours(folder)
    labels = document.labels
    # Once more: the files may have changed since the job was checked, or be those of another machine.
    oracle_digest(address)
    features = _read_features(document).to(device)
    classes = torch.arange(len(labels)).repeat_interleave(torch.tensor(document.counts)).to(device)
    vote = Vote(k=document.k, tau=document.tau)
    return EmbeddingOracle(
        load_image_encoder(document.encoder_address, device),
        lambda queries: vote_logits(queries, features, classes, len(labels), vote),
        name=address,
        labels=labels,
        temperature=document.temperature,
        device=device,
    )


def _read_features(document: NeighboursDocument) -> Tensor:
    """The features of an artefact, [N, d] in float32 of length 1.

    Raises:
        JobError: they are damaged.
    """
    try:
        data = read_whole(document.folder / FEATURES, _MAX_FEATURE_BYTES)
    except OSError as error:
        raise unreadable(document.folder, NEIGHBOURS_DOCUMENT, error) from None
    if hashlib.sha256(data).hexdigest() != document.features_sha256:
        raise changed_features(document.folder)
    try:
        stored = safetensors.torch.load(data)["features"]
        if tuple(stored.shape) != (sum(document.counts), document.dim):
            raise ValueError(f"its features have the shape {list(stored.shape)}")
        features = unit_features(stored)
        if not features.isfinite().all():
            raise ValueError("some of its features are not finite or have no direction")
    except (KeyError, ValueError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        raise malformed(document.folder, error) from None
    return features
