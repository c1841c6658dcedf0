"""The safety checker of a Stable Diffusion pipeline: flags the images that its publisher wants withheld."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from engine.errors import JobError
from engine.methods.finiteness import EMBEDS_FAULT, usable_embeds
from engine.models.configurations import part_classes
from engine.models.hardware import Hardware
from engine.models.loading import frozen
from engine.models.pipelines.parts import FEATURE_EXTRACTOR, SAFETY_CHECKER, load_part

FLAGGED = "the pipeline's safety checker flagged the image"
# Embeddings that images are compared with, and thresholds.
_CONCEPTS = ("concept_embeds", "special_care_embeds", "concept_embeds_weights", "special_care_embeds_weights")


class SafetyChecker:
    """A `StableDiffusionSafetyChecker` and its preprocessing.

    diffusers' pipeline blackens what it flags, which would pass for a failure of the target; here flagged samples fail.
    """

    def __init__(self, model: Any, processor: Any, hardware: Hardware) -> None:
        self._model = frozen(model, hardware.device)
        self._processor = processor

    @classmethod
    def load(cls, folder: Path, hardware: Hardware) -> SafetyChecker | None:
        """The checker of a pipeline's folder; None where the pipeline names none.

        Raises:
            JobError: the embeddings that it compares images with are not finite.
        """
        if SAFETY_CHECKER not in part_classes(folder):
            return None
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers.models.clip.image_processing_clip import CLIPImageProcessor

        dtype = getattr(torch, hardware.dtype)
        model = load_part(StableDiffusionSafetyChecker, folder / SAFETY_CHECKER, dtype=dtype)
        if unusable := [name for name in _CONCEPTS if not getattr(model, name).isfinite().all()]:
            raise JobError(
                f"'{folder}': {unusable[0]} of its safety checker is not finite, so it would flag nothing; replace its"
                " weights, or set models.safety_checker: off"
            )
        processor = CLIPImageProcessor.from_pretrained(folder / FEATURE_EXTRACTOR, local_files_only=True)
        return cls(model, processor, hardware)

    def preprocess(self, images: Sequence[PIL.Image.Image]) -> torch.Tensor:
        """The model's input [B, 3, h, w] for 8-bit images, on the CPU; may run on any thread."""
        pixels: torch.Tensor = self._processor(list(images), return_tensors="pt").pixel_values
        return pixels

    @torch.no_grad()
    def faults_of(self, pixels: torch.Tensor) -> list[str]:
        """Why each image, as `preprocess` gave it, must not be stored, [B]; empty for what is let through.

        Values that are not finite would pass for "not flagged".
        """
        # The model blackens the array that it is given: it gets a dummy.
        spare = np.zeros((len(pixels), 1, 1, 3))
        embeds: list[torch.Tensor] = []
        hook = self._model.visual_projection.register_forward_hook(lambda _model, _given, made: embeds.append(made))
        try:
            _, flagged = self._model(clip_input=pixels.to(self._model.device, self._model.dtype), images=spare)
        finally:
            hook.remove()
        return [
            f"the pipeline's safety checker gives {EMBEDS_FAULT}" if not is_usable else FLAGGED if is_flagged else ""
            for is_usable, is_flagged in zip(usable_embeds(embeds[0]).tolist(), flagged, strict=True)
        ]
