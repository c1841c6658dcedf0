"""The judge, a second CLIP model: scored on the stored file, never guided on. Runs from before there were judges."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file

from engine.data.run.commits import list_commits
from engine.data.run.finalise import finalise, mark_success
from engine.data.run.resume import open_output
from engine.data.run.shard_writing import stage_shard
from engine.data.run.shards import read_rows, read_shard, shard_name
from engine.data.run.stored_plan import publish_rounds, stored_plan
from engine.data.run.verify import verify
from engine.data.stores.base import Store
from engine.data.stores.opening import open_store
from engine.driver.executors.local import LocalExecutor
from engine.driver.progress import PlainDisplay, medians_table
from engine.driver.run import run_job
from engine.errors import JobError
from engine.generation.rescorer import rescore
from engine.job.columns import SCHEMA_VERSION
from engine.job.parsing import parse_job
from engine.job.plan import Extent, Plan, build_plan, class_prompt
from engine.job.records import SampleResult, check_record, columns_of
from engine.job.spec import JobSpec
from engine.models.addresses import resolve
from engine.models.digests import model_digests
from engine.models.job_checks import check_addresses
from engine.report.render import write_report
from tests import run_cases as cases
from tests import sleepy

CLIP = "zoo:digits/clip"


def make_job(home: Path, judge: str | None, **request: object) -> JobSpec:
    """A job of a few samples in few steps."""
    models = {"diffusion": "zoo:digits/stable-diffusion", "clip": CLIP, "target": "zoo:digits/classifier"}
    one = {"name": "a", "method": "risky", "classes": ["three", "eight"], "count": 4} | request
    return parse_job(
        {
            "name": "judged",
            "models": models | ({"judge": judge} if judge else {}),
            "requests": [one],
            "sampling": {"num_inference_steps": 3, "guidance_scale": 2.0},
            "output": {"uri": str(home / "run"), "samples_per_shard": 8},
        }
    )


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A CLIP folder of other weights than the zoo's."""
    folder = tmp_path_factory.mktemp("judge") / "clip"
    shutil.copytree(resolve(CLIP), folder)
    weights = load_file(folder / "model.safetensors")
    torch.manual_seed(0)
    for name, tensor in weights.items():
        if name.endswith("projection.weight"):
            weights[name] = tensor + 0.5 * tensor.std() * torch.randn_like(tensor)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return str(folder)


@pytest.fixture(scope="module")
def finished(judge: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, JobSpec]:
    """A small run with a judge, whose rule of acceptance asks it."""
    job = make_job(tmp_path_factory.mktemp("judged"), judge, accept={"judge_conformity_margin": ">= -2"})
    display = PlainDisplay(io.StringIO())
    run_job(job, executor=LocalExecutor(1), resume="auto", confirmed=False, display=display)
    return open_store(job.output.uri), job


def test_plain_transformers_gives_the_judges_scores(finished: tuple[Store, JobSpec], judge: str) -> None:
    """From the stored file: a judge that saw the tensor, or was the first CLIP under another name, would differ."""
    import transformers

    store, _ = finished
    stored = [one for path in sorted(store.path("shards").glob("*.tar")) for one in read_shard(path)]
    images = [PIL.Image.open(io.BytesIO(data)) for _, data, _, _ in stored]
    model, processor = transformers.CLIPModel.from_pretrained(judge), transformers.CLIPProcessor.from_pretrained(judge)
    labels = json.loads((resolve("zoo:digits/classifier") / "config.json").read_text())["id2label"]
    texts = [class_prompt(labels[str(index)]) for index in range(10)]
    with torch.no_grad():
        cosines = model(**processor(text=texts, images=images, return_tensors="pt", padding=True)).logits_per_image
        cosines = cosines / model.logit_scale.exp()
    for (_, _, record, label), row in zip(stored, cosines, strict=True):
        check_record(record)
        (entry,) = record["judge"]
        others = torch.cat([row[:label], row[label + 1 :]])
        assert entry["model"] == judge
        assert entry["conformity"] == pytest.approx(float(row[label]), abs=1e-4)
        assert entry["conformity_margin"] == pytest.approx(float(row[label] - others.max()), abs=1e-4)
        assert abs(entry["conformity"] - record["conformity"]) > 0.01
    rows = [row for path in sorted(store.path("shards").glob("*.parquet")) for row in read_rows(path)]
    assert [row["judge"] for row in rows] == [record["judge"] for _, _, record, _ in stored]


