"""SigLIP and SigLIP 2 as `models.clip`, judge and oracle, DINOv2 as feature space and oracle: equal to transformers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageClassification, AutoTokenizer

from engine.errors import JobError
from engine.generation.loading import load_scorer
from engine.job.plan import class_prompt
from engine.models.clip import Clip, SigLip, load_image_encoder
from engine.models.job_checks import check_addresses
from engine.models.oracle_kinds import oracle_kind
from engine.models.oracles import load_oracle
from engine.studies.evaluate.extractors import choose_extractor
from tests.embedding_cases import TOKENS, save_dino, save_siglip
from tests.model_cases import NAMES, as_tensor, job_of, photographs
from tests.oracle_cases import made_neighbours
from tests.prepare_cases import drawn_digits, write_folder

IMAGES = photographs((32, 32), (40, 48), (64, 50))
PROMPTS = [class_prompt(name) for name in NAMES]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("models")
    return {
        "siglip": str(save_siglip(home / "siglip")),
        "siglip2": str(save_siglip(home / "siglip2", seed=1, is_second=True)),
        "dino": str(save_dino(home / "dino")),
        "dino-head": str(save_dino(home / "dino-head", labels=NAMES)),
    }


@torch.no_grad()
def plain_siglip(folder: str) -> Any:
    """What transformers gives for the images and prompts, as its documentation calls it."""
    model, tokenizer = AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    pixels = torch.cat([processor(image, return_tensors="pt")["pixel_values"] for image in IMAGES])
    tokens = tokenizer(PROMPTS, padding="max_length", max_length=TOKENS, truncation=True, return_tensors="pt")
    return model(input_ids=tokens["input_ids"], pixel_values=pixels)


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_embeddings_and_logits_are_those_of_transformers(name: str, models: dict[str, str]) -> None:
    """Of both towers, of the scale and the bias; the tensor path has a gradient."""
    plain, clip = plain_siglip(models[name]), Clip.load(models[name])
    assert isinstance(clip, SigLip) and clip.logit_bias == pytest.approx(-7.5, abs=0.2)
    texts, images = clip.text_embeds(PROMPTS), clip.image_embeds(IMAGES)
    units = [torch.nn.functional.normalize(one, dim=1) for one in (images, texts)]
    torch.testing.assert_close(units[0], plain.image_embeds, **CLOSE)
    torch.testing.assert_close(units[1], plain.text_embeds, **CLOSE)
    assert len({tuple(row.tolist()) for row in texts}) == len(NAMES), "prompts are told apart"
    logits = clip.logit_scale * units[0] @ units[1].T + clip.logit_bias
    torch.testing.assert_close(logits, plain.logits_per_image, **CLOSE)
    image = as_tensor(IMAGES[0]).requires_grad_(True)
    embeds = clip.embeds_of_tensor(image)
    torch.testing.assert_close(embeds[0], images[0], **CLOSE)
    assert torch.autograd.grad(embeds[0, 0], image)[0].abs().max() > 0


def test_as_clip_judge_and_oracle_of_a_job(models: dict[str, str]) -> None:
    """Checked by their files, then loaded as a worker loads them; the oracle's logits are those of transformers."""
    job = job_of(clip=models["siglip"], judge=models["siglip2"], oracle=models["siglip2"])
    check_addresses(job)
    assert oracle_kind(models["siglip2"]) == "clip"
    scorer = load_scorer(job)
    assert scorer.clip.name == models["siglip"]
    oracle = load_oracle(models["siglip2"], "cpu", NAMES)
    torch.testing.assert_close(oracle.score(IMAGES), plain_siglip(models["siglip2"]).logits_per_image, **CLOSE)
    inputs = scorer.preprocess(IMAGES)
    assert inputs.judge is not None and inputs.clip.shape == inputs.judge.shape == (3, 3, 32, 32)
    with pytest.raises(JobError, match=r"models\.judge: .* has the weights of models\.clip"):
        check_addresses(
            job_of(clip=models["siglip"], judge=str(shutil.copytree(models["siglip"], f"{models['siglip']}-b")))
        )


