"""Night after night: outputs with a date, a panel that stays, requests that are fresh, files that say what they are."""

from __future__ import annotations

import datetime
import io
import json
from pathlib import Path

import PIL.Image
import pytest
import yaml

from engine.commands.jobfile import dated, read_job
from engine.data.images.encoding import DIGITAL_SOURCE_TYPE
from engine.data.run.resume import as_begun, open_output
from engine.data.run.shards import read_shard
from engine.data.run.stored_plan import read_run, stored_plan
from engine.data.stores.opening import open_store
from engine.errors import JobError, OutputError
from engine.job.parsing import parse_job
from engine.job.plan import build_plan
from engine.job.spec import JobSpec
from engine.models.licences import licence_of
from tests.composed import composed_job, make_run
from tests.conftest import REPOSITORY
from tests.run_cases import DIGESTS, LABELS, make_job, make_plan

MONDAY, TUESDAY = datetime.date(2026, 11, 30), datetime.date(2026, 12, 1)


def night_job(uri: str, **fresh: object) -> JobSpec:
    """A panel and a request that may be fresh."""
    requests = [
        {"name": "panel", "method": "prompt", "classes": "all", "count": 2},
        {"name": "tonight", "method": "prompt", "classes": "all", "count": 2} | fresh,
    ]
    return make_job(Path("unused"), requests=requests, output={"uri": uri, "samples_per_shard": 4})


def seeds(job: JobSpec) -> list[list[int]]:
    plan = build_plan(job, LABELS, DIGESTS)
    return [[request.sample(position).seed for position in range(request.total)] for request in plan.requests]


def test_the_date_of_an_output_is_filled_in_once():
    """`{date}` and `{job}`, wherever they stand; the plan's output is the resolved one; others are refused."""
    job = dated(night_job("runs/{job}-{date}/{date}"), MONDAY)
    assert job.output.uri == "runs/demo-2026-11-30/2026-11-30" and dated(job, TUESDAY) == job
    with pytest.raises(JobError, match=r"output\.uri: .* unknown placeholder \{dat\}; use \{date\} or \{job\}"):
        dated(night_job("runs/{dat}"), MONDAY)
    with pytest.raises(JobError, match=r"unknown placeholder \{\}"):
        dated(night_job("runs/{}"), MONDAY)


def test_a_job_file_is_dated_when_it_is_read(tmp_path):
    """Today, in local time; the option of the command line has placeholders, too."""
    raw = night_job("runs/{date}", fresh=True).model_dump(mode="json", exclude_none=True)
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(raw))
    days = {datetime.date.today().isoformat()}
    job = read_job(path, [("output.uri", f"{tmp_path}/night-{{date}}")])
    days.add(datetime.date.today().isoformat())
    assert job.output.uri.removeprefix(f"{tmp_path}/night-") == job.requests[1].fresh and job.requests[1].fresh in days


def test_the_date_of_a_night_can_be_given(tmp_path, call):
    """Two nights on one day: folder and fresh seeds are of the date given; a run of another date is refused."""
    raw = night_job(f"{tmp_path}/night-{{date}}", fresh=True).model_dump(mode="json", exclude_none=True)
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(raw))
    jobs = [read_job(path, [], date=day) for day in (MONDAY, TUESDAY)]
    assert [job.output.uri for job in jobs] == [f"{tmp_path}/night-{day}" for day in (MONDAY, TUESDAY)]
    assert [job.requests[1].fresh for job in jobs] == [str(MONDAY), str(TUESDAY)]
    code, out, err = call("plan", str(REPOSITORY / "jobs/nightly-stress.yaml"), "--date", "2026-11-22")
    assert code == 0 and "output: runs/nightly-2026-11-22\n" in out, err
    for text, reason in (("20261122", "write it as YEAR-MONTH-DAY"), ("2026-02-30", "is not on the calendar")):
        code, _, err = call("plan", str(path), "--date", text)
        assert code == 2 and f"--date {text!r}" in err and reason in err
    fixed = read_job(path, [("output.uri", str(tmp_path / "fixed"))], date=MONDAY)
    open_output(open_store(fixed.output.uri), build_plan(fixed, LABELS, DIGESTS), fixed, "auto", False)
    later = read_job(path, [("output.uri", str(tmp_path / "fixed"))], date=TUESDAY)
    assert later.requests[1].fresh == str(TUESDAY), "as given, whatever the run in the output began with"
    assert read_job(path, [("output.uri", str(tmp_path / "fixed"))]).requests[1].fresh == str(MONDAY)
    with pytest.raises(JobError, match="--date 2026-11-30: nothing in the job depends on the date"):
        read_job(path, [("output.uri", "x"), ("requests.1.fresh", False)], date=MONDAY)


