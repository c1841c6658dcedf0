"""The class names of a classifier or an oracle by its address."""

from __future__ import annotations

from engine.errors import JobError
from engine.job.spec import JobSpec
from engine.models.addresses import locate, resolve
from engine.models.classifier_checks import class_names, is_binary
from engine.models.neighbour_documents import read_neighbours
from engine.models.oracle_kinds import kind_in, oracle_folder
from engine.models.program_description import program_is_binary, program_labels
from engine.models.programs import is_program

# In the description of a model: what is done with its head, where that is not what the network gives.
HEAD = "head"


def read_labels(address: str) -> list[str] | None:
    """The class names of a classifier in index order, or None for a hub id that is not on this machine.

    Raises:
        JobError: the folder has no usable `config.json` with `id2label`, or with timm's `label_names`; or as
            `engine.models.program_description.program_labels`.
    """
    if is_program(address):
        return program_labels(address)
    folder = locate(address).folder
    return None if folder is None else class_names(folder, address)


def describe_head(address: str) -> dict[str, str]:
    """What is done with the head of a classifier that has one logit, for its description; empty for any other.

    Raises:
        JobError: as `read_labels`.
    """
    if is_program(address):
        is_single = program_is_binary(address)
    else:
        folder = locate(address).folder
        is_single = folder is not None and (folder / "config.json").is_file() and is_binary(folder)
    names = read_labels(address) if is_single else None
    return {HEAD: f"its one logit z is read as the logits [0, z] of {names[0]!r} and {names[1]!r}"} if names else {}


def oracle_labels(address: str) -> list[str] | None:
    """The class names of an oracle in index order; None for a CLIP model, which takes any, and as `read_labels`.

    Raises:
        JobError: as `read_labels`, or its artefact is damaged.
    """
    folder = None if is_program(address) else oracle_folder(address)
    if folder is None or (kind := kind_in(folder)) == "classifier":
        return read_labels(address)
    return None if kind == "clip" else list(read_neighbours(folder).labels)


def target_labels(job: JobSpec) -> list[str]:
    """The class names of a job's target in index order; a model of the hub is downloaded for them.

    Raises:
        JobError: as `read_labels` and `engine.models.addresses.resolve`; problems of the download name the field.
    """
    labels = read_labels(job.models.target)
    if labels is None:
        try:
            resolve(job.models.target)
        except JobError as error:
            raise JobError([f"models.target: {problem}" for problem in error.problems]) from None
        labels = read_labels(job.models.target)
    assert labels is not None, "a resolved model has labels"
    return labels
