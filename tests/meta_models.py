"""Real architectures on the meta device: shapes without weights or arithmetic, sampled by the engine's own code.

Legend: B samples, C channels, h x w latent size.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from bench.sizes import ARCHITECTURES, NOISE
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from torch import Tensor, nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from engine.methods.boundary.guide import guide_to_boundary
from engine.methods.boundary.spec import BoundaryGuidanceSpec
from engine.methods.guidance.guided import GuidedDenoiser
from engine.methods.guidance.scene import Decoding, GuidanceScene
from engine.methods.sampling.denoiser import ClassifierFreeDenoiser, Condition, Step
from engine.methods.sampling.families import ModelScheduler
from engine.models.decoding import Decoder
from engine.models.hardware import Hardware
from engine.models.loading import frozen
from engine.models.memory_model import MAX_ELEMENTS, META, fused_attention
from engine.models.pipelines.stable_diffusion import TEXT, StableDiffusion

GIB = 2**30
# Models by the names of the configurations in tools/bench/sizes.py.
UNETS = {
    "sd1": ARCHITECTURES["sd1"].unet,
    "sd21": ARCHITECTURES["sd21-unclip"].unclip_unet,
}


def meta_hardware(dtype: str = "float16", memory_gib: float = 139, **options: Any) -> Hardware:
    """A GPU of so much memory, whose tensors have no content."""
    return Hardware(
        device=META,
        dtype=dtype,
        attention="sdpa",
        gradient_checkpointing=options.pop("gradient_checkpointing", "auto"),
        memory_bytes=int(memory_gib * GIB),
        **options,
    )


def meta_pipeline(size: str, pixels: int, hardware: Hardware) -> StableDiffusion:
    """A pipeline of Stable Diffusion's size for images of so many pixels a side."""
    with torch.device(META):
        unet = UNet2DConditionModel(**(UNETS[size] or {}) | {"sample_size": pixels // 8})
        vae = AutoencoderKL(**ARCHITECTURES["sd1"].vae)
    text_encoder = nn.Module()
    text_encoder.config = SimpleNamespace()  # type: ignore[assignment]
    return StableDiffusion(
        network=nn.Module.to(unet, getattr(torch, hardware.dtype)),
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=None,
        scheduler=ModelScheduler(config=NOISE, name="DDIMScheduler"),
        hardware=hardware,
        folder=Path(),
        safety_checker=None,
    )


@functools.cache
def known_pipeline(size: str, pixels: int, dtype: str) -> StableDiffusion:
    """The same on one GPU with default settings, built once."""
    return meta_pipeline(size, pixels, meta_hardware(dtype))


def full_decoder(hardware: Hardware) -> Decoder:
    """The decoder of Stable Diffusion."""
    with torch.device(META):
        return Decoder(frozen(AutoencoderKL(**ARCHITECTURES["sd1"].vae), META), hardware)


def tiny_decoder(hardware: Hardware) -> Decoder:
    """A tiny decoder of TAESD's size."""
    with torch.device(META):
        return Decoder(frozen(AutoencoderTiny(), META), hardware)


def meta_denoiser(model: StableDiffusion, rows: int) -> ClassifierFreeDenoiser:
    """Its denoiser for prompts of the usual length."""
    width, dtype = model._network.config.cross_attention_dim, model._network.dtype
    condition = Condition({TEXT: torch.empty(rows, 77, width, dtype=dtype, device=META)})
    return ClassifierFreeDenoiser(
        model.predict, conditional=condition, unconditional=condition, prediction="epsilon", guidance_scale=6.0
    )


def meta_guided(
    model: StableDiffusion, rows: int, decoding: Decoding, gradient: str, logits: Callable[[Tensor], Tensor]
) -> GuidedDenoiser:
    """Guidance to a boundary around it, at every step."""
    scene = GuidanceScene(
        logits=logits,
        conformity=lambda images, labels: images.mean((1, 2, 3)),
        raw_conformity=lambda images, labels: images.mean((1, 2, 3)),
        decoding=decoding,
        labels=torch.zeros(rows, dtype=torch.long, device=META),
        classes=((0, 1),) * rows,
    )
    spec = BoundaryGuidanceSpec.model_validate({"every": 1, "gradient": gradient})
    return guide_to_boundary(meta_denoiser(model, rows), spec, scene)


def channel_means(images: Tensor) -> Tensor:
    """The logits of a target that costs nothing, [B, 3]."""
    return images.mean((2, 3))


def meta_latents(model: StableDiffusion, rows: int) -> Tensor:
    """Latents [B, C, h, w] of a batch."""
    return torch.empty(rows, *model.latent_shape, device=META)


def middle_step() -> Step:
    """A guided step."""
    return Step(index=20, total=40, timestep=torch.tensor(500.0), scale=0.6, sigma=0.8, normalise_input=False)


@contextlib.contextmanager
def attention_of_a_gpu() -> Iterator[None]:
    """Fused attention on `meta`, also where a backward pass recomputes it, which a mode of torch does not reach."""
    with mock.patch.object(functional, "scaled_dot_product_attention", fused_attention):
        yield


class TooLargeError(Exception):
    """A tensor that kernels of CUDA cannot index."""


class IndexGuard(TorchDispatchMode):
    """Fails on any tensor of an operator, forward or backward, that has more elements than 32 bits can index.

    Reading a value, which meta tensors do not have, gives False or zeros: the engine's code runs as it is.

    Attributes:
        calls: how often each operator was called.
        largest: elements of the largest tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[str, int] = {}
        self.largest = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = str(operator)
        self.calls[name] = self.calls.get(name, 0) + 1
        if operator is torch.ops.aten._local_scalar_dense.default and args[0].is_meta:
            return False
        if operator is torch.ops.aten._to_copy.default and args[0].is_meta and str(kwargs.get("device")) == "cpu":
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        results = operator(*args, **kwargs)
        for tensor in (*_tensors(args), *_tensors((results,))):
            self.largest = max(self.largest, tensor.numel())
            if tensor.numel() > MAX_ELEMENTS:
                raise TooLargeError(f"{name}: {list(tensor.shape)} has {tensor.numel()} elements")
        return results


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of what operators made and nobody has let go of.

    Attributes:
        peak: the most at any time.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = operator(*args, **(kwargs or {}))
        for tensor in _tensors((results,)):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._alive:
                self._alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self._alive.pop, storage._cdata)
        self.peak = max(self.peak, sum(self._alive.values()))
        return results


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
    return found
