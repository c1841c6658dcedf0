"""Checks before a run: hardware of this machine and of others, and the description of models."""

from __future__ import annotations

import contextlib

import pytest

from engine.driver import checks
from engine.driver.checks import check_hardware, check_job, describe_models
from engine.errors import JobError, RiskforgeError
from engine.job.spec import RuntimeSpec
from engine.models.licences import licence_of
from tests.sleepy import Recorder, make_job


@pytest.mark.parametrize("has_gpu", [False, True])
@pytest.mark.parametrize("is_local", [False, True])
def test_a_gpu_is_required_of_this_machine_alone(monkeypatch, tmp_path, has_gpu, is_local):
    """The nodes of a cluster may have one that this machine lacks."""
    monkeypatch.setattr(checks, "GPU_DEVICES", ("null" if has_gpu else "no-such-device",))
    job = make_job(tmp_path, 1).model_copy(update={"runtime": RuntimeSpec(device="cuda")})
    if has_gpu or not is_local:
        check_hardware(job, is_local=is_local)
        return
    with pytest.raises(JobError, match=r"^runtime\.device: 'cuda'"):
        check_hardware(job, is_local=is_local)


def test_workers_are_prepared_before_models_are_hashed(monkeypatch, tmp_path):
    """A cluster starts in the background meanwhile; not for a run that is complete, nor for a job that is wrong."""
    calls = []
    digests = checks.model_digests
    monkeypatch.setattr(checks, "model_digests", lambda job: calls.append("digests") or digests(job))

    def check(job) -> None:
        calls.clear()
        check_job(job, Recorder(), lambda: calls.append("prepare"))

    job = make_job(tmp_path / "run", 1)
    check(job)
    assert calls == ["prepare", "digests"]
    (tmp_path / "run").mkdir()
    (tmp_path / "run/_SUCCESS").write_text("{}")
    with contextlib.suppress(RiskforgeError):
        check(job)
    assert "prepare" not in calls
    with pytest.raises(JobError, match="nobody"):
        check(make_job(tmp_path / "other", 1, request={"classes": ["nobody"]}))
    assert calls == []


def test_a_checked_job_has_the_absolute_address_of_its_output(monkeypatch, tmp_path):
    """Workers have another working folder."""
    monkeypatch.chdir(tmp_path)
    checked = check_job(make_job("run", 1), Recorder(), lambda: None)
    assert checked.job.output.uri == checked.store.uri == str(tmp_path / "run")
    assert checked.plan.num_samples == 10


def test_models_are_described_by_role(tmp_path):
    """Address, digest and licence; the target with its labels, optional roles only where the job has them."""
    job = make_job(tmp_path, 1, transfer=["zoo:digits/classifier-b"], oracle="zoo:digits/oracle")
    digests = {"diffusion": {"d": "1"}, "clip": "2", "target": "3", "transfer": ["4"], "oracle": "5", "methods": {}}
    described = describe_models(job, digests, ["zero", "one"])
    names = {role: value if isinstance(value, list) else [value] for role, value in described.items()}
    assert {role: [model["digest"] for model in models] for role, models in names.items()} == {
        "diffusion": ["1"], "clip": ["2"], "target": ["3"], "transfer": ["4"], "oracle": ["5"]
    }  # fmt: skip
    assert described["target"]["labels"] == ["zero", "one"] and "labels" not in described["oracle"]
    assert described["transfer"][0]["address"] == "zoo:digits/classifier-b"
    assert described["target"]["license"] == licence_of("zoo:digits/classifier") != ""


def test_conditioning_and_methods_are_described_without_a_licence(tmp_path):
    """They are files of the user's."""
    roles = {"conditioning": {"artefact": "6"}, "methods": {"mine:make": "7"}}
    models = {"diffusion": {}, "clip": "", "target": "", "transfer": []}
    described = describe_models(make_job(tmp_path, 1), models | roles, [])
    assert described["conditioning"] == [{"address": "artefact", "digest": "6"}]
    assert described["methods"] == [{"address": "mine:make", "digest": "7"}]
