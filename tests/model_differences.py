"""Images of the engine compared with those of diffusers' own pipelines: family, scheduler, guidance on and off.

`tests/test_model_differences.py` compares some of them, `tools/model_differences.py` writes the table of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers

from engine.methods.sampling.families import CLASSES, CONSISTENCY, KNOWN, ModelScheduler
from engine.models.diffusion import load_pipeline
from engine.models.hardware import Hardware
from engine.models.pipelines.base import Pipeline
from tests.flow_cases import save_pixart
from tests.tiny_pipelines import (
    BETAS,
    by_diffusers,
    by_engine,
    load_reference,
    save_lcm_pipeline,
    save_pipeline,
    save_xl_pipeline,
)

STEPS = 4
# A UNet of one block, and one that takes the guidance scale.
SMALL: dict[str, Any] = {
    "block_out_channels": (8,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "mid_block_type": None,
    "up_block_types": ("CrossAttnUpBlock2D",),
}
DISTILLED = {"time_cond_proj_dim": 8}
# Of diffusers' class for the scheduler that a job names; `model:` before a model's own.
USUAL = (*CLASSES, *(f"model:{name}" for name in KNOWN if name not in CONSISTENCY))
CONSISTENT = ("lcm", *(f"model:{name}" for name in CONSISTENCY))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A family of pipelines, or a kind of one.

    Attributes:
        save: writes a tiny pipeline with random weights into a folder, as diffusers saves it.
        schedulers: what a job may name, or `model:CLASS` for a model with such a scheduler of its own.
        scales: guidance scales.
        steps: denoising steps.
        reference: arguments for diffusers' pipeline.
    """

    save: Callable[[Path], Path]
    schedulers: tuple[str, ...] = USUAL
    scales: tuple[float, ...] = (1.0, 3.0)
    steps: int = STEPS
    reference: Mapping[str, Any] | None = None


def _turbo(save: Callable[..., Path]) -> Callable[[Path], Path]:
    scheduler = diffusers.EulerAncestralDiscreteScheduler(**BETAS, timestep_spacing="trailing")
    return lambda folder: save(folder, scheduler=scheduler)


TURBO = ("euler", "model:EulerAncestralDiscreteScheduler", "model:EulerDiscreteScheduler")
CASES: dict[str, Case] = {
    "Stable Diffusion": Case(save=lambda folder: save_pipeline(folder, unet=SMALL)),
    "Stable Diffusion, turbo": Case(save=_turbo(save_pipeline), schedulers=TURBO, scales=(1.0,), steps=1),
    "Stable Diffusion, LCM": Case(
        save=lambda folder: save_pipeline(folder, unet=DISTILLED, scheduler=diffusers.LCMScheduler()),
        schedulers=CONSISTENT,
        scales=(1.0, 8.0),
    ),
    "Stable unCLIP": Case(
        save=lambda folder: save_pipeline(folder, unet=SMALL, is_unclip=True),
        schedulers=("lms", "ddim", "euler", "dpmsolver++", "lcm", "model:EulerAncestralDiscreteScheduler"),
    ),
    "latent consistency model": Case(save=save_lcm_pipeline, schedulers=CONSISTENT, scales=(1.0, 8.0)),
    "Stable Diffusion XL": Case(save=lambda folder: save_xl_pipeline(folder, unet=SMALL)),
    "Stable Diffusion XL, turbo": Case(save=_turbo(save_xl_pipeline), schedulers=TURBO, scales=(1.0,), steps=1),
    "Stable Diffusion XL, LCM": Case(
        save=lambda folder: save_xl_pipeline(folder, unet=DISTILLED, scheduler=diffusers.LCMScheduler()),
        schedulers=CONSISTENT,
        scales=(1.0, 8.0),
    ),
    "Stable Diffusion XL, fused LCM-LoRA": Case(
        save=lambda folder: save_xl_pipeline(folder, scheduler=diffusers.LCMScheduler()),
        schedulers=CONSISTENT,
        scales=(1.0, 2.0),
    ),
    "PixArt-Sigma": Case(
        save=lambda folder: save_pixart(folder, transformer={"num_layers": 1}),
        reference={"use_resolution_binning": False},
    ),
}


class Both:
    """One pipeline in both programs."""

    def __init__(self, case: Case, folder: Path, hardware: Hardware) -> None:
        self.case = case
        self.folder = case.save(folder)
        self.reference = load_reference(folder)
        self.model: Pipeline = load_pipeline(str(folder), hardware)

    def difference(self, scheduler: str, scale: float) -> float:
        """Largest difference of images in [0, 1] with the same seeds, of two samples."""
        case, pipeline = self.case, self.reference
        asked, _, own = scheduler.partition(":")
        name = own or CLASSES[asked]
        if name != type(pipeline.scheduler).__name__:
            # A model's own scheduler is followed in all options, a job's is made from it.
            options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
            made = getattr(diffusers, name).from_config(pipeline.scheduler.config, **options)
            if asked == "dpmsolver++":
                made = getattr(diffusers, name).from_config(pipeline.scheduler.config, algorithm_type="dpmsolver++")
            pipeline = type(pipeline)(**pipeline.components | {"scheduler": made}, **self._flags())
            pipeline.set_progress_bar_config(disable=True)
        before = self.model._scheduler  # type: ignore[attr-defined]
        if own:
            config = dict(pipeline.scheduler.config) | {"_class_name": own}
            changed = ModelScheduler(config=config, name=own, is_corrected=before.is_corrected)
            self.model._scheduler = changed  # type: ignore[attr-defined]
        try:
            images = by_engine(self.model, case.steps, guidance_scale=scale, scheduler=asked)
        finally:
            self.model._scheduler = before  # type: ignore[attr-defined]
        expected = by_diffusers(pipeline, case.steps, guidance_scale=scale, **case.reference or {})
        assert images.shape == expected.shape and expected.std() > 0.01
        return float((images - expected).abs().max())

    def _flags(self) -> dict[str, Any]:
        """What else the constructor of diffusers' pipeline is given."""
        config = self.reference.config
        flags = ("force_zeros_for_empty_prompt", "requires_safety_checker")
        return {flag: config[flag] for flag in flags if flag in config}
