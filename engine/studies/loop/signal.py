"""The signal that curates: simulated raters' records, an attack on them, the monitor, the defence, the learned reward.

Every round has new records of its own samples. Some are audited: they do not train, and trusted raters judge them
again. A fifth of the others is held out for the accuracy. An attacker exchanges labels of all.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.methods.curation.attacks import AttackOptions, flips_by
from engine.methods.curation.defences import RemovalOptions, remove_by_influence
from engine.methods.curation.learning import LearnOptions, Standardisation
from engine.methods.curation.monitor import Audit, AuditState, continue_audit, start_audit
from engine.methods.curation.preferences import Pairs
from engine.methods.curation.reward_models import (
    FitOptions,
    LinearReward,
    NetworkReward,
    fit_reward,
    held_out_accuracy,
    margins,
)
from engine.methods.curation.selection import draw_preferences
from engine.studies.loop.spec import ArmSpec, LearnedSpec, LoopSpec, MonitorSpec

HELD_OUT = 0.2
# What JSON can hold.
MAX_E_VALUE = 1e300
_ATTACK_STAGES = 5
_NUM_PROBES = 500


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalOptions:
    """How records are collected, attacked, watched and learned from; the fields of a loop job."""

    learned: LearnedSpec
    monitor: MonitorSpec | None
    arm: ArmSpec

    @classmethod
    def of(cls, job: LoopSpec, arm: str) -> SignalOptions:
        """The options of an arm of a loop with a learned reward."""
        assert job.curation.learned is not None
        return cls(learned=job.curation.learned, monitor=job.monitor, arm=job.arms[arm])

    @property
    def num_audited(self) -> int:
        """Records of a round that are audited."""
        return self.monitor.audited if self.monitor else 0

    @property
    def learning(self) -> LearnOptions:
        """Of the reward model."""
        return LearnOptions(model=self.learned.model, max_steps=self.learned.max_steps)

    @property
    def fit(self) -> FitOptions:
        """Of the reward model, too."""
        return self.learning.fit_options(self.learned.l2)


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """What a round needs of the rounds before it.

    Attributes:
        standardisation: of the features, that of the first round; differences of all rounds have one scale so.
        audit: evidence of the monitor; None before the first round.
        first: [..., n, d] standardised features of the first samples of all audited records.
        second: [..., n, d] of the second ones.
    """

    standardisation: Standardisation
    audit: AuditState | None = None
    first: Tensor | None = None
    second: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Records:
    """The records of a round, R of them: those that train, those held out, those audited, in this order.

    Attributes:
        first: [..., R] positions of the first samples.
        second: [..., R] of the second ones.
        pairs: with their labels after the attack; features are standardised.
        tampered: [..., R] which labels were exchanged.
        trusted: [..., m] labels of the audited ones by trusted raters.
        sizes: how many train, are held out, are audited.
    """

    first: Tensor
    second: Tensor
    pairs: Pairs
    tampered: Tensor
    trusted: Tensor
    sizes: tuple[int, int, int]

    @property
    def parts(self) -> tuple[Pairs, Pairs, Pairs]:
        """Training, held-out and audited records."""
        training, held_out, audited = torch.arange(sum(self.sizes)).split(list(self.sizes))
        return self.pairs.take(training), self.pairs.take(held_out), self.pairs.take(audited)


@dataclass(frozen=True, slots=True, eq=False)
class Signal:
    """The learned reward of a round.

    Attributes:
        rewards: [..., N] of the samples, in nats.
        alarm: [...] whether the monitor has raised its alarm in this round or before.
        weights: [..., n] of the records in training: 0 for those that the defence removed.
        parameters: [..., P].
        model: P parameters.
        records: of the round.
        memory: for the next round.
        is_watched: whether there is a monitor.
        is_defended: whether there is a defence.
    """

    rewards: Tensor
    alarm: Tensor
    weights: Tensor
    parameters: Tensor
    model: LinearReward | NetworkReward
    records: Records
    memory: Memory
    is_watched: bool
    is_defended: bool

    def measures(self, lane: int) -> dict[str, Any]:
        """What `loop.json` has of a lane's signal."""
        return {
            "accuracy": self._accuracy(lane),
            "monitor": self._monitor(lane),
            "removed": self._removed(lane) if self.is_defended else None,
        }

    def _accuracy(self, lane: int) -> dict[str, Any]:
        pairs = self.records.parts[1]
        own = Pairs(_flat(pairs.first, 2)[lane], _flat(pairs.second, 2)[lane], _flat(pairs.labels, 1)[lane])
        accuracy = held_out_accuracy(self.model, _flat(self.parameters, 1)[lane], own)
        return {"value": accuracy.value, "low": accuracy.low, "high": accuracy.high, "records": accuracy.num_pairs}

    def _monitor(self, lane: int) -> dict[str, Any] | None:
        state = self.memory.audit
        if not self.is_watched or state is None:
            return None
        return {
            "e_value": min(float(state.e_value.reshape(-1)[lane]), MAX_E_VALUE),
            "alarm": bool(self.alarm.reshape(-1)[lane]),
            "audited": state.trusted.shape[-1],
            "differing": int(state.num_differing.reshape(-1)[lane]),
        }

    def _removed(self, lane: int) -> dict[str, int]:
        """How many tampered and honest records were removed, of how many that train."""
        num_training = self.records.sizes[0]
        tampered = _flat(self.records.tampered[..., :num_training], 1)[lane]
        is_removed = _flat(self.weights, 1)[lane] == 0
        return {
            "tampered": int((is_removed & tampered).sum()),
            "tampered_of": int(tampered.sum()),
            "honest": int((is_removed & ~tampered).sum()),
            "honest_of": int((~tampered).sum()),
        }


