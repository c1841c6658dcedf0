"""Sets of samples that arms of guidance make from the same noise.

Legend: B samples, N samples of a set, C channels, H x W size.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from engine.data.images.image_source import LabelledImage
from engine.data.images.opening import open_images
from engine.job.spec import RuntimeSpec
from engine.methods.guidance.guided import ConditionalDenoiser
from engine.methods.guidance.scene import GuidanceScene
from engine.methods.sampling.denoiser import Denoiser
from engine.methods.sampling.loop import Start, sample
from engine.methods.sampling.schedulers import Sampler
from engine.methods.sampling.spec import SamplingSpec
from engine.models.classifier import Classifier
from engine.models.clip import Clip
from engine.models.diffusion import load_pipeline
from engine.models.hardware import choose_hardware
from engine.models.pipelines.base import Pipeline

BATCH = 16


@dataclass(frozen=True, kw_only=True)
class Zoo:
    """A zoo's models, loaded once: the target, networks that guide nothing, and those that decide validity.

    Attributes:
        name: of the zoo.
        observers: parts of it that guide nothing; the first is the one of another family that goals name.
        oracles: the observers that have to agree with a sample's label.
        real: address of real images.
    """

    name: str
    observers: tuple[str, ...]
    oracles: tuple[str, ...]
    real: str

    @cached_property
    def pipeline(self) -> Pipeline:
        """The Stable Diffusion pipeline."""
        return load_pipeline(f"zoo:{self.name}/stable-diffusion", choose_hardware(RuntimeSpec()))

    @cached_property
    def target(self) -> Classifier:
        """The classifier that guides."""
        return Classifier.load(f"zoo:{self.name}/classifier")

    @cached_property
    def clip(self) -> Clip:
        """The CLIP model whose features compare samples with real images."""
        return Clip.load(f"zoo:{self.name}/clip")

    @cached_property
    def readers(self) -> dict[str, Classifier]:
        """The observers by name."""
        return {part: Classifier.load(f"zoo:{self.name}/{part}") for part in self.observers}

    def real_images(self, classes: Sequence[int]) -> list[LabelledImage]:
        """Real images of some classes, by index of the target."""
        source = open_images(self.real, tuple(self.target.labels))
        return [one for one in source.read() if isinstance(one, LabelledImage) and one.class_index in classes]


Arm = Callable[["SampleSet", ConditionalDenoiser, GuidanceScene, Sampler], Denoiser]


@dataclass(frozen=True, kw_only=True)
class SampleSet:
    """Samples to make: of one joint prompt, or of classes in turn.

    Attributes:
        method: `boundary` or `risky`.
        names: the classes.
        count: N.
        strength: of real images that samples start from; None for noise alone.
    """

    zoo: Zoo
    method: str
    names: tuple[str, ...]
    count: int
    guidance_scale: float = 3.0
    strength: float | None = None
    first_seed: int = 0
    sampling: SamplingSpec = field(init=False)

    def __post_init__(self) -> None:
        """Note how all samples are made."""
        spec = SamplingSpec(scheduler="lms", num_inference_steps=40, guidance_scale=self.guidance_scale)
        object.__setattr__(self, "sampling", spec)

    @property
    def title(self) -> str:
        """In tables."""
        start = "" if self.strength is None else f" from real images at {self.strength:g}"
        return f"{self.zoo.name}: {self.method} {'/'.join(self.names) if len(self.names) < 5 else 'all classes'}{start}"

    @cached_property
    def subset(self) -> tuple[int, ...]:
        """The classes by index of the target."""
        return tuple(self.zoo.target.labels.index(name) for name in self.names)

    @cached_property
    def labels(self) -> Tensor:
        """[N]; of a joint prompt the first class."""
        places = torch.arange(self.count) % (1 if self.method == "boundary" else len(self.names))
        return torch.tensor(self.subset)[places]

    @cached_property
    def starts(self) -> Tensor | None:
        """Latents of real images of the samples' classes [N, C, H, W]."""
        if self.strength is None:
            return None
        images = self.zoo.real_images(self.subset)
        by_class = {label: [one.image for one in images if one.class_index == label] for label in self.subset}
        chosen = [by_class[int(label)][place // len(self.names)] for place, label in enumerate(self.labels)]
        pixels = torch.stack([torch.tensor(list(image.getdata())).reshape(*image.size, 3) for image in chosen])
        with torch.no_grad():
            return self.zoo.pipeline.encode_images(pixels.permute(0, 3, 1, 2).float() / 255).float()

    def made_by(self, arm: Arm) -> tuple[Tensor, float]:
        """Images of an arm [N, 3, H, W] in [0, 1], as 8 bits hold them, and CPU seconds a sample."""
        began = time.process_time()
        images = [self._batch(arm, slice(at, min(at + BATCH, self.count))) for at in range(0, self.count, BATCH)]
        return (torch.cat(images) * 255).round() / 255, (time.process_time() - began) / self.count

    def _batch(self, arm: Arm, part: slice) -> Tensor:
        pipeline, labels = self.zoo.pipeline, self.labels[part]
        is_joint = self.method == "boundary"
        prompts = [" and ".join(self.names) if is_joint else f"a photo of a {self._name(label)}" for label in labels]
        sampler = pipeline.sampler(self.sampling)
        noise = pipeline.draw_noise([self.first_seed + place for place in range(self.count)[part]])["latents"]
        denoiser = pipeline.denoiser(prompts, self.sampling, sampler, None)
        scene = GuidanceScene(
            logits=self.zoo.target.logits,
            conformity=_unused,
            raw_conformity=_unused,
            decoding=pipeline.decoder.decoding(pipeline.latent_shape, "float32"),
            labels=labels,
            classes=tuple(self.subset if is_joint else (int(label),) for label in labels),
        )
        start = None if self.starts is None else Start(latents=self.starts[part], strength=self.strength or 0.0)
        latents = sample(arm(self, denoiser, scene, sampler), sampler, noise, start)
        with torch.no_grad():
            return pipeline.decode(latents).clamp(0, 1)

    def _name(self, label: Tensor) -> str:
        return self.zoo.target.labels[int(label)]


def _unused(images: Tensor, labels: Tensor) -> Tensor:
    raise NotImplementedError("no arm measures conformity")
