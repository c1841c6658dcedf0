"""The arithmetic that an arm cannot do without, counted on the models' configurations; no weights, no memory.

A multiplication and an addition are two operations. Counted are matrix products, convolutions and attention; norms and
activations are not arithmetic worth counting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForImageClassification, CLIPModel

from engine.models.configurations import read_config
from engine.models.preprocessing import Preprocessing

META = "meta"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """Operations of a single sample.

    Attributes:
        unet: a forward pass.
        unet_backward: from the output to the latents, after such a pass.
        decode: a forward pass of the decoder that makes the stored image.
        guide_decode: a forward pass of the decoder that guidance looks through.
        guide_decode_backward: from the image to the latents.
        target: forward and backward of the classifier.
        clip: forward and backward of CLIP's image half.
    """

    unet: int
    unet_backward: int
    decode: int
    guide_decode: int
    guide_decode_backward: int
    target: int
    clip: int

    def prompt(self, num_steps: int) -> int:
        """An image from the prompt alone, both halves of classifier-free guidance at every step."""
        return num_steps * 2 * self.unet + self.decode

    def guided(
        self,
        num_steps: int,
        num_guided: int,
        *,
        through_unet: bool = False,
        uses_clip: bool = False,
        num_criteria: int = 1,
    ) -> int:
        """An image with guidance at so many steps; the conditional half of a step serves its gradient too.

        Args:
            num_criteria: gradients that the step rule needs separately; each is a backward pass of its own.
        """
        through = self.unet_backward if through_unet else 0
        backward = num_criteria * (self.guide_decode_backward + through)
        scores = self.target + (self.clip if uses_clip else 0)
        return self.prompt(num_steps) + num_guided * (self.guide_decode + backward + scores)


def count_arithmetic(diffusion: Path, target: Path, clip: Path) -> Arithmetic:
    """Count the models in some folders."""
    unet = on_meta(lambda: UNet2DConditionModel.from_config(read_config(diffusion / "unet" / "config.json")))
    vae = on_meta(lambda: AutoencoderKL.from_config(read_config(diffusion / "vae" / "config.json")))
    text = read_config(diffusion / "text_encoder" / "config.json")
    counted = count_pipeline(unet, vae, tokens=text["max_position_embeddings"], width=text["hidden_size"])
    classifier = on_meta(lambda: AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(target)))
    vision = on_meta(lambda: CLIPModel(AutoConfig.from_pretrained(clip))).vision_model
    return dataclasses.replace(
        counted,
        target=sum(_passes(lambda x: classifier(pixel_values=x).logits, _input(target))),
        clip=sum(_passes(lambda x: vision(pixel_values=x).pooler_output, _input(clip))),
    )


def behind_tiny(counted: Arithmetic, diffusion: Path, tiny: Path) -> Arithmetic:
    """The same where guidance looks through the `AutoencoderTiny` of a folder."""
    decoder = on_meta(lambda: AutoencoderTiny.from_config(read_config(tiny / "config.json")))
    config = read_config(diffusion / "unet" / "config.json")
    forward, backward = count_decoder(decoder, config["in_channels"], config["sample_size"])
    return dataclasses.replace(counted, guide_decode=forward, guide_decode_backward=backward)


def count_decoder(decoder: Any, channels: int, side: int) -> tuple[int, int]:
    """Operations of decoding latents [1, C, side, side], and of the backward pass to them."""
    return _passes(lambda z: decoder.decode(z).sample, torch.empty(1, channels, side, side, device=META))


def count_pipeline(unet: Any, vae: Any, *, tokens: int, width: int) -> Arithmetic:
    """Count UNet and decoder on the meta device; classifier and CLIP are left at zero.

    Args:
        tokens: length of a prompt.
        width: of a token's embedding.
    """
    text, time = torch.empty(1, tokens, width, device=META), torch.zeros(1, device=META)
    size = unet.config.projection_class_embeddings_input_dim
    labels = torch.empty(1, size, device=META) if size else None
    channels, side = unet.config.in_channels, unet.config.sample_size
    latents = torch.empty(1, channels, side, side, device=META)
    forward, backward = _passes(lambda z: unet(z, time, text, class_labels=labels).sample, latents)
    decode, decode_backward = count_decoder(vae, channels, side)
    return Arithmetic(
        unet=forward,
        unet_backward=backward,
        decode=decode,
        guide_decode=decode,
        guide_decode_backward=decode_backward,
        target=0,
        clip=0,
    )


def on_meta(build: Callable[[], Any]) -> Any:
    """A frozen module without weights."""
    with torch.device(META):
        return build().requires_grad_(False).eval()


def _input(folder: Path) -> Tensor:
    """What a model's preprocessing makes of an image."""
    return Preprocessing.load(folder).of_tensor(torch.zeros(1, 3, 256, 256)).to(META)


def _passes(call: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[int, int]:
    """Operations of a forward pass, and of the backward pass to its input."""
    leaf = inputs.requires_grad_(True)
    forward, both = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with forward, torch.no_grad():
        call(leaf)
    with both:
        # Times one: the counter cannot follow the gradient of a module's own input.
        torch.autograd.grad(call(leaf * 1).sum(), leaf)
    return forward.get_total_flops(), both.get_total_flops() - forward.get_total_flops()
