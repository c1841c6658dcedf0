"""Which pipelines run: what is allowed gives diffusers' own pixels, and everything else is refused with its reason.

The variants are made from diffusers' own lists: of its pipelines, its schedulers and their options, a UNet's options.
"""

import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import diffusers
import diffusers.schedulers
import pytest
import torch
import transformers

from engine.data.images.digits import compose_split
from engine.errors import JobError
from engine.methods.sampling.families import CONSISTENCY, FAMILY
from engine.models.addresses import resolve
from engine.models.diffusion import load_pipeline
from engine.models.job_checks import check_addresses
from engine.models.pipelines.lookup import check_pipeline
from engine.models.pipelines.registry import FAMILIES, NEAR
from tests.conftest import REPOSITORY
from tests.tiny_pipelines import (
    ENCODER,
    PROMPTS,
    by_diffusers,
    by_engine,
    edit,
    job_of,
    load_reference,
    save_pipeline,
)

TOLERANCE = 1e-4
RUN = set(FAMILIES)
CONFIGURATIONS = {"model_index.json", "config.json", "scheduler_config.json", "tokenizer_config.json"}
SCHEDULERS = ("lms", "ddim", "euler", "dpmsolver++", "model")
UNET_OPTIONS = set(inspect.signature(diffusers.UNet2DConditionModel.__init__).parameters) - {"self"}
SIMPLE_BLOCKS = {
    "down_block_types": ("SimpleCrossAttnDownBlock2D", "ResnetDownsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ("ResnetUpsampleBlock2D", "SimpleCrossAttnUpBlock2D"),
}

# Changes of a UNet that its own forward pass takes care of; sampled beside diffusers.
ALLOWED_UNETS = {
    "eps": {},
    "heads-by-block": {"attention_head_dim": (2, 4), "transformer_layers_per_block": (1, 2)},
    "linear-projection": {"use_linear_projection": True, "upcast_attention": True},
    "not-square": {"sample_size": (8, 16)},
    "eight-latents": {"in_channels": 8, "out_channels": 8},
    "odd-size": {"sample_size": 6},
    "two-layers": {"layers_per_block": (1, 2), "block_out_channels": (16, 24), "norm_num_groups": 8, "norm_eps": 1e-4},
    "text-time": {"addition_embed_type": "text", "addition_embed_type_num_heads": 2},
    "text-projection": {"encoder_hid_dim_type": "text_proj", "encoder_hid_dim": 16, "cross_attention_dim": 24},
    "embedding": {"time_embedding_type": "fourier", "time_embedding_dim": 32, "flip_sin_to_cos": False},
    "frequencies": {"freq_shift": 1, "flip_sin_to_cos": False},
    "activations": {"act_fn": "gelu", "time_embedding_act_fn": "silu", "timestep_post_act": "silu"},
    "kernels": {"conv_in_kernel": 5, "conv_out_kernel": 5, "downsample_padding": 0, "mid_block_scale_factor": 2.0},
    "scale-shift": {"resnet_time_scale_shift": "scale_shift", "dropout": 0.5},
    "simple-attention": SIMPLE_BLOCKS | {"only_cross_attention": (True, False), "cross_attention_norm": "layer_norm"},
    "resnet-acts": SIMPLE_BLOCKS | {"resnet_skip_time_act": True, "resnet_out_scale_factor": 1.4},
    "cross-middle": SIMPLE_BLOCKS | {"mid_block_only_cross_attention": True},
    "no-middle": {"mid_block_type": None},
    "centred": {"center_input_sample": True},
    "guidance-embedding": {"time_cond_proj_dim": 8},
    "odd-guidance-embedding": {"time_cond_proj_dim": 7},
    "reversed": {"transformer_layers_per_block": (1, 1), "reverse_transformer_layers_per_block": (1, 1)},
}
# Values of options that ask the pipeline for what it is not given.
REFUSED_UNETS = {
    "in_channels": (9, 8, 7, 5, 3),
    "out_channels": (8, 3),
    "addition_embed_type": ("text_time", "text_image", "image", "image_hint"),
    "addition_time_embed_dim": (),
    "encoder_hid_dim_type": ("image_proj", "text_image_proj", "ip_image_proj"),
    "encoder_hid_dim": (999,),
    "time_cond_proj_dim": (0, 2, "256", 8.0, [8]),
    "class_embed_type": ("timestep", "identity", "projection", "simple_projection"),
    "num_class_embeds": (1000,),
    "projection_class_embeddings_input_dim": (),
    "class_embeddings_concat": (True,),
    "attention_type": ("gated", "gated-text-image"),
    "dual_cross_attention": (True,),
    "cross_attention_dim": (768, [16, 768], 1280),
    "sample_size": (None, 0, -8, [8], [8, 8, 8], "8", 8.0, True),
    "num_attention_heads": (8,),
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pipelines") / "plain")


@pytest.fixture(scope="module")
def unclip(tmp_path_factory):
    return save_pipeline(tmp_path_factory.mktemp("pipelines") / "unclip", is_unclip=True)


def refusal(folder: Path, **options) -> str:
    """The one line with which a pipeline is refused before anything is loaded."""
    with pytest.raises(JobError) as caught:
        check_addresses(job_of(folder, **options))
    return "\n".join(caught.value.problems)


def assert_equal_pixels(folder: Path, hardware, *, steps: int = 2, reference=None, prompts=PROMPTS, **sampling) -> None:
    """Engine and diffusers make the same images of a folder that validates; `scheduler: model` unless said."""
    sampling = {"scheduler": "model"} | sampling
    check_addresses(job_of(folder, sampling=sampling | {"num_inference_steps": steps}))
    expected = by_diffusers(reference or load_reference(folder), steps, prompts=prompts)
    images = by_engine(load_pipeline(str(folder), hardware), steps, prompts=prompts, **sampling)
    assert images.shape == expected.shape and (images - expected).abs().max() < TOLERANCE
    assert expected.std() > 0.01


@pytest.mark.parametrize("name", ALLOWED_UNETS)
def test_unets_that_run_give_the_pixels_of_diffusers(name, tmp_path, hardware):
    """Options that a UNet reads by itself need nothing of us, and stay allowed."""
    unet = ALLOWED_UNETS[name]
    vae = {"latent_channels": unet.get("in_channels", 4)}
    assert_equal_pixels(save_pipeline(tmp_path / "made", unet=unet, vae=vae), hardware, steps=1, prompts=PROMPTS[:1])


def test_every_option_of_a_unet_is_sampled_or_refused():
    """An option that a later diffusers brings is nowhere in these lists, and has to be looked at."""
    sampled = {option for unet in ALLOWED_UNETS.values() for option in unet}
    assert sampled | REFUSED_UNETS.keys() == UNET_OPTIONS


@pytest.mark.parametrize(
    ("option", "value"), [(option, value) for option, values in REFUSED_UNETS.items() for value in values]
)
def test_unets_that_ask_for_more_are_refused(option, value, plain, copy_of):
    """SDXL, inpainting, instruct-pix2pix, depth, upscalers, GLIGEN, IP-adapters, consistency models."""
    folder = copy_of(plain)
    edit(folder / "unet" / "config.json", **{option: value})
    line = refusal(folder)
    assert value is not None or "sample_size: null" in line
    assert line.startswith("models.diffusion: ") and (option in line or "cross_attention_dim" in line)
    assert "what runs" in line or "write" in line


OTHERS = {
    "old-unclip-labels": (True, {"unet": {"class_embeddings_concat": True}}),
    "no-quant": (False, {"vae": {"use_post_quant_conv": False, "use_quant_conv": False, "force_upcast": False}}),
    "deep-vae": (False, {"vae": {"scaling_factor": 0.5, "layers_per_block": 2, "mid_block_add_attention": False}}),
    "unclip": (True, {}),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_pipelines_that_run(name, tmp_path, hardware):
    """Parts beside the UNet, and Stable unCLIP."""
    is_unclip, changes = OTHERS[name]
    assert_equal_pixels(save_pipeline(tmp_path / "made", is_unclip=is_unclip, **changes), hardware)


EDITS = {
    "before-0.9": ("unet", {"_diffusers_version": "0.6.0"}),
    "at-0.9": ("unet", {"_diffusers_version": "0.9.0"}),
    "no-version": ("unet", {"_diffusers_version": ...}),
    "no-factor": ("vae", {"scaling_factor": ...}),
    "masked-text": ("text_encoder", {"use_attention_mask": True}),
    "unknown-option": ("unet", {"of_tomorrow": 3}),
}


@pytest.mark.parametrize("name", EDITS)
def test_old_configurations_mean_what_diffusers_takes_them_for(name, plain, copy_of, hardware):
    """A UNet of diffusers before 0.9 with small latents gets 64; a text encoder may want its mask."""
    part, changes = EDITS[name]
    folder = copy_of(plain)
    edit(folder / part / "config.json", **changes)
    assert_equal_pixels(folder, hardware, steps=1, prompts=PROMPTS[:1])
    size = load_pipeline(str(folder), hardware).latent_shape[1]
    assert size == (64 if name.startswith("before") else 8)


def test_a_vae_with_an_encoder_of_images_and_a_checker_runs(plain, copy_of, hardware):
    """What Stable Diffusion may have beside its own parts changes no pixel."""
    folder = copy_of(plain)
    vision = transformers.CLIPVisionConfig(**ENCODER, image_size=16, patch_size=8, projection_dim=8)
    transformers.CLIPVisionModelWithProjection(vision).save_pretrained(folder / "image_encoder")
    transformers.CLIPImageProcessor().save_pretrained(folder / "feature_extractor")
    edit(
        folder / "model_index.json",
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        tokenizer=["transformers", "CLIPTokenizerFast"],
    )
    assert_equal_pixels(folder, hardware, reference=load_reference(plain))


def test_every_other_pipeline_of_diffusers_is_refused(plain, copy_of):
    """By its class alone: ControlNet, adapters, PAG, SAG, inpainting, video, and what comes with a later diffusers."""
    folder = copy_of(plain)
    others = {name for name in dir(diffusers) if name.endswith("Pipeline")} - RUN
    assert {"StableDiffusionControlNetPipeline", "AnimateDiffPipeline", "StableCascadeCombinedPipeline"} < others
    for kind in sorted(others):
        edit(folder / "model_index.json", _class_name=kind)
        more = f" ({NEAR[kind]})" if kind in NEAR else ""
        assert f"is a {kind}{more}; what runs: a StableDiffusionPipeline" in refusal(folder)


STRANGE = (None, "x", -1, 0, 1e308, [], [None], {}, {"x": 1}, True, "\ud800")


@pytest.mark.parametrize("part", ["", "unet", "vae", "text_encoder", "tokenizer", "scheduler", "image_normalizer",
                                  "image_encoder", "image_noising_scheduler"])  # fmt: skip
def test_values_of_a_wrong_kind_are_refused_or_read(part, unclip, copy_of):
    """Every key of every configuration with values that nobody writes: lines that name a field, never a traceback."""
    folder = copy_of(unclip)
    (path,) = (one for one in (folder / part).glob("*.json") if one.name in CONFIGURATIONS)
    config = json.loads(path.read_text())
    for place, key in enumerate(sorted(config)):
        for value in STRANGE[place % 4 :: 4]:
            path.write_text(json.dumps(config | {key: value}))
            try:
                check_addresses(job_of(folder, sampling={"scheduler": SCHEDULERS[place % len(SCHEDULERS)]}))
            except JobError as error:
                assert all(one.startswith(("models.diffusion: ", "requests.0.")) for one in error.problems), value
    for broken in ("", "[]", "3", "{", "[" * 100_000, "\0"):
        path.write_text(broken)
        assert "models.diffusion: " in refusal(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"_class_name": ["pipeline", "OwnPipeline"]},
        {"_class_name": ...},
        {"unet": ...},
        {"unet": [None, None]},
        {"vae": ["diffusers", "AutoencoderTiny"]},
        {"vae": ["diffusers", "AsymmetricAutoencoderKL"]},
        {"vae": ["diffusers", "VQModel"]},
        {"vae": ["diffusers", "ConsistencyDecoderVAE"]},
        {"unet": ["diffusers", "UNet3DConditionModel"]},
        {"unet": ["diffusers", "FlaxUNet2DConditionModel"]},
        {"text_encoder": ["transformers", "CLIPTextModelWithProjection"]},
        {"text_encoder": ["transformers", "T5EncoderModel"]},
        {"text_encoder": ["alt_diffusion", "RobertaSeriesModelWithTransformation"]},
        {"tokenizer": ["transformers", "T5Tokenizer"]},
        {"tokenizer": ["transformers", "XLMRobertaTokenizer"]},
        {"safety_checker": ["stable_diffusion", "OtherChecker"]},
        {"unet": ["my_module", "UNet2DConditionModel"]},
        {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]},
        *(
            {name: ["diffusers", "Some"]}
            for name in (
                "text_encoder_2", "tokenizer_2", "controlnet", "adapter", "transformer", "prior", "prior_tokenizer",
                "depth_estimator", "low_res_scheduler", "motion_adapter", "watermark", "language_model", "movq",
            )
        ),
    ],
    ids=str,
)  # fmt: skip
def test_parts_that_are_not_known_are_refused(changes, plain, copy_of):
    """Unknown parts are not left out in silence, and known ones are of the class that runs."""
    folder = copy_of(plain)
    edit(folder / "model_index.json", **changes)
    name = next(iter(changes)).replace("_class_name", "pipeline")
    assert name in (line := refusal(folder)) and "what runs" in line


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("vae", {"shift_factor": 0.1}, "shift_factor"),
        ("vae", {"latents_mean": [0.1] * 4}, "latents_mean"),
        ("vae", {"latents_std": [0.1] * 4}, "latents_std"),
        ("vae", {"scaling_factor": None}, "scaling_factor"),
        ("vae", {"scaling_factor": 0}, "scaling_factor"),
        ("vae", {"latent_channels": 16}, "latents of the VAE"),
        ("vae", {"out_channels": 1}, "out_channels"),
        ("vae", {"_class_name": "AutoencoderTiny"}, "AutoencoderTiny"),
        ("vae", {"quantization_config": {"load_in_8bit": True}}, "quantised"),
        ("vae", {"block_out_channels": 3}, "wrong type"),
        ("unet", {"_class_name": "ControlNetModel"}, "ControlNetModel"),
        ("unet", {"quantization_config": {}}, "quantised"),
        ("text_encoder", {"model_type": "t5"}, "t5"),
        ("text_encoder", {"hidden_size": 32}, "cross_attention_dim"),
        ("text_encoder", {"quantization_config": {}}, "quantised"),
        ("text_encoder", {"max_position_embeddings": 16}, "model_max_length"),
    ],
    ids=str,
)
def test_parts_that_would_be_read_wrongly_are_refused(part, changes, words, plain, copy_of):
    """What the two pipelines of diffusers leave out, and what does not fit together."""
    folder = copy_of(plain)
    edit(folder / part / "config.json", **changes)
    assert words in refusal(folder)