def test_a_date_must_be_on_the_calendar():
    """As text; a bare one is YAML's own date, which knows the calendar."""
    with pytest.raises(JobError, match=r"fresh.*'2026-99-99' is not on the calendar; give a date such as 2026-11-21"):
        night_job("runs/x", fresh="2026-99-99")


def test_fresh_seeds_change_every_night_and_the_panel_does_not():
    """Another date, another noise; without `fresh` the seeds are what they always were."""
    plain = seeds(night_job("runs/x"))
    monday, tuesday = (seeds(dated(night_job("runs/x", fresh=True), day)) for day in (MONDAY, TUESDAY))
    assert monday[0] == tuesday[0] == plain[0]
    assert not set(monday[1]) & set(tuesday[1]) and not set(monday[1]) & set(plain[1])
    assert seeds(night_job("runs/x", fresh="2026-11-30")) == monday
    assert seeds(parse_job(yaml.safe_load(yaml.safe_dump(night_job("x").model_dump(mode="json"))))) == plain
    assert parse_job(night_job("x").model_dump() | {"requests": [
        {"name": "a", "method": "prompt", "classes": "all", "count": 1, "fresh": yaml.safe_load("2026-11-30")}
    ]}).requests[0].fresh == "2026-11-30"  # fmt: skip
    with pytest.raises(JobError, match=r"requests\.1\.fresh: true has no date"):
        build_plan(night_job("runs/x", fresh=True), LABELS, DIGESTS)
    for value in ("tomorrow", 7, "2026-1-1"):
        with pytest.raises(JobError, match=r"requests\.1\.fresh"):
            night_job("runs/x", fresh=value)


def test_plans_without_fresh_requests_keep_their_digest():
    """A field that nobody uses is not in the identity, and `output.provenance: false` is what was before it."""
    identity = make_plan(make_job(Path("x"))).identity
    assert all("fresh" not in request for request in identity["requests"])
    off = make_plan(make_job(Path("x"), output={"uri": "x", "samples_per_shard": 4, "provenance": False})).identity
    assert identity["output"] == off["output"] | {"provenance": True} and "provenance" not in off["output"]


def test_after_midnight_a_run_goes_on_with_its_own_date(tmp_path):
    """The same output keeps the seeds it began with; another one begins with today's; `overwrite` begins anew."""
    uri = str(tmp_path / "night")
    job = dated(night_job(uri, fresh=True), MONDAY)
    store = open_store(uri)
    plan = open_output(store, make_plan(job), job, "auto", confirmed=False)
    late = dated(night_job(uri, fresh=True), TUESDAY)
    assert late.requests[1].fresh == "2026-11-30" and seeds(late) == seeds(job)
    assert open_output(store, make_plan(late), late, "auto", confirmed=False).digest == plan.digest
    assert stored_plan(store)[0].requests[1].fresh == "2026-11-30"
    assert dated(night_job(uri, fresh=True), TUESDAY, continues=False).requests[1].fresh == "2026-12-01"
    assert dated(night_job(str(tmp_path / "new"), fresh=True), TUESDAY).requests[1].fresh == "2026-12-01"
    other = night_job(uri, fresh="2026-12-01")
    with pytest.raises(OutputError, match=r'requests\.1\.fresh: "2026-11-30" -> "2026-12-01"'):
        open_output(store, make_plan(other), other, "auto", confirmed=False)


def test_the_nightly_job_has_a_panel_and_fresh_samples():
    """What the example promises: a folder for each night, one request that stays, one that does not."""
    job = read_job(REPOSITORY / "jobs/nightly-stress.yaml", [])
    today = datetime.date.today()
    assert job.output.uri in {f"runs/nightly-{day}" for day in (today, today - datetime.timedelta(1))}
    assert {bool(request.fresh) for request in job.requests} == {True, False}


# Files that say what they are ----------------------------------------------------------------------------------------


