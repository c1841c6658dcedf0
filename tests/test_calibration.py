"""The calibration of a job's target: fitted for every kind, used wherever the target is, told, refused by name."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch

from engine.commands.jobfile import read_job
from engine.data.images import open_images
from engine.data.reading.export import _common_models
from engine.data.stores.opening import open_store
from engine.driver.checks import check_job, plan_job
from engine.driver.progress import PlainDisplay
from engine.errors import JobError, OutputError
from engine.generation.loading import load_scorer
from engine.job.plan import build_plan, planned_temperature
from engine.job.spec import JobSpec
from engine.methods.temperature import TemperatureFit
from engine.models import factories, program_description
from engine.models.addresses import resolve
from engine.models.artefact_documents import document_bytes, read_document, sealed
from engine.models.artefacts import missing_artefacts
from engine.models.calibration import (
    UNCALIBRATED,
    describe_temperature,
    read_calibration,
    temperature_text,
)
from engine.models.classifier import Classifier
from engine.models.configurations import CALIBRATION_DOCUMENT as DOCUMENT
from engine.models.digests import model_digest
from engine.models.job_checks import check_addresses
from engine.models.labels import read_labels
from engine.models.trainable import load_trainable
from engine.studies.compare.baseline import pin_run, read_baseline
from engine.studies.compare.program import _differing
from engine.studies.compare.scored_run import read_scored_run
from engine.studies.evaluate.options import EvaluateOptions
from engine.studies.evaluate.program import _load
from engine.studies.loop.results import _engine_identity
from engine.studies.prepare.calibration import CalibrationFit, save_calibration
from engine.studies.prepare.observation import load_observer, merge_observations
from engine.studies.prepare.program import prepare_calibration
from engine.studies.rescore.program import rescore_run
from engine.studies.retrain.results import _temperature
from engine.studies.samples import open_study
from tests.prepare_cases import LABELS, Sample, drawn_digits, write_folder
from tests.program_cases import FACTORY, SETTINGS, job_of, write

TARGET, OTHER = "zoo:digits/classifier", "zoo:digits/classifier-b"
KINDS = ("zoo", "transformers", "timm", "script", "export", "factory")
T = 3.7


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    return drawn_digits(64)


@pytest.fixture(scope="module")
def data(samples: list[Sample], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("data"), samples)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with targets of every kind but the zoo's."""
    folder = tmp_path_factory.mktemp("targets")
    space: dict[str, Any] = {}
    exec(FACTORY, space)
    network, example = space["net"]()[0].eval(), torch.zeros(2, 3, 32, 32)
    torch.jit.trace(network, example).save(str(folder / "script.pt"))
    shapes = ({0: torch.export.Dim("batch")},)
    torch.export.save(torch.export.export(network, (example,), dynamic_shapes=shapes), folder / "export.pt2")
    for name in ("script.pt", "export.pt2"):
        (folder / f"{name}.json").write_text(json.dumps(SETTINGS))
    (folder / "calibrated_nets.py").write_text(FACTORY)
    shutil.copytree(resolve(OTHER), folder / "transformers")
    return folder


