"""What a run stores of its job is what every command reads: nothing that validates is refused when it is read again."""

from __future__ import annotations

import copy
import datetime
import json
import re
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml
from hypothesis import given, seed, settings
from pydantic import BaseModel

from engine.commands.jobfile import dated
from engine.data.run.file_names import MANIFEST
from engine.data.run.resume import open_output
from engine.data.run.stored_plan import read_run, stored_plan
from engine.data.stores.opening import open_store
from engine.errors import JobError
from engine.job.parsing import parse_job
from engine.job.plan import build_plan
from engine.job.spec import JobSpec
from engine.studies.samples import _identity, open_study
from tests.conftest import REPOSITORY
from tests.job_cases import ENGINE_JOBS, LABELS, raw_jobs

MAX_ROUNDS = 8
TODAY = datetime.date(2026, 11, 29)


# Models that a job may leave out.
OPTIONAL = ("judge", "guidance_decoder", "further_targets", "vae", "adapters")


def digests_of(job: JobSpec) -> dict[str, Any]:
    """Digests such as models, artefacts and methods of a job have."""
    sources = [one.artefact or one.images for request in job.requests if (one := request.conditioning)]
    diffusion = {job.models.diffusion, *(one.diffusion for one in job.requests if one.diffusion)}
    return {
        "diffusion": dict.fromkeys(sorted(diffusion), "d"),
        "clip": "c",
        "target": "t",
        "transfer": ["x" for _ in job.models.transfer],
        "oracle": "o" if job.models.oracle else "",
        "conditioning": dict.fromkeys(sources, "e"),
        "starts": {one.images: "s" for request in job.requests if (one := request.start)},
        "methods": {one.method: "m" for one in job.requests if one.method_record.is_user_code},
    } | {name: name for name in OPTIONAL if getattr(job.models, name)}


def plan_of(job: JobSpec):
    return build_plan(job, LABELS, digests_of(job))


def check_stored(raw: dict[str, Any], folder: Path) -> JobSpec:
    """Begin a run of a job, then read it as `run`, `status`, `verify`, `rescore`, `retrain` and `evaluate` do."""
    raw = copy.deepcopy(raw) | {"output": raw["output"] | {"uri": str(folder)}}
    # A stored job has a request for each strength, and nothing of the places in its file.
    job = parse_job(dated(parse_job(raw), TODAY).model_dump(mode="json"))
    store, plan = open_store(str(folder)), plan_of(job)
    open_output(store, plan, job, "auto", confirmed=False)

    stored = read_run(store)
    again, read_plan = stored_plan(store)
    # But for the places in its file, which a stored job does not have.
    job = parse_job(job.model_dump(mode="json"))
    assert again == job and stored.digest == read_plan.digest == plan.digest
    # `retry` begins with what is stored, `run` with the file: to both it is the same run, which need not grow.
    for one in (again, dated(parse_job(raw), TODAY + datetime.timedelta(days=1))):
        assert open_output(store, plan_of(one), one, "auto", confirmed=False).stages == plan.stages
    assert len(store.list("_state/plan")) == 1
    # `exclude_none` is how manifests have it.
    for fields in (job.model_dump(mode="json"), job.model_dump(mode="json", exclude_none=True)):
        fields = json.loads(json.dumps(fields, allow_nan=False))
        assert parse_job(fields) == job and plan_of(parse_job(fields)).digest == plan.digest
        manifest = {"job": fields, "plan_digest": plan.digest, "models": {"target": {"digest": "t"}}}
        store.replace(MANIFEST, json.dumps(manifest).encode())
        assert _identity(store) == (job, plan.digest, "t", None)
    return job


def values_of(spec: BaseModel) -> set[str]:
    """Fields, by class, that are not at their default."""
    found: set[str] = set()
    for name, field in type(spec).model_fields.items():
        value = getattr(spec, name)
        if field.is_required() or value != field.get_default(call_default_factory=True):
            found.add(f"{type(spec).__name__}.{name}")
        for inner in value if isinstance(value, tuple) else (value,):
            found |= values_of(inner) if isinstance(inner, BaseModel) else set()
    return found


def fields_of(spec: type[BaseModel]) -> set[str]:
    """All fields below a class."""
    import typing

    found: set[str] = set()
    waiting: list[Any] = [spec]
    while waiting:
        one = waiting.pop()
        if isinstance(one, type) and issubclass(one, BaseModel):
            found |= {f"{one.__name__}.{name}" for name in one.model_fields}
            waiting += [field.annotation for field in one.model_fields.values()]
        else:
            waiting += typing.get_args(one)
    return found


@pytest.mark.slow
def test_jobs_of_the_whole_schema_are_read_as_they_were_stored():
    """Every field that a job can have, in every combination that validates; the defaults written out now and then.

    What a test of one field does not see: a check that asks whether a field was given, not what it says.
    """
    seen: set[str] = set()

    def check(raw):
        with tempfile.TemporaryDirectory() as folder:
            seen.update(values_of(check_stored(raw, Path(folder) / "run")))

    # Which fields come up is luck: drawn until each did.
    for number in range(MAX_ROUNDS):
        if not number or fields_of(JobSpec) - seen:
            seed(number)(settings(max_examples=200)(given(raw_jobs())(check)))()
    assert fields_of(JobSpec) - seen == set()


