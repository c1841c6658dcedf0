"""Scenes of guidance for tests: what guides ask about a batch, from functions of the test's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from engine.methods.guidance.scene import Decoding, GuidanceScene


def unused(*values: Tensor) -> Tensor:
    """What the guide under test has no reason to call."""
    raise AssertionError("called")


def scene_of(
    classes: Sequence[tuple[int, ...]],
    logits: Callable[[Tensor], Tensor],
    decode: Callable[[Tensor], Tensor] = unused,
    conformity: Callable[[Tensor, Tensor], Tensor] = unused,
    raw_conformity: Callable[[Tensor, Tensor], Tensor] = unused,
    slice_rows: int | None = None,
    **ensemble: Any,
) -> GuidanceScene:
    """The scene of samples of these classes."""
    return GuidanceScene(
        logits=logits,
        conformity=conformity,
        raw_conformity=raw_conformity,
        decoding=Decoding(decode=decode, slice_rows=slice_rows),
        labels=torch.tensor([subset[0] for subset in classes]),
        classes=tuple(classes),
        **ensemble,
    )
