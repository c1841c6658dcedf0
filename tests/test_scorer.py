"""The records of a batch, against the definitions: models that give known logits and embeddings, row by row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from engine.generation.oracle_scoring import Oracles
from engine.generation.scorer import Scorer
from engine.job.plan import Cell, SampleSpec
from engine.job.records import STATUS_FAILED, check_record

LABELS = ["zero", "one", "two", "three"]
# Cosines of each image with the prompt of each class, and logits of target, transfer model and oracle.
COSINES = torch.tensor([[0.2, 0.1, 0.4, 0.3], [0.3, 0.5, 0.1, 0.2], [0.1, 0.2, 0.3, 0.4]])
JUDGED = torch.tensor([[0.6, 0.3, 0.1, 0.2], [0.1, 0.2, 0.5, 0.3], [0.2, 0.6, 0.3, 0.1]])
TARGET = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.5, -0.5, 3.0, 2.5], [0.0, 4.0, 1.0, 2.0]])
TRANSFER = TARGET.roll(1, dims=1)
ORACLE = torch.tensor([[0.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
# The images are their row numbers; the samples: class zero, then joint prompts whose closest class is not the first.
CELLS = ((0,), (0, 1), (3, 2, 1))
CLOSEST = (0, 1, 3)


class Classifier:
    """Logits by the number of the image."""

    labels, temperature = LABELS, 1.5

    def __init__(self, name: str, logits: Tensor) -> None:
        self.name, self._logits = name, logits

    def preprocess(self, images: Sequence[int]) -> Tensor:
        """[B], the numbers."""
        return torch.tensor(images)

    def score_pixels(self, pixels: Tensor) -> Tensor:
        """[B, n]."""
        return self._logits[pixels]


class Clip:
    """Embeddings whose cosines are those of a table; images are twice as long as texts, so that inner products differ.

    Args:
        cosines: [images, classes].
        first: entry in which the embedding of the first class is one; two models have no space in common.
    """

    def __init__(self, name: str, cosines: Tensor, *, first: int = 0) -> None:
        self.name = name
        self._first = first
        rest = (1 - cosines.square().sum(1, keepdim=True)).sqrt()
        self._images = 2 * torch.cat([cosines, rest], 1).roll(first, 1)

    def text_embeds(self, prompts: Sequence[str]) -> Tensor:
        """Unit vectors."""
        assert prompts == [f"a photo of a {label}" for label in LABELS]
        return torch.eye(5)[:4].roll(self._first, 1)

    def preprocess(self, images: Sequence[int]) -> Tensor:
        """[B], the numbers."""
        return torch.tensor(images)

    def embeds_of_pixels(self, pixels: Tensor) -> Tensor:
        """[B, d]."""
        return self._images[pixels]

    def embeds_of_tensor(self, images: Sequence[int]) -> Tensor:
        """[B, d]."""
        return self._images[list(images)]


def spec_of(number: int) -> SampleSpec:
    classes = CELLS[number]
    cell = Cell(classes=classes, names=tuple(LABELS[index] for index in classes))
    return SampleSpec(
        key=f"job-000-{cell.code}-{number:08d}", request="r", method="prompt", cell=cell, prompt="p", context="",
        seed=number, index=number,
    )  # fmt: skip


def records(rows: Sequence[int] = (0, 1, 2), **changes: Tensor) -> list[dict[str, Any]]:
    """Records of some images by all models; `changes` are other values of models."""
    models = {"target": TARGET, "transfer": TRANSFER, "oracle": ORACLE, "cosines": COSINES, "judged": JUDGED} | changes
    scorer = Scorer(
        Classifier("t", models["target"]),  # type: ignore[arg-type]
        Clip("clip", models["cosines"]),  # type: ignore[arg-type]
        [Classifier("u", models["transfer"])],  # type: ignore[list-item]
        Oracles([Classifier("o", models["oracle"])]),  # type: ignore[list-item]
        Clip("judge", models["judged"], first=1),  # type: ignore[arg-type]
    )
    return scorer.records([spec_of(row) for row in rows], list(rows))  # type: ignore[arg-type]


def log_p(logits: Tensor, row: int, label: int) -> float:
    """The logarithm of a softmax, by its definition."""
    values = logits[row].tolist()
    return values[label] - math.log(sum(map(math.exp, values)))


@pytest.mark.parametrize("row", [0, 1, 2])
def test_every_score_is_its_definition_in_every_row(row: int) -> None:
    record, label, logits = records()[row], CLOSEST[row], TARGET
    check_record(record)
    p = [math.exp(log_p(logits, row, index)) for index in range(4)]
    assert (record["class_index"], record["class_name"]) == (label, LABELS[label])
    assert record["risk"] == pytest.approx(-log_p(logits, row, label), rel=1e-5)
    assert record["p_label"] == pytest.approx(p[label], rel=1e-5)
    assert record["entropy"] == pytest.approx(-sum(value * math.log(value) for value in p), rel=1e-5)
    assert record["predicted_class"] == p.index(max(p)) and record["is_error"] == (p.index(max(p)) != label)
    assert record["temperature"] == 1.5 and record["oracle_class"] == int(ORACLE[row].argmax())
    subset = sorted(CELLS[row]) if row else [0, 1]
    assert record["kldb_classes"] == subset
    uniform = 1 / len(subset)
    assert record["kldb"] == pytest.approx(sum(uniform * math.log(uniform / p[index]) for index in subset), rel=1e-5)
    assert record["kldb_mass"] == pytest.approx(-math.log(sum(p[index] for index in subset)), rel=1e-5, abs=1e-6)
    assert record["kldb_balance"] + record["kldb_mass"] == pytest.approx(record["kldb"], abs=1e-5)


@pytest.mark.parametrize("row", [0, 1, 2])
def test_conformity_is_that_of_the_closest_class_under_each_model(row: int) -> None:
    record, label = records()[row], CLOSEST[row]
    others = [index for index in range(4) if index != label]
    for scores, cosines in ((record, COSINES), (record["judge"][0], JUDGED)):
        assert scores["conformity"] == pytest.approx(float(cosines[row, label]), abs=1e-6)
        margin = float(cosines[row, label] - cosines[row, others].max())
        assert scores["conformity_margin"] == pytest.approx(margin, abs=1e-6)
    [entry] = record["transfer"]
    assert entry["predicted_class"] == int(TRANSFER[row].argmax()) and entry["model"] == "u"
    assert entry["risk"] == pytest.approx(-log_p(TRANSFER, row, label), rel=1e-5)


def test_a_soft_label_is_uniform_over_the_prompts_classes() -> None:
    assert [record["soft_label"] for record in records()] == [
        [1.0, 0.0, 0.0, 0.0],
        [0.5, 0.5, 0.0, 0.0],
        [0.0, *[pytest.approx(1 / 3)] * 3],
    ]


def test_scores_are_short_decimals() -> None:
    """The shortest that gives the float32, so that a record has no digits without meaning."""
    assert all(len(repr(record["risk"]).partition(".")[2]) <= 10 for record in records())


def test_the_subset_of_a_single_class_is_it_and_its_strongest_rival() -> None:
    """Also where the class itself is the prediction."""
    [record] = records([0], target=TARGET.flip(1))
    assert record["kldb_classes"] == [0, 3]


@pytest.mark.parametrize(
    ("model", "role"),
    [("target", "target"), ("transfer", "transfer"), ("oracle", "oracle"), ("cosines", "clip"), ("judged", "judge")],
)
def test_values_that_are_not_finite_fail_their_sample_and_name_the_model(model: str, role: str) -> None:
    values = {"target": TARGET, "transfer": TRANSFER, "oracle": ORACLE, "cosines": COSINES, "judged": JUDGED}[model]
    changed = values.clone()
    changed[1, 0] = math.nan
    made = records(**{model: changed})
    assert [record["status"] == STATUS_FAILED for record in made] == [False, True, False]
    assert f"models.{role}" in made[1]["error_message"]


def test_conformity_that_guides_is_the_cosine_or_the_inner_product() -> None:
    scorer = Scorer(Classifier("t", TARGET), Clip("clip", COSINES))  # type: ignore[arg-type]
    labels = torch.tensor(CLOSEST)
    cosines = COSINES[[0, 1, 2], labels]
    for raw, factor in ((False, 1.0), (True, 2.0)):
        measured = scorer.conformity_to(labels, raw=raw)([0, 1, 2])  # type: ignore[arg-type]
        assert torch.allclose(measured, factor * cosines, atol=1e-6)
