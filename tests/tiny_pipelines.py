"""Tiny pipelines with random weights, as diffusers saves them, and what the two programs make of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

from engine.job.parsing import parse_job
from engine.methods.sampling.loop import sample
from engine.methods.sampling.spec import SamplingSpec
from engine.models.addresses import resolve
from engine.models.pipelines.base import EMBEDDINGS, LATENTS, ImageConditioning, Pipeline

PROMPTS = ["three and eight", "a photo of a two"]
SEEDS = [5, 6]
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
WIDTH = 16
UNET: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": (16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "cross_attention_dim": WIDTH,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
VAE: dict[str, Any] = {
    "block_out_channels": (8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "latent_channels": 4,
    "norm_num_groups": 4,
    "sample_size": 32,
}
ENCODER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


def save_pipeline(
    folder: Path,
    *,
    unet: dict[str, Any] | None = None,
    vae: dict[str, Any] | None = None,
    scheduler: Any = None,
    is_unclip: bool = False,
) -> Path:
    """Save a pipeline; `unet` and `vae` are changes of their options."""
    torch.manual_seed(0)
    quiet()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(resolve("zoo:digits/stable-diffusion") / "tokenizer")
    text = transformers.CLIPTextConfig(
        **ENCODER, vocab_size=len(tokenizer), max_position_embeddings=32, bos_token_id=651, eos_token_id=652
    )
    embedding = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16} if is_unclip else {}
    parts: dict[str, Any] = {
        "unet": diffusers.UNet2DConditionModel(**UNET | embedding | (unet or {})),
        "vae": diffusers.AutoencoderKL(**VAE | (vae or {})),
        "text_encoder": transformers.CLIPTextModel(text),
        "tokenizer": tokenizer,
        "scheduler": scheduler or diffusers.DDIMScheduler(**BETAS, clip_sample=False, steps_offset=1),
    }
    if is_unclip:
        vision = transformers.CLIPVisionConfig(**ENCODER, image_size=16, patch_size=8, projection_dim=8)
        parts |= {
            "image_encoder": transformers.CLIPVisionModelWithProjection(vision),
            "feature_extractor": transformers.CLIPImageProcessor(),
            "image_normalizer": diffusers.pipelines.stable_diffusion.StableUnCLIPImageNormalizer(embedding_dim=8),
            "image_noising_scheduler": diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        }
        diffusers.StableUnCLIPImg2ImgPipeline(**parts).save_pretrained(folder)
        return folder
    parts |= {"safety_checker": None, "feature_extractor": None}
    diffusers.StableDiffusionPipeline(**parts, requires_safety_checker=False).save_pretrained(folder)
    return folder


def save_xl_pipeline(
    folder: Path, *, unet: dict[str, Any] | None = None, scheduler: Any = None, zeroes_empty: bool = True
) -> Path:
    """Save a Stable Diffusion XL, whose encoders and tokenizers differ; `unet` are changes of its options."""
    quiet()
    torch.manual_seed(0)
    zoo = resolve("zoo:digits/stable-diffusion") / "tokenizer"
    tokenizer = transformers.CLIPTokenizer.from_pretrained(zoo)
    # As in the original the second pads with another token.
    tokenizer_2 = transformers.CLIPTokenizer.from_pretrained(zoo, pad_token="<|startoftext|>")
    text: dict[str, Any] = ENCODER | {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 32,
        "num_hidden_layers": 2,
    }
    text |= {"bos_token_id": 651, "eos_token_id": 652}
    added: dict[str, Any] = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    added |= {"projection_class_embeddings_input_dim": 6 * 8 + 24, "cross_attention_dim": 16 + 24}
    second = transformers.CLIPTextConfig(**text | {"hidden_size": 24, "hidden_act": "gelu"}, projection_dim=24)
    pipeline = diffusers.StableDiffusionXLPipeline(
        unet=diffusers.UNet2DConditionModel(**UNET | added | (unet or {})),
        vae=diffusers.AutoencoderKL(**VAE | {"scaling_factor": 0.13025}),
        text_encoder=transformers.CLIPTextModel(transformers.CLIPTextConfig(**text)),
        text_encoder_2=transformers.CLIPTextModelWithProjection(second),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer_2,
        scheduler=scheduler or diffusers.EulerDiscreteScheduler(**BETAS),
        force_zeros_for_empty_prompt=zeroes_empty,
        add_watermarker=False,
    )
    pipeline.save_pretrained(folder)
    return folder


def save_lcm_pipeline(folder: Path, *, unet: dict[str, Any] | None = None) -> Path:
    """Save a latent consistency model of Stable Diffusion."""
    save_pipeline(folder, unet={"time_cond_proj_dim": 8} | (unet or {}), scheduler=diffusers.LCMScheduler())
    edit(folder / "model_index.json", _class_name="LatentConsistencyModelPipeline")
    return folder


def quiet() -> None:
    """No progress bars and no advice."""
    from engine.models.library_logging import quiet_libraries

    quiet_libraries()


def edit(path: Path, **changes: Any) -> None:
    """Change keys of a JSON file; a key that gets `...` is taken out."""
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def load_reference(folder: Path, **options: Any) -> Any:
    """The pipeline of a folder as diffusers loads it."""
    quiet()
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, **options)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def by_diffusers(
    pipeline: Any, steps: int, *, prompts: list[str] = PROMPTS, guidance_scale: float = 3.0, **options: Any
) -> torch.Tensor:
    """Images [B, 3, H, W] of the pipeline in diffusers."""
    if "image_noising_scheduler" in pipeline.components:
        options |= {"image_embeds": embeds(8), "noise_level": 100}
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS[: len(prompts)]]
    return pipeline(
        prompt=prompts,
        generator=generators,
        output_type="pt",
        num_inference_steps=steps,
        guidance_scale=guidance_scale,
        **options,
    ).images


def by_engine(
    model: Pipeline, steps: int, *, prompts: list[str] = PROMPTS, guidance_scale: float = 3.0, **options: Any
) -> torch.Tensor:
    """The same of the engine; `options` are of `sampling`."""
    spec = SamplingSpec(num_inference_steps=steps, guidance_scale=guidance_scale, **options)
    stream = model.noise_stream(SEEDS[: len(prompts)])
    noise, sampler = model.first_noise(stream), model.sampler(spec, stream)
    images = None
    if EMBEDDINGS in noise:
        images = ImageConditioning(embeds=embeds(noise[EMBEDDINGS].shape[1]), noise=noise, noise_level=100)
    with torch.no_grad():
        latents = sample(model.denoiser(prompts, spec, sampler, images), sampler, noise[LATENTS])
        return model.decode(latents).clamp(0, 1)


def embeds(dim: int) -> torch.Tensor:
    """Image embeddings of two samples, [2, d]."""
    return torch.randn(2, dim, generator=torch.Generator().manual_seed(0))


def job_of(folder: Path, *, method: str = "prompt", sampling: dict[str, Any] | None = None, **models: Any) -> Any:
    """A job with the pipeline of a folder."""
    is_unclip = (folder / "image_normalizer").is_dir()
    request: dict[str, Any] = {"name": "a", "method": method, "classes": "all", "count": 1}
    if method == "boundary":
        request |= {"boundary": ["three", "eight"]}
        del request["classes"]
    if is_unclip:
        request |= {"conditioning": {"images": "zoo:digits"}}
    raw = {
        "name": "job",
        "models": {"diffusion": str(folder), "clip": "zoo:digits/clip", "target": "zoo:digits/classifier"} | models,
        "requests": [request],
        "sampling": sampling or {},
        "output": {"uri": "runs/x"},
    }
    return parse_job(raw)
