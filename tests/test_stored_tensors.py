"""Tensors of safetensors by the headers of the files: those that are loaded, and damaged headers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from engine.errors import JobError
from engine.models.stored_tensors import stored_tensors

FIRST, SECOND = {"a": torch.arange(6.0).reshape(2, 3)}, {"b": torch.ones(3, dtype=torch.bfloat16)}


def test_types_shapes_and_bytes_are_those_that_were_saved(tmp_path: Path) -> None:
    """Of several tensors in a file."""
    save_file(FIRST | SECOND, tmp_path / "model.safetensors", metadata={"format": "pt"})
    stored = stored_tensors(tmp_path)
    assert {name: (tensor.dtype, tensor.shape) for name, tensor in stored.items()} == {
        "a": ("F32", (2, 3)),
        "b": ("BF16", (3,)),
    }
    assert stored["a"].read() == FIRST["a"].numpy().tobytes()
    assert stored["b"].read() == b"\x80\x3f" * 3


def test_only_the_files_that_are_loaded_are_read(tmp_path: Path) -> None:
    """An unsharded file alone; without it the shards in the index; without an index all files."""
    save_file(FIRST, tmp_path / "model.safetensors")
    save_file(SECOND, tmp_path / "other.safetensors")
    assert set(stored_tensors(tmp_path)) == {"a"}
    (tmp_path / "model.safetensors").rename(tmp_path / "model-00001-of-00001.safetensors")
    assert set(stored_tensors(tmp_path)) == {"a", "b"}
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(stored_tensors(tmp_path)) == {"a"}


def header(entries: object, length: int | None = None) -> bytes:
    """The head of a file, with its own length or another."""
    text = json.dumps(entries).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text


def entry(start: int, stop: int) -> dict[str, object]:
    return {"a": {"dtype": "F32", "shape": [1], "data_offsets": [start, stop]}}


@pytest.mark.parametrize(
    "data",
    [
        b"", b"\0" * 8, header({}, 3), header({}, 10**6), header([]), header({"a": 1}), header(entry(0, 4)),
        header(entry(-4, 0)) + b"1234", header(entry(4, 0)) + b"1234", header(entry(0, 5)) + b"1234",
    ],
)  # fmt: skip
def test_a_damaged_file_is_named(data: bytes, tmp_path: Path) -> None:
    """Lengths and offsets that the file does not have."""
    (tmp_path / "model.safetensors").write_bytes(data)
    with pytest.raises(JobError, match=r"model\.safetensors is damaged: .*; download or save it again"):
        stored_tensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(header(entry(0, 4)) + b"1234")
    assert stored_tensors(tmp_path)["a"].read() == b"1234"


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    """Nobody writes into it."""
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(JobError, match="is a pipe"):
        stored_tensors(tmp_path)
