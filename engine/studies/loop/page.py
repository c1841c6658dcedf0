"""The page of a loop: rewards, bounds, classes, distances and the monitor by round, and what was selected."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from engine.data.images.decode import UnusableImageError, decode_sample
from engine.data.stores.base import Store
from engine.data.stores.opening import open_store
from engine.errors import RiskforgeError
from engine.report.gallery import image_uri
from engine.report.lines import NUM_COLOURS, Line, Point, line_chart
from engine.report.style import page_style, page_templates
from engine.studies.intervals import mean_interval
from engine.studies.loop.parsing import LoopJob
from engine.studies.loop.results import REPORT, LoopFolder
from engine.studies.loop.state import Lane, Schedule, Status, lane_status
from engine.studies.samples import open_study, read_samples

MAX_CLASSES = 30
MAX_IMAGE_BYTES = 6000
MAX_STRIP_BYTES = 6_000_000
HEAT_LEVELS = 4
_HERE = Path(__file__).parent

Rounds = dict[int, dict[str, Any]]
Value = Callable[[dict[str, Any]], float | None]


def write_page(store: Store, job: LoopJob, schedule: Schedule, classes: Sequence[str]) -> None:
    """Write `report.html` of a loop.

    Args:
        store: of the loop.
        job: the loop.
        schedule: its measures.
        classes: names of classes or modes.
    """
    page = page_templates(_HERE).get_template("loop.html.j2").render(_context(job, schedule, classes))
    store.replace(REPORT, page.encode())


def _context(job: LoopJob, schedule: Schedule, classes: Sequence[str]) -> dict[str, Any]:
    stopped = schedule.lanes(Status.STOPPED)
    return {
        "title": job.spec.name,
        "style": page_style(),
        "lead": _lead(job, schedule),
        "stopped": [str(lane) for lane in stopped[:10]],
        "num_stopped": len(stopped),
        "arms": [
            {"name": name, "colour": number % NUM_COLOURS, "text": _arm_text(job, name)}
            for number, name in enumerate(job.spec.arms)
        ],
        "rows": [_summary_row(job, schedule, arm) for arm in job.spec.arms],
        "charts": _charts(job, schedule),
        "shares": _shares(job, schedule, classes),
        "baseline": next(iter(job.spec.arms)),
        "has_more_classes": len(classes) > MAX_CLASSES,
        "strips": _strips(job, schedule),
    }


def _lead(job: LoopJob, schedule: Schedule) -> str:
    spec = job.spec
    reward = f"reward {spec.curation.reward}"
    learned = f", learned from {spec.curation.learned.records} records a round" if spec.curation.learned else ""
    unfinished = len(schedule.lanes(Status.OPEN))
    return f"{spec.size}; one of {spec.curation.candidates} candidates is selected by {reward}{learned}" + (
        f"; {unfinished} loops are not finished" if unfinished else ""
    )


def _arm_text(job: LoopJob, name: str) -> str:
    arm = job.spec.arms[name]
    attack = "" if arm.attack == "none" else f"{arm.attack} attack on {arm.share:.0%} of the records"
    defence = "" if arm.defence == "none" else f"{arm.defence} after an alarm"
    weight = job.spec.weight_of(name)
    real = "" if weight is None else f"{weight:g} curated for each real sample"
    steps = "" if arm.steps is None else f"{arm.steps} steps a round"
    return ", ".join(filter(None, (attack, defence, real, steps))) or "no attack"


def _rounds_of(schedule: Schedule, arm: str) -> list[Rounds]:
    return [rounds for lane, rounds in schedule.rounds.items() if lane.arm == arm]


def _points(schedule: Schedule, arm: str, value: Value) -> tuple[Point, ...]:
    """Means over the seeds, with intervals where there are two or more."""
    lanes = _rounds_of(schedule, arm)
    points = []
    for number in sorted({number for rounds in lanes for number in rounds}):
        values = [found for rounds in lanes if number in rounds and (found := value(rounds[number])) is not None]
        if len(values) > 1:
            estimate = mean_interval(values)
            points.append(Point(number, estimate.value, estimate.low, estimate.high))
        elif values:
            points.append(Point(number, values[0], values[0], values[0]))
    return tuple(points)


def _charts(job: LoopJob, schedule: Schedule) -> list[dict[str, Any]]:
    level = job.spec.monitor.level if job.spec.monitor else None
    charts: list[tuple[str, str, str, Value, float | None]] = [
        ("Expected reward", "true reward of the samples, before curation", "reward",
         lambda measures: measures["reward"]["value"], None),
        ("Expected reward by the oracle", "the same by the classes that the independent oracle predicts", "reward",
         lambda measures: measures["oracle_reward"], None),
        ("Correlation", "of e^r and e^r~, true and curating reward: the sign of the papers' covariance", "correlation",
         lambda measures: measures["correlation"], 0.0),
        ("Covariance", "Cov(e^r, e^r~), the curating reward shifted to a largest value of 0", "covariance",
         lambda measures: measures["covariance"], 0.0),
        ("Variance", "Var(e^r) of the true reward", "variance", lambda measures: measures["variance"], None),
        ("Balance of classes", "entropy of their shares over that of equal ones", "balance",
         lambda measures: measures["balance"], None),
        ("Kernel distance", "KID to real samples", "KID",
         lambda measures: measures["kid"] and measures["kid"]["value"], 0.0),
        ("Held-out accuracy", "of the learned reward on records that did not train it", "accuracy",
         lambda measures: measures["accuracy"] and measures["accuracy"]["value"], 0.5),
        ("Monitor", "evidence that records and trusted choices differ; alarm at the line", "log10 of the e-value",
         lambda measures: measures["monitor"] and math.log10(max(measures["monitor"]["e_value"], 1e-300)),
         None if level is None else -math.log10(level)),
        ("Agreement of the oracle", "share of the samples whose class the oracle confirms", "share",
         lambda measures: measures["agreement"], None),
    ]  # fmt: skip
    drawn = []
    for title, note, y_title, value, mark in charts:
        lines = [Line(arm, number, _points(schedule, arm, value)) for number, arm in enumerate(job.spec.arms)]
        if any(line.points for line in lines):
            figure = line_chart(lines, title=f"{title} by round", x_title="round", y_title=y_title, mark=mark)
            drawn.append({"title": title, "note": note, "figure": figure})
    return drawn


def _summary_row(job: LoopJob, schedule: Schedule, arm: str) -> dict[str, Any]:
    lanes = [(lane, rounds) for lane, rounds in schedule.rounds.items() if lane.arm == arm and rounds]
    rewards = _points(schedule, arm, lambda measures: measures["reward"]["value"])
    firsts = [number for _, rounds in lanes if (number := _first_alarm(rounds)) is not None]
    statuses = [lane_status(rounds, schedule.num_rounds) for _, rounds in lanes]
    last_kid = _points(schedule, arm, lambda measures: measures["kid"] and measures["kid"]["value"])
    balance = _points(schedule, arm, lambda measures: measures["balance"])
    return {
        "name": arm,
        "text": _arm_text(job, arm),
        "first": _point_text(rewards[:1]),
        "last": _point_text(rewards[-1:]),
        "balance": _point_text(balance[-1:]),
        "kid": _point_text(last_kid[-1:]),
        "difference": _point_text(_difference(schedule, arm, next(iter(job.spec.arms)))),
        "alarms": _alarm_text(firsts, len(lanes), statuses.count(Status.STOPPED)) if job.spec.monitor else "",
        "removed": _removed_text([rounds for _, rounds in lanes]),
    }


def _difference(schedule: Schedule, arm: str, other: str) -> tuple[Point, ...]:
    """Mean reward after the last retraining less that of another arm, seed by seed; nothing of one seed alone."""
    own, others = (
        {
            lane.seed: rounds[schedule.num_rounds]["reward"]["value"]
            for lane, rounds in schedule.rounds.items()
            if lane.arm == name and schedule.num_rounds in rounds
        }
        for name in (arm, other)
    )
    differences = [own[seed] - others[seed] for seed in own if seed in others]
    if arm == other or len(differences) < 2:
        return ()
    estimate = mean_interval(differences)
    return (Point(schedule.num_rounds, estimate.value, estimate.low, estimate.high),)


def _point_text(points: Sequence[Point]) -> dict[str, str]:
    if not points:
        return {"value": "", "note": ""}
    [point] = points
    note = "" if point.low == point.high else f"{point.low:.3g} to {point.high:.3g}"
    return {"value": f"{point.value:.3g}", "note": note}


def _first_alarm(rounds: Rounds) -> int | None:
    return next((number for number in sorted(rounds) if (state := rounds[number]["monitor"]) and state["alarm"]), None)


def _alarm_text(firsts: Sequence[int], num_lanes: int, num_stopped: int) -> str:
    text = f"{len(firsts)} of {num_lanes}"
    stopped = f"; {num_stopped} stopped" if num_stopped else ""
    return f"{text}, first in round {min(firsts)}{stopped}" if firsts else text


def _removed_text(lanes: Sequence[Rounds]) -> str:
    """Shares of the tampered and of the honest records that the defence removed, where it acted."""
    acted = [
        removed
        for rounds in lanes
        for measures in rounds.values()
        if (removed := measures["removed"]) and removed["tampered"] + removed["honest"]
    ]
    if not acted:
        return ""
    tampered, honest = (
        sum(removed[name] for removed in acted) / max(1, sum(removed[f"{name}_of"] for removed in acted))
        for name in ("tampered", "honest")
    )
    return f"{tampered:.0%} of the tampered, {honest:.0%} of the honest"


def _shares(job: LoopJob, schedule: Schedule, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Mean shares of the classes by arm, a table of classes by rounds."""
    tables = []
    present = {
        index
        for rounds in schedule.rounds.values()
        for measures in rounds.values()
        for index, share in enumerate(measures["shares"])
        if share
    }
    for arm in job.spec.arms:
        lanes = _rounds_of(schedule, arm)
        numbers = sorted({number for rounds in lanes for number in rounds})
        if not numbers:
            continue
        means = [_mean_shares([rounds[number]["shares"] for rounds in lanes if number in rounds]) for number in numbers]
        shown = min(MAX_CLASSES, *map(len, means))
        top = max(max(row) for row in means) or 1.0
        names = [classes[index] if index < len(classes) else f"class {index}" for index in range(shown)]
        lines = [
            {
                "name": name,
                "cells": [
                    {"text": f"{row[index]:.0%}", "heat": math.ceil(row[index] / top * HEAT_LEVELS)} for row in means
                ],
            }
            for index, name in enumerate(names)
            if index in present
        ]
        tables.append({"arm": arm, "rounds": numbers, "lines": lines})
    return tables


