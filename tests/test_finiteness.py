"""Values that are not finite, from every model that scores: the sample fails, and the model is named.

Networks are the zoo's with poisoned weights (`tests/poisoned.py`).
"""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import engine.generation.loading
from engine.data.images import open_images
from engine.data.reading.deduplicate import embed
from engine.data.stores.opening import open_store
from engine.driver.progress import PlainDisplay
from engine.errors import EXIT_INCOMPLETE, EXIT_USER, JobError
from engine.generation.oracle_scoring import Oracles
from engine.generation.rescorer import rescore
from engine.generation.scorer import Scorer
from engine.job.plan import Cell, SampleSpec
from engine.methods.finiteness import usable_embeds, usable_logits
from engine.methods.scores import conformity, entropy, kldb, kldb_parts, risk
from engine.models.classifier import Classifier
from engine.models.clip import Clip
from engine.models.pipelines.safety import FLAGGED, SafetyChecker
from engine.studies.evaluate.extractors import ClipFeatures
from engine.studies.evaluate.image_features import VisionModels
from engine.studies.evaluate.nearest_images import find_nearest
from engine.studies.evaluate.options import EvaluateOptions
from engine.studies.evaluate.program import evaluate
from engine.studies.evaluate.summary_lines import summary_lines
from engine.studies.prepare.observation import Observer, observe
from tests.composed import TARGET, composed_job, make_run
from tests.poisoned import CLASSIFIER_POISONS, CLIP_POISONS, TEXT_POISONS, Poison, overflowing_when_bright, poisoned
from tests.test_safety import make_checker

CLIP = "zoo:digits/clip"
CLASSIFIERS = ("target", "transfer", "oracle")
CELLS = [Cell(classes=(row,), names=(name,)) for row, name in enumerate(("zero", "one"))]
SPECS = [
    SampleSpec(key=f"a-000-00{row}-0", request="a", method="prompt", cell=cell, prompt="", context="", seed=1, index=0)
    for row, cell in enumerate(CELLS)
]
# A dark and a bright image.
IMAGES = [PIL.Image.new("RGB", (32, 32), (level,) * 3) for level in (60, 250)]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip.load(CLIP)


def scorer(good_clip: Clip, good: Classifier, **models: Any) -> Scorer:
    """A scorer of good models, but for some roles."""
    chosen = {"target": good, "clip": good_clip, "transfer": good, "oracle": good, "judge": good_clip} | models
    oracles = Oracles([chosen.pop("oracle")])
    return Scorer(**chosen | {"transfer": [chosen["transfer"]], "oracles": oracles})


def check_failed(record: dict[str, Any], role: str, address: str) -> None:
    assert record["status"] == "failed" and not record["accepted"], record
    assert record["error_message"].startswith(f"models.{role} '{address}' gives ") and record["oracle_class"] == -1


@pytest.mark.parametrize("kind", CLASSIFIER_POISONS)
def test_a_classifier_in_every_role(kind: str, clip: Clip, classifier: Classifier, tmp_path: Path) -> None:
    """An argmax of NaN is class 0: as an oracle it would agree with every zero."""
    bad = Classifier.load(poisoned(TARGET, tmp_path / "bad", CLASSIFIER_POISONS[kind]))
    for role in CLASSIFIERS:
        for record in scorer(clip, classifier, **{role: bad}).records(SPECS, IMAGES):
            check_failed(record, role, bad.name)


@pytest.mark.parametrize("role", CLASSIFIERS)
def test_only_the_images_concerned_fail(role: str, clip: Clip, classifier: Classifier, tmp_path: Path) -> None:
    """The dark image's record is that which it has without a neighbour."""
    bad = Classifier.load(poisoned(TARGET, tmp_path / "bad", overflowing_when_bright))
    models = scorer(clip, classifier, **{role: bad})
    dark, bright = models.records(SPECS, IMAGES)
    check_failed(bright, role, bad.name)
    assert dark["status"] == "ok" and models.records(SPECS[:1], IMAGES[:1])[0].keys() == dark.keys()


