"""Checks of the inputs and stored states of conditioning.

Shapes, in all of `conditioning`: N images, n classes, d embedding entries, K mixture components.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# A spread below this share of the largest entry of the mean is rounding error: the images are identical.
_ALIKE = 1e-6


def check_embeddings(embeds: Tensor, classes: Tensor, labels: Sequence[str]) -> None:
    """Check raw image embeddings [N, d] and their class indices [N].

    Raises:
        ValueError: shapes disagree, an index is not a class, or an embedding is not finite; the last
            message names the class.
    """
    if embeds.ndim != 2 or classes.shape != embeds.shape[:1]:
        raise ValueError(f"embeds {list(embeds.shape)}, classes {list(classes.shape)}: [N, d] and [N] are expected")
    if classes.is_floating_point() or classes.dtype == torch.bool:
        raise ValueError(f"classes: {classes.dtype} are not class indices; give integers")
    for index in classes.unique().tolist():
        name = class_text(labels, index)
        if bad := int((~torch.isfinite(embeds[classes == index]).all(1)).sum()):
            raise ValueError(f"{name}: {bad} embeddings are not finite; run the image encoder in fp32")


def class_text(labels: Sequence[str], index: int) -> str:
    """A class for messages: `class 3 ('three')`.

    Raises:
        ValueError: there is no such class.
    """
    if not 0 <= index < len(labels):
        raise ValueError(f"class {index} is not among the {len(labels)} classes of these statistics")
    return f"class {index} ('{labels[index]}')"


def check_spread(labels: Sequence[str], index: int, count: int, mean: Tensor, std: Tensor) -> None:
    """Check that a class has a distribution to draw from; mean and std [..., d].

    Raises:
        ValueError: the class has no image, one image, or identical images; the message names it.
    """
    name = class_text(labels, index)
    if count < 2:
        images = "one image" if count else "no image"
        raise ValueError(f"{name} has {images}, and a spread needs two or more; add validation images")
    if std.max() <= _ALIKE * mean.abs().max():
        raise ValueError(f"{name}: its {count} images are all alike and have no spread; add different ones")


def check_kind(state: dict[str, Any], kind: str) -> None:
    """Check that a stored state is of the kind that is expected.

    Raises:
        ValueError: it is of another kind.
    """
    if state.get("kind") != kind:
        raise ValueError(f"state of a {state.get('kind', 'thing without a kind')!r}, where a {kind!r} is expected")
