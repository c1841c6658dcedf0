"""Stable unCLIP with screened embeddings: against diffusers' own pipeline, against itself, and through whole runs."""

import dataclasses
import io
import json
import shutil
from pathlib import Path

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch

from engine import cli
from engine.data.images.digits import CLASS_NAMES, compose_split
from engine.errors import JobError
from engine.generation.artefact import load_conditioning, save_conditioning
from engine.generation.conditioner import DrawnEmbeddings, GivenEmbeddings, conditioning_digests, open_conditioner
from engine.generation.generator import Generator
from engine.generation.given_images import CheckedImages, read_given
from engine.job.parsing import parse_job
from engine.job.plan import build_plan, resolve_requests
from engine.methods.sampling.loop import sample
from engine.methods.sampling.spec import SamplingSpec
from engine.models.addresses import resolve
from engine.models.clip import Clip
from engine.models.diffusion import load_image_encoder, load_pipeline
from engine.models.digests import image_encoder_digest, model_digests
from engine.models.job_checks import check_addresses
from engine.models.labels import read_labels
from engine.models.pipelines.base import EMBEDDINGS, LATENTS, ImageConditioning

ZOO = "zoo:digits/"
UNCLIP = f"{ZOO}stable-unclip"
ARTEFACT = f"{ZOO}conditioning"
PROMPTS = ["a photo of a three", "a photo of a two, red ink"]


def make_job(tmp_path, *requests, **changes):
    raw = {
        "name": "job",
        "models": {
            "diffusion": UNCLIP,
            "clip": f"{ZOO}clip",
            "target": f"{ZOO}classifier",
            "oracle": f"{ZOO}oracle",
        },
        "requests": list(requests),
        "sampling": {"scheduler": "ddim", "num_inference_steps": 4, "guidance_scale": 3.0},
        "output": {"uri": str(tmp_path / "run"), "samples_per_shard": 8, "store_rejected": True},
    }
    return raw | changes


def request(name="a", method="prompt", **changes):
    return {
        "name": name,
        "method": method,
        "classes": ["three", "one"],
        "count": 4,
        "seed_group": "g",
        "conditioning": ARTEFACT,
    } | changes


def write_job(tmp_path, *requests, **changes) -> Path:
    path = tmp_path / "job.yaml"
    path.write_text(json.dumps(make_job(tmp_path, *requests, **changes)))
    return path


