"""Whether a job's sampling is possible with a model, by the configuration of its scheduler; without torch."""

from __future__ import annotations

import math
from typing import Any

from engine.methods.config_values import is_integer, is_number, shown
from engine.methods.sampling.families import CLASSES, CONSISTENCY, KINDS, KNOWN, MULTISTEP, ModelScheduler
from engine.methods.sampling.spec import SamplingSpec, noise_problem

_SIGMA_FLAGS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")
_SOLVER_TYPES = ("midpoint", "heun", "logrho", "bh1", "bh2")
# Options with several supported values, and the schedulers that read them; other schedulers ignore them.
_CHOICES: dict[str, tuple[tuple[str, ...], tuple[Any, ...]]] = {
    "timestep_spacing": (
        tuple(name for name, kind in KNOWN.items() if kind.has_spacing),
        ("leading", "linspace", "trailing"),
    ),
    "interpolation_type": (("EulerDiscreteScheduler",), ("linear", "log_linear")),
    "final_sigmas_type": (
        ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"),
        ("zero", "sigma_min"),
    ),
    "solver_type": (("DPMSolverMultistepScheduler", "DEISMultistepScheduler"), _SOLVER_TYPES),
    "solver_order": (MULTISTEP, (1, 2, 3)),
}
# Other values give NaN at the last step of UniPC, or nest another scheduler.
_UNIPC: dict[str, tuple[Any, ...]] = {
    "solver_type": ("bh2", "midpoint", "heun", "logrho"),
    "predict_x0": (True,),
    "lower_order_final": (True,),
    "solver_p": (None,),
    "shift_terminal": (None,),
}
_ALGORITHMS = {
    "DPMSolverMultistepScheduler": ("dpmsolver++", "dpmsolver", "deis"),
    "DEISMultistepScheduler": ("deis", "dpmsolver", "dpmsolver++"),
}


def sampling_problems(scheduler: ModelScheduler, spec: SamplingSpec, *, is_guided: bool) -> list[str]:
    """What is impossible about a job's sampling with a model whose training is supported.

    Args:
        is_guided: whether a method moves the latents.

    Returns:
        Lines that go on after `sampling`: `.scheduler: ...`, or `: ...` where no field alone is at fault.
    """
    if spec.scheduler == "model" and (problem := _own_problem(scheduler, is_guided)):
        return [f".scheduler: {problem}"]
    name = scheduler.chosen(spec)
    if scheduler.name in CONSISTENCY and name not in CONSISTENCY:
        text = f"the model's own scheduler is {scheduler.name}, so it is trained to jump to the image, not to follow"
        return [f".scheduler: {text} '{spec.scheduler}'; use lcm or model, with 1 to 8 steps"]
    config = scheduler.config | scheduler.options(spec)
    if problems := [f".scheduler: {problem}" for problem in _option_problems(name, config)]:
        return problems
    return (
        _noise_problems(name, config, spec)
        or _spacing_problems(name, spec)
        or _sigma_problems(name, config, spec)
        or _step_problems(name, config, spec.num_inference_steps)
        or (_limit_problems(name, config, spec) if is_guided else [])
    )


def _own_problem(scheduler: ModelScheduler, is_guided: bool) -> str:
    """Why a model's own scheduler does not run; empty if it does."""
    name, rest = scheduler.name, f"use one of {', '.join(name for name, kind in CLASSES.items() if kind in KINDS)}"
    algorithm = str(scheduler.config.get("algorithm_type", ""))
    if name not in KNOWN or (name in MULTISTEP and algorithm.startswith("sde")):
        kind = f"{name} with {algorithm}" if name in KNOWN else name
        return f"'model' is a {kind}, which draws noise at every step or is not supported as such; {rest}"
    if is_guided and not KNOWN[name].is_guidable:
        return f"'model' is a {name}, which would ignore how guidance moves the latents; {rest}"
    return ""


