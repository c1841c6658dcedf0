"""Measure the embedded zoo `digits`: what its readers read, what its autoencoder keeps, what its pipeline draws.

    uv run python tools/zoo/evaluate_digits.py --zoo engine/zoo/digits
    uv run python tools/zoo/evaluate_digits.py --only oracle-b      # what concerns one classifier, beside what is there

Writes `figures.json` into the zoo, and contact sheets into `docs/`. All images come from test sources or from the
pipelines with fixed seeds; the probe of ink and background is trained here on train sources.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from autoencoder import Reader, reconstruct, train_reader
from classifiers import PLANS, accuracy, predict_logits
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
from training import Recipe, batches, pixels
from transformers import AutoModelForImageClassification, CLIPModel, CLIPTokenizer, PreTrainedModel
from unclip import embed_images
from unreadable import KINDS, doubtful_digits

from engine.data.images.digits import (
    BACKGROUNDS,
    CLASS_NAMES,
    INKS,
    POSITIONS,
    SIZES,
    TEXTURES,
    ZERO_SHOT_TEMPLATE,
    Composites,
    Contexts,
    compose_split,
    context_text,
    plain_contexts,
    random_contexts,
)

GROUPS = {"ink": INKS, "background": BACKGROUNDS, "texture": TEXTURES, "size": SIZES, "position": POSITIONS}
UNCLIP_SCALES = (3.0, 10.0)
JOINT = (("three", "eight"), ("four", "nine"), ("three", "five", "eight"))
PROBE_RECIPE = Recipe(num_steps=500, learning_rate=3e-3)


def by_group(hits: NDArray[np.bool_], contexts: Contexts) -> dict[str, dict[str, float]]:
    """Share of hits for every value of every attribute."""
    return {
        group: {name: percent(hits[getattr(contexts, group) == i]) for i, name in enumerate(names)}
        for group, names in GROUPS.items()
    }


def read_classifier(zoo: Path, name: str) -> dict[str, Any]:
    """Accuracy of a classifier on plain and on context test composites, and of which kinds it is sure."""
    plain, mixed = compose_split("test", 1041, seed=0, plain=True), compose_split("test", 3470, seed=0)
    model = AutoModelForImageClassification.from_pretrained(zoo / name)
    hits = accuracy(model, mixed)
    return {
        "plain": percent(accuracy(model, plain)),
        "contexts": percent(hits),
        "groups": by_group(hits, mixed.contexts),
        "sure": sure_shares(model, read_temperature(zoo / name)),
    }


def read_temperature(part: Path) -> float:
    """The fitted temperature, from the file: transformers drops it."""
    return float(json.loads((part / "config.json").read_text())["temperature"])


def sure_shares(model: PreTrainedModel, temperature: float) -> dict[str, float]:
    """Share (%) of test digits of every kind whose label has a probability of at least 0.99.

    Of the spoilt kinds only those count whose target gives the label at most a half, among 1,000 drawn.
    """
    shares = {}
    for kind in KINDS:
        digits = doubtful_digits("test", 1000, rng=np.random.default_rng(0), kinds={kind: 1.0}, augment=False)
        labels = np.arange(1000), digits.labels
        unclear = (digits.targets[labels] <= 0.5) | (kind == "intact")
        probabilities = (predict_logits(model, digits.images) / temperature).softmax(-1).numpy()
        shares[kind] = percent((probabilities[labels] >= 0.99)[unclear])
    return shares


def read_test_images(zoo: Path) -> dict[str, Any]:
    """What the classifiers and zero-shot CLIP read of plain and of context test composites."""
    plain, mixed = compose_split("test", 1041, seed=0, plain=True), compose_split("test", 3470, seed=0)
    figures = {name: read_classifier(zoo, name) for name in PLANS}
    clip, tokenizer = CLIPModel.from_pretrained(zoo / "clip"), CLIPTokenizer.from_pretrained(zoo / "clip")
    hits = zero_shot_classes(clip, tokenizer, mixed.images) == mixed.labels
    plain_hits = zero_shot_classes(clip, tokenizer, plain.images) == plain.labels
    figures["clip"] = {
        "plain": percent(plain_hits),
        "contexts": percent(hits),
        "groups": by_group(hits, mixed.contexts),
    }
    return figures


def read_reconstructions(pipeline: StableDiffusionPipeline, oracle: PreTrainedModel) -> dict[str, float]:
    """What the oracle reads of context test composites before and after the autoencoder."""
    mixed = compose_split("test", 2082, seed=1)
    decoded = reconstruct(pipeline.vae, mixed.images)
    before = predict_logits(oracle, mixed.images).argmax(-1).numpy()
    after = predict_logits(oracle, decoded).argmax(-1).numpy()
    error = (decoded.astype(float) - mixed.images) / 255
    return {
        "oracle_on_originals": percent(before == mixed.labels),
        "oracle_on_reconstructions": percent(after == mixed.labels),
        "same_reading": percent(before == after),
        "psnr_db": round(float(-10 * np.log10(np.mean(error**2))), 1),
    }


def prompts_for(labels: NDArray[np.int64], contexts: Contexts) -> list[str]:
    """`a photo of a CLASS`, then the comma form of the context where there is one."""
    texts = [ZERO_SHOT_TEMPLATE.format(CLASS_NAMES[label]) for label in labels]
    suffixes = [context_text(contexts, row) for row in range(len(labels))]
    return [f"{text}, {suffix}" if suffix else text for text, suffix in zip(texts, suffixes, strict=True)]


def wanted_contexts(count: int, *, plain: bool) -> Contexts:
    """The contexts that are asked for: the default, or the reference mix."""
    return plain_contexts(count) if plain else random_contexts(count, rng=np.random.default_rng(7))


@torch.no_grad()
def probe_colours(probe: Reader, images: Bytes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ink and background as the probe sees them, [N] each."""
    read = [probe(pixels(images[part])) for part in batches(len(images), 250)]
    ink, background = (torch.cat([r[name].argmax(-1) for r in read]).numpy() for name in ("ink", "background"))
    return ink, background


