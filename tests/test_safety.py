"""A pipeline's safety checker: what it flags is a failed sample, with its reason, and nobody else's business."""

import json
import shutil

import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from transformers import CLIPConfig, CLIPImageProcessor

from engine.data.images import decode_rgb
from engine.job.parsing import parse_job
from engine.job.spec import RuntimeSpec
from engine.models.addresses import resolve
from engine.models.digests import model_digests
from engine.models.hardware import choose_hardware
from engine.models.pipelines.safety import SafetyChecker
from tests.test_generator import make_generator

FLAGGED = "the pipeline's safety checker flagged the image"


def make_checker():
    """A small checker with random weights that flags nothing."""
    torch.manual_seed(0)
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = small | {"image_size": 32, "patch_size": 8, "projection_dim": 8}
    config = CLIPConfig(text_config=small | {"projection_dim": 8}, vision_config=vision, projection_dim=8)
    model = StableDiffusionSafetyChecker(config).eval()
    model.concept_embeds_weights.data.fill_(2)
    model.special_care_embeds_weights.data.fill_(2)
    return model


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """The digits pipeline with a checker that flags one image: the second sample of `make_generator`."""
    folder = tmp_path_factory.mktemp("models") / "checked"
    shutil.copytree(resolve("zoo:digits/stable-diffusion"), folder)
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor.save_pretrained(folder / "feature_extractor")
    index = json.loads((folder / "model_index.json").read_text())
    index["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    index["feature_extractor"] = ["transformers", "CLIPImageProcessor"]
    (folder / "model_index.json").write_text(json.dumps(index))
    model = make_checker()
    unwanted = decode_rgb(samples()[1].image)
    pixels = processor([unwanted], return_tensors="pt").pixel_values
    with torch.no_grad():
        model.concept_embeds.data[3] = model.visual_projection(model.vision_model(pixels)[1])[0]
    model.concept_embeds_weights.data[3] = 0.998
    model.save_pretrained(folder / "safety_checker")
    return str(folder)


def samples(**models):
    """Three samples of a job with some of its models changed."""
    zoo = {name: f"zoo:digits/{part}" for name, part in (("clip", "clip"), ("target", "classifier"))}
    generator, specs = make_generator(models={"diffusion": "zoo:digits/stable-diffusion"} | zoo | models)
    return generator.next_batch(0, specs[:3])


def test_what_is_flagged_fails_and_the_others_stay_as_they_are(pipeline):
    """diffusers would blacken it, and a black image would count as an error of the target."""
    clean, checked = samples(), samples(diffusion=pipeline)
    assert [one.record["status"] for one in checked] == ["ok", "failed", "ok"]
    assert checked[1].record["error_message"] == FLAGGED and checked[1].image == b""
    assert not checked[1].record["is_error"] and not checked[1].record["accepted"]
    for place in (0, 2):
        assert checked[place].image == clean[place].image and checked[place].record == clean[place].record


def test_off_is_another_plan(pipeline):
    """It decides which samples there are, so that a resume with it must be refused."""
    unchecked = samples(diffusion=pipeline, safety_checker="off")
    assert [one.record["status"] for one in unchecked] == ["ok"] * 3
    jobs = [parse_job(raw(pipeline, choice)) for choice in ("auto", "off")]
    digests = [model_digests(job) for job in jobs]
    assert digests[1] == digests[0] | {"safety_checker": "off"}


def raw(pipeline, choice):
    """A job as it is written."""
    return {
        "name": "job",
        "models": {
            "diffusion": pipeline,
            "clip": "zoo:digits/clip",
            "target": "zoo:digits/classifier",
            "safety_checker": choice,
        },
        "requests": [{"name": "a", "method": "prompt", "classes": "all", "count": 1}],
        "output": {"uri": "runs/job"},
    }


def test_a_pipeline_without_a_checker_has_none():
    """As the zoo's, which name none."""
    hardware = choose_hardware(RuntimeSpec(device="cpu"))
    assert SafetyChecker.load(resolve("zoo:digits/stable-diffusion"), hardware) is None
