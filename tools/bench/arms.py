"""What is measured side by side: arms of three families, each a way to make the same samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from bench.sizes import Setting
from engine.methods.parameters import MethodParameters
from engine.methods.registry import method_of

Family = Literal["boundary", "risk", "risky"]
# What guides a family. `risk` is RiskyDiff's guidance without image embeddings, on the pipeline of `boundary`.
METHODS: Mapping[Family, str] = {"boundary": "boundary", "risk": "risky", "risky": "risky"}
Program = Literal["plain", "published", "engine", "parts"]

ADVERSARIAL: dict[str, Any] = {"preset": "adversarial"}
PERCEPTIBLE: dict[str, Any] = {"preset": "perceptible"}
# Guidance as the authors' public code has it (docs/methods.md has these as jobs): KLDB by the later rule and by that of
# the workshop version, RiskyDiff. The gradient goes through the UNet where theirs does, and the last step is guided.
KLDB: dict[str, Any] = {"step": "norm", "alpha": 0.05, "every": 5, "gradient": "unet", "skip_last": False}
KLDB_WORKSHOP = KLDB | {"step": "paper", "alpha": 0.1}
RISKY = {"step": "paper", "scale": 10.0, "conformity_weight": 1e-4, "conformity": "raw", "skip_last": False}
PROMPT: Mapping[Family, str] = {"boundary": "prompt", "risk": "prompt-risk", "risky": "prompt-unclip"}
DIVIDED = "workers"
# The engine alone: what is published is one process, and is compared with one.
AS_WORKERS = (
    *("prompt", "kldb-norm-unet", "kldb-polyak", "kldb-perceptible"),
    *("prompt-unclip", "risky-paper", "risky-polyak", "risky-perceptible"),
)
PLAIN: Mapping[Family, str] = {"boundary": "plain-diffusers", "risky": "plain-diffusers-unclip"}
# What a job may set for a GPU, one by one.
RUNTIMES: Mapping[str, dict[str, Any]] = {
    **{precision: {"precision": precision} for precision in ("fp32", "fp16", "bf16")},
    **{attention: {"attention": attention} for attention in ("sdpa", "xformers")},
    **{f"checkpointing-{value}": {"gradient_checkpointing": value} for value in ("on", "off")},
    **{f"channels-last-{value}": {"channels_last": value} for value in ("on", "off")},
    **{f"compile-{value}": {"compile": value} for value in ("on", "off")},
    **{f"decoder-{precision}": {"decoder_precision": precision} for precision in ("fp32", "bf16")},
}
TINY = "tiny"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """One way to make the samples of a family.

    Attributes:
        program: diffusers' pipeline, the published loop, the engine's generator, or the engine's parts put together
            here.
        guidance: parameters of the family's method; None for the prompt alone.
        runtime: of the job, where it is not the machine's default.
        tiny: whether guidance looks through the tiny autoencoder.
        twin: the engine's arm that makes the same samples, for a published loop.
        is_divided: whether several processes of one thread make a part of the samples each, as the engine's workers
            on a CPU do.
    """

    name: str
    family: Family
    program: Program = "engine"
    guidance: dict[str, Any] | None = None
    runtime: dict[str, Any] = field(default_factory=dict)
    tiny: bool = False
    twin: str = ""
    is_divided: bool = False

    @property
    def group(self) -> tuple[str, ...]:
        """Arms for which this is equal share loaded models, and are timed in turns."""
        runtime = [f"{key}={value}" for key, value in self.runtime.items()]
        return self.family, *runtime, *["tiny"] * self.tiny, *[DIVIDED] * self.is_divided

    @property
    def reference(self) -> str:
        """The arm of the prompt alone on the same runtime."""
        _, mark, variant = self.name.partition("@")
        return PROMPT[self.family] + mark + variant

    @property
    def parameters(self) -> MethodParameters:
        """All parameters of the family's method, as a job gets them; without fields for the prompt alone."""
        spec = MethodParameters if self.guidance is None else method_of(METHODS[self.family]).load_spec()
        return spec.model_validate(self.guidance or {})

    def guided_steps(self, num_steps: int) -> list[int]:
        """The guided ones of so many steps, counted from 1."""
        return [index for index in range(1, num_steps + 1) if self.parameters.is_guided(index, num_steps)]


