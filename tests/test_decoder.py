"""A tiny decoder for guidance: it decodes the latents that the full one decodes, and only guidance sees its pixels."""

import json

import pytest
import torch

from engine.data.images.digits import compose_split
from engine.driver.checks import describe_models
from engine.errors import JobError
from engine.generation.generator import Generator
from engine.job.parsing import parse_job
from engine.job.plan import build_plan
from engine.models.decoder import GuidanceDecoder
from engine.models.digests import model_digest, model_digests
from engine.models.job_checks import check_addresses
from engine.models.labels import read_labels

ZOO = "zoo:digits/"
TINY = f"{ZOO}tiny-autoencoder"


def make_job(*requests, decoder=TINY):
    common = {"boundary": ["three", "eight"], "count": 3, "seed_group": "same"}
    models = {"diffusion": f"{ZOO}stable-diffusion", "clip": f"{ZOO}clip", "target": f"{ZOO}classifier"}
    raw = {
        "name": "job",
        "models": models | ({"guidance_decoder": decoder} if decoder else {}),
        "requests": [common | one for one in requests],
        "sampling": {"num_inference_steps": 12, "guidance_scale": 3.0},
        "guidance": {"boundary": {"every": 3}},
        "output": {"uri": "runs/job"},
    }
    return parse_job(raw)


def boundary(name="guided", **changes):
    return {"name": name, "method": "boundary"} | changes


def made(job):
    plan = build_plan(job, read_labels(job.models.target), model_digests(job))
    return Generator(job, plan), plan


def test_it_decodes_the_latents_of_the_pipeline(diffusion, hardware):
    """Scaled latents go in, as TAESD has it: divided by the pipeline's factor they would be another picture."""
    pixels = torch.from_numpy(compose_split("test", 40, seed=3).images).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        latents = diffusion._vae.encode(pixels).latent_dist.mean * diffusion._vae.config.scaling_factor
        full, tiny = diffusion.decode(latents), GuidanceDecoder.load(TINY, hardware).decode(latents)
        unscaled = GuidanceDecoder.load(TINY, hardware).decode(latents / diffusion._vae.config.scaling_factor)
    assert (tiny - full).abs().mean() < 0.06
    assert (unscaled - full).abs().mean() > 2 * (tiny - full).abs().mean()


def test_guidance_goes_through_it_and_the_stored_image_does_not():
    """Guidance of size zero stores the bytes of plain sampling; real guidance brings the samples to the boundary."""
    still = boundary("still", guidance={"boundary": {"alpha": 0.0, "step": "norm"}})
    generator, plan = made(make_job({"name": "plain", "method": "prompt"}, still, boundary()))
    plain, unmoved, guided = (
        generator.next_batch(one.number, [one.sample(place) for place in range(3)]) for one in plan.requests
    )
    assert [one.image for one in unmoved] == [one.image for one in plain]
    assert all(one.record["guided_steps"] == 4 for one in guided)
    medians = [sorted(one.record["kldb"] for one in some)[1] for some in (plain, guided)]
    assert medians[1] < 0.5 * medians[0]


def test_it_is_part_of_the_plan_and_of_the_record():
    """It decides pixels: another decoder is another run; without one the identity is what it was."""
    job, without = make_job(boundary()), make_job(boundary(), decoder=None)
    digests = model_digests(job)
    labels = read_labels(job.models.target)
    plans = [build_plan(one, labels, model_digests(one)) for one in (job, without)]
    assert digests["guidance_decoder"] == model_digest(TINY) == plans[0].identity["models"]["guidance_decoder"]
    assert "guidance_decoder" not in plans[1].identity["models"] and plans[0].digest != plans[1].digest
    described = describe_models(job, digests | {"conditioning": {}}, labels)
    assert described["guidance_decoder"].items() >= {"address": TINY, "digest": model_digest(TINY)}.items()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"latent_channels": 16},
            r"of 16 channels; those of 'zoo:digits/stable-diffusion' have 4 channels, and 4 times",
        ),
        ({"num_decoder_blocks": [3, 3, 3, 1]}, r"images 8 times the size of latents of 4 channels; .* and 4 times"),
        ({"_class_name": "AutoencoderKL"}, "is of class AutoencoderKL; an AutoencoderTiny is needed"),
    ],
)
def test_one_that_does_not_fit_is_refused_before_loading(config, message, tmp_path):
    """Channels, size and kind are seen from the configurations, and both sides are named."""
    whole = {"_class_name": "AutoencoderTiny", "latent_channels": 4, "num_decoder_blocks": [1, 1, 1]} | config
    (tmp_path / "config.json").write_text(json.dumps(whole))
    with pytest.raises(JobError, match=message):
        check_addresses(make_job(boundary(), decoder=str(tmp_path)))
