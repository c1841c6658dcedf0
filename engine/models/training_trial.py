"""Whether a network can be fine-tuned: parameters that its outputs depend on, and a state that can be kept."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from engine.models.factories import reason_of
from engine.models.program_settings import TargetSettings

_TRIAL_ROWS = 2


def trainable_parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes: those that the factory has not frozen; all, where it froze all."""
    floating = [parameter for parameter in module.parameters() if parameter.is_floating_point()]
    return [parameter for parameter in floating if parameter.requires_grad] or floating


def training_problem(module: nn.Module, settings: TargetSettings) -> str:
    """Why a network cannot be trained; empty where it can.

    Side effects: leaves the network in training mode, with gradients switched on for what is trained.
    """
    if others := sorted(name for name, value in module.state_dict().items() if not isinstance(value, Tensor)):
        return f"a network whose state has something else than tensors ('{others[0]}')"
    parameters = trainable_parameters(module)
    if not parameters:
        return "a network without parameters in floating point"
    try:
        trial = copy.deepcopy(module)
    except (RuntimeError, TypeError, ValueError, AttributeError) as error:
        return f"a network that cannot be copied ({reason_of(error)})"
    return _gradient_problem(trial, settings)


def _gradient_problem(module: nn.Module, settings: TargetSettings) -> str:
    """Why no gradient reaches the parameters of a network; empty where one does."""
    parameters = trainable_parameters(module)
    for parameter in parameters:
        parameter.requires_grad_(True)
    pixels = torch.randn(_TRIAL_ROWS, 3, *settings.shape, generator=torch.Generator().manual_seed(0))
    try:
        # Dropout draws from the global stream.
        with torch.random.fork_rng(devices=[]):
            logits = module.train()(pixels)
        if not isinstance(logits, Tensor) or logits.shape != (_TRIAL_ROWS, len(settings.labels)):
            return "a network that gives something else than logits in training mode"
        if not logits.requires_grad:
            return "a network whose logits have no gradient (torch.no_grad in its forward?)"
        logits.square().sum().backward()
    except Exception as error:
        # The user's own code.
        return f"a network that fails in training mode ({reason_of(error)})"
    if all(parameter.grad is None for parameter in parameters):
        return "a network whose logits do not depend on its trainable parameters"
    return ""