def run_cli(*arguments) -> int:
    """The command in this process: the models' libraries are loaded once for all tests."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", ["riskforge", *map(str, arguments)])
        cli.main()
    return end.value.code or 0


def checked(job) -> tuple[dict[str, str], list[str]]:
    """Digests of what conditions a job, and what the user is told; loads no model."""
    told: list[str] = []
    labels = read_labels(job.models.target)
    requests = resolve_requests(job, labels)
    return conditioning_digests(job, requests, CheckedImages(labels, str, told.append), told.append), told


def zoo_artefact():
    return load_conditioning(resolve_artefact())


def made(raw) -> tuple[Generator, list]:
    job = parse_job(raw)
    labels = read_labels(job.models.target)
    plan = build_plan(job, labels, model_digests(job) | {"conditioning": checked(job)[0]})
    return Generator(job, plan), [list(plan.samples(plan.shard(number))) for number in range(plan.num_shards)]


@pytest.fixture(scope="module")
def unclip(hardware):
    return load_pipeline(UNCLIP, hardware)


@pytest.mark.parametrize("level", [0, 300])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_samples_equal_those_of_the_diffusers_pipeline(level, scale, unclip):
    """Same seeds, embeddings and noise level: the order of draws, the noised embedding, the zeros without a prompt."""
    import diffusers

    embeds = torch.randn(2, *unclip.noise_shapes[EMBEDDINGS], generator=torch.Generator().manual_seed(0))
    pipeline = diffusers.StableUnCLIPImg2ImgPipeline.from_pretrained(resolve(UNCLIP))
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt=PROMPTS,
        image_embeds=embeds,
        noise_level=level,
        num_inference_steps=6,
        guidance_scale=scale,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        output_type="pt",
    ).images
    spec = SamplingSpec(scheduler="ddim", num_inference_steps=6, guidance_scale=scale)
    sampler = unclip.sampler(spec)
    noise = unclip.draw_noise([5, 6])
    conditioning = ImageConditioning(embeds=embeds, noise=noise, noise_level=level)
    with torch.no_grad():
        denoiser = unclip.denoiser(PROMPTS, spec, sampler, conditioning)
        images = unclip.decode(sample(denoiser, sampler, noise[LATENTS])).clamp(0, 1)
    assert (images - expected).abs().max() < 1e-4
    assert expected.std() > 0.02


def test_the_image_encoder_is_the_pipelines_own(unclip):
    """Its embeddings equal those that diffusers computes from the same picture, and the zoo's CLIP's."""
    image = PIL.Image.fromarray(compose_split("test", 1, seed=0).images[0])
    import diffusers

    pipeline = diffusers.StableUnCLIPImg2ImgPipeline.from_pretrained(resolve(UNCLIP))
    pixels = pipeline.feature_extractor(images=image, return_tensors="pt").pixel_values
    with torch.no_grad():
        expected = pipeline.image_encoder(pixels).image_embeds
    assert torch.allclose(load_image_encoder(UNCLIP).image_embeds([image]), expected, atol=1e-5)
    assert torch.allclose(Clip.load(f"{ZOO}clip").image_embeds([image]), expected, atol=1e-2)


def test_embeddings_do_not_depend_on_the_batch_and_arms_share_them(tmp_path):
    """Same bytes for a sample in any company; with one seed group two methods get the same draws."""
    plain, guided = request("a"), request("b", "risky", guidance={"risky": {"step": "paper", "scale": 0}})
    generator, (first, second) = made(make_job(tmp_path, plain, guided))
    whole = generator.next_batch(0, first)
    alone = generator.next_batch(0, first[3:4])
    assert alone[0].image == whole[3].image and alone[0].record == whole[3].record
    for one, other in zip(whole, generator.next_batch(1, second), strict=True):
        assert one.image == other.image and one.num_draws == other.num_draws >= 1
        assert one.record["screened"] and other.record["screened"]


def test_screened_draws_convince_the_predictor_and_others_are_marked(tmp_path):
    """What passes is above the threshold; with one draw and a high threshold most do not pass, and say so."""
    conditioning = zoo_artefact()
    strict = {"artefact": ARTEFACT, "threshold": 0.9}
    hopeless = {"artefact": ARTEFACT, "threshold": 0.999, "max_draws": 1}
    free = {"artefact": ARTEFACT, "screening": False}
    arms = [request(name, conditioning=one) for name, one in (("a", strict), ("b", hopeless), ("c", free))]
    job = parse_job(make_job(tmp_path, *arms))
    requests = resolve_requests(job, read_labels(job.models.target))
    kinds = [open_conditioner(one, UNCLIP, conditioning.labels, "cpu", conditioning.digest) for one in requests]
    assert all(isinstance(kind, DrawnEmbeddings) for kind in kinds)
    specs = [requests[0].sample(position) for position in range(8)]
    screened, unlucky, first = ([kind.draw(spec) for spec in specs] for kind in kinds)
    assert all(one.screened for one in screened)
    found = conditioning.fit.predictor.confidence(torch.stack([one.embedding for one in screened]))
    assert (found > 0.9).all()
    assert not all(one.screened for one in unlucky) and all(one.num_draws == 1 for one in unlucky)
    assert not any(one.screened or one.num_draws for one in first)
    assert any(not torch.equal(one.embedding, other.embedding) for one, other in zip(screened, first, strict=True))


def test_a_run_tells_of_its_screening_and_resumes(tmp_path, capsys):
    """Acceptance rate by class in the manifest, the flag in every row; a second run does nothing."""
    free = {"artefact": ARTEFACT, "screening": False}
    dial = {"risky": {"target_risk": 1.2, "tolerance": 0.3}}
    requests = [request("screened"), request("free", conditioning=free, accept={"is_error": True}, max_attempts="1x")]
    path = write_job(tmp_path, *requests, request("dial", "risky", conditioning=free, guidance=dial))
    assert run_cli("run", path, "--executor", "local") == 0
    output = tmp_path / "run"
    manifest = json.loads((output / "manifest.json").read_text())
    rows = pq.read_table(output / "metadata.parquet").to_pylist()
    assert {row["screened"] for row in rows if row["request"] == "free"} == {False}
    found = manifest["counts"]["screening"]
    assert list(found) == ["screened"] and [one["class_index"] for one in found["screened"]] == [1, 3]
    for one in found["screened"]:
        assert one["samples"] == 4 <= one["draws"]
        assert one["acceptance_rate"] == pytest.approx(one["screened"] / one["draws"])
    digest = zoo_artefact().digest
    assert manifest["models"]["conditioning"] == [{"address": ARTEFACT, "digest": digest}]
    card = (output / "README.md").read_text()
    assert "until the target's error predictor expects an error" in card and "not screened" in card
    assert f"{sum(one['screened'] for one in found['screened'])} of 8 samples have an embedding that passed" in card
    assert any(row["status"] == "rejected" for row in rows)
    page = (output / "report.html").read_text().replace("\u202f", " ")
    for kind, is_plain in (("prompt only", True), ("guided", False)):
        errors = [row["is_error"] for row in rows if (row["method"] == "prompt") == is_plain]
        assert f"<dd>{100 * sum(errors) / len(errors):.1f} % <span>{kind}</span>" in page
    num_draws = sum(one["draws"] for one in found["screened"])
    assert f"<td>{num_draws}</td>" in (output / "report.html").read_text()
    assert f"{num_draws} draws" in (printed := capsys.readouterr().out) and "for a risk target of 1.2" in printed
    capsys.readouterr()
    risk = np.array([row["risk"] for row in rows if row["request"] == "dial"])
    assert manifest["dials"] == {
        "dial": {
            "target_risk": 1.2,
            "tolerance": 0.3,
            "risk_median": pytest.approx(np.median(risk)),
            "share_within_tolerance": np.mean(np.abs(risk - 1.2) <= 0.3),
            "distance_median": pytest.approx(np.median(np.abs(risk - 1.2))),
        }
    }
    assert run_cli("run", path, "--executor", "local") == 0
    assert "nothing to do" in capsys.readouterr().out


def test_draws_that_never_pass_are_warned_of_each_time_and_fail_a_strict_run(tmp_path, capsys):
    """Terminal, card, report and manifest; again by the same command when nothing is left to do."""
    hopeless = {"artefact": ARTEFACT, "threshold": 0.9999999, "max_draws": 1}
    path = write_job(tmp_path, request("never", classes=["three"], count=1, conditioning=hopeless))
    text = "never: none of 1 draws for 1 samples passed the screening"
    for options, code in (((), 0), ((), 0), (("--strict",), 3)):
        assert run_cli("run", path, "--executor", "local", *options) == code
        err = capsys.readouterr().err
        assert f"warning: {text}" in err and "method: risky" in " ".join(err.split())
        assert max(len(line) for line in err.splitlines() if line.startswith(("warning", "  "))) <= 100
    output = tmp_path / "run"
    [warning] = json.loads((output / "manifest.json").read_text())["warnings"]
    assert warning.startswith(text)
    for name in ("README.md", "report.html"):
        assert text in (output / name).read_text()


def test_a_plan_warns_of_a_predictor_near_chance(tmp_path, capsys):
    """An artefact from before there was advice, too; not where nothing is screened by it."""
    folder = shutil.copytree(resolve_artefact(), tmp_path / "home/conditioning-1")
    document = json.loads((folder / "conditioning.json").read_text())
    document["predictor"]["evaluation"]["pooled"]["auc_low"] = 0.4
    (folder / "conditioning.json").write_text(json.dumps(document))
    for validate in ((), ("--validate",)):
        assert run_cli("plan", write_job(tmp_path, request(conditioning=str(tmp_path / "home"))), *validate) == 0
        assert "warning: requests.0.conditioning.artefact: the error predictor of" in (err := capsys.readouterr().err)
        assert "method: risky" in " ".join(err.split())
    free = {"artefact": str(tmp_path / "home"), "screening": False}
    for conditioning in (free, ARTEFACT):
        assert run_cli("plan", write_job(tmp_path, request(conditioning=conditioning)), "--json") == 0
        assert "warnings" not in json.loads(capsys.readouterr().out)


def test_another_artefact_is_another_run(tmp_path, capsys):
    """An artefact decides pixels: the same job with other statistics is refused, with the difference."""
    copy = tmp_path / "statistics"
    shutil.copytree(resolve_artefact(), copy)
    path = write_job(tmp_path, request(conditioning=str(copy), classes=["three"], count=1))
    assert run_cli("run", path, "--executor", "local") == 0
    document = json.loads((copy / "conditioning.json").read_text())

    conditioning = load_conditioning(copy)
    changed, _ = save_conditioning(dataclasses.replace(conditioning, images_digest="0" * 32), tmp_path / "other")
    shutil.rmtree(copy)
    shutil.copytree(changed, copy)
    capsys.readouterr()
    assert run_cli("run", path, "--executor", "local") == 2
    assert document["digest"] in capsys.readouterr().err


def resolve_artefact() -> Path:
    from engine.models.artefacts import find_artefact

    folder = find_artefact(ARTEFACT)
    assert folder is not None
    return folder


def test_given_images_are_varied_in_their_order(tmp_path):
    """Sample i of a class takes image i, from the first again after the last; ink and ground come from the image."""
    composites = compose_split("test", 60, seed=4)
    for row, (pixels, label) in enumerate(zip(composites.images, composites.labels.tolist(), strict=True)):
        folder = tmp_path / "images" / CLASS_NAMES[label]
        folder.mkdir(parents=True, exist_ok=True)
        PIL.Image.fromarray(pixels).save(folder / f"{row:03d}.png")
    three = sorted((tmp_path / "images" / "three").iterdir())
    (tmp_path / "images" / "three" / "000-torn.png").write_bytes(b"not an image")
    given = {"images": str(tmp_path / "images")}
    count = len(three) + 2
    raw = make_job(tmp_path, request(classes=["three"], count=count, conditioning=given))
    raw["sampling"]["num_inference_steps"] = 15
    generator, shards = made(raw)
    conditioner = generator._conditioners[0]
    assert isinstance(conditioner, GivenEmbeddings)
    specs = [spec for shard in shards for spec in shard]
    draws = [conditioner.draw(spec).embedding for spec in specs]
    expected = load_image_encoder(UNCLIP).image_embeds([PIL.Image.open(path).convert("RGB") for path in three])
    assert torch.allclose(torch.stack(draws[: len(three)]), expected, atol=1e-5)
    assert torch.equal(draws[len(three)], draws[0])
    # Attempts of a quota that are beyond `count` go on to further images.
    quota = request(classes=["three"], count=1, conditioning=given, accept={"is_error": True}, max_attempts=3)
    [plan] = resolve_requests(parse_job(make_job(tmp_path, quota)), CLASS_NAMES)
    digest = read_given(given["images"], CLASS_NAMES, "images").digest
    attempts = open_conditioner(plan, UNCLIP, CLASS_NAMES, "cpu", digest)
    assert torch.equal(attempts.draw(plan.sample(2)).embedding, draws[2])
    results = generator.next_batch(0, specs[: len(three)])
    corners = [np.asarray(PIL.Image.open(path).convert("RGB"))[:2, :2].mean((0, 1)) for path in three]
    for result, corner in zip(results, corners, strict=True):
        assert not result.record["screened"]
        drawn = np.asarray(PIL.Image.open(io.BytesIO(result.image)))[:2, :2].mean((0, 1))
        assert np.abs(drawn - corner).mean() < 70


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"conditioning": None}, r"requests.0.conditioning: missing; .* Stable unCLIP"),
        ({"diffusion": f"{ZOO}stable-diffusion"}, r"has no image embeddings to condition on"),
        ({"conditioning": {"artefact": ARTEFACT, "images": "x"}}, "give either `artefact`"),
        ({"conditioning": {}}, "give either `artefact`"),
        ({"conditioning": {"images": "x", "screening": True}}, "given images are not screened"),
        ({"conditioning": {"artefact": ARTEFACT, "threshold": 1}}, "threshold: 1 is not below 1; give less than 1"),
        ({"conditioning": {"artefact": ARTEFACT, "max_draws": 0}}, "max_draws: 0"),
        ({"conditioning": {"artefact": ARTEFACT, "max_draws": "1e3"}}, "is text to YAML, not a number"),
        ({"conditioning": {"artefact": ARTEFACT, "noise_level": 1000}}, "noise_level: 1000"),
        ({"conditioning": {"artifact": ARTEFACT}}, "did you mean 'artefact'"),
        ({"conditioning": [ARTEFACT]}, "neither the address of an artefact nor a mapping"),
        ({"conditioning": {"artefact": ARTEFACT, "screening": False, "threshold": 0.9}}, "threshold: has no effect"),
        ({"conditioning": str(Path(__file__))}, "is a file; give the folder of an artefact"),
        ({"conditioning": f"{ZOO}conditionin"}, "did you mean 'digits/conditioning'"),
        ({"classes": None, "boundary": ["three", "eight"]}, "embeddings are of single classes"),
        ({"conditioning": None, "accept": {"screened": True}}, "no sample is screened"),
        ({"conditioning": {"images": "x"}, "accept": {"screened": True}}, "no sample is screened"),
        ({"conditioning": f"{ZOO}clip"}, "is a model, not a conditioning artefact such as"),
        (
            {"conditioning": "s3://bucket/statistics"},
            "artefact: 's3://bucket/statistics' is not on this machine; an art",
        ),
        ({"conditioning": "/dev/null"}, "artefact: '/dev/null' is a file; give the folder of an artefact"),
        ({"conditioning": "~nobody-of-that-name/x"}, "cannot be accessed"),
    ],
)
def test_impossible_conditioning_is_refused_before_a_model_is_loaded(changes, message, tmp_path):
    """Field, value and remedy, from the job file and the configurations alone."""
    with pytest.raises(JobError, match=message):
        check_addresses(parse_job(make_job(tmp_path, request(**changes))))


def test_costs_of_a_conditioned_job_are_measured(tmp_path, capsys):
    """Planning looks at no artefact; measuring makes samples, and a worker insists on the plan's digest."""
    path = write_job(tmp_path, request(classes=["three"], count=2))
    assert run_cli("plan", path, "--calibrate", "--json") == 0
    assert json.loads(capsys.readouterr().out)["device_hours"] > 0