def packets(run: Path) -> list[bool]:
    """Of every stored image, whether it says that it is synthetic."""
    tars = sorted((run / "shards").glob("*.tar"))
    found = [PIL.Image.open(io.BytesIO(data)).info for tar in tars for _, data, _, _ in read_shard(tar)]
    return [DIGITAL_SOURCE_TYPE in str(info) for info in found]


def forget_provenance(run: Path) -> None:
    """Make a run without provenance into one of before there was any: nothing of it in its plan."""
    for path in (run / "_state/plan").iterdir():
        plan = json.loads(path.read_text())
        assert not plan["job"]["output"].pop("provenance")
        for request in plan["job"]["requests"]:
            request.pop("fresh")
        path.write_text(json.dumps(plan))


def test_a_run_from_before_goes_on_without_provenance(tmp_path):
    """Its files stay of one kind: extended by a job that says nothing; refused for one that asks for it."""
    output = tmp_path / "old"
    old = composed_job(output, count=1, output={"uri": str(output), "store_rejected": True, "provenance": False})
    make_run(old)
    forget_provenance(output)
    assert stored_plan(open_store(str(output)))[0].output.provenance is False
    job = composed_job(output, count=2)
    assert job.output.provenance and not as_begun(open_store(str(output)), job).output.provenance
    make_run(job)
    assert len(packets(output)) == 2 * 70 and not any(packets(output))
    raw = {"uri": str(output), "store_rejected": True, "samples_per_shard": 256, "provenance": True}
    with pytest.raises(OutputError, match=r"output\.provenance: absent -> true"):
        make_run(composed_job(output, count=2, output=raw))
    new = tmp_path / "new"
    make_run(composed_job(new, count=1))
    assert len(packets(new)) == 70 and all(packets(new))
    make_run(composed_job(new, count=2))
    assert len(packets(new)) == 2 * 70 and all(packets(new))
    stored = read_run(open_store(str(new)))
    assert stored is not None and stored.identity["output"]["provenance"]
    raw["uri"] = str(new)
    with pytest.raises(OutputError, match=r"output\.provenance: true -> absent"):
        make_run(composed_job(new, count=2, output=raw | {"provenance": False}))
    assert "trainedAlgorithmicMedia" in (new / "README.md").read_text()
    assert "trainedAlgorithmicMedia" not in (output / "README.md").read_text()


@pytest.mark.parametrize(
    ("files", "licence"),
    [
        ({}, "unknown"),
        ({"README.md": "---\nlicense: openrail++\n---\n# x"}, "openrail++"),
        ({"README.md": "---\nlicense: other\nlicense_name: my-terms\n---\n"}, "my-terms"),
        ({"README.md": "license: mit"}, "unknown"),
        ({"README.md": "---\nlicense: [a, b\n---\n"}, "unknown"),
        ({"README.md": "---\nlicense: 3\n---\n", "LICENSE": "MIT License\n\nCopyright"}, "mit"),
        ({"LICENSE": "   Apache License\n  Version 2.0, January 2004"}, "apache-2.0"),
        ({"LICENSE.txt": "All rights reserved."}, "in LICENSE.txt"),
    ],
)
def test_licences_are_read_and_never_invented(tmp_path, files, licence):
    """What the files of a model's folder say of it, and nothing else."""
    (tmp_path / "model").mkdir()
    for name, text in files.items():
        (tmp_path / "model" / name).write_text(text)
    assert licence_of(str(tmp_path / "model")) == licence
    assert licence_of("zoo:digits/classifier") == "apache-2.0"
    assert licence_of("owner/name-that-is-not-here") == licence_of("module:factory") == "unknown"


def test_the_card_is_one_for_the_hub(tmp_path):
    """The hub's own class reads its header; models are listed with digest and licence."""
    import huggingface_hub

    make_run(composed_job(tmp_path / "run", count=1))
    text = (tmp_path / "run/README.md").read_text()
    data = huggingface_hub.DatasetCard(text).data.to_dict()
    assert data["annotations_creators"] == ["machine-generated"] and "synthetic" in data["tags"]
    assert data["license"] == "other" and data["license_name"] == "unknown"
    manifest = json.loads((tmp_path / "run/manifest.json").read_text())
    for role in ("clip", "target", "oracle"):
        about = manifest["models"][role]
        assert about["license"] == "apache-2.0"
        assert f"| {role} | address `{about['address']}`, digest `{about['digest']}`, license `apache-2.0`" in text
