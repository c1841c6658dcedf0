"""Models that evaluate others must not be those others under another name. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from engine.errors import JobError
from engine.job.oracles import oracle_fields
from engine.job.spec import ModelsSpec
from engine.models.addresses import locate
from engine.models.programs import as_file, is_program
from engine.models.weight_comparison import have_same_weights

_IMAGE_TOWER = ("vision_model.", "visual_projection.")


def check_independent(models: ModelsSpec) -> None:
    """Refuse models that are to evaluate others and are those others under another name.

    A judge with the image tower of the model that guided a sample measures what was guided on; an oracle with the
    weights of a target agrees with it, so that no failure has a correct label; a transfer model with these weights
    would show that every failure transfers; a target that is there twice would count twice. Compared are the weights
    in files; a model that is not on this machine, or is given by a factory, is compared by its address alone.

    Raises:
        JobError: all such pairs, one line each.
    """
    problems = []
    if models.judge and _are_same(models.judge, models.clip, _IMAGE_TOWER):
        problems.append(
            f"models.judge: '{models.judge}' has the weights of models.clip; the judge of a sample must be another CLIP"
            " model than the one that may have guided it"
        )
    problems += [
        f"{field}: '{address}' has the weights of {target}; an oracle decides whether the target errs: give another"
        " classifier"
        for field, address in oracle_fields(models)
        if (target := _same_target(address, models))
    ]
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


def _same_target(address: str, models: ModelsSpec, before: int | None = None) -> str:
    """The field of the first target that a classifier is, of those before a place; empty where it is none of them."""
    several = bool(models.further_targets)
    return next(
        (
            f"models.target.{place}" if several else "models.target"
            for place, target in enumerate(models.targets[:before])
            if _are_same(address, target)
        ),
        "",
    )


def _are_same(address: str, other: str, part: tuple[str, ...] = ("",)) -> bool:
    first, second = _path(address), _path(other)
    if address == other:
        return True
    return first is not None and second is not None and have_same_weights(first, second, part)


def _path(address: str) -> Path | None:
    """The folder or file of a model that is on this machine; None for factories and for hub ids that are not."""
    return as_file(address) or (None if is_program(address) else locate(address).folder)
