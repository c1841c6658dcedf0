"""Checkpoints of a whole pipeline in one file: refused, with the line that converts them once. Imports no torch."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from engine.errors import JobError
from engine.models.pipelines.registry import checkpoint_class
from engine.models.stored_tensors import tensors_in

_SUFFIXES = (".safetensors", ".ckpt")


def single_file_problem(address: str) -> str | None:
    """Why a checkpoint of one file is not loaded, with the command that makes a folder of it; None for any other."""
    path = Path(address).expanduser()
    if path.suffix not in _SUFFIXES or not path.is_file():
        return None
    try:
        names = list(tensors_in(path)) if path.suffix == ".safetensors" else []
    except JobError as error:
        return f"'{address}': {error}"
    kind = checkpoint_class(names)
    return (
        f"'{address}' is a checkpoint of one file, without the configurations of its parts; convert it once and name"
        f" the new folder: {conversion_line(path, kind)} (FOLDER is a pipeline of the same kind as diffusers saves it,"
        " of which the configurations and the tokenizer are read alone, so that no network is needed)"
    )


def conversion_line(path: Path, kind: str) -> str:
    """The command that makes a folder of a checkpoint.

    Args:
        kind: class of diffusers' pipeline.
    """
    source, target = json.dumps(str(path)), json.dumps(path.stem)
    code = f'import diffusers; diffusers.{kind}.from_single_file({source}, config="FOLDER", local_files_only=True)'
    return f"python -c {shlex.quote(f'{code}.save_pretrained({target})')}"
