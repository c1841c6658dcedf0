"""The rows of the matrix: what samples are made against. Its columns are all classifiers of the study."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from engine.errors import JobError
from engine.job.spec import MAX_NAME, MAX_TARGETS, JobSpec
from engine.job.spec_messages import nearest, shown
from engine.models.job_label_maps import Maps
from engine.studies.transfer.names import MAX_CHARS, named
from engine.studies.transfer.spec import LEAVE_ONE_OUT, NO_ENSEMBLES, Addresses, TransferSpec

UNGUIDED = "unguided"
_BUT = "all-but-"
MIN_LEFT_OUT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Samples of one run.

    Attributes:
        run: name of the run.
        title: in tables.
        members: names of the classifiers that guided; none of the unguided row.
        left_out: the target that is left out of an ensemble of all others; else empty.
    """

    run: str
    title: str
    members: tuple[str, ...] = ()
    left_out: str = ""

    @property
    def is_ensemble(self) -> bool:
        """Whether several classifiers guided."""
        return len(self.members) > 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """Rows and columns of the matrix.

    Attributes:
        classifiers: address by name of every column, targets first.
        num_targets: how many of them samples are made against.
        rows: the unguided one first, then single targets, then ensembles.
        label_map: by address, as `models.label_map` of a job: the job's and the study's.
    """

    classifiers: dict[str, str]
    num_targets: int
    rows: tuple[Row, ...]
    label_map: Maps = dataclasses.field(default_factory=dict)

    @property
    def targets(self) -> tuple[str, ...]:
        """Names of the classifiers that samples are made against."""
        return tuple(self.classifiers)[: self.num_targets]

    @property
    def evaluators(self) -> tuple[str, ...]:
        """Names of the classifiers that guide nothing."""
        return tuple(self.classifiers)[self.num_targets :]

    @property
    def guided(self) -> tuple[Row, ...]:
        """The rows that some classifier guided."""
        return tuple(row for row in self.rows if row.members)

    @property
    def ensembles(self) -> tuple[Row, ...]:
        """The rows that several classifiers guided together."""
        return tuple(row for row in self.rows if row.is_ensemble)


def design_of(spec: TransferSpec, job: JobSpec) -> Design:
    """The matrix that a study asks for.

    Raises:
        JobError: a single classifier, names that are taken, or ensembles of classifiers that are no targets.
    """
    targets = spec.targets or named(job.models.targets)
    evaluators = _evaluators(spec, targets, job)
    if len(targets) + len(evaluators) < 2:
        raise JobError(
            f"targets: there is one classifier, '{next(iter(targets.values()))}', and nothing to compare it with; name"
            " two or more to make samples against, or evaluators"
        )
    problems = list(_name_problems(spec.name or job.name, targets, evaluators))
    ensembles: list[Row] = []
    for row in _ensembles(spec, targets, problems):
        if all(set(row.members) != set(other.members) for other in ensembles):
            ensembles.append(row)
    classifiers = {**targets, **evaluators}
    known = ", ".join(classifiers)
    problems += [
        f"label_map.{name}: is none of the classifiers{nearest(name, list(classifiers))}; they are {known}"
        for name in spec.label_map
        if name not in classifiers and name not in classifiers.values()
    ]
    if problems:
        raise JobError(problems)
    maps = {classifiers.get(name, name): entries for name, entries in spec.label_map.items()}
    singles = [Row(run=name, title=name, members=(name,)) for name in targets]
    rows = (Row(run=UNGUIDED, title=UNGUIDED), *singles, *ensembles)
    label_map = {**job.models.label_map, **maps}
    return Design(classifiers=classifiers, num_targets=len(targets), rows=rows, label_map=label_map)


def _evaluators(spec: TransferSpec, targets: Addresses, job: JobSpec) -> Addresses:
    """Classifiers that guide nothing, by name."""
    if spec.evaluators is not None:
        return dict(spec.evaluators)
    known = set(targets.values())
    others = named([address for address in job.models.transfer if address not in known])
    return {(f"{name}-2" if name in targets else name): address for name, address in others.items()}