def test_manifest_card_report_and_table_tell_of_the_judge(finished: tuple[Store, JobSpec], judge: str) -> None:
    """Its mean over a request, beside the conformity of the model that guided."""
    store, job = finished
    rows = pq.read_table(store.path("metadata.parquet")).to_pylist()
    mean = sum(row["judge"][0]["conformity"] for row in rows) / len(rows)
    manifest = json.loads(store.read("manifest.json"))
    about = {"address": judge, "digest": model_digests(job)["judge"], "license": "unknown"}
    assert manifest["models"]["judge"] == about
    assert manifest["summary"][0]["judge_conformity"] == pytest.approx(mean)
    card, report = store.read("README.md").decode(), store.read("report.html").decode()
    assert "judge's conformity |" in card and f"| {mean:.3g} |" in card
    assert "judge, mean" in report and judge in report
    from engine.data.run.summary import summarise

    groups = summarise(store.path("metadata.parquet"))
    headings = [" ".join(column.header.plain.split()) for column in medians_table(groups).columns]
    assert headings[-1] == "judge's conformity"


def test_scoring_again_asks_the_judge_too(finished: tuple[Store, JobSpec], judge: str, tmp_path: Path) -> None:
    """Nothing to tell of a run as it was made; a stored score that is another is told, and nothing else."""
    store, job = finished
    assert rescore(store) == [] and verify(store).findings == ()
    tar = store.path("shards") / f"{shard_name(job.name, 0)}.tar"
    before = tar.read_bytes()
    results = []
    for _, image, record, _ in read_shard(tar):
        record["judge"][0]["conformity"] += 0.1
        results.append(SampleResult(record, image, sleepy.run_fields(1)))
    try:
        tar.write_bytes(stage_shard(tmp_path, "other", results, "png").tar.read_bytes())
        found = rescore(store)
    finally:
        tar.write_bytes(before)
    assert len(found) == len(results)
    assert all(f"conformity of {judge}" in one.text and "; risk" not in one.text for one in found)


def test_scoring_again_wants_the_models_of_the_run(finished: tuple[Store, JobSpec], judge: str) -> None:
    """Other weights score otherwise, and the images are as whole as before."""
    weights = Path(judge, "model.safetensors")
    own = weights.read_bytes()
    weights.write_bytes(own[:-1] + bytes([own[-1] ^ 1]))
    try:
        with pytest.raises(JobError, match=r"models\.judge: .* -> .*: not the model that scored this run"):
            rescore(finished[0])
    finally:
        weights.write_bytes(own)


def test_without_a_judge_the_list_is_empty_and_the_digest_is_old(tmp_path: Path) -> None:
    """Every run has the column; a plan from before there were judges, its digest noted then, is still the same plan."""
    # Nor did images say that they are synthetic, nor was there another preset of guidance.
    output = {"uri": str(tmp_path), "samples_per_shard": 4, "provenance": False}
    guidance = {"boundary": {"preset": "adversarial"}}
    plan = cases.make_plan(cases.make_job(tmp_path, output=output, guidance=guidance))
    assert plan.digest == "d35004976fc31d7493d6bf266ef00059"
    assert cases.make_result(plan.requests[0].sample(0)).record["judge"] == []
    assert list(columns_of(2))[-1] == "judge" and "judge" not in columns_of(1)


def test_the_judges_digest_is_part_of_the_plan(tmp_path: Path, judge: str) -> None:
    """Another judge, or one where there was none, is another plan."""
    labels, digests = cases.LABELS, cases.DIGESTS
    job = cases.make_job(tmp_path)
    plans = [build_plan(job, labels, digests | extra) for extra in ({}, {"judge": "1"}, {"judge": "2"})]
    assert len({plan.digest for plan in plans}) == 3


def test_a_judge_that_guides_is_refused(tmp_path: Path, judge: str) -> None:
    """By its address, and as a copy by its weights, whatever else lies in the copy's folder."""
    with pytest.raises(JobError, match=r"models\.judge: 'zoo:digits/clip' is models\.clip too"):
        check_addresses(make_job(tmp_path, CLIP))
    copy = shutil.copytree(resolve(CLIP), tmp_path / "copy")
    (copy / "notes.txt").write_text("a copy")
    with pytest.raises(JobError, match=r"models\.judge: .* has the weights of models\.clip"):
        model_digests(make_job(tmp_path, str(copy)))
    assert model_digests(make_job(tmp_path, judge))["judge"] != model_digests(make_job(tmp_path, None))["clip"]
    with pytest.raises(JobError, match=r"models\.judge: .*a CLIP model is needed"):
        check_addresses(make_job(tmp_path, "zoo:digits/oracle"))


