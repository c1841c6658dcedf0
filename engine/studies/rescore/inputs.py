"""What a rescoring is asked for: classifiers with the classes of the run, and a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from engine.data.run.state import (
    MANIFEST,
    PLANS,
    RESCORING,
    read_manifest,
)
from engine.data.stores.base import Store
from engine.errors import CorruptShardError, JobError, OutputError
from engine.job.plan import digest_of
from engine.job.spec import JobSpec
from engine.methods.strict_json import parse_json
from engine.models.addresses import model_digest, read_labels, resolve
from engine.models.targets import is_foreign
from engine.studies.compare.program import label_differences

if TYPE_CHECKING:
    pass

DIGEST_CHARS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Addresses and digests of the classifiers that score anew; `transfer` and `oracle` only where asked for."""

    target: str
    transfer: tuple[str, ...]
    oracle: str | None
    digests: dict[str, Any]


def labels_of(store: Store, job: JobSpec) -> list[str]:
    """Class names of the run's own target; of the manifest, as the model may have changed or gone."""
    with suppress(OutputError, CorruptShardError, KeyError, TypeError):
        return [str(label) for label in read_manifest(store)["models"]["target"]["labels"]]
    labels = read_labels(job.models.target)
    if labels is None:
        raise JobError(
            f"{store.uri}: has no {MANIFEST} yet, and its target '{job.models.target}' is not on this machine; finish"
            " the run first"
        )
    return labels


def check_models(target: str, transfer: Sequence[str], oracle: str | None, labels: list[str]) -> Models:
    """Find the classifiers.

    Raises:
        JobError: all that are not there or have other classes than the run, with the differences.
    """
    problems: list[str] = []
    asked = [("--target", target), *(("--transfer", one) for one in transfer)]
    for option, address in [*asked, *([("--oracle", oracle)] if oracle else [])]:
        try:
            if not is_foreign(address):
                resolve(address)
            if lines := label_differences(labels, read_labels(address) or []):
                problems += [f"{option}: '{address}' has other classes than the run (there -> here)", *lines]
        except JobError as error:
            problems += [f"{option}: {problem}" for problem in error.problems]
    if problems:
        raise JobError(problems)
    digests: dict[str, Any] = {"target": model_digest(target)}
    digests |= {"transfer": [model_digest(one) for one in transfer]} if transfer else {}
    digests |= {"oracle": model_digest(oracle)} if oracle else {}
    return Models(target=target, transfer=tuple(transfer), oracle=oracle, digests=digests)


def folder_name(target: str, models: Models) -> str:
    """Name of a target for people, and a digest of all that scores anew: the target's own where that is all."""
    last = target.rstrip("/").replace("\\", "/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in last).strip(".-")[:60]
    digest = models.digests["target"] if len(models.digests) == 1 else digest_of(models.digests)
    return f"{name or 'target'}-{digest[:DIGEST_CHARS]}"


def check_folder(folder: Store, source: Store, about: dict[str, Any]) -> None:
    """Refuse a folder that is not empty and not of this very rescoring.

    Raises:
        OutputError: it holds something else.
    """
    if folder.place == source.place or folder.list(PLANS):
        raise OutputError(f"--output {folder.uri}: is a run; give another folder for its new scores")
    if not folder.exists(RESCORING):
        # A killed beginning leaves nothing but its state.
        if names := [name for name in folder.list() if name != "_state"]:
            raise OutputError(
                f"--output {folder.uri}: holds files that no rescoring wrote ({names[0]!r}); give another"
            )
        return
    try:
        held = parse_json(folder.read(RESCORING))
    except ValueError:
        held = None
    if held != about:
        raise OutputError(
            f"--output {folder.uri}: holds a rescoring of another plan or by other models; give another folder, or"
            " remove that one"
        )


def is_inside(folder: Store, store: Store) -> bool:
    return folder.place.is_relative_to(store.place)
