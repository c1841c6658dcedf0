"""diffusers' deterministic schedulers behind one small contract: steps with their noise levels, and a step in fp32."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from engine.sampling.denoiser import Prediction, PredictionType, Step
from engine.spec import SamplingSpec, noise_problem

_CLASSES = {
    "lms": ("diffusers.schedulers.scheduling_lms_discrete", "LMSDiscreteScheduler"),
    "ddim": ("diffusers.schedulers.scheduling_ddim", "DDIMScheduler"),
    "euler": ("diffusers.schedulers.scheduling_euler_discrete", "EulerDiscreteScheduler"),
    "dpmsolver++": ("diffusers.schedulers.scheduling_dpmsolver_multistep", "DPMSolverMultistepScheduler"),
}


class Sampler:
    """One run of a scheduler. Multistep schedulers keep state: make a new sampler for every batch.

    Args:
        spec: scheduler, number of steps, timestep spacing.
        config: the model's own scheduler configuration (`scheduler_config.json`).

    Raises:
        ValueError: zero terminal SNR with eps-prediction, which is 0 / 0 at the first step (Lin et al. 2024), or a
            prediction type other than these two.
    """

    def __init__(self, spec: SamplingSpec, config: dict[str, Any], device: torch.device | str = "cpu") -> None:
        self._scheduler = _make(spec, config)
        self._scheduler.set_timesteps(spec.num_inference_steps, device=device)
        self._exploding = spec.scheduler in ("lms", "euler")
        self._uses_sigmas = spec.scheduler != "ddim"
        self.prediction: PredictionType = self._scheduler.config.prediction_type

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the first latents."""
        return float(self._scheduler.init_noise_sigma)

    def steps(self) -> Iterator[Step]:
        """The steps in order."""
        timesteps = self._scheduler.timesteps
        for place, timestep in enumerate(timesteps):
            scale, sigma = self._levels(place, int(timestep))
            yield Step(
                index=place + 1,
                total=len(timesteps),
                timestep=timestep,
                scale=scale,
                sigma=sigma,
                normalise_input=self._exploding,
            )

    def advance(self, prediction: Prediction, step: Step) -> Tensor:
        """Latents [B, C, H, W] of the next step, computed in float32."""
        # LMS and Euler warn where `scale_model_input` was not called; our steps scale the input themselves.
        self._scheduler.is_scale_input_called = True
        return self._scheduler.step(prediction.output, step.timestep, prediction.latents, return_dict=False)[0]

    def _levels(self, place: int, timestep: int) -> tuple[float, float]:
        if not self._uses_sigmas:
            abar = float(self._scheduler.alphas_cumprod[timestep])
            return math.sqrt(abar), math.sqrt(1 - abar)
        sigma = float(self._scheduler.sigmas[place])
        if self._exploding:
            return 1.0, sigma
        return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)


def _make(spec: SamplingSpec, config: dict[str, Any]) -> Any:
    module, name = _CLASSES[spec.scheduler]
    # As diffusers' Stable Diffusion pipeline has it, whatever an older configuration says.
    options: dict[str, Any] = {"steps_offset": 1}
    if spec.scheduler == "ddim":
        options["clip_sample"] = False
    if spec.scheduler == "dpmsolver++":
        options["algorithm_type"] = "dpmsolver++"
    if spec.timestep_spacing:
        options["timestep_spacing"] = spec.timestep_spacing
    if spec.rescale_betas_zero_snr:
        options["rescale_betas_zero_snr"] = True
    scheduler = getattr(importlib.import_module(module), name).from_config(config, **options)
    zero_snr = scheduler.config.get("rescale_betas_zero_snr", False)
    if problem := noise_problem(scheduler.config.prediction_type, zero_snr):
        raise ValueError(problem)
    return scheduler
