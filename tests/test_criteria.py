"""The criteria that are built in: their values, what they need, what a plan records, and samples that they guide."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import torch
from torch import Tensor

from engine.driver.checks import check_job, describe_models, find_images, plan_job
from engine.driver.progress import PlainDisplay
from engine.errors import JobError
from engine.generation.generator import Generator
from engine.generation.scene_scorers import scene_classifier, scene_encoder
from engine.job.parsing import parse_job
from engine.job.plan import resolve_requests
from engine.job.spec import JobSpec
from engine.methods.custom.criteria import disagreement, entropy, feature, margin
from engine.methods.guidance.scene import GivenFeatures, SceneScorer
from engine.methods.registry import CRITERIA, USER_CODE, find_method
from engine.models.classifier import Classifier
from engine.models.clip import Clip
from engine.models.custom_methods import load_method
from engine.models.digests import model_digests
from engine.models.job_checks import check_addresses
from tests.guidance_scenes import scene_of, unused
from tests.model_cases import NAMES, as_tensor, photographs

MODELS = {"diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip", "target": "zoo:digits/classifier"}
SECOND, ORACLE = "zoo:digits/classifier-b", "zoo:digits/oracle"


def job_of(method: str, custom: dict[str, Any] | None = None, uri: str = "runs/x", **models: Any) -> JobSpec:
    request = {"name": "a", "method": method, "classes": ["three", "eight"], "count": 1}
    return parse_job(
        {
            "name": "job",
            "models": MODELS | models,
            "requests": [request],
            "sampling": {"num_inference_steps": 8, "guidance_scale": 3.0},
            "guidance": {"custom": custom or {}},
            "output": {"uri": uri},
            "runtime": {"device": "cpu"},
        }
    )


def logits_scorer(logits: Tensor) -> SceneScorer:
    return SceneScorer(name="m", logits=lambda images: logits, embeds=unused, text_embeds=unused)


def test_values_are_those_of_their_definitions() -> None:
    """Of predictions with known entropy, margin and divergence; a goal that is reached is exactly zero."""
    even, sure, two = [0.0, 0.0, 0.0, 0.0], [60.0, 0.0, 0.0, 0.0], [5.0, 4.0, -60.0, -60.0]
    logits = torch.tensor([even, sure, two])
    images, scene = torch.zeros(3, 3, 4, 4), scene_of([(0,)] * 3, lambda _: logits)
    p = torch.tensor([0.731058578630, 0.268941421370])
    of_two = float(-(p * p.log()).sum())
    expected = torch.tensor([0.0, math.log(4), math.log(4) - of_two])
    torch.testing.assert_close(entropy()(images, scene), expected, atol=1e-5, rtol=0)
    assert entropy(0.3)(images, scene)[2] == 0, "0.58 nats are more than 0.3 log 4"
    torch.testing.assert_close(margin()(images, scene), torch.tensor([0.0, 60.0, 1.0]))
    torch.testing.assert_close(margin(1.5)(images, scene), torch.tensor([0.0, 58.5, 0.0]))
    # The second model knows a class more, and is sure of another class, of the same, and of one that is only its own.
    other = torch.tensor([[0.0, 0.0, 0.0, 0.0, -90.0], [0.0, 60.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0, 90.0]])
    scene = dataclasses.replace(scene, scorers={"target": logits_scorer(logits), "target.1": logits_scorer(other)})
    found = disagreement(share=1.0)(images, scene)
    torch.testing.assert_close(found, torch.tensor([math.log(2), 0.0, 0.0]), atol=1e-5, rtol=0)
    # Half of the way between (1, 0) and (1/2, 1/2), by hand.
    scene = dataclasses.replace(scene, scorers={
        "target": logits_scorer(torch.tensor([[60.0, 0.0]] * 3)), "oracle": logits_scorer(torch.zeros(3, 2)),
    })  # fmt: skip
    by_hand = 0.5 * math.log(1 / 0.75) + 0.5 * (0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25))
    found = disagreement("oracle", share=1.0)(images, scene)
    torch.testing.assert_close(found, torch.full((3,), math.log(2) - by_hand), atol=1e-5, rtol=0)


def test_features_are_compared_with_the_given_images_of_the_class() -> None:
    """Of a joint prompt with those of all of its classes; never with the nearer one of another class."""
    embeds = torch.tensor([[2.0, 0.0], [2.0, 0.0], [2.0, 0.0]])
    given = GivenFeatures(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), torch.tensor([7, 3, 3]))
    clip = SceneScorer(name="c", logits=unused, embeds=lambda images: embeds, text_embeds=unused)
    scene = dataclasses.replace(scene_of([(7,), (3,), (3, 7)], unused), scorers={"clip": clip}, given=given)
    torch.testing.assert_close(feature()(torch.zeros(3, 3, 4, 4), scene), torch.tensor([0.0, 1.0, 0.0]))
    torch.testing.assert_close(feature(0.4)(torch.zeros(3, 3, 4, 4), scene), torch.tensor([0.0, 0.6, 0.0]))


def test_scorers_are_the_jobs_models_whatever_the_images_are() -> None:
    """Of float64 and half images, too: float32 as the models score, on the device of the images, with a gradient."""
    model, clip = Classifier.load(SECOND), Clip.load(MODELS["clip"])
    classifier, encoder = scene_classifier(model, "cpu"), scene_encoder(clip, "cpu")
    images = as_tensor(photographs((32, 32))[0])
    for dtype in (torch.float64, torch.float16):
        given = images.to(dtype).requires_grad_(True)
        for measured, plain in (
            (classifier.logits(given), model.logits(given.float())),
            (encoder.embeds(given), clip.embeds_of_tensor(given.float())),
        ):
            assert measured.dtype == torch.float32 and torch.equal(measured, plain)
            assert torch.autograd.grad(measured.sum(), given)[0].abs().max() > 0
    assert torch.equal(encoder.text_embeds(["a three"]), clip.text_embeds(["a three"]))
    for call in (encoder.logits, classifier.embeds):
        with pytest.raises(LookupError, match=r"has no (logits|embeddings): it is a"):
            call(images)


@pytest.mark.parametrize(
    ("method", "custom", "models", "message"),
    [
        ("entropy", {"parameters": {"share": 0}}, {}, "parameters.share: 0 is not a number above 0 and at most 1"),
        ("entropy", {"parameters": {"shares": 1}}, {}, "got an unexpected keyword argument 'shares'; it takes share"),
        ("margin", {"parameters": {"goal": -1}}, {}, "parameters.goal: -1 is not a number from 0 to 100"),
        ("margin", {"parameters": {"goal": True}}, {}, "parameters.goal: True is not a number"),
        ("disagreement", {}, {}, "'target.1' is no second classifier that may guide (there are: none); give a list in"),
        ("disagreement", {"parameters": {"other": "transfer.0"}}, {"target": [MODELS["target"], SECOND]},
         "'transfer.0' is no second classifier that may guide (there are: target.1)"),
        ("feature", {}, {}, "'feature': guidance.custom.images: names no images to be near to; give labelled ones"),
    ],
)  # fmt: skip
def test_what_a_criterion_lacks_is_refused_by_name(
    method: str, custom: dict[str, Any], models: dict[str, Any], message: str
) -> None:
    """By `plan --validate` and `run`, before a worker starts."""
    with pytest.raises(JobError) as caught:
        check_addresses(job_of(method, custom, **models))
    [line] = caught.value.problems
    assert line.startswith(f"requests.0.method: '{method}'") and message in line, line


def test_an_oracle_that_a_criterion_sees_is_no_evidence() -> None:
    """It must be there; it is marked as one that guides, and a rule cannot ask it."""
    custom = {"with_oracle": True, "parameters": {"other": "oracle"}}
    with pytest.raises(JobError, match=r"^guidance\.custom\.with_oracle: there is no oracle that the criterion"):
        job_of("disagreement", custom)
    job = job_of("disagreement", custom, oracles=[SECOND, ORACLE])
    check_addresses(job)
    assert job.oracle_guides and job.independent_oracles == (SECOND,)
    assert not job_of("entropy", {"with_oracle": False}).oracle_guides
    digests = model_digests(job)
    assert describe_models(job, digests, NAMES)["oracles"][-1]["guides"]


def test_jobs_without_the_new_fields_are_stored_as_before() -> None:
    """No new key in job or plan; the name of a criterion is a method, whose section is `guidance.custom`."""
    for method in ("entropy", "own:method"):
        job = job_of(method, {"with_oracle": False})
        stored = json.loads(json.dumps(job.model_dump(mode="json")))
        assert not {"with_oracle", "images"} & stored["guidance"]["custom"].keys() and parse_job(stored) == job
        assert not {"with_oracle", "images"} & job.parameters_of(job.requests[0]).identity().keys()
    identity = plan_job(job_of("entropy")).identity["requests"][0]
    assert identity["method"] == "entropy" and not {"method_digest", "given_images"} & identity.keys()
    records = [find_method(name) for name in CRITERIA]
    assert all(one is not None and one.name == USER_CODE.name and not one.is_user_code for one in records)


@pytest.fixture
def pictures(tmp_path: Path) -> str:
    """Two images of each class that is asked for."""
    for place, name in enumerate(("three", "eight")):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for number, image in enumerate(photographs((32, 32), (40, 32))):
            turned = image.rotate(90 * place, expand=True)
            turned.save(tmp_path / "pictures" / name / f"{number}.png")
    return str(tmp_path / "pictures")


def test_given_images_are_part_of_the_plan(pictures: str) -> None:
    """By their pixels and classes, not their address; they must be there, with the classes that are asked for."""
    job = job_of("feature", {"images": pictures})
    check_addresses(job)
    [request] = plan_job(job, PlainDisplay(io.StringIO())).identity["requests"]
    assert len(request["given_images"]) == 32 and "images" not in request["guidance"]
    PIL.Image.new("RGB", (32, 32)).save(Path(pictures, "three", "0.png"))
    assert plan_job(job, PlainDisplay(io.StringIO())).identity["requests"][0]["given_images"] != request["given_images"]
    for path in Path(pictures, "eight").iterdir():
        path.unlink()
    with pytest.raises(JobError, match=r"requests\.0\.guidance\.custom\.images: .* image of class 'eight'"):
        plan_job(job, PlainDisplay(io.StringIO()))
    job = job_of("feature", {"images": f"{pictures}-none"})
    with pytest.raises(JobError, match=r"^requests\.0\.guidance\.custom\.images: "):
        find_images(job, resolve_requests(job, NAMES), NAMES)


def test_criteria_guide_samples(pictures: str, tmp_path: Path) -> None:
    """With the zoo's models, all in one job: the distance that each measures falls, on the same noise; and each keeps
    the contract of a user's criterion, as `prepare` tries it."""
    custom = {"every": 1, "cap": 0.3, "images": pictures}
    raw = job_of("entropy", custom, str(tmp_path / "run"), target=[MODELS["target"], SECOND]).model_dump(mode="json")
    same = raw["requests"][0] | {"classes": ["three"], "seed_group": "same"}
    raw["requests"] = [same | {"name": name, "method": name} for name in CRITERIA]
    job = parse_job(raw)
    plan = check_job(job, PlainDisplay(io.StringIO()), lambda: None).plan
    generator = Generator(job, plan)
    for request in plan.requests:
        name, specs = request.spec.method, [next(plan.samples(plan.shard(request.number)))] * 2
        scene = generator._guides.scene([(3,)], generator._decoding(request.number))
        given = generator._guides._given.get(request.number)
        scene = dataclasses.replace(scene, scorers=generator._guides._scorers(), given=given)
        plain, guided = (
            generator.sample(request.number, specs, [], is_guided=is_guided)[0][:1].clamp(0, 1)
            for is_guided in (False, True)
        )
        with torch.no_grad():
            before, after = (float(load_method(name, {})(images, scene)) for images in (plain, guided))
        assert after < 0.9 * before, (name, before, after)