@pytest.mark.parametrize("limit", [..., None, 1e30, 1000, "77"])
def test_a_tokenizer_that_reads_too_much_is_refused(limit, plain, copy_of):
    """Beyond the positions of the text encoder it would fail at every prompt."""
    folder = copy_of(plain)
    edit(folder / "tokenizer" / "tokenizer_config.json", model_max_length=limit)
    assert "write 32 there" in refusal(folder)


def test_a_tokenizer_without_its_vocabulary_is_refused(plain, copy_of, hardware):
    """transformers would make an empty one, and every prompt the same; both forms of a whole one run."""
    folder = copy_of(plain)
    whole = resolve("zoo:digits/stable-diffusion") / "tokenizer"
    (folder / "tokenizer" / "tokenizer.json").unlink()
    for name in ("vocab.json", "merges.txt"):
        assert "its tokenizer has no vocabulary" in refusal(folder)
        shutil.copy(whole / name, folder / "tokenizer")
    assert_equal_pixels(folder, hardware, reference=load_reference(plain), prompts=PROMPTS[:1])
    (folder / "tokenizer" / "added_tokens.json").write_text('{"<cat>": 653}')
    assert "tokens up to number 653, its text encoder embeddings of 653" in refusal(folder)
    (folder / "tokenizer" / "added_tokens.json").unlink()
    edit(folder / "text_encoder" / "config.json", vocab_size=652)
    assert "tokens up to number 652" in refusal(folder)


