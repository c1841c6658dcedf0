"""Checkpoints of a training: one file, replaced atomically, that the same training continues from."""

from __future__ import annotations

import contextlib
import os
import pickle
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from engine.data.stores.file_errors import explained

CHECKPOINT = "checkpoint.pt"


@dataclass(slots=True, eq=False, kw_only=True)
class Checkpoint:
    """The state of a training between two steps.

    Attributes:
        identity: digest of what decides the training.
        weights: trained parameters by name.
        optimizer, scaler: their `state_dict`; the scaler's is empty where none is used.
        losses: of the steps that are done.
    """

    identity: str
    weights: dict[str, Any]
    optimizer: dict[str, Any]
    scaler: dict[str, Any] = field(default_factory=dict)
    losses: list[float]

    def write(self, folder: Path) -> None:
        """Replace the checkpoint in a folder; after a power cut the old or the new one is there.

        Raises:
            OutputError: the file system refuses; the old one is kept.
        """
        staged = folder / f"{CHECKPOINT}.tmp"
        state = {name: getattr(self, name) for name in self.__slots__}
        with explained(folder):
            try:
                with staged.open("wb") as file:
                    torch.save(state, file)
                    file.flush()
                    os.fsync(file.fileno())
                staged.replace(folder / CHECKPOINT)
            finally:
                staged.unlink(missing_ok=True)

    @classmethod
    def read(cls, folder: Path, identity: str) -> Checkpoint | None:
        """The checkpoint in a folder, on the CPU; None where there is none of this training, or it is damaged."""
        with contextlib.suppress(OSError, RuntimeError, ValueError, KeyError, TypeError, EOFError,
                                 pickle.UnpicklingError, zipfile.BadZipFile):  # fmt: skip
            state = torch.load(folder / CHECKPOINT, weights_only=True, map_location="cpu")
            return cls(**state) if state["identity"] == identity else None
        return None
