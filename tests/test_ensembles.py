"""Ensembles of targets: guidance sees all of them, the scores are the first's, and what else is recorded is marked."""

from __future__ import annotations

import copy
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import PIL.Image
import pytest
import torch
from torch import Tensor

from engine.data.reading.export import export
from engine.data.reading.export_options import ExportOptions
from engine.data.run.shards import read_rows, read_shard
from engine.data.run.stored_plan import read_run
from engine.data.run.summary import summarise
from engine.data.stores.base import Store
from engine.data.stores.opening import open_store
from engine.driver.executors.local import LocalExecutor
from engine.driver.progress import PlainDisplay, medians_table
from engine.driver.run import run_job
from engine.errors import JobError
from engine.generation.guidance import RequestGuides
from engine.generation.rescorer import rescore
from engine.job.columns import GUIDES
from engine.job.parsing import parse_job
from engine.job.spec import MAX_TARGETS, JobSpec
from engine.methods.boundary.guide import guide_to_boundary
from engine.methods.boundary.spec import BoundaryGuidanceSpec
from engine.methods.custom.guide import guide_by_criterion
from engine.methods.custom.spec import CustomGuidanceSpec
from engine.methods.guidance.scene import Decoding, GuidanceScene
from engine.methods.risky.guide import guide_to_risk
from engine.methods.risky.spec import RiskyGuidanceSpec
from engine.methods.sampling.denoiser import Prediction, Step
from engine.methods.scores import kldb
from engine.models.addresses import resolve
from engine.models.classifier import Classifier
from engine.models.digests import model_digest, model_digests
from engine.models.job_checks import check_addresses
from engine.models.weight_comparison import have_same_weights
from engine.studies.rescore.program import rescore_run
from tests import run_cases as cases
from tests.guidance_scenes import scene_of

FIRST, SECOND, ORACLE = "zoo:digits/classifier", "zoo:digits/classifier-b", "zoo:digits/oracle"
MARKED = f"{SECOND} (guides)"
BETWEEN = {"name": "between", "method": "boundary", "boundary": ["three", "eight"], "count": 8}
PLAIN = BETWEEN | {"name": "plain", "method": "prompt", "seed_group": "between"}
CLASSES = torch.tensor([3, 8])


def raw_job(target: Any, *requests: dict[str, Any], uri: Path | str = "runs/x", **models: Any) -> dict[str, Any]:
    named = {"diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip", "target": target} | models
    return {
        "name": "ensemble",
        "models": named,
        "requests": [*(requests or [BETWEEN])],
        "sampling": {"num_inference_steps": 12},
        "guidance": {"boundary": {"every": 1}},
        "output": {"uri": str(uri)},
    }


def problems_of(raw: dict[str, Any]) -> list[str]:
    with pytest.raises(JobError) as caught:
        parse_job(raw)
    return list(caught.value.problems)


# The job file ---------------------------------------------------------------------------------------------------------


def test_a_list_of_one_is_that_target() -> None:
    """In what is planned and what is stored, to the byte: as if there could be no list."""
    job, alone = (parse_job(raw_job(target)) for target in ([FIRST], FIRST))
    assert job == alone
    for stored in (job.model_dump(mode="json"), job.model_dump(mode="json", exclude_none=True)):
        assert "further_targets" not in json.dumps(stored) and "ensemble" not in stored["guidance"]


