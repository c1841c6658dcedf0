"""The files of a loop: `loop.json` with the job and all measures, and `round.json` of every finished round."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import pydantic
from pydantic import BaseModel, ConfigDict, Field

import engine
from engine.data.stores.base import Store
from engine.errors import OutputError, first_line
from engine.job.json_values import difference
from engine.job.plan import TEMPERATURE
from engine.job.spec import JobSpec
from engine.methods.strict_json import parse_json
from engine.models.calibration import job_calibration
from engine.models.untrusted_files import MAX_DOCUMENT_BYTES
from engine.studies.loop.parsing import LoopJob
from engine.studies.loop.spec import MAX_REWARD, LoopSpec
from engine.studies.loop.state import Lane, Schedule, Status, lane_status, next_round

STUDY = "loop"
VERSION = 1
DOCUMENT = "loop.json"
REPORT = "report.html"
ROUND_DOCUMENT = "round.json"
# Key of what a round gives that waits for people: the run whose samples they have to choose between.
WAITS = "waits"
# Folders of a round.
GENERATED, CURATED, MODEL = "generated", "curated", "model"
MAX_DIFFERENCES = 20
# Fields that a loop may be continued with another value of.
_FREE = ("rounds", "seeds", "arms", "on_alarm", "keep_models", "output")


# Its square can be summed.
Bounded = Annotated[float, Field(ge=-MAX_REWARD, le=MAX_REWARD)]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)


class EstimateRecord(_Record):
    """A value with its interval."""

    value: Bounded
    low: float
    high: float


class AccuracyRecord(EstimateRecord):
    """Accuracy on held-out records."""

    records: int


class DistanceRecord(EstimateRecord):
    """A distance, and the space of features that it is measured in."""

    space: str = Field(max_length=1000)


class MonitorRecord(_Record):
    """The monitor after a round."""

    e_value: float
    alarm: bool
    audited: int
    differing: int


class RemovedRecord(_Record):
    """Records that the defence removed from training."""

    tampered: int
    tampered_of: int
    honest: int
    honest_of: int


class RoundRecord(_Record):
    """Measures of a round of a lane; what was not measured is null."""

    round: int = Field(ge=0)
    trained: bool
    stopped: bool
    samples: int
    selected: int | None
    reward: EstimateRecord
    variance: Bounded | None
    covariance: Bounded | None
    correlation: Bounded | None
    gain: float | None
    gain_low: float | None
    gain_high: float | None
    shares: list[Bounded] = Field(min_length=1, max_length=100_000)
    balance: Bounded
    kid: DistanceRecord | None
    agreement: Bounded | None
    oracle_reward: Bounded | None
    accuracy: AccuracyRecord | None
    monitor: MonitorRecord | None
    removed: RemovedRecord | None
    seconds: dict[str, float] = Field(max_length=20)


class LaneRecord(_Record):
    """A lane with its finished rounds."""

    arm: str
    seed: int
    status: str
    rounds: list[RoundRecord]


class LoopDocument(_Record):
    """The content of `loop.json`."""

    study: str
    version: int
    riskforge: str
    status: str
    job: dict[str, Any]
    engine_job: dict[str, Any] | None
    classes: list[str]
    lanes: list[LaneRecord]


@dataclass(frozen=True, slots=True)
class LoopFolder:
    """Where the parts of a loop are.

    Attributes:
        home: the folder of the loop.
    """

    home: Path

    def lane(self, lane: Lane) -> Path:
        """The folder of a lane."""
        return self.home / lane.arm / f"seed-{lane.seed}"

    def round(self, lane: Lane, number: int) -> Path:
        """The folder of a round of a lane."""
        return self.lane(lane) / f"round-{number:02d}"


def identity(job: LoopJob) -> dict[str, Any]:
    """What decides the figures of a round: the job without what may change on an existing folder."""
    spec = job.spec.model_dump(mode="json", exclude=set(_FREE))
    spec["generator"].pop("job", None)
    spec["measure"].pop("shown", None)
    return spec | {"generator": spec["generator"] | {"job": _engine_identity(job.job)}}


def _engine_identity(job: JobSpec | None) -> dict[str, Any] | None:
    if job is None:
        return None
    fields = job.model_dump(mode="json", exclude={"name", "seed"})
    fields["output"].pop("uri")
    for name in ("workers", "batch_size"):
        fields["runtime"].pop(name)
    # A loop has no starts and no twins; of a calibration the temperature counts. Loops from before know none of them.
    for request in fields["requests"]:
        del request["start"], request["twin"]
    del fields["models"]["calibration"]
    if (calibration := job_calibration(job, with_digest=False)) is not None:
        fields["models"][TEMPERATURE] = calibration.temperature
    return fields


def read_document(store: Store) -> LoopDocument | None:
    """The `loop.json` of a folder; None where there is none.

    Raises:
        OutputError: it is not that of a loop, or damaged.
    """
    if not store.exists(DOCUMENT):
        return None
    try:
        document = LoopDocument.model_validate(parse_json(store.read(DOCUMENT, MAX_DOCUMENT_BYTES)))
        if document.study != STUDY or document.version != VERSION:
            raise ValueError(f"study {document.study!r}, version {document.version}")
        return document
    except (ValueError, pydantic.ValidationError) as error:
        raise OutputError(
            f"{store.address(DOCUMENT)}: is not that of a loop, or damaged ({first_line(error)}); restore it, or choose"
            " another --output"
        ) from None


def check_continues(document: LoopDocument, job: LoopJob, where: str) -> None:
    """Check that a job continues or extends the loop of a folder.

    Raises:
        OutputError: it is another loop, or a smaller one; with the differences.
    """
    there = document.job.get("identity")
    lines = difference(there, json.loads(json.dumps(identity(job))))
    arms = document.job.get("arms")
    arms = arms if isinstance(arms, dict) else {}
    own = {name: arm.model_dump(mode="json") for name, arm in job.spec.arms.items()}
    lines += [
        f"arms.{name}: {line}" if name in own else f"arms.{name}: is there, and not in this job"
        for name, arm in arms.items()
        for line in (difference(arm, own[name]) if name in own else [""])
    ]
    for name in ("rounds", "seeds"):
        earlier, wanted = document.job.get(name), getattr(job.spec, name)
        if isinstance(earlier, int) and earlier > wanted:
            lines.append(f"{name}: {earlier} -> {wanted}; more extend a loop, fewer do not")
    if not lines:
        return
    if len(lines) > MAX_DIFFERENCES:
        lines[MAX_DIFFERENCES:] = [f"and {len(lines) - MAX_DIFFERENCES} more differences"]
    raise OutputError(
        "\n".join(
            [
                f"output {where}: holds another loop (there -> this job):",
                *(f"  {line}" for line in lines),
                "undo the change, or choose another --output; more rounds or seeds and new arms extend a loop",
            ]
        )
    )


def document_bytes(job: LoopJob, schedule: Schedule, classes: list[str]) -> bytes:
    """The content of `loop.json`."""
    spec = job.spec
    fields = {
        "study": STUDY,
        "version": VERSION,
        "riskforge": engine.__version__,
        "status": loop_status(schedule),
        "job": {
            "name": spec.name,
            "rounds": spec.rounds,
            "seeds": spec.seeds,
            "arms": {name: arm.model_dump(mode="json") for name, arm in spec.arms.items()},
            "on_alarm": spec.on_alarm,
            "identity": identity(job),
        },
        "engine_job": _engine_identity(job.job),
        "classes": classes,
        "lanes": [
            {
                "arm": lane.arm,
                "seed": lane.seed,
                "status": lane_status(rounds, schedule.num_rounds).value,
                "rounds": [rounds[number] for number in sorted(rounds)],
            }
            for lane, rounds in schedule.rounds.items()
        ],
    }
    return json.dumps(fields, indent=1, allow_nan=False).encode() + b"\n"


def loop_status(schedule: Schedule) -> str:
    """`running`, `stopped` where an alarm ended a lane, or `complete`."""
    if schedule.lanes(Status.OPEN):
        return "running"
    return "stopped" if schedule.lanes(Status.STOPPED) else "complete"


def round_bytes(measures: Mapping[str, Any]) -> bytes:
    """The content of `round.json`."""
    return json.dumps(measures, indent=1, allow_nan=False).encode() + b"\n"


def read_rounds(folder: LoopFolder, lane: Lane, num_rounds: int) -> dict[int, dict[str, Any]]:
    """The finished rounds of a lane of pipelines, as far as they follow one another.

    Raises:
        OutputError: a file is not that of a round.
    """
    rounds: dict[int, dict[str, Any]] = {}
    for number in range(num_rounds + 1):
        path = folder.round(lane, number) / ROUND_DOCUMENT
        if not path.exists():
            break
        rounds[number] = _read_round(path, number)
    return rounds


def from_a_model(
    folder: LoopFolder, lane: Lane, rounds: Mapping[int, dict[str, Any]], num_rounds: int
) -> dict[int, dict[str, Any]]:
    """The first rounds of a lane, up to one whose model is there, for the next round to sample from.

    Models of older rounds are removed; where a round after them has to be made again, so have they.
    """
    number = next_round(rounds, num_rounds)
    if number is None or lane_status(rounds, num_rounds) is not Status.OPEN:
        return dict(rounds)
    first = number
    while first and not (folder.round(lane, first - 1) / MODEL).exists():
        first -= 1
    return {done: measures for done, measures in rounds.items() if first == number or done < first}


def _read_round(path: Path, number: int) -> dict[str, Any]:
    from engine.models.untrusted_files import read_whole

    try:
        record = RoundRecord.model_validate(parse_json(read_whole(path, MAX_DOCUMENT_BYTES)))
        if record.round != number:
            raise ValueError(f"it is that of round {record.round}")
        return record.model_dump(mode="json")
    except (OSError, ValueError, pydantic.ValidationError) as error:
        raise OutputError(
            f"{path}: is not that of a finished round ({first_line(error)}); remove it, and the same command makes the"
            " round again"
        ) from None


def recorded_rounds(document: LoopDocument) -> dict[Lane, dict[int, dict[str, Any]]]:
    """The finished rounds of all lanes by `loop.json`."""
    return {
        Lane(lane.arm, lane.seed): {record.round: record.model_dump(mode="json") for record in lane.rounds}
        for lane in document.lanes
    }


def without_stops(rounds: Mapping[int, dict[str, Any]], spec: LoopSpec) -> dict[int, dict[str, Any]]:
    """The rounds of a lane without one that an alarm stopped, where alarms stop nothing any more."""
    return {
        number: measures
        for number, measures in rounds.items()
        if not (measures["stopped"] and spec.on_alarm == "continue")
    }
