"""The models of a job as a criterion asks them: images of any device and precision, float32 on the model's own.

Legend: B samples, H x W size, n classes of the target, k further classes of another model, d entries of an embedding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from engine.methods.guidance.scene import SceneScorer
from engine.models.clip import Clip
from engine.models.oracles import Oracle


def scene_classifier(model: Oracle, device: str) -> SceneScorer:
    """A classifier, or an oracle of any kind.

    Args:
        device: of its weights.
    """
    return SceneScorer(
        name=model.name,
        logits=_placed(model.logits, device),
        embeds=_lacking(model.name, "embeddings: it is a classifier"),
        text_embeds=_lacking(model.name, "embeddings: it is a classifier"),
    )


def scene_encoder(clip: Clip, device: str) -> SceneScorer:
    """A CLIP model; `device` as of `scene_classifier`."""
    known: dict[tuple[str, ...], Tensor] = {}

    def text_embeds(texts: Sequence[str]) -> Tensor:
        key = tuple(texts)
        if key not in known:
            known[key] = clip.text_embeds(key).to(device)
        return known[key]

    return SceneScorer(
        name=clip.name,
        logits=_lacking(clip.name, "logits: it is a CLIP model; use embeds and text_embeds"),
        embeds=_placed(clip.embeds_of_tensor, device),
        text_embeds=text_embeds,
    )


def _placed(measure: Callable[[Tensor], Tensor], device: str) -> Callable[[Tensor], Tensor]:
    """A measure of images that takes them from any device, and returns there what it gives, in float32."""

    def measured(images: Tensor) -> Tensor:
        # Within autocast a network would compute in half precision.
        with torch.autocast(images.device.type, enabled=False):
            return measure(images.to(device=device, dtype=torch.float32)).to(images.device)

    return measured


def _lacking(name: str, what: str) -> Callable[[Any], NoReturn]:
    def refuse(_: Any) -> NoReturn:
        raise LookupError(f"'{name}' has no {what}")

    return refuse
