"""The trial of a network from a file or factory: are its outputs logits, and does the image alone decide them?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.errors import JobError
from engine.methods.custom.guide import same_values
from engine.models.factories import reason_of
from engine.models.program_settings import TargetSettings
from engine.models.randomness import watched

# One row alone, and a number that nobody exports for.
PROBE_ROWS = (1, 3)

Network = Callable[[Tensor], Tensor]


@torch.no_grad()
def check_outputs(network: Network, settings: TargetSettings, address: str, device: str) -> None:
    """Show images to a network: black ones, then random ones: are they logits, and decided by the image?

    Raises:
        JobError: it fails, its output is not [B, n] finite logits, or an image's logits are not decided by the image.
    """
    num_classes, (height, width) = len(settings.labels), settings.shape
    for rows in PROBE_ROWS:
        images = torch.zeros(rows, 3, height, width, device=device)
        try:
            output = network(images)
        except (Exception, SystemExit) as error:
            raise JobError(
                f"'{address}' fails on a batch of {rows} images, {list(images.shape)}: {reason_of(error)}; image_size"
                " must be what it takes, and the size of a batch free (torch.export: dynamic_shapes with a Dim for it)"
            ) from error
        if not isinstance(output, Tensor) or output.shape != (rows, num_classes):
            what = list(output.shape) if isinstance(output, Tensor) else type_name(output)
            raise JobError(
                f"'{address}' gives {what} for {rows} images where [{rows}, {num_classes}] is expected;"
                f" {_shape_remedy(output, rows, num_classes)}"
            )
        if not output.isfinite().all():
            raise JobError(f"'{address}' gives values that are not finite for black images; replace its weights")
    try:
        problem = _chance_problem(network, _probes(height, width, device))
    except Exception as error:
        raise JobError(f"'{address}' fails on random images: {reason_of(error)}; it must take any image") from error
    if problem:
        raise JobError(f"'{address}' {problem}")


def _shape_remedy(output: Any, rows: int, num_classes: int) -> str:
    """What to return where the shape of an output is another."""
    if isinstance(output, Tensor) and output.shape in ((rows,), (rows, 1)) and num_classes == 2:
        return "a single logit z of two classes is the pair of logits [0, z]: return torch.stack([0 * z, z], 1)"
    return f"return logits alone, a column for each of the {num_classes} names in labels"


def _probes(height: int, width: int, device: str) -> Tensor:
    """Random images [8, 3, h, w], always the same; half of them beyond all contrast, where logits grow."""
    noise = torch.randn(8, 3, height, width, generator=torch.Generator().manual_seed(0))
    return (noise * torch.tensor([1.0, 100.0]).repeat(4).reshape(8, 1, 1, 1)).to(device)


def _chance_problem(network: Network, images: Tensor) -> str | None:
    """Why the outputs of a network are no logits that the images decide, or None."""
    output, drawn = watched(lambda: network(images))
    if drawn or not same_values(output, network(images)):
        what = f"draws random numbers ({', '.join(drawn)})" if drawn else "gives other values for equal images"
        return (
            f"{what}; logits must be decided by the image alone: switch dropout off (export in evaluation mode), draw"
            " nothing, and keep nothing between calls"
        )
    values = output[output.isfinite().all(1)]
    if len(values) and (values >= 0).all() and (values <= 1).all():
        sums_to_one = torch.allclose(values.float().sum(1), torch.ones(len(values), device=values.device), atol=1e-3)
        kind, layer = ("", "softmax") if sums_to_one else (" of independent classes", "sigmoid")
        return f"gives probabilities{kind}; return logits, as they are before the {layer}"
    # Those beyond all contrast round too much to be compared.
    alone, together = torch.cat([network(image[None]) for image in images[::2]]), output[::2]
    largest = float(together.nan_to_num(0, 0, 0).abs().max())
    if not torch.allclose(alone, together, rtol=1e-2, atol=1e-2 * largest, equal_nan=True):
        return (
            "gives an image other logits in another batch; each must be computed by itself: export in evaluation mode"
            " (a batch normalisation in training mode takes its statistics from the batch)"
        )
    return None


def type_name(value: Any) -> str:
    return f"a {type(value).__name__}" if value is not None else "nothing"
