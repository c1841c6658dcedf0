"""The safety checker that comes with a Stable Diffusion pipeline: which images its publisher does not let through."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from engine.models.folders import part_classes, weights_variant
from engine.models.pipelines import SAFETY_CHECKER
from engine.models.runtime import Hardware, frozen, whole

FEATURES = "feature_extractor"


class SafetyChecker:
    """A `StableDiffusionSafetyChecker` and its preprocessing.

    diffusers' pipeline blackens what it flags, which would pass for a failure of the target; here flagged samples fail.
    """

    def __init__(self, model: Any, processor: Any, hardware: Hardware) -> None:
        self._model = frozen(model, hardware.device)
        self._processor = processor

    @classmethod
    def load(cls, folder: Path, hardware: Hardware) -> SafetyChecker | None:
        """The checker of a pipeline's folder; None where the pipeline names none."""
        if SAFETY_CHECKER not in part_classes(folder):
            return None
        from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
        from transformers.models.clip.image_processing_clip import CLIPImageProcessor

        where = folder / SAFETY_CHECKER
        options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
        options |= {"variant": weights_variant(where), "dtype": getattr(torch, hardware.dtype)}
        model = whole(StableDiffusionSafetyChecker.from_pretrained(where, **options))
        return cls(model, CLIPImageProcessor.from_pretrained(folder / FEATURES, local_files_only=True), hardware)

    @torch.no_grad()
    def flags(self, images: Sequence[PIL.Image.Image]) -> list[bool]:
        """Whether each image is flagged, [B]."""
        pixels = self._processor(list(images), return_tensors="pt").pixel_values
        # The model blackens the array that it is given: it gets one of no worth.
        spare = np.zeros((len(images), 1, 1, 3))
        _, flagged = self._model(clip_input=pixels.to(self._model.device, self._model.dtype), images=spare)
        return [bool(one) for one in flagged]
