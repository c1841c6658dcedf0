"""Samplers: the interface of what steps the latents, and adapters of diffusers' schedulers.

An adapter gives the noise levels of every step as the two factors of `z = scale * x0 + sigma * eps`; everything else
(predictions, guidance, the loop) follows from these. Another kind of scheduler, as for flow matching, is one adapter.
"""

from __future__ import annotations

import importlib
import itertools
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor

from engine.methods.sampling.denoiser import Prediction, PredictionType, Step
from engine.methods.sampling.families import KNOWN, Levels, ModelScheduler
from engine.methods.sampling.noise import NoiseStream
from engine.methods.sampling.spec import SamplingSpec, noise_problem, steps_of

# Most derivatives that k-LMS combines, as in diffusers.
_LMS_ORDER = 4


class Sampler(ABC):
    """One run of a scheduler. Multistep schedulers keep state: make a new sampler for every batch."""

    @property
    @abstractmethod
    def prediction(self) -> PredictionType:
        """What the network's output is interpreted as."""

    @property
    @abstractmethod
    def init_noise_sigma(self) -> float:
        """Standard deviation of the first latents."""

    @abstractmethod
    def steps(self) -> Iterator[Step]:
        """The steps in order."""

    def last_steps(self, strength: float) -> Iterator[Step]:
        """The steps after a start from real images, numbered as in `steps`; none at strength 0.

        A sampler that keeps state from step to step begins without it, and may have other steps.

        Args:
            strength: share of all steps, below 1.
        """
        steps = list(self.steps())
        return iter(steps[len(steps) - steps_of(strength, len(steps)) :])

    @abstractmethod
    def advance(self, prediction: Prediction, step: Step) -> Tensor:
        """Latents [B, C, H, W] of the next step, computed in float32."""


class SchedulerAdapter(Sampler):
    """A scheduler of diffusers that is called with timesteps; a subclass gives their noise levels.

    The scheduler keeps its timesteps and sigmas on the host: it looks them up at every step, for which a GPU would have
    to finish all that it was given before. The network gets the timesteps on its device. UniPC alone computes its
    coefficients there, and reads them.

    Args:
        scheduler: with its timesteps set, on the host.
        device: of the network.
        noise: of the batch, for a scheduler that draws noise at its steps.
    """

    # Whether the network expects latents of variance one, and the scheduler steps others.
    normalise_input: ClassVar[bool] = False

    def __init__(self, scheduler: Any, device: torch.device | str = "cpu", noise: NoiseStream | None = None) -> None:
        self._scheduler = scheduler
        self._noise = noise
        self._timesteps: Tensor = scheduler.timesteps.to(device)

    @property
    def prediction(self) -> PredictionType:
        """The prediction type of the scheduler's configuration."""
        prediction: PredictionType = self._scheduler.config.prediction_type
        return prediction

    @property
    def init_noise_sigma(self) -> float:
        """Standard deviation of the first latents."""
        return float(self._scheduler.init_noise_sigma)

    @abstractmethod
    def levels(self, place: int, timestep: Tensor) -> tuple[float, float]:
        """Scale and sigma of a step.

        Args:
            place: of the step, counted from 0.
            timestep: of the step, on the host.
        """

    def steps(self) -> Iterator[Step]:
        """The steps in order."""
        for place, timestep in enumerate(self._scheduler.timesteps):
            scale, sigma = self.levels(place, timestep)
            yield Step(
                index=place + 1,
                total=len(self._timesteps),
                timestep=self._timesteps[place],
                scale=scale,
                sigma=sigma,
                normalise_input=self.normalise_input,
            )

    def last_steps(self, strength: float) -> Iterator[Step]:
        """The steps after a start from real images; see `Sampler.last_steps`.

        Multistep schedulers begin with their first order: there is no history. Those of second order have two steps
        for each of `num_inference_steps`, and begin with the first of them.
        """
        first = self._begin(self._num_steps - steps_of(strength, self._num_steps))
        return itertools.islice(self.steps(), first, None)

    def _begin(self, num_skipped: int) -> int:
        """Begin after so many of `num_inference_steps`: the place of the first step."""
        place: int = num_skipped * self._scheduler.order
        # By timestep diffusers would take the second of two equal ones.
        if hasattr(self._scheduler, "set_begin_index"):
            self._scheduler.set_begin_index(place)
        return place

    @property
    def _num_steps(self) -> int:
        return int(self._scheduler.num_inference_steps)

    def advance(self, prediction: Prediction, step: Step) -> Tensor:
        """Latents [B, C, H, W] of the next step, computed in float32."""
        # LMS and Euler warn where `scale_model_input` was not called; our steps scale the input themselves.
        self._scheduler.is_scale_input_called = True
        timestep = self._scheduler.timesteps[step.index - 1]
        step_from, options = self._scheduler.step, self._step_options()
        return step_from(prediction.output, timestep, prediction.latents, return_dict=False, **options)[0]

    def _step_options(self) -> dict[str, Any]:
        """What else the scheduler's `step` takes."""
        return {}


class ByTimestep(SchedulerAdapter):
    """Variance-preserving schedulers whose noise levels are those of the training's timesteps (DDIM, PNDM)."""

    def levels(self, place: int, timestep: Tensor) -> tuple[float, float]:
        """`sqrt(abar)` and `sqrt(1 - abar)`."""
        abar = float(self._scheduler.alphas_cumprod[int(timestep)])
        return math.sqrt(abar), math.sqrt(1 - abar)


