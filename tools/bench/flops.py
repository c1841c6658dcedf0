"""The arithmetic that an arm cannot do without, counted on the configurations in folders of models."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageClassification, CLIPModel

from engine.models import arithmetic
from engine.models.arithmetic import META, Arithmetic, count_folder, on_meta, passes
from engine.models.configurations import read_config
from engine.models.preprocessing import Preprocessing


def count_arithmetic(diffusion: Path, target: Path, clip: Path) -> Arithmetic:
    """Count the models in some folders."""
    classifier = on_meta(lambda: AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(target)))
    vision = on_meta(lambda: CLIPModel(AutoConfig.from_pretrained(clip))).vision_model
    counted = count_folder(diffusion)
    assert counted is not None
    return dataclasses.replace(
        counted,
        target=sum(passes(lambda x: classifier(pixel_values=x).logits, _input(target))),
        clip=sum(passes(lambda x: vision(pixel_values=x).pooler_output, _input(clip))),
    )


def behind_tiny(counted: Arithmetic, diffusion: Path, tiny: Path) -> Arithmetic:
    """The same where guidance looks through the `AutoencoderTiny` of a folder."""
    return arithmetic.behind_tiny(counted, diffusion, read_config(tiny / "config.json"))


def _input(folder: Path) -> Tensor:
    """What a model's preprocessing makes of an image."""
    return Preprocessing.load(folder).of_tensor(torch.zeros(1, 3, 256, 256)).to(META)
