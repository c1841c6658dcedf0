"""A study of the smallest kind: one run, a step, and a table with hostile text; run as a program, one to be killed."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field

from engine.data.run.study_document import Interval, StudyColumn, StudyFigure, StudyTable
from engine.errors import JobError
from engine.job.spec import JobSpec
from engine.studies.experiments.figures import draw, series_style
from engine.studies.experiments.program import StudyContext, StudyOutcome
from engine.studies.experiments.registry import STUDIES, StudyRecord
from engine.studies.experiments.spec import StudySpec
from engine.studies.samples import read_attempts

HOSTILE = "<script>alert(1)</script> | $x_1$ `a` \n[b](c) *d*"
RECORD = StudyRecord(
    kind="demo",
    spec="tests.study_cases:DemoSpec",
    check="tests.study_cases:check_demo",
    program="tests.study_cases:demo",
)
MODELS = {"diffusion": "stable-diffusion", "clip": "clip", "target": "classifier"}
# What the step was called for, by the folder of its study.
CALLS: list[str] = []


class DemoSpec(StudySpec):
    """Fields of the demonstration."""

    text: str = Field(default="plain", description="Of a row.")


def check_demo(spec: DemoSpec, job: JobSpec) -> str:
    """Refuses one text."""
    if spec.text == "refused":
        raise JobError("text: 'refused' is not a text of this study; give another")
    return f"1 run of {spec.count} samples"


def demo(spec: DemoSpec, job: JobSpec, context: StudyContext) -> StudyOutcome:
    """One run, its median risk in a step, and a table."""
    request = job.requests[0].model_copy(update={"count": spec.count})
    run = context.make_run("only", job.model_copy(update={"requests": (request,)}))

    def median() -> float:
        CALLS.append(str(context.home))
        return sorted(row["risk"] for row in read_attempts(run, [request.name], ["risk"]))[0]

    risk = context.once("risk/least", {"shards": run.shards_digest}, median)
    columns = (
        StudyColumn(name="cell", title="cell"),
        StudyColumn(name="n", title="n"),
        StudyColumn(name="risk", title="risk", unit="nats", note="of the target"),
        StudyColumn(name="marked", title="marked"),
    )
    rows = ((spec.text, spec.count, Interval(value=risk, low=risk - 1, high=risk + 1), True), (HOSTILE, 0, None, False))
    table = StudyTable(name="table", title="The table", columns=columns, rows=rows)
    svg = draw(4, 3, lambda figure: figure.add_subplot(title=HOSTILE).plot([1, 2], [risk, 1], **series_style(0)))
    return StudyOutcome(
        tables=(table,),
        figures=(StudyFigure(name="figure", caption=HOSTILE, svg=svg),),
        findings=(f"the least risk is {risk:.3f}", HOSTILE),
        notes=("two samples say nothing",),
    )


def write_job(path: Path, **changes: Any) -> Path:
    """A job file of two samples of the digits zoo."""
    raw = {
        "name": "tiny",
        "models": {
            "diffusion": "zoo:digits/stable-diffusion",
            "clip": "zoo:digits/clip",
            "target": "zoo:digits/classifier",
        },
        "requests": [{"name": "plain", "method": "prompt", "classes": ["three"], "count": 2}],
        "sampling": {"scheduler": "ddim", "num_inference_steps": 2},
        "output": {"uri": str(path.parent / "run")},
    }
    path.write_text(yaml.safe_dump(raw | changes))
    return path


def main() -> None:
    """The study as a process of its own, for tests that kill it: FILE OUTPUT COUNT."""
    from engine.commands.experiments import StudyCall, call_study

    STUDIES["demo"] = RECORD
    file, output, count = sys.argv[1:]
    call_study(
        StudyCall(
            kind="demo", file=Path(file), fields={"count": int(count)}, output=output, executor="local", address=None,
            validate=False, sets=None, as_json=False,
        )
    )  # fmt: skip


if __name__ == "__main__":
    main()
