"""Image classifiers from folders, files and factories, with their preprocessing and calibration temperature."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from engine.errors import JobError
from engine.models.addresses import resolve
from engine.models.classifier_checks import check_classifier, class_names, num_logits, read_temperature
from engine.models.configurations import TIMM_KEY, read_config
from engine.models.kernels import full_float32
from engine.models.loading import frozen, load_weights, loading
from engine.models.preprocessing import Preprocessing
from engine.models.preprocessing_steps import Steps
from engine.models.program_loading import open_program
from engine.models.program_settings import TargetSettings
from engine.models.programs import is_program
from engine.models.timm_checks import timm_count
from engine.models.two_logits import paired


class Classifier:
    """A classifier f with preprocessing and temperature: `logits = f(x) / T` over n classes.

    Attributes:
        name: the address from which it was loaded.
        labels: class names in index order.
        temperature: T, as given, else the field `temperature` of its config.json or settings; 1 without it.
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
    def load(cls, address: str, device: str = "cpu", temperature: float | None = None) -> Classifier:
        """Load from `zoo:`, a folder or a hub id (safetensors only), a file or a factory; always in float32.

        Args:
            temperature: T in place of its own.

        Raises:
            JobError: it cannot be loaded, or is not known to be scored with correctly.
        """
        if is_program(address):
            return cls._load_program(address, device, temperature)
        folder, model = resolve(address), frozen(load_network(address), device)
        own = read_temperature(read_config(folder / "config.json"), address)
        labels = class_names(folder, address)
        classifier = cls(
            lambda pixels: paired(model(pixel_values=pixels).logits, len(labels)),
            Preprocessing.load(folder),
            name=address,
            labels=labels,
            temperature=own if temperature is None else temperature,
            device=device,
        )
        classifier._try()
        return classifier

    @classmethod
    def _load_program(cls, address: str, device: str, temperature: float | None) -> Classifier:
        network, settings = open_program(address, device)
        return cls(
            network,
            Preprocessing.plain(address, steps_of(settings)),
            name=address,
            labels=settings.labels,
            temperature=settings.temperature if temperature is None else temperature,
            device=device,
        )

    def _try(self) -> None:
        """Score a black image.

        Raises:
            JobError: the network does not take what its image processor gives, or has another number of classes than
                its config.json.
        """
        black = PIL.Image.new("RGB", (64, 64))
        with loading(self.name, "a classifier of images from its image processor"):
            shape = self.score([black]).shape
        if shape != (1, len(self.labels)):
            raise JobError(
                f"'{self.name}' gives {list(shape)} for an image where [1, {len(self.labels)}] is expected: config.json"
                " must name as many classes as the network has logits"
            )

    def logits(self, images: Tensor) -> Tensor:
        """Temperature-scaled logits [B, n] of images [B, 3, H, W] in [0, 1]; differentiable."""
        return self._forward(self._preprocessing.of_tensor(images))

    def score(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """Temperature-scaled logits [B, n] of 8-bit images, on the CPU: those of plain transformers, divided by T."""
        return self.score_pixels(self.preprocess(images))

    def preprocess(self, images: Sequence[PIL.Image.Image]) -> Tensor:
        """The network's input [B, 3, h, w] for 8-bit images, on the CPU; may run on any thread."""
        return self._preprocessing.of_images(images)

    @torch.no_grad()
    def score_pixels(self, pixels: Tensor) -> Tensor:
        """As `score`, of what `preprocess` gave."""
        with full_float32(self._device):
            return self._forward(pixels.to(self._device)).cpu()

    def _forward(self, pixel_values: Tensor) -> Tensor:
        """Scaled logits [B, n].

        Raises:
            JobError: the output has another shape, which the trial at loading may not show.
        """
        logits, wanted = self._network(pixel_values), (len(pixel_values), len(self.labels))
        if tuple(logits.shape) != wanted:
            raise JobError(
                f"'{self.name}' gives {list(logits.shape)} for {len(pixel_values)} images where {list(wanted)} is"
                " expected: a row for each image, a column for each class"
            )
        return logits.float() / self.temperature


def steps_of(settings: TargetSettings) -> Steps:
    """The preprocessing steps that settings describe."""
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
    """The network of a classifier's folder in float32, without preprocessing and temperature, for training.

    Raises:
        JobError: it cannot be loaded.
    """
    from transformers.models.auto.modeling_auto import AutoModelForImageClassification

    folder = resolve(address)
    check_classifier(folder, address)
    config = read_config(folder / "config.json")
    with loading(address, "a classifier"):
        options = {"config": _timm_config(config)} if TIMM_KEY in config else _binary_config(config)
        return load_weights(AutoModelForImageClassification, folder, **options)


def _binary_config(config: dict[str, Any]) -> dict[str, Any]:
    """transformers' configuration of a network with one logit that is said to be of a single label, as an option.

    transformers 5 refuses this `problem_type`, which decides the loss alone.
    """
    if num_logits(config) != 1 or not config.get("problem_type"):
        return {}
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    plain = {key: value for key, value in config.items() if key != "problem_type"}
    return {"config": CONFIG_MAPPING[str(config.get("model_type"))].from_dict(plain)}


def _timm_config(config: dict[str, Any]) -> Any:
    """transformers' configuration of a network that timm saved.

    Since 1.0.31 timm also writes the number of classes into the arguments of the network, to which transformers adds it
    a second time.
    """
    from transformers.models.timm_wrapper.configuration_timm_wrapper import TimmWrapperConfig

    arguments = dict(config.get("model_args") or {})
    count = config.get("num_classes", arguments.pop("num_classes", None))
    arguments.pop("num_classes", None)
    if timm_count(config) == 1:
        # Two names of one logit, of which transformers would make a head of two.
        config = {key: value for key, value in config.items() if key not in ("label_names", "label_descriptions")}
    return TimmWrapperConfig.from_dict(config | {"num_classes": count, "model_args": arguments or None})
