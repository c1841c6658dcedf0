"""Tiny pipelines of flow matching with random weights, as diffusers saves them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from engine.methods.sampling.loop import Start, sample
from engine.methods.sampling.spec import SamplingSpec
from engine.models.addresses import resolve
from engine.models.diffusion import load_pipeline
from engine.models.hardware import Hardware
from engine.models.pipelines.base import LATENTS
from tests.tiny_pipelines import BETAS, ENCODER, PROMPTS, SEEDS, VAE, edit, load_reference, quiet

# Of T5: letters, so that any prompt has tokens.
LETTERS = "▁abcdefghijklmnopqrstuvwxyz"
WIDTH = 40
CLIP_TOKENS = 32
STEPS = 4
TRANSFORMER: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 16,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "caption_projection_dim": 16,
    "pooled_projection_dim": 20,
    "out_channels": 16,
    "pos_embed_max_size": 16,
}
PIXART: dict[str, Any] = {
    "sample_size": 8,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "cross_attention_dim": 16,
    "caption_channels": 24,
    "norm_num_groups": 4,
}
SHIFTED_VAE: dict[str, Any] = {
    "latent_channels": 16,
    "scaling_factor": 1.5305,
    "shift_factor": 0.0609,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
# None is diffusers' default: from those another scheduler than the model's own would not inherit them.
DYNAMIC: dict[str, Any] = {
    "use_dynamic_shifting": True,
    "base_image_seq_len": 8,
    "max_image_seq_len": 64,
    "base_shift": 0.4,
    "max_shift": 1.2,
}


def euler(**options: Any) -> Any:
    """The scheduler of most models of flow matching."""
    return diffusers.FlowMatchEulerDiscreteScheduler(**({"shift": 3.0} | options))


def t5_parts(seed: int = 0, *, width: int = WIDTH) -> tuple[Any, Any]:
    """A text encoder, and a tokenizer of letters."""
    torch.manual_seed(seed)
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *((letter, -2.0) for letter in LETTERS)]
    tokenizer = transformers.T5TokenizerFast(vocab=vocabulary, extra_ids=0, model_max_length=512)
    config = transformers.T5Config(
        vocab_size=len(vocabulary), d_model=width, d_kv=8, d_ff=16, num_layers=1, num_heads=2, dropout_rate=0.0
    )
    return transformers.T5EncoderModel(config).eval(), tokenizer


def save_sd3(
    folder: Path,
    *,
    with_t5: bool = False,
    scheduler: Any = None,
    transformer: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
) -> Path:
    """Save a Stable Diffusion 3; `transformer` and `vae` are changes of their options."""
    quiet()
    torch.manual_seed(0)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(resolve("zoo:digits/stable-diffusion") / "tokenizer")
    text: dict[str, Any] = ENCODER | {"vocab_size": len(tokenizer), "max_position_embeddings": CLIP_TOKENS}
    text |= {"num_hidden_layers": 2, "bos_token_id": 651, "eos_token_id": 652}
    first, second = (
        transformers.CLIPTextModelWithProjection(transformers.CLIPTextConfig(**text, projection_dim=dim))
        for dim in (12, 8)
    )
    network = diffusers.SD3Transformer2DModel(**TRANSFORMER | (transformer or {}))
    for parameter in network.parameters():
        # As trained ones are: with diffusers' zeros the output would not depend on the prompt.
        torch.nn.init.normal_(parameter, std=0.1)
    t5, letters = t5_parts() if with_t5 else (None, None)
    diffusers.StableDiffusion3Pipeline(
        transformer=network,
        vae=diffusers.AutoencoderKL(**VAE | SHIFTED_VAE | (vae or {})),
        text_encoder=first,
        tokenizer=tokenizer,
        text_encoder_2=second,
        tokenizer_2=tokenizer,
        text_encoder_3=t5,
        tokenizer_3=letters,
        scheduler=scheduler or euler(),
    ).save_pretrained(folder)
    return folder


def save_pixart(
    folder: Path,
    *,
    transformer: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    scheduler: Any = None,
) -> Path:
    """Save a PixArt-Sigma; `transformer` and `vae` are changes of their options."""
    quiet()
    torch.manual_seed(0)
    network = diffusers.PixArtTransformer2DModel(**PIXART | (transformer or {}))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    t5, letters = t5_parts(width=24)
    diffusers.PixArtSigmaPipeline(
        transformer=network,
        vae=diffusers.AutoencoderKL(**VAE | {"scaling_factor": 0.13025} | (vae or {})),
        text_encoder=t5,
        tokenizer=letters,
        scheduler=scheduler or diffusers.DPMSolverMultistepScheduler(**BETAS),
    ).save_pretrained(folder)
    return folder


def load_sd3(folder: Path) -> Any:
    """A Stable Diffusion 3 as diffusers loads it, which is to be told that a T5 is left out."""
    has_t5 = (folder / "text_encoder_3").is_dir()
    return load_reference(folder, **({} if has_t5 else {"text_encoder_3": None, "tokenizer_3": None}))


def with_scheduler(folder: Path, scheduler: Any) -> Path:
    """The folder with another scheduler."""
    scheduler.save_pretrained(folder / "scheduler")
    edit(folder / "model_index.json", scheduler=["diffusers", type(scheduler).__name__])
    return folder


def dpm_solver(scheduler: Any) -> Any:
    """DPM-Solver++ for flow matching, as diffusers' documents have it made from a model's own scheduler."""
    options = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
    return diffusers.DPMSolverMultistepScheduler.from_config(scheduler.config, **options)


# By the job's scheduler and the options of the model's own: that one, the job's sampling, and what diffusers samples
# with; the model's own where that is None.
Scheduler = tuple[Any, dict[str, Any], Any]
SCHEDULERS: dict[str, Scheduler] = {
    "`euler`": (euler(), {"scheduler": "euler"}, None),
    "`model`, no shift": (euler(shift=1.0), {"scheduler": "model"}, None),
    "`model`, dynamic shift": (euler(**DYNAMIC), {"scheduler": "model"}, None),
    "`euler`, linear dynamic shift": (euler(**DYNAMIC, time_shift_type="linear"), {"scheduler": "euler"}, None),
    "`euler`, Karras": (euler(), {"scheduler": "euler", "use_karras_sigmas": True}, euler(use_karras_sigmas=True)),
    "`euler`, exponential": (euler(use_exponential_sigmas=True), {"scheduler": "euler"}, None),
    "`model`, beta": (euler(use_beta_sigmas=True), {"scheduler": "model"}, None),
    "`dpmsolver++`": (euler(), {"scheduler": "dpmsolver++"}, dpm_solver(euler())),
    "`dpmsolver++`, dynamic shift": (euler(**DYNAMIC), {"scheduler": "dpmsolver++"}, dpm_solver(euler(**DYNAMIC))),
    "`model`, FlowMatchHeunDiscrete": (
        diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
        {"scheduler": "model"},
        None,
    ),
}
SCALES = (1.0, 4.0)


def engine_latents(
    model: Any, prompts: list[str] = PROMPTS, start: Start | None = None, **sampling: Any
) -> list[torch.Tensor]:
    """Latents of the engine, and their images."""
    spec = SamplingSpec(**{"num_inference_steps": STEPS, "guidance_scale": 3.0} | sampling)
    sampler, noise = model.sampler(spec), model.draw_noise(SEEDS[: len(prompts)])
    with torch.no_grad():
        latents = sample(model.denoiser(prompts, spec, sampler), sampler, noise[LATENTS], start)
        return [latents, model.decode(latents).clamp(0, 1)]


def diffusers_latents(pipeline: Any, prompts: list[str] = PROMPTS, **options: Any) -> list[torch.Tensor]:
    """The same of diffusers' pipeline."""
    made = []
    for output in ("latent", "pt"):
        generators = [torch.Generator().manual_seed(seed) for seed in SEEDS[: len(prompts)]]
        options = {"num_inference_steps": STEPS, "guidance_scale": 3.0} | options
        made.append(pipeline(prompt=prompts, generator=generators, output_type=output, **options).images)
    return made