def judge(
    drawn: Bytes, labels: NDArray[np.int64], contexts: Contexts, *, oracle: PreTrainedModel, probe: Reader
) -> dict[str, Any]:
    """Shares of images whose class, ink and background are as asked."""
    hits = predict_logits(oracle, drawn).argmax(-1).numpy() == labels
    ink, background = probe_colours(probe, drawn)
    right_ink, right_ground = ink == contexts.ink, background == contexts.background
    figures: dict[str, Any] = {
        "class": percent(hits),
        "ink": percent(right_ink),
        "background": percent(right_ground),
        "ink_and_background": percent(right_ink & right_ground),
    }
    if not contexts.is_plain.all():
        figures["class_by_group"] = by_group(hits, contexts)
    return figures


def judge_samples(
    pipeline: StableDiffusionPipeline, oracle: PreTrainedModel, probe: Reader, count: int
) -> dict[str, Any]:
    """Prompt-only samples, plain and with contexts, at two guidance scales."""
    labels = np.arange(count) % len(CLASS_NAMES)
    figures: dict[str, Any] = {}
    for scale in (3.0, 4.0):
        for kind in ("plain", "contexts"):
            contexts = wanted_contexts(count, plain=kind == "plain")
            drawn = sample(pipeline, prompts_for(labels, contexts), Sampling(guidance_scale=scale), seed=1000)
            figures[f"{kind}, guidance scale {scale:g}"] = judge(drawn, labels, contexts, oracle=oracle, probe=probe)
            print(kind, scale, figures[f"{kind}, guidance scale {scale:g}"], flush=True)
    return figures


def class_prompts(originals: Composites) -> list[str]:
    """A prompt for each composite that names its class alone."""
    return [ZERO_SHOT_TEMPLATE.format(CLASS_NAMES[label]) for label in originals.labels]


def judge_variations(
    pipeline: StableUnCLIPImg2ImgPipeline, oracle: PreTrainedModel, probe: Reader, count: int
) -> dict[str, Any]:
    """Variations of test composites over contexts: class by the prompt, ink and ground by the embedding alone."""
    originals = compose_split("test", count, seed=3)
    wanted = embed_images(pipeline.image_encoder, originals.images)
    figures: dict[str, Any] = {}
    for scale in UNCLIP_SCALES:
        sampling = Sampling(num_inference_steps=20, guidance_scale=scale)
        drawn = sample_variations(pipeline, originals.images, class_prompts(originals), sampling, seed=1000)
        judged = judge(drawn, originals.labels, originals.contexts, oracle=oracle, probe=probe)
        found = embed_images(pipeline.image_encoder, drawn)
        judged["cosine_to_the_embedding"] = round(float(torch.cosine_similarity(found, wanted).mean()), 3)
        figures[f"guidance scale {scale:g}"] = judged
        print("variations", scale, judged, flush=True)
    return figures


def judge_joint_prompts(pipeline: StableDiffusionPipeline, oracle: PreTrainedModel, count: int) -> dict[str, Any]:
    """How the oracle reads samples of prompts that name several classes."""
    figures: dict[str, Any] = {}
    for names in JOINT:
        drawn = sample(pipeline, [" and ".join(names)] * count, Sampling(), seed=5000)
        read = predict_logits(oracle, drawn).argmax(-1).numpy()
        shares = {name: percent(read == CLASS_NAMES.index(name)) for name in names}
        figures[" and ".join(names)] = {**shares, "together": round(sum(shares.values()), 1)}
    return figures


