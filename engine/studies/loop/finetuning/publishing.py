"""The folder of a fine-tuned pipeline: the parent's parts with new weights of the network, and `training.json`."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.data.stores.file_errors import explained
from engine.data.stores.folder import sync
from engine.errors import JobError, OutputError
from engine.methods.strict_json import parse_json
from engine.models.digests import loaded_files
from engine.models.training_lineage import TRAINING_DOCUMENT
from engine.models.untrusted_files import MAX_DOCUMENT_BYTES, read_whole
from engine.studies.loop.finetuning.lora import ADAPTER_FILE
from engine.studies.loop.finetuning.training import Trained

ADAPTER_FOLDER = "adapter"
_WEIGHTS = ".safetensors"


def training_document(folder: Path) -> dict[str, Any] | None:
    """The content of a model folder's `training.json`; None where there is none that can be read."""
    try:
        document = parse_json(read_whole(folder / TRAINING_DOCUMENT, MAX_DOCUMENT_BYTES))
    except (OSError, ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def is_published(output: Path, identity: str) -> bool:
    """Whether a folder has the result of this training already; it is published as a whole.

    Raises:
        OutputError: there is something else, or it cannot be written.
    """
    if not os.path.lexists(output):
        return False
    if not output.is_dir():
        raise OutputError(f"{output}: is a file, not a folder; choose another")
    with explained(output):
        if not any(output.iterdir()):
            return False
    document = training_document(output)
    if document is None or "identity" not in document:
        raise OutputError(f"{output}: holds files that no fine-tuning has left there; choose another folder")
    if document["identity"] != identity:
        raise OutputError(
            f"{output}: holds the model of another training (its parent, samples, recipe or seed are others); move it"
            " away or choose another folder"
        )
    return True


def check_writable(work: Path) -> None:
    """Create the working folder of a training, and write to it.

    Raises:
        OutputError: the file system refuses.
    """
    probe = work / ".probe"
    with explained(work):
        work.mkdir(parents=True, exist_ok=True)
        probe.write_bytes(b"\0")
        probe.unlink()


def publish(parent: Path, part: str, trained: Trained, document: dict[str, Any], *, work: Path, output: Path) -> None:
    """Build the folder in the working folder, rename it, and remove the working folder.

    Args:
        part: of the pipeline: the network.

    Raises:
        OutputError: the file system refuses, or `output` has come into being meanwhile; nothing is published.
        JobError: a new weight is not finite in the precision of the parent's, or the parent's have other names.
    """
    staged = work / "model"
    with explained(output):
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
        (staged / TRAINING_DOCUMENT).write_text(f"{text}\n", encoding="utf-8")
        for path in sorted(loaded_files(parent)):
            target = staged / path.relative_to(parent)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.parent.name == part and path.name.endswith(_WEIGHTS):
                _write_tensors(_replaced(path, trained.weights, document), target, staged)
            else:
                _reuse(path, target, is_ours=training_document(parent) is not None)
        if trained.adapter:
            (staged / ADAPTER_FOLDER).mkdir()
            _write_tensors(trained.adapter, staged / ADAPTER_FOLDER / ADAPTER_FILE, staged)
        for path in (*staged.rglob("*"), staged):
            sync(path)
        _rename(staged, output)
        shutil.rmtree(work, ignore_errors=True)


def _replaced(path: Path, weights: dict[str, Tensor], document: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of one of the parent's files with the trained values, in the precision of the file."""
    from safetensors.torch import load_file

    tensors = {}
    for name, old in load_file(path).items():
        if name not in weights or weights[name].shape != old.shape:
            raise JobError(
                f"'{document['parent_model']['address']}': {path.name} has {name}, which the loaded network has not;"
                " save the pipeline again with this diffusers (save_pretrained) and name the new folder"
            )
        tensors[name] = weights[name].detach().to("cpu", old.dtype).contiguous()
        if not bool(torch.isfinite(tensors[name]).all()):
            raise JobError(
                f"training.learning_rate: {document['recipe']['learning_rate']:g} makes weights ({name}) grow beyond"
                f" the numbers of {str(old.dtype).removeprefix('torch.')}; use a smaller one"
            )
    return tensors


def _write_tensors(tensors: dict[str, Tensor], path: Path, staged: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        # The library has no other error for what the system refuses.
        if (refusal := re.search(r"os error (\d+)", str(error))) is None:
            raise
        raise OSError(int(refusal[1]), os.strerror(int(refusal[1]))) from error
    # safetensors lets nobody else read what it writes.
    shutil.copymode(staged / TRAINING_DOCUMENT, path)


def _reuse(path: Path, target: Path, *, is_ours: bool) -> None:
    """Weights of an earlier fine-tuning are shared as hard links, which nothing writes to; others are copied."""
    if is_ours and path.name.endswith(_WEIGHTS):
        try:
            os.link(path.resolve(), target)
        except OSError:
            pass
        else:
            return
    shutil.copyfile(path, target)


def _rename(staged: Path, output: Path) -> None:
    try:
        staged.rename(output)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
            raise
        raise OutputError(
            f"{output}: another process has put something there meanwhile; choose another folder"
        ) from None
