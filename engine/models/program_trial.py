"""The trial of a network from a file or factory: are its outputs logits, and does the image alone decide them?"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from engine.errors import JobError
from engine.methods.custom.criterion import same_values
from engine.models.factories import reason_of
from engine.models.program_settings import TargetSettings
from engine.models.randomness import watched

# Sizes of batches: one, and a size that no export is made for.
_PROBE_ROWS = (1, 3)

Network = Callable[[Tensor], Tensor]


@torch.no_grad()
def check_outputs(network: Network, settings: TargetSettings, address: str, device: str) -> None:
    """Check that a network gives logits that are determined by the image, on black and on random images.

    Raises:
        JobError: it fails, its output is not [B, n] finite logits, or something else than the image affects them.
    """
    height, width = settings.shape
    for rows in _PROBE_ROWS:
        _check_shape(network, torch.zeros(rows, 3, height, width, device=device), len(settings.labels), address)
    try:
        problem = _output_problem(network, _probes(height, width, device))
    except Exception as error:
        raise JobError(f"'{address}' fails on random images: {reason_of(error)}; it must take any image") from error
    if problem:
        raise JobError(f"'{address}' {problem}")


def _check_shape(network: Network, images: Tensor, num_classes: int, address: str) -> None:
    """Check that a network gives finite numbers [B, n] for images [B, 3, h, w]."""
    rows = len(images)
    try:
        output = network(images)
    except (Exception, SystemExit) as error:
        raise JobError(
            f"'{address}' fails on a batch of {rows} images, {list(images.shape)}: {reason_of(error)}; image_size must"
            " be what it takes, and the size of a batch free (torch.export: dynamic_shapes with a Dim for it)"
        ) from error
    if not isinstance(output, Tensor) or output.shape != (rows, num_classes):
        what = list(output.shape) if isinstance(output, Tensor) else type_name(output)
        raise JobError(
            f"'{address}' gives {what} for {rows} images where [{rows}, {num_classes}] is expected;"
            f" {_shape_remedy(output, rows, num_classes)}"
        )
    if not output.isfinite().all():
        raise JobError(f"'{address}' gives values that are not finite for black images; replace its weights")


def _shape_remedy(output: Any, rows: int, num_classes: int) -> str:
    """What to return in place of an output of the wrong shape."""
    if isinstance(output, Tensor) and output.shape in ((rows,), (rows, 1)) and num_classes == 2:
        return 'a single logit z of two classes, which is the pair of logits [0, z]: set "output": "logit"'
    return f"return logits alone, a column for each of the {num_classes} names in labels"


def _probes(height: int, width: int, device: str) -> Tensor:
    """The same random images [8, 3, h, w] in every call; every second has extreme contrast, for large logits."""
    noise = torch.randn(8, 3, height, width, generator=torch.Generator().manual_seed(0))
    return (noise * torch.tensor([1.0, 100.0]).repeat(4).reshape(8, 1, 1, 1)).to(device)


def _output_problem(network: Network, images: Tensor) -> str | None:
    """Why the outputs of a network are not logits that each image determines by itself, or None."""
    output, drawn = watched(lambda: network(images))
    if drawn or not same_values(output, network(images)):
        what = f"draws random numbers ({', '.join(drawn)})" if drawn else "gives other values for equal images"
        return (
            f"{what}; logits must be determined by the image alone: switch dropout off (export in evaluation mode),"
            " draw nothing, and keep nothing between calls"
        )
    return _probability_problem(output) or _batch_problem(network, images, output)


def _probability_problem(output: Tensor) -> str | None:
    """Why outputs [B, n] are probabilities and not logits, or None."""
    values = output[output.isfinite().all(1)]
    if not len(values) or (values < 0).any() or (values > 1).any():
        return None
    sums_to_one = torch.allclose(values.float().sum(1), torch.ones(len(values), device=values.device), atol=1e-3)
    kind, layer = ("", "softmax") if sums_to_one else (" of independent classes", "sigmoid")
    return f"gives probabilities{kind}; return logits, as they are before the {layer}"


def _batch_problem(network: Network, images: Tensor, output: Tensor) -> str | None:
    """Why the output for an image depends on the other images of its batch, or None."""
    # Those of extreme contrast have rounding errors that are too large to be compared.
    alone, together = torch.cat([network(image[None]) for image in images[::2]]), output[::2]
    largest = float(together.nan_to_num(0, 0, 0).abs().max())
    if torch.allclose(alone, together, rtol=1e-2, atol=1e-2 * largest, equal_nan=True):
        return None
    return (
        "gives an image other logits in another batch; each must be computed by itself: export in evaluation mode (a"
        " batch normalisation in training mode takes its statistics from the batch)"
    )


def type_name(value: Any) -> str:
    """The type of a value, for messages: `a Tensor`; `nothing` for None."""
    return f"a {type(value).__name__}" if value is not None else "nothing"
