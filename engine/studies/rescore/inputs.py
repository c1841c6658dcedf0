"""What a rescoring needs: classifiers with the classes of the run, and a folder for its results."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Any

from engine.data.run.file_names import MANIFEST, PLANS, RESCORED, RESCORING
from engine.data.run.manifest_reading import read_manifest
from engine.data.run.stored_plan import stored_plan
from engine.data.stores.base import Store
from engine.data.stores.opening import open_store
from engine.errors import CorruptShardError, JobError, OutputError
from engine.job.json_values import digest_of
from engine.job.label_maps import LabelMap
from engine.job.plan import TEMPERATURE, Plan, planned_temperature, planned_validity
from engine.job.spec import JobSpec
from engine.methods.strict_json import parse_json
from engine.methods.validity import ValidityModel
from engine.models.addresses import resolve
from engine.models.calibration import (
    CALIBRATION,
    checked_calibration,
    describe_temperature,
)
from engine.models.digests import model_digest, oracle_digest
from engine.models.job_label_maps import LABEL_MAPS, Maps, label_map_of
from engine.models.labels import oracle_labels, read_labels
from engine.models.oracle_checks import check_oracle
from engine.models.oracle_kinds import oracle_folder, oracle_kind
from engine.models.programs import is_program

DIGEST_CHARS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Models:
    """Addresses and digests of the new classifiers; `transfer` and `oracles` only where they are given.

    Attributes:
        named: address of the target that the results have.
        calibration: address of the artefact that the target's temperature is of; None for the target's own.
        described: the temperature, as in the description of a run's target.
        guided: digests of the targets that guided the run, where it has several; empty where it has one.
        digests: by role, and the temperature where it is not the target's own.
        validity: the run's estimate of the share of people who agree, where the new oracles are those that it is of.
        label_map: by address, classes of the new classifiers as those of the run's target (`models.label_map`).
    """

    target: str
    calibration: str | None
    described: dict[str, Any]
    transfer: tuple[str, ...]
    oracles: tuple[str, ...]
    digests: dict[str, Any]
    named: str = ""
    guided: frozenset[str] = frozenset()
    validity: ValidityModel | None = None
    label_map: Maps = field(default_factory=dict)

    @property
    def temperature(self) -> float | None:
        """Of the target in place of its own; None for its own."""
        return self.digests.get(TEMPERATURE)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Rescoring:
    """A run, the classifiers for it, and the folder of the results.

    Attributes:
        labels: class names of the run's target, in index order.
    """

    run: Store
    folder: Store
    job: JobSpec
    plan: Plan
    labels: list[str]
    models: Models

    @property
    def identity(self) -> dict[str, Any]:
        """By which the folder of a rescoring is recognised."""
        return {"plan_digest": self.plan.digest, "models": self.models.digests}

    @property
    def is_inside_run(self) -> bool:
        """Whether the folder lies inside the run."""
        return self.folder.place.is_relative_to(self.run.place)


def open_rescoring(
    address: str,
    target: str,
    transfer: Sequence[str],
    oracles: Sequence[str],
    output: str | None,
    calibration: str | None = None,
    named: str | None = None,
    label_map: Maps | None = None,
) -> Rescoring:
    """Open a run and the folder for its new scores, and check the classifiers.

    Args:
        named: address of the target for the results; that of `target` where not given.
        label_map: as `models.label_map` of a job, in addition to that of the run's.

    Raises:
        JobError: a model is not there or has other classes.
        OutputError: there is no run, or the folder holds something else.
    """
    run = open_store(address)
    job, plan = stored_plan(run)
    labels = _labels_of(run, job)
    _check_addresses(label_map or {}, [target, *transfer, *oracles])
    maps = {**job.models.label_map, **(label_map or {})}
    models = _check_models(target, transfer, _with_guiding(oracles, job), labels, maps)
    models = replace(models, guided=_guided(plan), validity=_validity(models, plan))
    models = replace(_calibrated(models, run, job, plan, calibration), named=named or target)
    folder = open_store(output or run.address(f"{RESCORED}/{_folder_name(target, models)}"))
    rescoring = Rescoring(run=run, folder=folder, job=job, plan=plan, labels=labels, models=models)
    _check_folder(rescoring)
    return rescoring


def _check_addresses(label_map: Maps, addresses: Sequence[str]) -> None:
    """Check that label maps are of classifiers that are asked for.

    Raises:
        JobError: one is of another.
    """
    if unknown := [address for address in label_map if address not in addresses]:
        raise JobError(f"--label-map: '{unknown[0]}' is none of the classifiers {', '.join(map(repr, addresses))}")


def _with_guiding(oracles: Sequence[str], job: JobSpec) -> Sequence[str]:
    """New oracles, if any, and last the one that guided the run: whatever is asked, it stays one that guided."""
    if not oracles or not job.oracle_guides:
        return oracles
    guiding = job.models.all_oracles[-1]
    digest = oracle_digest(guiding)
    # Under another address it would count as independent.
    return [*(address for address in oracles if address != guiding and oracle_digest(address) != digest), guiding]


def _labels_of(store: Store, job: JobSpec) -> list[str]:
    """Class names of the run's own target; from the manifest, as the model may have changed since.

    Raises:
        JobError: there is no manifest yet, and the target is not on this machine.
    """
    with suppress(OutputError, CorruptShardError, KeyError, TypeError):
        return [str(label) for label in read_manifest(store)["models"]["target"]["labels"]]
    labels = read_labels(job.models.target)
    if labels is None:
        raise JobError(
            f"{store.uri}: has no {MANIFEST} yet, and its target '{job.models.target}' is not on this machine; finish"
            " the run first"
        )
    return labels


def _check_models(
    target: str, transfer: Sequence[str], oracles: Sequence[str], labels: list[str], maps: Maps
) -> Models:
    """Check that the classifiers are there and have the classes of the run.

    Raises:
        JobError: all that are not there or have other classes than the run, with the differences.
    """
    problems: list[str] = []
    found: dict[str, LabelMap] = {}
    asked = [("--target", target), *(("--transfer", address) for address in transfer)]
    for option, address in [*asked, *(("--oracle", address) for address in oracles)]:
        try:
            theirs = _labels_of_oracle(address) if option == "--oracle" else _labels_of_classifier(address)
            label_map = label_map_of(address, theirs, labels, maps, " in a file for --label-map")
            found |= {address: label_map} if label_map else {}
        except JobError as error:
            problems += [f"{option}: {problem}" for problem in error.problems]
    addresses = [target, *transfer, *oracles]
    if problems:
        raise JobError(problems)
    digests: dict[str, Any] = {"target": model_digest(target)}
    digests |= {"transfer": [model_digest(address) for address in transfer]} if transfer else {}
    # One oracle as rescorings had it before there could be several.
    of_oracles = [oracle_digest(address) for address in oracles]
    digests |= {"oracle": of_oracles[0]} if oracles else {}
    digests |= {"oracles": of_oracles} if len(oracles) > 1 else {}
    digests |= {LABEL_MAPS: {address: list(one.places) for address, one in found.items()}} if found else {}
    return Models(
        target=target,
        label_map={address: entries for address, entries in maps.items() if address in addresses},
        calibration=None,
        described={},
        transfer=tuple(transfer),
        oracles=tuple(oracles),
        digests=digests,
    )


def _labels_of_classifier(address: str) -> list[str] | None:
    if not is_program(address):
        resolve(address)
    return read_labels(address)


def _labels_of_oracle(address: str) -> list[str] | None:
    """The classes of an oracle that can be loaded; None for a CLIP model, which takes those of the run."""
    if not is_program(address):
        if oracle_kind(address) is None:
            resolve(address)
        if (folder := oracle_folder(address)) is not None:
            check_oracle(folder, address)
    return oracle_labels(address)


def _calibrated(models: Models, run: Store, job: JobSpec, plan: Plan, address: str | None) -> Models:
    """The classifiers with the temperature of the target: of an artefact, or of the run where the target is the run's.

    Raises:
        JobError: there is no such artefact, or it is not one of the target.
    """
    if address is not None:
        calibration = checked_calibration(address, models.target, "--calibration")
        if calibration is None:
            raise JobError(
                f"--calibration: there is no artefact at '{address}'; make it with `riskforge prepare JOB --data PATH"
                f" --only calibration --output {address}`, with a job whose target is '{models.target}'"
            )
        described = calibration.described
    elif (of_run := planned_temperature(plan.identity)) and plan.identity["models"]["target"] == models.digests[
        "target"
    ]:
        address = job.models.calibration
        described = {TEMPERATURE: of_run, CALIBRATION: _noted(run) or {"address": address}}
    else:
        return replace(models, described=describe_temperature(models.target, None))
    digests = models.digests | {TEMPERATURE: described[TEMPERATURE]}
    return replace(models, calibration=address, described=described, digests=digests)


def _validity(models: Models, plan: Plan) -> ValidityModel | None:
    """The run's estimate of the share of people who agree; None where new oracles are not those that it is of."""
    validity = planned_validity(plan.identity)
    if validity is None or not models.oracles:
        return validity
    of_run, new = _oracle_digests(plan.identity["models"]), _oracle_digests(models.digests)
    # An oracle that guided follows those that the estimate is of, in the run and among the new ones.
    return validity if new == of_run else None


