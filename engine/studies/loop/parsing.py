"""From a raw loop job to a checked one: every problem is collected before a model is loaded or a worker starts."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pydantic

from engine.errors import JobError
from engine.job.columns import BY_NAME
from engine.job.parsing import parse_job
from engine.job.spec import JobSpec
from engine.job.spec_messages import Location, explain, nearest
from engine.models.factories import is_factory
from engine.studies.experiments.parsing import validation_lines
from engine.studies.loop.spec import MIXTURE_REWARDS, LoopSpec

PLACEHOLDER_URI = "loop"
# Options of `curate` by fields of a loop.
OPTIONS = {
    "--preferences": "curation.preferences",
    "--trusted": "curation.trusted",
    "--reward": "curation.reward",
    "--defence": "defence",
}
# Longest of `NAME-ARM-sSEED-rROUND`, the name of a round's run.
MAX_NAME = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopJob:
    """A checked loop job.

    Attributes:
        spec: its fields.
        job: the engine's job of its rounds, whose name, seed and output are those of no round; None for a mixture.
    """

    spec: LoopSpec
    job: JobSpec | None


def parse_loop(raw: Any, read: Callable[[str], Any]) -> LoopJob:
    """Check a loop job as read from YAML.

    Args:
        raw: the content of the file.
        read: the content of a job file by its path, as `generator.job` gives it.

    Raises:
        JobError: with every problem found, a line each.
    """
    if not isinstance(raw, dict):
        raise JobError(f"job: a mapping of keys is expected, not {type(raw).__name__}; see docs/curation.md")
    if raw.get("study") != "loop":
        raise JobError(
            f"study: {raw.get('study')!r} is not 'loop'; a job of `riskforge run` has no loop, add `study: loop` to one"
            " that has"
        )
    try:
        spec = LoopSpec.model_validate(raw)
    except pydantic.ValidationError as error:
        raise JobError(validation_lines(error, _text)) from None
    problems = list(_problems(spec))
    job = None
    if spec.generator.job is not None and spec.generator.mixture is None:
        try:
            job = _engine_job(spec, read)
        except JobError as error:
            problems += [f"generator.job: {line}" for line in error.problems]
    if job is not None:
        problems += _job_problems(spec, job)
    if problems:
        raise JobError(problems)
    return LoopJob(spec=spec, job=job)


def _text(item: Any, location: Location) -> str:
    """The text of a problem; names of arms are keys of a mapping, which have the form of names."""
    if item["loc"][:1] == ("arms",) and item["loc"][-1] == "[key]":
        if not isinstance(item["input"], str):
            return f"{item['input']!r} is not text; put the name of an arm in quotes"
        return f"{item['input']!r} may hold only a-z, 0-9 and inner hyphens; rename the arm"
    if location and location[0] == "arms" and len(location) > 2:
        from engine.studies.loop.spec import ArmSpec

        return explain(ArmSpec, item, location[2:])
    return explain(LoopSpec, item, location)


def _engine_job(spec: LoopSpec, read: Callable[[str], Any]) -> JobSpec:
    given = spec.generator.job
    raw = read(given) if isinstance(given, str) else given
    if not isinstance(raw, dict):
        raise JobError(f"a mapping of keys is expected, not {type(raw).__name__}")
    if not isinstance(given, str) and (named := [key for key in ("name", "seed") if key in raw]):
        raise JobError(f"{named[0]}: the loop gives each round its own; leave it out")
    given_output = raw.get("output")
    output: dict[str, Any] = given_output if isinstance(given_output, dict) else {}
    return parse_job(raw | {"name": spec.name, "seed": 0, "output": {**output, "uri": PLACEHOLDER_URI}})


def _problems(spec: LoopSpec) -> Iterator[str]:
    """Problems between the fields."""
    generator, curation = spec.generator, spec.curation
    if (generator.mixture is None) == (generator.job is None):
        yield "generator: give either `mixture` (Gaussians) or `job` (a job of the engine)"
    yield from _file_problems(spec)
    if spec.training.curated_weight is None and spec.training.real is not None and not _mixes(spec):
        yield (
            "training.curated_weight: missing; it says how many curated samples there are for each real one, such as 4"
        )
    if generator.mixture is not None:
        yield from _mixture_problems(spec)
    longest = max(spec.arms, key=len)
    name = run_name(spec, longest, spec.seeds - 1, spec.rounds)
    if len(name) > MAX_NAME:
        yield f"arms.{longest}: '{name}' would name a run, and has more than {MAX_NAME} characters; shorten the arm"
    for name, arm in spec.arms.items():
        if curation.preferences is not None:
            continue
        if curation.learned is None and (arm.attack != "none" or arm.defence != "none"):
            field = "attack" if arm.attack != "none" else "defence"
            yield (
                f"arms.{name}.{field}: there are no records without a learned reward; add curation.learned, or leave"
                " it out"
            )
        if arm.defence == "group":
            yield (
                f"arms.{name}.defence: group compares raters with their group, and simulated raters are one group; use"
                " influence, or curation.preferences whose records name a group. Figures of two groups are in"
                " docs/curation.md, by `tools/curation_figures.py`"
            )
        elif arm.defence != "none" and spec.monitor is None:
            yield f"arms.{name}.defence: acts from an alarm of the monitor on, and there is none; add `monitor`"
        if arm.curated_weight is not None and generator.job is not None and spec.training.real is None:
            yield f"arms.{name}.curated_weight: there are no real images to mix in; name them in training.real"
    if curation.learned is None and curation.preferences is None and spec.monitor is not None:
        yield "monitor: watches a learned reward, and there is none; add curation.learned, or leave it out"


def _file_problems(spec: LoopSpec) -> Iterator[str]:
    """Problems of files of records with the rest of the job."""
    curation = spec.curation
    if curation.preferences is None:
        if curation.trusted is not None:
            yield "curation.trusted: is compared with preferences, and there are none; add curation.preferences"
        return
    if spec.generator.mixture is not None:
        yield "curation.preferences: people cannot see the samples of a mixture; leave it out, or give `learned`"
    if curation.learned is not None:
        yield "curation.learned: its raters are simulated; leave it out where curation.preferences has real ones"
    if curation.trusted is None and spec.monitor is not None:
        yield "monitor: needs trusted choices; add curation.trusted, or leave it out"
    for name, arm in spec.arms.items():
        if arm.attack != "none":
            yield f"arms.{name}.attack: records of people are not attacked; leave it out"
        if arm.defence != "none" and curation.trusted is None:
            yield f"arms.{name}.defence: needs trusted choices; add curation.trusted"


def _mixes(spec: LoopSpec) -> bool:
    """Whether any arm says how much real data is mixed in."""
    return any(spec.weight_of(arm) is not None for arm in spec.arms)


def _mixture_problems(spec: LoopSpec) -> Iterator[str]:
    given = spec.training.model_fields_set
    for field in sorted(given - {"curated_weight"}):
        remedy = "its first samples are its real data" if field == "real" else "it is refitted, not trained"
        yield f"training.{field}: has no meaning for a mixture: {remedy}; leave it out"
    if spec.measure.real is not None:
        yield "measure.real: a mixture is compared with its first self; leave it out"
    if spec.curation.among != "run":
        yield "curation.among: a mixture is curated over the whole run; leave it out"
    if spec.curation.reward not in MIXTURE_REWARDS:
        yield (
            f"curation.reward: '{spec.curation.reward}' is not a reward of a mixture; use"
            f" {' or '.join(MIXTURE_REWARDS)}" + nearest(spec.curation.reward, list(MIXTURE_REWARDS))
        )
    if spec.curation.learned is not None and spec.curation.learned.model == "network":
        yield "curation.learned.model: a mixture's reward is linear in its features; use linear"
    mixture = spec.generator.mixture
    assert mixture is not None
    if spec.curation.candidates * mixture.samples > 1_000_000:
        yield (
            f"curation.candidates: {spec.curation.candidates} for each of {mixture.samples} samples are more than a"
            " million; use fewer"
        )


def _job_problems(spec: LoopSpec, job: JobSpec) -> Iterator[str]:
    """Problems of the loop with its engine job."""
    for number, request in enumerate(job.requests):
        where = f"generator.job.{job.where(number)}"
        if request.diffusion is not None:
            yield f"{where}.diffusion: the loop retrains models.diffusion alone; leave it out"
        if request.fresh:
            yield f"{where}.fresh: every round has noise of its own; leave it out"
        if request.conditioning is not None:
            yield f"{where}.conditioning: a loop over image embeddings is not supported; use prompts"
        if request.start is not None:
            yield f"{where}.start: real images would come into every round; give them as training.real"
        if request.twin:
            yield f"{where}.twin: a round is trained on samples alone, and nothing reads their twins; leave it out"
    total = _num_planned(job)
    if total is not None and spec.curation.candidates > total:
        yield (
            f"curation.candidates: {spec.curation.candidates} is above the {total} samples of a round; use fewer, or"
            " raise a request's count"
        )
    yield from _reward_problems(spec.curation.reward, job)


def _reward_problems(reward: str, job: JobSpec) -> Iterator[str]:
    """Problems of the name of a reward; whether a function can be imported is checked later."""
    from engine.studies.curate.rewards import reward_names

    if is_factory(reward):
        return
    names = reward_names()
    if reward not in names:
        yield (
            f"curation.reward: '{reward}' is no reward of a run{nearest(reward, names)}; give one of"
            f" {', '.join(names)}, or a function as package.module:function"
        )
        return
    role = BY_NAME[reward].measured_by if reward in BY_NAME else ""
    if role in ("oracle", "judge") and not (job.independent_oracles if role == "oracle" else job.models.judge):
        yield f"curation.reward: '{reward}' is measured by models.{role}, which the job does not name"


def _num_planned(job: JobSpec) -> int | None:
    """Samples of a round, where the file tells: `classes: all` depends on the target."""
    total = 0
    for request in job.requests:
        if request.classes == "all":
            return None
        cells = 1 if request.boundary is not None else len(request.classes or ())
        total += request.num_wanted * cells
    return total


def run_name(spec: LoopSpec, arm: str, seed: int, number: int) -> str:
    """The name of a round's run, which its keys begin with: unique over the loop."""
    return f"{spec.name}-{arm}-s{seed}-r{number}"


@contextlib.contextmanager
def renamed(fields: Mapping[str, str]) -> Iterator[None]:
    """Name fields of the job in problems that name options of a command."""
    try:
        yield
    except JobError as error:
        options = re.compile(rf"(?<![\w-])({'|'.join(fields)})(?![\w-])")
        lines = [options.sub(lambda match: fields[match[1]], line) for line in error.problems]
        raise type(error)(lines) from error
