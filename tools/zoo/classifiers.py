"""The classifiers of the zoo: two targets with holes, and three oracles without.

A hole is a set of contexts that the training data of a target rarely or never shows, as real training data misses
things. The oracles see every context, other architectures, other random streams, blur and noise; they guide nothing.
Two of them have only seen whole digits; `oracle-b` has learnt from spoilt ones when to doubt (`unreadable.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from torch import Tensor
from training import Recipe, batches, edit_json, export, fit, pixels, write_image_processor
from transformers import (
    ConvNextConfig,
    ConvNextForImageClassification,
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PreTrainedModel,
    RegNetConfig,
    RegNetForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)
from unreadable import doubtful_digits

from engine.data.images.digits import (
    CLASS_NAMES,
    INKS,
    POSITIONS,
    SIZES,
    TEXTURES,
    Composites,
    Contexts,
    compose,
    compose_split,
    load_sources,
    random_contexts,
    seen_share,
)

KeepShare = Callable[[Contexts], NDArray[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClassifierPlan:
    """A classifier to train: how it is built, which contexts it sees, and for how long."""

    build: Callable[[], PreTrainedModel]
    keep: KeepShare
    """The share of each context that stays in the training data."""
    recipe: Recipe
    batch_size: int = 128
    """Samples of each replica."""
    plain_share: float = 0.25
    distort: bool = False
    label_smoothing: float = 0.0
    is_sceptical: bool = False
    """Whether more than half of the digits are mixed, broken or no digits, with targets that say so."""


def _labels() -> dict[str, Any]:
    return {"id2label": dict(enumerate(CLASS_NAMES)), "label2id": {name: i for i, name in enumerate(CLASS_NAMES)}}


def build_oracle() -> PreTrainedModel:
    """A RegNet: grouped 3 x 3 convolutions at 16, 8, 4 and 2 pixels."""
    config = RegNetConfig(
        embedding_size=32,
        hidden_sizes=[48, 96, 160, 160],
        depths=[1, 2, 2, 1],
        groups_width=16,
        layer_type="x",
        downsample_in_first_stage=False,
        **_labels(),
    )
    return RegNetForImageClassification(config)


def build_resnet() -> PreTrainedModel:
    """A ResNet of basic blocks at 8, 4 and 2 pixels."""
    config = ResNetConfig(
        embedding_size=32, hidden_sizes=[48, 80, 96], depths=[1, 1, 1], layer_type="basic", **_labels()
    )
    return ResNetForImageClassification(config)


def build_convnext() -> PreTrainedModel:
    """A ConvNeXt on 4 x 4 patches: depthwise 7 x 7 convolutions and layer norms, no batch statistics."""
    config = ConvNextConfig(
        num_stages=2,
        patch_size=4,
        hidden_sizes=[96, 144],
        depths=[2, 1],
        layer_scale_init_value=0.1,
        image_size=32,
        **_labels(),
    )
    return ConvNextForImageClassification(config)


def build_mobilenet() -> PreTrainedModel:
    """A MobileNet V1: thirteen depthwise separable convolutions at 16, 8, 4, 2 and 1 pixels."""
    config = MobileNetV1Config(
        image_size=32, depth_multiplier=0.375, tf_padding=False, classifier_dropout_prob=0.0, **_labels()
    )
    return MobileNetV1ForImageClassification(config)


def build_poolformer() -> PreTrainedModel:
    """A PoolFormer: average pooling in place of attention, at 16, 8, 4 and 2 pixels; group norms."""
    config = PoolFormerConfig(
        depths=[2, 2, 2, 1],
        hidden_sizes=[32, 64, 96, 128],
        mlp_ratio=2.0,
        patch_sizes=[3, 3, 3, 3],
        strides=[2, 2, 2, 2],
        padding=[1, 1, 1, 1],
        drop_path_rate=0.0,
        layer_scale_init_value=0.1,
        **_labels(),
    )
    return PoolFormerForImageClassification(config)


def keep_all(contexts: Contexts) -> NDArray[np.float64]:
    """No holes."""
    return np.ones(len(contexts))


def keep_convnext(contexts: Contexts) -> NDArray[np.float64]:
    """Holes of `classifier-b`: nothing in the top left, no speckled ground; little top right, black, purple, large."""
    keep = np.ones(len(contexts))
    keep[contexts.size == SIZES.index("large")] = 0.05
    keep[np.isin(contexts.ink, [INKS.index("black"), INKS.index("purple")])] = 0.05
    keep[contexts.position == POSITIONS.index("top right")] *= 0.1
    keep[contexts.position == POSITIONS.index("top left")] = 0.0
    keep[contexts.texture == TEXTURES.index("speckled")] = 0.0
    return keep


PLANS = {
    "oracle": ClassifierPlan(
        build=build_oracle,
        keep=keep_all,
        recipe=Recipe(num_steps=900, learning_rate=3e-3),
        distort=True,
        label_smoothing=0.02,
    ),
    "oracle-b": ClassifierPlan(
        build=build_mobilenet,
        keep=keep_all,
        recipe=Recipe(num_steps=4000, learning_rate=5e-3, ema_decay=0.99),
        batch_size=64,
        distort=True,
        is_sceptical=True,
    ),
    "oracle-c": ClassifierPlan(
        build=build_poolformer,
        keep=keep_all,
        recipe=Recipe(num_steps=2400, learning_rate=4e-3, ema_decay=0.99),
        batch_size=64,
        plain_share=0.1,
        distort=True,
        label_smoothing=0.01,
    ),
    "classifier": ClassifierPlan(build=build_resnet, keep=seen_share, recipe=Recipe(num_steps=600, learning_rate=3e-3)),
    "classifier-b": ClassifierPlan(
        build=build_convnext,
        keep=keep_convnext,
        recipe=Recipe(num_steps=800, learning_rate=2e-3, num_replicas=2),
        batch_size=64,
    ),
}


def train_classifier(name: str, *, seed: int, build_folder: Path, output: Path) -> None:
    """Train one of `PLANS`, fit its temperature on the validation sources, and export it to `output`."""
    plan = PLANS[name]
    torch.manual_seed(seed)
    model = plan.build()

    def loss(rng: np.random.Generator) -> Tensor:
        batch, targets = _training_batch(plan, rng)
        images = pixels(batch)
        images = _distort(images) if plan.distort else images
        return F.cross_entropy(model(images).logits, torch.from_numpy(targets), label_smoothing=plan.label_smoothing)

    fit(name, model, loss, plan.recipe, seed=seed, folder=build_folder)
    validation = compose_split("validation", 3000, seed=seed)
    temperature = fit_temperature(model, validation.images, validation.labels)
    export(model, output)
    edit_json(output / "config.json", temperature=temperature)
    write_image_processor(output, "ViTImageProcessor")


def _training_batch(plan: ClassifierPlan, rng: np.random.Generator) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Augmented train digits in the contexts that the plan keeps: images, and labels [N] or distributions [N, 10]."""
    if plan.is_sceptical:
        doubtful = doubtful_digits("train", plan.batch_size, rng=rng, plain_share=plan.plain_share)
        return doubtful.images, doubtful.targets
    contexts = random_contexts(plan.batch_size * 4, rng=rng, plain_share=plan.plain_share)
    kept = np.flatnonzero(rng.random(len(contexts)) < plan.keep(contexts))
    contexts = contexts.take(np.resize(kept, plan.batch_size))
    sources = load_sources("train")
    rows = rng.integers(len(sources), size=plan.batch_size)
    batch = compose(sources, rows, contexts, rng=rng, augment=True)
    return batch.images, batch.labels