def _option_problems(name: str, config: dict[str, Any]) -> list[str]:
    """Options that the chosen scheduler reads, with a value that it does not support here."""
    asked = {option: known for option, (readers, known) in _CHOICES.items() if name in readers}
    problems = [
        f"scheduler_config.json has {option}: {shown(config[option])}; {name} is known to be right with"
        f" {', '.join(map(str, known))}"
        for option, known in (asked | (_UNIPC if name == "UniPCMultistepScheduler" else {})).items()
        if option in config and config[option] not in known
    ]
    algorithm = config.get("algorithm_type")
    if algorithm is not None and name in _ALGORITHMS and algorithm not in _ALGORITHMS[name]:
        problems.append(f"scheduler_config.json has algorithm_type: {shown(algorithm)}, which is not supported")
    is_old = name == "DPMSolverMultistepScheduler" and algorithm == "dpmsolver"
    if is_old and config.get("final_sigmas_type", "zero") == "zero":
        problems.append(
            "scheduler_config.json has algorithm_type: 'dpmsolver', which needs final_sigmas_type: sigma_min"
        )
    return problems


def _noise_problems(name: str, config: dict[str, Any], spec: SamplingSpec) -> list[str]:
    if spec.rescale_betas_zero_snr and not KNOWN[name].has_zero_snr:
        return [f".rescale_betas_zero_snr: zero terminal SNR is not defined for {name}; use ddim, euler or dpmsolver++"]
    zero_snr = KNOWN[name].has_zero_snr and bool(config.get("rescale_betas_zero_snr"))
    problem = noise_problem(config.get("prediction_type", "epsilon"), zero_snr)
    return [f": {problem}"] if problem else []


def _spacing_problems(name: str, spec: SamplingSpec) -> list[str]:
    if spec.timestep_spacing is None or KNOWN[name].has_spacing:
        return []
    return [f".timestep_spacing: {name} takes the timesteps that its models were distilled on; leave it out"]


def _sigma_problems(name: str, config: dict[str, Any], spec: SamplingSpec) -> list[str]:
    if not KNOWN[name].has_sigmas:
        if spec.use_karras_sigmas:
            return [f".use_karras_sigmas: {name} has no sigmas; use lms, euler or dpmsolver++"]
        return []
    asked = [flag for flag in _SIGMA_FLAGS if config.get(flag)]
    if len(asked) > 1:
        return [f".use_karras_sigmas: with the model's scheduler_config.json {' and '.join(asked)}; only one can be"]
    if name not in MULTISTEP or not (asked or config.get("use_lu_lambdas")):
        return []
    if not _has_distinct_start(config, spec.num_inference_steps):
        return [
            f".num_inference_steps: {spec.num_inference_steps} have the same timestep twice at the start with"
            f" {(asked or ['use_lu_lambdas'])[0]}, where {name} skips one; use euler or lms, or fewer steps"
        ]
    return []


def _has_distinct_start(config: dict[str, Any], num_steps: int) -> bool:
    """Whether the first two sigmas remain two timesteps after rounding to whole numbers.

    diffusers takes the second of two equal timesteps for the first, skips a sigma, and runs past the last.
    """
    if num_steps < 2:
        return True
    sigmas = _training_sigmas(config)
    if len(sigmas) < 2:
        return False
    second = _second_sigma(config, sigmas[0], sigmas[-1], 1 / (num_steps - 1))
    below = (math.log(sigmas[-1]) - math.log(second)) / (math.log(sigmas[-1]) - math.log(sigmas[-2]))
    is_rounded = config.get("beta_schedule") != "squaredcos_cap_v2" and not (
        config.get("use_exponential_sigmas") or config.get("use_beta_sigmas")
    )
    return below > (0.5 if is_rounded else 1.0)


def _second_sigma(config: dict[str, Any], low: float, high: float, share: float) -> float:
    """The sigma after the highest, a share of the way to the lowest."""
    if config.get("use_karras_sigmas"):
        return float((high ** (1 / 7) + share * (low ** (1 / 7) - high ** (1 / 7))) ** 7)
    if config.get("use_exponential_sigmas") or config.get("use_lu_lambdas"):
        return math.exp(math.log(high) + share * (math.log(low) - math.log(high)))
    # Beta sigmas: dense at both ends; 1.5 is below 1 / 0.6, the power of their distance from the end.
    return float(low + (high - low) * (1 - share**1.5))


def _training_sigmas(config: dict[str, Any]) -> list[float]:
    """Noise levels `sqrt((1 - abar) / abar)` of the training timesteps, as diffusers computes them."""
    roots, product = [], 1.0
    for beta in _training_betas(config):
        product *= 1 - beta
        roots.append(math.sqrt(product))
    if config.get("rescale_betas_zero_snr") and len(roots) > 1:
        start, end = roots[0], roots[-1]
        roots = [(root - end) * start / (start - end) for root in roots]
        roots[-1] = 2.0**-12
    return [math.sqrt(max(1 - root**2, 0)) / root for root in roots]


