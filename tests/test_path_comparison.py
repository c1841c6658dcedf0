"""The two paths of a target: how far its probabilities differ, and what `plan` says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from engine.models.classifier import Classifier
from engine.models.path_comparison import NUM_IMAGES, compare_paths, probe_images
from tests.model_cases import ZOO, as_tensor, copied
from tests.program_cases import job_of


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Copies of the zoo's target: images are enlarged before the network sees them, and one has a steep softmax."""
    home, targets = tmp_path_factory.mktemp("targets"), {}
    for name, role, temperature in (("usual", "transfer", 1.0), ("steep", "target", 0.01)):
        folder = copied(ZOO[role], home / name, temperature=temperature)
        processor = folder / "preprocessor_config.json"
        settings = json.loads(processor.read_text()) | {"size": {"height": 48, "width": 48}, "resample": 3}
        processor.write_text(json.dumps(settings))
        targets[name] = str(folder)
    return targets


def test_the_difference_is_that_of_probabilities_of_eight_images(targets: dict[str, str]) -> None:
    """By hand, image by image; the images are the same every time, and differ from each other."""
    images = probe_images(32, 40)
    assert len(images) == NUM_IMAGES == 8 and {image.size for image in images} == {(40, 32)}
    pairs = zip(images, probe_images(32, 40), strict=True)
    assert all(np.array_equal(np.array(first), np.array(second)) for first, second in pairs)
    assert len({image.tobytes() for image in images}) == 8 and min(np.array(image).std() for image in images) > 20
    classifier = Classifier.load(targets["usual"])
    with torch.no_grad():
        seen = [classifier.logits(as_tensor(image)).softmax(1)[0] for image in images]
    stored = [classifier.score([image]).softmax(1)[0] for image in images]
    by_hand = [float((first - second).abs().max()) for first, second in zip(stored, seen, strict=True)]
    found = compare_paths(classifier, 32, 40)
    assert found.largest == pytest.approx(max(by_hand), abs=1e-6) and found.largest > 0
    assert found.mean == pytest.approx(sum(by_hand) / 8, abs=1e-6)


def test_equal_paths_do_not_differ() -> None:
    """The zoo's target takes images of the size that they have."""
    found = compare_paths(Classifier.load(ZOO["target"]), 32, 32)
    assert found.largest < 1e-5 and not found.num_changed and not found.is_large


def test_plan_prints_the_difference_and_warns_of_a_large_one(
    call: Any, targets: dict[str, str], tmp_path: Path
) -> None:
    """With and without `--validate`; only where it is asked to load the targets."""
    job = tmp_path / "job.yaml"
    raw = job_of("", tmp_path)
    raw["models"]["target"] = [targets["usual"], targets["steep"]]
    job.write_text(yaml.safe_dump(raw))
    for options in (["--validate"], []):
        code, out, err = call("plan", job, *options, "--compare-paths")
        assert code == 0 and f"{targets['usual']}: probabilities on tensors and on stored images differ by" in out, err
        assert "guidance is led by another image than is scored" in " ".join(err.split())
        assert f"warning:{targets['steep']}:probabilities" in "".join(err.split())
    first, second = json.loads(call("plan", job, "--validate", "--compare-paths", "--json")[1])["paths"]
    assert first["address"] == targets["usual"] and first["largest"] < 0.05 <= second["largest"]
    assert "paths" not in json.loads(call("plan", job, "--validate", "--json")[1])
