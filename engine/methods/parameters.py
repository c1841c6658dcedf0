"""What the parameters of every guidance method have in common. No torch: jobs are checked before it is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from engine.methods.fields import Spec

# What is descended of the distances of a sample under several targets: their mean, or the largest.
Ensemble = Literal["mean", "worst"]


class RiskTarget(NamedTuple):
    """A risk that samples are guided to, and how far from it they may end, both in nats."""

    risk: float
    tolerance: float


class MethodParameters(Spec):
    """The parameters of a method: fields of its section of `guidance`, and what the engine asks of them.

    The class itself, without fields, is that of a method without guidance.
    """

    def is_guided(self, index: int, total: int) -> bool:
        """Whether step `index` of `total`, counted from 1, is guided."""
        return False

    def is_through_unet(self, index: int, total: int) -> bool:
        """Whether the gradient of step `index` of `total`, where it is guided, passes through the UNet."""
        return False

    @property
    def schedule_remedy(self) -> str:
        """Which parameters to change, and how, where no step is guided."""
        return ""

    @property
    def risk_target(self) -> RiskTarget | None:
        """The risk that samples are guided to, or None where the method has no such target."""
        return None

    @property
    def sees_oracle(self) -> bool:
        """Whether the last oracle of the job guides, so that it is no independent evidence."""
        return False

    @property
    def can_arrive(self) -> bool:
        """Whether samples may come so near to where they are guided that they are not moved."""
        return False

    def identity(self) -> dict[str, Any]:
        """The parameters as a plan's identity has them."""
        return self.model_dump(mode="json")

    @classmethod
    def beneath(cls, base: Mapping[str, Any], override: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a job that still hold where a request overrides some."""
        return dict(base)

    def in_effect(self) -> dict[str, Any]:
        """The parameters as the data card lists them, with those written out whose default depends on others."""
        return self.model_dump()


def on_schedule(
    index: int, total: int, *, every: int, skip_last: bool, last_fraction: float = 1.0, from_end: bool = False
) -> bool:
    """Whether a step is guided: every so many steps, within the last fraction of them, the last one optional.

    Args:
        index: of the step, counted from 1.
        total: number of steps.
        every: guide where `index % every == 0`, or `(total - index) % every == 0`.
        skip_last: leave the last step, which is never denoised again, without guidance.
        last_fraction: share of the steps, at the end, that may be guided.
        from_end: whether steps are counted back from the last one.
    """
    in_range = index > total * (1 - last_fraction)
    place = total - index if from_end else index
    return in_range and place % every == 0 and not (skip_last and index == total)


def on_schedule_remedy(*, every: int, last_fraction: float = 1.0) -> str:
    """Which parameters of a schedule to change, and how, where it guides no step; see `on_schedule`."""
    remedies = ["lower `every`"] * (every > 1) + ["widen `gradient_range`"] * (last_fraction < 1)
    return ", ".join(remedies) or "set `skip_last: false`"