def test_a_list_is_stored_as_the_first_and_further_ones() -> None:
    """And is read again as it was, choices of requests too."""
    raw = raw_job([FIRST, SECOND], BETWEEN | {"guidance": {"ensemble": "worst"}})
    given = copy.deepcopy(raw)
    job = parse_job(raw)
    assert raw == given
    assert (job.models.target, job.models.further_targets) == (FIRST, (SECOND,))
    assert parse_job(json.loads(json.dumps(job.model_dump(mode="json")))) == job
    assert (job.guidance.ensemble, job.guidance_of(job.requests[0]).ensemble) == ("mean", "worst")
    whole = parse_job(raw | {"guidance": {"ensemble": "worst"}})
    assert parse_job(whole.model_dump(mode="json")).guidance.ensemble == "worst"


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ([], "models.target: [] is empty; give the address of a classifier, or a list of some"),
        (list("abcdefghi"), f"models.target: has 9 entries; give {MAX_TARGETS} or fewer"),
        (["a", ["b"]], "models.target: has a list in it; name the targets one after another"),
        (["a", "b", "a"], "models.target.2: 'a' is there twice; name each target once"),
        ([3, "a"], "models.target.0: 3 is not text; put it in quotes if it is meant so"),
        (["a", ""], "models.target.1: '' has fewer characters than 1; give 1 or more"),
    ],
)
def test_a_list_that_is_no_ensemble_is_refused_where_it_stands(target: list[Any], problem: str) -> None:
    """By its place in the file, and nothing else is, such as the choice between several."""
    assert problems_of(raw_job(target) | {"guidance": {"ensemble": "worst"}}) == [problem]


def test_what_would_have_no_effect_is_refused() -> None:
    """Targets that guide nothing, a choice between one, and a list beside what it is stored as."""
    assert problems_of(raw_job(["a", "b"], PLAIN)) == [
        "models.target.1: no request is guided, so that only the first is a target; give the others as `transfer`"
    ]
    text = "guidance.ensemble: has no effect with one target; leave it out, or give a list in models.target"
    assert problems_of(raw_job("a") | {"guidance": {"ensemble": "worst"}}) == [text]
    assert problems_of(raw_job("a", PLAIN, BETWEEN | {"guidance": {"ensemble": "worst"}})) == [f"requests.1.{text}"]
    assert parse_job(raw_job("a") | {"guidance": {"ensemble": "mean"}}).guidance.ensemble == "mean"
    [problem] = problems_of(raw_job(["a", "b"], further_targets=["c"]))
    assert problem.startswith("models.target: is a list, and further_targets is there too")
    assert problems_of(raw_job("a", further_targets=["b", "a"])) == [
        "models.further_targets.1: 'a' is there twice; name each target once"
    ]


def test_targets_and_their_choice_are_part_of_the_plan(tmp_path: Path) -> None:
    """Of guided requests alone; a plan from before there were ensembles is still the same plan."""
    before = {
        "output": {"uri": "x", "samples_per_shard": 4, "provenance": False},
        "guidance": {"boundary": {"preset": "adversarial"}},
    }
    old = cases.make_plan(cases.make_job(tmp_path, **before))
    assert old.digest == "d35004976fc31d7493d6bf266ef00059"
    models = cases.make_job(tmp_path).models.model_dump() | {"target": ["zoo:t", "zoo:u"]}
    jobs = [cases.make_job(tmp_path, models=models, guidance={"ensemble": choice}) for choice in ("mean", "worst")]
    plans = [
        cases.build_plan(job, cases.LABELS, cases.DIGESTS | {"further_targets": [digest]})
        for job in jobs
        for digest in ("u0", "u1")
    ]
    assert len({plan.digest for plan in plans}) == 4
    assert [one.get("ensemble") for one in plans[0].identity["requests"]] == ["mean", None]


# Models ---------------------------------------------------------------------------------------------------------------


def test_targets_have_the_same_classes() -> None:
    """What files tell, before a worker starts."""
    with pytest.raises(JobError) as caught:
        check_addresses(parse_job(raw_job([FIRST, "zoo:cifar10/classifier"])))
    [problem] = caught.value.problems
    assert problem.startswith("models.target.1: 'zoo:cifar10/classifier' has other classes than the target: it has")
    with pytest.raises(JobError, match=r"^models\.target\.1: 'zoo:digits/clip': .*"):
        check_addresses(parse_job(raw_job([FIRST, "zoo:digits/clip"])))


