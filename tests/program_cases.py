"""A classifier as a factory, its settings, and a job for it."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import yaml

from tests import commands

DIGITS = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine",
]  # fmt: skip

SETTINGS: dict[str, Any] = {
    "labels": DIGITS,
    "image_size": 32,
    "mean": [0.5, 0.4, 0.3],
    "std": [0.2, 0.25, 0.3],
    "temperature": 2.0,
}

FACTORY = """
import torch


class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.convolution = torch.nn.Conv2d(3, 8, 3, padding=1)
        self.norm = torch.nn.BatchNorm2d(8)
        self.head = torch.nn.Linear(8, 10)

    def forward(self, pixels):
        return self.head(torch.relu(self.norm(self.convolution(pixels))).mean((2, 3)))


SETTINGS = dict(
    labels="zero one two three four five six seven eight nine".split(), image_size=32, mean=[0.5, 0.4, 0.3],
    std=[0.2, 0.25, 0.3], temperature=2.0,
)


def net(seed=5):
    torch.manual_seed(seed)
    return Net(), SETTINGS
"""


def job_of(target: str, home: Path) -> dict[str, Any]:
    """A small job against a target."""
    return {
        "name": "aimed",
        "models": {"diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip", "target": target},
        "requests": [{"name": "a", "method": "risky", "classes": ["three"], "count": 2}],
        "sampling": {"num_inference_steps": 2, "guidance_scale": 2.0},
        "output": {"uri": str(home / "run")},
        "runtime": {"device": "cpu"},
    }


def write(raw: dict[str, Any], folder: Path) -> Path:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


def riskforge(*arguments: Any, folder: Path, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    """The command as a user gives it in a folder."""
    done = commands.run(*arguments, folder=folder, **environment)
    assert done.returncode == code and "Traceback" not in done.stderr, done.stdout + done.stderr
    return done


def images(count: int, size: int = 48) -> list[PIL.Image.Image]:
    """Smooth colour images, as photographs are."""
    noise = np.random.default_rng(3).integers(0, 256, (count, 8, 8, 3), dtype=np.uint8)
    return [PIL.Image.fromarray(image).resize((size, size), PIL.Image.Resampling.BICUBIC) for image in noise]
