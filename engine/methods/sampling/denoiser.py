"""Denoisers: a network with classifier-free guidance behind one contract, for every prediction type and sampler.

Legend: B samples, C channels, H x W latent size. At a step the latents are `z = scale * x0 + sigma * eps`: scale 1 for
the variance-exploding schedulers (LMS, Euler), `sqrt(abar)` and `sqrt(1 - abar)` for the variance-preserving ones
(DDIM, DPM-Solver++), `1 - sigma` for flow matching. The three prediction types follow from these two numbers, so that
guidance and samplers get x0 and eps from any network, as with the adapters of k-diffusion (`external.py`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from engine.methods.scores import at_least_float32

PredictionType = Literal["epsilon", "v_prediction", "flow"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of the sampler.

    Attributes:
        index: counted from 1.
        total: number of steps T.
        timestep: the network's input for the noise level.
        scale: factor of x0 in the latents.
        sigma: factor of eps in the latents.
        normalise_input: divide the latents by `sqrt(scale^2 + sigma^2)` before the network (variance-exploding).
    """

    index: int
    total: int
    timestep: Tensor
    scale: float
    sigma: float
    normalise_input: bool

    @property
    def signal(self) -> float:
        """Share of x0 in the latents, 0 to 1: `sqrt(abar)`, whichever scheduler steps."""
        return self.scale / math.hypot(self.scale, self.sigma)

    def network_input(self, latents: Tensor) -> Tensor:
        """The latents as the network expects them."""
        return latents / math.hypot(self.scale, self.sigma) if self.normalise_input else latents