@pytest.fixture
def address_of(home: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    monkeypatch.setattr(program_description, "_KNOWN", {})
    monkeypatch.setattr(factories, "_FOLDERS", [])
    monkeypatch.setattr(sys, "path", [*sys.path])
    factories.add_import_folders([str(home)])
    others = {"zoo": TARGET, "script": str(home / "script.pt"), "export": str(home / "export.pt2")}

    def find(kind: str) -> str:
        if kind == "timm" and not (home / "timm").is_dir():
            timm = pytest.importorskip("timm")
            torch.manual_seed(0)
            network = timm.create_model("test_resnet", pretrained=False, num_classes=10).eval()
            options = {"model_config": {"label_names": list(LABELS)}, "safe_serialization": True}
            timm.models.save_for_hf(network, str(home / "timm"), **options)
        return "calibrated_nets:net" if kind == "factory" else others.get(kind, str(home / kind))

    return find


def job_for(target: str, folder: Path, calibration: Any = None, **changes: Any) -> JobSpec:
    raw = job_of(target, folder) | changes
    raw["models"] |= {"calibration": str(calibration)} if calibration else {}
    return read_job(write(raw, folder), [])


def stored(folder: Path, target: str = TARGET, fitted: float = T, bound: str = "", **changes: Any) -> Path:
    """An artefact with a temperature that no images asked for."""
    fit = TemperatureFit(current=1.0, current_nll=1.0, fitted=fitted, fitted_nll=0.5, bound=bound, num_images=2500)
    fields: dict[str, Any] = {
        "labels": LABELS,
        "counts": (250,) * 10,
        "num_errors": (1,) * 10,
        "temperature": fit,
        "models": {"target": {"address": target, "digest": model_digest(target)}},
        "images_digest": "0" * 32,
        "unusable": (),
    }
    return save_calibration(CalibrationFit(**fields | changes), folder)[0]


@pytest.fixture(scope="module")
def artefact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stored(tmp_path_factory.mktemp("artefacts"))


# Fitted for every kind of target -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_target_is_fitted_and_used(
    kind: str, address_of: Callable[[str], str], data: Path, samples: list[Sample], tmp_path: Path
) -> None:
    """No temperature beside the fitted one is better for its raw logits; a job that names it scores with it alone."""
    target = address_of(kind)
    display = PlainDisplay(io.StringIO())
    made = prepare_calibration(job_for(target, tmp_path), str(data), display=display, folder=str(tmp_path / "made"))
    own = Classifier.load(target)
    logits = own.score([image for image, _ in samples]) * own.temperature
    classes = torch.tensor([index for _, index in samples])
    fit = made.content.temperature
    assert fit.current == own.temperature and not fit.bound and fit.num_images == len(samples)

    def nll(temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits.double() / temperature, classes))

    assert nll(fit.fitted) == pytest.approx(fit.fitted_nll, abs=1e-6)
    assert nll(fit.fitted) < min(nll(fit.fitted * 1.02), nll(fit.fitted / 1.02), nll(own.temperature))
    for named in (made.path, tmp_path / "made"):
        job = job_for(target, tmp_path, named)
        check_addresses(job)
        temperature = planned_temperature(plan_job(job).identity)
        assert temperature == fit.fitted
    scorer = load_scorer(job, temperature=temperature)
    assert scorer.target.temperature == fit.fitted != own.temperature
    assert torch.allclose(scorer.target.score([samples[0][0]]) * fit.fitted, logits[:1], atol=1e-3)


def test_parts_of_the_pass_give_the_same_observations(data: Path, tmp_path: Path) -> None:
    """Without an image encoder too: what workers see, in any order, is what one process sees."""
    observer = load_observer(job_for(TARGET, tmp_path), open_images(str(data), LABELS), None)
    parts = [observer.observe(part, 3, lambda done: None) for part in range(3)]
    whole = merge_observations([observer.observe(0, 1, lambda done: None)], observer.source, "")
    divided = merge_observations(parts, observer.source, "")
    assert torch.equal(whole.logits, divided.logits) and whole.images_digest == divided.images_digest
    assert whole.embeds.shape == (64, 0)