@pytest.mark.parametrize(
    "name", ["pytorch_lora_weights.safetensors", "unet/pytorch_lora_weights.bin", "text_encoder/adapter_config.json"]
)
def test_adapters_that_would_not_be_applied_are_named(name, plain, copy_of):
    """LoRA weights beside a pipeline's own: nothing loads them, and the images would be those of the plain model."""
    folder = copy_of(plain)
    (folder / name).write_bytes(b"")
    assert f"({name}), which would not be applied; move the file elsewhere" in refusal(folder)


@pytest.mark.parametrize("part", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_part_that_is_not_there_is_named(part, plain, copy_of):
    """Before workers look for it."""
    folder = copy_of(plain)
    shutil.rmtree(folder / part)
    assert f"has no {part}/" in refusal(folder)


@pytest.mark.parametrize(
    ("part", "changes", "words"),
    [
        ("unet", {"class_embed_type": "simple_projection"}, "class_embed_type"),
        ("unet", {"class_embed_type": None}, "class_embed_type"),
        ("unet", {"projection_class_embeddings_input_dim": 8}, "not twice as many"),
        ("image_normalizer", {"embedding_dim": 16}, "not twice as many"),
        ("image_encoder", {"projection_dim": 16}, "not twice as many"),
        ("image_noising_scheduler", {"_class_name": "DDIMScheduler"}, "DDPMScheduler"),
        ("image_noising_scheduler", {"beta_schedule": "laplace"}, "beta_schedule"),
    ],
    ids=str,
)
def test_parts_of_unclip_that_do_not_fit_are_refused(part, changes, words, unclip, copy_of):
    """Embedding, normaliser and UNet of several models, other noise on the embeddings."""
    folder = copy_of(unclip)
    name = "scheduler_config.json" if part.endswith("scheduler") else "config.json"
    edit(folder / part / name, **changes)
    assert words in refusal(folder)


@pytest.mark.parametrize(
    ("field", "value"), [("resample", 1), ("do_rescale", False), ("image_processor_type", "DPTImageProcessor")]
)
def test_images_that_unclip_would_encode_otherwise_are_refused(field, value, unclip, copy_of):
    folder = copy_of(unclip)
    (path,) = (folder / "feature_extractor").glob("*.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    assert f"models.diffusion: '{folder}': {path.name}: {field}: {value!r}" in refusal(folder)


@pytest.mark.parametrize("name", sorted(one for one in dir(diffusers.schedulers) if one.endswith("Scheduler")))
def test_schedulers_of_another_training_are_refused(name, plain, copy_of):
    """TCD, EDM, flow matching and whatever else: `from_config` would turn them into one of four."""
    folder = copy_of(plain)
    edit(folder / "scheduler" / "scheduler_config.json", _class_name=name)
    edit(folder / "model_index.json", scheduler=["diffusers", name])
    if name in (*FAMILY, *CONSISTENCY):
        check_pipeline(folder, str(folder))
    else:
        assert f"its scheduler is a {name}, whose models are trained otherwise" in refusal(folder)


def test_the_two_names_of_a_scheduler_must_be_one(plain, copy_of):
    """diffusers takes one class from one file and the options from the other."""
    folder = copy_of(plain)
    edit(folder / "scheduler" / "scheduler_config.json", _class_name="LCMScheduler")
    assert "make both the same" in refusal(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"prediction_type": "sample"},
        {"prediction_type": "flow_prediction"},
        {"beta_schedule": "sigmoid"},
        {"beta_schedule": "laplace"},
        {"timestep_type": "continuous"},
        {"use_flow_sigmas": True},
        {"use_dynamic_shifting": True},
        {"variance_type": "learned"},
        {"variance_type": "learned_range"},
        {"predict_epsilon": False},
        {"trained_betas": [0.1]},
        {"trained_betas": "no"},
        {"num_train_timesteps": 0},
        {"num_train_timesteps": 10**12},
        {"num_train_timesteps": "1000"},
        {"steps_offset": -1},
        {"beta_start": "0.1"},
        {"beta_end": 2},
    ],
    ids=str,
)
def test_noise_of_another_training_is_refused(changes, plain, copy_of):
    """Whatever the scheduler that a job asks for."""
    folder = copy_of(plain)
    edit(folder / "scheduler" / "scheduler_config.json", **changes)
    assert next(iter(changes)) in (line := refusal(folder)) and "scheduler_config.json" in line