class BothFlows:
    """One pipeline in both programs.

    Args:
        folder: of a Stable Diffusion 3; its scheduler is changed.
        hardware: where the engine's runs.
    """

    def __init__(self, folder: Path, hardware: Hardware) -> None:
        self.folder = folder
        self.model: Any = load_pipeline(str(folder), hardware)
        self.reference = load_sd3(folder)

    def with_scheduler(self, name: str) -> dict[str, Any]:
        """Let both have one of `SCHEDULERS`: the job's sampling."""
        own, sampling, theirs = SCHEDULERS[name]
        self.model._scheduler = self.model.read_scheduler(with_scheduler(self.folder, own))
        self.reference.scheduler = theirs or own
        return sampling

    def differences(self, name: str, scale: float) -> list[float]:
        """Largest differences of latents, and of images in [0, 1], with the same seeds, of two samples."""
        sampling = self.with_scheduler(name)
        made = engine_latents(self.model, guidance_scale=scale, **sampling)
        expected = diffusers_latents(self.reference, guidance_scale=scale)
        assert expected[1].std() > 0.01
        return [float((ours - theirs).abs().max()) for ours, theirs in zip(made, expected, strict=True)]


def darkness() -> Any:
    """A criterion of a user's own: the darker the better."""
    return lambda images, scene: images.flatten(1).mean(1)


def raw_job(folder: Path, **changes: Any) -> dict[str, Any]:
    """A job with every method, a criterion of a user and a start."""
    common = {"count": 1, "classes": ["three", "eight"], "seed_group": "all"}
    start = {"images": "digits:test", "strength": 0.6}
    own = "tests.flow_cases:darkness"
    requests = [
        {"name": "plain", "method": "prompt"} | common,
        {"name": "risky", "method": "risky"} | common,
        {"name": "own", "method": own} | common,
        {"name": "started", "method": own, "start": start} | common,
        {"name": "joint", "method": "boundary", "boundary": ["three", "eight"], "count": 2, "seed_group": "all"},
    ]
    raw = {
        "name": "job",
        "models": {"diffusion": str(folder), "clip": "zoo:digits/clip", "target": "zoo:digits/classifier"},
        "sampling": {"scheduler": "euler", "num_inference_steps": 4, "guidance_scale": 3.0},
        "guidance": {name: {"every": 1} for name in ("custom", "risky", "boundary")},
        "runtime": {"device": "cpu"},
        "requests": requests,
        "output": {"uri": "runs/none"},
    }
    return raw | changes
