"""What a model's folder says of its training, by the real folders of the file system, and what others may put there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from engine.models.training_lineage import PROBLEM, training_of, training_text

DOCUMENT: dict[str, Any] = {
    "training": "generator",
    "parent_run": {"uri": "../curated", "plan_digest": "p0"},
    "parent_model": {"digest": "m0"},
}


def described(folder: Path, text: str | bytes) -> Any:
    (folder / "training.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    return training_of(str(folder))


def test_the_parents_are_named(tmp_path):
    trained_on = described(tmp_path, json.dumps(DOCUMENT | {"recipe": {"steps": 3}}))
    assert trained_on == {name: DOCUMENT[name] for name in ("parent_run", "parent_model")}
    assert training_text(trained_on) == "fine-tuned on the run ../curated, plan p0, from a model with digest m0"


def test_other_folders_say_nothing(tmp_path):
    """Nor does a file of another program that has the name."""
    assert training_of(str(tmp_path)) is None and training_of("zoo:digits/stable-diffusion") is None
    assert training_of("owner/no-such-model") is None and training_text(None) == ""
    for foreign in ({}, [], {"training": True}, {"training": {"epochs": 3}}, "text"):
        assert described(tmp_path, json.dumps(foreign)) is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"\xff\xfe",
        "{",
        "[" * 100_000,
        json.dumps({"training": "generator"}),
        json.dumps(DOCUMENT | {"parent_run": {"uri": "../curated"}}),
        json.dumps(DOCUMENT | {"parent_run": {"plan_digest": 3}}),
        json.dumps(DOCUMENT | {"parent_model": {"digest": "m" * 2000}}),
        json.dumps(DOCUMENT | {"parent_model": None}),
        b" " * (5 * 2**20),
    ],
)
def test_a_damaged_file_is_reported_and_stops_nothing(text, tmp_path):
    trained_on = described(tmp_path, text)
    assert list(trained_on) == [PROBLEM] and "training.json cannot be read" in training_text(trained_on)
    assert len(training_text(trained_on)) < 1200


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "training.json")
    assert "is a pipe" in training_text(training_of(str(tmp_path)))


@pytest.mark.parametrize("value", [3, [], "text", {}, {"parent_run": {}}, {"parent_run": {"plan_digest": "p"}}])
def test_a_manifest_of_another_kind_is_refused(value):
    with pytest.raises(ValueError):
        training_text(value)
