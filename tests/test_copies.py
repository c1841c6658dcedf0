"""Models on several machines: a copy that differs is refused, one that is equal is read only if its files look new."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from engine.driver.run import default_worker
from engine.errors import JobError
from engine.models import copies
from engine.models.addresses import resolve
from engine.models.copies import check_copies, model_copies
from engine.models.digests import model_digest
from tests.program_cases import SETTINGS


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A copy of the digits' classifier."""
    return str(shutil.copytree(resolve("zoo:digits/classifier"), tmp_path / "classifier"))


def described(model: str) -> dict[str, Any]:
    """As the manifest describes a job's models."""
    return {
        "diffusion": [],
        "target": {"address": model, "digest": model_digest(model)},
        "oracles": [{"address": model, "digest": model_digest(model)}],
        "conditioning": [{"address": "nowhere", "digest": "x"}],
        "transfer": [{"address": "package.module:factory", "digest": "y"}],
    }


def test_a_copy_with_other_weights_is_refused_before_it_is_loaded(model: str) -> None:
    """Its name and size may be the same: the worker's run would have two models under one name."""
    found = model_copies(described(model))
    assert [copy.address for copy in found] == [model]
    [weights] = Path(model).glob("*.safetensors")
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, (1, 1))
    with pytest.raises(JobError, match=r"classifier.* on machine gpu-7 has the digest .* where the run was started"):
        check_copies(found, "gpu-7")
    # By a worker, which has no store or plan yet.
    with pytest.raises(JobError, match="let all machines use the same files"):
        default_worker(None, None, ".", models=found)  # type: ignore[arg-type]


def test_equal_files_are_read_only_where_they_look_new(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a shared folder nothing is read; a cache of another machine is, and is the same model."""
    found, read = model_copies(described(model)), []
    digest = model_digest
    monkeypatch.setattr(copies, "model_digest", lambda address: read.append(address) or digest(address))
    check_copies(found, "gpu-7")
    assert not read
    for path in Path(model).iterdir():
        os.utime(path, (1, 1))
    check_copies(found, "gpu-7")
    assert read == [model]


def test_a_model_that_is_a_file_is_compared_with_its_side_file(tmp_path: Path) -> None:
    """Class names and temperature are in the side file."""
    path = tmp_path / "net.pt"
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 10))
    torch.jit.trace(network, torch.zeros(2, 3, 32, 32)).save(str(path))
    side = tmp_path / "net.pt.json"
    side.write_text(json.dumps(SETTINGS))
    found = model_copies({"target": {"address": str(path), "digest": model_digest(str(path))}})
    check_copies(found, "here")
    side.write_text(json.dumps(SETTINGS | {"temperature": 3.0}))
    with pytest.raises(JobError, match="on machine here has the digest"):
        check_copies(found, "here")