@pytest.mark.parametrize("role", ["clip", "judge"])
@pytest.mark.parametrize("kind", CLIP_POISONS)
def test_a_clip_model_in_every_role(kind: str, role: str, clip: Clip, classifier: Classifier, tmp_path: Path) -> None:
    """Embeddings without a direction have no cosine: torch gives 0 or a wrong one where a length overflows."""
    bad = Clip.load(poisoned(CLIP, tmp_path / "bad", CLIP_POISONS[kind]))
    for record in scorer(clip, classifier, **{role: bad}).records(SPECS, IMAGES):
        check_failed(record, role, bad.name)


@pytest.mark.parametrize("role", ["clip", "judge"])
@pytest.mark.parametrize("kind", TEXT_POISONS)
def test_class_prompts_without_embedding_are_the_jobs_fault(
    kind: str, role: str, clip: Clip, classifier: Classifier, tmp_path: Path
) -> None:
    """No sample could be scored: found at load."""
    bad = Clip.load(poisoned(CLIP, tmp_path / "bad", TEXT_POISONS[kind]))
    with pytest.raises(JobError, match=rf"models\.{role}: '.*bad' gives a text embedding .* for 'a photo of a zero'"):
        scorer(clip, classifier, **{role: bad})


SPECIAL = st.sampled_from([torch.nan, torch.inf, -torch.inf, 3e38, -3e38, 1e20, 0.0, 1e-40])
ROWS = st.lists(
    st.lists(SPECIAL | st.floats(-100, 100, width=32), min_size=4, max_size=4), min_size=1, max_size=4
).map(torch.tensor)  # fmt: skip


@given(ROWS)
def test_usable_logits_have_finite_scores(logits: torch.Tensor) -> None:
    """Every score of a row that passes is finite, and a row that is not finite never passes."""
    usable, labels = usable_logits(logits), torch.zeros(len(logits), dtype=torch.long)
    found = [risk(logits, labels), entropy(logits), kldb(logits, [0, 3]), *kldb_parts(logits, [1, 2, 3])]
    assert all(one[usable].isfinite().all() for one in found)
    assert not usable[~logits.isfinite().all(1)].any()
    assert usable[(logits.abs() <= 100).all(1)].all()


@given(ROWS)
def test_usable_embeddings_have_a_true_cosine(embeds: torch.Tensor) -> None:
    """Against the cosine in double precision."""
    usable, text = usable_embeds(embeds), torch.tensor([1.0, 2.0, -1.0, 0.5])
    double = embeds.double()
    expected = (double @ text.double()) / double.norm(dim=1) / text.double().norm()
    assert torch.allclose(conformity(embeds, text)[usable].double(), expected[usable], atol=1e-5)


# Commands ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twenty composed digits, without rules."""
    job = composed_job(tmp_path_factory.mktemp("finite") / "run", count=1)
    return make_run(job.model_copy(update={"requests": job.requests[:1]}))


@pytest.mark.parametrize("option", ["--target", "--transfer", "--oracle"])
def test_rescoring_counts_and_names(option: str, run: Path, tmp_path: Path, call: Any) -> None:
    """Rows of images that have no new score fail with the classifier's name; the exit code is not that of success."""
    copy = shutil.copytree(run, tmp_path / "run")
    bad = poisoned(TARGET, tmp_path / "bad", overflowing_when_bright)
    models = {"--target": TARGET} | {option: bad}
    arguments = [part for pair in models.items() for part in pair]
    code, out, err = call("rescore", str(copy), *arguments, "--json", "--output", str(tmp_path / "new"))
    told = json.loads(out)
    rows = pq.read_table(tmp_path / "new/metadata.parquet").to_pylist()
    failed = [row for row in rows if row["status"] == "failed"]
    assert code == EXIT_INCOMPLETE and told["num_failed"] == len(failed) and 0 < len(failed) < len(rows), err
    assert told["failure"].startswith(f"models.{option[2:]} '{bad}' gives logits that are not finite")
    assert all(row["error_message"] == told["failure"] and not row["accepted"] for row in failed)
    assert told["num_images"] + told["num_failed"] == len(rows)


