"""The arithmetic of a sample, counted on the models' configurations; no weights, no memory.

A multiplication and an addition are two operations. Counted are matrix products, convolutions and attention; norms and
activations are not arithmetic worth counting.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from engine.models.configurations import read_config
from engine.models.pipelines.lookup import family_of

META = "meta"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arithmetic:
    """Operations of a single sample.

    Attributes:
        unet: a forward pass of the network that denoises, a UNet in most families.
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

    @property
    def decoder_gradient(self) -> int:
        """Forward and backward of the decoder that guidance looks through."""
        return self.guide_decode + self.guide_decode_backward

    def prompt(self, num_steps: int, num_halves: int = 2) -> int:
        """An image from the prompt alone.

        Args:
            num_halves: of classifier-free guidance at every step; 1 where it is off.
        """
        return num_steps * num_halves * self.unet + self.decode

    def guided(
        self,
        num_steps: int,
        num_guided: int,
        *,
        num_through_unet: int = 0,
        uses_clip: bool = False,
        num_criteria: int = 1,
        num_halves: int = 2,
    ) -> int:
        """An image with guidance at so many steps; the conditional half of a step serves its gradient too.

        Args:
            num_through_unet: of these steps, those whose gradient passes through the UNet.
            num_criteria: gradients that the step rule needs separately; each is a backward pass of its own.
            num_halves: as for `prompt`.
        """
        backward = num_criteria * (num_guided * self.guide_decode_backward + num_through_unet * self.unet_backward)
        scores = self.target + (self.clip if uses_clip else 0)
        return self.prompt(num_steps, num_halves) + num_guided * (self.guide_decode + scores) + backward


def count_folder(diffusion: Path, latents: tuple[int, int] | None = None) -> Arithmetic | None:
    """Count a pipeline in a folder; classifier and CLIP are left at zero.

    Args:
        latents: height and width of the latents; those of the model's own size where not given.

    Returns:
        None for a family whose network is not counted.
    """
    with torch.device(META):
        network = family_of(diffusion, str(diffusion)).bare_network(diffusion)
    if network is None:
        return None
    vae = on_meta(lambda: AutoencoderKL.from_config(read_config(diffusion / "vae" / "config.json")))
    return count_pipeline(network, vae, _latents(*_latent_shape(diffusion, latents)))


def behind_tiny(
    counted: Arithmetic, diffusion: Path, tiny: dict[str, Any], latents: tuple[int, int] | None = None
) -> Arithmetic:
    """The same where guidance looks through an `AutoencoderTiny`.

    Args:
        diffusion: folder of the pipeline, which has the size of the latents.
        tiny: configuration of the decoder.
        latents: as in `count_folder`.
    """
    channels, *size = _latent_shape(diffusion, latents)
    forward, backward = count_decoder(on_meta(lambda: AutoencoderTiny.from_config(tiny)), channels, size)
    return dataclasses.replace(counted, guide_decode=forward, guide_decode_backward=backward)


def _latent_shape(diffusion: Path, size: tuple[int, int] | None) -> tuple[int, int, int]:
    """Channels, height and width of the latents of a pipeline in a folder, of its own size where none is given."""
    family = family_of(diffusion, str(diffusion))
    space, (height, width) = family.latent_space(diffusion), family.image_size(diffusion)
    own = height // space.pixels_per_latent, width // space.pixels_per_latent
    return space.channels, *(size or own)


def count_decoder(decoder: Any, channels: int, size: int | Sequence[int]) -> tuple[int, int]:
    """Operations of decoding latents [1, C, H, W], and of the backward pass to them; one number is of both sides."""
    height, width = (size, size) if isinstance(size, int) else size
    return passes(lambda z: decoder.decode(z).sample, _latents(channels, height, width))


def _latents(channels: int, height: int, width: int) -> Tensor:
    return torch.empty(1, channels, height, width, device=META)


def count_pipeline(network: Callable[[Tensor], Tensor], vae: Any, latents: Tensor) -> Arithmetic:
    """Count network and decoder on the meta device; classifier and CLIP are left at zero.

    Args:
        network: a forward pass, of latents alone.
        latents: [1, C, h, w].
    """
    forward, backward = passes(network, latents)
    decode, decode_backward = count_decoder(vae, latents.shape[1], latents.shape[2:])
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


def passes(call: Callable[[Tensor], Tensor], inputs: Tensor) -> tuple[int, int]:
    """Operations of a forward pass, and of the backward pass to its input."""
    leaf = inputs.requires_grad_(True)
    forward, both = FlopCounterMode(display=False), FlopCounterMode(display=False)
    with forward, torch.no_grad():
        call(leaf)
    with both:
        # Times one: the counter cannot follow the gradient of a module's own input.
        torch.autograd.grad(call(leaf * 1).sum(), leaf)
    return forward.get_total_flops(), both.get_total_flops() - forward.get_total_flops()
