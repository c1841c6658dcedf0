"""One round of a loop, whatever generates: samples, the signal of the raters, measures, curation, retraining.

`RoundGenerator` is the interface of generators. Shapes as in `engine.methods.curation`: `...` lanes (loops) that are
computed together, none for a pipeline.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from engine.studies.loop.measures import measure
from engine.studies.loop.samples import Real, RoundSamples
from engine.studies.loop.signal import Memory, SignalOptions, learn_signal
from engine.studies.loop.spec import CLASS_INDEX, LoopSpec


class RoundSignal(Protocol):
    """What curates a round: a reward that was learned."""

    @property
    def rewards(self) -> Tensor:
        """[..., N] of the samples, in nats."""

    @property
    def alarm(self) -> Tensor:
        """[...] whether the monitor has raised its alarm by now."""

    def measures(self, lane: int) -> dict[str, Any]:
        """Accuracy, monitor and removed records of a lane, as `loop.json` has them."""


class RoundGenerator(Protocol):
    """What generates the samples of a round and is retrained on a selection of them."""

    @property
    def num_classes(self) -> int:
        """Classes or modes."""

    def samples(self) -> RoundSamples:
        """The samples of this round; the same ones at every call."""

    def real(self) -> Real | None:
        """Real samples to compare with; None where there are none."""

    def recorded(self) -> RoundSignal:
        """The signal of the records of people, of a job that names a file of them."""

    def retrain(self, rewards: Tensor, signal: RoundSignal | None) -> dict[str, Any]:
        """Select by rewards [..., N] and train the generator of the next round.

        Returns:
            What is to be noted: `selected`, the number of samples selected, and `seconds` by step.
        """


@dataclass(frozen=True, slots=True, eq=False)
class PlayedRound:
    """A finished round.

    Attributes:
        measures: of every lane, as `loop.json` has them.
        memory: what the signal of the next round needs; None without a signal.
    """

    measures: list[dict[str, Any]]
    memory: Memory | None


def play_round(
    generator: RoundGenerator,
    job: LoopSpec,
    arm: str,
    number: int,
    memory_of: Callable[[RoundSamples], Memory],
    seed: int,
) -> PlayedRound:
    """Play a round.

    Args:
        generator: of this round.
        job: the loop.
        arm: name of the arm.
        number: of the round, from 0; `job.rounds` for the one after the last training, which is only measured.
        memory_of: gives what the rounds before have left, called where a reward is learned.
        seed: of all choices of the round; the same for all arms.
    """
    started = time.monotonic()
    samples = generator.samples()
    seconds = {"generate": time.monotonic() - started}
    is_last = number == job.rounds
    signal: RoundSignal | None = None
    memory = None
    if not is_last and job.curation.preferences is not None:
        started = time.monotonic()
        signal = generator.recorded()
        seconds["signal"] = time.monotonic() - started
    elif not is_last and job.curation.learned is not None:
        started = time.monotonic()
        options = SignalOptions.of(job, arm)
        learned = learn_signal(
            samples.features,
            job.curation.scale * samples.rewards,
            memory_of(samples),
            options,
            derived_seed(seed, "signal"),
        )
        seconds["signal"] = time.monotonic() - started
        signal, memory = learned, learned.memory
    scaled = job.curation.scale * samples.rewards
    rewards = scaled if signal is None else signal.rewards
    started = time.monotonic()
    measures = measure(
        samples,
        # The class index itself, whose exponential is 1 at most.
        scaled - (job.curation.scale * generator.num_classes if job.curation.reward == CLASS_INDEX else 0.0),
        None if is_last else rewards,
        generator.num_classes,
        generator.real(),
    )
    seconds["measure"] = time.monotonic() - started
    stops = _stops(job, arm, signal, len(measures))
    trained: dict[str, Any] = {}
    if not is_last and not all(stops):
        trained = generator.retrain(rewards, signal)
    for lane, lane_measures in enumerate(measures):
        lane_measures |= {
            "round": number,
            "trained": bool(trained) and not stops[lane],
            "stopped": stops[lane],
            "selected": None if stops[lane] else trained.get("selected"),
            **_signal_measures(signal, lane),
            "seconds": seconds | trained.get("seconds", {}),
        }
    return PlayedRound(measures, memory)


def _stops(job: LoopSpec, arm: str, signal: RoundSignal | None, num_lanes: int) -> list[bool]:
    """Which lanes an alarm stops: a defence answers it instead."""
    if signal is None or job.on_alarm == "continue" or job.arms[arm].defence != "none":
        return [False] * num_lanes
    return [bool(alarm) for alarm in signal.alarm.reshape(-1)]


def _signal_measures(signal: RoundSignal | None, lane: int) -> dict[str, Any]:
    """What the signal adds to the measures of a lane."""
    return {"accuracy": None, "monitor": None, "removed": None} if signal is None else signal.measures(lane)


def derived_seed(seed: int, *parts: object) -> int:
    """A seed for one purpose, independent of those for others; below 2^53."""
    text = "/".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 2**53


def random_of(seed: int, *parts: object) -> torch.Generator:
    """A random generator for one purpose."""
    return torch.Generator().manual_seed(derived_seed(seed, *parts))
