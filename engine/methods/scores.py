"""The scores of a sample, each defined once: for guidance, metadata, tables and filters. Natural logarithms (nats).

Shapes: B samples, n classes, k classes of a subset, d embedding entries. All functions are differentiable, compute in
float32 or better, and stay exact for logits of +-1e4 (no probability is formed before its logarithm).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Classes = Sequence[int] | Tensor

# Of equal images, for which the ratio is infinite.
MAX_PSNR_DB = 100.0


def risk(logits: Tensor, labels: Tensor) -> Tensor:
    """Risk `-log p_y`, in [0, inf).

    Args:
        logits: [B, n], divided by the calibration temperature.
        labels: [B] class indices y.

    Raises:
        ValueError: a label in the memory of the host is not a class; on a GPU the kernel's own check is all.
    """
    _check_indices(labels, logits.shape[-1], "labels")
    # Subtracted from zero, as the negative of a zero would be stored as -0.0.
    return 0.0 - _log_softmax(logits).gather(-1, labels[:, None])[:, 0]


def kldb(logits: Tensor, classes: Classes) -> Tensor:
    """KL divergence from uniform on the subset C to the classifier, `-log|C| - mean_C log p_i`, in [0, inf).

    Equation 1 of Gomes et al.: zero exactly on the decision boundary between the classes of C.

    Args:
        logits: [B, n].
        classes: the subset C for all samples, or a tensor [B, k] with one subset a sample.

    Raises:
        ValueError: `classes` is empty; or it is a sequence or in the memory of the host, and repeats a class or names
            one that is not there.
    """
    index = _subset_index(logits, classes)
    mean_log_p = _log_softmax(logits).gather(-1, index).mean(-1)
    # Rounding alone can fall below zero, where no divergence is.
    return (0.0 - math.log(index.shape[-1]) - mean_log_p).clamp_min(0)


def kldb_parts(logits: Tensor, classes: Classes) -> tuple[Tensor, Tensor]:
    """KLDB as `(balance, mass)`: imbalance within C, and probability outside C. Their sum is `kldb`.

    `balance = KL(uniform_C || p renormalised on C)`, `mass = -log sum_C p_i`; both [B], in [0, inf).

    Raises:
        ValueError: as `kldb`.
    """
    index = _subset_index(logits, classes)
    log_p = _log_softmax(logits).gather(-1, index)
    mass = 0.0 - torch.logsumexp(log_p, -1)
    balance = 0.0 - math.log(index.shape[-1]) - torch.log_softmax(log_p, -1).mean(-1)
    return balance.clamp_min(0), mass.clamp_min(0)


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of the prediction, [B], in [0, log n]."""
    log_p = _log_softmax(logits)
    return 0.0 - (log_p.exp() * log_p).sum(-1)


def conformity(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """Cosine between CLIP embeddings of image and class prompt, in [-1, 1].

    Args:
        image_embeds: [B, d].
        text_embeds: [B, d], or [d] for one prompt.

    Returns:
        [B]; zero for an embedding of length zero.
    """
    images, texts = at_least_float32(image_embeds), at_least_float32(text_embeds)
    return torch.nn.functional.cosine_similarity(images, texts.expand_as(images), dim=-1)


def embedding_distance(first: Tensor, second: Tensor) -> Tensor:
    """1 minus the cosine between the embeddings of two images, [B], in [0, 2]; embeddings are [B, d]."""
    # Rounding alone can fall below zero, which would read as a value that is not there.
    return (1.0 - conformity(first, second)).clamp_min(0)


def psnr_db(first: Tensor, second: Tensor) -> Tensor:
    """Peak signal-to-noise ratio `10 log10(255^2 / MSE)` of 8-bit images, [B], in dB; `MAX_PSNR_DB` of equal ones.

    Args:
        first, second: [B, H, W, 3] or of any other form, values 0 to 255.
    """
    mse = (first.double() - second.double()).square().flatten(1).mean(1)
    return (10.0 * torch.log10(255.0**2 / mse)).clamp_max(MAX_PSNR_DB)


def conformity_margin(similarities: Tensor, labels: Tensor) -> Tensor:
    """Conformity to y minus the best conformity to any other class, in [-2, 2].

    Args:
        similarities: [B, n] conformity of every sample to every class, n >= 2.
        labels: [B] class indices y.
    """
    own = similarities.gather(-1, labels[:, None])
    others = similarities.scatter(-1, labels[:, None], -math.inf)
    return (own - others.amax(-1, keepdim=True))[:, 0]


def strongest_rival(logits: Tensor, labels: Tensor) -> Tensor:
    """The most probable class other than y, [B]."""
    return logits.scatter(-1, labels[:, None], -math.inf).argmax(-1)


def at_least_float32(values: Tensor) -> Tensor:
    """Half precision as float32; float32 and float64 as they are."""
    return values if values.dtype == torch.float64 else values.float()


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(at_least_float32(logits), -1)


def _subset_index(logits: Tensor, classes: Classes) -> Tensor:
    """The subsets as [B, k] indices on the logits' device, checked where that waits for no GPU."""
    index = torch.as_tensor(classes)
    if index.numel() == 0 or index.ndim not in (1, 2):
        raise ValueError(f"classes: {classes!r} is empty or not a list of class indices; name at least one class")
    _check_indices(index, logits.shape[-1], "classes")
    if _is_on_host(index):
        ordered = index.sort(-1).values
        if (ordered[..., 1:] == ordered[..., :-1]).any():
            raise ValueError(f"classes: {index.tolist()} names a class twice; name each once")
    return index.to(logits.device, non_blocking=True).expand(logits.shape[0], index.shape[-1])


def _is_on_host(index: Tensor) -> bool:
    """Whether looking at an index costs nothing: a GPU would have to finish all that it was given before."""
    return index.device.type == "cpu"


def _check_indices(index: Tensor, num_classes: int, name: str) -> None:
    if index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(f"{name}: {index.dtype} are not class indices; give integers")
    if not _is_on_host(index) or not index.numel():
        return
    if int(index.min()) < 0 or int(index.max()) >= num_classes:
        raise ValueError(f"{name}: {index.tolist()} has an index outside 0 to {num_classes - 1}")
