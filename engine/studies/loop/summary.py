"""The figures of an arm over its seeds, for the command line."""

from __future__ import annotations

from typing import Any

from engine.studies.intervals import mean_interval
from engine.studies.loop.state import Schedule, Status, lane_status


def arm_figures(schedule: Schedule, arm: str) -> dict[str, Any]:
    """Rewards by round with intervals over the seeds (of one seed: over its samples), and what the monitor found."""
    lanes = [rounds for lane, rounds in schedule.rounds.items() if lane.arm == arm]
    numbers = sorted({number for rounds in lanes for number in rounds})
    return {
        "reward": [_estimate([rounds[number]["reward"] for rounds in lanes if number in rounds]) for number in numbers],
        "seeds": len(lanes),
        "alarms": sum(
            any((measures["monitor"] or {}).get("alarm", False) for measures in rounds.values()) for rounds in lanes
        ),
        "stopped": sum(lane_status(rounds, schedule.num_rounds) is Status.STOPPED for rounds in lanes),
    }


def _estimate(rewards: list[dict[str, Any]]) -> dict[str, Any]:
    if len(rewards) == 1:
        return {name: rewards[0][name] for name in ("value", "low", "high")} | {"seeds": 1}
    estimate = mean_interval([reward["value"] for reward in rewards])
    return {"value": estimate.value, "low": estimate.low, "high": estimate.high, "seeds": len(rewards)}


def arm_line(schedule: Schedule, arm: str) -> str:
    """The figures in a line."""
    figures = arm_figures(schedule, arm)
    rewards = figures["reward"]
    if not rewards:
        return f"{arm}: no round is finished"
    first, last = rewards[0], rewards[-1]
    alarms = f"; alarms in {figures['alarms']} of {figures['seeds']} seeds" if figures["alarms"] else ""
    stopped = f", {figures['stopped']} stopped" if figures["stopped"] else ""
    return (
        f"{arm}: reward {first['value']:.3g} in round 0, {last['value']:.3g} ({last['low']:.3g} to {last['high']:.3g})"
        f" in round {len(rewards) - 1}{alarms}{stopped}"
    )
