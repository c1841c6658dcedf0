"""What guides can ask about a batch: the models of the job, for its classes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from engine.generation.guidance import RequestGuides


def test_a_scene_has_the_cosine_and_the_inner_product_each_by_its_name() -> None:
    """And the first class of every subset as its label."""

    def conformity_to(labels: Tensor, *, raw: bool) -> Any:
        return lambda images: (labels.tolist(), raw, images)

    targets = [SimpleNamespace(logits=f"logits of {name}") for name in "abc"]
    scorer: Any = SimpleNamespace(
        target=targets[0],
        further_targets=targets[1:],
        guiding_oracle=SimpleNamespace(logits="logits of the oracle"),
        conformity_to=conformity_to,
    )
    guides = RequestGuides(SimpleNamespace(), SimpleNamespace(), scorer, "cpu")  # type: ignore[arg-type]
    scene: Any = guides.scene([(3,), (8, 5)], "decoding")  # type: ignore[arg-type]
    assert scene.labels.tolist() == [3, 8] and scene.classes == ((3,), (8, 5))
    labels = torch.tensor([1, 2])
    assert scene.conformity("images", labels) == ([1, 2], False, "images")
    assert scene.raw_conformity("images", labels) == ([1, 2], True, "images")
    assert (scene.logits, scene.decoding) == ("logits of a", "decoding")
    assert scene.further_logits == ("logits of b", "logits of c")
    assert scene.oracle_logits == "logits of the oracle"
    scorer.guiding_oracle = None
    assert guides.scene([(3,)], "decoding").oracle_logits is None  # type: ignore[arg-type]
