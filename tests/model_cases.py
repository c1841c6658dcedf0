"""Copies of the zoo's models with changed configurations and weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from safetensors.torch import load_file, save_file

from engine.job.parsing import parse_job
from engine.models.addresses import resolve
from tests.tiny_pipelines import load_reference

ZOO = {role: f"zoo:digits/{part}" for role, part in {
    "diffusion": "stable-diffusion", "clip": "clip", "target": "classifier", "transfer": "classifier-b",
    "oracle": "oracle",
}.items()}  # fmt: skip

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]


def copied(address: str, folder: Path, name: str = "config.json", **changes: Any) -> Path:
    """A copy of a model of the zoo with other fields in a configuration; None takes one out."""
    shutil.copytree(resolve(address), folder)
    config = json.loads((folder / name).read_text()) | changes
    (folder / name).write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def relabelled(address: str, folder: Path, names: list[str], order: list[int]) -> Path:
    """A copy of a classifier of the zoo with its classes in another order, and other names."""
    copied(address, folder, id2label=dict(enumerate(names)), label2id={name: place for place, name in enumerate(names)})
    weights, num_classes = load_file(folder / "model.safetensors"), len(order)
    heads = {name for name, value in weights.items() if value.ndim and value.ndim < 3 and len(value) == num_classes}
    changed = {name: value[order].contiguous() if name in heads else value for name, value in weights.items()}
    save_file(changed, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def job_of(**models: Any) -> Any:
    chosen: dict[str, Any] = ZOO | {"transfer": [ZOO["transfer"]]} | models
    request = {"name": "a", "method": "prompt", "classes": ["three"], "count": 1}
    return parse_job({"name": "job", "models": chosen, "requests": [request], "output": {"uri": "runs/x"}})


def as_bin(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def sharded(folder: Path, variant: str = "", dtype: torch.dtype | None = None) -> None:
    """Weights in two files with an index."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, index = sorted(weights), {}
    for number, part in enumerate((names[::2], names[1::2])):
        name = f"model{variant}-0000{number + 1}-of-00002.safetensors"
        chosen = {name: weights[name] if dtype is None else weights[name].to(dtype) for name in part}
        save_file(chosen, folder / name, metadata={"format": "pt"})
        index |= dict.fromkeys(part, name)
    document = {"metadata": {}, "weight_map": index}
    (folder / f"model.safetensors.index{variant}.json").write_text(json.dumps(document))


def resaved(change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], name: str = "model") -> Any:
    def rewrite(folder: Path) -> None:
        weights = change(load_file(folder / "model.safetensors"))
        (folder / "model.safetensors").unlink()
        save_file(weights, folder / f"{name}.safetensors", metadata={"format": "pt", "saved": "again"})

    return rewrite


def halved(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: one.half() if one.is_floating_point() else one for name, one in weights.items()}


def without(*parts: str) -> Any:
    """Leaves out the tensors that have one of some parts in their names."""
    return resaved(
        lambda weights: {name: one for name, one in weights.items() if not any(map(name.__contains__, parts))}
    )


def cast(dtype: torch.dtype) -> Any:
    return resaved(
        lambda weights: {name: one.to(dtype) if one.is_floating_point() else one for name, one in weights.items()}
    )


LOADED: dict[str, Callable[[Path], Any]] = {
    "fp16 alone": resaved(halved, "model.fp16"),
    "fp16 in shards": lambda folder: sharded(folder, ".fp16"),
    "in shards": sharded,
    "saved again": resaved(lambda weights: dict(reversed(weights.items()))),
}  # fmt: skip

PARTS = ("unet", "vae", "text_encoder")


def save_as(plain: Path, folder: Path, **options) -> Path:
    """A pipeline saved by diffusers with other options; some of its weights by transformers."""
    load_reference(plain).save_pretrained(folder, **options)
    return folder


def photographs(*sizes: tuple[int, int]) -> list[PIL.Image.Image]:
    """Smooth images of height and width."""
    drawn = np.random.default_rng(0)
    noise = [drawn.integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8) for height, width in sizes]
    pairs = zip(noise, sizes, strict=True)
    return [PIL.Image.fromarray(one).resize(size[::-1], PIL.Image.Resampling.BICUBIC) for one, size in pairs]


def as_tensor(image: PIL.Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
