"""Ablations: what each part means, weakened predictors, statistics where the truth is known, and a small real study."""

from __future__ import annotations

import dataclasses
import io
import json
import signal
import subprocess
import sys
import time
from functools import cache

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from engine.data.run.study_document import read_study
from engine.data.stores.opening import open_store
from engine.driver.progress import PlainDisplay
from engine.errors import JobError
from engine.generation.artefact import load_conditioning
from engine.job.parsing import parse_job
from engine.job.spec import ConditioningSpec, JobSpec
from engine.methods.conditioning.predictor import Exchange, PredictorOptions, exchange_outcomes, fit_predictor
from engine.methods.risky.spec import RiskyGuidanceSpec
from engine.models.addresses import zoo_folder
from engine.studies.ablate.arms import design
from engine.studies.ablate.artefacts import Predictor, make_artefacts, weakened_fit
from engine.studies.ablate.measures import Samples, adjusted, differences, read_samples_of
from engine.studies.ablate.outcome import outcome_of
from engine.studies.ablate.program import check_ablate
from engine.studies.ablate.results import Results
from engine.studies.ablate.spec import PARTS, AblateSpec
from engine.studies.experiments.parsing import parse_study
from engine.studies.experiments.program import StudyContext
from engine.studies.prepare.program import prepare_conditioning
from engine.studies.samples import open_study, read_attempts
from tests import ablate_cases
from tests.ablate_cases import call_ablate, raw_job, raw_request, write_study
from tests.conftest import REPOSITORY
from tests.prepare_cases import drawn_digits, write_folder

TEXT = "zoo:digits/stable-diffusion"


def spec_of(**fields) -> AblateSpec:
    return AblateSpec.model_validate({"study": "ablate", "job": {}, "text_diffusion": TEXT} | fields)


def resolved(job: JobSpec, name: str) -> dict:
    """All that decides the samples of a request, with the parameters that hold for it."""
    request = next(one for one in job.requests if one.name == name)
    parameters = job.parameters_of(request)
    fields = request.model_dump(mode="json", exclude={"name", "guidance"})
    flat = {f"conditioning.{key}": value for key, value in (fields.pop("conditioning") or {}).items()}
    return fields | flat | {f"guidance.{key}": getattr(parameters, key) for key in RiskyGuidanceSpec.model_fields}


CHANGED = {
    "screening": {"conditioning.screening", "conditioning.threshold"},
    "conformity": {"guidance.conformity_floor"},
    "text": {"prompt"},
    "embedding": {"diffusion", *(f"conditioning.{key}" for key in ConditioningSpec().model_dump(exclude_none=True))}
    | {"conditioning.artefact"},
    "mixture": {"conditioning.artefact"},
    "risk-target": {"guidance.step", "guidance.conformity_weight"},
    "preset": {f"guidance.{key}" for key in ("preset", "gradient", "every", "counted_from", "skip_last")},
}


@pytest.mark.parametrize("part", CHANGED)
def test_taking_a_part_away_changes_it_and_nothing_else(part):
    """By the parameters that hold in the end, whichever of job, request and preset gives them."""
    job = design(spec_of(), parse_job(raw_job()), {"single": "elsewhere"}).job
    whole, without = resolved(job, "whole"), resolved(job, f"without-{part}")
    changed = {key for key in whole.keys() | without.keys() if whole.get(key) != without.get(key)}
    assert changed == CHANGED[part]
    if part == "risk-target":
        # The fixed step has no floor: conformity is weighed in its place.
        assert without["guidance.conformity_weight"] == 10 and without["guidance.preset"] == "perceptible"


def test_the_whole_recipe_is_the_request_and_the_last_row_is_the_prompt_alone():
    job = parse_job(raw_job(guidance={"risky": {"preset": "adversarial", "counted_from": "end", "cap": 0.2}}))
    made = design(spec_of(parts=["screening"]), job).job
    assert made.parameters_of(made.requests[0]) == job.parameters_of(job.requests[0])
    last = made.requests[-1]
    assert (last.name, last.method, last.conditioning, last.diffusion) == ("nothing", "prompt", None, TEXT)
    assert {request.seed_group for request in made.requests} == {"risky"}
    # A stored job is the same job: nothing that was switched off comes back.
    made = design(spec_of(), parse_job(raw_job())).job
    stored = parse_job(json.loads(json.dumps(made.model_dump(mode="json", exclude_none=True))))
    assert [stored.parameters_of(one) for one in stored.requests] == [made.parameters_of(one) for one in made.requests]


