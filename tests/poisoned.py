"""Copies of the zoo's networks with weights that make some or all of their outputs unusable."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.models.addresses import resolve

Poison = Callable[[dict[str, Tensor]], None]


def poisoned(address: str, folder: Path, poison: Poison) -> str:
    """A copy of a model of the zoo whose weights were changed; gives its address."""
    shutil.copytree(resolve(address), folder)
    # Those of the zoo are stored in half precision.
    weights = {name: one.float() for name, one in load_file(folder / "model.safetensors").items()}
    poison(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


def _named(weights: dict[str, Tensor], ending: str) -> Tensor:
    [name] = [name for name in weights if name.endswith(ending)]
    return weights[name]


def setting(ending: str, place: int | slice, value: float) -> Poison:
    """Set a row of the one tensor whose name ends so."""

    def poison(weights: dict[str, Tensor]) -> None:
        _named(weights, ending)[place] = value

    return poison


def scaling(ending: str, factor: float) -> Poison:
    """Multiply the one tensor whose name ends so."""

    def poison(weights: dict[str, Tensor]) -> None:
        _named(weights, ending).mul_(factor)

    return poison


def overflowing_when_bright(weights: dict[str, Tensor]) -> None:
    """Of a classifier of the zoo: a first filter that overflows for bright images, and is cut to zero for dark ones."""
    _named(weights, "embedder.convolution.weight")[0] = 1e36


ALL = slice(None)
# Of a classifier of the zoo, whose last layer is `classifier.1`; each makes every image unusable.
CLASSIFIER_POISONS: dict[str, Poison] = {
    "nan in one class": setting("classifier.1.bias", 3, torch.nan),
    "nan in all classes": setting("classifier.1.weight", ALL, torch.nan),
    "+inf": setting("classifier.1.bias", 2, torch.inf),
    "-inf": setting("classifier.1.bias", 5, -torch.inf),
    "both infinities": lambda weights: (
        setting("classifier.1.bias", 0, torch.inf)(weights),
        setting("classifier.1.bias", 1, -torch.inf)(weights),
    )[0],
    "finite past the softmax": lambda weights: (
        setting("classifier.1.bias", 0, 3e38)(weights),
        setting("classifier.1.bias", 1, -3e38)(weights),
    )[0],
    "weights past float32": scaling("classifier.1.weight", 1e38),
}
# Of its image tower.
CLIP_POISONS: dict[str, Poison] = {
    "nan": setting("visual_projection.weight", 0, torch.nan),
    "+inf": setting("visual_projection.weight", 0, torch.inf),
    "zero": setting("visual_projection.weight", ALL, 0.0),
    "norm past float32": scaling("visual_projection.weight", 1e25),
    "norm below torch's epsilon": scaling("visual_projection.weight", 1e-25),
}
# Of its text tower: no class prompt has an embedding.
TEXT_POISONS: dict[str, Poison] = {
    "nan": setting("text_projection.weight", 0, torch.nan),
    "-inf": setting("text_projection.weight", ALL, -torch.inf),
    "zero": setting("text_projection.weight", ALL, 0.0),
}