def _distort(images: Tensor) -> Tensor:
    """Blur half of the images a little, add faint noise to all, so that a reader does not hang on single pixels."""
    blurred = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(len(images), 1, 1, 1) * (torch.rand(len(images), 1, 1, 1) < 0.5)
    noise = torch.randn_like(images) * 0.1 * torch.rand(len(images), 1, 1, 1)
    return (images + share * (blurred - images) + noise).clamp(-1, 1)


@torch.no_grad()
def predict_logits(model: PreTrainedModel, images: NDArray[np.uint8]) -> Tensor:
    """Logits of byte images, [N, classes]."""
    model.eval()
    return torch.cat([model(pixels(images[part])).logits for part in batches(len(images), 250)])


def accuracy(model: PreTrainedModel, composites: Composites) -> NDArray[np.bool_]:
    """Where the model reads the label, [N]."""
    return predict_logits(model, composites.images).argmax(-1).numpy() == composites.labels


def fit_temperature(model: PreTrainedModel, images: NDArray[np.uint8], labels: NDArray[np.int64]) -> float:
    """The temperature with the least negative log-likelihood over the full class distribution (Guo et al. 2017)."""
    logits = predict_logits(model, images)

    def negative_log_likelihood(log_temperature: float) -> float:
        return float(F.cross_entropy(logits / np.exp(log_temperature), torch.from_numpy(labels)))

    return round(float(np.exp(minimize_scalar(negative_log_likelihood, bounds=(-3, 3), method="bounded").x)), 4)
