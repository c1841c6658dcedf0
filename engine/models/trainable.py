"""A classifier as training takes it: a network from preprocessed images to logits, and how its result is stored."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from engine.models.addresses import resolve
from engine.models.class_name_files import NAMES_FILES
from engine.models.classifier import load_network, steps_of
from engine.models.classifier_checks import class_names, read_temperature
from engine.models.configurations import read_config
from engine.models.factory_folders import WEIGHTS, StoredFactory, read_factory_folder, write_factory_document
from engine.models.preprocessing import Preprocessing
from engine.models.program_loading import call_factory
from engine.models.program_settings import TargetSettings
from engine.models.programs import is_program
from engine.models.training_trial import trainable_parameters
from engine.models.two_logits import Paired, paired

_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Trainable:
    """A target that can be fine-tuned.

    Attributes:
        network: from images [B, 3, h, w] after preprocessing to logits [B, n], in evaluation mode; a copy of it is
            trained, of whose parameters those that require gradients change.
        temperature: its own.
        store: `store(network, folder, temperature)` writes a trained copy, so that the folder is a target.
    """

    network: nn.Module
    preprocessing: Preprocessing
    temperature: float
    store: Callable[[nn.Module, Path, float], None]


def load_trainable(address: str, device: str) -> Trainable:
    """The target of an address for training, which `engine.models.trainability` has accepted.

    Raises:
        JobError: it cannot be loaded.
    """
    return _of_factory(address, device) if is_program(address) else _of_folder(address, device)


class _Logits(nn.Module):
    """A network of transformers that gives logits alone."""

    def __init__(self, inner: Any, num_classes: int) -> None:
        super().__init__()
        self.inner = inner
        self._num_classes = num_classes

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits [B, n] of images [B, 3, h, w]."""
        logits: Tensor = paired(self.inner(pixel_values=pixels).logits, self._num_classes)
        return logits


def _of_folder(address: str, device: str) -> Trainable:
    folder = resolve(address)

    def store(network: nn.Module, place: Path, temperature: float) -> None:
        assert isinstance(network, _Logits)
        network.inner.save_pretrained(place)
        for name in (*_PREPROCESSORS, *NAMES_FILES):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, place / name)
        # Written into the file: transformers keeps this field out of its configuration objects.
        config = read_config(place / "config.json") | {"temperature": temperature}
        (place / "config.json").write_text(f"{json.dumps(config, indent=2)}\n", encoding="utf-8")

    return Trainable(
        network=_Logits(load_network(address), len(class_names(folder, address))).to(device).eval(),
        preprocessing=Preprocessing.load(folder),
        temperature=read_temperature(read_config(folder / "config.json"), address),
        store=store,
    )


def _of_factory(address: str, device: str) -> Trainable:
    module, settings = call_factory(address)
    stored = read_factory_folder(address)
    factory = stored.factory if stored else address
    changed = {id(parameter) for parameter in trainable_parameters(module.float())}
    for parameter in module.parameters():
        parameter.requires_grad_(id(parameter) in changed)
    if settings.is_binary:
        module = Paired(module)
    return Trainable(
        network=module.to(device).eval(),
        preprocessing=Preprocessing.plain(address, steps_of(settings)),
        temperature=settings.temperature,
        store=_factory_store(factory, settings),
    )


def _factory_store(factory: str, settings: TargetSettings) -> Callable[[nn.Module, Path, float], None]:
    """How a trained network of a factory is stored: its state, next to the factory's name."""
    from safetensors.torch import save_model

    def store(network: nn.Module, place: Path, temperature: float) -> None:
        place.mkdir(parents=True, exist_ok=True)
        save_model(network.inner if isinstance(network, Paired) else network, str(place / WEIGHTS))
        write_factory_document(
            StoredFactory(folder=place, factory=factory, labels=settings.labels, temperature=temperature)
        )

    return store
