"""What all of conditioning asks of its inputs, and how it derives its seeds.

Shapes, here and beside: N images, n classes, d embedding entries, K mixture components.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

# Below this share of the largest entry of the mean, a spread is rounding: the images are all alike.
_ALIKE = 1e-6


def check_embeddings(embeds: Tensor, classes: Tensor, labels: Sequence[str]) -> None:
    """Check raw image embeddings [N, d] and their class indices [N].

    Raises:
        ValueError: shapes disagree, an index is not a class, or an embedding is not finite (naming its class).
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
    """A class in words: `class 3 ('three')`.

    Raises:
        ValueError: there is no such class.
    """
    if not 0 <= index < len(labels):
        raise ValueError(f"class {index} is not among the {len(labels)} classes of these statistics")
    return f"class {index} ('{labels[index]}')"


def check_spread(labels: Sequence[str], index: int, count: int, mean: Tensor, std: Tensor) -> None:
    """Check that a class has a distribution to draw from; mean and std [..., d].

    Raises:
        ValueError: naming the class: it has no image, one image, or images that are all alike.
    """
    name = class_text(labels, index)
    if count < 2:
        found = "one image" if count else "no image"
        raise ValueError(f"{name} has {found}, and a spread needs two or more; add validation images")
    if std.max() <= _ALIKE * mean.abs().max():
        raise ValueError(f"{name}: its {count} images are all alike and have no spread; add different ones")


def check_kind(state: dict[str, Any], kind: str) -> None:
    """Check what a state is the state of.

    Raises:
        ValueError: it is of something else.
    """
    if state.get("kind") != kind:
        raise ValueError(f"state of a {state.get('kind', 'thing without a kind')!r}, where a {kind!r} is expected")


def derived_seed(seed: int, purpose: str) -> int:
    """A seed below 2^32 for another stream of the same sample or job: equal in every process, unlike by purpose."""
    # Four bytes: numpy takes no more, and torch's CPU generator ignores what is above them.
    digest = hashlib.blake2b(f"{purpose}:{seed}".encode(), digest_size=4).digest()
    return int.from_bytes(digest)
