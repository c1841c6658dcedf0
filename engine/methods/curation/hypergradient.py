"""How an objective of the trained reward model changes with the labels it was trained on: implicit differentiation.

At a minimum of the training loss the gradient is zero, so with labels o and parameters theta

    d theta / d o_i = -H^-1 d grad / d o_i = H^-1 grad margin_i / N,    d J / d o_i = grad margin_i . v / N,

where `v = (H + damping)^-1 grad J` solves one linear system for all N records, by conjugate gradients on products with
the Hessian H. Neither H nor a gradient per record is ever stored: memory is a few times the parameters and the
activations of one pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from engine.methods.curation.preferences import Pairs
from engine.methods.curation.reward_models import RewardModel, margins, training_loss


@dataclass(frozen=True, slots=True, kw_only=True)
class SolverOptions:
    """Conjugate gradients on the damped Hessian.

    Attributes:
        damping: multiple of the unit matrix that is added to the Hessian.
        tolerance: residual over right-hand side at which a run is solved.
        max_steps: products with the Hessian.
    """

    damping: float = 1e-5
    tolerance: float = 1e-8
    max_steps: int = 200

    def __post_init__(self) -> None:
        if self.damping < 0 or self.tolerance <= 0 or self.max_steps < 1:
            raise ValueError(
                f"damping {self.damping}: 0 or more; tolerance {self.tolerance}, max_steps {self.max_steps}: above 0"
            )


@dataclass(frozen=True, slots=True, eq=False)
class Solution:
    """The outcome of conjugate gradients.

    Attributes:
        vector: [..., P].
        residual: [...] length of the residual over that of the right-hand side.
        num_steps: products with the operator.
        convex: [...] booleans; false where a direction of negative curvature ended the run, as at a saddle point.
    """

    vector: Tensor
    residual: Tensor
    num_steps: int
    convex: Tensor


def conjugate_gradient(operator: Callable[[Tensor], Tensor], target: Tensor, options: SolverOptions) -> Solution:
    """Solve `operator(v) + damping v = target` for symmetric positive definite operators, one in each run.

    Args:
        operator: [..., P] to [..., P], linear, run by run.
        target: [..., P].
        options: damping and when to stop.
    """
    solution, residual = torch.zeros_like(target), target.clone()
    direction = residual.clone()
    energy = residual.square().sum(-1)
    scale = energy.sqrt().clamp_min(torch.finfo(target.dtype).tiny)
    convex = torch.ones_like(energy, dtype=torch.bool)
    step = 0
    for step in range(1, options.max_steps + 1):
        active = convex & (energy.sqrt() > options.tolerance * scale)
        if not active.any():
            step -= 1
            break
        image = operator(direction) + options.damping * direction
        curvature = (direction * image).sum(-1)
        convex = convex & ((curvature > 0) | ~active)
        active = active & convex
        length = torch.where(active, energy / curvature.where(active, curvature.new_ones(())), 0.0)[..., None]
        solution = solution + length * direction
        residual = residual - length * image
        renewed = residual.square().sum(-1)
        ratio = torch.where(active, renewed / energy.where(active, energy.new_ones(())), 0.0)[..., None]
        direction = residual + ratio * direction
        energy = renewed
    return Solution(solution, energy.sqrt() / scale, step, convex)


def hessian_product(
    model: RewardModel, parameters: Tensor, pairs: Pairs, l2: float, weights: Tensor | None = None
) -> Callable[[Tensor], Tensor]:
    """Products of the Hessian of the training loss at parameters [..., P] with vectors, by double backward.

    The graph of the gradient is built once and serves every product.
    """
    point = parameters.detach().requires_grad_()
    # Runs do not interact, so that the gradient of the sum holds the gradient of each.
    loss = training_loss(model, point, pairs, l2, weights).sum()
    (gradient,) = torch.autograd.grad(loss, point, create_graph=True)

    def product(vector: Tensor) -> Tensor:
        return torch.autograd.grad(gradient, point, vector, retain_graph=True)[0]

    return product


def margin_derivatives(model: RewardModel, parameters: Tensor, pairs: Pairs, vector: Tensor) -> Tensor:
    """`grad margin_i . vector` for every record, [..., N], in one forward-mode pass."""
    _, derivatives = torch.func.jvp(lambda point: margins(model, point, pairs), (parameters,), (vector,))
    return derivatives


@dataclass(frozen=True, slots=True, eq=False)
class Hypergradient:
    """Derivatives of an objective by labels.

    Attributes:
        labels: [..., N], `d J / d o_i`.
        solution: how well the linear system is solved.
    """

    labels: Tensor
    solution: Solution


def objective_gradient(objective: Callable[[Tensor], Tensor], parameters: Tensor) -> Tensor:
    """`grad J` [..., P] of an objective of parameters, [..., P] to [...]."""
    point = parameters.detach().requires_grad_()
    return torch.autograd.grad(objective(point).sum(), point)[0]


def hypergradient(
    model: RewardModel,
    parameters: Tensor,
    pairs: Pairs,
    objective: Callable[[Tensor], Tensor],
    *,
    l2: float,
    solver: SolverOptions,
    weights: Tensor | None = None,
) -> Hypergradient:
    """How an objective of the trained parameters changes with each label.

    Args:
        model: P parameters.
        parameters: [..., P] at a minimum of the training loss; elsewhere the result is no derivative.
        pairs: N records that they are trained on.
        objective: J of parameters, [..., P] to [...]; differentiable.
        l2: of the training loss.
        solver: of the linear system.
        weights: [..., N] of the records in training.
    """
    target = objective_gradient(objective, parameters)
    solution = conjugate_gradient(hessian_product(model, parameters, pairs, l2, weights), target, solver)
    derivatives = margin_derivatives(model, parameters, pairs, solution.vector) / len(pairs)
    return Hypergradient(derivatives if weights is None else derivatives * weights, solution)