def arms_of(setting: Setting) -> list[Arm]:
    """All arms of a size, group by group, those of the machine's default runtime first."""
    arms = [*_boundary_arms(), *_risk_arms()] if setting.diffusion else []
    arms += _risky_arms() if setting.unclip else []
    arms += [divided(arm) for arm in arms if arm.name in AS_WORKERS]
    groups = list(dict.fromkeys(arm.group for arm in sorted(arms, key=lambda arm: bool(arm.runtime) or arm.tiny)))
    return sorted(arms, key=lambda arm: groups.index(arm.group))


def divided(arm: Arm) -> Arm:
    """The arm as workers on a CPU make it."""
    return dataclasses.replace(arm, name=f"{arm.name}@{DIVIDED}", is_divided=True)


def _boundary_arms() -> list[Arm]:
    polyak, through = ADVERSARIAL | {"step": "polyak", "every": 5}, {"gradient": "unet"}
    second = polyak | through | {"every": 2}

    def arm(name: str, guidance: dict[str, Any] | None = None, program: Program = "engine", twin: str = "") -> Arm:
        return Arm(name=name, family="boundary", guidance=guidance, program=program, twin=twin)

    return [
        arm("plain-diffusers", program="plain"),
        arm("prompt"),
        arm("published-kldb", KLDB, "published", "kldb-norm-unet"),
        arm("kldb-norm-unet", KLDB),
        arm("published-kldb-workshop", KLDB_WORKSHOP, "published", "kldb-paper-unet"),
        arm("kldb-paper-unet", KLDB_WORKSHOP),
        arm("kldb-polyak", polyak),
        arm("kldb-polyak-combined", polyak, "parts"),
        arm("kldb-polyak-unet", polyak | through),
        arm("kldb-polyak-unet-every-2nd", second),
        arm("kldb-polyak-every-step", polyak | {"every": 1}),
        arm("kldb-norm", ADVERSARIAL | {"step": "norm", "alpha": KLDB["alpha"], "every": 5}),
        arm("kldb-perceptible", PERCEPTIBLE),
        *_variants("boundary", {"prompt": None, "kldb-polyak": polyak}, (TINY, *RUNTIMES)),
        *_variants("boundary", {"kldb-polyak-unet": polyak | through}, _labels("xformers", "checkpointing")),
        *_variants("boundary", {"kldb-polyak-unet-every-2nd": second}, _labels(TINY, "compile", "decoder")),
        *_variants("boundary", {"kldb-perceptible": PERCEPTIBLE}, _labels(TINY, "checkpointing", "decoder")),
    ]


def _risk_arms() -> list[Arm]:
    target = ADVERSARIAL | {"step": "polyak"}
    methods = {
        "prompt-risk": None,
        "risk-polyak": target,
        "risk-polyak-floor": target | {"conformity_floor": 0.3},
        "risk-perceptible": PERCEPTIBLE,
    }
    arms = [Arm(name=name, family="risk", guidance=guidance) for name, guidance in methods.items()]
    return arms + _variants("risk", methods, _labels(TINY, "decoder"))


def _risky_arms() -> list[Arm]:
    def arm(name: str, guidance: dict[str, Any] | None = None, program: Program = "engine", twin: str = "") -> Arm:
        return Arm(name=name, family="risky", guidance=guidance, program=program, twin=twin)

    return [
        arm("plain-diffusers-unclip", program="plain"),
        arm("prompt-unclip"),
        arm("published-risky", RISKY, "published", "risky-paper"),
        arm("risky-paper", RISKY),
        arm("risky-polyak", ADVERSARIAL | {"step": "polyak"}),
        arm("risky-polyak-floor", ADVERSARIAL | {"step": "polyak", "conformity_floor": 0.3}),
        arm("risky-perceptible", PERCEPTIBLE),
        *_variants("risky", {"prompt-unclip": None, "risky-paper": RISKY}, (TINY, *RUNTIMES)),
    ]


def _labels(*beginnings: str) -> list[str]:
    """The names of variants that begin so."""
    return [label for label in (TINY, *RUNTIMES) if label.startswith(beginnings)]


def _variants(family: Family, methods: Mapping[str, dict[str, Any] | None], labels: Collection[str]) -> list[Arm]:
    """Some guidances on other runtimes than the default, and behind the tiny autoencoder.

    Args:
        methods: parameters by the name of an arm.
        labels: names of variants.
    """
    return [
        Arm(
            name=f"{name}@{label}",
            family=family,
            guidance=parameters,
            runtime=RUNTIMES.get(label, {}),
            tiny=label == TINY,
        )
        for label in labels
        for name, parameters in methods.items()
    ]
