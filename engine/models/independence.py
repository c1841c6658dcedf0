"""Models that evaluate others must not be those others under another name. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from engine.errors import JobError
from engine.job.oracles import oracle_fields
from engine.job.spec import ModelsSpec
from engine.models.addresses import locate
from engine.models.factory_folders import as_factory_folder
from engine.models.oracle_kinds import network_of
from engine.models.programs import as_file, is_program
from engine.models.weight_comparison import have_same_weights

_WHOLE = ("",)
_IMAGE_TOWER = ("vision_model.", "visual_projection.", "visual.")


def check_independent(models: ModelsSpec, *, oracle_guides: bool = False) -> None:
    """Refuse models that are to evaluate others and are those others under another name.

    A judge with the image tower of the model that guided a sample measures what was guided on, and so does an oracle;
    an oracle with the weights of a target agrees with it, so that no failure has a correct label, and with those of
    another oracle it confirms nothing; a transfer model with these weights would show that every failure transfers; a
    target that is there twice would count twice. Compared are the weights in files, of an artefact those of its
    encoder; a model that is not on this machine, or is given by a factory, is compared by its address alone. An oracle
    may be the judge, which guides nothing: the two then measure the same. The oracle that guides may be neither the
    judge nor a transfer model.

    Args:
        models: of the job.
        oracle_guides: whether the last oracle guides, as `JobSpec.oracle_guides` says.

    Raises:
        JobError: all such pairs, one line each; or an oracle's artefact is damaged.
    """
    problems = []
    if models.judge and are_same_models(models.judge, models.clip, _IMAGE_TOWER):
        problems.append(
            f"models.judge: '{models.judge}' has the weights of models.clip; the judge of a sample must be another CLIP"
            " model than the one that may have guided it"
        )
    problems += [problem for place in range(len(models.all_oracles)) for problem in _oracle_problems(models, place)]
    problems += _guiding_problems(models) if oracle_guides else []
    problems += [
        f"models.transfer.{place}: '{address}' has the weights of {target}; give other classifiers, to which"
        " failures may transfer or not"
        for place, address in enumerate(models.transfer)
        if (target := _same_target(address, models))
    ]
    problems += [
        f"models.target.{place}: '{address}' has the weights of {target}; name each target once"
        for place, address in enumerate(models.further_targets, 1)
        if (target := _same_target(address, models, before=place))
    ]
    if problems:
        raise JobError(problems)


def _oracle_problems(models: ModelsSpec, place: int) -> list[str]:
    """Models whose weights an oracle has, or the encoder of its artefact, a line each."""
    fields = list(oracle_fields(models))
    field, address = fields[place]
    network, part = _network(address)
    if network == address:
        subject, remedy = f"'{address}'", "give another model"
    else:
        subject, remedy = f"the encoder of '{address}', '{network}',", "prepare it with another encoder"

    def problem(common: tuple[str, ...], other: str, reason: str) -> list[str]:
        what = "image tower" if common is _IMAGE_TOWER else "weights"
        return [f"{field}: {subject} has the {what} of {other}{reason}: {remedy}"]

    if target := _same_target(network, models, part=part):
        return problem(part, target, "; an oracle decides whether the target errs")
    if are_same_models(network, models.clip, _IMAGE_TOWER):
        reason = ", which may guide a sample by its conformity; an oracle must be independent of what guides"
        return problem(_IMAGE_TOWER, "models.clip", reason)
    for other, others_address in fields[:place]:
        others_network, others_part = _network(others_address)
        common = _IMAGE_TOWER if _IMAGE_TOWER in (part, others_part) else _WHOLE
        if are_same_models(network, others_network, common):
            return problem(common, other, ", so that its agreement confirms nothing")
    return []


def _guiding_problems(models: ModelsSpec) -> list[str]:
    """Models that measure what the last oracle guided, and have its weights, a line each."""
    field, oracle = list(oracle_fields(models))[-1]
    network, part = _network(oracle)
    measuring = [(f"models.transfer.{place}", address) for place, address in enumerate(models.transfer)]
    measuring += [("models.judge", models.judge)] if models.judge else []
    return [
        f"{measured}: '{address}' has the weights of {field}, '{oracle}', which guides (by oracle_floor or"
        " with_oracle), so that it would confirm what it guided; give another model"
        for measured, address in measuring
        if are_same_models(address, network, _IMAGE_TOWER if measured == "models.judge" else part)
    ]


def _network(address: str) -> tuple[str, tuple[str, ...]]:
    """The network that an oracle scores with, and the part of its weights that scores of images depend on."""
    network, is_clip = network_of(address)
    return network, _IMAGE_TOWER if is_clip else _WHOLE


def _same_target(address: str, models: ModelsSpec, before: int | None = None, part: tuple[str, ...] = _WHOLE) -> str:
    """The field of the first target that a model is, of those before a place; empty where it is none of them."""
    several = bool(models.further_targets)
    return next(
        (
            f"models.target.{place}" if several else "models.target"
            for place, target in enumerate(models.targets[:before])
            if are_same_models(address, target, part)
        ),
        "",
    )


def are_same_models(address: str, other: str, part: tuple[str, ...] = _WHOLE) -> bool:
    """Whether two addresses are of one model, by their weights where both are on this machine.

    Args:
        part: prefixes of modules whose tensors alone are compared.
    """
    first, second = model_path(address), model_path(other)
    if address == other:
        return True
    return first is not None and second is not None and have_same_weights(first, second, part)


def model_path(address: str) -> Path | None:
    """The folder or file of a model that is on this machine; None for factories and for hub ids that are not."""
    return as_file(address) or as_factory_folder(address) or (None if is_program(address) else locate(address).folder)