def test_rescoring_by_a_broken_classifier_ends_with_its_name(run: Path, tmp_path: Path, call: Any) -> None:
    """No image has a new score, and there is nothing to compare."""
    bad = poisoned(TARGET, tmp_path / "bad", CLASSIFIER_POISONS["nan in all classes"])
    code, out, err = call("rescore", str(run), "--target", bad, "--output", str(tmp_path / "new"))
    assert code == EXIT_INCOMPLETE and "0 of 20 samples have an image and a new score" in out
    assert f"error: 20 of 20 images have no new score: models.target '{bad}' gives logits" in err
    assert "Traceback" not in err


def test_an_evaluation_goes_on_without_some_images(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted and named in its document and on the terminal; rows and records stay together."""
    embeds = Clip.image_embeds

    def spoiled(self: Clip, images: Any) -> torch.Tensor:
        made = embeds(self, images)
        return made.index_fill(0, torch.tensor([1, 2]), torch.nan) if len(made) > 2 else made

    monkeypatch.setattr(Clip, "image_embeds", spoiled)
    log = io.StringIO()
    done = evaluate(
        str(run), EvaluateOptions(features="clip"), display=PlainDisplay(log), folder=str(tmp_path / "out")
    ).evaluation
    [line] = done.left_out
    assert line.startswith(f"2 of 20 images: models.clip '{CLIP}' gives an image embedding") and line in log.getvalue()
    assert sum(done.samples.values()) == 18 and summary_lines(done)[0] == f"left out: {line}"
    assert line.split("'")[0] in (tmp_path / "out/report.html").read_text()


def test_a_deep_check_names_the_model(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that computes nonsense is told from scores that are others."""
    bad = Classifier.load(poisoned(TARGET, tmp_path / "bad", CLASSIFIER_POISONS["+inf"]))
    loaded = engine.generation.loading.load_scorer

    def load(job: Any, **options: Any) -> Scorer:
        models = loaded(job, **options)
        models._oracles = Oracles([bad])
        return models

    monkeypatch.setattr(engine.generation.loading, "load_scorer", load)
    findings = rescore(open_store(str(run)), num_samples=3)
    assert len(findings) == 3 and all(f"models.oracle '{bad.name}' gives" in one.text for one in findings)


def test_a_price_is_not_asked_of_samples_that_fail(tmp_path: Path, call: Any) -> None:
    """The batch that is measured says what a run would end with."""
    bad = poisoned(
        "zoo:digits/oracle", tmp_path / "bad", lambda weights: [one.fill_(torch.nan) for one in weights.values()]
    )
    models = {"diffusion": "zoo:digits/stable-diffusion", "clip": CLIP, "target": TARGET, "oracle": bad}
    request = {"name": "a", "method": "prompt", "classes": ["three"], "count": 1}
    job = {"name": "job", "models": models, "requests": [request], "sampling": {"num_inference_steps": 2}}
    (tmp_path / "job.yaml").write_text(json.dumps(job | {"output": {"uri": str(tmp_path / "run")}}))
    code, _, err = call("plan", str(tmp_path / "job.yaml"), "--calibrate")
    assert (
        code == EXIT_USER
        and f"all 1 samples of the measured batch failed, so a run would make none: models.oracle '{bad}'" in err
    )


def hooked(clip: Clip, rows: list[int]) -> Any:
    """Let a CLIP model give NaN for some rows of a call."""

    def spoil(_module: Any, _given: Any, made: torch.Tensor) -> torch.Tensor:
        return made.index_fill(0, torch.tensor(rows), torch.nan)

    return clip._model.visual_projection.register_forward_hook(spoil)


def test_an_evaluation_leaves_out_what_has_no_embedding(clip: Clip) -> None:
    """Of samples, and of training images: one NaN among them would hide all others of its batch."""
    models = VisionModels(clip, ClipFeatures(CLIP))
    images = [PIL.Image.new("RGB", (32, 32), (level, 255 - level, 90)) for level in (0, 120, 250)]
    whole = models.extract((str(row), row, image) for row, image in enumerate(images))
    gone: list[tuple[str, str]] = []
    with hooked(clip, [1]):
        part = models.extract((str(row), row, image) for row, image in enumerate(images))
        training = ((f"t{row}", image) for row, image in enumerate(images))
        [found] = find_nearest([whole], training, models, lambda *one: gone.append(one))
    assert part.names == ("0", "2") and [name for name, _ in part.left_out] == ["1"]
    assert len(part.clip) == len(part.features) == len(part.pixels) == len(part.thumbnails) == 2
    assert found.names[0] == "t0" and found.names[2] == "t2" and "t1" not in found.names
    assert gone == [("t1", part.left_out[0][1])] and f"models.clip '{CLIP}' gives" in gone[0][1]


@pytest.mark.parametrize(("poison", "message"), [
    (CLIP_POISONS["nan"], "no image of .* 20 of 20 images: --clip '.*bad' gives an image embedding"),
    (TEXT_POISONS["nan"], "'.*bad' gives a text embedding"),
])  # fmt: skip
def test_an_evaluation_by_a_broken_clip_is_refused(poison: Poison, message: str, run: Path, tmp_path: Path) -> None:
    """With the model's name, and nothing written."""
    bad = poisoned(CLIP, tmp_path / "bad", poison)
    with pytest.raises(JobError, match=message):
        options = EvaluateOptions(clip=bad, features="clip")
        evaluate(str(run), options, display=PlainDisplay(io.StringIO()), folder=str(tmp_path / "out"))
    assert not (tmp_path / "out/evaluation.json").exists()


def test_near_duplicates_are_not_sought_with_broken_embeddings(tmp_path: Path) -> None:
    """NaN is near to nothing: every duplicate would stay."""
    bad = poisoned(CLIP, tmp_path / "bad", CLIP_POISONS["nan"])
    with pytest.raises(JobError, match=r"--deduplicate: the CLIP model '.*bad' gives an image embedding"):
        embed(IMAGES, bad, lambda text: None)


@pytest.mark.parametrize("role", ["target", "encoder"])
def test_preparing_leaves_out_and_names(role: str, clip: Clip, classifier: Classifier, tmp_path: Path) -> None:
    """Images without logits or embedding are unusable, and where none is left that is the reason that is given."""
    for name, image in (("zero", IMAGES[0]), ("one", IMAGES[1])):
        (tmp_path / "data" / name).mkdir(parents=True)
        image.save(tmp_path / "data" / name / "a.png")
    source, display = open_images(str(tmp_path / "data"), tuple(classifier.labels)), PlainDisplay(io.StringIO())
    if role == "target":
        bad = Classifier.load(poisoned(TARGET, tmp_path / "bad", overflowing_when_bright))
        [unusable] = observe(Observer(source, bad, clip, 2), "data", display).unusable
        assert "one" in unusable.name and unusable.reason.startswith(f"models.target '{bad.name}' gives logits")
    else:
        broken = Clip.load(poisoned(CLIP, tmp_path / "bad", CLIP_POISONS["nan"]))
        with pytest.raises(JobError, match=r"the image encoder '.*bad' gives an image embedding that is not finite"):
            observe(Observer(source, classifier, broken, 2, broken.name), "data", display)


def test_a_safety_checker_lets_nothing_through_that_it_cannot_judge(hardware: Any, tmp_path: Path) -> None:
    """NaN compares as "not flagged"."""
    from transformers import CLIPImageProcessor

    def flagged(checker: SafetyChecker) -> list[str]:
        return checker.faults_of(checker.preprocess(IMAGES))

    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model = make_checker()
    assert flagged(SafetyChecker(model, processor, hardware)) == ["", ""]
    model.concept_embeds_weights.data.fill_(-2)
    assert flagged(SafetyChecker(model, processor, hardware)) == [FLAGGED] * 2
    model.visual_projection.weight.data[0] = torch.nan
    assert all("safety checker gives" in one for one in flagged(SafetyChecker(model, processor, hardware)))
    processor.save_pretrained(tmp_path / "feature_extractor")
    (tmp_path / "model_index.json").write_text('{"safety_checker": ["stable_diffusion", "X"]}')
    for name in ("concept_embeds", "special_care_embeds_weights"):
        broken = make_checker()
        getattr(broken, name).data[0] = torch.nan
        broken.save_pretrained(tmp_path / "safety_checker")
        with pytest.raises(JobError, match=f"{name} of its safety checker is not finite"):
            SafetyChecker.load(tmp_path, hardware)