Conversion = Callable[[Tensor, Tensor, Step], Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameterisation:
    """What a network's output stands for; all tensors [B, C, H, W].

    Attributes:
        x0: `(output, latents, step)` to the clean latents.
        eps: `(output, latents, step)` to the noise.
        output: `(eps, latents, step)` to the network's output, the inverse of `eps`.
    """

    x0: Conversion
    eps: Conversion
    output: Conversion


def _x0_of_v(output: Tensor, latents: Tensor, step: Step) -> Tensor:
    norm = math.hypot(step.scale, step.sigma)
    return (step.scale * latents / norm - step.sigma * output) / norm


def _eps_of_v(output: Tensor, latents: Tensor, step: Step) -> Tensor:
    norm = math.hypot(step.scale, step.sigma)
    return (step.scale * output + step.sigma * latents / norm) / norm


def _v_of_eps(eps: Tensor, latents: Tensor, step: Step) -> Tensor:
    norm = math.hypot(step.scale, step.sigma)
    return (norm * eps - step.sigma * latents / norm) / step.scale


PARAMETERISATIONS: Mapping[PredictionType, Parameterisation] = {
    # The noise itself (Ho et al. 2020).
    "epsilon": Parameterisation(
        x0=lambda output, latents, step: (latents - step.sigma * output) / step.scale,
        eps=lambda output, _latents, _step: output,
        output=lambda eps, _latents, _step: eps,
    ),
    # v = (scale * eps - sigma * x0) / sqrt(scale^2 + sigma^2) (Salimans and Ho 2022).
    "v_prediction": Parameterisation(x0=_x0_of_v, eps=_eps_of_v, output=_v_of_eps),
    # The velocity eps - x0 of rectified flow (Liu et al. 2023).
    "flow": Parameterisation(
        x0=lambda output, latents, step: (latents - step.sigma * output) / (step.scale + step.sigma),
        eps=lambda output, latents, step: (latents + step.scale * output) / (step.scale + step.sigma),
        output=lambda eps, latents, step: ((step.scale + step.sigma) * eps - latents) / step.scale,
    ),
}


def predicted_x0(output: Tensor, latents: Tensor, step: Step, prediction: PredictionType) -> Tensor:
    """Clean latents x0 that a network output stands for, [B, C, H, W] (section 6 of the methods)."""
    return PARAMETERISATIONS[prediction].x0(output, latents, step)


def predicted_eps(output: Tensor, latents: Tensor, step: Step, prediction: PredictionType) -> Tensor:
    """Noise eps that a network output stands for, [B, C, H, W]."""
    return PARAMETERISATIONS[prediction].eps(output, latents, step)


def output_of_eps(eps: Tensor, latents: Tensor, step: Step, prediction: PredictionType) -> Tensor:
    """Network output that stands for a noise eps at the latents: the inverse of `predicted_eps`."""
    return PARAMETERISATIONS[prediction].output(eps, latents, step)


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What a denoiser predicts at a step; all tensors [B, C, H, W].

    Attributes:
        output: what the scheduler steps with (eps, v or a velocity, with classifier-free guidance).
        conditional: the conditional half alone, without classifier-free guidance.
        latents: the latents to step from; guidance may have moved them.
        prediction: what `output` is.
    """

    output: Tensor
    conditional: Tensor
    latents: Tensor
    prediction: PredictionType

    def moved(self, shift: Tensor, step: Step) -> Prediction:
        """The prediction at `latents + shift`, with the eps of the latents before the shift."""
        return self._at(self.latents + shift, self._eps(step), step)

    def detached(self) -> Prediction:
        """The same without a graph, whose memory ends with it."""
        return dataclasses.replace(self, conditional=self.conditional.detach(), latents=self.latents.detach())

    def with_eps_moved(self, shift: Tensor, step: Step) -> Prediction:
        """The prediction of `eps + shift` at the same latents; x0 and the direction follow together."""
        return self._at(self.latents, self._eps(step) + shift, step)

    def _eps(self, step: Step) -> Tensor:
        return predicted_eps(self.output, self.latents, step, self.prediction)

    def _at(self, latents: Tensor, eps: Tensor, step: Step) -> Prediction:
        output = output_of_eps(eps, latents, step, self.prediction)
        return dataclasses.replace(self, latents=latents, output=output)


class Denoiser(Protocol):
    """Predicts the noise in latents [B, C, H, W] at a step. Guidance wraps one denoiser into another."""

    def __call__(self, latents: Tensor, step: Step) -> Prediction:
        """Predict without changing the latents' own storage."""


@dataclass(frozen=True, slots=True)
class Condition:
    """What a network is conditioned on apart from the timestep, by the names that its pipeline uses.

    Attributes:
        tensors: [B, ...] each: text embeddings, and whatever else a family of pipelines needs.
    """

    tensors: Mapping[str, Tensor]

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name]

    def rows(self, rows: Tensor) -> Condition:
        """The condition of the samples of these numbers."""
        return Condition({name: tensor[rows] for name, tensor in self.tensors.items()})

    def followed_by(self, other: Condition) -> Condition:
        """Both batches as a single batch, with the rows of `self` first.

        Raises:
            ValueError: they have other names.
        """
        if self.tensors.keys() != other.tensors.keys():
            raise ValueError(f"conditions of {sorted(self.tensors)} and {sorted(other.tensors)} are not of one network")
        return Condition({name: torch.cat([tensor, other[name]]) for name, tensor in self.tensors.items()})


Network = Callable[[Tensor, Tensor, Condition], Tensor]


