"""The families of pipelines that run, by the class that `model_index.json` names; strings, so that none is imported."""

from __future__ import annotations

from typing import Any

# Class in diffusers, and `module:class` of the family here.
FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": "engine.models.pipelines.stable_diffusion:StableDiffusion",
    "StableUnCLIPImg2ImgPipeline": "engine.models.pipelines.unclip:StableUnclip",
    "StableDiffusion3Pipeline": "engine.models.pipelines.stable_diffusion_3:StableDiffusion3",
}


def what_runs() -> str:
    """The remedy of a refused pipeline: the classes that run."""
    *others, last = (f"a {name}" for name in FAMILIES)
    return f"what runs: {', '.join(others)} or {last}, as docs/diffusion-models.md lists them"


def class_problem(class_name: Any) -> str:
    """Why a pipeline of a class does not run, or an empty string.

    Args:
        class_name: as `model_index.json` has it, of any kind.
    """
    if isinstance(class_name, str):
        return "" if class_name in FAMILIES else f"is a {class_name}"
    return "is a pipeline with code of its own"
