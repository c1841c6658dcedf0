"""Samples of a zoo's pipelines by plain diffusers calls, and contact sheets of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline, StableUnCLIPImg2ImgPipeline
from numpy.typing import NDArray
from PIL import Image
from publishing import stored_bytes
from training import batches
from unclip import embed_images

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How the pipeline is asked to draw."""

    num_inference_steps: int = 40
    guidance_scale: float = 3.0
    batch_size: int = 100


def percent(hits: NDArray[np.bool_]) -> float:
    """Share of hits in percent, to a tenth."""
    return round(100 * float(np.mean(hits)), 1)


def load_pipeline(zoo: Path) -> StableDiffusionPipeline:
    """The Stable Diffusion pipeline as any user loads it."""
    pipeline = StableDiffusionPipeline.from_pretrained(zoo / "stable-diffusion")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load_unclip(zoo: Path) -> StableUnCLIPImg2ImgPipeline:
    """The Stable unCLIP pipeline as any user loads it."""
    pipeline = StableUnCLIPImg2ImgPipeline.from_pretrained(zoo / "stable-unclip")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


Inputs = Callable[[slice], dict[str, Any]]
"""What a pipeline is called with for some of the samples, beside what `Sampling` says."""


def draw(pipeline: Any, inputs: Inputs, count: int, sampling: Sampling, *, seed: int) -> Bytes:
    """`count` samples of a pipeline, [N, 32, 32, 3]; sample `i` starts from noise of seed `seed + i`."""
    images = []
    for part in batches(count, sampling.batch_size):
        drawn = pipeline(
            **inputs(part),
            num_inference_steps=sampling.num_inference_steps,
            guidance_scale=sampling.guidance_scale,
            generator=[torch.Generator().manual_seed(seed + i) for i in range(part.start, part.stop)],
            output_type="np",
        )
        images.append(np.rint(drawn.images * 255).astype(np.uint8))
    return np.concatenate(images)


def sample(pipeline: StableDiffusionPipeline, prompts: Sequence[str], sampling: Sampling, *, seed: int) -> Bytes:
    """One image a prompt, [N, 32, 32, 3]."""
    return draw(pipeline, lambda part: {"prompt": list(prompts[part])}, len(prompts), sampling, seed=seed)


def sample_variations(
    pipeline: StableUnCLIPImg2ImgPipeline, images: Bytes, prompts: Sequence[str], sampling: Sampling, *, seed: int
) -> Bytes:
    """One variation of each image, [N, 32, 32, 3], by its embedding and a prompt."""
    embeds = embed_images(pipeline.image_encoder, images)

    def inputs(part: slice) -> dict[str, Any]:
        return {"prompt": list(prompts[part]), "image_embeds": embeds[part]}

    return draw(pipeline, inputs, len(prompts), sampling, seed=seed)


def save_sheet(tiles: Bytes, path: Path) -> None:
    """Write tiles [rows, columns, 32, 32, 3] as one picture, at twice the size."""
    rows, columns = tiles.shape[:2]
    sheet = tiles.transpose(0, 2, 1, 3, 4).reshape(rows * 32, columns * 32, 3).repeat(2, axis=0).repeat(2, axis=1)
    Image.fromarray(sheet).quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)


def part_sizes(zoo: Path) -> dict[str, int]:
    """Bytes of every part of a zoo, of what parts share in the first alone."""
    return {part.name: stored_bytes(part) for part in sorted(zoo.iterdir()) if part.is_dir()}
