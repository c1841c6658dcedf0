"""The trainer of the zoo `cifar10`, from noise for images and a teacher that knows nothing: two steps a stage.

Sees a stage that no longer runs, exports what its library cannot load, or is trained twice; not how good models are.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableUnCLIPImg2ImgPipeline
from transformers import AutoModelForImageClassification, CLIPModel

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from tools.targets.cifar_resnets import CifarResNet  # noqa: E402


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder in the form of the real data."""
    rng = np.random.default_rng(0)
    classes = np.array(["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"])
    (tmp_path / "cifar10").mkdir()
    for name in [*(f"cifar10_train_{i}of8" for i in range(8)), "cifar10_test_5000"]:
        images = rng.integers(256, size=(40, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / "cifar10" / f"{name}.npz", images=images, labels=np.arange(40) % 10, classes=classes)
    (tmp_path / "classifiers").mkdir()
    weights = {f"module.{key}": value for key, value in CifarResNet(3).state_dict().items()}
    torch.save({"state_dict": weights}, tmp_path / "classifiers" / "resnet20-12fca82f.th")
    return tmp_path


def train(data: Path, *options: str) -> str:
    """Run the script; what it printed."""
    command = [sys.executable, "tools/zoo/train_cifar10.py", "--data", str(data), "--build-folder", str(data / "build")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    short = ["--size", "cpu", "--max-steps", "2", "--threads", "1", *options]
    done = subprocess.run([*command, *short], cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_all_stages_run_once_and_export_what_libraries_load(data: Path) -> None:
    """Two calls share the stages; the second trains what the first left and publishes everything."""
    assert "oracle: done" in train(data, "--only", "oracle")
    output = data / "zoo"
    printed = train(data, "--output", str(output))
    assert "stable-unclip: done" in printed and "oracle: done" not in printed
    assert json.loads((output / "classes.json").read_text()) == ["airplane", "cat", "dog", "ship"]
    pipeline = StableDiffusionPipeline.from_pretrained(output / "stable-diffusion")
    assert pipeline("a photo of a cat", num_inference_steps=2, output_type="np").images.shape == (1, 32, 32, 3)
    assert StableUnCLIPImg2ImgPipeline.from_pretrained(output / "stable-unclip").unet.config.in_channels == 12
    for name in ("oracle", "classifier"):
        assert AutoModelForImageClassification.from_pretrained(output / name).config.num_labels == 10
        assert json.loads((output / name / "config.json").read_text())["temperature"] > 0
    assert CLIPModel.from_pretrained(output / "judge").config.projection_dim == 64
