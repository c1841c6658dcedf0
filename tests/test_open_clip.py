"""Models of open_clip, from local folders in its hub format, as `models.clip`, judge and oracle: equal to open_clip."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch

from engine.errors import JobError
from engine.generation.loading import load_scorer
from engine.job.plan import class_prompt
from engine.models.clip import Clip
from engine.models.digests import model_digest
from engine.models.job_checks import check_addresses
from engine.models.oracles import load_oracle
from tests.embedding_cases import save_open_clip
from tests.model_cases import NAMES, as_tensor, job_of, photographs

IMAGES = photographs((32, 32), (40, 48), (64, 50))
PROMPTS = [class_prompt(name) for name in NAMES]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}
KINDS: dict[str, dict[str, Any]] = {
    "softmax": {},
    "sigmoid": {
        "is_sigmoid": True,
        "resize_mode": "squash",
        "interpolation": "bilinear",
        "mean": [0.5] * 3,
        "std": [0.4] * 3,
    },
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    home = tmp_path_factory.mktemp("open-clip")
    return {
        kind: save_open_clip(home / kind, seed=seed, **options) for seed, (kind, options) in enumerate(KINDS.items())
    }


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_embeddings_and_logits_are_those_of_open_clip(
    kind: str, folders: dict[str, Path], caplog: pytest.LogCaptureFixture
) -> None:
    """Of model, transform and tokenizer as open_clip makes them from the folder, scale and bias included."""
    name = f"local-dir:{folders[kind]}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    model.eval()
    tokens = open_clip.get_tokenizer(name)(PROMPTS)
    plain_images = model.encode_image(torch.stack([transform(image) for image in IMAGES]))
    plain_texts = model.encode_text(tokens)
    state = [logging.root.level, *logging.root.handlers, *logging.root.filters]
    caplog.clear()
    clip = Clip.load(str(folders[kind]))
    assert not caplog.records and [logging.root.level, *logging.root.handlers, *logging.root.filters] == state
    texts, images = clip.text_embeds(PROMPTS), clip.image_embeds(IMAGES)
    torch.testing.assert_close(images, plain_images, **CLOSE)
    torch.testing.assert_close(texts, plain_texts, **CLOSE)
    bias = 0.0 if model.logit_bias is None else float(model.logit_bias)
    assert clip.logit_bias == bias == (-7.0 if kind == "sigmoid" else 0.0)
    with torch.enable_grad():
        image = as_tensor(IMAGES[0]).requires_grad_(True)
        embeds = clip.embeds_of_tensor(image)
        assert torch.autograd.grad(embeds[0, 0], image)[0].abs().max() > 0
    torch.testing.assert_close(embeds.detach()[0], images[0], **CLOSE)
    units = [torch.nn.functional.normalize(one, dim=1) for one in (plain_images, plain_texts)]
    logits = model.logit_scale.exp() * units[0] @ units[1].T + bias
    torch.testing.assert_close(load_oracle(str(folders[kind]), "cpu", NAMES).score(IMAGES), logits, **CLOSE)


def test_in_a_job(folders: dict[str, Path], tmp_path: Path) -> None:
    """As clip, judge and oracle; a copy of the weights is no judge; the digest is of configuration and weights."""
    job = job_of(clip=str(folders["softmax"]), judge=str(folders["sigmoid"]), oracle=str(folders["sigmoid"]))
    check_addresses(job)
    assert load_scorer(job).clip.name == str(folders["softmax"])
    copy = shutil.copytree(folders["softmax"], tmp_path / "copy")
    assert model_digest(str(copy)) == model_digest(str(folders["softmax"])) != model_digest(str(folders["sigmoid"]))
    with pytest.raises(JobError, match=r"models\.judge: .* has the weights of models\.clip"):
        check_addresses(job_of(clip=str(folders["softmax"]), judge=str(copy)))
    (copy / "open_clip_config.json").write_text((copy / "open_clip_config.json").read_text() + "\n")
    assert model_digest(str(copy)) != model_digest(str(folders["softmax"]))


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "resize": ("preprocess_cfg", {"resize_mode": "longest"}, r"preprocess_cfg\.resize_mode: 'longest'"),
    "filter": ("preprocess_cfg", {"interpolation": "random"}, r"preprocess_cfg\.interpolation: 'random'"),
    "mean": ("preprocess_cfg", {"mean": 0.5}, r"preprocess_cfg\.mean: 0\.5 is not three numbers"),
    "text tower": ("text_cfg", {"hf_model_name": "roberta-base"}, r"hf_model_name: 'roberta-base'"),
    "tokenizer": ("text_cfg", {"hf_tokenizer_name": "timm/x"}, "the folder has no tokenizer.json; add it"),
    "size": ("vision_cfg", {"image_size": "32"}, r"vision_cfg\.image_size: '32' is not in pixels"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_would_measure_wrongly_is_refused(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """By the configuration, before a worker starts."""
    section, changes, message = WRONG[kind]
    folder = shutil.copytree(folders["softmax"], tmp_path / "changed")
    config = json.loads((folder / "open_clip_config.json").read_text())
    place = config if section == "preprocess_cfg" else config["model_cfg"]
    place[section] = place[section] | changes
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(JobError, match=rf"models\.clip: '{folder}': open_clip_config\.json: .*{message}"):
        check_addresses(job_of(clip=str(folder)))


def test_missing_weights_and_a_missing_extra_are_named(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both with the remedy; weights of another model are no crash."""
    folder = shutil.copytree(folders["softmax"], tmp_path / "without")
    shutil.copyfile(folders["sigmoid"] / "open_clip_model.safetensors", folder / "open_clip_model.safetensors")
    with pytest.raises(JobError, match="cannot be loaded as a model of open_clip"):
        Clip.load(str(folder))
    (folder / "open_clip_model.safetensors").rename(folder / "open_clip_pytorch_model.bin")
    with pytest.raises(JobError, match=r"has no open_clip_model\.safetensors; pickles are not opened: save the model"):
        check_addresses(job_of(clip=str(folder)))
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "open_clip" else find_spec(name, *rest)
    )
    with pytest.raises(
        JobError, match=r"is a model of open_clip, which is not installed; install riskforge\[open_clip\]"
    ):
        check_addresses(job_of(clip=str(folders["softmax"])))