@pytest.mark.parametrize("place", [0, 1])
def test_a_target_evaluates_no_other(tmp_path: Path, place: int) -> None:
    """As oracle, as transfer model, or twice; a copy is recognised by its weights."""
    clone = shutil.copytree(resolve([FIRST, SECOND][place]), tmp_path / "clone")
    assert have_same_weights(clone, resolve([FIRST, SECOND][place]), ("",))
    for models, field in (
        ({"oracle": str(clone)}, "models.oracle"),
        ({"transfer": [ORACLE, str(clone)]}, "models.transfer.1"),
        ({"target": [FIRST, SECOND, str(clone)]}, "models.target.2"),
    ):
        with pytest.raises(JobError) as caught:
            check_addresses(parse_job(raw_job(**{"target": [FIRST, SECOND]} | models)))
        [problem] = caught.value.problems
        assert problem.startswith(f"{field}: '{clone}' has the weights of models.target.{place}; ")


# What guidance descends -----------------------------------------------------------------------------------------------


def mirrored(images: Tensor) -> Tensor:
    """Logits [B, 2] that call dark what `upright` calls bright."""
    return images.mean((2, 3))[:, :2].flip(1) * 3


def upright(images: Tensor) -> Tensor:
    return images.mean((2, 3))[:, :2]


def identity(latents: Tensor) -> Tensor:
    return latents


class Fixed:
    """A denoiser that predicts no noise: x0 are the latents."""

    def __call__(self, latents: Tensor, step: Step) -> Prediction:
        zero = torch.zeros_like(latents)
        return Prediction(output=zero, conditional=zero, latents=latents, prediction="epsilon")

    attached = __call__


STEP = Step(index=5, total=40, timestep=torch.tensor(500.0), scale=1.0, sigma=1.0, normalise_input=False)
LATENTS = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))
GUIDES_OF = {
    "boundary": (guide_to_boundary, BoundaryGuidanceSpec(gradient="detached")),
    "risky": (guide_to_risk, RiskyGuidanceSpec(target_risk=0.2, tolerance=0, gradient="detached")),
    "paper": (guide_to_risk, RiskyGuidanceSpec(step="paper")),
    "custom": (
        lambda denoiser, spec, scene: guide_by_criterion(
            lambda images, own: kldb(own.logits(images), own.classes[0]), denoiser, spec, scene
        ),
        CustomGuidanceSpec(gradient="detached"),
    ),
}


def scene(*logits: Callable[[Tensor], Tensor], ensemble: str = "mean", **kind: Any) -> GuidanceScene:
    first, *others = logits
    kind = {"conformity": lambda images, labels: images.mean((1, 2, 3))} | kind
    return scene_of([(0, 1)] * 3, first, identity, further_logits=tuple(others), ensemble=ensemble, **kind)


@pytest.mark.parametrize("name", GUIDES_OF)
@pytest.mark.parametrize("ensemble", ["mean", "worst"])
def test_every_method_descends_the_mean_or_the_worst_of_its_targets(name: str, ensemble: str) -> None:
    """Sample by sample, value and gradient, which the step rule sees; a method that knew one target would differ."""
    guide, spec = GUIDES_OF[name]

    def measured(*logits: Any, **kind: Any) -> tuple[Tensor, Tensor]:
        guided = guide(Fixed(), spec, scene(*logits, **kind))  # type: ignore[operator]
        losses, gradients = guided.gradients(guided.predict(LATENTS, STEP), STEP)
        return losses[0], gradients[0]

    loss, gradient = measured(upright, mirrored, ensemble=ensemble)
    alone = [measured(logits) for logits in (upright, mirrored)]
    losses, gradients = (torch.stack(parts) for parts in zip(*alone, strict=True))
    assert (losses[0] != losses[1]).all()
    if ensemble == "mean":
        expected, direction = losses.mean(0), gradients.mean(0)
    else:
        expected, which = losses.max(0)
        direction = gradients[which, torch.arange(3)]
    assert torch.allclose(loss, expected, atol=1e-6) and torch.allclose(gradient, direction, atol=1e-6)


