"""Presets of guidance: which values a job gets, what old jobs mean, and where samples end with either of them."""

from __future__ import annotations

import itertools
import json
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from engine.data.images import decode_rgb
from engine.errors import JobError
from engine.generation.generator import Generator
from engine.job.parsing import parse_job
from engine.job.plan import build_plan
from engine.job.spec import JobSpec
from engine.methods.boundary.spec import BoundaryGuidanceSpec
from engine.methods.presets import PresetParameters
from engine.methods.risky.spec import RiskyGuidanceSpec
from engine.methods.scores import kldb
from engine.models.classifier import Classifier
from engine.models.digests import model_digests
from engine.models.labels import read_labels
from tests.conftest import REPOSITORY
from tests.test_schedulers import digest_of_job

ZOO = "zoo:digits/"
MODELS = {"diffusion": f"{ZOO}stable-diffusion", "clip": f"{ZOO}clip", "target": f"{ZOO}classifier"}
BETWEEN = {"name": "between", "method": "boundary", "boundary": ["four", "nine"], "count": 8}
RISKY = {"name": "risky", "method": "risky", "classes": ["three"], "count": 8}
# Sections of `guidance` as jobs stored them before there were presets, with the defaults of that time.
OLD: dict[str, dict[str, Any]] = {
    "boundary": {
        "step": "polyak", "alpha": None, "cap": 0.1, "every": 5, "gradient": "detached", "skip_last": True,
    },
    "risky": {
        "step": "polyak", "scale": 10.0, "conformity_weight": 1e-4, "conformity": "cosine", "target_risk": 1.5,
        "tolerance": 0.1, "conformity_floor": None, "cap": 0.1, "every": 1, "gradient_range": 1.0, "skip_last": True,
    },
}  # fmt: skip
OLD["custom"] = OLD["boundary"] | {"parameters": {}}


def job_of(guidance: dict[str, Any] | None = None, *overrides: dict[str, Any], **changes: Any) -> JobSpec:
    """A job with a request of each method for each override of `guidance`, or without one."""
    requests = [
        request | {"name": f"{request['name']}-{number}", "guidance": override}
        for number, override in enumerate(overrides or ({},))
        for request in (BETWEEN, RISKY)
    ]
    output = {"uri": "runs/presets", "samples_per_shard": 4}
    raw = {"name": "presets", "models": MODELS, "requests": requests, "guidance": guidance or {}, "output": output}
    return parse_job(raw | changes)


def parameters(job: JobSpec, number: int) -> dict[str, Any]:
    """All values of a request, whether they are stored or not."""
    spec = job.parameters_of(job.requests[number])
    return {name: getattr(spec, name) for name in type(spec).model_fields}


def guided_steps(spec: PresetParameters, total: int) -> list[int]:
    return [index for index in range(1, total + 1) if spec.is_guided(index, total)]


PERCEPTIBLE = {"every": 3, "counted_from": "end", "skip_last": False}
ADVERSARIAL = {"counted_from": "start", "skip_last": True, "gradient": "detached"}


@pytest.mark.parametrize(
    ("spec", "every", "gradient"), [(BoundaryGuidanceSpec, 5, "combined"), (RiskyGuidanceSpec, 1, "unet")]
)
def test_a_preset_gives_the_values_that_are_not_named(spec: type[PresetParameters], every: int, gradient: str) -> None:
    """A named field overrides; the schema's defaults are those of the default preset."""
    perceptible = PERCEPTIBLE | {"gradient": gradient}
    for named, expected in (
        ({}, perceptible),
        ({"preset": "perceptible"}, perceptible),
        ({"preset": "adversarial"}, ADVERSARIAL | {"every": every}),
        ({"preset": "adversarial", "every": 2, "skip_last": False}, ADVERSARIAL | {"every": 2, "skip_last": False}),
        ({"every": 5, "cap": 0.2}, perceptible | {"every": 5, "cap": 0.2}),
        ({"preset": "perceptible", "gradient": "detached"}, perceptible | {"gradient": "detached"}),
    ):
        given = spec.model_validate(named)
        assert {name: getattr(given, name) for name in expected} == expected, named
    assert {name: spec.model_fields[name].default for name in perceptible} == perceptible


@pytest.mark.parametrize(
    ("method", "named"),
    [
        *(("boundary", {"step": step}) for step in ("norm", "paper")),
        *(("boundary", {"gradient": gradient}) for gradient in ("detached", "unet")),
        *(
            ("custom", {"gradient": "unet", "every": 2}),
            ("risky", {"step": "paper"}),
            ("risky", {"gradient": "detached"}),
        ),
    ],
)
def test_values_that_perceptible_guidance_never_has_choose_the_other_preset(method: str, named: dict[str, Any]) -> None:
    """A paper's recipe is the paper's whole; `every` alone, or a step that both have, chooses nothing."""
    spec = type(getattr(job_of().guidance, method))
    assert spec.model_validate(named) == spec.model_validate({"preset": "adversarial"} | named)
    for neutral in ({"every": 5}, {"step": "polyak"}, {"skip_last": True}, {"cap": 0.2, "gradient": "combined"}):
        assert spec.model_validate(neutral).preset == "perceptible"


