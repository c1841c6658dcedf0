"""Several targets in a job file, `models.target: [A, B]`: the target and further ones, before the job is checked."""

from __future__ import annotations

from typing import Any, NamedTuple

from engine.job.spec import MAX_TARGETS
from engine.job.spec_messages import Location, Problem, shown

_TARGET: Location = ("models", "target")
_FURTHER: Location = ("models", "further_targets")


class ExpandedTargets(NamedTuple):
    """A raw job with a single target, and the others of its list in `further_targets`.

    Attributes:
        is_list: whether the job file has a list.
        problems: with the list as a whole; such a list is replaced by another.
    """

    raw: dict[str, Any]
    is_list: bool = False
    problems: tuple[Problem, ...] = ()

    def location(self, where: Location) -> Location:
        """The location in the job file of a location in this job."""
        match where:
            case ("models", "target", *_) if self.is_list:
                return (*_TARGET, 0)
            case ("models", "further_targets", int(place), *_) if self.is_list:
                return (*_TARGET, place + 1)
        return where


def expand_targets(raw: dict[str, Any]) -> ExpandedTargets:
    """A raw job whose `models.target` is a single one. The job is not changed; a list of one is that one."""
    models = raw.get("models")
    listed = models.get("target") if isinstance(models, dict) else None
    if not isinstance(models, dict) or not isinstance(listed, list):
        return ExpandedTargets(raw)
    if problem := _list_problem(listed, models):
        # Any two targets: the job is refused in any case, but not because it has only one.
        refused = {"target": "refused", "further_targets": ["refused too"]}
        return ExpandedTargets(raw | {"models": models | refused}, True, ((_TARGET, problem),))
    first, *others = listed
    further = {"further_targets": others} if others else {}
    return ExpandedTargets(raw | {"models": models | {"target": first} | further}, True)


def _list_problem(listed: list[Any], models: dict[str, Any]) -> str:
    """What is wrong with a list of targets as a whole; empty where nothing is."""
    if not listed:
        return "[] is empty; give the address of a classifier, or a list of some"
    if len(listed) > MAX_TARGETS:
        return f"has {len(listed)} entries; give {MAX_TARGETS} or fewer"
    if any(isinstance(one, list) for one in listed):
        return "has a list in it; name the targets one after another"
    if models.get("further_targets"):
        return "is a list, and further_targets is there too; name all of them in the list"
    return ""


def target_problems(raw: dict[str, Any], *, is_guided: bool) -> list[Problem]:
    """Targets that are there twice, or that would guide nothing.

    Args:
        raw: from `expand_targets`.
        is_guided: whether any request is.
    """
    models = raw.get("models")
    further = models.get("further_targets") if isinstance(models, dict) else None
    if not isinstance(models, dict) or not isinstance(further, list | tuple) or not further:
        return []
    targets = [models.get("target"), *further]
    problems: list[Problem] = [
        ((*_FURTHER, place), f"{shown(target)} is there twice; name each target once")
        for place, target in enumerate(further)
        if isinstance(target, str) and target in targets[: place + 1]
    ]
    if not is_guided:
        text = "no request is guided, so that only the first is a target; give the others as `transfer`"
        problems.append(((*_FURTHER, 0), text))
    return problems
