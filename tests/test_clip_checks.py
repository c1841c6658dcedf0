"""Folders of CLIP models that would be scored with incorrectly are refused by their files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.errors import JobError
from engine.models.job_checks import check_addresses
from tests.model_cases import ZOO, copied, job_of

CLIP_WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "classifier of CLIP": ("config.json", {"architectures": ["CLIPForImageClassification"]}, "a CLIP model is needed"),
    "image tower alone": (
        "config.json",
        {"architectures": ["CLIPVisionModelWithProjection"]},
        "a CLIP model is needed",
    ),
    "SigLIP": ("config.json", {"model_type": "siglip", "architectures": ["SiglipModel"]}, "'CLIPTokenizer' is not the"),
    "NaFlex": ("config.json", {"model_type": "siglip2", "architectures": ["Siglip2Model"]}, "of a fixed resolution"),
    "BLIP": ("config.json", {"model_type": "blip", "architectures": ["BlipModel"]}, "a CLIP model is needed"),
    "channels": ("config.json", {"vision_config": {"num_channels": 1}}, r"vision_config\.num_channels: 1"),
    "tokens": ("tokenizer_config.json", {"tokenizer_class": "BertTokenizer"}, "tokenizer_class: 'BertTokenizer'"),
    "lanczos": ("preprocessor_config.json", {"resample": 1}, "resample: 1 .lanczos."),
    "size": (
        "preprocessor_config.json",
        {"size": {"height": 48, "width": 48}},
        "48 x 48 pixels, and the network takes 32",
    ),
}


@pytest.mark.parametrize("kind", CLIP_WRONG)
def test_a_clip_model_that_would_measure_wrongly_is_refused(kind: str, tmp_path: Path) -> None:
    """As guide and as judge."""
    name, changes, message = CLIP_WRONG[kind]
    folder = copied(ZOO["clip"], tmp_path / "clip", name, **changes)
    for role in ("clip", "judge"):
        with pytest.raises(JobError, match=rf"models\.{role}: '{folder}'.*{message}"):
            check_addresses(job_of(**{"clip": "zoo:cifar10/clip"} | {role: str(folder)}))