def test_settings_reach_into_an_address(tmp_path, capsys):
    """`--set` of a key of `conditioning` where the job has the short form."""
    path = write_job(tmp_path, request())
    assert run_cli("plan", path, "--validate", "--set", "requests.0.conditioning.threshold=0.8") == 0
    assert run_cli("plan", path, "--validate", "--set", "requests.0.conditioning.threshold=2") == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: requests.0.conditioning.threshold: 2 is not below 1; give less than 1"
    ]


def test_an_artefact_that_is_not_there_yet_is_told_and_not_run(tmp_path, capsys):
    """A job can be checked before its statistics are prepared; it does not run without them."""
    path = write_job(tmp_path, request(conditioning=str(tmp_path / "none")))
    assert run_cli("plan", path, "--validate") == 0
    assert "to prepare before the run" in capsys.readouterr().out
    assert run_cli("run", path, "--executor", "local") == 2
    assert "riskforge prepare" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"models": {"encoder": {"address": f"{ZOO}clip", "digest": "0" * 32}}}, "not those of the image encoder"),
        ({"class": 3}, r"conditioning.artefact: .*'three'\) has no image"),
    ],
)
def test_statistics_that_do_not_fit_are_refused_before_a_model_is_loaded(change, message, tmp_path):
    """Embeddings of another encoder of the same size would give pictures of anything; a class without any, none."""
    conditioning = zoo_artefact()
    models = conditioning.models | change.get("models", {})
    statistics = dataclasses.replace(conditioning.statistics, count=conditioning.statistics.count.clone())
    if "class" in change:
        statistics.count[change["class"]] = 0
    changed = dataclasses.replace(conditioning, models=models, statistics=statistics)
    folder, _ = save_conditioning(changed, tmp_path)
    with pytest.raises(JobError, match=message):
        checked(parse_job(make_job(tmp_path, request(conditioning=str(folder)))))