def _oracle_digests(digests: dict[str, Any]) -> list[str]:
    """Of the oracles in their order, by the digests of models."""
    return list(digests.get("oracles") or [digests["oracle"]])


def _guided(plan: Plan) -> frozenset[str]:
    """Digests of the targets of a run that has several."""
    models = plan.identity["models"]
    further = models.get("further_targets")
    return frozenset([models["target"], *further] if further else ())


def _noted(run: Store) -> dict[str, Any]:
    """The calibration of a run's target as its manifest describes it; empty where it does not."""
    with suppress(OutputError, CorruptShardError, KeyError, TypeError):
        return dict(read_manifest(run)["models"]["target"][CALIBRATION])
    return {}


def _folder_name(target: str, models: Models) -> str:
    """A readable name of the target, and a digest of all new classifiers: the target's own if it is the only one."""
    last = target.rstrip("/").replace("\\", "/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in last).strip(".-")[:60]
    digest = models.digests["target"] if len(models.digests) == 1 else digest_of(models.digests)
    return f"{name or 'target'}-{digest[:DIGEST_CHARS]}"


def _check_folder(rescoring: Rescoring) -> None:
    """Check that the folder is empty or of the same rescoring.

    Raises:
        OutputError: it holds something else.
    """
    folder = rescoring.folder
    if folder.place == rescoring.run.place or folder.list(PLANS):
        raise OutputError(f"--output {folder.uri}: is a run; give another folder for its new scores")
    if not folder.exists(RESCORING):
        # A rescoring that was killed early leaves only its state.
        if names := [name for name in folder.list() if name != "_state"]:
            raise OutputError(
                f"--output {folder.uri}: holds files that no rescoring wrote ({names[0]!r}); give another"
            )
        return
    try:
        stored = parse_json(folder.read(RESCORING))
    except ValueError:
        stored = None
    if stored != rescoring.identity:
        raise OutputError(
            f"--output {folder.uri}: holds a rescoring of another plan or by other models; give another folder, or"
            " remove that one"
        )