class ClassifierFreeDenoiser:
    """A network with classifier-free guidance, as in diffusers' pipelines (Ho and Salimans 2022).

    Args:
        network: `(latents, timestep, condition) -> output`, all [B, ...].
        conditional: of the prompts.
        unconditional: of the negative prompt.
        prediction: what the network predicts.
        guidance_scale: 1 uses the conditional half alone.
        guidance_rescale: share of the rescaled prediction (Lin et al. 2024, section 3.4).
    """

    def __init__(
        self,
        network: Network,
        *,
        conditional: Condition,
        unconditional: Condition,
        prediction: PredictionType,
        guidance_scale: float,
        guidance_rescale: float = 0.0,
    ) -> None:
        self._network = network
        self._conditional = conditional
        self._unconditional = unconditional
        self._both = unconditional.followed_by(conditional)
        self.prediction: PredictionType = prediction
        self._scale = guidance_scale
        self._rescale = guidance_rescale

    @torch.no_grad()
    def __call__(self, latents: Tensor, step: Step) -> Prediction:
        """Predict for latents [B, C, H, W]."""
        if self._scale <= 1:
            output = conditional = self.conditional_output(latents, step)
        else:
            inputs = step.network_input(torch.cat([latents, latents]))
            unconditional, conditional = at_least_float32(self._network(inputs, step.timestep, self._both)).chunk(2)
            output = self._combined(unconditional, conditional)
        return Prediction(output=output, conditional=conditional, latents=latents, prediction=self.prediction)

    def attached(self, latents: Tensor, step: Step, rows: Tensor | None = None) -> Prediction:
        """The same prediction, its conditional half differentiable in the latents [B, C, H, W].

        The two halves are two calls of B rows in place of one of 2 B: a gradient costs no forward pass of its own.

        Args:
            rows: numbers of the samples that have a graph, the others being in the second call; None for all.
        """
        if rows is not None:
            return self._partly_attached(latents, step, rows)
        with torch.enable_grad():
            conditional = self.conditional_output(latents, step)
        with torch.no_grad():
            output = conditional.detach()
            if self._scale > 1:
                unconditional = self._network(step.network_input(latents), step.timestep, self._unconditional)
                output = self._combined(at_least_float32(unconditional), output)
        return Prediction(output=output, conditional=conditional, latents=latents, prediction=self.prediction)

    def _partly_attached(self, latents: Tensor, step: Step, rows: Tensor) -> Prediction:
        with torch.enable_grad():
            moving = self.conditional_output(latents, step, rows)
        with torch.no_grad():
            numbers = torch.arange(len(latents))
            rest = numbers[~torch.isin(numbers, rows)]
            # Without classifier-free guidance there is no unconditional half.
            half = numbers if self._scale > 1 else numbers[:0]
            inputs = step.network_input(latents[torch.cat([half, rest])])
            condition = self._unconditional.rows(half).followed_by(self._conditional.rows(rest))
            outputs = at_least_float32(self._network(inputs, step.timestep, condition))
            unconditional, still = outputs.split([len(half), len(rest)])
        with torch.enable_grad():
            conditional = placed(still, rest, len(latents)).index_put((rows,), moving)
        with torch.no_grad():
            output = conditional.detach()
            output = self._combined(unconditional, output) if self._scale > 1 else output
        return Prediction(output=output, conditional=conditional, latents=latents, prediction=self.prediction)

    def _combined(self, unconditional: Tensor, conditional: Tensor) -> Tensor:
        """Classifier-free guidance from the unconditional and the conditional half."""
        output = unconditional + self._scale * (conditional - unconditional)
        return rescaled(output, conditional, self._rescale) if self._rescale > 0 else output

    def conditional_output(self, latents: Tensor, step: Step, rows: Tensor | None = None) -> Tensor:
        """Output of the conditional half alone, differentiable in the latents; of the samples of these numbers."""
        inputs, condition = latents, self._conditional
        if rows is not None:
            inputs, condition = latents[rows], condition.rows(rows)
        return at_least_float32(self._network(step.network_input(inputs), step.timestep, condition))


def placed(values: Tensor, rows: Tensor, num_rows: int) -> Tensor:
    """Values [b, ...] at their rows of [num_rows, ...], zeros elsewhere; differentiable."""
    empty = values.new_zeros(num_rows, *values.shape[1:])
    return torch.index_put(empty, (rows,), values)


def rescaled(output: Tensor, conditional: Tensor, share: float) -> Tensor:
    """Bring the spread of a guided output back to the conditional's (Lin et al. 2024, equations 15 and 16)."""
    dims = list(range(1, output.ndim))
    spread = conditional.std(dim=dims, keepdim=True) / output.std(dim=dims, keepdim=True)
    return share * output * spread + (1 - share) * output
