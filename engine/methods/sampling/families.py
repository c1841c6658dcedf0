"""Which of diffusers' schedulers are known to be right here; from configurations, without torch.

Two questions are separate. What a model was trained for: the schedulers of `FAMILY` are solvers of one training
objective, and exchangeable by diffusers' `from_config`; a model of `CONSISTENCY` jumps to the clean latents, and is
sampled so alone; others (flow matching, EDM) are of another training (`training_checks.py`). How it is sampled: the
schedulers of `KINDS` draw no noise, those of `NOISY_KINDS` draw some at every step, and `schedulers.py` knows the noise
levels of their steps; `sampling_checks.py` has the options and numbers of steps that are supported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from engine.methods.sampling.spec import SamplingSpec

Levels = Literal["timesteps", "sigmas", "exploding"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """A scheduler of diffusers.

    Attributes:
        module: of `diffusers.schedulers`.
        levels: which adapter reads the noise levels of its steps: from `alphas_cumprod` by timestep, or from `sigmas`
            by position, variance-preserving (`sigmas`) or variance-exploding (`exploding`).
        is_guidable: whether a step starts from the latents that it is given, which guidance may have moved; others
            start from latents that they store.
        has_sigmas: whether it supports Karras (and exponential, beta) sigmas.
        has_zero_snr: whether it supports `rescale_betas_zero_snr`.
        has_spacing: whether it follows `timestep_spacing`.
    """

    module: str
    levels: Levels
    is_guidable: bool = True
    has_sigmas: bool = True
    has_zero_snr: bool = False
    has_spacing: bool = True


KINDS = {
    "DDIMScheduler": Kind(module="scheduling_ddim", levels="timesteps", has_sigmas=False, has_zero_snr=True),
    "LMSDiscreteScheduler": Kind(module="scheduling_lms_discrete", levels="exploding"),
    "EulerDiscreteScheduler": Kind(module="scheduling_euler_discrete", levels="exploding", has_zero_snr=True),
    "DPMSolverMultistepScheduler": Kind(module="scheduling_dpmsolver_multistep", levels="sigmas", has_zero_snr=True),
    "DEISMultistepScheduler": Kind(module="scheduling_deis_multistep", levels="sigmas"),
    "PNDMScheduler": Kind(module="scheduling_pndm", levels="timesteps", is_guidable=False, has_sigmas=False),
    "UniPCMultistepScheduler": Kind(
        module="scheduling_unipc_multistep", levels="sigmas", is_guidable=False, has_zero_snr=True
    ),
    "HeunDiscreteScheduler": Kind(module="scheduling_heun_discrete", levels="exploding", is_guidable=False),
    "KDPM2DiscreteScheduler": Kind(module="scheduling_k_dpm_2_discrete", levels="exploding", is_guidable=False),
}
NOISY_KINDS = {
    "LCMScheduler": Kind(
        module="scheduling_lcm", levels="timesteps", has_sigmas=False, has_zero_snr=True, has_spacing=False
    ),
    "EulerAncestralDiscreteScheduler": Kind(
        module="scheduling_euler_ancestral_discrete", levels="exploding", has_sigmas=False, has_zero_snr=True
    ),
}
KNOWN = KINDS | NOISY_KINDS
# `sampling.scheduler` in a job; `model` is the model's own.
CLASSES = {
    "lms": "LMSDiscreteScheduler",
    "ddim": "DDIMScheduler",
    "euler": "EulerDiscreteScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "lcm": "LCMScheduler",
}
FAMILY = (
    *KINDS,
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DDIMParallelScheduler",
    "EulerAncestralDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverSinglestepScheduler",
)
# Schedulers of models that are distilled to jump to the clean latents.
CONSISTENCY = ("LCMScheduler",)
MULTISTEP = ("DPMSolverMultistepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelScheduler:
    """The scheduler in a pipeline's folder.

    Attributes:
        config: its `scheduler_config.json`.
        name: its class in diffusers.
        is_corrected: whether diffusers' pipeline sets `steps_offset` to 1 and `clip_sample` to false, whatever the
            configuration says: that of Stable Diffusion does, that of Stable unCLIP does not.
    """

    config: dict[str, Any]
    name: str
    is_corrected: bool = True

    def chosen(self, spec: SamplingSpec) -> str:
        """The class of the scheduler that a job's sampling asks for."""
        return self.name if spec.scheduler == "model" else CLASSES[spec.scheduler]

    def options(self, spec: SamplingSpec) -> dict[str, Any]:
        """Options that override the configuration's."""
        name = self.chosen(spec)
        options: dict[str, Any] = {"steps_offset": 1} if self.is_corrected else {}
        if self.is_corrected and name in ("DDIMScheduler", "HeunDiscreteScheduler", "LCMScheduler"):
            options["clip_sample"] = False
        if spec.scheduler == "dpmsolver++":
            options["algorithm_type"] = "dpmsolver++"
            # These two store a solver type of their own in their configuration, which DPM-Solver++ would take over.
            if self.name in ("DEISMultistepScheduler", "UniPCMultistepScheduler"):
                options["solver_type"] = "midpoint"
        if spec.timestep_spacing and KNOWN[name].has_spacing:
            options["timestep_spacing"] = spec.timestep_spacing
        if spec.rescale_betas_zero_snr:
            options["rescale_betas_zero_snr"] = True
        if spec.use_karras_sigmas is not None and KNOWN[name].has_sigmas:
            options["use_karras_sigmas"] = spec.use_karras_sigmas
        return options
