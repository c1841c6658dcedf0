"""Answers of people about the samples of a run, with what its metadata says of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.images import Unusable
from engine.data.review.answers import CHOICE, REVIEW, SAMPLE, last_answers, parse_records, read_answers
from engine.data.run.outcomes import asked_classes, target_errs
from engine.data.run.stored_plan import stored_plan
from engine.errors import JobError
from engine.job.columns import ASKED, BY_NAME, ERRS, GUIDES
from engine.job.records import is_scored
from engine.job.spec import JobSpec
from engine.models.digests import oracle_digest
from engine.models.untrusted_files import MAX_DOCUMENT_BYTES, read_whole
from engine.models.validity import ModelIdentity
from engine.studies.prepare.answer_tables import OPTION
from engine.studies.prepare.answered import AnsweredImage, AnsweredImages
from engine.studies.samples import StudiedRun, open_study, read_attempts

if TYPE_CHECKING:
    import pyarrow as pa

_COLUMNS = [*ASKED, *ERRS, "method", "status", "scored", "oracles"]

Row = dict[str, Any]


def answers_of_run(job: JobSpec, run: str, labels: tuple[str, ...], records: Path | None = None) -> AnsweredImages:
    """The samples of a run that people answered about.

    Args:
        job: its oracles have to be those of the run.
        run: address of the run.
        labels: class names of the job's target.
        records: a file of answer records in place of those in the run.

    Raises:
        JobError: there are no answers, or the run's oracles are others than the job's.
    """
    study, notes = open_study(run), list[str]()
    oracles, target = _models(study, job)
    table = last_answers(_records(records) if records else read_answers(study.store, notes.append))
    choices = [row for row in table.to_pylist() if row["mode"] == CHOICE and row["kind"] == SAMPLE]
    if not choices:
        where = f"'{records}'" if records else f"'{run}'"
        raise JobError(
            f"{OPTION}: {where} has no answers about samples ({REVIEW}); `riskforge review {run}` collects some, or"
            " give a table"
        )
    _check_classes(choices, labels)
    if len(choices) < len(table):
        notes.append(f"{len(table) - len(choices)} answers are about pairs, controls or repeats, and are left out")
    # In the order in which they were given: of a rater's answers about a sample the last one counts.
    answers: dict[str, dict[str, int]] = {}
    for row in choices:
        answers.setdefault(row["key"], {})[row["rater"]] = row["answer_class"]
    images, unused = _answered(study, answers, {row["key"]: row["label"] for row in choices}, len(oracles))
    return AnsweredImages(
        images=tuple(sorted(images)),
        oracles=oracles,
        target=target,
        num_raters=len({row["rater"] for row in choices}),
        source=f"the run {study.store.uri}",
        unused=tuple(unused),
        notes=tuple(notes),
    )


def _records(path: Path) -> pa.Table:
    """The records of a file, in the order in which they were given.

    Raises:
        JobError: it cannot be read.
    """
    try:
        table = parse_records(read_whole(path, MAX_DOCUMENT_BYTES))
    except OSError as error:
        raise JobError(f"{OPTION}: '{path}' {error.strerror or error}") from None
    except ValueError as error:
        raise JobError(f"{OPTION}: {path}: {error}; export it again, or give the run") from None
    return table.sort_by([("rater", "ascending"), ("answered_at", "ascending")])


def _models(study: StudiedRun, job: JobSpec) -> tuple[tuple[ModelIdentity, ...], ModelIdentity]:
    """The oracles of a run and its target, as they were.

    Raises:
        JobError: the run has no probabilities of oracles, or the job names other oracles.
    """
    run_job, plan = stored_plan(study.store)
    addresses = run_job.independent_oracles
    if plan.schema_version < BY_NAME["oracles"].since or not addresses:
        raise JobError(
            f"{OPTION}: the run {study.store.uri} has no probabilities of oracles; make one with models.oracles, or"
            " give a table of answers with --data"
        )
    digests = plan.identity["models"]
    digests = digests.get("oracles") or [digests["oracle"]]
    oracles = tuple(ModelIdentity(*pair) for pair in zip(addresses, digests[: len(addresses)], strict=True))
    if [oracle_digest(address) for address in job.independent_oracles] != [oracle.digest for oracle in oracles]:
        raise JobError(
            f"models.oracles: are not those of the run {study.store.uri}, which has {', '.join(addresses)}; name the"
            " same, in this order"
        )
    return oracles, ModelIdentity(study.job.models.target, study.target_digest)


def _check_classes(choices: list[Row], labels: tuple[str, ...]) -> None:
    """Refuse answers of other classes than the target's.

    Raises:
        JobError: an answer is of another class.
    """
    for row in choices:
        index, name = row["answer_class"], row["answer"]
        if not (index == -1 or (0 <= index < len(labels) and labels[index] == name)):
            raise JobError(
                f"{OPTION}: the answer {name!r} (class {index}) about {row['key']} is no class of models.target; name"
                " the target of the run"
            )


def _answered(
    study: StudiedRun, answers: dict[str, dict[str, int]], labels: dict[str, int], num_oracles: int
) -> tuple[list[AnsweredImage], list[Unusable]]:
    """The samples with answers, and those that cannot be used.

    Args:
        answers: class by rater of each key.
        labels: class of each key when it was shown.
    """
    images, unused = list[AnsweredImage](), list[Unusable]()
    left = set(answers)
    requests = [request.name for request in study.job.requests]
    for row in read_attempts(study, requests, _COLUMNS):
        if (key := row["key"]) not in left:
            continue
        left.discard(key)
        p_labels = [entry["p_label"] for entry in row["oracles"] if not entry["model"].endswith(GUIDES)]
        reason = ""
        if not is_scored(row) or len(p_labels) != num_oracles:
            reason = "was not scored by the oracles"
        elif labels[key] not in (-1, row["class_index"]):
            reason = f"had class {labels[key]} when it was shown, and has {row['class_index']} now"
        if reason:
            unused.append(Unusable(key, reason))
            continue
        asked = asked_classes(row)
        images.append(
            AnsweredImage(
                order=(row["class_index"], key),
                p_labels=tuple(p_labels),
                target_errs=target_errs(row),
                num_agreeing=sum(answer in asked for answer in answers[key].values()),
                num_asked=len(answers[key]),
            )
        )
    return images, unused + [Unusable(key, "is no sample of the run") for key in sorted(left)]
