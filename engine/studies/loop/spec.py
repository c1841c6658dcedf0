"""The fields of a loop job. `engine.studies.loop.parsing` checks a file against them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

import pydantic
from pydantic import Field, StrictInt

from engine.job.spec import Address, Name, Seed
from engine.methods.fields import Number, Spec

MAX_ROUNDS = 1000
MAX_SEEDS = 10_000
MAX_ARMS = 50
MAX_RECORDS = 1_000_000
# Absolute value of a reward.
MAX_REWARD = 1e100
CLASS_INDEX = "class-index"
SQUARED_DISTANCE = "squared-distance"
MIXTURE_REWARDS = (SQUARED_DISTANCE, CLASS_INDEX)

Share = Annotated[Number, Field(ge=0, le=1)]
Positive = Annotated[Number, Field(gt=0, le=1e6)]
if TYPE_CHECKING:
    JobMapping = dict[str, Any]
else:
    JobMapping = dict[str, pydantic.JsonValue]


class MixtureSpec(Spec):
    """Gaussians on a circle: exact sampling, refitted by expectation-maximisation."""

    modes: StrictInt = Field(default=8, ge=2, le=100, description="Gaussians, of equal weight.")
    radius: Positive = Field(default=2.0, description="Of the circle.")
    deviation: Positive = Field(default=0.3, description="Standard deviation of each Gaussian in every direction.")
    samples: StrictInt = Field(
        default=500,
        ge=8,
        le=100_000,
        description="Samples that the mixture is refitted on in a round, real ones included; K times as many are"
        " drawn.",
    )
    em_steps: StrictInt = Field(default=5, ge=1, le=1000, description="Steps of a refit.")


class GeneratorSpec(Spec):
    """What generates: exactly one of the two."""

    mixture: MixtureSpec | None = Field(default=None, description="A Gaussian mixture; seconds on one core.")
    job: JobMapping | Address | None = Field(
        default=None,
        description="A job of the engine without name, seed and output: inline, or the path of its file, in which those"
        " are ignored.",
    )


class LearnedSpec(Spec):
    """Simulated raters choose between pairs by the reward; a reward model is trained on their choices."""

    records: StrictInt = Field(default=400, ge=10, le=MAX_RECORDS, description="Preference records of a round.")
    model: Literal["linear", "network"] = Field(
        default="linear", description="Of CLIP embeddings; of a mixture's samples: of their monomials of degree two."
    )
    l2: Positive = Field(default=0.01, description="Weight of half the squared parameters in the loss.")
    max_steps: StrictInt = Field(
        default=100, ge=1, le=100_000, description="Of the fit; few of them are an optimisation cut short."
    )


class CurationSpec(Spec):
    """Which samples are kept: out of each group of candidates one is selected by Bradley-Terry."""

    candidates: StrictInt = Field(default=4, ge=2, le=1000, description="K, candidates for a selected sample.")
    among: Literal["run", "class"] = Field(
        default="run", description="Candidates of a group: of the whole run, or of one class, which keeps the balance."
    )
    reward: Annotated[str, Field(min_length=1, max_length=200)] = Field(
        default=CLASS_INDEX,
        description="The users' reward: class-index (number of classes less the class index), for a mixture also"
        " squared-distance (minus that to the first mode), for a job also any numeric column of its records, such as"
        " conformity.",
    )
    scale: Positive = Field(default=1.0, description="The reward is multiplied by it: an inverse temperature.")
    learned: LearnedSpec | None = Field(
        default=None, description="Curate by a reward learned from simulated choices; omit: by the reward itself."
    )
    preferences: Address | None = Field(
        default=None,
        description="File of preference records of people, as `riskforge curate` reads it, to learn the reward from; it"
        " is read again in every round, and may name samples of all rounds of a loop so far. `reward` is only measured"
        " then.",
    )
    trusted: Address | None = Field(
        default=None, description="File of trusted choices, likewise: for the monitor, and for a defence."
    )


class TrainingSpec(Spec):
    """How the generator of the next round is made from the last one."""

    real: Address | None = Field(
        default=None, description="Labelled real images that are mixed in; the same forms as `prepare --data`."
    )
    curated_weight: Positive | None = Field(
        default=None,
        description="lambda, curated samples for each real one. Of a mixture the first generator is the real"
        " distribution.",
    )
    steps: StrictInt = Field(default=60, ge=1, le=1_000_000, description="Optimiser steps of a round.")
    batch_size: StrictInt = Field(default=32, ge=1, le=4096, description="Images a step.")
    learning_rate: Annotated[Number, Field(gt=0, le=1)] = Field(default=1e-4, description="Peak of AdamW's.")
    lora_rank: Annotated[StrictInt, Field(ge=1, le=1024)] | None = Field(
        default=None, description="Rank of the adapters that are trained and merged; omit: the whole network."
    )


class MonitorSpec(Spec):
    """Records of a round that trusted raters judge again, which do not train."""

    audited: StrictInt = Field(default=60, ge=1, le=100_000, description="Records of a round.")
    level: Annotated[Number, Field(gt=0, lt=1)] = Field(
        default=0.05, description="Share of clean loops of any length that may raise an alarm."
    )


class MeasureSpec(Spec):
    """What is measured beside what needs no choice."""

    real: Address | None = Field(
        default=None, description="Real images for the kernel distance; default: those of `training.real`."
    )
    images: StrictInt = Field(default=500, ge=8, le=100_000, description="Real images that are read for it.")
    shown: StrictInt = Field(default=8, ge=0, le=64, description="Selected images of a round on the page.")


class ArmSpec(Spec):
    """One variant of the loop."""

    attack: Literal["none", "random", "largest-difference", "highest-reward", "gradient", "gradient-reward"] = Field(
        default="none",
        description="Which records are exchanged: at random, two heuristics, by the gradient of the covariance, or by"
        " that of the curated reward.",
    )
    share: Share = Field(default=0.2, description="kappa, share of the records that the attack may exchange.")
    defence: Literal["none", "influence", "group"] = Field(
        default="none",
        description="From an alarm on suspect records are removed: by influence, or of people's records by group,"
        " within each group of raters that they name.",
    )
    curated_weight: Positive | None = Field(default=None, description="In place of training.curated_weight.")
    steps: Annotated[StrictInt, Field(ge=1, le=1_000_000)] | None = Field(
        default=None,
        description="In place of training.steps, of a mixture of em_steps: few are an optimisation cut short.",
    )


class LoopOutput(Spec):
    """Where the loop is stored."""

    uri: Annotated[str, Field(min_length=1, max_length=2000)] = Field(description="Folder of the loop.")


class LoopSpec(Spec):
    """A loop job."""

    study: Literal["loop"] = Field(description="The study that the file is for.")
    name: Name = Field(max_length=30, description="Prefix of the rounds' runs: lower case letters, digits, hyphens.")
    seed: Seed = Field(default=0, description="Seed of everything.")
    rounds: StrictInt = Field(ge=1, le=MAX_ROUNDS, description="Times that the generator is retrained.")
    seeds: StrictInt = Field(default=1, ge=1, le=MAX_SEEDS, description="Repetitions of every arm.")
    generator: GeneratorSpec = Field(description="What generates.")
    curation: CurationSpec = Field(default=CurationSpec(), description="Which samples are kept.")
    training: TrainingSpec = Field(default=TrainingSpec(), description="How the next generator is made.")
    monitor: MonitorSpec | None = Field(
        default=None, description="Test of the learned reward against trusted choices; omit: none."
    )
    measure: MeasureSpec = Field(default=MeasureSpec(), description="What is measured.")
    on_alarm: Literal["stop", "continue"] = Field(
        default="stop", description="At an alarm an arm without a defence stops, or continues."
    )
    keep_models: Literal["last", "all"] = Field(default="last", description="Which generators are kept on disk.")
    arms: dict[Name, ArmSpec] = Field(
        default={"clean": ArmSpec()}, min_length=1, max_length=MAX_ARMS, description="Variants of the loop by name."
    )
    output: LoopOutput = Field(description="Where the loop is stored.")

    @property
    def size(self) -> str:
        """Arms, seeds and retrainings, in words."""
        counts = {"arm": len(self.arms), "seed": self.seeds, "retraining": self.rounds}
        return ", ".join(f"{count} {noun}{'s' * (count > 1)}" for noun, count in counts.items())

    def weight_of(self, arm: str) -> float | None:
        """lambda of an arm; None without real data."""
        return self.arms[arm].curated_weight or self.training.curated_weight
