"""Which kind of oracle an address names, by its files, and the weights that it depends on. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from engine.models.addresses import locate
from engine.models.clip_checks import CLIP_TYPES
from engine.models.configurations import NEIGHBOURS_DOCUMENT, read_config
from engine.models.neighbour_documents import find_neighbours, read_neighbours
from engine.models.open_clip_checks import is_open_clip
from engine.models.programs import is_program

OracleKind = Literal["classifier", "clip", "neighbours"]


def oracle_kind(address: str) -> OracleKind | None:
    """The kind of an oracle; None for a hub id that is not on this machine.

    Raises:
        JobError: there is no such model.
    """
    if is_program(address):
        return "classifier"
    folder = oracle_folder(address)
    return None if folder is None else kind_in(folder)


def oracle_folder(address: str) -> Path | None:
    """The folder of an oracle that is no program, of a *neighbours* artefact its own; None as `oracle_kind`.

    Raises:
        JobError: there is no such model, or several artefacts.
    """
    return find_neighbours(address) or locate(address).folder


def kind_in(folder: Path) -> OracleKind:
    """The kind of the oracle in a folder; whether it can be used is not checked.

    Raises:
        JobError: its configuration cannot be read.
    """
    if (folder / NEIGHBOURS_DOCUMENT).is_file():
        return "neighbours"
    if is_open_clip(folder):
        return "clip"
    config = read_config(folder / "config.json") if (folder / "config.json").is_file() else {}
    kinds = config.get("architectures") or ()
    if config.get("model_type") in CLIP_TYPES and not any("ForImageClassification" in str(kind) for kind in kinds):
        return "clip"
    return "classifier"


def network_of(address: str) -> tuple[str, bool]:
    """The address of the network that an oracle scores with, and whether that network is a CLIP model.

    Raises:
        JobError: there is no such model, or its artefact is damaged.
    """
    kind = oracle_kind(address)
    folder = oracle_folder(address) if kind == "neighbours" else None
    if folder is not None:
        address = read_neighbours(folder).encoder_address
        kind = oracle_kind(address)
    return address, kind == "clip"