def test_without_text_as_many_samples_are_made_of_the_same_noise():
    request = raw_request(contexts=["", "small"], accept="is_error", classes=["three", "eight"])
    made = design(spec_of(count=9, parts=["text"]), parse_job(raw_job(requests=[request])))
    whole, text, _ = made.job.requests
    assert (whole.count, whole.num_wanted, text.num_wanted, text.contexts) == (2, 4, 4, ("",))
    assert made.num_samples == 8 and not whole.accept
    assert any("acceptance" in note for note in made.notes) and any("8 samples a row" in note for note in made.notes)


def test_parts_that_a_request_lacks_are_named_and_left_out():
    raw = raw_job(
        requests=[raw_request(conditioning=None, diffusion=TEXT)], guidance={"risky": {"step": "paper", "scale": 3}}
    )
    made = design(spec_of(), parse_job(raw))
    assert [arm.part for arm in made.arms if arm.part] == ["conformity", "guidance"]
    notes = "\n".join(made.notes)
    for part in ("screening", "text", "embedding", "mixture", "risk target", "preset perceptible"):
        assert f"{part} is not taken away from 'risky'" in notes
    made = design(AblateSpec(study="ablate", job={}), parse_job(raw_job()))
    assert "embedding" not in [arm.part for arm in made.arms] and made.job.requests[-1].conditioning is not None
    assert any("text_diffusion" in note for note in made.notes)


@pytest.mark.parametrize(
    ("job", "fields", "message"),
    [
        ({"requests": [raw_request(method="prompt")]}, {}, "job.requests: none has method risky"),
        ({"requests": [raw_request(), raw_request(name="other")]}, {}, "request: the job has 2 risky requests"),
        ({}, {"request": "b"}, "request: the job has no risky request 'b'; it has risky"),
        ({}, {"predictor_steps": 2}, "data: missing, and predictor_steps need"),
        ({}, {"components": [3], "data": "nowhere"}, "data: there is no 'nowhere'"),
        ({"requests": [raw_request(conditioning=None, diffusion=TEXT)]}, {"predictor_steps": 2}, "predictor_steps: "),
        ({"requests": [raw_request(conditioning=None, diffusion=TEXT)]}, {"components": [2]}, "components: "),
        ({"requests": [raw_request(conditioning=None, diffusion=TEXT)]}, {"parts": ["mixture"]}, "parts: "),
        ({}, {"text_diffusion": "zoo:digits/clip"}, "text_diffusion: 'zoo:digits/clip'"),
        ({}, {"text_diffusion": "zoo:digits/stable-unclip"}, "text_diffusion: missing"),
        ({"guidance": {"risky": {"gradient_range": 0.5}}}, {"parts": ["preset"]}, "request 'risky', without preset"),
        ({"requests": [raw_request(conditioning="not/there")]}, {}, "conditioning: there is no artefact"),
        ({}, {"parts": ["text", "text"]}, "parts: "),
        ({}, {"predictor_steps": 1}, "predictor_steps: "),
        ({}, {"components": [0]}, "components.0: "),
    ],
)
def test_what_cannot_be_taken_apart_is_refused_by_field(tmp_path, job, fields, message):
    file = write_study(tmp_path / "study.yaml", job=raw_job(**job), **fields)
    with pytest.raises(JobError) as error:
        call_ablate(file, tmp_path / "out", validate=True)
    assert any(line.startswith(message) for line in error.value.problems), error.value.problems


@pytest.mark.parametrize("name", ["ablate-digits", "ablate-cifar10"])
def test_the_studies_in_the_repository_take_every_part_away(name):
    """Images of others aside, which are read when the study begins."""
    raw = yaml.safe_load((REPOSITORY / "jobs" / f"{name}.yaml").read_text())
    study = parse_study("ablate", AblateSpec, raw, lambda path: {}, options=[], sets=[])
    made = design(study.spec, study.job)
    assert [arm.part for arm in made.arms if arm.part] == list(PARTS) and made.num_samples <= 24
    assert len(made.of("predictor")) == 10 and len(made.of("components")) == 6