def test_what_no_target_changes_is_measured_once() -> None:
    """CLIP and an oracle are dearer than most targets; their distances and gradients are those of a single target."""
    calls = {"conformity": list[int](), "oracle": list[int]()}

    def conformity(images: Tensor, labels: Tensor) -> Tensor:
        calls["conformity"].append(len(images))
        return images.mean((1, 2, 3))

    def oracle_logits(images: Tensor) -> Tensor:
        calls["oracle"].append(len(images))
        return images.mean((2, 3)) * 5

    spec = RiskyGuidanceSpec(conformity_floor=0.9, oracle_floor=0.9, gradient="detached")
    found = []
    for logits in ([upright], [upright, mirrored, upright]):
        guided = guide_to_risk(Fixed(), spec, scene(*logits, conformity=conformity, oracle_logits=oracle_logits))
        found.append([part[1:] for part in guided.gradients(guided.predict(LATENTS, STEP), STEP)])
    assert calls == {"conformity": [3, 3], "oracle": [3, 3]}
    assert all(part.any() for part in found[0][0])
    assert all(torch.allclose(one, other) for one, other in zip(*found, strict=True))


def test_the_mean_of_a_row_does_not_depend_on_the_others() -> None:
    """Of as many targets as a job can have; torch's mean sums them in an order that depends on the rows."""
    values = torch.rand(MAX_TARGETS, 16, generator=torch.Generator().manual_seed(0))
    whole = scene(*[lambda images, value=value: value[: len(images)] for value in values])
    found = [whole.over_targets(lambda images, own: own.logits(images)[None], LATENTS.new_zeros(b)) for b in (16, 4)]
    assert torch.equal(found[0][:, :4], found[1])
    assert torch.allclose(found[0][0], values.mean(0))


def test_a_request_guides_by_all_targets_of_its_job_as_it_chooses() -> None:
    """From the job to what is descended: the job's choice, and the one of a request."""
    detached = BETWEEN | {"guidance": {"boundary": {"gradient": "detached"}}}
    worst = detached | {"name": "b", "guidance": detached["guidance"] | {"ensemble": "worst"}}
    job = parse_job(raw_job([FIRST, SECOND], detached, worst))
    targets = [SimpleNamespace(logits=logits) for logits in (upright, mirrored)]
    scorer: Any = SimpleNamespace(target=targets[0], further_targets=targets[1:], guiding_oracle=None)
    guides = RequestGuides(job, SimpleNamespace(), scorer, "cpu")  # type: ignore[arg-type]
    found = []
    for request in (0, 1):
        guided = guides.guided(request, Fixed(), [(0, 1)] * 3, Decoding(decode=identity))
        assert guided is not None
        found.append(guided.gradients(guided.predict(LATENTS, STEP), STEP)[0][0])
    distances = torch.stack([kldb(logits(LATENTS), (0, 1)) for logits in (upright, mirrored)])
    assert torch.allclose(found[0], distances.mean(0)) and torch.allclose(found[1], distances.amax(0))


# A run ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, JobSpec]:
    """Samples with guidance and without, from the same noise, by two targets; the oracle is a transfer model."""
    raw = raw_job([FIRST, SECOND], BETWEEN, PLAIN, uri=tmp_path_factory.mktemp("run") / "run", transfer=[ORACLE])
    job = parse_job(raw)
    run_job(job, executor=LocalExecutor(1), resume="auto", confirmed=False, display=PlainDisplay(io.StringIO()))
    return open_store(job.output.uri), job


def samples_of(store: Store) -> list[tuple[PIL.Image.Image, dict[str, Any]]]:
    return [
        (PIL.Image.open(io.BytesIO(data)), record)
        for path in sorted(store.path("shards").glob("*.tar"))
        for _, data, record, _ in read_shard(path)
    ]


def test_both_targets_are_led_to_the_boundary(finished: tuple[Store, JobSpec]) -> None:
    """KLDB of the stored images falls on both; the columns are the first's, the others' entries say who guided."""
    samples = samples_of(finished[0])
    images, records = zip(*samples, strict=True)
    medians, is_guided = {}, torch.tensor([record["request"] == "between" for record in records])
    for address in (FIRST, SECOND):
        logits = Classifier.load(address).score(images)
        distances = kldb(logits, CLASSES)
        medians[address] = (float(distances[is_guided].median()), float(distances[~is_guided].median()))
        log_p = logits.log_softmax(1)
        for row, record in enumerate(records):
            risk = -float(log_p[row, record["class_index"]])
            stored = record["risk"] if address == FIRST else record["transfer"][0]["risk"]
            assert stored == pytest.approx(risk, abs=1e-4)
        if address == FIRST:
            assert [record["kldb"] for record in records] == pytest.approx(distances.tolist(), abs=1e-4)
    assert all(guided < 0.3 * plain for guided, plain in medians.values()), medians
    assert all([entry["model"] for entry in record["transfer"]] == [MARKED, ORACLE] for record in records)


