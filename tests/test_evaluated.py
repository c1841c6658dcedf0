"""An evaluation as the report shows it: figures in their places, and what is refused when it is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.data.run.file_names import EVALUATION
from engine.data.stores.opening import open_store
from engine.errors import CorruptShardError
from engine.report.evaluated import evaluation_context
from engine.report.evaluation import Evaluation, read_evaluation

PNG, JPEG = "data:image/png;base64,AA==", "data:image/jpeg;base64,BB=="


def interval(value: float) -> dict[str, float]:
    """The middle, and ends that are a hundredth and two away."""
    return {"value": value, "low": value - 0.01, "high": value + 0.02}


def source(num_unusable: int, shown: int) -> dict[str, Any]:
    files = [f"bad-{number}" for number in range(shown)]
    return {"address": "d", "kind": "tar", "num_images": 7, "num_unusable": num_unusable, "unusable": files}


def image(place: str, name: str, *, is_sample: bool) -> dict[str, Any]:
    return {"image": place, "name": name, "text": "t", "is_sample": is_sample}


def document(**changes: Any) -> dict[str, Any]:
    quality = {"request": "a", "num_images": 9, "kid": interval(0.05), "frechet": interval(4.0),
               "precision": interval(0.5), "recall": interval(0.25)}  # fmt: skip
    copies = {"request": "a", "num_images": 9, "clip_distance_median": 0.125, "pixel_distance_median": 0.25,
              "num_suspects": 3, "suspects": interval(1 / 3)}  # fmt: skip
    thresholds = {"num_held_out": 50, "num_shared": 0, "clip_distance": 0.1, "pixel_distance": 0.2, "num_suspects": 1,
                  "clip_distance_median": 0.375, "pixel_distance_median": 0.5}  # fmt: skip
    pair = {"sample": image("p", "key", is_sample=True), "training": image("j", "file", is_sample=False),
            "clip_distance": 0.1, "pixel_distance": 0.2, "is_suspect": True}  # fmt: skip
    extremes = {"title": "x", "score": "risk", "num_real": 2, "num_samples": 3, "median_real": 1.0,
                "median_samples": 2.0, "rows": []}  # fmt: skip
    return {
        "plan_digest": "x", "num_attempts": 10, "limit": 10, "seed": 0, "real": source(5, 4), "samples": {"a": 9},
        "quality": [{"against": "real", "features": "f", "requests": [quality]}], "text_scores": None,
        "memorisation": {"model": "m", "train": source(0, 0), "thresholds": thresholds, "requests": [copies],
                         "pairs": [pair]},
        "slices": {"which": "all", "model": "m", "num_failures": 0, "num_samples": 10, "error_rate": 0.0},
        "extremes": [extremes], "images": {"p": PNG, "j": JPEG},
    } | changes  # fmt: skip


@pytest.fixture
def context() -> dict[str, Any]:
    made = evaluation_context(Evaluation.model_validate(document()), 10)
    assert made is not None
    return made


@pytest.mark.parametrize(("num_attempts", "is_stale"), [(10, False), (12, True), (8, True)])
def test_an_evaluation_of_another_state_of_the_run_says_so(num_attempts: int, is_stale: bool) -> None:
    made = evaluation_context(Evaluation.model_validate(document()), num_attempts)
    assert made is not None and bool(made["stale"]) == is_stale


def test_distances_have_their_units_and_intervals(context: dict[str, Any]) -> None:
    """KID in thousandths."""
    [line] = context["quality"][0]["table"].lines
    assert line.cells == [
        ("9", ""), ("50.0", "40.0 to 70.0"), ("4.000", "3.990 to 4.020"), ("50.0 %", "49 to 52 %"),
        ("25.0 %", "24 to 27 %"),
    ]  # fmt: skip


def test_suspects_are_counted_beside_those_of_held_out_images(context: dict[str, Any]) -> None:
    request, held_out = context["memorisation"]["table"].lines
    assert request.cells == [("9", ""), ("0.125", ""), ("0.250", ""), ("3", "33.3 % (32.3 to 35.3 %)")]
    assert held_out.cells == [("50", ""), ("0.375", ""), ("0.500", ""), ("1", "2.0 %")]


def test_only_samples_of_the_run_lead_to_the_gallery(context: dict[str, Any]) -> None:
    [pair] = context["memorisation"]["pairs"]
    assert (pair["sample"]["key"], pair["training"]["key"]) == ("key", "")
    assert (pair["sample"]["is_tiny"], pair["training"]["is_tiny"]) == (True, False)


def test_medians_and_unusable_files_are_named(context: dict[str, Any]) -> None:
    [extreme] = context["extremes"]
    assert extreme["note"] == "Risk, median: 1.000 over 2 real images, 2.000 over 3 samples."
    assert "5 other files could not be used: bad-0; bad-1; bad-2; and 2 more." in context["lead"]


@pytest.mark.parametrize(
    "changes",
    [
        {"other": 1},
        {"images": {"p": PNG + '" onload="x'}},
        {"images": {"p": "https://example.org/x.png"}},
        {"slices": document()["slices"] | {"error_rate": float("inf")}},
        {"slices": document()["slices"] | {"error_rate": float("nan")}},
    ],
    ids=["key", "markup", "address", "infinite", "no number"],
)
def test_what_is_no_evaluation_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    """By the file and from Python; unknown keys, images that are none, values that JSON does not have."""
    store = open_store(str(tmp_path))
    store.replace(EVALUATION, json.dumps(document()).encode())
    assert read_evaluation(store) is not None
    store.replace(EVALUATION, json.dumps(document() | changes).encode())
    with pytest.raises(CorruptShardError, match="cannot be read as an evaluation"):
        read_evaluation(store)
    with pytest.raises(ValueError):
        Evaluation.model_validate(document() | changes)
