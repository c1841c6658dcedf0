"""Whether a model's training objective is supported, by the configuration of its scheduler; without torch."""

from __future__ import annotations

from typing import Any

from engine.methods.config_values import is_integer, is_number, shown
from engine.methods.sampling.families import CONSISTENCY, FAMILY, ModelScheduler

# No model is trained with more; the noise level of each is computed.
MAX_TIMESTEPS = 100_000
# Of every model, whichever scheduler samples it: option, supported values, what other values mean.
_TRAINING: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("prediction_type", ("epsilon", "v_prediction"), "only epsilon and v_prediction are supported"),
    ("beta_schedule", ("linear", "scaled_linear", "squaredcos_cap_v2"), "not a schedule of betas of every scheduler"),
    ("timestep_type", ("discrete", None), "the model takes noise levels in place of timesteps"),
    ("use_flow_sigmas", (False, None), "the noise is that of flow matching"),
    ("use_dynamic_shifting", (False, None), "the noise is that of flow matching"),
    ("variance_type", (None, "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log"), "a part of the"
     " UNet's output is a variance"),
    ("predict_epsilon", (True, None), "the model predicts the image"),
)  # fmt: skip


def training_problems(scheduler: ModelScheduler) -> list[str]:
    """Why a model's training is not supported, or its configuration cannot be read; a line each."""
    config, name = scheduler.config, scheduler.name
    if name not in (*FAMILY, *CONSISTENCY):
        others = ", ".join(name.removesuffix("Scheduler") for name in (*FAMILY, *CONSISTENCY))
        return [f"its scheduler is a {name}, whose models are trained otherwise; what runs: models of {others}"]
    if (written := config.get("_class_name", name)) != name:
        return [f"model_index.json names a {name}, scheduler_config.json a {shown(written)}; make both the same"]
    problems = [
        f"scheduler_config.json has {option}: {shown(config[option])} ({meaning}); what runs: models of these"
        " schedulers that predict epsilon or v from timesteps, as docs/diffusion-models.md lists them"
        for option, known, meaning in _TRAINING
        if option in config and config[option] not in known
    ]
    return problems or _number_problems(config)


def _number_problems(config: dict[str, Any]) -> list[str]:
    """Values that are not the numbers that they should be."""
    where, problems = "scheduler_config.json", list[str]()
    total = config.get("num_train_timesteps", 1000)
    if not is_integer(total) or not 1 <= total <= MAX_TIMESTEPS:
        return [f"{where} has num_train_timesteps: {shown(total)}, not a number of timesteps"]
    if not is_integer(config.get("steps_offset", 0)) or config.get("steps_offset", 0) < 0:
        problems.append(f"{where} has steps_offset: {shown(config['steps_offset'])}, not a number of timesteps")
    for option in ("beta_start", "beta_end"):
        value = config.get(option, 0.01)
        if not is_number(value) or not 0 < value < 1:
            problems.append(f"{where} has {option}: {shown(value)}, not a number between 0 and 1")
    betas = config.get("trained_betas")
    if betas is not None and (
        not isinstance(betas, list)
        or len(betas) != total
        or not all(isinstance(beta, float) and 0 < beta < 1 for beta in betas)
    ):
        problems.append(f"{where} has trained_betas that are not a list of {total} numbers between 0 and 1")
    return problems
