"""The embedded zoo `digits`: it loads by plain library calls without a network, and does what its README says.

Accuracies are asked of test sources, which no part was trained on, with a margin below the README's figures.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, StableUnCLIPImg2ImgPipeline
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, CLIPModel, CLIPTokenizer

from engine.data.images import digits

ROOT = Path(__file__).parents[1]
ZOO = ROOT / "engine" / "zoo" / "digits"
ORACLES = ("oracle", "oracle-b", "oracle-c")
CLASSIFIERS = (*ORACLES, "classifier", "classifier-b")
sys.path.insert(0, str(ROOT / "tools" / "zoo"))
from unreadable import doubtful_digits  # noqa: E402


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any connection attempt fails the test."""

    def refuse(*_: Any) -> None:
        raise AssertionError("the zoo must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    """The diffusion pipeline as any user loads it."""
    loaded = StableDiffusionPipeline.from_pretrained(ZOO / "stable-diffusion")
    loaded.set_progress_bar_config(disable=True)
    return loaded


def read_classes(part: str, images: np.ndarray) -> np.ndarray:
    """Classes that a classifier of the zoo reads, by its own image processor."""
    model = AutoModelForImageClassification.from_pretrained(ZOO / part)
    inputs = AutoImageProcessor.from_pretrained(ZOO / part)(list(images), return_tensors="pt")
    with torch.no_grad():
        return model(**inputs).logits.argmax(-1).numpy()


@pytest.mark.parametrize("name", ["digits", "cifar10"])
def test_files_are_those_that_were_published(name: str) -> None:
    """Sees a part that was replaced without its checksum, and a file that the checksums do not know."""
    zoo = ZOO.parent / name
    lines = (zoo / "SHA256SUMS").read_text().splitlines()
    listed = {name: digest for digest, name in (line.split(maxsplit=1) for line in lines)}
    parts = [path for path in zoo.rglob("*") if path.is_file() and path.parent != zoo]
    assert {str(path.relative_to(zoo)): hashlib.sha256(path.read_bytes()).hexdigest() for path in parts} == listed


@pytest.mark.parametrize(("name", "limit_bytes"), [("digits", 18e6), ("cifar10", 24e6)])
def test_size_and_formats(name: str, limit_bytes: float) -> None:
    """Small enough for a repository, equal weights stored once, no pickle, no address and no path in a config."""
    files = [path for path in (ZOO.parent / name).rglob("*") if path.is_file()]
    stored = [path for path in files if not path.is_symlink()]
    assert sum(path.stat().st_size for path in stored) <= limit_bytes
    weights = [path.read_bytes() for path in stored if path.suffix == ".safetensors"]
    assert len(weights) == len(set(weights)) < sum(path.suffix == ".safetensors" for path in files)
    for path in set(files) - set(stored):
        assert not path.readlink().is_absolute() and path.resolve().is_relative_to(ZOO.parent / name)
    assert {path.suffix for path in files} <= {".json", ".safetensors", ".txt", ".md", ".png", ""}
    for path in (ZOO.parent / name).rglob("*config*.json"):
        content = json.loads(path.read_text())
        assert not content.get("_name_or_path")
        assert "http" not in path.read_text()


@pytest.mark.parametrize("part", CLASSIFIERS)
def test_classifiers_load_in_single_precision(part: str) -> None:
    """Weights are stored as fp16; a plain load must still give fp32, the class names and a fitted temperature."""
    model = AutoModelForImageClassification.from_pretrained(ZOO / part)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert list(model.config.id2label.values()) == list(digits.CLASS_NAMES)
    assert 0.2 < json.loads((ZOO / part / "config.json").read_text())["temperature"] < 5


@pytest.mark.parametrize(("part", "plain", "mixed"), [("oracle", 0.97, 0.96), ("classifier", 0.95, 0.82),
                                                      ("classifier-b", 0.95, 0.82), ("oracle-b", 0.96, 0.94),
                                                      ("oracle-c", 0.95, 0.95)])  # fmt: skip
def test_classifiers_read_test_sources(part: str, plain: float, mixed: float) -> None:
    """The oracles read everything; the targets read plain digits and have holes over contexts."""
    plain_set, mixed_set = (
        digits.compose_split("test", 200, seed=11, plain=True),
        digits.compose_split("test", 347, seed=11),
    )
    assert np.mean(read_classes(part, plain_set.images) == plain_set.labels) >= plain
    accuracy = np.mean(read_classes(part, mixed_set.images) == mixed_set.labels)
    assert accuracy >= mixed
    assert part in ORACLES or accuracy <= 0.95


def test_classifiers_are_of_different_families() -> None:
    """What one architecture overlooks, the next need not: no two share one."""
    families = {json.loads((ZOO / part / "config.json").read_text())["model_type"] for part in CLASSIFIERS}
    assert families == {"regnet", "mobilenet_v1", "poolformer", "resnet", "convnext"}


def sure_shares(kind: str) -> dict[str, float]:
    """Share of test digits, of a spoilt kind those that are hard to tell, whose label has p >= 0.99, by oracle."""
    drawn = doubtful_digits("test", 600, rng=np.random.default_rng(5), kinds={kind: 1.0}, augment=False)
    labels, shares = (np.arange(600), drawn.labels), {}
    unclear = (drawn.targets[labels] <= 0.5) | (kind == "intact")
    for part in ORACLES:
        model = AutoModelForImageClassification.from_pretrained(ZOO / part)
        inputs = AutoImageProcessor.from_pretrained(ZOO / part)(list(drawn.images), return_tensors="pt")
        temperature = json.loads((ZOO / part / "config.json").read_text())["temperature"]
        with torch.no_grad():
            probabilities = (model(**inputs).logits / temperature).softmax(-1).numpy()
        shares[part] = float(np.mean((probabilities[labels] >= 0.99)[unclear]))
    return shares


@pytest.mark.parametrize("kind", ["erased", "frayed"])
def test_the_sceptical_oracle_doubts_broken_strokes(kind: str) -> None:
    """More than either oracle that has seen whole digits alone."""
    sure = sure_shares(kind)
    assert sure["oracle-b"] < 0.8 * min(sure["oracle"], sure["oracle-c"])


def test_the_sceptical_oracle_doubts_mixtures() -> None:
    """Of one digit in one region and another in the rest it is sure less often than the first oracle."""
    sure = sure_shares("splice")
    assert sure["oracle-b"] < 0.8 * sure["oracle"]


def test_the_sceptical_oracle_is_sure_of_whole_digits() -> None:
    """Doubt of everything would be no reading."""
    assert sure_shares("intact")["oracle-b"] >= 0.8
    assert sure_shares("scribble")["oracle-b"] <= 0.02


@pytest.mark.parametrize(("plain", "least"), [(True, 0.93), (False, 0.85)])
def test_clip_reads_class_prompts(plain: bool, least: float) -> None:
    """Zero-shot by the prompt that names the class alone, with the processor and tokenizer of the folder."""
    model, tokenizer = CLIPModel.from_pretrained(ZOO / "clip"), CLIPTokenizer.from_pretrained(ZOO / "clip")
    test_set = digits.compose_split("test", 347, seed=12, plain=plain)
    inputs = AutoImageProcessor.from_pretrained(ZOO / "clip")(list(test_set.images), return_tensors="pt")
    tokens = tokenizer([f"a photo of a {name}" for name in digits.CLASS_NAMES], padding=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs, **tokens).logits_per_image
    assert np.mean(logits.argmax(-1).numpy() == test_set.labels) >= least


def test_tokenizer_knows_its_words_and_spells_the_rest() -> None:
    """Class and context words are one token each; any other text survives in bytes."""
    for folder in (ZOO / "clip", ZOO / "stable-diffusion" / "tokenizer"):
        tokenizer = CLIPTokenizer.from_pretrained(folder)
        assert len(tokenizer.tokenize("a photo of a three and eight, red ink on a striped white background")) == 15
        assert tokenizer.decode(tokenizer("zébra ß").input_ids, skip_special_tokens=True) == "zébra ß"
        assert tokenizer.unk_token_id not in tokenizer("π = 3.14", add_special_tokens=False).input_ids


def test_pipeline_draws_what_it_is_asked(pipeline: StableDiffusionPipeline) -> None:
    """Two samples of every class in 20 steps; the oracle, which guided nothing, agrees with the prompt."""
    assert {p.dtype for m in (pipeline.unet, pipeline.vae, pipeline.text_encoder) for p in m.parameters()} == {
        torch.float32
    }
    prompts = [f"a photo of a {name}" for name in digits.CLASS_NAMES] * 2
    generators = [torch.Generator().manual_seed(seed) for seed in range(20)]
    drawn = pipeline(prompts, num_inference_steps=20, guidance_scale=3.0, generator=generators, output_type="np")
    images = np.rint(drawn.images * 255).astype(np.uint8)
    assert images.shape == (20, 32, 32, 3)
    assert np.mean(read_classes("oracle", images) == np.arange(20) % 10) >= 0.9


def test_variations_follow_the_embedding() -> None:
    """The unCLIP pipeline as any user loads it: the prompt names the class, the image alone gives ink and ground."""
    loaded = StableUnCLIPImg2ImgPipeline.from_pretrained(ZOO / "stable-unclip")
    loaded.set_progress_bar_config(disable=True)
    modules = (loaded.unet, loaded.vae, loaded.text_encoder, loaded.image_encoder)
    assert {p.dtype for module in modules for p in module.parameters()} == {torch.float32}
    originals = digits.compose_split("test", 20, seed=14)
    drawn = loaded(
        prompt=[f"a photo of a {digits.CLASS_NAMES[label]}" for label in originals.labels],
        image=[Image.fromarray(pixels) for pixels in originals.images],
        num_inference_steps=20,
        guidance_scale=3.0,
        generator=[torch.Generator().manual_seed(seed) for seed in range(20)],
        output_type="np",
    )
    images = np.rint(drawn.images * 255).astype(np.uint8)
    assert np.mean(read_classes("oracle", images) == originals.labels) >= 0.8
    # The median colour of a picture is its ground's.
    ground, wanted = (np.median(some.reshape(20, -1, 3), axis=1) for some in (images, originals.images))
    assert np.mean(np.abs(ground - wanted).max(1) < 60) >= 0.8


def test_autoencoder_keeps_the_digit(pipeline: StableDiffusionPipeline) -> None:
    """What the oracle reads before the autoencoder it reads after it, over contexts."""
    test_set = digits.compose_split("test", 347, seed=13)
    images = torch.from_numpy(test_set.images).permute(0, 3, 1, 2) / 127.5 - 1
    with torch.no_grad():
        decoded = pipeline.vae.decode(pipeline.vae.encode(images).latent_dist.mean).sample
    restored = ((decoded.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    assert np.mean(read_classes("oracle", test_set.images) == read_classes("oracle", restored)) >= 0.95


def test_composites_are_functions_of_their_seed() -> None:
    """Equal seeds give equal bytes, splits share no scan, and contexts say what is drawn."""
    first, second = digits.compose_split("validation", 50, seed=3), digits.compose_split("validation", 50, seed=3)
    assert np.array_equal(first.images, second.images)
    assert not np.array_equal(first.images, digits.compose_split("validation", 50, seed=4).images)
    glyphs = [{g.tobytes() for g in digits.load_sources(split).glyphs} for split in ("train", "validation", "test")]
    assert not (glyphs[0] & glyphs[1] or glyphs[0] & glyphs[2] or glyphs[1] & glyphs[2])
    texts = [digits.context_text(first.contexts, row) for row in range(50)]
    assert all(texts)
    assert digits.context_text(digits.plain_contexts(1), 0) == ""