def test_a_request_with_starts_contexts_and_several_targets_is_taken_apart(tmp_path):
    """Every check of a run holds for every row, whatever else the request has."""
    images = write_folder(tmp_path / "images", drawn_digits(40))
    request = raw_request(
        contexts=["", "small"], start={"images": str(images), "strength": [0.5]}, classes=["three", "eight"]
    )
    models = raw_job()["models"] | {"target": ["zoo:digits/classifier", "zoo:digits/classifier-b"], "transfer": []}
    raw = raw_job(requests=[request], models=models)
    raw["guidance"]["ensemble"] = "worst"
    raw["sampling"]["num_inference_steps"] = 8
    job = parse_job(raw)
    text = check_ablate(spec_of(count=12), job)
    assert text == "1 run of 10 rows, 12 samples each (120), and 1 artefact"
    made = design(spec_of(), job)
    assert {made.job.guidance_of(one).ensemble for one in made.job.requests} == {"worst"}
    assert {one.used_start.strength for one in made.job.requests} == {0.5}


def test_exchanged_outcomes_are_as_many_and_in_the_end_say_nothing_of_their_images():
    errors = torch.arange(400) % 8 == 0
    halves = exchange_outcomes(errors, Exchange(0.5), seed=0)
    assert halves.sum() == errors.sum() and exchange_outcomes(errors, Exchange(0.0), seed=0).equal(errors)
    assert 0 < (halves != errors).sum() <= 100
    # By chance an eighth of the errors would still be one; more than half would be no exchange.
    whole = exchange_outcomes(errors, Exchange(1.0), seed=0)
    assert whole.sum() == errors.sum() and (whole & errors).sum() < 25
    assert not exchange_outcomes(errors, Exchange(0.5, 1), seed=0).equal(halves)


@pytest.fixture(scope="module")
def drawn():
    """Embeddings from the zoo's artefact, and errors as its predictor expects them."""
    conditioning = load_conditioning(zoo_folder("zoo:digits/conditioning"))
    distributions, generator = conditioning.distributions(), torch.Generator().manual_seed(3)
    classes = torch.arange(800) % 10
    embeds = torch.stack([distributions.draw(int(index), generator) for index in classes])
    assert conditioning.fit.predictor is not None
    return embeds, conditioning.fit.predictor.confidence(embeds) > 0.5, classes, conditioning.labels


def test_the_quality_of_weakened_predictors_falls_in_equal_steps_to_chance(drawn):
    embeds, errors, classes, labels = drawn
    options = PredictorOptions(batch_size=150, epochs=15)

    @cache
    def fit(share, order):
        return fit_predictor(embeds, errors, classes, labels, options, exchange=Exchange(share, order))

    found = [weakened_fit(fit, way / 4) for way in range(5)]
    aucs = [one.evaluation.pooled.auc for _, one in found]
    assert aucs[0] > 0.85 and found[0][0] == 0
    assert aucs == sorted(aucs, reverse=True)
    wanted = np.linspace(aucs[0], 0.5, 5)
    assert np.abs(np.array(aucs) - wanted).max() < 0.07, aucs


def samples_of(errs: np.ndarray, valid: np.ndarray | None = None) -> Samples:
    number = len(errs)
    return Samples(
        seeds=np.arange(number), errs=errs, valid=errs if valid is None else valid, risk=np.zeros(number),
        conformity=np.zeros(number), transfer={}, psnr=None,
    )  # fmt: skip


def test_differences_cover_the_truth_and_no_part_is_found_by_chance():
    """Pairs with a common cause, as equal noise is: intervals hold the true difference, Holm its error rate."""
    rng = np.random.default_rng(5)
    covered, false_alarms, found = 0, 0, 0
    for _ in range(60):
        noise = rng.normal(size=60)
        whole = samples_of(noise + rng.normal(size=60) > 0)
        idle = {f"idle-{number}": samples_of(noise + rng.normal(size=60) > 0) for number in range(12)}
        # A normal variable with variance 2 exceeds 1 in 24 % of cases.
        rows = {name: differences(whole, samples) for name, samples in idle.items()}
        rows["effect"] = differences(whole, samples_of(noise + rng.normal(size=60) > 1))
        change = rows["effect"]["errors"].change
        covered += change.low <= 0.23975 - 0.5 <= change.high
        p_values = adjusted(rows)
        false_alarms += any(p_values[name]["errors"] < 0.05 for name in idle)
        found += p_values["effect"]["errors"] < 0.05
    assert covered >= 0.9 * 60 and false_alarms <= 0.07 * 60 and found > 0.5 * 60