def variations_sheet(pipeline: StableUnCLIPImg2ImgPipeline, path: Path) -> None:
    """Rows of test composites, each above a row of their variations; 20 columns, drawn at twice the size."""
    originals = compose_split("test", 80, seed=3)
    sampling = Sampling(num_inference_steps=20, guidance_scale=UNCLIP_SCALES[0])
    drawn = sample_variations(pipeline, originals.images, class_prompts(originals), sampling, seed=1000)
    pairs = np.stack([originals.images.reshape(-1, 20, 32, 32, 3), drawn.reshape(-1, 20, 32, 32, 3)], axis=1)
    save_sheet(pairs.reshape(-1, 20, 32, 32, 3), path)


def contact_sheet(pipeline: StableDiffusionPipeline, path: Path) -> None:
    """Two rows of plain samples, eight with contexts, two of joint prompts; 20 columns, drawn at twice the size."""
    labels = np.arange(40) % 10
    plain = sample(pipeline, prompts_for(labels, wanted_contexts(40, plain=True)), Sampling(), seed=1000)
    labels = np.arange(160) % 10
    mixed = sample(pipeline, prompts_for(labels, wanted_contexts(160, plain=False)), Sampling(), seed=1000)
    joint = sample(pipeline, ["three and eight"] * 20 + ["four and nine"] * 20, Sampling(), seed=5000)
    save_sheet(np.concatenate([plain, mixed, joint]).reshape(-1, 20, 32, 32, 3), path)


def probe_accuracy(probe: Reader, composites: Composites) -> dict[str, float]:
    """How far the probe itself can be trusted, on test composites."""
    ink, background = probe_colours(probe, composites.images)
    return {
        "ink": percent(ink == composites.contexts.ink),
        "background": percent(background == composites.contexts.background),
    }


def evaluate(zoo: Path, *, count: int, seed: int) -> dict[str, Any]:
    """All figures of the zoo."""
    oracle = AutoModelForImageClassification.from_pretrained(zoo / "oracle")
    pipeline = load_pipeline(zoo)
    figures = {"readers": read_test_images(zoo), "reconstruction": read_reconstructions(pipeline, oracle)}
    print(json.dumps(figures, indent=1), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        probe = train_reader("probe", PROBE_RECIPE, seed=seed + 1000, build_folder=Path(folder))
    figures["probe"] = probe_accuracy(probe, compose_split("test", 2082, seed=2))
    figures["joint prompts"] = judge_joint_prompts(pipeline, oracle, count=min(count, 100))
    print(json.dumps(figures["joint prompts"]), figures["probe"], flush=True)
    figures["samples"] = judge_samples(pipeline, oracle, probe, count)
    figures["variations"] = judge_variations(load_unclip(zoo), oracle, probe, count)
    figures["bytes"] = part_sizes(zoo)
    return figures


def add_classifiers(zoo: Path, names: list[str]) -> dict[str, Any]:
    """The figures that are there, with those of some classifiers measured again."""
    figures: dict[str, Any] = json.loads((zoo / "figures.json").read_text())
    figures["readers"] |= {name: read_classifier(zoo, name) for name in names}
    figures["bytes"] = part_sizes(zoo)
    return figures


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--zoo", type=Path, default=Path("engine/zoo/digits"))
    parser.add_argument("--output", type=Path, help="folder for the figures; default: the zoo")
    parser.add_argument("--docs", type=Path, default=Path("docs"), help="folder for the contact sheets")
    parser.add_argument("--count", type=int, default=500, help="samples of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    only = "a classifier to measure, and nothing else; several times for several: " + ", ".join(PLANS)
    parser.add_argument("--only", action="append", default=[], choices=PLANS, metavar="NAME", help=only)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    output = arguments.output or arguments.zoo
    output.mkdir(parents=True, exist_ok=True)
    if arguments.only:
        figures = add_classifiers(arguments.zoo, arguments.only)
    else:
        figures = evaluate(arguments.zoo, count=arguments.count, seed=arguments.seed)
    (output / "figures.json").write_text(json.dumps(figures, indent=2) + "\n")
    if arguments.only:
        return
    pipeline = load_pipeline(arguments.zoo)
    contact_sheet(pipeline, arguments.docs / "digits.png")
    variations_sheet(load_unclip(arguments.zoo), arguments.docs / "digits-variations.png")


if __name__ == "__main__":
    main()