def learn_signal(features: Tensor, rewards: Tensor, memory: Memory, options: SignalOptions, seed: int) -> Signal:
    """Collect the records of a round and learn the reward that curates.

    Args:
        features: [..., N, d] of the samples.
        rewards: [..., N] of the users, in nats: raters choose by them.
        memory: of the rounds before.
        options: sizes, attack, monitor, defence, fit.
        seed: of the raters' choices and of what is attacked.
    """
    random = torch.Generator().manual_seed(seed)
    scaled = memory.standardisation(features)
    model = options.learning.new_model(features.shape[-1])
    start = None if isinstance(model, LinearReward) else model.initial(random)
    records = _collect(scaled, rewards, model, start, options, random)
    training, _, audited = records.parts
    parameters = fit_reward(model, training, options.fit, start=start).parameters
    weights = torch.ones_like(training.labels)
    alarm = torch.zeros(rewards.shape[:-1], dtype=torch.bool)
    if options.monitor is not None:
        memory = _watch(memory, model, parameters, audited, records.trusted)
        assert memory.audit is not None
        alarm = memory.audit.alarm(options.monitor.level)
    if options.arm.defence == "influence" and bool(alarm.any()):
        weights = torch.where(alarm[..., None], _kept(model, training, memory, options, start), 1.0)
        parameters = fit_reward(model, training, options.fit, start=start, weights=weights).parameters
    return Signal(
        rewards=model(parameters, scaled),
        alarm=alarm,
        weights=weights,
        parameters=parameters,
        model=model,
        records=records,
        memory=memory,
        is_watched=options.monitor is not None,
        is_defended=options.arm.defence != "none",
    )


def _collect(
    scaled: Tensor,
    rewards: Tensor,
    model: LinearReward | NetworkReward,
    start: Tensor | None,
    options: SignalOptions,
    random: torch.Generator,
) -> Records:
    """Records of honest raters, and what the attack makes of them."""
    num_audited = options.num_audited
    num_held_out = max(1, round(HELD_OUT * options.learned.records))
    sizes = (options.learned.records - num_held_out, num_held_out, num_audited)
    total, num_samples = sum(sizes), rewards.shape[-1]
    shape = (*rewards.shape[:-1], total)
    first = torch.randint(num_samples, shape, generator=random)
    # Another one than the first.
    second = (first + 1 + torch.randint(num_samples - 1, shape, generator=random)) % num_samples
    own, other = rewards.gather(-1, first), rewards.gather(-1, second)
    labels = draw_preferences(own, other, random)
    trusted = draw_preferences(own[..., total - num_audited :], other[..., total - num_audited :], random)
    honest = Pairs(_rows(scaled, first), _rows(scaled, second), labels)
    probes = scaled[..., torch.randperm(num_samples, generator=random)[:_NUM_PROBES], :]
    tampered = _tampered(honest, probes, model, start, options, random)
    return Records(first, second, honest.flipped(tampered), tampered, trusted, sizes)


def _tampered(
    honest: Pairs,
    probes: Tensor,
    model: LinearReward | NetworkReward,
    start: Tensor | None,
    options: SignalOptions,
    random: torch.Generator,
) -> Tensor:
    """Which labels the arm's attack exchanges, [..., R]."""
    arm = options.arm
    if arm.attack == "none":
        return torch.zeros_like(honest.labels, dtype=torch.bool)
    attack = AttackOptions(share=arm.share, num_stages=_ATTACK_STAGES, fit=options.fit)
    return flips_by(arm.attack, model, honest, probes, attack, random, start)


def _watch(
    memory: Memory, model: LinearReward | NetworkReward, parameters: Tensor, audited: Pairs, trusted: Tensor
) -> Memory:
    """Continue the audit of the loop by the records of this round."""
    state = memory.audit or start_audit(tuple(trusted.shape[:-1]), audited.first.shape[-1])
    earlier = None
    if memory.first is not None and memory.second is not None:
        earlier = model(parameters, memory.first) - model(parameters, memory.second)
    audit = Audit(audited.first - audited.second, audited.labels, trusted, margins(model, parameters, audited).detach())
    state = continue_audit(state, audit, earlier)
    first = audited.first if memory.first is None else torch.cat([memory.first, audited.first], -2)
    second = audited.second if memory.second is None else torch.cat([memory.second, audited.second], -2)
    return Memory(memory.standardisation, state, first, second)


def _kept(
    model: LinearReward | NetworkReward,
    training: Pairs,
    memory: Memory,
    options: SignalOptions,
    start: Tensor | None,
) -> Tensor:
    """Weights of the records by influence on the trusted choices of all rounds so far."""
    assert memory.audit is not None and memory.first is not None and memory.second is not None
    judged = Pairs(memory.first, memory.second, memory.audit.trusted)
    return remove_by_influence(model, training, judged, RemovalOptions(fit=options.fit), start)


def _rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows [..., R, d] of values [..., N, d] at positions [..., R]."""
    return values.gather(-2, index[..., None].expand(*index.shape, values.shape[-1]))


def _flat(values: Tensor, num_kept: int) -> Tensor:
    return values.reshape(-1, *values.shape[values.ndim - num_kept :])