def test_vectors_of_a_textual_inversion_are_expanded(plain, copy_of, hardware):
    """`<cat>` with two further vectors is three tokens, as in diffusers; a single one stays one."""
    folder = copy_of(plain)
    reference = load_reference(plain)
    tokens = {"<cat>": torch.randn(3, 16, generator=torch.Generator().manual_seed(1)), "<dog>": torch.ones(16)}
    for token, vectors in tokens.items():
        reference.load_textual_inversion(vectors, token=token)
    reference.save_pretrained(folder)
    prompts = ["a <cat> and a <dog>", "a photo of a two"]
    assert_equal_pixels(folder, hardware, reference=reference, prompts=prompts)
    model = load_pipeline(str(folder), hardware)
    assert model.prompts.expanded(prompts[0]) == "a <cat> <cat>_1 <cat>_2 and a <dog>"
    with pytest.raises(JobError, match=r"has 3. tokens, the text encoder reads 32"):
        model.check_prompts(["<cat>" * 11])


def test_it_is_refused_by_plan_and_by_run_before_a_worker_starts(call, tmp_path, plain, copy_of):
    """Exit code 2, one line, nothing written."""
    folder = copy_of(plain)
    edit(folder / "unet" / "config.json", in_channels=9)
    job = tmp_path / "job.yaml"
    job.write_text(json.dumps(job_of(folder).model_dump(mode="json", exclude_none=True)))
    for command in (["plan", job, "--validate"], ["run", job, "--executor", "local"]):
        code, _, printed = call(*command, "--set", f"output.uri={tmp_path / 'run'}")
        assert code == 2 and "in_channels: 9" in printed and "inpainting" in printed and "Traceback" not in printed
    assert not (tmp_path / "run").exists()


