"""Low-rank updates of attention projections (Hu et al. 2021, LoRA): W + scale * up @ down.

The update is added to a projection's output, so that neither the weights nor the names of the network change while it
is trained; `merge` adds it to the weights at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from engine.errors import JobError

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")
ADAPTER_FILE = "pytorch_lora_weights.safetensors"


class LowRankUpdate(nn.Module):
    """The update of a projection of d_in to d_out entries.

    Attributes:
        down: [rank, d_in], drawn as a linear layer's weights are.
        up: [d_out, rank], zero at first, so that training starts from the parent.
    """

    def __init__(self, weight: Tensor, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        num_outputs, num_inputs = weight.shape
        bound = 1 / math.sqrt(num_inputs)
        drawn = torch.rand(rank, num_inputs, generator=generator)
        self.down = nn.Parameter(((2 * drawn - 1) * bound).to(weight.device))
        self.up = nn.Parameter(torch.zeros(num_outputs, rank, device=weight.device))
        self.scale = scale

    def forward(self, inputs: Tensor) -> Tensor:
        """What is added to the projection of inputs [..., d_in]."""
        return self.scale * linear(linear(inputs, self.down), self.up)

    @property
    def delta(self) -> Tensor:
        """What is added to the weight, [d_out, d_in]."""
        return self.scale * self.up @ self.down


class Adapter(nn.Module):
    """Updates of all attention projections of a network, which is frozen.

    Side effects: the network's projections add their updates to their outputs until `merge`.

    Args:
        network: of diffusers.
        rank: see `check_rank`.
        generator: of the numbers that `down` starts with, on the CPU.
    """

    def __init__(self, network: nn.Module, *, rank: int, scale: float, generator: torch.Generator) -> None:
        super().__init__()
        targets = {
            name: module
            for name, module in network.named_modules()
            if isinstance(module, nn.Linear) and is_projection(f"{name}.weight")
        }
        self._updated = [
            (name, module, LowRankUpdate(module.weight, rank, scale, generator)) for name, module in targets.items()
        ]
        # Names of modules have no dots: the parameters are numbered.
        self.updates = nn.ModuleList(update for _, _, update in self._updated)
        self._hooks = [module.register_forward_hook(_adding(update)) for _, module, update in self._updated]

    @torch.no_grad()
    def merge(self) -> None:
        """Add the updates to the network's weights, once."""
        for hook in self._hooks:
            hook.remove()
        for _, module, update in self._updated:
            module.weight += update.delta

    def tensors(self, part: str) -> dict[str, Tensor]:
        """The updates by the keys that diffusers loads, with the scale in the `up` matrix: alpha is the rank.

        Args:
            part: of the pipeline: the network.
        """
        tensors = {}
        for name, _, update in self._updated:
            tensors[f"{part}.{name}.lora_A.weight"] = update.down.detach().cpu().contiguous()
            tensors[f"{part}.{name}.lora_B.weight"] = (update.scale * update.up.detach()).cpu().contiguous()
        return tensors


def is_projection(name: str) -> bool:
    """Whether a weight, by its name, is that of an attention projection."""
    return any(name.endswith(f".{projection}.weight") for projection in PROJECTIONS)


def check_rank(rank: int, shapes: Mapping[str, tuple[int, ...]], address: str) -> None:
    """Check a rank against the shapes of a network's weights by name.

    Raises:
        JobError: there is no projection to update, or the smallest one has no such rank.
    """
    sides = [min(shape) for name, shape in shapes.items() if is_projection(name)]
    if not sides:
        raise JobError(
            f"training.lora_rank: '{address}' has no attention projections ({', '.join(PROJECTIONS)}); leave it out to"
            " train the whole network"
        )
    if rank > min(sides):
        raise JobError(
            f"training.lora_rank: {rank} is above {min(sides)}, the rank of the smallest attention projection of"
            f" '{address}'; give {min(sides)} or less, or leave it out to train the whole network"
        )


def _adding(update: LowRankUpdate) -> Any:
    def hook(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output + update(inputs[0])

    return hook
