"""Image classifiers of every kind, with their own preprocessing and calibration temperature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from engine.errors import JobError
from engine.models.addresses import read_config, resolve
from engine.models.preprocess import Preprocessing, Steps
from engine.models.runtime import frozen, loading
from engine.models.targets import TargetSettings, is_foreign


class Classifier:
    """A classifier f with preprocessing and temperature: `logits = f(x) / T` over n classes.

    Attributes:
        name: the address it was loaded from.
        labels: class names in index order.
        temperature: T, the field `temperature` of its config.json or settings, else 1.
    """

    def __init__(
        self,
        network: Callable[[Tensor], Tensor],
        preprocessing: Preprocessing,
        *,
        name: str,
        labels: Sequence[str],
        temperature: float,
        device: str,
    ) -> None:
        self._network = network
        self._preprocessing = preprocessing
        self._device = device
        self.name = name
        self.labels = list(labels)
        self.temperature = temperature

    @classmethod
    def load(cls, address: str, device: str = "cpu") -> Classifier:
        """Load from `zoo:`, a folder or a hub id (safetensors only), a file or a factory; always in float32.

        Raises:
            JobError: it cannot be loaded, or its temperature is not a positive number.
        """
        if is_foreign(address):
            from engine.models.foreign import open_foreign

            network, settings = open_foreign(address, device)
            return cls(
                network,
                Preprocessing.plain(address, _steps(settings)),
                name=address,
                labels=settings.labels,
                temperature=settings.temperature,
                device=device,
            )
        folder, model = resolve(address), frozen(load_network(address), device)
        return cls(
            lambda pixels: model(pixel_values=pixels).logits,
            Preprocessing.load(folder),
            name=address,
            labels=[model.config.id2label[index] for index in range(model.config.num_labels)],
            temperature=_temperature(folder, address),
            device=device,
        )

    def logits(self, images: Tensor) -> Tensor:
        """Temperature-scaled logits [B, n] of images [B, 3, H, W] in [0, 1]; differentiable."""
        return self._forward(self._preprocessing.of_tensor(images))

    @torch.no_grad()
    def score(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """Temperature-scaled logits [B, n] of 8-bit images, on the CPU: what plain transformers gives, divided by T."""
        return self._forward(self._preprocessing.of_images(images).to(self._device)).cpu()

    def _forward(self, pixel_values: Tensor) -> Tensor:
        return self._network(pixel_values).float() / self.temperature


def _steps(settings: TargetSettings) -> Steps:
    """The preprocessing that settings describe."""
    height, width = settings.shape
    return Steps(
        resize={"height": height, "width": width} if settings.resize is None else {"shortest_edge": settings.resize},
        crop=None if settings.resize is None else (height, width),
        resample=PIL.Image.Resampling[settings.interpolation.upper()],
        mean=settings.mean,
        std=settings.std,
        rounds=True,
    )


def load_network(address: str) -> Any:
    """The network of a classifier in float32, without preprocessing and temperature; its parameters have gradients.

    Raises:
        JobError: it cannot be loaded.
    """
    from transformers.models.auto.modeling_auto import AutoModelForImageClassification

    folder = resolve(address)
    with loading(address, "a classifier"):
        return AutoModelForImageClassification.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, dtype=torch.float32
        )


def _temperature(folder: Path, address: str) -> float:
    value = read_config(folder / "config.json").get("temperature", 1.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e6:
        raise JobError(f"'{address}': temperature {value!r} in config.json is not a positive number")
    return float(value)
