"""Flow matching by the configuration of a model's scheduler: its training, its solvers, its shift; without torch.

Models of flow matching (Liu et al. 2023, Esser et al. 2024) predict the velocity `eps - x0` of latents
`(1 - sigma) x0 + sigma eps`. Their schedulers are not exchangeable with those of eps- and v-prediction.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from engine.methods.config_values import is_integer, is_number, shown
from engine.methods.sampling.families import ModelScheduler
from engine.methods.sampling.spec import SamplingSpec
from engine.methods.sampling.training_checks import MAX_TIMESTEPS

EULER, HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"
DPM_SOLVER = "DPMSolverMultistepScheduler"
# Classes of a model's own scheduler.
FLOW_FAMILY = (EULER, HEUN)
# `sampling.scheduler` in a job; `model` is the model's own.
FLOW_CLASSES = {"euler": EULER, "dpmsolver++": DPM_SOLVER}
SIGMA_FLAGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
# Limits of the exponent of a dynamic shift: far beyond what models have, and far from an overflow.
_MAX_EXPONENT = 20.0
_MAX_SHIFT = 1000.0
# Defaults of diffusers, in the order of `dynamic_shift`.
_DYNAMIC = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
_OPTIONS: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("invert_sigmas", (False, None), "the model's time runs backwards"),
    ("stochastic_sampling", (False, None), "it draws noise at every step"),
    ("shift_terminal", (None,), "its last step is not known to be right here"),
    ("use_dynamic_shifting", (True, False), "neither true nor false"),
    ("time_shift_type", ("exponential", "linear"), "not a shift of diffusers"),
    *((flag, (True, False, None), "neither true nor false") for flag in SIGMA_FLAGS),
)


def flow_training_problems(scheduler: ModelScheduler) -> list[str]:
    """Why a model is not one of flow matching that runs, or its configuration cannot be read; a line each."""
    config, name, where = scheduler.config, scheduler.name, "scheduler_config.json"
    if name not in FLOW_FAMILY:
        return [f"its scheduler is a {name}; what runs: models of {' and '.join(FLOW_FAMILY)}"]
    if (written := config.get("_class_name", name)) != name:
        return [f"model_index.json names a {name}, {where} a {shown(written)}; make both the same"]
    problems = [
        f"{where} has {option}: {shown(config[option])} ({meaning})"
        for option, known, meaning in _OPTIONS
        if option in config and not _is_one_of(config[option], known)
    ]
    total, shift = config.get("num_train_timesteps", 1000), config.get("shift", 1.0)
    if not is_integer(total) or not 1 <= total <= MAX_TIMESTEPS:
        problems.append(f"{where} has num_train_timesteps: {shown(total)}, not a number of timesteps")
    if not is_number(shift) or not 0 < shift <= _MAX_SHIFT:
        problems.append(f"{where} has shift: {shown(shift)}, not a number above 0 and up to {_MAX_SHIFT:g}")
    flags = [flag for flag in SIGMA_FLAGS if config.get(flag)]
    if len(flags) > 1:
        problems.append(f"{where} has {' and '.join(flags)}; only one can be")
    return problems or _dynamic_problems(name, config)


def _is_one_of(value: Any, known: tuple[Any, ...]) -> bool:
    """Whether a value is one of these, which 0 and 1 are not for false and true."""
    return any(type(value) is type(one) and value == one for one in known)


def _dynamic_problems(name: str, config: Mapping[str, Any]) -> list[str]:
    """Numbers of a dynamic shift that are none."""
    if not config.get("use_dynamic_shifting"):
        return []
    where = "scheduler_config.json"
    if name == HEUN:
        return [f"{where} has use_dynamic_shifting: true, which {HEUN} does not know"]
    values = {option: config.get(option, default) for option, default in _DYNAMIC.items()}
    problems = [
        f"{where} has {option}: {shown(value)}, not a number"
        for option, value in values.items()
        if not is_number(value)
    ]
    if not problems and values["base_image_seq_len"] == values["max_image_seq_len"]:
        both = shown(values["base_image_seq_len"])
        problems.append(f"{where} has base_image_seq_len and max_image_seq_len: {both}; the shift needs two of them")
    return problems


def dynamic_shift(config: Mapping[str, Any], num_tokens: int) -> float | None:
    """The exponent of the shift for an image of so many tokens (Esser et al. 2024, section 5.3.2), as diffusers has it.

    Returns:
        None where the model's shift does not depend on the size.
    """
    if not config.get("use_dynamic_shifting"):
        return None
    few, many, low, high = (config.get(option, default) for option, default in _DYNAMIC.items())
    slope = (high - low) / (many - few)
    return float(num_tokens * slope + (low - slope * few))


def flow_sampling_problems(
    scheduler: ModelScheduler, spec: SamplingSpec, *, num_tokens: int, is_guided: bool
) -> list[str]:
    """What is impossible about a job's sampling with a model that `flow_training_problems` lets through.

    Args:
        num_tokens: of an image, which a dynamic shift depends on.
        is_guided: whether a method moves the latents.

    Returns:
        Lines that go on after `sampling`: `.scheduler: ...`, or `: ...` where no field alone is at fault.
    """
    name = chosen(scheduler, spec)
    if name is None:
        reason = "does not solve flow matching, which the model is trained by"
        return [f".scheduler: {spec.scheduler!r} {reason}; use euler, dpmsolver++ or model"]
    if name == HEUN and is_guided:
        reason = "which would ignore how guidance moves the latents"
        return [f".scheduler: 'model' is a {HEUN}, {reason}; use euler or dpmsolver++"]
    problems = []
    if spec.timestep_spacing is not None:
        problems.append(f".timestep_spacing: {spec.timestep_spacing!r}, but flow matching has no spacing; leave it out")
    if spec.rescale_betas_zero_snr:
        problems.append(".rescale_betas_zero_snr: flow matching has no betas; leave it out")
    if spec.use_karras_sigmas and name != EULER:
        problems.append(f".use_karras_sigmas: {name} has none with flow matching; use euler")
    total = scheduler.config.get("num_train_timesteps", 1000)
    if spec.num_inference_steps > total:
        problems.append(
            f".num_inference_steps: {spec.num_inference_steps} is above the {total} timesteps of the model's training;"
            " give fewer"
        )
    return problems or _shift_problems(name, scheduler.config, num_tokens)


def _shift_problems(name: str, config: Mapping[str, Any], num_tokens: int) -> list[str]:
    exponent, kind = dynamic_shift(config, num_tokens), config.get("time_shift_type", "exponential")
    if exponent is None:
        return []
    if name == DPM_SOLVER and kind != "exponential":
        return [
            f".scheduler: {DPM_SOLVER} has no {kind} shift, as the model's scheduler_config.json asks for; use euler"
        ]
    if abs(exponent) > _MAX_EXPONENT or (kind == "linear" and exponent <= 0):
        where = f"of the model's scheduler_config.json is {exponent:g} for images of {num_tokens} tokens"
        return [f": the dynamic shift {where}, which no model was trained with"]
    return []


def chosen(scheduler: ModelScheduler, spec: SamplingSpec) -> str | None:
    """The class of the scheduler that a job's sampling asks for; None if it solves no flow."""
    return scheduler.name if spec.scheduler == "model" else FLOW_CLASSES.get(spec.scheduler)


def flow_options(scheduler: ModelScheduler, spec: SamplingSpec, num_tokens: int) -> dict[str, Any]:
    """Options that override the configuration's, for diffusers' `from_config`."""
    if chosen(scheduler, spec) != DPM_SOLVER:
        flags = {} if spec.use_karras_sigmas is None else {SIGMA_FLAGS[0]: spec.use_karras_sigmas}
        return flags | (dict.fromkeys(SIGMA_FLAGS[1:], False) if spec.use_karras_sigmas else {})
    exponent = dynamic_shift(scheduler.config, num_tokens)
    return {
        "algorithm_type": "dpmsolver++",
        "prediction_type": "flow_prediction",
        "use_flow_sigmas": True,
        "flow_shift": scheduler.config.get("shift", 1.0) if exponent is None else math.exp(exponent),
        "use_dynamic_shifting": False,
        **dict.fromkeys(SIGMA_FLAGS, False),
    }
