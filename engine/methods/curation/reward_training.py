"""Training of reward models on preferences by logistic loss: Newton steps for a linear one, L-BFGS for others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

from engine.methods.curation.preferences import Pairs
from engine.methods.curation.reward_models import LinearReward, RewardModel, margins

_MAX_HALVINGS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class FitOptions:
    """How a reward model is trained.

    Attributes:
        l2: weight of half the squared parameters in the loss; above 0, as preferences may be separable.
        tolerance: largest entry of the gradient at which training has converged. L-BFGS compares losses, so that
            below about 1e-8 in float64 it cannot tell; Newton's method can.
        max_steps: Newton steps (linear) or L-BFGS iterations (network); fewer cut training short on purpose.
    """

    l2: float = 1e-2
    tolerance: float = 1e-8
    max_steps: int = 100

    def __post_init__(self) -> None:
        if self.l2 <= 0 or self.tolerance <= 0 or self.max_steps < 1:
            raise ValueError(f"l2 {self.l2}, tolerance {self.tolerance}, max_steps {self.max_steps}: all are above 0")


@dataclass(frozen=True, slots=True, eq=False)
class RewardFit:
    """A trained reward model.

    Attributes:
        parameters: [..., P], detached.
        loss: [...] at the end, with its L2 term.
        gradient_norm: [...] largest entry of the gradient.
        converged: whether it is below the tolerance in every run.
        num_steps: steps made.
    """

    parameters: Tensor
    loss: Tensor
    gradient_norm: Tensor
    converged: bool
    num_steps: int


def preference_losses(margin: Tensor, labels: Tensor) -> Tensor:
    """Logistic loss of every record, [..., N]; both arguments have that shape.

    Raises:
        ValueError: the shapes differ. Broadcast, [N, 1] and [N] would give [N, N] and teach the mean label alone.
    """
    if margin.shape != labels.shape:
        raise ValueError(f"margins {list(margin.shape)}, labels {list(labels.shape)}: the shapes must be equal")
    return softplus(margin) - labels * margin


def training_loss(
    model: RewardModel, parameters: Tensor, pairs: Pairs, l2: float, weights: Tensor | None = None
) -> Tensor:
    """Mean logistic loss and `l2 / 2 |parameters|^2`, [...].

    Args:
        model: P parameters.
        parameters: [..., P].
        pairs: N records.
        l2: weight of the penalty.
        weights: [..., N] of the records, 1 unless given: 0 leaves a record out. The sum is divided by N either way.
    """
    losses = preference_losses(margins(model, parameters, pairs), pairs.labels)
    weighted = losses if weights is None else losses * weights
    return weighted.mean(-1) + 0.5 * l2 * parameters.square().sum(-1)


def fit_reward(
    model: RewardModel,
    pairs: Pairs,
    options: FitOptions,
    *,
    start: Tensor | None = None,
    weights: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> RewardFit:
    """Train a reward model: Newton steps for a linear one (many runs at once), L-BFGS for others.

    Args:
        model: P parameters.
        pairs: N records; leading dimensions (linear models only) are independent runs.
        options: when training ends.
        start: [..., P]; the model's own start unless given.
        weights: [..., N], see `training_loss`.
        generator: of the model's own start.

    Raises:
        ValueError: a network has neither a start nor a generator, or several runs.
    """
    if isinstance(model, LinearReward):
        return _fit_linear(model, pairs, options, start, weights)
    if pairs.labels.ndim != 1:
        raise ValueError(f"labels: {list(pairs.labels.shape)}; a network is trained on one run, [N]")
    if start is None:
        if generator is None:
            raise ValueError("generator: a network that has no start needs one")
        start = model.initial(generator)
    return _fit_by_lbfgs(model, pairs, options, start, weights)


def _fit_linear(
    model: LinearReward, pairs: Pairs, options: FitOptions, start: Tensor | None, weights: Tensor | None
) -> RewardFit:
    """Newton's method with step halving; the loss is convex, every run has one minimum."""
    differences = pairs.first - pairs.second
    record_weights = torch.ones_like(pairs.labels) if weights is None else weights
    eye = torch.eye(model.num_features, dtype=differences.dtype)

    def loss_at(parameters: Tensor) -> Tensor:
        losses = preference_losses((differences @ parameters[..., None])[..., 0], pairs.labels)
        return (losses * record_weights).mean(-1) + 0.5 * options.l2 * parameters.square().sum(-1)

    shape = (*pairs.labels.shape[:-1], model.num_features)
    parameters = torch.zeros(shape, dtype=differences.dtype) if start is None else start.expand(shape).clone()
    for step in range(options.max_steps + 1):
        predicted = torch.sigmoid((differences @ parameters[..., None])[..., 0])
        residual = (predicted - pairs.labels) * record_weights
        gradient = _weighted_mean(residual, differences) + options.l2 * parameters
        norm = gradient.abs().amax(-1)
        if step == options.max_steps or bool((norm <= options.tolerance).all()):
            break
        curvature = (predicted * (1 - predicted) * record_weights)[..., None] * differences
        hessian = differences.mT @ curvature / len(pairs) + options.l2 * eye
        direction = torch.linalg.solve(hessian, gradient)
        parameters = _halved_step(loss_at, parameters, direction)
    converged = bool((norm <= options.tolerance).all())
    return RewardFit(parameters, loss_at(parameters), norm, converged, step)


def _weighted_mean(values: Tensor, rows: Tensor) -> Tensor:
    """Mean over N of `values` [..., N] times `rows` [..., N, d]."""
    return (values[..., None, :] @ rows)[..., 0, :] / rows.shape[-2]


def _halved_step(loss_at: Callable[[Tensor], Tensor], parameters: Tensor, direction: Tensor) -> Tensor:
    """The step of each run, halved until its loss does not rise beyond rounding."""
    before = loss_at(parameters)
    slack = 1e-12 * (1 + before.abs())
    size = torch.ones_like(before)
    for _ in range(_MAX_HALVINGS):
        moved = parameters - size[..., None] * direction
        rising = loss_at(moved) > before + slack
        if not rising.any():
            break
        size = torch.where(rising, size / 2, size)
    return moved


def _fit_by_lbfgs(
    model: RewardModel, pairs: Pairs, options: FitOptions, start: Tensor, weights: Tensor | None
) -> RewardFit:
    parameters = start.detach().clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [parameters], max_iter=options.max_steps, max_eval=2 * options.max_steps, tolerance_grad=options.tolerance,
        tolerance_change=0.0, history_size=20, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = training_loss(model, parameters, pairs, options.l2, weights)
        loss.backward()
        return loss

    optimiser.step(closure)
    loss = closure().detach()
    assert parameters.grad is not None
    norm = parameters.grad.abs().amax()
    steps = optimiser.state[parameters]["n_iter"]
    return RewardFit(parameters.detach(), loss, norm, bool(norm <= options.tolerance), steps)
