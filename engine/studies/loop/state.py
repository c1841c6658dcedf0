"""Which round of which lane is next, as a function of what is done. A lane is one arm with one seed. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

# A round is made again when its process was lost; the next loss ends the loop.
MAX_LOSSES = 2


@dataclass(frozen=True, slots=True, order=True)
class Lane:
    """One loop.

    Attributes:
        arm: its name.
        seed: repetition, from 0.
    """

    arm: str
    seed: int

    def __str__(self) -> str:
        return f"{self.arm}, seed {self.seed}"


class Status(Enum):
    """Of a lane."""

    OPEN = "open"
    DONE = "done"
    STOPPED = "stopped"


def lane_status(rounds: Mapping[int, Mapping[str, Any]], num_rounds: int) -> Status:
    """The status of a lane by its finished rounds.

    Args:
        rounds: measures by number; the last number is the generator after the last training.
        num_rounds: that the job asks for.
    """
    if any(measures["stopped"] for measures in rounds.values()):
        return Status.STOPPED
    return Status.DONE if next_round(rounds, num_rounds) is None else Status.OPEN


def next_round(rounds: Mapping[int, Mapping[str, Any]], num_rounds: int) -> int | None:
    """The first round that is not finished; None if there is none.

    The round after the last training is only measured, so that it is not finished where the job asks for more rounds
    than it did.
    """
    for number in range(num_rounds + 1):
        if number not in rounds or (number < num_rounds and not rounds[number]["trained"]):
            return number
    return None


@dataclass(slots=True)
class Schedule:
    """The rounds of all lanes, handed out in order: those of a lane one after another.

    Attributes:
        num_rounds: that the job asks for.
        rounds: measures of finished rounds, by lane and number.
        losses: processes lost with a lane's present round.
        waiting: runs whose samples people have not chosen between, by lane; nothing is done there.
    """

    num_rounds: int
    rounds: dict[Lane, dict[int, dict[str, Any]]]
    losses: dict[Lane, int] = field(default_factory=dict)
    waiting: dict[Lane, str] = field(default_factory=dict)
    _running: set[Lane] = field(default_factory=set)

    def ready(self) -> list[tuple[Lane, int]]:
        """Rounds that can start now, those that are furthest behind first."""
        tasks = [
            (number, position, lane)
            for position, (lane, rounds) in enumerate(self.rounds.items())
            if lane not in self._running
            and lane not in self.waiting
            and lane_status(rounds, self.num_rounds) is Status.OPEN
            if (number := next_round(rounds, self.num_rounds)) is not None
        ]
        return [(lane, number) for number, _, lane in sorted(tasks, key=lambda task: task[:2])]

    def start(self, lane: Lane) -> None:
        """Note that a lane's next round is being made."""
        self._running.add(lane)

    def finish(self, lane: Lane, measures: dict[str, Any]) -> None:
        """Take in the measures of a lane's round."""
        self._running.discard(lane)
        self.losses.pop(lane, None)
        self.rounds[lane][measures["round"]] = measures

    def wait(self, lane: Lane, run: str) -> None:
        """Note that a lane's round waits for people to choose between samples of its run."""
        self._running.discard(lane)
        self.waiting[lane] = run

    def lose(self, lane: Lane) -> bool:
        """Note that the process of a lane's round was lost; whether the round may be made again."""
        self._running.discard(lane)
        self.losses[lane] = self.losses.get(lane, 0) + 1
        return self.losses[lane] <= MAX_LOSSES

    def lanes(self, status: Status) -> list[Lane]:
        """Lanes of a status."""
        return [lane for lane, rounds in self.rounds.items() if lane_status(rounds, self.num_rounds) is status]


def lanes_of(arms: Iterable[str], num_seeds: int) -> list[Lane]:
    """All lanes, arm by arm."""
    return [Lane(arm, seed) for arm in arms for seed in range(num_seeds)]