def test_only_samples_of_equal_noise_are_compared():
    whole, other = samples_of(np.array([True, True, False, False])), samples_of(np.array([False, True, True, True]))
    other = dataclasses.replace(other, seeds=np.array([9, 3, 2, 8]))
    # Noise 2 and 3 are in both, in another order.
    assert differences(whole, other)["errors"].change.value == 1.0
    assert differences(whole, dataclasses.replace(other, seeds=np.arange(4) + 50)) == {}


def test_a_single_sample_has_figures_and_no_differences():
    """Also a row whose samples have all failed."""
    spec = spec_of(parts=["screening"], predictor_steps=2, components=[1, 3], data="digits:validation")
    made = design(spec, parse_job(raw_job()))
    one = samples_of(np.array([True]))
    samples = {arm.name: one for arm in made.arms} | {"nothing": samples_of(np.zeros(0, dtype=bool))}
    quality = Predictor(exchanged=0.0, auc=0.9, low=0.8, high=0.95, num_errors=30)
    outcome = outcome_of(Results(design=made, samples=samples, predictors=(quality, quality)), [])
    assert [table.name for table in outcome.tables] == ["table", "predictor", "components"]
    assert outcome.tables[0].rows[-1][1:5] == (0, None, None, None)
    assert [text.partition(" by")[0] for text in outcome.findings] == ["Draws a sample"]
    assert any("differences need two samples a row" in note for note in outcome.notes)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished study of two parts."""
    folder = tmp_path_factory.mktemp("ablate")
    raw = raw_job(requests=[raw_request(twin=True)])
    file = write_study(folder / "study.yaml", job=raw, parts=["screening", "mixture"])
    call_ablate(file, folder / "study")
    return file, folder / "study"


def test_a_study_ends_in_its_table_figure_and_findings(finished):
    _, home = finished
    table = pq.read_table(home / "table.parquet").to_pylist()
    assert [row["recipe"] for row in table] == [
        "whole recipe", "without screening", "without mixture", "prompt alone",
    ]  # fmt: skip
    assert all(row["n"] == 2 for row in table) and table[0]["change"] is None and table[1]["p"] == 1.0
    assert table[0]["draws"] > table[1]["draws"] == 1.0 and table[3]["draws"] is None
    assert table[0]["psnr"] > 5 and table[3]["psnr"] is None
    document = read_study(open_store(str(home)))
    assert [one.name for one in document.tables] == ["table", "differences"]
    assert [one.name for one in document.figures] == ["figure"] and "without mixture" in document.figures[0].svg
    assert [text.partition(":")[0] for text in document.findings[:2]] == ["Without screening", "Without mixture"]


def test_rows_are_what_the_run_has_and_begin_with_the_same_noise(finished):
    _, home = finished
    run = open_study(str(home / "runs" / "ablation"))
    names = [request.name for request in run.job.requests]
    rows = {name: list(read_attempts(run, [name], ["seed", "prompt", "risk", "screened"])) for name in names}
    assert {tuple(row["seed"] for row in some) for some in rows.values()} == {tuple(r["seed"] for r in rows["whole"])}
    assert not any(row["screened"] for row in rows["without-screening"])
    table = {row["recipe"]: row for row in pq.read_table(home / "table.parquet").to_pylist()}
    risks = [row["risk"] for row in rows["without-screening"]]
    assert table["without screening"]["risk"] == pytest.approx(np.median(risks))
    samples = read_samples_of(run, "whole", is_drawn=True)
    assert len(samples) == 2 and list(samples.transfer) == ["zoo:digits/classifier-b"]


def test_artefacts_differ_in_one_thing_each_and_are_kept(tmp_path):
    images = write_folder(tmp_path / "images", drawn_digits(60))
    spec = spec_of(parts=["mixture"], predictor_steps=2, components=[2], data=str(images))
    display = PlainDisplay(io.StringIO())
    context = StudyContext(tmp_path / "study", "small", lambda job: pytest.fail("no run is made"), display)
    job = parse_job(raw_job())
    made = make_artefacts(spec, design(spec, job), context)
    artefacts = {name: load_conditioning(address) for name, address in made.addresses.items()}
    own = load_conditioning(zoo_folder("zoo:digits/conditioning"))

    def weights(conditioning):
        return conditioning.fit.predictor.state()["weight_0"]

    single, first, last = artefacts["single"], artefacts["predictor-1"], artefacts["predictor-2"]
    assert single.kind == "gaussians" and torch.equal(weights(single), weights(own))
    assert first.kind == own.kind and torch.equal(first.statistics.means, own.statistics.means)
    assert not torch.equal(weights(first), weights(last))
    assert last.options["predictor"]["exchanged"] == made.predictors[1].exchanged > made.predictors[0].exchanged == 0
    assert any("not the set that the job's own artefact" in note for note in made.notes)
    # The same artefact as `riskforge prepare --components 2` makes.
    prepared = prepare_conditioning(job, str(images), display=display, folder=str(tmp_path / "other"), components=2)
    assert prepared.conditioning.digest == artefacts["components-2"].digest
    # Nothing is made again, so that the images are not even opened.
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*")}
    assert make_artefacts(spec, design(spec, job), context) == made
    assert times == {path: path.stat().st_mtime_ns for path in (tmp_path / "study").rglob("*")}


def test_predictors_and_components_have_tables_curves_and_sentences():
    """Twenty samples a row, of which screening by a good predictor makes ten errors, and by a poor one none."""
    spec = spec_of(parts=[], predictor_steps=2, components=[1, 3], data="digits:validation")
    made = design(spec, parse_job(raw_job()))
    half, none = np.arange(20) < 10, np.zeros(20, dtype=bool)
    samples = {
        arm.name: dataclasses.replace(samples_of(none if arm.name.startswith("predictor-2") else half), draws=4.0)
        for arm in made.arms
    }
    quality = Predictor(exchanged=0.0, auc=0.9, low=0.8, high=0.95, num_errors=30)
    predictors = (quality, dataclasses.replace(quality, exchanged=1.0, auc=0.5))
    outcome = outcome_of(Results(design=made, samples=samples, predictors=predictors), ["a note"])
    assert [table.name for table in outcome.tables] == ["table", "predictor", "components"]
    # The main figure has the name of one, whatever it shows.
    assert [figure.name for figure in outcome.figures] == ["figure", "components"]
    alone, *_ = outcome.findings
    assert "by predictors with an AUC of 0.90 and 0.50" in alone
    assert "errors of the target fall from 0.50 to 0.00: -0.50" in alone
    assert any("valid failures are the same in each pair, 0.50" in text for text in outcome.findings)
    [row] = [row for row in outcome.tables[1].rows if row[0] == "predictor 2, guided"]
    cells = dict(zip((column.name for column in outcome.tables[1].columns), row, strict=True))
    assert cells["auc"].value == 0.5 and cells["change"].value == -0.5 and cells["p"] < 0.01
    assert outcome.notes[-1] == "a note"


@pytest.mark.slow
def test_a_killed_study_goes_on_and_ends_in_the_same_tables(tmp_path, finished):
    file, undisturbed = finished
    home = tmp_path / "study"
    environment = {
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "PATH": "/usr/bin:/bin",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, ablate_cases.__file__, str(file), str(home)]
    # Once after the artefact, once between the shards of the run.
    for sought in ("steps/artefacts/single.json", "runs/ablation/shards/*.tar"):
        process = subprocess.Popen(command, env=environment, cwd=REPOSITORY, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + 240
        while not list(home.glob(sought)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = (home / "steps" / "artefacts" / "single.json").stat().st_mtime_ns
    call_ablate(file, home)
    assert (home / "steps" / "artefacts" / "single.json").stat().st_mtime_ns == kept
    for name in ("table.csv", "differences.csv"):
        assert (home / name).read_bytes() == (undisturbed / name).read_bytes()