def test_a_preset_that_there_is_not_is_refused() -> None:
    """With the field, the value and those that there are; in a request with its place. Nothing else is said."""
    for place, made in (
        ("guidance.risky.preset", lambda value: job_of({"risky": {"preset": value}})),
        ("requests.1.guidance.risky.preset", lambda value: job_of({}, {"risky": {"preset": value}})),
    ):
        for value in ("perceptibel", None, 3, ["adversarial"]):
            with pytest.raises(JobError) as refused:
                made(value)
            lines = [line for line in refused.value.problems if line.startswith(place)]
            assert len(lines) == 1 and "is not one of perceptible, adversarial" in lines[0], refused.value


# Steps of preset `perceptible`, and of both other presets, by the number of steps.
SCHEDULES = {
    1: ([1], [], []),
    2: ([2], [], [1]),
    7: ([1, 4, 7], [5], [1, 2, 3, 4, 5, 6]),
    40: (list(range(1, 41, 3)), list(range(5, 36, 5)), list(range(1, 40))),
}


@pytest.mark.parametrize("total", SCHEDULES)
def test_steps_are_counted_back_from_the_last_one(total: int) -> None:
    """However many there are, the last is guided; of a sampling from a start those that are left of the same ones."""
    specs = (BoundaryGuidanceSpec(), *(one(preset="adversarial") for one in (BoundaryGuidanceSpec, RiskyGuidanceSpec)))
    assert tuple(guided_steps(spec, total) for spec in specs) == SCHEDULES[total]
    assert guided_steps(RiskyGuidanceSpec(), total) == SCHEDULES[total][0]
    assert guided_steps(BoundaryGuidanceSpec(skip_last=True), total) == SCHEDULES[total][0][:-1]
    assert total == 1 or total in guided_steps(RiskyGuidanceSpec(gradient_range=1 / total), total)
    through = [index for index in SCHEDULES[total][0] if BoundaryGuidanceSpec().is_through_unet(index, total)]
    assert through == SCHEDULES[total][0][:-1]


def test_a_short_way_from_a_start_is_guided() -> None:
    """One step of forty is taken: the last, which preset `adversarial` leaves alone, and says so."""
    start = {"start": {"images": "digits:test", "strength": 0.025}}
    requests, sampling = [RISKY | start], {"num_inference_steps": 40}
    job = job_of(requests=requests, sampling=sampling)
    (taken,) = job.requests[0].steps_taken(40)
    assert taken == 40 and job.parameters_of(job.requests[0]).is_guided(taken, 40)
    with pytest.raises(JobError, match=r"requests.0.guidance.risky: leaves all steps .* set `skip_last: false`"):
        job_of({"risky": {"preset": "adversarial"}}, requests=requests, sampling=sampling)
    # As a plan says it; to leave the last one out is a choice, which may leave nothing.
    with pytest.raises(JobError, match=r"leaves none of 3 steps guided; lower `every` or add steps"):
        job_of({"boundary": {"skip_last": True}, "risky": {}}, sampling={"num_inference_steps": 3})


def test_a_request_may_choose_the_other_preset() -> None:
    """In both directions: values of the job's own preset make way, others that the job names stay, and the request's
    own come first."""
    other, same, through = (
        {"boundary": one, "risky": {key: value for key, value in one.items() if key != "gradient" or value != "unet"}}
        for one in ({"preset": "adversarial"}, {"every": 2}, {"gradient": "unet"})
    )
    job = job_of({"boundary": {"cap": 0.2}, "risky": {"target_risk": 2.0}}, other, same, through)
    assert parameters(job, 0) == parameters(job_of({"boundary": {"preset": "adversarial", "cap": 0.2}}), 0)
    assert parameters(job, 1) == parameters(job_of({"risky": {"preset": "adversarial", "target_risk": 2.0}}), 1)
    assert parameters(job, 2).items() >= (PERCEPTIBLE | {"every": 2, "cap": 0.2}).items()
    assert parameters(job, 4).items() >= (ADVERSARIAL | {"every": 5, "cap": 0.2, "gradient": "unet"}).items()
    back, named = {"boundary": {"preset": "perceptible"}}, {"boundary": {"preset": "perceptible", "every": 4}}
    job = job_of({"boundary": {"preset": "adversarial", "cap": 0.2, "alpha": 0.5}}, back, named)
    assert parameters(job, 0).items() >= (PERCEPTIBLE | {"cap": 0.2, "alpha": 0.5}).items()
    assert parameters(job, 2).items() >= (PERCEPTIBLE | {"every": 4, "cap": 0.2}).items()
    # What differs from the job's own preset was meant, whichever preset a request takes.
    for base, override in (("adversarial", "perceptible"), ("perceptible", "adversarial")):
        job = job_of({"boundary": {"preset": base, "every": 2}}, {"boundary": {"preset": override}})
        assert (parameters(job, 0)["every"], parameters(job, 0)["preset"]) == (2, override)


