"""The criteria that are built in, by the interface of a user's own: a function of parameters that returns a criterion.

Each `method` of this name takes its steps and its schedule from `guidance.custom`, and its arguments from
`guidance.custom.parameters`. Torch is imported inside functions: jobs are checked by calling these.

Legend: B samples, H x W size, n classes of the target, k further classes of another classifier, N given images.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from engine.methods.custom.criterion import Criterion
    from engine.methods.guidance.scene import Scene

# The second classifier of `disagreement`, by its name among the scorers of a scene.
DEFAULT_OTHER = "target.1"
# A log-odds above it no classifier gives in float32.
_MAX_NATS = 100.0


def entropy(share: float = 1.0) -> Criterion:
    """Toward a share of the highest entropy that the target's output can have: nats that are missing.

    Args:
        share: in (0, 1] of log n; 1 is the uniform distribution over all classes.

    Raises:
        ValueError: the share is out of range.
    """
    _check_range("share", share, 0, 1, is_open=True)

    def criterion(images: Tensor, scene: Scene) -> Tensor:
        from engine.methods import scores

        logits = scene.logits(images)
        return (share * math.log(logits.shape[1]) - scores.entropy(logits)).clamp_min(0)

    return criterion


def margin(goal: float = 0.0) -> Criterion:
    """Toward a small lead of the target's likeliest class over the second: log(p1 / p2) above the goal, in nats.

    Args:
        goal: the lead at which a sample has arrived; 0 is the decision boundary between whichever two are likeliest.

    Raises:
        ValueError: the goal is out of range.
    """
    _check_range("goal", goal, 0, _MAX_NATS)

    def criterion(images: Tensor, scene: Scene) -> Tensor:
        first, second = scene.logits(images).topk(2, 1).values.unbind(1)
        return (first - second - goal).clamp_min(0)

    return criterion


def disagreement(other: str = DEFAULT_OTHER, share: float = 0.9) -> Criterion:
    """Toward different predictions of target and a second classifier: nats of divergence that are missing.

    The Jensen-Shannon divergence of the two predictions, as of a committee of two (McCallum and Nigam, "Employing EM
    and pool-based active learning for text classification", ICML 1998), from 0 to log 2.

    Args:
        other: name of the second classifier among `Scene.scorers`.
        share: in (0, 1] of log 2, which only certain and different predictions reach.

    Raises:
        ValueError: the share is out of range.
    """
    _check_range("share", share, 0, 1, is_open=True)

    def criterion(images: Tensor, scene: Scene) -> Tensor:
        first, second = (scene.scorers[name].logits(images) for name in ("target", other))
        return (share * math.log(2) - _jensen_shannon(first, second)).clamp_min(0)

    return criterion


def feature(goal: float = 0.0) -> Criterion:
    """Toward the given image of the sample's class that is nearest: 1 minus the cosine of CLIP embeddings.

    The images are `guidance.custom.images`; of a joint prompt those of all of its classes.

    Args:
        goal: the distance at which a sample has arrived.

    Raises:
        ValueError: the goal is out of range.
    """
    _check_range("goal", goal, 0, 2)

    def criterion(images: Tensor, scene: Scene) -> Tensor:
        import torch

        given = scene.given
        assert given is not None, "checked when the job was read"
        features = torch.nn.functional.normalize(scene.scorers["clip"].embeds(images), dim=1)
        cosines = features @ given.features.T
        shows = torch.stack([torch.isin(given.classes, given.classes.new_tensor(own)) for own in scene.classes])
        nearest = cosines.masked_fill(~shows, -1.0).amax(1)
        return (1 - nearest - goal).clamp_min(0)

    return criterion


def _jensen_shannon(first: Tensor, second: Tensor) -> Tensor:
    """Divergence [B] of the predictions by logits [B, n] and [B, n + k], in nats; the target has no further classes."""
    import torch

    missing = second.shape[1] - first.shape[1]
    # A class that one of the two does not have has no probability there, and contributes p log 2 of the other.
    p, q = first.softmax(1), second.softmax(1)
    p = torch.nn.functional.pad(p, (0, max(missing, 0)))
    q = torch.nn.functional.pad(q, (0, max(-missing, 0)))
    middle = (p + q) / 2
    return (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2


def _relative_entropy(p: Tensor, q: Tensor) -> Tensor:
    """KL divergence [B] of probabilities [B, m], q being positive wherever p is."""
    smallest = 1e-30
    return (p * (p.clamp_min(smallest).log() - q.clamp_min(smallest).log())).sum(1)


def _check_range(name: str, value: object, low: float, high: float, *, is_open: bool = False) -> None:
    """Refuse an argument that is no number from `low`, which itself may be excluded, to `high`."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (low < value if is_open else low <= value) or value > high:  # type: ignore[operator]
        words = f"above {low:g} and at most {high:g}" if is_open else f"from {low:g} to {high:g}"
        raise ValueError(f"{name}: {value!r} is not a number {words}")