def _training_betas(config: dict[str, Any]) -> list[float]:
    total, schedule = config.get("num_train_timesteps", 1000), config.get("beta_schedule", "linear")
    first, last = config.get("beta_start", 0.0001), config.get("beta_end", 0.02)
    if config.get("trained_betas") is not None:
        return list(config["trained_betas"])
    shares = [place / max(total - 1, 1) for place in range(total)]
    if schedule == "linear":
        return [first + share * (last - first) for share in shares]
    if schedule == "scaled_linear":
        return [(first**0.5 + share * (last**0.5 - first**0.5)) ** 2 for share in shares]
    bars = [math.cos((place / total + 0.008) / 1.008 * math.pi / 2) ** 2 for place in range(total + 1)]
    return [min(1 - bars[place + 1] / bars[place], 0.999) for place in range(total)]


def _step_problems(name: str, config: dict[str, Any], num_steps: int) -> list[str]:
    """Numbers of steps whose timesteps leave the range of the training."""
    total = config.get("num_train_timesteps", 1000)
    if name in CONSISTENCY:
        return _consistency_problems(config, total, num_steps)
    default = "leading" if name in ("DDIMScheduler", "PNDMScheduler") else "linspace"
    spacing = config.get("timestep_spacing", default)
    least = 4 if name == "PNDMScheduler" and not config.get("skip_prk_steps", False) else 1
    if num_steps < least:
        return [f".num_inference_steps: {num_steps} is too few for {name}; give {least} or more"]
    # These compute one timestep more, which would round to an existing one.
    most = total - 1 if name in MULTISTEP and spacing == "linspace" else total
    if num_steps > most:
        return [f".num_inference_steps: {num_steps} is above the {most} timesteps of the model's training; give fewer"]
    if spacing == "trailing" and math.ceil(total / (total / num_steps)) > num_steps:
        text = f".num_inference_steps: {num_steps} in trailing spacing reach below timestep 0, by rounding"
        return [f"{text}; take {num_steps - 1}, or another timestep_spacing"]
    offset = config.get("steps_offset", 0)
    ratio = total // (num_steps + 1) if name in MULTISTEP else total // num_steps
    highest = (num_steps if name in MULTISTEP else num_steps - 1) * ratio + offset
    if spacing == "leading" and (ratio < 1 or highest >= total):
        text = f".num_inference_steps: {num_steps} in leading spacing leave the {total} timesteps of the training"
        return [f"{text}; give fewer, or another timestep_spacing"]
    return []


def _consistency_problems(config: dict[str, Any], total: int, num_steps: int) -> list[str]:
    """Numbers of steps that LCM cannot take from the timesteps of its distillation."""
    most = config.get("original_inference_steps", 50)
    if not is_integer(most) or not 1 <= most <= total:
        text = f"scheduler_config.json has original_inference_steps: {shown(most)}, not a number of the {total}"
        return [f".scheduler: {text} timesteps of the training"]
    if not is_number(scaling := config.get("timestep_scaling", 10.0)) or scaling <= 0:
        return [f".scheduler: scheduler_config.json has timestep_scaling: {shown(scaling)}, not a positive number"]
    if num_steps > most:
        text = f"{num_steps} is above the {most} timesteps that the model was distilled on (original_inference_steps)"
        return [f".num_inference_steps: {text}; 1 to 8 are usual"]
    return []


def _limit_problems(name: str, config: dict[str, Any], spec: SamplingSpec) -> list[str]:
    """The option by which the chosen scheduler clips x0, while guidance sees it unclipped."""
    limit = ""
    if name in ("DDIMScheduler", *CONSISTENCY) and config.get("clip_sample", name == "DDIMScheduler"):
        limit = "clip_sample"
    elif name in ("DDIMScheduler", *CONSISTENCY, *MULTISTEP) and config.get("thresholding"):
        limit = "thresholding"
    if not limit:
        return []
    return [
        f".scheduler: '{spec.scheduler}' limits the predicted image ({limit} of the model's scheduler_config.json), and"
        f" guidance sees one without limits; write {limit}: false there, or use lms or euler"
    ]