def test_checks_of_a_job_see_the_values_that_its_run_gets() -> None:
    """A request's preset decides the schedule that is checked, with two steps, of which only one has any."""
    few = {"sampling": {"num_inference_steps": 2}}
    old, new = ({"boundary": {"preset": preset}} for preset in ("adversarial", "perceptible"))
    job = job_of(old, new, **few)
    assert guided_steps(job.parameters_of(job.requests[0]), 2) == [2]
    with pytest.raises(JobError, match=r"requests.0.guidance.boundary: leaves none of 2 steps guided"):
        job_of(new, old, **few)


def test_jobs_of_before_there_were_presets_are_what_they_were() -> None:
    """As plans stored them, and as manifests do, without what is null: read as `adversarial`, and stored alike."""
    for nulls in (True, False):
        stored = {
            method: {key: value for key, value in fields.items() if nulls or value is not None}
            for method, fields in OLD.items()
        }
        job = job_of(stored, {}, {"boundary": {"every": 2}, "risky": {"target_risk": 0.7}})
        guidance = job.model_dump(mode="json", exclude_none=not nulls)["guidance"]
        assert guidance == stored
        assert parameters(job, 0).items() >= (OLD["boundary"] | ADVERSARIAL | {"preset": "adversarial"}).items()
        assert parameters(job, 1).items() >= (OLD["risky"] | ADVERSARIAL | {"preset": "adversarial"}).items()
        assert parameters(job, 2).items() >= (ADVERSARIAL | {"every": 2}).items()
        assert parameters(job, 3).items() >= (ADVERSARIAL | {"every": 1, "target_risk": 0.7}).items()
        identities = [job.parameters_of(request).identity() for request in job.requests[:2]]
        assert identities == [OLD["boundary"], OLD["risky"]]
    # Through the UNet, which was a choice at that time.
    unet = job_of({"boundary": OLD["boundary"] | {"gradient": "unet"}})
    assert unet.model_dump()["guidance"]["boundary"] == OLD["boundary"] | {"gradient": "unet"}
    # Of a job that chooses both, or none, every value is stored.
    stored = job_of().model_dump(mode="json")["guidance"]["boundary"]
    assert stored.items() >= (PERCEPTIBLE | {"preset": "perceptible"}).items()
    assert job_of(job_of().model_dump(mode="json", exclude_none=True)["guidance"]) == job_of()


@pytest.mark.parametrize("spec", [BoundaryGuidanceSpec, RiskyGuidanceSpec])
def test_every_mixture_is_read_as_it_was_stored(spec: type[PresetParameters]) -> None:
    """With what is null and without; the identity of a plan has the values, whichever preset gave them."""
    choices = {"every": (1, 3, 5), "counted_from": ("start", "end"), "gradient": ("combined", "detached")}
    identities: dict[str, set[str]] = {}
    for values in itertools.product(*choices.values(), (True, False)):
        fields = dict(zip((*choices, "skip_last"), values, strict=True)) | {"tolerance": 0.1}
        for preset in ("perceptible", "adversarial"):
            given = spec.model_validate({"preset": preset} | fields)
            for nulls in (True, False):
                assert spec.model_validate(given.model_dump(mode="json", exclude_none=not nulls)) == given
            identities.setdefault(str(values), set()).add(json.dumps(given.identity(), sort_keys=True))
    assert all(len(same) == 1 for same in identities.values())
    assert len(set().union(*identities.values())) == len(identities) == 24


def test_the_old_default_keeps_its_plan() -> None:
    """The digest of the quickstart's plan from before there were presets, as it was stored and as it is named now."""
    raw = yaml.safe_load((REPOSITORY / "jobs" / "quickstart.yaml").read_text())
    for boundary in (
        OLD["boundary"],
        {"preset": "adversarial"},
        {"preset": "adversarial", "step": "polyak", "every": 5},
    ):
        assert digest_of_job(raw | {"guidance": {"boundary": boundary}}) == "9e9b63501579ba389df5980eb4bee8df"
    assert digest_of_job(raw) != "9e9b63501579ba389df5980eb4bee8df"
    assert digest_of_job(raw) == digest_of_job(raw | {"guidance": {}})


