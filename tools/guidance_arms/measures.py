"""What is measured of the samples of an arm.

Legend: N samples, H x W size, n classes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import PIL.Image
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.methods.scores import kldb, risk
from engine.models.clip import Clip
from engine.studies.evaluate.distances import kernel_distance
from guidance_arms.sets import SampleSet

TARGET_RISK, NEAR = 1.5, 0.2
RESAMPLES = 2000


def measured(a_set: SampleSet, images: Tensor, twins: Tensor) -> dict[str, Any]:
    """Figures of images [N, 3, H, W] of a set, and the values of each sample on the target and the first observer.

    Args:
        twins: of the prompts alone, from the same noise.
    """
    pictures = _pictures(images)
    logits = {"target": a_set.zoo.target.score(pictures)}
    logits |= {part: reader.score(pictures) for part, reader in a_set.zoo.readers.items()}
    agree = [_allowed(a_set, logits[part].argmax(1)) for part in a_set.zoo.oracles]
    if a_set.zoo.name == "digits":
        agree.append(_allowed(a_set, torch.from_numpy(support_vectors()(images))))
    is_valid = torch.stack(agree).all(0)
    own = _of_boundary if a_set.method == "boundary" else _of_risk
    figures = own(a_set, logits, is_valid) | {"valid": float(is_valid.float().mean())}
    figures["kid_x1000"] = 1000 * _kid(a_set, images)
    if "values" in figures:
        # What being between classes costs, whoever made it so: real images are of one class each.
        nearest = np.argsort(np.mean(list(figures["values"].values()), axis=0))[: a_set.count // 4]
        figures["kid_x1000_of_nearest"] = 1000 * _kid(a_set, images[torch.from_numpy(nearest.copy())])
    squares = ((images - twins) ** 2).flatten(1).mean(1)
    is_same = bool((squares == 0).all())
    figures["twin_psnr_db"] = None if is_same else float(-10 * torch.log10(squares.clamp_min(1e-10)).median())
    return figures


def _of_boundary(a_set: SampleSet, logits: dict[str, Tensor], _valid: Tensor) -> dict[str, Any]:
    values = {name: kldb(own, a_set.subset) for name, own in logits.items()}
    return {
        "kldb": {name: float(one.median()) for name, one in values.items()},
        "values": {name: [round(value, 4) for value in one.tolist()] for name, one in values.items()},
    }


def _of_risk(a_set: SampleSet, logits: dict[str, Tensor], is_valid: Tensor) -> dict[str, Any]:
    errs = {name: own.argmax(1) != a_set.labels for name, own in logits.items()}
    values = risk(logits["target"], a_set.labels)
    return {
        "risk": float(values.median()),
        "near": float(((values - TARGET_RISK).abs() <= NEAR).float().mean()),
        "errors": {name: float(one.float().mean()) for name, one in errs.items()},
        "valid_failures": float((errs["target"] & is_valid).float().mean()),
    }


def _allowed(a_set: SampleSet, predicted: Tensor) -> Tensor:
    """Which samples [N] a reader sees as a class of the joint prompt, or as their own class."""
    return (
        torch.isin(predicted, torch.tensor(a_set.subset)) if a_set.method == "boundary" else predicted == a_set.labels
    )


def ratio_of_medians(values: list[float], others: list[float], seed: int = 0) -> tuple[float, float, float]:
    """The ratio of two medians over samples of equal noise, with the 95 % bootstrap interval over those."""
    pairs = np.array([values, others])
    rows = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
    medians = np.median(pairs[:, rows], axis=2)
    low, high = np.quantile(medians[0] / medians[1], [0.025, 0.975])
    own, other = np.median(pairs, axis=1)
    return float(own / other), float(low), float(high)


def _pictures(images: Tensor) -> list[PIL.Image.Image]:
    """As stored: 8 bits."""
    grey = (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    return [PIL.Image.fromarray(one) for one in grey]


def _kid(a_set: SampleSet, images: Tensor) -> float:
    real = _real_features(a_set)
    return kernel_distance(_features(a_set.zoo.clip, _pictures(images)), real).value


@cache
def _real_features(a_set: SampleSet) -> NDArray[np.float64]:
    return _features(a_set.zoo.clip, [one.image for one in a_set.zoo.real_images(a_set.subset)][:2000])


def _features(clip: Clip, pictures: list[PIL.Image.Image]) -> NDArray[np.float64]:
    embeds = torch.nn.functional.normalize(clip.image_embeds(pictures), dim=1).double().numpy()
    # The kernel divides by the dimension: entries of variance one, as those of Inception.
    return embeds * embeds.shape[1] ** 0.5


@cache
def support_vectors() -> Callable[[Tensor], NDArray[np.int64]]:
    """A support vector machine on real digits: images [N, 3, 32, 32] to classes [N]. It guided nothing."""
    from sklearn.svm import SVC

    from engine.data.images import digits

    data = digits.compose_split("train", 6000, seed=1)
    shown = torch.from_numpy(data.images).permute(0, 3, 1, 2).float() / 255
    machine = SVC(C=10.0).fit(_strokes(shown), data.labels)
    return lambda images: machine.predict(_strokes(images))


def _strokes(images: Tensor) -> NDArray[np.float32]:
    """Distance of each pixel from the border's median colour, at 16 x 16, [N, 256]."""
    edges = torch.cat([images[..., 0, :], images[..., -1, :], images[..., :, 0], images[..., :, -1]], dim=-1)
    background = edges.median(-1).values[..., None, None]
    strokes = (images - background).norm(dim=1)[:, None]
    smaller = torch.nn.functional.avg_pool2d(strokes, 2).flatten(1)
    return (smaller / smaller.amax(1, keepdim=True).clamp_min(1e-6)).numpy()
