"""Samplers of flow matching: adapters of diffusers' schedulers, whose steps are straight lines between noise and image.

At a step the latents are `(1 - sigma) x0 + sigma eps`, and the network predicts the velocity `eps - x0`.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from engine.methods.sampling.denoiser import PredictionType
from engine.methods.sampling.families import ModelScheduler
from engine.methods.sampling.flow_checks import DPM_SOLVER, EULER, HEUN, chosen, dynamic_shift, flow_options
from engine.methods.sampling.schedulers import SchedulerAdapter
from engine.methods.sampling.spec import SamplingSpec

_MODULES = {
    EULER: "scheduling_flow_match_euler_discrete",
    HEUN: "scheduling_flow_match_heun_discrete",
    DPM_SOLVER: "scheduling_dpmsolver_multistep",
}


class FlowMatching(SchedulerAdapter):
    """A scheduler of flow matching, with its noise levels in `sigmas`."""

    def __init__(self, scheduler: Any, device: torch.device | str = "cpu") -> None:
        super().__init__(scheduler, device)
        # By timestep DPM-Solver++, which rounds them, would take the second of two equal ones.
        scheduler.set_begin_index(0)

    @property
    def prediction(self) -> PredictionType:
        """The velocity."""
        return "flow"

    @property
    def init_noise_sigma(self) -> float:
        """The first latents are noise alone."""
        return 1.0

    def levels(self, place: int, timestep: Tensor) -> tuple[float, float]:
        """`1 - sigma` and `sigma`."""
        sigma = float(self._scheduler.sigmas[place])
        return 1 - sigma, sigma


def make_flow_sampler(
    spec: SamplingSpec, model: ModelScheduler, num_tokens: int, device: torch.device | str = "cpu"
) -> FlowMatching:
    """A sampler of flow matching, for one batch.

    Args:
        spec: scheduler, number of steps, Karras sigmas.
        model: the model's own scheduler.
        num_tokens: of an image in the network, which a dynamic shift depends on.
        device: of the network.

    Raises:
        ValueError: the scheduler does not solve flow matching.
    """
    name = chosen(model, spec)
    if name not in _MODULES:
        raise ValueError(f"{spec.scheduler!r} does not solve flow matching")
    module = importlib.import_module(f"diffusers.schedulers.{_MODULES[name]}")
    scheduler = getattr(module, name).from_config(model.config, **flow_options(model, spec, num_tokens))
    exponent = dynamic_shift(model.config, num_tokens) if name == EULER else None
    shift = {} if exponent is None else {"mu": exponent}
    scheduler.set_timesteps(spec.num_inference_steps, device="cpu", **shift)
    return FlowMatching(scheduler, device)
