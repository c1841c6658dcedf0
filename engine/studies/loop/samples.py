"""The samples of a round, and real ones to compare with. `...` are lanes that are computed together."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class RoundSamples:
    """The samples of a round.

    Attributes:
        features: [..., N, d], in float64.
        rewards: [..., N] of the users, before the scale.
        classes: [..., N] class or mode indices.
        keys: of the samples, N; empty for a mixture, whose samples have none.
        agreement: share of the samples whose class the oracle confirms; None without an oracle.
        oracle_reward: mean of the class index reward by the oracle's classes; None without an oracle, and of other
            rewards.
    """

    features: Tensor
    rewards: Tensor
    classes: Tensor
    keys: tuple[str, ...] = ()
    agreement: float | None = None
    oracle_reward: float | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Real:
    """Real samples to compare with.

    Attributes:
        features: [..., M, d], of the space in which distances are measured.
        space: its name.
    """

    features: Tensor
    space: str
