"""The CIFAR-10 ResNets of others: they have taught no model of the zoo, and the ResNet-32 referees its figures."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from training import batches

sys.path.append(str(Path(__file__).parents[1]))
from targets.cifar_resnets import SETTINGS, WEIGHTS, load

__all__ = ["WEIGHTS", "ResidualNetwork"]


class ResidualNetwork:
    """Feature maps and logits of a ResNet, frozen.

    Args:
        name: `resnet20` or `resnet32`.
        data_folder: holds `classifiers/`.
        device: of torch.
    """

    def __init__(self, name: str, data_folder: Path, device: str) -> None:
        self._network = load(name, data_folder).requires_grad_(False).to(device)
        self._mean, self._std = (
            torch.tensor(SETTINGS[key], device=device)[None, :, None, None] for key in ("mean", "std")
        )

    def features(self, images: Tensor) -> tuple[list[Tensor], Tensor]:
        """Feature maps of the three stages, and the logits, of images [N, 3, 32, 32] in -1..1."""
        network, maps = self._network, []
        value = F.relu(network.bn1(network.conv1((images / 2 + 0.5 - self._mean) / self._std)))
        for stage in (network.layer1, network.layer2, network.layer3):
            value = stage(value)
            maps.append(value)
        return maps, network.linear(value.mean(dim=(2, 3)))

    @torch.no_grad()
    def read(self, images: NDArray[np.uint8]) -> tuple[Tensor, NDArray[np.int64]]:
        """Pooled features [N, 64] and classes [N] of byte images [N, 32, 32, 3]."""
        pooled, classes = [], []
        for part in batches(len(images), 250):
            maps, logits = self.features(torch.from_numpy(images[part]).permute(0, 3, 1, 2).float() / 127.5 - 1)
            pooled.append(maps[-1].mean(dim=(2, 3)))
            classes.append(logits.argmax(-1))
        return torch.cat(pooled), torch.cat(classes).numpy()
