"""Minimisers of smooth losses: Newton's method for many convex ones at once, L-BFGS for a large one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_MAX_HALVINGS = 20


@dataclass(frozen=True, slots=True, eq=False)
class Minimum:
    """Where a minimiser ended.

    Attributes:
        parameters: [..., P], detached.
        loss: [...].
        gradient_norm: [...] largest entry of the gradient.
        converged: whether it is below the tolerance in every run.
        num_steps: steps made.
    """

    parameters: Tensor
    loss: Tensor
    gradient_norm: Tensor
    converged: bool
    num_steps: int


def minimise_newton(
    loss_at: Callable[[Tensor], Tensor],
    derivatives_at: Callable[[Tensor], tuple[Tensor, Tensor]],
    start: Tensor,
    *,
    tolerance: float,
    max_steps: int,
) -> Minimum:
    """Newton's method with step halving, for strictly convex losses of independent runs.

    Args:
        loss_at: parameters [..., P] to losses [...].
        derivatives_at: parameters to gradients [..., P] and Hessians [..., P, P].
        start: [..., P].
        tolerance: largest entry of the gradient at which all runs have converged.
        max_steps: steps at most.
    """
    parameters = start
    for step in range(max_steps + 1):
        gradient, hessian = derivatives_at(parameters)
        norm = gradient.abs().amax(-1)
        if step == max_steps or bool((norm <= tolerance).all()):
            break
        parameters = _halved_step(loss_at, parameters, torch.linalg.solve(hessian, gradient))
    return Minimum(parameters, loss_at(parameters), norm, bool((norm <= tolerance).all()), step)


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


def minimise_lbfgs(loss_at: Callable[[Tensor], Tensor], start: Tensor, *, tolerance: float, max_steps: int) -> Minimum:
    """L-BFGS with a strong Wolfe line search, for one loss of any smooth shape.

    Args:
        loss_at: parameters [P] to the loss, [].
        start: [P].
        tolerance: largest entry of the gradient at which it has converged.
        max_steps: iterations at most.
    """
    parameters = start.detach().clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [parameters], max_iter=max_steps, max_eval=2 * max_steps, tolerance_grad=tolerance,
        tolerance_change=0.0, history_size=20, line_search_fn="strong_wolfe",
    )  # fmt: skip

    def closure() -> Tensor:
        optimiser.zero_grad()
        loss = loss_at(parameters)
        loss.backward()
        return loss

    optimiser.step(closure)
    loss = closure().detach()
    assert parameters.grad is not None
    norm = parameters.grad.abs().amax()
    steps = optimiser.state[parameters]["n_iter"]
    return Minimum(parameters.detach(), loss, norm, bool(norm <= tolerance), steps)