def test_the_command_needs_the_target_alone_and_says_what_to_write(
    data: Path, tmp_path: Path, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A pipeline of the hub that nobody has, a CLIP model that is none; the line works as it is given."""
    monkeypatch.chdir(tmp_path)
    target = Path(shutil.copytree(resolve(TARGET), tmp_path / "target"))
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"temperature": 0.2}))
    raw = job_of("target", tmp_path)
    raw["models"] |= {"diffusion": "nobody/has-this", "clip": "nobody/has-this-either"}
    job = write(raw, tmp_path)
    code, out, err = call("prepare", job, "--data", data, "--only", "calibration")
    assert code == 0 and "/64 images" in err and "predictor" not in out and "statistics" not in out
    assert "for a job with this target: models: {calibration: run-calibration}" in out
    [made] = (tmp_path / "run-calibration").iterdir()
    assert [path.name for path in made.iterdir()] == [DOCUMENT] and made.name.startswith("calibration-")
    assert "existed already, equal" in call("prepare", job, "--data", data, "--only", "calibration")[1]
    path = write(job_of("target", tmp_path), tmp_path)
    code, out, _ = call("plan", path, "--validate", "--set", "models.calibration=run-calibration")
    assert code == 0 and "fitted on 64 images (run-calibration)" in out
    again = ("--set", "models.calibration=run-calibration")
    assert "for a job" not in call("prepare", path, "--data", data, "--only", "calibration", *again)[1]
    code, _, err = call("prepare", job, "--data", data, "--only", "calibration", "--components", 3)
    assert code == 2 and err.startswith("error: --components: ")


def test_a_conditioning_artefact_calibrates_as_well(tmp_path: Path) -> None:
    """Those of the zoo hold the fits of the networks that they are of."""
    plan = plan_job(job_for(TARGET, tmp_path, "zoo:digits/conditioning"))
    assert planned_temperature(plan.identity) == pytest.approx(1.4773, abs=1e-4)
    fits = [read_calibration(f"zoo:cifar10/conditioning-resnet{depth}") for depth in (20, 32)]
    assert [round(fit.temperature, 1) for fit in fits if fit] == [2.3, 2.5]
    assert {fit.num_images for fit in fits if fit} == {2500}


@pytest.mark.skipif(not Path(os.environ.get("RISKFORGE_DATA", "-"), "classifiers").is_dir(), reason="no RISKFORGE_DATA")
def test_the_networks_of_others_have_their_calibrations_in_the_zoo(tmp_path: Path) -> None:
    """By their digests: each is taken for its own network, and refused for the other."""
    for depth, other, expected in ((20, 32, 2.342), (32, 20, 2.505)):
        target, models = f"tools.targets.cifar_resnets:resnet{depth}", {"diffusion": "zoo:cifar10/stable-diffusion"}
        models |= {"clip": "zoo:cifar10/clip", "target": target}
        request = {"name": "a", "method": "prompt", "classes": ["cat"], "count": 1}
        for place, artefact in enumerate((depth, other)):
            named = models | {"calibration": f"zoo:cifar10/conditioning-resnet{artefact}"}
            raw = job_of(target, tmp_path) | {"models": named, "requests": [request]}
            job = read_job(write(raw, tmp_path), [])
            with pytest.raises(JobError, match="is the calibration of another") if place else contextlib.nullcontext():
                assert planned_temperature(plan_job(job).identity) == pytest.approx(expected, abs=1e-3)


# Refused before a worker starts --------------------------------------------------------------------------------------


def with_fit(fields: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return resealed(fields, temperature=fields["temperature"] | changes)


def resealed(fields: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A changed document whose digest is right."""
    return sealed({name: value for name, value in (fields | changes).items() if name != "digest"})


DOCUMENTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "version": (lambda fields: fields | {"schema_version": 2}, "has schema version 2, this version reads 1"),
    "digest": (lambda fields: fields | {"counts": []}, r"is not what it was \(digest\)"),
    "no document": (lambda fields: [], "is not of a calibration artefact"),
    "no fit": (lambda fields: sealed({name: fields[name] for name in ("classes", "models")}), "is not laid out"),
    **{
        f"fitted {value!r}": (
            lambda fields, value=value: with_fit(fields, fitted=value),
            "is not laid out.*not a positive number",
        )
        for value in (0, -1.0, 1e9, True, "2", None, [])
    },
    "bound": (
        lambda fields: with_fit(fields, bound={}),
        "is not laid out.*fit",
    ),
    "images": (
        lambda fields: with_fit(fields, num_images=1.5),
        "is not laid out.*fit",
    ),
    "classes": (lambda fields: resealed(fields, classes=[1, 2]), "is not laid out.*no texts"),
}


@pytest.mark.parametrize("kind", DOCUMENTS)
def test_a_document_that_is_not_one_is_refused_by_name(kind: str, artefact: Path, tmp_path: Path) -> None:
    """Damaged, of another version, or written by somebody else with a digest that is right."""
    bend, message = DOCUMENTS[kind]
    copy = Path(shutil.copytree(artefact, tmp_path / "copy"))
    fields = read_document(artefact, DOCUMENT)
    (copy / DOCUMENT).write_bytes(document_bytes(bend(fields)))
    with pytest.raises(JobError, match=f"^models.calibration: .*{message}") as caught:
        check_addresses(job_for(TARGET, tmp_path, copy))
    assert len(caught.value.problems) == 1 and "riskforge prepare" in str(caught.value)


