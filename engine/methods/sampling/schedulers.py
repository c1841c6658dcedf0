"""diffusers' deterministic schedulers behind one small contract: steps with their noise levels, and a step in fp32."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from engine.methods.sampling.denoiser import Prediction, PredictionType, Step
from engine.methods.sampling.families import KINDS, ModelScheduler
from engine.methods.sampling.spec import SamplingSpec, noise_problem


class Sampler:
    """One run of a scheduler. Multistep schedulers keep state: make a new sampler for every batch.

    Args:
        spec: scheduler, number of steps, timestep spacing, sigmas.
        model: the model's own scheduler.

    Raises:
        ValueError: zero terminal SNR with eps-prediction, which is 0 / 0 at the first step (Lin et al. 2024), a
            prediction type other than these two, or steps that diffusers would skip.
    """

    def __init__(self, spec: SamplingSpec, model: ModelScheduler, device: torch.device | str = "cpu") -> None:
        kind = KINDS[model.chosen(spec)]
        self._levels_in = kind.levels
        self._scheduler = _make(model.chosen(spec), model.config, model.options(spec))
        self._scheduler.set_timesteps(spec.num_inference_steps, device=device)
        self.prediction: PredictionType = self._scheduler.config.prediction_type
        timesteps = self._scheduler.timesteps
        # Of two equal timesteps at the start diffusers takes the second for the first, and runs past the last.
        if kind.levels == "sigmas" and len(timesteps) > 1 and timesteps[0] == timesteps[1]:
            raise ValueError(f"{spec.num_inference_steps} steps have the same timestep twice at the start; give fewer")

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the first latents."""
        return float(self._scheduler.init_noise_sigma)

    def steps(self) -> Iterator[Step]:
        """The steps in order."""
        timesteps = self._scheduler.timesteps
        for place, timestep in enumerate(timesteps):
            scale, sigma = self._levels(place, timestep)
            yield Step(
                index=place + 1,
                total=len(timesteps),
                timestep=timestep,
                scale=scale,
                sigma=sigma,
                normalise_input=self._levels_in == "exploding",
            )

    def advance(self, prediction: Prediction, step: Step) -> Tensor:
        """Latents [B, C, H, W] of the next step, computed in float32."""
        # LMS and Euler warn where `scale_model_input` was not called; our steps scale the input themselves.
        self._scheduler.is_scale_input_called = True
        return self._scheduler.step(prediction.output, step.timestep, prediction.latents, return_dict=False)[0]

    def _levels(self, place: int, timestep: Tensor) -> tuple[float, float]:
        if self._levels_in == "timesteps":
            abar = float(self._scheduler.alphas_cumprod[int(timestep)])
            return math.sqrt(abar), math.sqrt(1 - abar)
        # KDPM2 looks at every second step from the middle between two sigmas.
        between = getattr(self._scheduler, "sigmas_interpol", None)
        sigma = float((self._scheduler.sigmas if between is None or place % 2 == 0 else between)[place])
        if self._levels_in == "exploding":
            return 1.0, sigma
        return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)


def _make(name: str, config: dict[str, Any], options: dict[str, Any]) -> Any:
    module = importlib.import_module(f"diffusers.schedulers.{KINDS[name].module}")
    scheduler = getattr(module, name).from_config(config, **options)
    zero_snr = scheduler.config.get("rescale_betas_zero_snr", False) and KINDS[name].has_zero_snr
    if problem := noise_problem(scheduler.config.prediction_type, zero_snr):
        raise ValueError(problem)
    return scheduler