def test_an_unfinished_run_of_the_old_default_goes_on(tmp_path: Path, call: Any) -> None:
    """It is refused with the line that continues it, to the bytes of a run that nothing interrupted; a change of
    anything else is refused without that line."""
    guidance = {"boundary": {"cap": 0.2}, "risky": {"every": 3}}
    job = job_of(guidance, sampling={"num_inference_steps": 6, "guidance_scale": 2.0}).model_dump(mode="json")
    # As a user names them: what is not named takes the preset's value.
    path, whole, part = tmp_path / "job.yaml", tmp_path / "whole", tmp_path / "part"
    path.write_text(yaml.safe_dump(job | {"guidance": guidance}))
    old = ["--set", "guidance.boundary.preset=adversarial", "--set", "guidance.risky.preset=adversarial"]
    assert call("run", path, "--executor", "local", "--output", whole, *old)[0] == 0
    plan = json.loads((whole / "_state/plan/000000.json").read_text())
    assert plan["job"]["guidance"] == OLD | {
        "boundary": OLD["boundary"] | {"cap": 0.2},
        "risky": OLD["risky"] | {"every": 3},
        "custom": plan["job"]["guidance"]["custom"],
    }
    shutil.copytree(whole, part)
    for file in [part / "_SUCCESS", *part.rglob("*000003*")]:
        file.unlink()
    code, _, error = call("run", path, "--executor", "local", "--output", part)
    (line,) = [line.removeprefix("error:") for line in error.splitlines() if "riskforge run JOB" in line]
    assert code != 0 and "requests.0.guidance.every: 5 -> 3" in error and "default of guidance changed" in error
    for other in (["--set", "seed=1"], ["--set", "guidance.boundary.cap=0.3"], [*old, "--set", "seed=1"]):
        assert "riskforge run JOB" not in call("run", path, "--output", part, *other)[2]
    program, command, name, *options = shlex.split(line)
    assert (program, command, name) == ("riskforge", "run", "JOB") and options == old
    assert call(command, path, "--executor", "local", "--output", part, *options)[0] == 0
    tars = [sorted(folder.glob("shards/*.tar")) for folder in (whole, part)]
    assert len(tars[0]) == 4 and [one.read_bytes() for one in tars[0]] == [one.read_bytes() for one in tars[1]]


NUM_SAMPLES, NUM_STEPS = 16, 25
TARGET_RISK = 2.0


@pytest.fixture(scope="module")
def made() -> Iterator[dict[str, tuple[np.ndarray, np.ndarray]]]:
    """By request: risk of the target, and KLDB between four and nine of a classifier that guided nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    old = {"boundary": {"preset": "adversarial"}, "risky": {"preset": "adversarial"}}
    both = {"count": NUM_SAMPLES, "seed_group": "same"}
    requests = [
        BETWEEN | both | {"name": "plain", "method": "prompt"},
        BETWEEN | both | {"name": "perceptible"},
        BETWEEN | both | {"name": "adversarial", "guidance": old},
        RISKY | both,
    ]
    guidance = {"risky": {"target_risk": TARGET_RISK}}
    sampling = {"num_inference_steps": NUM_STEPS, "guidance_scale": 3.0}
    output = {"uri": "runs/presets", "samples_per_shard": NUM_SAMPLES}
    job = job_of(guidance, requests=requests, sampling=sampling, output=output)
    plan = build_plan(job, read_labels(job.models.target), model_digests(job))
    generator, other = Generator(job, plan), Classifier.load(f"{ZOO}classifier-b")
    found = {}
    for request in plan.requests:
        specs = list(plan.samples(plan.shard(request.number)))
        results = [result for batch in generator.batches(request.number, specs) for result in batch.results]
        distance = kldb(other.score([decode_rgb(one.image) for one in results]), (4, 9)).double().numpy()
        found[request.spec.name] = np.array([one.record["risk"] for one in results]), distance
    yield found
    torch.set_num_threads(threads)


def test_most_samples_arrive_at_the_risk_that_they_are_guided_to(made: Any) -> None:
    """Within 0.2 nats: the last step corrects what the steps before it left."""
    risks, _ = made["risky"]
    assert len(risks) == NUM_SAMPLES and (abs(risks - TARGET_RISK) <= 0.2).mean() >= 0.8


def test_a_classifier_that_guided_nothing_sees_the_boundary_too(made: Any) -> None:
    """Its median KLDB falls by more than half; with adversarial guidance, which the target alone sees, by less."""
    plain, perceptible, adversarial = (
        float(np.median(made[name][1])) for name in ("plain", "perceptible", "adversarial")
    )
    assert perceptible < 0.5 * plain < adversarial