def test_an_artefact_of_something_else_is_refused_by_name(tmp_path: Path) -> None:
    """Another target, other classes, fits without a minimum, a folder with two, paths that are none."""
    refused: list[tuple[Any, str]] = [
        (stored(tmp_path / "a", OTHER), f"is the calibration of another target, '{OTHER}' with digest"),
        (stored(tmp_path / "b", labels=("a", "b")), f"was fitted with other classes than those of '{TARGET}'"),
        (stored(tmp_path / "c", fitted=1e-3, bound="lower"), "lower bound, because the target is right on every"),
        (stored(tmp_path / "d", fitted=1e3, bound="upper"), "upper bound, because the target is no better than"),
        ("zoo:digits/oracle", "is a model, not"),
        (stored(tmp_path / "e") / DOCUMENT, "is a file; give the folder"),
        (stored(tmp_path / "e", fitted=2.0).parent, "holds 2 artefacts; name one of calibration-"),
    ]
    for named, message in refused:
        with pytest.raises(JobError, match=r"^models\.calibration: ") as caught:
            check_addresses(job_for(TARGET, tmp_path, named))
        assert message in str(caught.value)


def test_a_missing_artefact_is_named_with_its_command(tmp_path: Path, call: Any) -> None:
    """A plan says what has to be made, a run makes nothing; once where one artefact serves for both."""
    job = job_for(TARGET, tmp_path, "later")
    command = "`riskforge prepare JOB --data PATH --only calibration --output later`"
    code, out, _ = call("plan", tmp_path / "job.yaml", "--validate")
    assert code == 0 and "to prepare before the run: models.calibration: there is no artefact at 'later'" in out
    assert command in out and "temperature of the target: that of later, which is not there yet" in out
    assert call("plan", tmp_path / "job.yaml")[0] == 0
    with pytest.raises(JobError, match=r"^models\.calibration: there is no artefact"):
        check_job(job, PlainDisplay(io.StringIO()), lambda: pytest.fail("workers were prepared"))
    request = {"name": "a", "method": "prompt", "classes": "all", "count": 1, "conditioning": {"artefact": "later"}}
    [line] = missing_artefacts(job_for(TARGET, tmp_path, "later", requests=[request]))
    assert line.startswith("conditioning: ")


# Used wherever the run's target is -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(artefact: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A guided run with an artefact, which is then removed, and one whose target has that temperature itself."""
    from engine.driver.executors.local import LocalExecutor
    from engine.driver.run import run_job

    folder = tmp_path_factory.mktemp("runs")
    named, changed = (folder / name for name in ("named", "changed"))
    copy = Path(shutil.copytree(artefact, folder / "artefact"))
    target = Path(shutil.copytree(resolve(TARGET), folder / "target"))
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | {"temperature": T}))
    for output, address, calibration in ((named, TARGET, copy), (changed, str(target), None)):
        output.mkdir()
        job, display = job_for(address, output, calibration), PlainDisplay(io.StringIO())
        run_job(job, executor=LocalExecutor(1), resume="auto", confirmed=False, display=display)
    shutil.rmtree(copy)
    return named / "run", changed / "run"


SCORES = ["key", "temperature", "risk", "kldb", "entropy", "p_label", "predicted_class", "sha256"]


def test_a_calibration_is_as_good_as_a_target_that_has_the_temperature(runs: tuple[Path, Path]) -> None:
    """Bytes of guided images and their scores: guidance and scores use it, and nothing else of the artefact."""
    named, changed = (pq.read_table(run / "metadata.parquet", columns=SCORES).to_pylist() for run in runs)
    assert named == changed and {row["temperature"] for row in named} == {T}
    assert [row["sha256"] != "" for row in named] == [True, True]


def test_the_run_says_which_temperature_it_used(runs: tuple[Path, Path], tmp_path: Path, call: Any) -> None:
    """Manifest, card, report, `inspect`, the card of an export; of the other run that it is the target's own."""
    for run, text in zip(runs, (f"3.7, fitted on 2,500 images ({runs[0].parent.parent / 'artefact'})",
                                "3.7, of the target's own configuration"), strict=True):  # fmt: skip
        target = json.loads((run / "manifest.json").read_text())["models"]["target"]
        assert temperature_text(target) == text and target["temperature"] == T
        assert f"temperature {text}" in (run / "README.md").read_text()
        page = (run / "report.html").read_text().replace("&#39;", "'")
        assert f"temperature {text}" in page
        assert f"; temperature {text}\n" in call("inspect", run)[1]
        code, _, err = call("export", run, "--output", tmp_path / run.parent.name, "--format", "webdataset")
        assert code == 0, err
        assert f"temperature {text}" in (tmp_path / run.parent.name / "README.md").read_text()