def _mean_shares(shares: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(shares) for column in zip(*shares, strict=False)]


def _strips(job: LoopJob, schedule: Schedule) -> list[dict[str, Any]]:
    """The first selected images of every round of an arm's first seed."""
    if job.job is None or not job.spec.measure.shown:
        return []
    folder, left = LoopFolder(Path(job.spec.output.uri)), MAX_STRIP_BYTES
    strips = []
    for arm in job.spec.arms:
        lane, rows = Lane(arm, 0), []
        for number in sorted(schedule.rounds.get(lane, {})):
            images = _selected(folder.round(lane, number) / "curated", job.spec.measure.shown)
            left -= sum(map(len, images))
            if images and left > 0:
                rows.append({"round": number, "images": images})
        if rows:
            strips.append({"arm": arm, "rows": rows})
    return strips


def _selected(path: Path, limit: int) -> list[str]:
    """The first selected images of a curated run as data URIs; none where it is not there."""
    if not path.is_dir():
        return []
    uris: list[str] = []
    try:
        study = open_study(open_store(str(path)).uri)
        for data, _ in read_samples(study, [request.name for request in study.job.requests]):
            if len(uris) == limit:
                break
            uris.append(image_uri(decode_sample(data), MAX_IMAGE_BYTES))
    except (RiskforgeError, UnusableImageError, OSError):
        # A damaged run is reported by `riskforge verify`; the page shows what there is.
        return uris
    return uris