def test_dino_is_a_feature_space(models: dict[str, str], tmp_path: Path) -> None:
    """Of nearest neighbours: its class token, as transformers gives it; no texts, so that it is no `clip`."""
    encoder = load_image_encoder(models["dino"])
    plain = AutoModel.from_pretrained(models["dino"]).eval()
    with torch.no_grad():
        pooled = plain(pixel_values=encoder.preprocess(IMAGES)).pooler_output
    torch.testing.assert_close(encoder.image_embeds(IMAGES), pooled, **CLOSE)
    image = as_tensor(IMAGES[0]).requires_grad_(True)
    assert torch.autograd.grad(encoder.embeds_of_tensor(image)[0, 0], image)[0].abs().max() > 0
    with pytest.raises(
        JobError, match=r"models\.clip: .* of type 'dinov2'; a CLIP model is needed: CLIP, SigLIP or open_clip"
    ):
        check_addresses(job_of(clip=models["dino"]))


def test_neighbours_by_dino_are_an_oracle(models: dict[str, str], tmp_path: Path) -> None:
    """Made by `prepare` and loaded as a worker does: features of the artefact are those of the encoder, and an image
    that is among them votes for its class."""
    drawn = drawn_digits(40)
    artefact = made_neighbours(write_folder(tmp_path / "data", drawn), models["dino"], tmp_path / "made").path
    check_addresses(job_of(oracle=str(artefact)))
    oracle = load_oracle(str(artefact), "cpu", NAMES)
    images, labels = [image for image, _ in drawn], torch.tensor([label for _, label in drawn])
    assert oracle.labels == NAMES and (oracle.score(images).argmax(1) == labels).float().mean() > 0.5


def test_dino_is_a_feature_space_of_evaluations(models: dict[str, str]) -> None:
    """Its embeddings at length sqrt(d); an address that is none is refused by the option's name."""
    clip = Clip.load(models["siglip"])
    extractor = choose_extractor(models["dino"], clip, None, "cpu")
    embeds = load_image_encoder(models["dino"]).image_embeds(IMAGES)
    expected = torch.nn.functional.normalize(embeds, dim=1) * 4.0
    torch.testing.assert_close(torch.from_numpy(extractor.features(IMAGES, np.zeros((3, 16)))), expected, **CLOSE)
    assert extractor.name == models["dino"]
    with pytest.raises(JobError, match=r"^--features: "):
        choose_extractor(models["dino-head"], clip, None, "cpu")


def test_dino_with_a_head_is_target_and_oracle(models: dict[str, str]) -> None:
    """As any classifier of transformers, with its own preprocessing."""
    check_addresses(job_of(target=models["dino-head"], transfer=[], oracle="zoo:digits/oracle"))
    check_addresses(job_of(oracle=models["dino-head"]))
    oracle = load_oracle(models["dino-head"], "cpu", NAMES)
    plain = AutoModelForImageClassification.from_pretrained(models["dino-head"]).eval()
    processor = AutoImageProcessor.from_pretrained(models["dino-head"], backend="pil")
    with torch.no_grad():
        logits = torch.cat([plain(**processor(image, return_tensors="pt")).logits for image in IMAGES])
    torch.testing.assert_close(oracle.score(IMAGES), logits, **CLOSE)


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "tokenizer": (
        "tokenizer_config.json",
        {"tokenizer_class": "BertTokenizer"},
        "'BertTokenizer' is not the tokenizer",
    ),
    "NaFlex": ("config.json", {"model_type": "siglip2"}, "takes images of any size"),
    "tower": ("config.json", {"architectures": ["SiglipVisionModel"]}, "a CLIP model is needed"),
    "size": ("preprocessor_config.json", {"size": {"height": 48, "width": 48}}, "48 x 48 pixels"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_would_measure_wrongly_is_refused(kind: str, models: dict[str, str], tmp_path: Path) -> None:
    """By the files, before a worker starts."""
    name, changes, message = WRONG[kind]
    folder = shutil.copytree(models["siglip"], tmp_path / "siglip")
    (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | changes))
    with pytest.raises(JobError, match=rf"models\.clip: '{folder}'.*{message}"):
        check_addresses(job_of(clip=str(folder)))


def test_a_tokenizer_of_sentencepiece_needs_the_extra(models: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "sentencepiece" else find_spec(name, *rest)
    )
    with pytest.raises(JobError, match=r"not installed; install riskforge\[siglip\]"):
        check_addresses(job_of(clip=models["siglip"]))
    check_addresses(job_of(clip=models["siglip2"]))