class PseudoNumerical(ByTimestep):
    """PNDM, which evaluates its second timestep twice."""

    def _begin(self, num_skipped: int) -> int:
        """Begin anew at a timestep: the next one is the second, and no Runge-Kutta steps go before, as in usual models.

        diffusers goes on with the list of the whole schedule, which then has its repeated timestep at the start or not
        at all, while `step_plms` counts from its first call: it steps between noise levels that the latents do not
        have.
        """
        scheduler = self._scheduler
        scheduler.register_to_config(skip_prk_steps=True)
        scheduler.set_timesteps(self._num_steps)
        left = torch.from_numpy(scheduler._timesteps[::-1].astype("int64"))[num_skipped:]
        left = torch.cat([left[:2], left[1:2], left[2:]])
        place = len(scheduler.timesteps) - len(left)
        scheduler.timesteps = torch.cat([scheduler.timesteps[:place], left])
        self._timesteps = scheduler.timesteps.to(self._timesteps.device)
        return place


class VarianceExploding(SchedulerAdapter):
    """Schedulers whose latents are `x0 + sigma * eps` (LMS, Euler, Heun, KDPM2)."""

    normalise_input = True

    def levels(self, place: int, timestep: Tensor) -> tuple[float, float]:
        """1 and the sigma of the step."""
        # KDPM2 evaluates every second step between two sigmas.
        between = getattr(self._scheduler, "sigmas_interpol", None)
        return 1.0, float((self._scheduler.sigmas if between is None or place % 2 == 0 else between)[place])


class LinearMultistep(VarianceExploding):
    """k-LMS."""

    def _step_options(self) -> dict[str, Any]:
        """The order, by the derivatives that are there.

        diffusers goes by the place of the step: after a start in the middle it would take the coefficients of four
        derivatives, and sum over those that it has.
        """
        return {"order": min(_LMS_ORDER, len(self._scheduler.derivatives) + 1)}


class DrawsNoise(SchedulerAdapter):
    """A scheduler whose step draws noise, for every sample from its own generator, as in diffusers' pipelines."""

    def _step_options(self) -> dict[str, Any]:
        """The generators of the samples, without which it would draw from one that they share."""
        assert self._noise is not None, "a scheduler that draws noise needs the noise of its batch"
        return {"generator": self._noise.generators}


class LatentConsistency(DrawsNoise, ByTimestep):
    """LCM, which jumps to the clean latents at every step and adds noise to them (Luo et al. 2023).

    What it jumps to is `c_out x0 + c_skip z`, whose `c_skip` is below 1e-5 from timestep 16 on: guidance sees x0.
    """


class AncestralEuler(DrawsNoise, VarianceExploding):
    """Euler ancestral, which steps below the next noise level and adds noise up to it."""


class VariancePreserving(SchedulerAdapter):
    """Multistep schedulers with a list of sigmas, whose latents keep their variance (DPM-Solver++, DEIS, UniPC)."""

    def __init__(self, scheduler: Any, device: torch.device | str = "cpu", noise: NoiseStream | None = None) -> None:
        super().__init__(scheduler, device, noise)
        timesteps = scheduler.timesteps
        # Of two equal timesteps at the start diffusers takes the second for the first, and runs past the last.
        if len(timesteps) > 1 and timesteps[0] == timesteps[1]:
            raise ValueError(f"{len(timesteps)} steps have the same timestep twice at the start; give fewer")

    def levels(self, place: int, timestep: Tensor) -> tuple[float, float]:
        """`sqrt(abar)` and `sqrt(1 - abar)`, with `sigma^2 = (1 - abar) / abar`."""
        sigma = float(self._scheduler.sigmas[place])
        return 1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma)


_ADAPTERS: dict[Levels, type[SchedulerAdapter]] = {
    "timesteps": ByTimestep,
    "sigmas": VariancePreserving,
    "exploding": VarianceExploding,
}
# Schedulers with an adapter of their own.
_OWN_ADAPTERS: dict[str, type[SchedulerAdapter]] = {
    "LMSDiscreteScheduler": LinearMultistep,
    "PNDMScheduler": PseudoNumerical,
    "LCMScheduler": LatentConsistency,
    "EulerAncestralDiscreteScheduler": AncestralEuler,
}


def make_sampler(
    spec: SamplingSpec, model: ModelScheduler, device: torch.device | str = "cpu", noise: NoiseStream | None = None
) -> SchedulerAdapter:
    """A sampler with a scheduler of diffusers, for one batch.

    Args:
        spec: scheduler, number of steps, timestep spacing, sigmas.
        model: the model's own scheduler.
        device: of the network.
        noise: of the batch, for a scheduler that draws noise at its steps.

    Raises:
        ValueError: zero terminal SNR with eps-prediction, which is 0 / 0 at the first step (Lin et al. 2024), a
            prediction type other than eps and v, or steps that diffusers would skip.
    """
    kind = KNOWN[model.chosen(spec)]
    module = importlib.import_module(f"diffusers.schedulers.{kind.module}")
    scheduler = getattr(module, model.chosen(spec)).from_config(model.config, **model.options(spec))
    zero_snr = scheduler.config.get("rescale_betas_zero_snr", False) and kind.has_zero_snr
    if problem := noise_problem(scheduler.config.prediction_type, zero_snr):
        raise ValueError(problem)
    scheduler.set_timesteps(spec.num_inference_steps, device="cpu")
    adapter = _OWN_ADAPTERS.get(model.chosen(spec), _ADAPTERS[kind.levels])
    return adapter(scheduler, device, noise)
