"""An encoder that is not trained: principal components of 4 x 4 patches, in the weights of an `AutoencoderKL`.

Its latents are known before any training, so UNet and decoder can be trained side by side on them.

How a residual network is made linear: every residual branch ends in zeros, two strided convolutions gather the patch,
and the last norm and activation are undone. The norm divides by a spread that a pair of large constants decides; each
signal is carried with both signs, so that its group has mean zero and `silu(x) - silu(-x) = x` undoes the activation.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from torch import Tensor, nn

PATCH = 4
_CARRIER = 256.0
_GROUP = 8
_SIGNALS_PER_GROUP = 3
_LOG_VARIANCE = -12.0


@dataclass(frozen=True, slots=True)
class PatchComponents:
    """`latents = (patch - mean) @ matrix`, for patches in -1..1 flattened as [row, column, colour].

    Attributes:
        mean: [48].
        matrix: [48, C].
    """

    mean: NDArray[np.float64]
    matrix: NDArray[np.float64]

    @classmethod
    def fit(cls, images: NDArray[np.uint8], num_components: int, whitening: float) -> PatchComponents:
        """The first components of the patches of byte images [N, 32, 32, 3], with unit deviation over all latents.

        `whitening` is the share of a component's deviation that scaling takes away: 0 leaves latents as uneven as the
        patches, 1 whitens them.
        """
        count, side = len(images), images.shape[1] // PATCH
        split = (images / 127.5 - 1).reshape(count, side, PATCH, side, PATCH, 3)
        patches = split.transpose(0, 1, 3, 2, 4, 5).reshape(-1, PATCH * PATCH * 3)
        mean = patches.mean(0)
        variances, vectors = np.linalg.eigh(np.cov(patches - mean, rowvar=False))
        deviations = np.sqrt(variances[::-1][:num_components])
        scales = deviations**-whitening
        # The sign of a component is arbitrary: the largest entry is positive.
        chosen = vectors[:, ::-1][:, :num_components]
        chosen = chosen * np.sign(chosen[np.abs(chosen).argmax(0), np.arange(num_components)])
        return cls(mean, chosen * scales / np.sqrt(np.mean((deviations * scales) ** 2)))


@torch.no_grad()
def write_encoder(model: AutoencoderKL, components: PatchComponents) -> None:
    """Make `model.encode` compute the components; the posterior's deviation becomes exp(-6).

    Raises:
        ValueError: the widths of the model do not hold the components.
    """
    encoder, num_latents = model.encoder, components.matrix.shape[1]
    widths = [block.resnets[0].conv2.out_channels for block in encoder.down_blocks]
    if widths[0] < 3 * 4 or widths[1] < num_latents or num_latents * _GROUP > widths[2] * _SIGNALS_PER_GROUP:
        raise ValueError(f"widths {widths} do not hold {num_latents} components")
    for parameter in encoder.parameters():
        parameter.zero_()
    _pass_on(encoder.conv_in, np.eye(3), centre=True)
    for block, size in zip(encoder.down_blocks, (12, 12, num_latents), strict=True):
        if block.resnets[0].conv_shortcut is not None:
            _pass_on(block.resnets[0].conv_shortcut, np.eye(size))
    # 2 x 2 pixels to 12 channels, ordered [row, column, colour]; then 2 x 2 of those to the components.
    gather, first = encoder.down_blocks[0].downsamplers[0].conv, np.zeros((12, 3, 2, 2))
    for place in range(12):
        first[place, place % 3, place // 6, place // 3 % 2] = 1
    gather.weight[:12, :3, :2, :2] = torch.from_numpy(first)
    matrix = components.matrix.reshape(2, 2, 2, 2, 3, num_latents)  # coarse row, fine row, coarse column, fine column
    second = matrix.transpose(5, 1, 3, 4, 0, 2).reshape(num_latents, 12, 2, 2)
    project = encoder.down_blocks[1].downsamplers[0].conv
    project.weight[:num_latents, :12, :2, :2] = torch.from_numpy(second)
    project.bias[:num_latents] = torch.from_numpy(-components.mean @ components.matrix)
    _undo_norm_and_activation(model, num_latents)


def _pass_on(conv: nn.Conv2d, matrix: NDArray[np.float64], *, centre: bool = False) -> None:
    out, into = matrix.shape
    place = conv.kernel_size[0] // 2 if centre else 0
    conv.weight[:out, :into, place, place] = torch.from_numpy(matrix).float()


def _undo_norm_and_activation(model: AutoencoderKL, num_latents: int) -> None:
    """Spread the signals over the norm's groups, and collect them behind the activation."""
    encoder = model.encoder
    spread: Tensor = encoder.down_blocks[2].resnets[0].conv_shortcut.weight
    carriers: Tensor = encoder.down_blocks[2].resnets[0].conv_shortcut.bias
    spread.zero_()
    middle = encoder.conv_out.kernel_size[0] // 2
    for signal in range(num_latents):
        place = signal // _SIGNALS_PER_GROUP * _GROUP + 2 * (signal % _SIGNALS_PER_GROUP)
        for offset, sign in ((0, 1.0), (1, -1.0)):
            spread[place + offset, signal] = sign
            encoder.conv_out.weight[signal, place + offset, middle, middle] = sign
    carriers[_GROUP - 2 :: _GROUP], carriers[_GROUP - 1 :: _GROUP] = _CARRIER, -_CARRIER
    # The spread of a group of eight with the two carriers.
    encoder.conv_norm_out.weight.fill_(_CARRIER / 2)
    encoder.conv_out.bias[num_latents:] = _LOG_VARIANCE
    quantise = model.quant_conv
    quantise.weight.copy_(torch.eye(2 * num_latents)[:, :, None, None])
    quantise.bias.zero_()
