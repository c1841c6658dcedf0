"""Loading: weights in every form, or a report of what is missing before a worker starts."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.errors import JobError
from engine.models.addresses import resolve
from engine.models.classifier import Classifier
from engine.models.classifier_checks import check_classifier
from engine.models.clip import Clip
from engine.models.clip_checks import check_clip
from engine.models.job_checks import check_addresses
from tests.model_cases import LOADED, ZOO, as_bin, job_of, sharded, without

MISSING: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickled": (as_bin, r"pickled \(\.bin\).*from_pretrained.*save_pretrained"),
    "none": (lambda folder: (folder / "model.safetensors").unlink(), "has no safetensors"),
    "torn": (
        lambda folder: (folder / "model.safetensors").write_bytes(b"\x08" + bytes(7) + b"{}      "),
        "no tensor of its weights|has no text_projection",
    ),
    "cut": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        "shorter than its header requires",
    ),
    "shard gone": (
        lambda folder: (sharded(folder), (folder / "model-00002-of-00002.safetensors").unlink()),
        "names model-00002-of-00002",
    ),
    "no head": (without("classifier", "text_pro"), "has no head|has no text_projection"),
    "adapter": (lambda folder: (folder / "adapter_config.json").write_text("{}"), "is an adapter"),
}  # fmt: skip


@pytest.mark.parametrize("kind", MISSING)
@pytest.mark.parametrize("role", ["target", "clip"])
def test_weights_that_cannot_be_loaded_are_refused_before_a_worker_starts(kind: str, role: str, tmp_path: Path) -> None:
    """With the command that converts them, where there is one."""
    folder = Path(shutil.copytree(resolve(ZOO[role]), tmp_path / "net"))
    change, message = MISSING[kind]
    change(folder)
    if (kind, role) == ("adapter", "clip"):
        return
    with pytest.raises(JobError, match=rf"models\.{role}: '{folder}'.*({message})"):
        check_addresses(job_of(**{role: str(folder)}))


@pytest.mark.parametrize("kind", LOADED)
def test_weights_of_every_form_are_loaded(kind: str, tmp_path: Path) -> None:
    """Whole or in parts, plain or in half precision."""
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    net, clip = (Path(shutil.copytree(resolve(ZOO[role]), tmp_path / role)) for role in ("target", "clip"))
    for folder in (net, clip):
        LOADED[kind](folder)
    check_classifier(net, "x")
    check_clip(clip, "x")
    ours, plain = Classifier.load(str(net)).logits(images), Classifier.load(ZOO["target"]).logits(images)
    assert torch.allclose(ours, plain, atol=0.01 if "fp16" in kind else 0)
    texts, plain = Clip.load(str(clip)).text_embeds(["a"]), Clip.load(ZOO["clip"]).text_embeds(["a"])
    assert torch.allclose(texts, plain, atol=0.01 if "fp16" in kind else 0)


def test_a_network_without_all_of_its_weights_is_not_filled_by_chance(tmp_path: Path) -> None:
    """A layer that is missing, other than the head: noticed only on loading."""
    folder = Path(shutil.copytree(resolve(ZOO["target"]), tmp_path / "net"))
    without("encoder.stages.1")(folder)
    with pytest.raises(JobError, match=r"lack \d+ of the weights of a ResNetForImageClass.* drawn at random"):
        Classifier.load(str(folder))