def test_a_run_is_read_with_its_temperature_after_the_artefact_is_gone(
    runs: tuple[Path, Path], tmp_path: Path, call: Any
) -> None:
    """`verify --deep` scores as the run did; `evaluate` and `retrain` take its temperature, and the target's own
    where a run has none."""
    code, out, _ = call("verify", "--deep", runs[0])
    assert code == 0 and "no damage" in out
    named, changed = map(open_study, map(str, runs))
    assert (named.temperature, changed.temperature) == (T, None)
    _, target = _load(named.job, named, EvaluateOptions(real="digits:test-single"))
    assert target is not None and target.temperature == T
    for run, expected in ((named, T), (changed, T)):
        material = SimpleNamespace(calibration=None, target=load_trainable(run.job.models.target, "cpu"))
        assert _temperature(SimpleNamespace(run=run), material, None) == (expected, None)  # type: ignore[arg-type]
    begun = Path(shutil.copytree(runs[0], tmp_path / "run"))
    (begun / "manifest.json").unlink()
    assert open_study(str(begun)).temperature == T


def test_another_temperature_is_another_plan(runs: tuple[Path, Path], artefact: Path, tmp_path: Path) -> None:
    """Refused on an existing run with both values; the same temperature of another artefact is the same plan."""
    output, display = {"uri": str(runs[0])}, PlainDisplay(io.StringIO())
    same = stored(tmp_path / "same", images_digest="1" * 32)
    assert same.name != artefact.name
    checked = check_job(job_for(TARGET, tmp_path, same, output=output), display, lambda: None)
    stored_digest = json.loads((runs[0] / "manifest.json").read_text())["plan_digest"]
    assert checked.plan.digest == stored_digest
    from engine.data.run.resume import open_output

    for named, shown in ((None, "absent"), (stored(tmp_path / "other", fitted=2.0), "2.0")):
        checked = check_job(job_for(TARGET, tmp_path, named, output=output), display, lambda: None)
        with pytest.raises(OutputError, match=rf"models.temperature: 3.7 -> {shown}"):
            open_output(open_store(str(runs[0])), checked.plan, checked.job, "auto", confirmed=False)
        assert ("temperature" in checked.plan.identity["models"]) == (named is not None)


def test_a_rescoring_uses_the_temperature_that_it_says(runs: tuple[Path, Path], tmp_path: Path, call: Any) -> None:
    """The run's for the run's target, another one's own, or that of `--calibration`; each in a folder of its own."""
    run, of_other = str(runs[0]), stored(tmp_path, OTHER, fitted=2.5)
    own = Classifier.load(OTHER).temperature
    for target, calibration, temperature in ((TARGET, None, T), (OTHER, None, own), (OTHER, str(of_other), 2.5)):
        done = rescore_run(run, target, calibration=calibration)
        rows = pq.read_table(f"{done.folder}/metadata.parquet", columns=["temperature", "risk"]).to_pylist()
        assert {row["temperature"] for row in rows} == {temperature} and done.num_scored == 2
        manifest = json.loads(Path(done.folder, "manifest.json").read_text())
        assert temperature_text(manifest["models"]["target"]) == done.temperature
        named = manifest["job"]["models"].get("calibration")
        assert ("fitted" in done.temperature) == (named is not None)
        if target == TARGET:
            before = pq.read_table(f"{run}/metadata.parquet", columns=["risk"]).to_pylist()
            assert [row["risk"] for row in rows] == pytest.approx([row["risk"] for row in before], abs=1e-5)
    assert len(list((runs[0] / "rescored").iterdir())) == 3
    code, out, _ = call("rescore", run, "--target", OTHER, "--calibration", of_other)
    assert code == 0 and f"temperature: 2.5, fitted on 2,500 images ({of_other})" in out and "0 of them made now" in out
    for named, message in ((tmp_path / "none", "there is no artefact at"), (stored(tmp_path / "t"), "another target")):
        code, _, err = call("rescore", run, "--target", OTHER, "--calibration", named)
        assert code == 2 and err.startswith("error: --calibration: ") and message in err


