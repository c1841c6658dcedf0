"""Conditioning artefacts: named by their content, whole or not there, and refused where they would mislead."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from engine.errors import JobError, OutputError
from engine.generation.artefact import DOCUMENT, Conditioning, load_conditioning, save_conditioning
from engine.job.json_values import digest_of
from engine.methods.conditioning.predictor import ErrorPredictor
from engine.models.artefacts import find_artefact


@pytest.fixture(scope="module")
def conditioning() -> Conditioning:
    """That of the digits."""
    folder = find_artefact("zoo:digits/conditioning")
    assert folder is not None
    return load_conditioning(folder)


def test_an_equal_artefact_is_there_already_and_another_has_another_name(
    conditioning: Conditioning, tmp_path: Path
) -> None:
    """The name covers all of its content: here the same images under other options."""
    first, was_there = save_conditioning(conditioning, tmp_path)
    assert not was_there and save_conditioning(conditioning, tmp_path) == (first, True)
    options = conditioning.options | {"other": 1}
    second, was_there = save_conditioning(dataclasses.replace(conditioning, options=options), tmp_path)
    assert second != first and not was_there
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((first.name, second.name))
    assert load_conditioning(first).num_errors == conditioning.num_errors != conditioning.counts


def test_a_name_with_other_content_is_not_taken_for_it(conditioning: Conditioning, tmp_path: Path) -> None:
    """Also where it is a whole artefact."""
    path, _ = save_conditioning(conditioning, tmp_path / "a")
    other, _ = save_conditioning(dataclasses.replace(conditioning, images_digest="0" * 32), tmp_path / "b")
    shutil.rmtree(path)
    shutil.copytree(other, path)
    with pytest.raises(OutputError, match="is there with other content"):
        save_conditioning(conditioning, tmp_path / "a")


@pytest.mark.parametrize("version", [0, 2, 7])
def test_an_artefact_of_another_version_is_refused_by_its_number(
    conditioning: Conditioning, tmp_path: Path, version: int
) -> None:
    """Whole as it is: fields of another version may mean something else."""
    path, _ = save_conditioning(conditioning, tmp_path)
    fields = json.loads((path / DOCUMENT).read_text()) | {"schema_version": version}
    fields["digest"] = digest_of({name: value for name, value in fields.items() if name != "digest"})
    (path / DOCUMENT).write_text(json.dumps(fields))
    with pytest.raises(JobError, match=f"has schema version {version}, this version reads 1"):
        load_conditioning(path)


@pytest.mark.parametrize("name", ["weight_0", "std"])
def test_a_predictor_with_a_value_that_is_not_finite_is_refused(
    conditioning: Conditioning, tmp_path: Path, name: str
) -> None:
    """In any of its tensors: its confidence would not be a number, and every draw pass for the likeliest."""
    assert conditioning.fit.predictor is not None
    state = conditioning.fit.predictor.state()
    state[name] = torch.full_like(state[name], torch.nan)
    fit = dataclasses.replace(conditioning.fit, predictor=ErrorPredictor.from_state(state))
    path, _ = save_conditioning(dataclasses.replace(conditioning, fit=fit), tmp_path)
    with pytest.raises(JobError, match="weights of its error predictor are not finite"):
        load_conditioning(path)