def _name_problems(prefix: str, targets: Addresses, evaluators: Addresses) -> Iterator[str]:
    room = MAX_NAME - len(f"{prefix}-{_BUT}")
    for field, names in (("targets", targets), ("evaluators", evaluators)):
        for name in names:
            if name == UNGUIDED or name.startswith(_BUT):
                yield f"{field}.{name}: is the name of a row of the table; choose another name"
            if field == "evaluators" and name in targets:
                yield f"evaluators.{name}: is the name of a target too; choose another name"
            if field == "targets" and len(name) > room:
                yield (
                    f"targets.{name}: names a run, and has more than {max(room, 0)} characters; choose a shorter name,"
                    " here or for the study"
                )


def _ensembles(spec: TransferSpec, targets: Addresses, problems: list[str]) -> Iterator[Row]:
    """The rows of ensembles as they are asked for; what is wrong is added to the problems."""
    asked = spec.ensembles
    if asked is None:
        asked = (LEAVE_ONE_OUT,) if MIN_LEFT_OUT <= len(targets) <= MAX_TARGETS + 1 else ()
    if NO_ENSEMBLES in asked and len(asked) > 1:
        problems.append(f"ensembles: names `{NO_ENSEMBLES}` and others; leave one of them out")
    for number, text in enumerate(one for one in asked if one != NO_ENSEMBLES):
        if text == LEAVE_ONE_OUT:
            yield from _all_but_one(tuple(targets), problems)
        elif members := _members(text, spec, targets, problems):
            joined = "-and-".join(members)
            is_short = len(joined) <= MAX_CHARS and joined not in targets
            run = joined if is_short else f"ensemble-{number + 1}"
            yield Row(run=run, title=" + ".join(members), members=members)


def _all_but_one(targets: tuple[str, ...], problems: list[str]) -> Iterator[Row]:
    if len(targets) < MIN_LEFT_OUT:
        remedy = f", or the ensemble itself, {'+'.join(targets)}" if len(targets) > 1 else ""
        problems.append(
            f"ensembles: {LEAVE_ONE_OUT} of {len(targets)} leaves no ensemble of two or more; name {MIN_LEFT_OUT}"
            f" targets or more{remedy}"
        )
    elif len(targets) - 1 > MAX_TARGETS:
        problems.append(
            f"ensembles: {LEAVE_ONE_OUT} of {len(targets)} targets makes ensembles of {len(targets) - 1}; a job has"
            f" {MAX_TARGETS} at most: name fewer targets, or give the others as evaluators"
        )
    else:
        for left_out in targets:
            members = tuple(name for name in targets if name != left_out)
            yield Row(run=f"{_BUT}{left_out}", title=f"all but {left_out}", members=members, left_out=left_out)


def _members(text: str, spec: TransferSpec, targets: Addresses, problems: list[str]) -> tuple[str, ...]:
    """The targets that the text of an ensemble names; none where it is wrong."""
    by_address = {address: name for name, address in targets.items()}
    parts = (part.strip() for part in text.split("+"))
    names = tuple(by_address.get(part, part) for part in parts)
    where, known = f"ensembles: {shown(text)}", ", ".join(targets)
    unknown = [name for name in names if name not in targets]
    if len(names) < 2 and unknown:
        choices = f"; give {LEAVE_ONE_OUT}, {NO_ENSEMBLES}, or targets joined by plus ({known})"
        problems.append(f"{where} is no ensemble{nearest(text, [LEAVE_ONE_OUT, NO_ENSEMBLES])}{choices}")
    elif unknown:
        is_evaluator = unknown[0] in (spec.evaluators or {})
        reason = "is an evaluator, which guides nothing" if is_evaluator else "is none of the targets"
        meant = nearest(unknown[0], list(targets))
        problems.append(f"{where}: {shown(unknown[0])} {reason}{meant}; the targets are {known}")
    elif len(set(names)) < max(2, len(names)):
        what = "names one target" if len(names) < 2 else "names a target twice"
        problems.append(f"{where} {what}; an ensemble has two different ones or more")
    elif len(names) > MAX_TARGETS:
        problems.append(f"{where} has {len(names)} targets; a job has {MAX_TARGETS} at most")
    else:
        return names
    return ()
