"""The families of pipelines that run, by the class that `model_index.json` names; strings, so that none is imported."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

# Class in diffusers, and `module:class` of the family here.
FAMILIES: dict[str, str] = {
    "StableDiffusionPipeline": "engine.models.pipelines.stable_diffusion:StableDiffusion",
    "StableUnCLIPImg2ImgPipeline": "engine.models.pipelines.unclip:StableUnclip",
    "StableDiffusion3Pipeline": "engine.models.pipelines.stable_diffusion_3:StableDiffusion3",
    "LatentConsistencyModelPipeline": "engine.models.pipelines.latent_consistency:LatentConsistency",
    "StableDiffusionXLPipeline": "engine.models.pipelines.stable_diffusion_xl:StableDiffusionXL",
    "PixArtSigmaPipeline": "engine.models.pipelines.pixart_sigma:PixArtSigma",
}
# Classes that are easily taken for one that runs, and what they are.
NEAR: dict[str, str] = {
    "StableDiffusionXLImg2ImgPipeline": "the refiner of Stable Diffusion XL, which finishes the images of another"
    " pipeline and makes none from a prompt; give the base model",
    "LatentConsistencyModelImg2ImgPipeline": "a latent consistency model for images alone; save it as a"
    " LatentConsistencyModelPipeline, and give images in `start`",
}
# How the name of a tensor begins in checkpoints of one file, and the class that reads these; the first decides.
_CHECKPOINTS = (
    ("model.diffusion_model.joint_blocks.", "StableDiffusion3Pipeline"),
    ("conditioner.embedders.1.", "StableDiffusionXLPipeline"),
    ("", "StableDiffusionPipeline"),
)


def checkpoint_class(names: Iterable[str]) -> str:
    """The class of diffusers that reads a checkpoint of one file.

    Args:
        names: of its tensors; where they are not known, none.
    """
    known = ["", *names]
    return next(kind for start, kind in _CHECKPOINTS if any(name.startswith(start) for name in known))


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
        more = f" ({NEAR[class_name]})" if class_name in NEAR else ""
        return "" if class_name in FAMILIES else f"is a {class_name}{more}"
    return "is a pipeline with code of its own"
