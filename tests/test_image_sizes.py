"""Images of another size than the model's own: as diffusers makes them, in stored images, starts and estimates."""

from __future__ import annotations

import pytest
import torch

from engine.driver.cost import image_size
from engine.errors import JobError
from engine.generation.decoder_advice import _counted, _latents
from engine.generation.generator import Generator
from engine.job.parsing import parse_job
from engine.job.plan import build_plan
from engine.methods.sampling.spec import SamplingSpec
from engine.models.diffusion import load_pipeline
from engine.models.job_checks import check_addresses
from engine.models.pipelines.stable_diffusion import StableDiffusion
from tests.tiny_pipelines import by_diffusers, by_engine, job_of, load_reference, save_pipeline

LABELS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A pipeline whose own images have 32 x 32 pixels."""
    return save_pipeline(tmp_path_factory.mktemp("sized") / "pipeline")


@pytest.mark.parametrize(("height", "width"), [(48, 40), (None, 64), (40, None)])
def test_images_of_a_size_are_those_of_diffusers(folder, hardware, height, width):
    """One side may be left out; diffusers takes both sides or none."""
    model = load_pipeline(str(folder), hardware)
    sized = model.in_size(SamplingSpec(height=height, width=width))
    reference = by_diffusers(load_reference(folder), 3, height=height or 32, width=width or 32)
    assert sized.image_shape == (3, height or 32, width or 32) == tuple(reference.shape[1:])
    torch.testing.assert_close(by_engine(sized, 3, scheduler="model"), reference, rtol=0, atol=1e-5)
    # The pipeline that others sample with keeps its size.
    assert model.image_shape == (3, 32, 32) and model.in_size(SamplingSpec(height=32)) is model


def test_starts_are_encoded_in_the_size(folder, hardware):
    sized = load_pipeline(str(folder), hardware).in_size(SamplingSpec(height=48, width=40))
    assert sized.encode_images(torch.rand(2, 3, 48, 40)).shape[1:] == sized.latent_shape == (4, 12, 10)


def test_requests_of_two_sizes_share_a_pipeline(folder):
    """Each has its own shape; the images of one size are the same bytes, whichever other sizes a worker makes."""
    job = job_of(folder, sampling={"num_inference_steps": 2, "scheduler": "ddim"})
    raw = job.model_dump(mode="json")
    raw["requests"] = [
        {"name": "own", "method": "prompt", "classes": ["three"], "count": 2},
        {"name": "wide", "method": "prompt", "classes": ["three"], "count": 2, "sampling": {"width": 64}},
    ]
    arrays = {}
    for order in (1, -1):
        both = parse_job(raw | {"requests": raw["requests"][::order]})
        plan = build_plan(both, LABELS, _digests(both))
        generator = Generator(both, plan)
        for request in plan.requests:
            specs = [plan.requests[request.number].sample(position) for position in range(2)]
            [batch] = generator.batches(request.number, specs)
            arrays.setdefault(request.spec.name, []).append([result.image for result in batch.results])
    assert all(first == second for first, second in arrays.values())


def test_a_size_is_part_of_the_plan_and_absent_where_it_is_the_models_own(folder):
    plain, sized = job_of(folder), job_of(folder, sampling={"height": 64})
    assert "height" not in plain.sampling.model_dump() and "height" not in plain.sampling.model_dump_json()
    plans = [build_plan(job, LABELS, _digests(job)) for job in (plain, sized)]
    assert plans[0].digest != plans[1].digest
    assert "height" not in plans[0].identity["requests"][0]["sampling"]
    assert image_size(sized, plans[1].requests[0]) == 2 * image_size(plain, plans[0].requests[0])


def test_the_decoders_arithmetic_follows_the_size(folder):
    job = job_of(folder, sampling={"height": 64})
    latents = _latents(job, job.requests[0], folder, str(folder))
    assert latents == (16, 8)
    assert _counted(str(folder), folder, latents)[1].decode == pytest.approx(
        2 * _counted(str(folder), folder, (8, 8))[1].decode, rel=0.1
    )


def test_sides_that_the_model_cannot_have_are_refused(folder):
    job = job_of(folder, sampling={"height": 50, "width": 64})
    with pytest.raises(JobError) as error:
        check_addresses(job)
    assert "requests.0.sampling.height: 50 is not a multiple of 4" in str(error.value) and "use 48" in str(error.value)
    with pytest.raises(JobError, match=r"sampling\.width"):
        job_of(folder, sampling={"width": 9000})
    assert StableDiffusion.size_problems(folder, SamplingSpec(height=48, width=36)) == []


def _digests(job):
    return {"diffusion": {job.models.diffusion: "d"}, "clip": "c", "target": "t", "transfer": [], "oracle": ""}
