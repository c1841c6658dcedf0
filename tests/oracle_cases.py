"""Oracles of all kinds for digits, and jobs that name them."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from engine.commands.jobfile import read_job
from engine.driver.progress import PlainDisplay
from engine.job.parsing import parse_job
from engine.job.spec import JobSpec
from engine.models.addresses import resolve
from engine.studies.prepare.program import Prepared, prepare_neighbours
from tests.prepare_cases import QUICKSTART

CLIP, ORACLE, TARGET = "zoo:digits/clip", "zoo:digits/oracle", "zoo:digits/classifier"


def with_weights(folder: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Path:
    """A copy of the CLIP model of the digits with changed weights."""
    shutil.copytree(resolve(CLIP), folder)
    weights = load_file(folder / "model.safetensors")
    changed = {name: change(name, tensor).contiguous() for name, tensor in weights.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def other_clip(folder: Path, share: float = 0.3) -> Path:
    """A CLIP model of other weights, whose image tower is not that of the zoo's and nearly as good."""
    generator = torch.Generator().manual_seed(0)

    def change(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if not name.endswith("visual_projection.weight"):
            return tensor
        return tensor + share * tensor.std() * torch.randn(tensor.shape, generator=generator)

    return with_weights(folder, change)


def made_neighbours(data: Path | str, encoder: Path | str, home: Path, **options: Any) -> Prepared:
    job = read_job(QUICKSTART, [("runtime.device", "cpu")])
    display = PlainDisplay(io.StringIO())
    return prepare_neighbours(job, str(data), str(encoder), display=display, folder=str(home), **options)


def job_with(home: Path, oracles: Sequence[Path | str] = (), **models: Any) -> JobSpec:
    """A job of a few samples in few steps."""
    of_job: dict[str, Any] = {"diffusion": "zoo:digits/stable-diffusion", "clip": CLIP, "target": TARGET}
    of_job |= {"oracles": [str(one) for one in oracles]} | models
    request = {"name": "a", "method": "prompt", "classes": ["three", "eight"], "count": 2}
    return parse_job(
        {
            "name": "with-oracles",
            "models": of_job,
            "requests": [request, {"name": "b", "method": "prompt", "boundary": ["three", "eight"], "count": 2}],
            "sampling": {"num_inference_steps": 3, "guidance_scale": 2.0},
            "output": {"uri": str(home / "run"), "samples_per_shard": 8},
        }
    )
