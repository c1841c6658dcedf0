"""The fields of a study of rounds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

import pydantic
from pydantic import Field, StrictInt

from engine.job.spec import Address
from engine.methods.fields import Context, Number, Spec
from engine.studies.experiments.spec import MAX_COUNT, StudySpec

MAX_ROUNDS = 100
MAX_SEEDS = 100
MAX_STEPS = 1_000_000
MAX_BATCH = 65_536
MAX_ARMS = 50
MAX_CONTEXTS = 1000
Names = Annotated[tuple[Annotated[str, Field(min_length=1, max_length=100)], ...], Field(max_length=MAX_ARMS)]
Contexts = Annotated[tuple[Context, ...], Field(max_length=MAX_CONTEXTS)]


class CorruptionsSpec(Spec):
    """Corrupted copies of test images, made here after Hendrycks and Dietterich (2019)."""

    names: Names = Field(
        default=("jpeg", "gaussian noise", "gaussian blur", "brightness", "contrast", "pixelate"),
        description="Which corruptions: jpeg, gaussian noise, gaussian blur, brightness, contrast, pixelate; [] for"
        " none.",
    )
    severity: StrictInt = Field(
        default=3,
        ge=1,
        le=5,
        description="1 to 5; strengths of CIFAR-10-C up to 64 pixels a side, of ImageNet-C above.",
    )
    images: StrictInt = Field(
        default=300,
        ge=1,
        le=MAX_COUNT,
        description="Test images that are corrupted at most, of the contexts that the target knows.",
    )


class RoundsSpec(StudySpec):
    """Retrain the target on its failures, find failures of the retrained one, and again."""

    study: Literal["rounds"] = Field(description="The study that the file is for.")
    count: Annotated[StrictInt, Field(ge=1, le=MAX_COUNT)] | None = Field(  # type: ignore[assignment]
        default=None,
        description="Samples of every class in every context that each request of a run asks for; default: its own"
        " `count`.",
    )
    real: Address = Field(description="Labelled images to train on; the same forms as `prepare --data`.")
    test: Address = Field(description="Labelled images to test on; contexts are compared.")
    test_images: Annotated[StrictInt, Field(ge=1, le=MAX_COUNT)] | None = Field(
        default=None, description="Test images of a context at most, evenly spread over them; default: all."
    )
    calibrate: Address | None = Field(
        default=None,
        description="Labelled images unseen by the target, to fit the temperature of every retrained model; default:"
        " they keep the target's.",
    )
    rounds: StrictInt = Field(
        default=3, ge=1, le=MAX_ROUNDS, description="Times that failures are found and trained on."
    )
    seeds: StrictInt = Field(
        default=5,
        ge=2,
        le=MAX_SEEDS,
        description="Trainings of an arm, each of which goes on with its own network; failures are found in the first.",
    )
    arms: Names = Field(
        default=("none", "accepted"),
        min_length=1,
        description="What is trained on: none (real images alone), plain, unfiltered (or random), accepted, entropy,"
        " augment, pgd; accepted:30 for another number of samples. With `none` the others are compared with it, else"
        " with the target before.",
    )
    protect: Annotated[str, Field(max_length=100)] = Field(
        default="none",
        description="Keep what a network could before a round: none, distill, average or arithmetic.",
    )
    protect_weight: Number | None = Field(default=None, description="Strength of the protection; default: of its kind.")
    plain: Names = Field(default=(), description="Requests of the arm plain; default: without guidance and `accept`.")
    risky: Names = Field(default=(), description="Requests of the other arms; default: those with an `accept` rule.")
    samples: Annotated[StrictInt, Field(ge=1, le=MAX_COUNT)] | None = Field(
        default=None,
        description="Samples that a round adds to an arm, where it has as many; default: as many in each arm as the"
        " smallest has.",
    )
    keep_samples: Literal["all", "round"] = Field(
        default="all", description="Train on the samples of all rounds so far, or on those of the round alone."
    )
    steps: StrictInt = Field(default=100, ge=1, le=MAX_STEPS, description="Steps of each training.")
    batch_size: StrictInt = Field(default=64, ge=2, le=MAX_BATCH, description="Images a step.")
    mix: Annotated[Number, Field(gt=0, lt=1)] = Field(default=0.2, description="Share of generated images in a batch.")
    learning_rate: Annotated[Number, Field(gt=0, le=10)] = Field(default=3e-4, description="Peak of AdamW's.")
    flip: bool = Field(
        default=False, description="Mirror half of the images of the arm augment; some digits and words become others."
    )
    pgd_eps: Annotated[Number, Field(gt=0, le=1)] = Field(
        default=8 / 255, description="Largest change of a pixel in the arm pgd; its range is 1."
    )
    pgd_steps: StrictInt = Field(default=3, ge=1, le=1000, description="Steps of the attack in the arm pgd.")
    seen: Contexts | None = Field(
        default=None,
        description="Contexts of the test images that count as in distribution; default: those without any, and those"
        " that the images to train on have.",
    )
    weak: Contexts | None = Field(
        default=None,
        description="Contexts that are to gain; default: those in which the first run has more valid failures than in"
        " the others (Fisher's test, Holm).",
    )
    corruptions: CorruptionsSpec = Field(default=CorruptionsSpec(), description="Corrupted copies of test images.")
    last_run: bool = Field(
        default=True,
        description="Count failures once more after the last training, which is a further run of each arm.",
    )
    keep_models: Literal["last", "all"] = Field(
        default="last", description="Which retrained models stay on disk: those of the last round, or all."
    )

    @pydantic.field_validator("arms", "plain", "risky", mode="before")
    @classmethod
    def _one_name(cls, value: Any) -> Any:
        """A text is a list of one."""
        return (value,) if isinstance(value, str) else value
