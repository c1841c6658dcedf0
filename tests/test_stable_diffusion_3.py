"""Stable Diffusion 3: the latents and pixels of diffusers' own pipeline, every method on it, and what is refused.

The pipelines are tiny, with random weights; flow matching itself is in `test_families.py`.
"""

import json
import shutil
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch

from engine.data.images import decode_rgb
from engine.data.run.shards import read_shard
from engine.driver.checks import plan_job
from engine.errors import JobError
from engine.generation.generator import Generator
from engine.job.parsing import parse_job
from engine.methods.sampling.loop import Start
from engine.methods.sampling.spec import SamplingSpec
from engine.models.arithmetic import count_folder
from engine.models.diffusion import load_pipeline
from engine.models.job_checks import check_addresses
from engine.models.pipelines.lookup import family_of
from tests import commands
from tests.conftest import REPOSITORY
from tests.flow_cases import (
    CLIP_TOKENS,
    SCALES,
    SCHEDULERS,
    STEPS,
    BothFlows,
    diffusers_latents,
    engine_latents,
    load_sd3,
    raw_job,
    save_sd3,
    with_scheduler,
)
from tests.test_starts import Told
from tests.tiny_pipelines import edit, job_of

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A Stable Diffusion 3 without T5."""
    return save_sd3(tmp_path_factory.mktemp("sd3") / "plain")


@pytest.fixture(scope="module")
def with_t5(tmp_path_factory) -> Path:
    """A Stable Diffusion 3 with T5."""
    return save_sd3(tmp_path_factory.mktemp("sd3") / "t5", with_t5=True)


@pytest.fixture
def copy_of(tmp_path):
    """A folder of which everything may be changed but the weights, which are links."""

    def link(source: str, target: str) -> str:
        if source.endswith(".safetensors"):
            Path(target).symlink_to(source)
        else:
            shutil.copy(source, target)
        return target

    return lambda folder: Path(shutil.copytree(folder, tmp_path / "copy", copy_function=link))


@pytest.fixture
def both(folder, copy_of, hardware):
    """The pipeline without T5, as the engine and as diffusers loads it."""
    return BothFlows(copy_of(folder), hardware)


def assert_equal(made, expected):
    """Latents and images are those of diffusers, and images of something."""
    for ours, theirs in zip(made, expected, strict=True):
        assert ours.shape == theirs.shape and (ours - theirs).abs().max() < TOLERANCE
    assert expected[1].std() > 0.01


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_give_what_diffusers_gives(name, both):
    """Every scheduler that runs, with and without classifier-free guidance."""
    sampling = both.with_scheduler(name)
    check_addresses(job_of(both.folder, sampling=sampling | {"num_inference_steps": STEPS}))
    assert all(max(both.differences(name, scale)) < TOLERANCE for scale in SCALES)


def test_with_t5_it_gives_what_diffusers_gives(with_t5, hardware):
    """Also with a negative prompt, and with prompts that the CLIP encoders cut off and T5 does not."""
    prompts = ["a photo of a two", "eight " * 40]
    model, reference = load_pipeline(str(with_t5), hardware), load_sd3(with_t5)
    model.check_prompts(prompts)
    options = {"num_inference_steps": 3, "negative_prompt": "red ink"}
    for scale in (4.0, 1.0):
        made = engine_latents(model, prompts, scheduler="euler", guidance_scale=scale, **options)
        assert_equal(made, diffusers_latents(reference, prompts, guidance_scale=scale, **options))
    other = engine_latents(model, [prompts[0], "eight " * 39 + "one"], scheduler="euler", guidance_scale=1.0, **options)
    assert (other[0][1] - made[0][1]).abs().max() > 10 * TOLERANCE, "the end of a long prompt is read"


def test_t5_can_be_left_out(with_t5, folder, copy_of, hardware):
    """Two lines of the index; its weights are then not read. diffusers takes zeros in its place, too."""
    dropped = copy_of(with_t5)
    edit(dropped / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    shutil.rmtree(dropped / "text_encoder_3")
    shutil.rmtree(dropped / "tokenizer_3")
    check_addresses(job_of(dropped, sampling={"scheduler": "euler"}))
    made = engine_latents(load_pipeline(str(dropped), hardware), scheduler="euler")
    assert_equal(made, diffusers_latents(load_sd3(dropped)))
    assert torch.equal(made[0], engine_latents(load_pipeline(str(folder), hardware), scheduler="euler")[0])


@pytest.mark.parametrize(
    ("transformer", "vae"),
    [
        ({"qk_norm": "rms_norm", "dual_attention_layers": (0,), "pos_embed_max_size": 4}, {}),
        ({"patch_size": 1, "in_channels": 4, "out_channels": None}, {"latent_channels": 4, "shift_factor": 0.0}),
    ],
    ids=["3.5", "other latents"],
)
def test_other_transformers_run(transformer, vae, tmp_path, hardware):
    """Options that the transformer reads by itself: those of 3.5, other patches and latents."""
    folder = save_sd3(tmp_path / "made", transformer=transformer, vae=vae)
    check_addresses(job_of(folder, sampling={"scheduler": "euler"}))
    made = engine_latents(load_pipeline(str(folder), hardware), scheduler="euler", num_inference_steps=2)
    assert_equal(made, diffusers_latents(load_sd3(folder), num_inference_steps=2))


def test_other_sizes_are_those_of_diffusers(both):
    """Images that are not square, whose dynamic shift goes by their tokens; sides are of whole patches with a place."""
    sampling = both.with_scheduler("`model`, dynamic shift") | {"height": 48, "width": 24}
    check_addresses(job_of(both.folder, sampling=sampling))
    model = both.model.in_size(SamplingSpec(**sampling))
    assert_equal(engine_latents(model, **sampling), diffusers_latents(both.reference, height=48, width=24))
    for side, words in ((36, "36 is not a multiple of 8"), (136, "136 is above 128")):
        assert f"sampling.height: {words}" in refused(both.folder, sampling={"height": side})


@pytest.mark.parametrize("name", ["`euler`", "`model`, FlowMatchHeunDiscrete", "`dpmsolver++`"])
def test_a_start_is_that_of_image_to_image(name, both):
    """`(1 - sigma) x0 + sigma eps` at the step that diffusers begins with; at strength 0 the image itself."""
    sampling, model = both.with_scheduler(name), both.model
    clean = torch.randn(2, *model.latent_shape, generator=torch.Generator().manual_seed(3))
    made = engine_latents(model, start=Start(latents=clean, strength=0.5), **sampling)
    reference = diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(both.reference)
    reference.set_progress_bar_config(disable=True)
    reference.scheduler = both.reference.scheduler
    if "dpm" in name:
        # Its image-to-image form asks for what this scheduler calls otherwise.
        scheduler = reference.scheduler
        scheduler.scale_noise = lambda image, timestep, noise: scheduler.add_noise(image, noise, timestep)
    assert_equal(made, diffusers_latents(reference, image=clean, strength=0.5))
    assert torch.equal(engine_latents(model, start=Start(latents=clean, strength=0.0), **sampling)[0], clean)


def test_images_are_encoded_as_diffusers_encodes_them(both):
    """The mode of the posterior, shifted and scaled, as image-to-image has its draw."""
    images = torch.rand(2, *both.model.image_shape, generator=torch.Generator().manual_seed(0))
    vae = both.reference.vae
    with torch.no_grad():
        mode = vae.encode(images * 2 - 1).latent_dist.mode()
        latents = both.model.encode_images(images)
        decoded = vae.decode(mode).sample / 2 + 0.5
        assert torch.allclose(latents, (mode - 0.0609) * 1.5305, atol=TOLERANCE)
        assert torch.allclose(both.model.decode(latents), decoded, atol=TOLERANCE)


def test_every_method_runs(folder):
    """At the first step, which has no signal, nothing is guided; the others move the samples, each by itself."""
    job = parse_job(raw_job(folder))
    plan = plan_job(job, Told())
    generator = Generator(job, plan)
    results = {
        request.spec.name: generator.next_batch(request.number, [request.sample(0), request.sample(1)])
        for request in plan.requests
    }
    records = {name: [one.record for one in made] for name, made in results.items()}
    assert all(one["status"] == "ok" and one["nonfinite_gradients"] == 0 for made in records.values() for one in made)
    steps = {name: {one["guided_steps"] for one in made} for name, made in records.items()}
    assert steps["plain"] == {0} and steps["own"] == steps["joint"] == {3}
    # A start is in the middle: there is a signal at its first step.
    assert steps["started"] == {2}
    plain, own = ([np.asarray(decode_rgb(one.image)).mean() for one in results[name]] for name in ("plain", "own"))
    assert all(dark < light for dark, light in zip(own, plain, strict=True))
    assert all(one.image != other.image for one, other in zip(results["risky"], results["plain"], strict=True))
    alone = generator.next_batch(2, [plan.requests[2].sample(1)])
    assert alone[0].image == results["own"][1].image


def test_a_plan_counts_it(folder, with_t5, call, tmp_path):
    """Cost, digests and the advice on decoders know nothing of UNets; T5 or zeros in its place are as many tokens."""
    path = tmp_path / "job.json"
    path.write_text(json.dumps(raw_job(folder)))
    code, out, err = call("plan", path, "--validate")
    assert code == 0, out + err
    counted = [count_folder(one) for one in (folder, with_t5)]
    assert counted[0] == counted[1] and counted[0].unet_backward > counted[0].unet / 2 > 0


@pytest.mark.slow
def test_actors_of_ray_make_the_same_bytes(with_t5, tmp_path):
    """With T5, every method, in two processes of two executors."""
    path, made = tmp_path / "job.json", []
    path.write_text(json.dumps(raw_job(with_t5)))
    for executor in ("ray", "local"):
        output = tmp_path / executor
        arguments = ("run", path, "--executor", executor, "--workers", 1, "--output", output)
        done = commands.run(*arguments, folder=REPOSITORY)
        assert done.returncode == 0, done.stdout + done.stderr
        made.append({tar.name: tar.read_bytes() for tar in sorted(output.glob("shards/*.tar"))})
    assert made[0] == made[1] and made[0]
    records = [record for tar in (tmp_path / "ray/shards").glob("*.tar") for _, _, record, _ in read_shard(tar)]
    assert len(records) == 10 and {one["status"] for one in records} == {"ok"}


# What is refused, before a worker starts.


def refused(folder: Path, **options) -> str:
    """The lines with which a pipeline is refused before anything is loaded."""
    sampling = {"scheduler": "euler"} | options.pop("sampling", {})
    with pytest.raises(JobError) as caught:
        check_addresses(job_of(folder, sampling=sampling, **options))
    return "\n".join(caught.value.problems)


def test_guidance_of_the_first_step_alone_is_refused(folder):
    """There the latents are noise; a start has a first step that can be guided."""
    lines = refused(folder, method="boundary", sampling={"num_inference_steps": 1})
    assert lines.startswith("requests.0.guidance.boundary: moves the first of 1 steps alone") and "; add steps" in lines
    check_addresses(job_of(folder, method="boundary", sampling={"scheduler": "euler", "num_inference_steps": 3}))


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("transformer", {"in_channels": 4}, "in_channels: 4"),
        ("transformer", {"out_channels": 32}, "out_channels: 32"),
        ("transformer", {"sample_size": None}, "sample_size: null"),
        ("transformer", {"sample_size": 7}, "a multiple of patch_size"),
        ("transformer", {"sample_size": [8, 8]}, "sample_size: [8, 8]"),
        ("transformer", {"pos_embed_max_size": 3}, "4 patches a side, and positions of 3"),
        ("transformer", {"joint_attention_dim": 64}, "joint_attention_dim: 64, the embeddings of T5 have 40"),
        ("transformer", {"joint_attention_dim": 16}, "joint_attention_dim: 16, the embeddings of both CLIP"),
        ("transformer", {"pooled_projection_dim": 24}, "pooled_projection_dim: 24"),
        ("transformer", {"_class_name": "SanaTransformer2DModel"}, "SanaTransformer2DModel"),
        ("transformer", {"quantization_config": {"load_in_4bit": True}}, "quantised"),
        ("vae", {"shift_factor": None}, "shift_factor: null, which the pipeline adds"),
        ("vae", {"scaling_factor": 0}, "scaling_factor: 0"),
        ("vae", {"latents_mean": [0.1] * 16}, "latents_mean"),
        ("vae", {"latent_channels": 4}, "the latents of the VAE have 4"),
        ("text_encoder", {"projection_dim": 8}, "pooled_projection_dim: 20, the pooled embeddings"),
        ("text_encoder_2", {"model_type": "t5"}, "not of CLIP"),
        ("text_encoder_2", {"max_position_embeddings": 16}, "tokenizer_2/tokenizer_config.json has model_max_length"),
        ("text_encoder_3", {"model_type": "umt5"}, "not of T5"),
        ("text_encoder_3", {"vocab_size": 20}, "tokenizer_3 has tokens up to number 29"),
        ("text_encoder_3", {"quantization_config": {}}, "quantised"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_refused(part, changes, words, with_t5, copy_of):
    """By their configurations, with the file and the value."""
    folder = copy_of(with_t5)
    edit(folder / part / "config.json", **changes)
    assert words in refused(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"transformer": ["diffusers", "FluxTransformer2DModel"]}, "transformer is of class FluxTransformer2DModel"),
        ({"text_encoder": [None, None]}, "without its text_encoder"),
        ({"tokenizer_3": [None, None]}, "has a text_encoder_3 without its tokenizer_3"),
        ({"image_encoder": ["transformers", "SiglipVisionModel"]}, "with the part image_encoder"),
        ({"scheduler": ["diffusers", "EulerDiscreteScheduler"]}, "its scheduler is a EulerDiscreteScheduler"),
        ({"scheduler": ["diffusers", "FlowMatchLCMScheduler"]}, "its scheduler is a FlowMatchLCMScheduler"),
        ({"scheduler": ["diffusers", "FlowMatchHeunDiscreteScheduler"]}, "make both the same"),
        ({"_class_name": "StableDiffusion3Img2ImgPipeline"}, "is a StableDiffusion3Img2ImgPipeline; what runs"),
    ],
    ids=str,
)
def test_other_parts_are_refused(changes, words, with_t5, copy_of):
    """By the index alone."""
    folder = copy_of(with_t5)
    edit(folder / "model_index.json", **changes)
    lines = refused(folder)
    assert words in lines and ("what runs" in lines or "make both" in words)


@pytest.mark.parametrize(
    "changes",
    [
        {"shift": 0},
        {"shift": "3"},
        {"num_train_timesteps": 0},
        {"invert_sigmas": True},
        {"stochastic_sampling": True},
        {"shift_terminal": 0.1},
        {"time_shift_type": "cubic"},
        {"use_dynamic_shifting": "yes"},
        {"use_dynamic_shifting": True, "base_shift": None},
        {"use_dynamic_shifting": True, "max_image_seq_len": 256},
        {"use_dynamic_shifting": True, "max_image_seq_len": 257, "max_shift": 1e6},
        {"use_karras_sigmas": True, "use_beta_sigmas": True},
    ],
    ids=str,
)
def test_flows_of_another_training_are_refused(changes, folder, copy_of):
    """Options that are not sampled here as diffusers samples them, and numbers that are none."""
    changed = copy_of(folder)
    edit(changed / "scheduler" / "scheduler_config.json", **changes)
    lines = refused(changed)
    assert "scheduler_config.json" in lines and (list(changes)[-1] in lines or "dynamic shift" in lines)


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        ({"scheduler": "lms"}, "sampling.scheduler: 'lms' does not solve flow matching"),
        ({"scheduler": "ddim"}, "use euler, dpmsolver++ or model"),
        ({"timestep_spacing": "leading"}, "sampling.timestep_spacing: 'leading'"),
        ({"rescale_betas_zero_snr": True}, "sampling.rescale_betas_zero_snr"),
        ({"scheduler": "dpmsolver++", "use_karras_sigmas": True}, "sampling.use_karras_sigmas"),
    ],
    ids=str,
)
def test_sampling_that_is_not_of_a_flow_is_refused(sampling, words, folder):
    """Field, value and remedy."""
    assert words in refused(folder, sampling=sampling)


def test_heun_is_refused_for_guidance(folder, copy_of):
    """It steps from latents that it stores; `prompt` runs, as the schedulers above show."""
    changed = with_scheduler(copy_of(folder), SCHEDULERS["`model`, FlowMatchHeunDiscrete"][0])
    assert "would ignore how guidance moves" in refused(changed, sampling={"scheduler": "model"}, method="boundary")
    check_addresses(job_of(changed, sampling={"scheduler": "euler"}, method="boundary"))


def test_prompts_that_no_encoder_reads_whole_are_refused(folder, with_t5, hardware):
    """Without T5 the tokens of CLIP; with it the 256 of diffusers' `max_sequence_length`."""
    with pytest.raises(JobError, match=rf"tokens, the text encoder reads {CLIP_TOKENS}"):
        load_pipeline(str(folder), hardware).check_prompts(["a", "eight " * 80])
    model = load_pipeline(str(with_t5), hardware)
    model.check_prompts(["eight " * 40])
    with pytest.raises(JobError, match="has 481 tokens, the text encoder reads 256"):
        model.check_prompts(["a", "eight " * 80])


def test_tiny_decoders_are_of_the_same_latents(folder, tmp_path):
    """Their convention is a scale of 1 and no shift; both of the pipeline's are as good."""
    for number, (scale, shift) in enumerate([(1.0, 0.0), (1.5305, 0.0609), (1.5305, 0.0), (1.0, 0.0609)]):
        blocks = {"num_encoder_blocks": (1, 1, 1), "num_decoder_blocks": (1, 1, 1)}
        channels = {"encoder_block_out_channels": (8, 8, 8), "decoder_block_out_channels": (8, 8, 8)}
        tiny = diffusers.AutoencoderTiny(**blocks, **channels, latent_channels=16)
        tiny.save_pretrained(tmp_path / str(number))
        edit(tmp_path / str(number) / "config.json", scaling_factor=scale, shift_factor=shift)
        options = {"method": "boundary", "guidance_decoder": str(tmp_path / str(number))}
        if number < 2:
            check_addresses(job_of(folder, sampling={"scheduler": "euler"}, **options))
        else:
            assert "decodes latents of another scale" in refused(folder, **options)


def test_it_is_not_fine_tuned(folder):
    """Its training is another one."""
    assert "can be sampled but not fine-tuned" in family_of(folder, "x").training_problem(folder)
