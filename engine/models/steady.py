"""Convolutions on a CPU whose rows do not depend on how many others there are.

Kernels choose their order of summation by the shape. With one thread, torch gives convolutions of single pixels to
oneDNN from 16 rows on, and to another kernel below (`use_mkldnn` in ATen/native/Convolution.cpp); other operators of
diffusion models take rows by four, and leave a row's bytes equal from four rows on.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engine.models.hardware import CPU_ROWS


class SteadyConv2d(torch.nn.Conv2d):
    """A convolution of single pixels that fills short batches up to `CPU_ROWS`: they get the kernel of whole ones."""

    def forward(self, input: Tensor) -> Tensor:
        """Results [B, C, H, W] of [B, c, H, W]."""
        missing = CPU_ROWS - len(input)
        if missing <= 0 or input.ndim < 4:
            return super().forward(input)
        # `pad` keeps the layout, by which kernels are chosen too.
        filled = torch.nn.functional.pad(input, (0, 0, 0, 0, 0, 0, 0, missing))
        return super().forward(filled)[: len(input)]


def make_steady(model: Any) -> None:
    """Let a model's convolutions of single pixels compute a row of a short batch as one of `CPU_ROWS` rows or more.

    Side effects: their class is `SteadyConv2d`; weights and names stay.
    """
    for module in model.modules():
        if type(module) is torch.nn.Conv2d and module.kernel_size == module.stride == module.dilation == (1, 1):
            module.__class__ = SteadyConv2d
