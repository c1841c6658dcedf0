"""Tables and a chart of loops on images, for `docs/curation.md`, from the `loop.json` of several loop jobs.

python tools/loop_figures.py runs/loop-digits/loop.json runs/loop-digits-real/loop.json --chart docs/curation-digits.svg
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from curation_charts import draw_loops

from engine.methods.intervals import Estimate, wilson_interval
from engine.studies.intervals import mean_interval

Round = dict[str, Any]
# The rounds of each seed of an arm.
Lanes = list[list[Round]]


def main() -> None:
    """Print the tables; draw the chart where a file is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("documents", nargs="+", type=Path, help="loop.json of each job")
    parser.add_argument("--chart", type=Path, help="SVG file of the reward by round")
    arguments = parser.parse_args()
    panels = {}
    for path in arguments.documents:
        name, arms = _read(path)
        num_rounds = min(len(rounds) for lanes in arms.values() for rounds in lanes)
        print(f"### {name}")
        _print_rewards(arms, num_rounds)
        _print_ends(arms, num_rounds)
        if all(lanes[0][0]["accuracy"] for lanes in arms.values()):
            _print_guards(arms, num_rounds)
        panels[name] = {
            arm: [_values(lanes, number, _reward) for number in range(num_rounds)] for arm, lanes in arms.items()
        }
    if arguments.chart:
        draw_loops(panels, arguments.chart)


def _read(path: Path) -> tuple[str, dict[str, Lanes]]:
    """Name of the job, and its lanes by arm.

    Raises:
        SystemExit: it is not finished.
    """
    document = json.loads(path.read_text())
    if document["status"] == "running":
        raise SystemExit(f"{path}: its loops are not finished; the same `riskforge study loop` continues them")
    arms: dict[str, Lanes] = {}
    for lane in document["lanes"]:
        arms.setdefault(lane["arm"], []).append(lane["rounds"])
    return document["job"]["name"], arms


def _reward(measures: Round) -> float:
    return float(measures["reward"]["value"])


def _values(lanes: Lanes, number: int, measure: Callable[[Round], float]) -> list[float]:
    """A measure of a round in every seed."""
    return [measure(rounds[number]) for rounds in lanes]


def _mean(lanes: Lanes, number: int, measure: Callable[[Round], float], digits: int = 2) -> str:
    """Mean over the seeds, and half the width of its interval."""
    estimate = mean_interval(_values(lanes, number, measure))
    return f"{estimate.value:.{digits}f} ± {(estimate.high - estimate.low) / 2:.{digits}f}"


def _share(estimate: Estimate) -> str:
    return f"{estimate.value:.0%} [{estimate.low:.0%}, {estimate.high:.0%}]"


def _print_rewards(arms: dict[str, Lanes], num_rounds: int) -> None:
    """Users' reward by round."""
    _print_header(["arm", *(f"round {number}" for number in range(num_rounds))])
    for arm, lanes in arms.items():
        _print_row([arm, *(_mean(lanes, number, _reward) for number in range(num_rounds))])


def _print_ends(arms: dict[str, Lanes], num_rounds: int) -> None:
    """What the last round is like."""
    _print_header(["arm", "reward by the oracle", "oracle agrees", "balance of classes", "kernel distance"])
    for arm, lanes in arms.items():
        columns: list[tuple[Callable[[Round], float], int]] = [
            (lambda measures: measures["oracle_reward"], 2),
            (lambda measures: measures["agreement"], 2),
            (lambda measures: measures["balance"], 2),
        ]
        if lanes[0][-1]["kid"] is not None:
            columns.append((lambda measures: measures["kid"]["value"], 3))
        cells = [_mean(lanes, num_rounds - 1, measure, digits) for measure, digits in columns]
        _print_row([arm, *cells, *[""] * (4 - len(cells))])


def _print_guards(arms: dict[str, Lanes], num_rounds: int) -> None:
    """The learned reward, the monitor and the defence."""
    _print_header(
        ["arm", "held-out accuracy, round 0", "covariance, round 0", "alarm within 2", f"within {num_rounds - 1}",
         "tampered removed", "honest removed"]
    )  # fmt: skip
    for arm, lanes in arms.items():
        alarms = [[bool(measures["monitor"] and measures["monitor"]["alarm"]) for measures in lane] for lane in lanes]
        # Rounds in which the defence acted.
        removed = [one for lane in lanes for measures in lane if (one := measures["removed"]) and any(_taken(one))]
        _print_row(
            [
                arm,
                _mean(lanes, 0, lambda measures: measures["accuracy"]["value"]),
                _mean(lanes, 0, lambda measures: measures["covariance"], 3),
                _share(wilson_interval(sum(any(lane[:2]) for lane in alarms), len(alarms))),
                _share(wilson_interval(sum(any(lane) for lane in alarms), len(alarms))),
                *(_removed_share(removed, kind) for kind in ("tampered", "honest")),
            ]
        )


def _taken(removed: dict[str, int]) -> tuple[int, int]:
    return removed["tampered"], removed["honest"]


def _removed_share(removed: list[dict[str, int]], kind: str) -> str:
    total = sum(one[f"{kind}_of"] for one in removed)
    return f"{sum(one[kind] for one in removed) / total:.0%}" if total else ""


def _print_header(names: list[str]) -> None:
    print()
    _print_row(names)
    _print_row(["---"] * len(names))


def _print_row(cells: list[str]) -> None:
    print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
