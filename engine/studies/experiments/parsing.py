"""From a study file, or a job file in its place, to a checked study and its job."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import pydantic

from engine.errors import JobError
from engine.job.parsing import MAX_PROBLEMS, apply_overrides, parse_job
from engine.job.spec import JobSpec
from engine.job.spec_messages import Location, explain, location_of
from engine.studies.experiments.spec import StudySpec

S = TypeVar("S", bound=StudySpec)
MAX_JOB_NAME = 64
# What a study decides for each of its runs.
_OWN = ("name", "seed")


@dataclass(frozen=True, slots=True, kw_only=True)
class Study(Generic[S]):
    """A checked study.

    Attributes:
        spec: its fields, with name and output filled in.
        job: the job whose fields are varied; `name`, `seed` and `output.uri` are those of the study.
    """

    spec: S
    job: JobSpec

    @property
    def home(self) -> str:
        """The folder of the study."""
        assert self.spec.output is not None
        return self.spec.output.uri


def parse_study(
    kind: str,
    spec_class: type[S],
    raw: Any,
    read: Callable[[str], Any],
    *,
    options: list[tuple[str, Any]],
    sets: list[tuple[str, Any]],
) -> Study[S]:
    """Check a study.

    Args:
        kind: of study, such as `sweep`.
        raw: the content of a study file, or of a job file, whose study has then the defaults.
        read: the content of a job file by its path, as `job` gives it.
        options: fields of the study by options of the command line, which override those of the file.
        sets: overrides by `--set`: of a job file fields of the job; of a study file its own, the job's below `job.`.

    Raises:
        JobError: with every problem found, a line each.
    """
    if not isinstance(raw, dict):
        raise JobError(f"job: a mapping of keys is expected, not {type(raw).__name__}; see docs/studies.md")
    is_job = "study" not in raw
    if problems := list(_misplaced(sets, spec_class, is_job=is_job)):
        raise JobError(problems)
    if is_job:
        raw = {"study": kind, "job": apply_overrides(raw, sets), **_taken(raw, sets)}
    elif raw["study"] != kind:
        raise JobError(
            f"study: {_shown(raw['study'])} is not '{kind}', the command that was called; change one of them"
        )
    else:
        given = raw.get("job")
        raw = apply_overrides(raw | ({"job": _read(read, given)} if isinstance(given, str) else {}), sets)
    raw = apply_overrides(raw, options)
    spec = validated(spec_class, raw)
    try:
        job = _job_of(spec, is_whole=is_job)
    except JobError as error:
        prefix = "" if is_job else "job."
        raise JobError([_prefixed(line, prefix) for line in error.problems]) from None
    output = {"uri": f"{job.output.uri.rstrip('/')}-{kind}"} if spec.output is None else spec.output.model_dump()
    filled = {"name": job.name, "output": output, "seed": job.seed}
    return Study(spec=spec_class.model_validate(spec.model_dump() | filled), job=job)


def _misplaced(sets: list[tuple[str, Any]], spec_class: type[StudySpec], *, is_job: bool) -> Iterator[str]:
    """Overrides of the job in the form for the other kind of file, with the form for this one."""
    for key, _ in sets:
        if is_job and key.startswith("job."):
            yield f"--set {key}: the file is a job; give {key.removeprefix('job.')}, without `job.`"
        first = key.partition(".")[0]
        if not is_job and first in JobSpec.model_fields and first not in spec_class.model_fields:
            yield f"--set {key}: is a key of the study's job; give job.{key}"


def _read(read: Callable[[str], Any], given: str) -> Any:
    """The content of the job file that a study's file names; its problems name the field."""
    try:
        return read(given)
    except JobError as error:
        raise JobError([f"job: {line}" for line in error.problems]) from None


def validated(spec_class: type[S], raw: dict[str, Any]) -> S:
    """The fields of a study.

    Raises:
        JobError: with every problem, a line each.
    """
    try:
        return spec_class.model_validate(raw)
    except pydantic.ValidationError as error:
        raise JobError(validation_lines(error, lambda item, location: explain(spec_class, item, location))) from None


def validation_lines(error: pydantic.ValidationError, text: Callable[[Any, Location], str]) -> list[str]:
    """A line for each problem of a file.

    Args:
        text: of a problem, from pydantic's item and its place.
    """
    texts: dict[Location, str] = {}
    for item in error.errors(include_url=False)[:MAX_PROBLEMS]:
        location = location_of(item)
        texts.setdefault(location, text(item, location))
    return [f"{'.'.join(map(str, where)) or 'job'}: {line}" for where, line in texts.items()]


def _taken(raw: dict[str, Any], sets: list[tuple[str, Any]]) -> dict[str, Any]:
    """Name and seed of a job, which are those of its study, where they are usable."""
    raw = apply_overrides(raw, [(key, value) for key, value in sets if key in _OWN])
    return {key: raw[key] for key in _OWN if raw.get(key) is not None}


def _job_of(spec: StudySpec, *, is_whole: bool) -> JobSpec:
    """The job of a study.

    Args:
        is_whole: whether it is a job file of its own, which has to have a name and an output.
    """
    raw = spec.job
    if not isinstance(raw, dict):
        raise JobError(f"a mapping of keys is expected, not {type(raw).__name__}")
    output = raw.get("output")
    output = output if isinstance(output, dict) else {}
    fills: dict[str, Any] = {}
    if not is_whole:
        name = spec.name or raw.get("name") or spec.study
        fills["name"] = name
        fills["output"] = {"uri": f"runs/{name}", **output}
    if spec.name is not None:
        fills["name"] = spec.name
    if spec.seed is not None:
        fills["seed"] = spec.seed
    return parse_job(raw | fills)


def _prefixed(line: str, prefix: str) -> str:
    return f"{prefix}{line}" if re.match(r"[a-z_]+[.:]", line) and not line.startswith("job:") else line


def _shown(value: Any) -> str:
    return repr(value)[:100]
