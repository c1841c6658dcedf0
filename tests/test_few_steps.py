"""Stable Diffusion XL and models of few steps through the engine: every method, starts, batches, whole runs.

That their images are those of diffusers is tested in `test_model_differences.py`.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from engine.data.images.digits import compose_split
from engine.driver.checks import plan_job
from engine.errors import JobError
from engine.generation.generator import Generator
from engine.job.parsing import parse_job
from engine.job.records import TWINS
from engine.methods.sampling.loop import sample
from engine.methods.sampling.spec import SamplingSpec
from engine.models.arithmetic import count_folder
from engine.models.diffusion import load_pipeline
from engine.models.job_checks import check_addresses
from engine.models.pipelines.base import LATENTS
from engine.models.pipelines.lookup import check_pipeline, family_of
from tests.commands import run
from tests.model_differences import DISTILLED, SMALL
from tests.test_auto_sizes import SDXL
from tests.test_starts import Told, pixels_of
from tests.tiny_pipelines import (
    PROMPTS,
    by_diffusers,
    by_engine,
    edit,
    job_of,
    load_reference,
    save_lcm_pipeline,
    save_xl_pipeline,
)

TOLERANCE = 1e-5
LCM = {"scheduler": "model", "num_inference_steps": 4, "guidance_scale": 2.0}
SAMPLING = {
    "xl": {"scheduler": "euler", "num_inference_steps": 4, "guidance_scale": 2.0},
    "xl-turbo": {"scheduler": "model", "num_inference_steps": 3, "guidance_scale": 1.0},
    "lcm": LCM,
    "xl-lcm": LCM,
}


def dark():
    """A method of a user's own: the darker the better."""
    return lambda images, scene: images.flatten(1).mean(1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Tiny models by kind."""
    home = tmp_path_factory.mktemp("models")
    ancestral = diffusers.EulerAncestralDiscreteScheduler(timestep_spacing="trailing")
    return {
        "xl": save_xl_pipeline(home / "xl", unet=SMALL),
        "xl-turbo": save_xl_pipeline(home / "xl-turbo", unet=SMALL, scheduler=ancestral),
        "lcm": save_lcm_pipeline(home / "lcm", unet=SMALL),
        "xl-lcm": save_xl_pipeline(home / "xl-lcm", unet=SMALL | DISTILLED, scheduler=diffusers.LCMScheduler()),
    }


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    """Real images of two classes."""
    import PIL.Image

    folder = tmp_path_factory.mktemp("photos")
    split = compose_split("test", 30, seed=3)
    for name, index in (("three", 3), ("eight", 8)):
        (folder / name).mkdir()
        image = split.images[list(split.labels).index(index)]
        PIL.Image.fromarray(np.asarray(image)).save(folder / name / "a.png")
    return folder


def raw_job(folder: Path, kind: str, *requests: dict[str, Any]) -> dict[str, Any]:
    return {
        "name": "job",
        "models": {"diffusion": str(folder), "clip": "zoo:digits/clip", "target": "zoo:digits/classifier"},
        "sampling": SAMPLING[kind],
        "requests": list(requests),
        "guidance": {name: {"every": 1} for name in ("boundary", "risky", "custom")},
        "output": {"uri": "runs/none"},
    }


def request(name: str, method: str, **more: Any) -> dict[str, Any]:
    named = {"boundary": ["three", "eight"]} if method == "boundary" else {"classes": ["three", "eight"]}
    count = 4 if method == "boundary" else 2
    return {"name": name, "method": method, "count": count, "seed_group": "all", **named, **more}


class Made:
    """A generator and what it made of the requests of a job, by name."""

    def __init__(self, raw: dict[str, Any]) -> None:
        job = parse_job(raw)
        plan = plan_job(job, Told())
        self.generator, self.requests = Generator(job, plan), {one.spec.name: one for one in plan.requests}
        self.results = functools.cache(lambda name: self.some(name, range(self.requests[name].total)))

    def some(self, name: str, places: Sequence[int]) -> list[Any]:
        """Results of a batch of some samples of a request."""
        request = self.requests[name]
        return self.generator.next_batch(request.number, [request.sample(place) for place in places])


@pytest.mark.parametrize("kind", ["xl", "lcm"])
def test_every_method_runs(kind: str, folders: dict[str, Path], photos: Path) -> None:
    """Prompts, both built-in methods, a criterion of a user's own, and starts from real images; guidance lowers what
    it is to lower, with the same noise at the start and at the steps."""
    start = {"start": {"images": str(photos), "strength": 0.5}}
    made = Made(
        raw_job(
            folders[kind],
            kind,
            request("plain", "prompt"),
            request("between", "boundary"),
            request("hard", "risky"),
            request("own", "tests.test_few_steps:dark"),
            request("from", "prompt", **start),
            request("own-from", "tests.test_few_steps:dark", **start),
        )
    )
    results = {name: made.results(name) for name in made.requests}
    records = {name: [one.record for one in some] for name, some in results.items()}
    assert {record["status"] for some in records.values() for record in some} == {"ok"}
    for name in ("between", "hard", "own", "own-from"):
        assert all(one["guided_steps"] > 0 and one["nonfinite_gradients"] == 0 for one in records[name]), name
    pixels = {name: pixels_of(some).reshape(4, -1).astype(float).mean(1) for name, some in results.items()}
    assert (pixels["own"] < pixels["plain"]).all() and (pixels["own-from"] < pixels["from"]).all()
    assert not np.array_equal(pixels["from"], pixels["plain"])


@pytest.mark.parametrize("kind", ["lcm", "xl-turbo"])
def test_the_noise_of_the_steps_is_of_the_sample_alone(kind: str, folders: dict[str, Path], photos: Path) -> None:
    """A sample alone is what it is among others, byte for byte, also from a start; its twin has the same noise, and
    diffusers makes the same image of its seed."""
    requests = [request("plain", "prompt"), request("from", "prompt", start={"images": str(photos), "strength": 0.7})]
    made = Made(raw_job(folders[kind], kind, *requests, request("own", "tests.test_few_steps:dark", twin=True)))
    for name in ("plain", "from"):
        whole = made.results(name)
        [alone] = made.some(name, [3])
        assert alone.image == whole[3].image
    record, sampling = made.results("plain")[1].record, SAMPLING[kind]
    expected = load_reference(folders[kind])(
        record["prompt"],
        generator=torch.Generator().manual_seed(record["seed"]),
        num_inference_steps=sampling["num_inference_steps"],
        guidance_scale=sampling["guidance_scale"],
        output_type="np",
    ).images[0]
    assert np.abs(pixels_of(made.results("plain"))[1] - expected * 255).max() < 1
    twins = [one.companions[TWINS].image for one in made.results("own")]
    assert [twin() if callable(twin) else twin for twin in twins] == [one.image for one in made.results("plain")]


def test_other_noise_at_the_steps_gives_another_image(folders: dict[str, Path], hardware) -> None:
    """What the equalities above compare: from the same noise at the start, the fresh noise is in the image."""
    model = load_pipeline(str(folders["lcm"]), hardware)
    spec = SamplingSpec(**LCM)

    def latents(step_seeds: list[int]) -> torch.Tensor:
        noise, stream = model.draw_noise([5, 6])[LATENTS], model.noise_stream(step_seeds)
        model.first_noise(stream)
        sampler = model.sampler(spec, stream)
        return sample(model.denoiser(PROMPTS, spec, sampler), sampler, noise)

    same, other, swapped = (latents(seeds) for seeds in ([5, 6], [5, 8], [6, 5]))
    assert torch.equal(same[0], other[0]) and (same[1] - other[1]).abs().max() > 0.1
    assert (same - swapped).abs().amax((1, 2, 3)).min() > 0.1


# Conditions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeroes_empty", [True, False])
def test_an_empty_negative_prompt_of_xl_is_that_of_diffusers(zeroes_empty: bool, tmp_path: Path, hardware) -> None:
    """None is zeros where the folder says so, and the empty prompt where it does not; given ones are encoded."""
    folder = save_xl_pipeline(tmp_path / "xl", zeroes_empty=zeroes_empty)
    model, reference = load_pipeline(str(folder), hardware), load_reference(folder)
    images = {}
    for negative in ("", "red ink"):
        images[negative] = by_engine(model, 2, scheduler="model", negative_prompt=negative)
        expected = by_diffusers(reference, 2, negative_prompt=[negative] * 2 if negative else None)
        assert (images[negative] - expected).abs().max() < TOLERANCE
    encoded = by_diffusers(reference, 2, negative_prompt=[""] * 2)
    assert ((images[""] - encoded).abs().max() > 100 * TOLERANCE) == zeroes_empty
    assert (images[""] - images["red ink"]).abs().max() > 100 * TOLERANCE


def test_sizes_that_xl_is_told_are_those_of_the_image(tmp_path: Path, hardware) -> None:
    """Original and target size, height first, also where they differ; what diffusers makes of the same sizes."""
    folder = save_xl_pipeline(tmp_path / "xl", unet={"sample_size": (8, 12)})
    model, reference = load_pipeline(str(folder), hardware), load_reference(folder)
    assert model.encode(PROMPTS)["time_ids"].tolist() == [[32, 48, 0, 0, 32, 48]] * 2
    images = by_engine(model, 2, scheduler="model")
    assert (images - by_diffusers(reference, 2, height=32, width=48)).abs().max() < TOLERANCE
    other = by_diffusers(reference, 2, height=32, width=48, original_size=(48, 32))
    assert (images - other).abs().max() > 10 * TOLERANCE


def test_the_guidance_scale_is_an_input_and_there_is_one_half(folders: dict[str, Path], hardware) -> None:
    """Rows of a call are those of the batch, and another scale is another image."""
    model, rows = load_pipeline(str(folders["xl-lcm"]), hardware), []
    hook = model.network.register_forward_pre_hook(lambda _module, inputs: rows.append(len(inputs[0])))
    strong, weak = (by_engine(model, 2, scheduler="model", guidance_scale=scale) for scale in (8.0, 1.0))
    hook.remove()
    assert rows == [2] * 4 and (strong - weak).abs().max() > 10 * TOLERANCE


def test_prompts_that_are_too_long_for_an_encoder_are_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    """Whichever of the two: neither cuts a prompt off without notice."""
    from engine.job.spec import RuntimeSpec
    from engine.models.hardware import choose_hardware

    model = load_pipeline(str(folders["xl"]), choose_hardware(RuntimeSpec(device="cpu")))
    long = "a photo of a three " * 8
    with pytest.raises(JobError, match="tokens, the text encoder reads 32; shorten it"):
        model.check_prompts([long])
    model.prompts.check = lambda prompts: None
    with pytest.raises(JobError, match="tokens, the text encoder reads 32; shorten it"):
        model.check_prompts([long])


def test_the_arithmetic_of_a_sample_is_counted(folders: dict[str, Path]) -> None:
    """With all inputs of the network, by its configuration: what advice on a decoder for guidance goes by."""
    folder = folders["xl-lcm"]
    counted = count_folder(folder)
    assert counted is not None and counted.unet > 0 and counted.unet_backward > 0 and counted.decode > 0
    assert family_of(folder, "xl-lcm").embeds_guidance(folder)


@pytest.mark.parametrize("kind", ["xl", "xl-lcm"])
def test_rows_of_a_network_are_those_of_its_whole_batch(kind: str, folders: dict[str, Path], hardware) -> None:
    """Gradient checkpointing and slices of a batch, as GPUs have them, change no output: inputs are sliced together."""
    from engine.models.memory_model import rows_of

    model = load_pipeline(str(folders[kind]), hardware)
    spec = parse_job(raw_job(folders[kind], kind, request("a", "prompt"))).sampling
    denoiser = model.denoiser(PROMPTS, spec, model.sampler(spec, model.noise_stream([1, 2])))
    condition, latents = denoiser._conditional, model.draw_noise([1, 2])["latents"]
    with torch.no_grad():
        whole = model.predict(latents, torch.tensor(500), condition)
        parts = [
            model.predict(latents[row : row + 1], torch.tensor(500), condition.rows(torch.tensor([row])))
            for row in range(2)
        ]
        sliced = rows_of(model.network_arguments(condition.tensors), 2, slice(1, 2))
        second = model.call_network(latents[1:], torch.tensor(500), **sliced)
    assert torch.allclose(whole, torch.cat(parts), atol=1e-5) and torch.allclose(second, whole[1:], atol=1e-5)
    checkpointed = load_pipeline(str(folders[kind]), dataclasses.replace(hardware, gradient_checkpointing="on"))
    leaf, other = (latents.clone().requires_grad_() for _ in range(2))
    model.predict(leaf, torch.tensor(500), condition).sum().backward()
    checkpointed.predict(other, torch.tensor(500), condition).sum().backward()
    assert torch.allclose(leaf.grad, other.grad, atol=1e-5) and leaf.grad.abs().max() > 0


# Refusals ------------------------------------------------------------------------------------------------------------


def refusal(folder: Path, **sampling: Any) -> str:
    """The lines with which a job is refused before anything is loaded."""
    with pytest.raises(JobError) as caught:
        check_addresses(job_of(folder, sampling=sampling))
    return "\n".join(caught.value.problems)


XL_EDITS = [
    ("unet/config.json", {"addition_embed_type": None}, "it takes no pooled embedding"),
    ("unet/config.json", {"addition_time_embed_dim": None}, "addition_time_embed_dim: null"),
    ("unet/config.json", {"projection_class_embeddings_input_dim": 5 * 8 + 24}, "(as the refiner does)"),
    ("unet/config.json", {"projection_class_embeddings_input_dim": 100}, "have 24 + 6 * 8 entries"),
    ("unet/config.json", {"cross_attention_dim": 24}, "the embeddings of the text encoders have 40 entries"),
    ("unet/config.json", {"in_channels": 9}, "as inpainting does"),
    ("unet/config.json", {"sample_size": None}, "sample_size: null"),
    ("unet/config.json", {"time_cond_proj_dim": 2}, "time_cond_proj_dim: 2"),
    ("text_encoder_2/config.json", {"projection_dim": 32}, "have 32 + 6 * 8 entries"),
    ("text_encoder_2/config.json", {"model_type": "t5"}, "text_encoder_2/config.json is of type"),
    ("text_encoder_2/config.json", {"quantization_config": {}}, "text_encoder_2/config.json has quantization_config"),
    ("text_encoder_2/config.json", {"max_position_embeddings": 16}, "tokenizer_2/tokenizer_config.json"),
    ("tokenizer_2/tokenizer_config.json", {"model_max_length": 30}, "that of tokenizer is 32; their embeddings"),
    ("vae/config.json", {"latents_mean": [0.1] * 4}, "latents_mean"),
    ("vae/config.json", {"latent_channels": 16}, "the latents of the VAE have 16"),
    ("model_index.json", {"text_encoder": [None, None], "tokenizer": [None, None]}, "without its text_encoder"),
    ("model_index.json", {"text_encoder_2": ...}, "without its text_encoder_2"),
    ("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "is of class CLIPTextModel, not"),
    ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "models.guidance_decoder"),
    ("model_index.json", {"force_zeros_for_empty_prompt": "yes"}, "force_zeros_for_empty_prompt"),
    ("model_index.json", {"_class_name": "StableDiffusionXLImg2ImgPipeline"}, "the refiner of Stable Diffusion XL"),
    ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "text_encoder_2 (CLIPTextModelWithProjection)"),
    ("scheduler/scheduler_config.json", {"prediction_type": "sample"}, "prediction_type"),
]


@pytest.mark.parametrize(("file", "changes", "words"), XL_EDITS, ids=str)
def test_an_xl_that_would_be_sampled_otherwise_is_refused(file, changes, words, folders, copy_of) -> None:
    """From the configurations alone, with part, option and value."""
    folder = copy_of(folders["xl"])
    edit(folder / file, **changes)
    assert words in (line := refusal(folder, scheduler="euler")) and line.startswith("models.diffusion: ")


LCM_ASKED = [
    ("lcm", {}, {"scheduler": "ddim"}, "sampling.scheduler: the model's own scheduler is LCMScheduler"),
    ("lcm", {}, {}, "'lms'; use lcm or model, with 1 to 8 steps"),
    ("lcm", {}, LCM | {"negative_prompt": "ink"}, "negative_prompt: \"ink\", but the UNet takes the guidance scale"),
    ("lcm", {}, LCM | {"guidance_rescale": 0.5}, "guidance_rescale: 0.5, but the UNet takes the guidance scale"),
    ("lcm", {}, LCM | {"num_inference_steps": 51}, "51 is above the 50 timesteps that the model was distilled on"),
    ("lcm", {}, LCM | {"timestep_spacing": "trailing"}, "timestep_spacing: LCMScheduler takes the timesteps"),
    ("lcm", {}, LCM | {"use_karras_sigmas": True}, "use_karras_sigmas: LCMScheduler has no sigmas"),
    ("lcm", {"original_inference_steps": 0}, LCM, "original_inference_steps: 0"),
    ("lcm", {"original_inference_steps": 1001}, LCM, "original_inference_steps: 1001"),
    ("lcm", {"timestep_scaling": "x"}, LCM, "timestep_scaling"),
    ("xl-lcm", {}, {"scheduler": "euler"}, "the model's own scheduler is LCMScheduler"),
    ("xl-lcm", {}, LCM | {"negative_prompt": "ink"}, "so there is no unconditional half; leave it out"),
    ("xl", {}, {"scheduler": "lcm", "num_inference_steps": 60}, "60 is above the 50 timesteps"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "changes", "sampling", "words"), LCM_ASKED, ids=str)
def test_what_few_steps_cannot_be_asked_for_is_refused(kind, changes, sampling, words, folders, copy_of) -> None:
    """With the field and a remedy, before a model is loaded."""
    folder = copy_of(folders[kind])
    edit(folder / "scheduler" / "scheduler_config.json", **changes)
    assert words in refusal(folder, **sampling)


def test_a_latent_consistency_model_that_is_none_is_refused(folders, copy_of) -> None:
    """diffusers fails on both; without the class of its own the first would run, as LCM-LoRA does."""
    folder = copy_of(folders["lcm"])
    edit(folder / "unet" / "config.json", time_cond_proj_dim=None)
    assert "no time_cond_proj_dim" in refusal(folder, **LCM)
    edit(folder / "model_index.json", _class_name="StableDiffusionPipeline")
    check_addresses(job_of(folder, sampling=LCM))
    folder = copy_of(folders["lcm"], "other")
    edit(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="DDIMScheduler")
    assert "its scheduler is a DDIMScheduler, and a LatentConsistencyModelPipeline has an LCMScheduler" in refusal(
        folder, scheduler="ddim"
    )


def test_guidance_is_refused_where_lcm_limits_the_image(folders, copy_of) -> None:
    """It would look at another image than the one that the noise is added to."""
    folder = copy_of(folders["lcm"])
    edit(folder / "scheduler" / "scheduler_config.json", clip_sample=True)
    check_addresses(job_of(folder, sampling=LCM))
    with pytest.raises(JobError, match=r"limits the predicted image .clip_sample of"):
        check_addresses(job_of(folder, method="boundary", sampling=LCM))


# Whole runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_workers_of_ray_make_the_bytes_of_one_process(folders: dict[str, Path], tmp_path: Path) -> None:
    """Stable Diffusion XL with a scheduler that draws noise, guided and not, in shards of several workers."""
    raw = raw_job(folders["xl-turbo"], "xl-turbo", request("plain", "prompt"), request("between", "boundary"))
    raw["output"] |= {"samples_per_shard": 2}
    job = tmp_path / "job.json"
    job.write_text(json.dumps(raw))
    for executor, workers in (("local", 1), ("ray", 2)):
        output = ("--output", tmp_path / executor, "--workers", workers, "--set", "runtime.device=cpu")
        done = run("run", job, "--executor", executor, *output, folder=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    tars = sorted((tmp_path / "ray/shards").glob("*.tar"))
    assert len(tars) == 4
    assert all(tar.read_bytes() == (tmp_path / "local/shards" / tar.name).read_bytes() for tar in tars)


@pytest.mark.slow
def test_stable_diffusion_xl_at_its_real_size(tmp_path: Path, folders: dict[str, Path]) -> None:
    """The published configurations are let through, and their network has the published parameters and operations.

    Without weights; 2.57 thousand million parameters (Podell et al. 2023, table 1) are the UNet with all its inputs.
    """
    folder = tmp_path / "sdxl"
    shutil.copytree(folders["xl"], folder, ignore=shutil.ignore_patterns("*.safetensors"))
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 256}
    added |= {"projection_class_embeddings_input_dim": 2816}
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(**SDXL | added)
    assert sum(one.numel() for one in unet.parameters()) == 2_567_463_684
    unet.save_config(folder / "unet")
    vae = {"block_out_channels": [128, 256, 512, 512], "layers_per_block": 2, "norm_num_groups": 32}
    vae |= {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    edit(folder / "vae" / "config.json", **vae, sample_size=1024, force_upcast=True)
    edit(folder / "text_encoder" / "config.json", hidden_size=768, max_position_embeddings=77, vocab_size=49408)
    second = {"hidden_size": 1280, "projection_dim": 1280, "max_position_embeddings": 77, "vocab_size": 49408}
    edit(folder / "text_encoder_2" / "config.json", **second)
    check_pipeline(folder, "xl")
    assert family_of(folder, "xl").image_size(folder) == (1024, 1024)
    counted = count_folder(folder)
    # 2.99 TMAC but for the products of attention: 10 layers of 4096 tokens, 60 of 1024, each also with 77 of text.
    layers = ((10, 4096, 640), (60, 1024, 1280))
    attention = sum(number * 4 * tokens * (tokens + 77) * width for number, tokens, width in layers)
    assert counted is not None and (counted.unet - attention) / 1e12 == pytest.approx(5.98, abs=0.01)