def test_a_rule_that_asks_an_absent_judge_is_refused(tmp_path: Path) -> None:
    """It would fail with every sample, after the models are loaded."""
    with pytest.raises(JobError, match=r"requests\.0\.accept\.judge_conformity: there is no judge"):
        make_job(tmp_path, None, accept={"judge_conformity": ">= 0.2"})


def old_run(home: Path, **changes: object) -> tuple[Store, JobSpec]:
    """An unfinished run as the version before the judge left it: one shard of schema 1, a plan that names no schema."""
    job = cases.make_job(home, **changes)
    store, planned = open_store(str(home)), cases.make_plan(job)
    plan = open_output(store, Plan(planned.requests, planned.identity, planned.stages, 1), job, "auto", confirmed=False)
    path = store.path("_state/plan/000000.json")
    fields = json.loads(path.read_text())
    assert fields.pop("schema_version") == 1
    path.write_text(json.dumps(fields))
    cases.commit_one(store, plan, 0)
    return store, job


def finish(store: Store, job: JobSpec) -> Plan:
    """Resume, make the rest and close, as a driver does."""
    plan = open_output(store, cases.make_plan(job), job, "auto", confirmed=False)
    cases.commit_rest(store, plan)
    about = {"target": {"address": "zoo:t", "digest": "t0"}}
    finalise(store, job, plan, models=about, timing={}, versions={}, hardware={})
    write_report(store, labels=cases.LABELS)
    return plan


def test_a_run_goes_on_in_the_schema_it_began_with(tmp_path: Path) -> None:
    """Mixed columns would break every reader of the whole: shards, stages that are added, metadata and card agree."""
    store, job = old_run(tmp_path / "old")
    finish(store, job)
    grown = cases.make_job(tmp_path / "old", count=9)
    plan = finish(store, grown)
    assert plan.schema_version == 1 and len(plan.stages) == 2 and len(list_commits(store)) == plan.num_shards
    samples = [one for path in sorted(store.path("shards").glob("*.tar")) for one in read_shard(path)]
    assert samples and all(list(record) == list(columns_of(1)) for _, _, record, _ in samples)
    table = pq.read_table(store.path("metadata.parquet"))
    assert "judge" not in table.column_names and set(table["schema_version"].to_pylist()) == {1}
    assert json.loads(store.read("manifest.json"))["schema_version"] == 1
    assert "| `judge` |" not in store.read("README.md").decode()
    mark_success(store, plan)
    assert verify(store).findings == () and stored_plan(store)[1].schema_version == 1


def test_rounds_of_an_old_run_have_its_schema(tmp_path: Path) -> None:
    """A round is a stage without a job; the plan that the workers get has the old version, and so has who reads it."""
    quota = {"name": "a", "method": "prompt", "classes": ["one"], "count": 20, "accept": {"is_error": True}}
    store, job = old_run(tmp_path / "old", requests=[quota])
    plan = open_output(store, cases.make_plan(job), job, "auto", confirmed=False)
    grown = publish_rounds(store, plan, (Extent(request=0, cell=0, start=20, stop=24, samples_per_shard=4),))
    found = [grown, stored_plan(store)[1], open_output(store, cases.make_plan(job), job, "auto", confirmed=False)]
    assert [(one.schema_version, len(one.stages)) for one in found] == [(1, 2)] * 3


def test_a_shard_of_another_schema_is_damage(tmp_path: Path) -> None:
    """It could be read, but the columns of the whole would be mixed."""
    store, job = old_run(tmp_path / "old")
    plan = open_output(store, cases.make_plan(job), job, "auto", confirmed=False)
    cases.commit_one(store, Plan(plan.requests, plan.identity, plan.stages), 1)
    [found] = verify(store).damage
    assert found.shard == 1 and f"has schema version {SCHEMA_VERSION}, the run has 1" in found.text


def test_a_new_run_has_the_new_schema(tmp_path: Path) -> None:
    """Also in the place of an old one that is removed."""
    store, job = old_run(tmp_path / "old")
    assert open_output(store, cases.make_plan(job), job, "overwrite", confirmed=True).schema_version == SCHEMA_VERSION
    plan = finish(store, job)
    assert plan.schema_version == SCHEMA_VERSION
    table = pq.read_table(store.path("metadata.parquet"))
    assert table["judge"].to_pylist() == [[]] * table.num_rows


def test_a_run_of_a_later_schema_is_refused(tmp_path: Path) -> None:
    """With the remedy; going on would leave columns out."""
    store, job = old_run(tmp_path / "old")
    path = store.path("_state/plan/000000.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(Exception, match="use the version that wrote it"):
        open_output(store, cases.make_plan(job), job, "auto", confirmed=False)
