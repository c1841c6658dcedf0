"""What files can tell of a transfer study before any worker starts."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

from engine.data.images import open_images
from engine.driver.checks import find_images
from engine.errors import JobError
from engine.job.plan import resolve_requests
from engine.job.spec import JobSpec
from engine.models.artefacts import missing_artefacts
from engine.models.digests import model_digest
from engine.models.independence import are_same_models, model_path
from engine.models.job_checks import check_addresses, classifier_problems
from engine.models.job_label_maps import label_map_of
from engine.models.labels import read_labels
from engine.models.programs import is_program
from engine.models.weight_comparison import alike_share
from engine.studies.transfer.jobs import row_job
from engine.studies.transfer.rows import Design
from engine.studies.transfer.spec import TransferSpec

# Of the weights of the smaller of two classifiers: with more of them alike they are not independent.
MIN_ALIKE = 0.1


def check_design(spec: TransferSpec, job: JobSpec, design: Design) -> None:
    """Check classifiers, rows and image sets.

    Raises:
        JobError: all problems of the first step that has some, a line each.
    """
    for problems in (
        classifier_problems(dict(_fields(design))),
        _duplicates(design),
        _class_problems(design),
        _label_problems(design),
        _row_problems(spec, job, design),
        _set_problems(spec, design),
    ):
        if lines := list(problems):
            raise JobError(lines)


def _fields(design: Design) -> Iterator[tuple[str, str]]:
    """Field and address of every classifier."""
    for name, address in design.classifiers.items():
        yield f"{'targets' if name in design.targets else 'evaluators'}.{name}", address


def _duplicates(design: Design) -> Iterator[str]:
    """Classifiers that are another one of the study under another name."""
    for (field, address), (other, others) in combinations(_fields(design), 2):
        reason = "is" if address == others else "has the weights of" if _are_same(address, others) else ""
        if reason:
            yield f"{other}: '{others}' {reason} {field}; name each classifier once"


def _are_same(address: str, other: str) -> bool:
    if are_same_models(address, other):
        return True
    # Factories have no files whose tensors could be compared.
    return is_program(address) and is_program(other) and model_digest(address) == model_digest(other)


def _class_problems(design: Design) -> Iterator[str]:
    """Targets with other classes than the first, whose prompts and noise would not be those of the other rows."""
    first, *others = design.targets
    wanted = read_labels(design.classifiers[first])
    for name in others:
        labels = read_labels(design.classifiers[name])
        if labels is None or wanted is None or labels == wanted:
            continue
        if sorted(labels) == sorted(wanted):
            what = "the classes of the first target in another order, so that its samples would begin with other noise"
        else:
            differing = sorted(set(labels) ^ set(wanted))
            what = f"other classes than '{first}' ({', '.join(map(repr, differing[:6]))}), so that its prompts differ"
        yield (f"targets.{name}: has {what}; give it in evaluators, with a label_map where names differ")


def _label_problems(design: Design) -> Iterator[str]:
    """Evaluators whose classes cannot be read as those of the targets."""
    wanted = read_labels(design.classifiers[design.targets[0]])
    for field, address in _fields(design):
        theirs = read_labels(address)
        if field.startswith("targets.") or wanted is None:
            continue
        try:
            label_map_of(address, theirs, wanted, design.label_map, " in label_map of the study")
        except JobError as error:
            given = address in design.label_map
            yield from (problem if given else f"{field}: {problem}" for problem in error.problems)


def _row_problems(spec: TransferSpec, job: JobSpec, design: Design) -> Iterator[str]:
    """Problems of the jobs of all rows; one that several have once."""
    known: set[str] = set()
    for row in design.rows:
        try:
            made = row_job(job, design, row, spec.count)
            check_addresses(made)
            if missing := missing_artefacts(made):
                raise JobError(missing)
            labels = read_labels(made.models.target)
            if labels is not None:
                find_images(made, resolve_requests(made, labels), labels)
        except JobError as error:
            for problem in error.problems:
                if problem not in known:
                    known.add(problem)
                    yield f"{problem} (row {row.title})"


def _set_problems(spec: TransferSpec, design: Design) -> Iterator[str]:
    labels = read_labels(design.classifiers[design.targets[0]])
    for name, address in spec.sets.items():
        try:
            open_images(address, tuple(labels or ()), f"sets.{name}")
        except JobError as error:
            yield from error.problems


def sharing_notes(design: Design) -> list[str]:
    """Classifiers that are not independent, as one was trained from the other or both from a third, in words."""
    notes = []
    for (name, address), (other, others) in combinations(design.classifiers.items(), 2):
        first, second = model_path(address), model_path(others)
        share = alike_share(first, second) if first and second else 0.0
        if share >= MIN_ALIKE:
            notes.append(
                f"{100 * share:.0f} % of the weights of {name} and {other} are alike: one was trained from the other,"
                " or both from a third, so that what carries over between them says little of other classifiers"
            )
    return notes