def test_an_export_knows_a_target_that_earlier_runs_noted_no_temperature_of() -> None:
    """The digest has the target's own temperature; one of an artefact makes the scores another target's."""
    earlier: dict[str, Any] = {"address": TARGET, "digest": "d"}
    own, named = earlier | {"temperature": 1.5}, earlier | {"temperature": 1.5, "calibration": {"address": "a"}}

    def common(*targets: dict[str, Any]) -> dict[str, Any]:
        return _common_models(tuple(SimpleNamespace(models={"target": one}) for one in targets))  # type: ignore[arg-type]

    assert common(earlier, own) == {"target": earlier} and common(named, named) == {"target": named}
    assert common(own, named) == common(earlier, named) == {}


def test_a_comparison_says_that_the_scales_differ(runs: tuple[Path, Path], artefact: Path, tmp_path: Path) -> None:
    """Two runs of one target with other temperatures, from a baseline too."""
    plain = Path(shutil.copytree(runs[0], tmp_path / "plain"))
    manifest = json.loads((plain / "manifest.json").read_text())
    del manifest["models"]["target"]["calibration"]
    (plain / "manifest.json").write_text(json.dumps(manifest))
    named, own = (read_scored_run(str(run)) for run in (runs[0], plain))
    pin_run(named, tmp_path / "pinned.json")
    for old in (named, read_baseline(tmp_path / "pinned.json")):
        assert "temperature of the target: 3.7 -> its own; risk" in next(iter(_differing(old, own)))
        assert not list(_differing(old, named))


def test_a_loop_with_another_temperature_is_another_loop(artefact: Path, tmp_path: Path) -> None:
    """By the temperature, not only by the address; a loop without one is what it was."""
    folder = Path(shutil.copytree(artefact.parent, tmp_path / "artefacts"))
    first = _engine_identity(job_for(TARGET, tmp_path, folder))
    assert first is not None and first["models"]["temperature"] == T
    shutil.rmtree(folder)
    stored(folder, fitted=2.0)
    assert first != _engine_identity(job_for(TARGET, tmp_path, folder))
    plain = _engine_identity(job_for(TARGET, tmp_path))
    assert plain is not None and not plain["models"].keys() & {"temperature", "calibration"}
    # Loops that began before there were starts and twins go on.
    assert not any(request.keys() & {"start", "twin"} for request in plain["requests"])


# Told ----------------------------------------------------------------------------------------------------------------


def test_a_plan_says_where_the_temperature_is_from(home: Path, artefact: Path, tmp_path: Path, call: Any) -> None:
    """Of the artefact, of the target's own configuration, or that there is none; in one line, and in the JSON."""
    config = home / "transformers/config.json"
    plain = Path(shutil.copytree(config.parent, tmp_path / "plain"))
    fields = json.loads(config.read_text()) | {"temperature": 1.0}
    (plain / "config.json").write_text(json.dumps(fields))
    for target, named, text in (
        (TARGET, artefact, f"3.7, fitted on 2,500 images ({artefact})"),
        (TARGET, None, "1.477, of the target's own configuration"),
        (str(home / "script.pt"), None, "2, of the target's own configuration"),
        (str(plain), None, UNCALIBRATED),
    ):
        job_for(target, tmp_path, named)
        for options in ((), ("--validate",)):
            code, out, _ = call("plan", tmp_path / "job.yaml", *options)
            assert code == 0 and out.count("temperature") == 1
            assert f"temperature of the target: {text}" in out
            told = json.loads(call("plan", tmp_path / "job.yaml", "--json", *options)[1])["target"]
            assert temperature_text(told) == text and told["address"] == target
    assert describe_temperature("nobody/has-this", None) == {} and temperature_text({}) == ""


def test_a_plan_without_a_calibration_has_the_digest_that_it_had(tmp_path: Path) -> None:
    """No key of the identity is of a calibration that is not given."""
    job = job_for(TARGET, tmp_path)
    labels = read_labels(TARGET) or []
    digests = {"diffusion": {job.models.diffusion: "d"}, "clip": "c", "target": "t", "transfer": [], "oracle": ""}
    assert build_plan(job, labels, digests).identity["models"] == {
        "clip": "c", "target": "t", "transfer": [], "oracle": "",
    }  # fmt: skip


@pytest.mark.parametrize("described", [None, [], {"temperature": "2"}, {"temperature": True}, {"temperature": None}])
def test_a_description_of_something_else_says_nothing(described: Any) -> None:
    """Manifests of others, and of versions that noted no temperature."""
    assert temperature_text(described) == ""