def job_blocks() -> list[Any]:
    """The whole jobs in README and the pages of the documentation, and those of the repository."""
    pages = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
    found = [pytest.param(yaml.safe_load(path.read_text()), id=path.stem) for path in ENGINE_JOBS]
    for page in pages:
        for block in re.findall(r"```yaml\n(.*?)```", page.read_text(), re.DOTALL):
            try:
                raw = yaml.safe_load(block)
                parse_job(raw)
            except (yaml.YAMLError, JobError):
                continue
            found.append(pytest.param(raw, id=f"{page.stem}-{raw['name']}"))
    return found


@pytest.mark.parametrize("raw", job_blocks())
def test_every_job_of_the_repository_is_read_as_it_was_stored(raw, tmp_path):
    """As it is in its file or page, and as it is with each request's screening switched off."""
    raw = copy.deepcopy(raw)
    raw["models"]["target"] = "zoo:digits/classifier"
    for request in raw["requests"]:
        for name in ("classes", "boundary"):
            if isinstance(request.get(name), list):
                request[name] = [number for number, _ in enumerate(request[name])]
    check_stored(raw, tmp_path / "as-it-is")
    for request in raw["requests"]:
        if request.get("conditioning"):
            request["conditioning"] = {"artefact": "zoo:digits/conditioning", "screening": False}
    check_stored(raw, tmp_path / "unscreened")


def test_a_job_that_was_stored_with_its_defaults_written_out_is_read(tmp_path):
    """As earlier versions stored it: what steers screening stands there, though nothing is screened."""
    old = {
        "name": "old",
        "seed": 7,
        "models": {
            "diffusion": "zoo:digits/unclip", "clip": "zoo:digits/clip", "target": "zoo:digits/classifier",
            "transfer": [], "oracle": None, "judge": None, "guidance_decoder": None, "safety_checker": "auto",
        },
        "requests": [
            {
                "name": name, "method": "prompt", "classes": ["three"], "boundary": None, "count": 2, "contexts": [""],
                "prompt": None, "accept": {}, "max_attempts": None, "seed_group": None, "fresh": False,
                "diffusion": None, "conditioning": source | {
                    "screening": False, "threshold": 0.5, "max_draws": 256, "noise_level": 0,
                },
                "sampling": {}, "guidance": {},
            }
            for name, source in (
                ("drawn", {"artefact": "zoo:digits/conditioning", "images": None}),
                ("given", {"artefact": None, "images": "digits:test"}),
            )
        ],
        "output": {
            "uri": "elsewhere", "samples_per_shard": 4, "image_format": "png", "store_rejected": False,
            "provenance": True,
        },
    }  # fmt: skip
    store, job = open_store(str(tmp_path / "run")), parse_job(old)
    plan = plan_of(job)
    open_output(store, plan, job, "auto", confirmed=False)
    [name] = store.list("_state/plan")
    file = json.loads(store.read(name)) | {"job": old}
    store.replace(name, json.dumps(file).encode())
    again, read_plan = stored_plan(store)
    assert again.requests == job.requests and read_plan.digest == plan.digest


@pytest.fixture(scope="module")
def unscreened(tmp_path_factory):
    """A run of two requests without screening: one draws from an artefact, the other varies given images."""
    from engine.driver.executors.local import LocalExecutor
    from engine.driver.run import run_job
    from tests.sleepy import Recorder

    job = {
        "name": "unscreened",
        "models": {
            "diffusion": "zoo:digits/stable-unclip", "clip": "zoo:digits/clip", "target": "zoo:digits/classifier",
        },
        "sampling": {"num_inference_steps": 2},
        "requests": [
            {"name": name, "method": "prompt", "classes": ["three"], "count": 2, "conditioning": source}
            for name, source in (
                ("drawn", {"artefact": "zoo:digits/conditioning", "screening": False}),
                ("given", {"images": "digits:test"}),
            )
        ],
        "output": {"uri": str(tmp_path_factory.mktemp("runs") / "unscreened")},
    }  # fmt: skip
    options = {"resume": "auto", "confirmed": False, "display": Recorder()}
    assert run_job(parse_job(job), executor=LocalExecutor(1), **options).exit_code == 0
    return Path(job["output"]["uri"])


def test_a_finished_run_without_screening_passes_every_command(unscreened, call, tmp_path):
    """What the run stored is read by all that read runs, down to scores that are computed again."""
    assert call("verify", unscreened, "--deep")[0] == 0
    code, out, _ = call("status", unscreened, "--json")
    assert code == 0 and json.loads(out)["state"] == "complete"
    code, _, error = call("rescore", unscreened, "--target", "zoo:digits/classifier-b")
    assert code == 0, error
    # What `retrain` and `evaluate` open a run with.
    assert [one.name for one in open_study(str(unscreened)).job.requests] == ["drawn", "given"]
    for command in (("inspect",), ("report",), ("repair",), ("retry", "--executor", "local", "--workers", 2)):
        assert call(command[0], unscreened, *command[1:])[0] == 0, command
    code, _, error = call("retry", unscreened, "--workers", 0)
    assert code == 2 and "runtime.workers: 0 is below 1" in error
    assert call("export", unscreened, "--output", tmp_path / "export")[0] == 0
    assert pyarrow.parquet.read_metadata(unscreened / "metadata.parquet").num_rows == 4