def test_given_images_are_checked_before_a_model_is_loaded(tmp_path):
    """Every class needs one; unusable ones are counted and named; a path that is not there names its field."""
    job = parse_job(make_job(tmp_path, request(conditioning={"images": str(tmp_path / "none")})))
    with pytest.raises(JobError, match=r"^requests.0.conditioning.images: there is no "):
        checked(job)
    folder = tmp_path / "images" / "three"
    folder.mkdir(parents=True)
    PIL.Image.new("RGB", (32, 32)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"torn")
    given = {"images": str(tmp_path / "images")}
    with pytest.raises(JobError, match="no usable image of class 'one'"):
        checked(parse_job(make_job(tmp_path, request(conditioning=given))))
    _, told = checked(parse_job(make_job(tmp_path, request(conditioning=given, classes=["three"]))))
    assert len(told) == 1 and "1 of" in told[0] and "b.png" in told[0]


def test_a_predictor_of_another_target_is_told(tmp_path):
    """After retraining the old artefact still runs, but what it seeks are the errors of yesterday's target."""
    raw = make_job(tmp_path, request())
    assert checked(parse_job(raw))[1] == []
    raw["models"]["target"] = f"{ZOO}classifier-b"
    (told,) = checked(parse_job(raw))[1]
    assert "riskforge prepare" in told


def test_a_worker_that_sees_another_artefact_stops(tmp_path):
    """A folder that is not the driver's would make samples under the wrong plan."""
    job = parse_job(make_job(tmp_path, request()))
    plan = build_plan(job, read_labels(job.models.target), model_digests(job) | {"conditioning": {ARTEFACT: "0" * 32}})
    with pytest.raises(JobError, match="a folder that all machines share"):
        Generator(job, plan)


def test_the_zoo_statistics_are_of_the_zoo_models():
    """A part that is trained anew without them would leave statistics of a space that is gone."""
    conditioning = zoo_artefact()
    assert conditioning.models["encoder"]["digest"] == image_encoder_digest(UNCLIP)
    assert conditioning.fit.evaluation.pooled.auc_low > 0.85
    assert not conditioning.notes()
