"""Measure the embedded zoo `cifar10` on test images and on samples of its pipelines.

    uv run python tools/zoo/evaluate_cifar10.py --data DATA --zoo engine/zoo/cifar10

Writes `figures.json` into the zoo and contact sheets into `docs/`. Test images are those kept for figures; samples
start from fixed seeds. The referee is a ResNet-32 trained by others, which no part of the zoo has learnt from.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cifar10_data import CLASS_NAMES, Photographs, load_test
from cifar10_models import reconstruct
from classifiers import predict_logits
from clip_model import zero_shot_classes
from diffusers import StableDiffusionPipeline, StableUnCLIPImg2ImgPipeline
from drawing import (
    Bytes,
    Sampling,
    load_pipeline,
    load_unclip,
    part_sizes,
    percent,
    sample,
    sample_variations,
    save_sheet,
)
from numpy.typing import NDArray
from residual_networks import ResidualNetwork
from torch import Tensor
from transformers import AutoModelForImageClassification, CLIPModel, CLIPTokenizer, PreTrainedModel

from engine.studies.evaluate.distances import kernel_distance

SCALES = (5.0,)
UNCLIP_SCALES = (3.0,)
JOINT = (("cat", "dog"), ("airplane", "ship"))
TEMPLATE = "a photo of a {}"
Reader = Callable[[Bytes], NDArray[np.int64]]


def kid_x1000(first: Tensor, second: Tensor) -> float:
    """Kernel inception distance of features [N, d], [M, d], times 1,000."""
    return round(1000 * kernel_distance(first.double().numpy(), second.double().numpy()).value, 2)


def readers(zoo: Path, referee: ResidualNetwork) -> dict[str, Reader]:
    """Everything that reads a class from an image, by name."""
    found: dict[str, Reader] = {"resnet32": lambda images: referee.read(images)[1]}
    for name in ("classifier", "oracle"):
        model = AutoModelForImageClassification.from_pretrained(zoo / name)
        found[name] = _classifier_reader(model)
    for name in ("clip", "judge"):
        clip, tokenizer = CLIPModel.from_pretrained(zoo / name), CLIPTokenizer.from_pretrained(zoo / name)
        found[name] = _clip_reader(clip, tokenizer)
    return found


def _classifier_reader(model: PreTrainedModel) -> Reader:
    return lambda images: predict_logits(model, images).argmax(-1).numpy()


def _clip_reader(clip: CLIPModel, tokenizer: CLIPTokenizer) -> Reader:
    return lambda images: zero_shot_classes(clip, tokenizer, images, CLASS_NAMES)


def trained_classes(zoo: Path) -> list[str]:
    """The classes that the zoo's diffusion models learnt, from its README's companion `classes.json`."""
    return list(json.loads((zoo / "classes.json").read_text()))


def agreement(
    found: dict[str, Reader], images: Bytes, labels: NDArray[np.int64], names: Sequence[str]
) -> dict[str, Any]:
    """Share of images that each reader sees as labelled; of the referee by class too."""
    hits = {name: reader(images) == labels for name, reader in found.items()}
    figures: dict[str, Any] = {name: percent(hit) for name, hit in hits.items()}
    by_class = {name: percent(hits["resnet32"][labels == CLASS_NAMES.index(name)]) for name in names}
    return figures | {"resnet32 by class": by_class}


def judge_samples(
    pipeline: StableDiffusionPipeline, found: dict[str, Reader], referee: ResidualNetwork, test: Photographs, count: int
) -> dict[str, Any]:
    """Prompt-only samples at several guidance scales: who agrees with the prompt, and their distance to test images."""
    names = [name for name in CLASS_NAMES if CLASS_NAMES.index(name) in test.labels]
    labels = np.array([CLASS_NAMES.index(name) for name in names])[np.arange(count) % len(names)]
    prompts = [TEMPLATE.format(CLASS_NAMES[label]) for label in labels]
    figures: dict[str, Any] = {}
    for scale in SCALES:
        drawn = sample(pipeline, prompts, Sampling(guidance_scale=scale), seed=1000)
        figures[f"guidance scale {scale:g}"] = agreement(found, drawn, labels, names) | {
            "kid_resnet32_features_x1000": kid_x1000(referee.read(drawn)[0], referee.read(test.images)[0])
        }
        print(scale, json.dumps(figures[f"guidance scale {scale:g}"]), flush=True)
    return figures


def judge_variations(
    pipeline: StableUnCLIPImg2ImgPipeline,
    found: dict[str, Reader],
    referee: ResidualNetwork,
    test: Photographs,
    count: int,
) -> dict[str, Any]:
    """Variations of test images: who agrees with the class of the original."""
    rows = np.random.default_rng(0).choice(len(test.labels), min(count, len(test.labels)), replace=False)
    images, labels = test.images[rows], test.labels[rows]
    names = [name for name in CLASS_NAMES if CLASS_NAMES.index(name) in labels]
    prompts = [TEMPLATE.format(CLASS_NAMES[label]) for label in labels]
    figures: dict[str, Any] = {}
    for scale in UNCLIP_SCALES:
        sampling = Sampling(num_inference_steps=20, guidance_scale=scale)
        drawn = sample_variations(pipeline, images, prompts, sampling, seed=1000)
        figures[f"guidance scale {scale:g}"] = agreement(found, drawn, labels, names) | {
            "kid_resnet32_features_x1000": kid_x1000(referee.read(drawn)[0], referee.read(test.images)[0])
        }
        print("variations", scale, json.dumps(figures[f"guidance scale {scale:g}"]), flush=True)
    return figures


def judge_joint_prompts(
    pipeline: StableDiffusionPipeline, referee: ResidualNetwork, trained: Sequence[str], count: int
) -> dict[str, Any]:
    """How the referee reads samples of prompts that name two classes."""
    figures: dict[str, Any] = {}
    for names in (pair for pair in JOINT if set(pair) <= set(trained)):
        read = referee.read(sample(pipeline, [" and ".join(names)] * count, Sampling(), seed=5000))[1]
        figures[" and ".join(names)] = {name: percent(read == CLASS_NAMES.index(name)) for name in names}
    return figures


def judge_reconstructions(
    pipeline: StableDiffusionPipeline, referee: ResidualNetwork, test: Photographs
) -> dict[str, float]:
    """What the referee reads of test images before and after the autoencoder."""
    decoded = reconstruct(pipeline.vae, test.images)
    error = (decoded.astype(float) - test.images) / 255
    return {
        "resnet32_on_originals": percent(referee.read(test.images)[1] == test.labels),
        "resnet32_on_reconstructions": percent(referee.read(decoded)[1] == test.labels),
        "psnr_db": round(float(-10 * np.log10(np.mean(error**2))), 1),
    }


def evaluate(zoo: Path, data_folder: Path, count: int) -> dict[str, Any]:
    """All figures of the zoo."""
    referee, test, trained = (
        ResidualNetwork("resnet32", data_folder, "cpu"),
        load_test(data_folder, "reported"),
        trained_classes(zoo),
    )
    found, known = readers(zoo, referee), test.of_classes(trained)
    pipeline = load_pipeline(zoo)
    figures: dict[str, Any] = {
        "test images, ten classes": {
            name: percent(reader(test.images) == test.labels) for name, reader in found.items()
        },
        "test images, trained classes": agreement(found, known.images, known.labels, trained),
        "reconstruction": judge_reconstructions(pipeline, referee, known),
        "joint prompts": judge_joint_prompts(pipeline, referee, trained, min(count, 200)),
    }
    print(json.dumps(figures, indent=1), flush=True)
    figures["samples"] = judge_samples(pipeline, found, referee, known, count)
    figures["variations"] = judge_variations(load_unclip(zoo), found, referee, known, count)
    # Not every second image: classes are interleaved.
    halves = [referee.read(part)[0] for part in np.array_split(known.images, 2)]
    figures["kid of two halves of the test images"] = kid_x1000(*halves)
    figures["bytes"] = part_sizes(zoo)
    return figures


def save_sheets(zoo: Path, data_folder: Path, docs: Path) -> None:
    """`cifar10.png`: samples, two rows of joint prompts last; `cifar10-variations.png`: originals above variations."""
    trained, test = trained_classes(zoo), load_test(data_folder, "reported")
    pipeline, columns = load_pipeline(zoo), 20
    prompts = [TEMPLATE.format(name) for name in trained for _ in range(8 * columns // len(trained))]
    joint = [" and ".join(names) for names in JOINT if set(names) <= set(trained) for _ in range(columns)]
    drawn = sample(pipeline, prompts + joint, Sampling(guidance_scale=SCALES[-1]), seed=1000)
    save_sheet(drawn[: len(drawn) // columns * columns].reshape(-1, columns, 32, 32, 3), docs / "cifar10.png")
    known = test.of_classes(trained)
    images, labels = known.images[: 4 * columns], known.labels[: 4 * columns]
    prompts = [TEMPLATE.format(CLASS_NAMES[label]) for label in labels]
    varied = sample_variations(load_unclip(zoo), images, prompts, Sampling(num_inference_steps=20), seed=1000)
    pairs = np.stack([part.reshape(-1, columns, 32, 32, 3) for part in (images, varied)], axis=1)
    save_sheet(pairs.reshape(-1, columns, 32, 32, 3), docs / "cifar10-variations.png")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/ and classifiers/")
    parser.add_argument("--zoo", type=Path, default=Path("engine/zoo/cifar10"))
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder for the contact sheets")
    parser.add_argument("--count", type=int, default=1000, help="samples of each kind")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    figures = evaluate(arguments.zoo, arguments.data, arguments.count)
    (arguments.zoo / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    save_sheets(arguments.zoo, arguments.data, arguments.docs)


if __name__ == "__main__":
    main()