def test_noise_levels_of_embeddings_end_with_the_schedule(unclip, copy_of):
    """A level that is not there was found by the first worker."""
    folder = copy_of(unclip)
    edit(folder / "image_noising_scheduler" / "scheduler_config.json", num_train_timesteps=100)
    job = job_of(folder)
    high = job.requests[0].conditioning.model_copy(update={"noise_level": 100})
    request = job.requests[0].model_copy(update={"conditioning": high})
    with pytest.raises(JobError, match=r"requests\.0\.conditioning\.noise_level: 100 is not below the 100"):
        check_addresses(job.model_copy(update={"requests": (request,)}))


def test_checks_need_no_torch():
    """Validation reads configurations: torch, diffusers and transformers take seconds to load."""
    code = (
        "import sys; from pathlib import Path; from engine.commands.jobfile import read_job\n"
        "from engine.models.job_checks import check_addresses\n"
        "check_addresses(read_job(Path('jobs/riskydiff-digits.yaml'), []))\n"
        "print({'torch', 'diffusers', 'transformers', 'numpy'} & sys.modules.keys())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "set()", done.stderr


def test_the_unconditional_half_is_that_of_the_negative_prompt(diffusion):
    """For every sample of the batch; the conditional half is that of the prompts."""
    prompts = ["a photo of a zero", "a photo of a one"]
    conditional, unconditional = diffusion.conditions(prompts, "red ink", None)
    for condition, texts in ((conditional, prompts), (unconditional, ["red ink"] * 2)):
        expected = diffusion.encode(texts)
        assert condition.tensors.keys() == expected.tensors.keys()
        assert all(torch.equal(condition[name], expected[name]) for name in expected.tensors)


def test_images_are_encoded_as_diffusers_encodes_them(diffusion):
    """To the latents that diffusers' image-to-image pipeline starts from, without its draw.

    Decoded, they are as close as this autoencoder brings them (0.035 on average); latents of another scale are not.
    """
    images = torch.from_numpy(compose_split("test", 4, seed=3).images).permute(0, 3, 1, 2).float() / 255
    reference = diffusers.StableDiffusionPipeline.from_pretrained(resolve("zoo:digits/stable-diffusion"))
    with torch.no_grad():
        latents = diffusion.encode_images(images)
        expected = reference.vae.encode(reference.image_processor.preprocess(images)).latent_dist.mode()
        errors = [(diffusion.decode(latents * scale) - images).abs().mean() for scale in (1, 0.5, 2)]
    assert torch.allclose(latents, expected * reference.vae.config.scaling_factor, atol=1e-5)
    assert latents.shape[1:] == diffusion.latent_shape
    assert errors[0] < 0.04 and min(errors[1:]) > 2 * errors[0]