def test_what_is_stored_says_which_classifiers_guided(finished: tuple[Store, JobSpec], tmp_path: Path) -> None:
    """Plan, manifest, cards, report and table: no figure of one that guided stands as transfer."""
    store, job = finished
    stored = read_run(store)
    assert stored is not None and stored.job["models"]["further_targets"] == [SECOND]
    for models in (stored.identity["models"], model_digests(job)):
        assert models["further_targets"] == [model_digest(SECOND)]
    manifest = json.loads(store.read("manifest.json"))
    [described] = manifest["models"]["further_targets"]
    temperature = Classifier.load(SECOND).temperature
    assert (described["address"], described["temperature"]) == (SECOND, temperature)
    assert [one["model"] for one in manifest["summary"][0]["transfer"]] == [MARKED, ORACLE]
    card, report = store.read("README.md").decode(), store.read("report.html").decode()
    assert f"| further_targets | address `{SECOND}`" in card and f"`{MARKED}` errors" in card
    assert "A classifier with `(guides)` guided beside the target: its figures show no transfer." in card
    exported = export((store.uri,), ExportOptions(output=str(tmp_path / "out"), format="parquet")).path / "README.md"
    marked = "In `transfer`, a model with `(guides)` after its name was guided on: a further target."
    assert marked in card and marked in exported.read_text()
    line = f"ensemble: the mean of each sample's distances under `{FIRST}`, `{SECOND}`; the scores are those of"
    assert card.count(line) == 1
    assert "Further target errors" in report and "Transfer errors" in report and MARKED in report
    groups = summarise(store.path("metadata.parquet"))
    headings = [" ".join(column.header.plain.split()) for column in medians_table(groups).columns]  # type: ignore[union-attr]
    assert f"errors of {MARKED.removeprefix('zoo:')}" in headings


def test_scoring_again_knows_who_guided(finished: tuple[Store, JobSpec], tmp_path: Path) -> None:
    """`verify --deep` finds nothing to tell; a rescoring marks what guided, in whichever role, and nothing else."""
    store, _ = finished
    assert rescore(store, 4) == []
    notices: list[str] = []
    done = rescore_run(
        store.uri, ORACLE, transfer=(FIRST, SECOND, ORACLE), output=str(tmp_path / "a"), notice=notices.append
    )
    rows = [row for path in sorted(Path(done.folder, "shards").iterdir()) for row in read_rows(path)]
    assert {tuple(entry["model"] for entry in row["transfer"]) for row in rows} == {(FIRST + GUIDES, MARKED, ORACLE)}
    assert notices == []
    rescore_run(store.uri, SECOND, output=str(tmp_path / "b"), notice=notices.append)
    [notice] = notices
    assert notice == f"'{SECOND}' is one of several targets that guided this run: its scores show no transfer"


def test_plan_names_the_targets(call: Any, tmp_path: Path) -> None:
    """With their temperatures, and what a guided step costs; nothing of it where there is one."""
    path = tmp_path / "job.json"
    for target, texts in (([FIRST, SECOND], ["target 2: ", "differentiates 2 targets"]), (FIRST, [])):
        path.write_text(json.dumps(raw_job(target, uri=tmp_path / "run")))
        code, out, _ = call("plan", path, "--validate")
        assert code == 0 and [text in out for text in ("target 2: ", "differentiates")] == [bool(texts)] * 2
        fields = json.loads(call("plan", path, "--validate", "--json")[1])
        assert [one["address"] for one in fields.get("further_targets", [])] == ([SECOND] if texts else [])
