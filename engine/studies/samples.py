"""A run as studies read it: its job, the digest of its target, and the samples of its committed shards."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.run.commit_record import CommitRecord
from engine.data.run.commits import read_commits
from engine.data.run.file_names import MANIFEST
from engine.data.run.manifest_reading import check_is_run, read_manifest
from engine.data.run.shards import SHARDS, read_rows, read_shard
from engine.data.run.stored_plan import read_run
from engine.data.stores.base import Store
from engine.data.stores.opening import open_store
from engine.errors import JobError, first_line
from engine.job.parsing import parse_job
from engine.job.plan import planned_temperature
from engine.job.spec import JobSpec, RequestSpec
from engine.job.spec_messages import nearest
from engine.models.calibration import noted_temperature
from engine.models.digests import model_digest
from engine.models.trainability import export_command, untrainable


@dataclass(frozen=True, slots=True, kw_only=True)
class StudiedRun:
    """A run with committed shards.

    Attributes:
        job: with which the run was made.
        plan_digest: digest of its plan.
        target_digest: digest of its target when the run was made.
        temperature: of the target in place of its own; None where it had its own.
        commits: the records of its committed shards, in order.
    """

    store: Store
    job: JobSpec
    plan_digest: str
    target_digest: str
    commits: tuple[CommitRecord, ...]
    temperature: float | None = None

    @property
    def shards_digest(self) -> str:
        """Digest of the committed tars."""
        return hashlib.sha256("".join(record.tar_sha256 for record in self.commits).encode()).hexdigest()[:32]

    def commits_of(self, requests: Sequence[str]) -> list[CommitRecord]:
        """The records of the shards of some requests."""
        return [record for record in self.commits if self.job.requests[record.request].name in requests]


def open_study(uri: str) -> StudiedRun:
    """A run, finished or not, by its folder.

    Raises:
        RiskforgeError: no such folder, no run in it, or no committed shard.
    """
    store = open_store(uri)
    if not store.is_there():
        raise JobError(f"RUN: there is no folder '{uri}'; give the output folder of `riskforge run`")
    check_is_run(store)
    job, plan_digest, target_digest, temperature = _identity(store)
    commits = tuple(read_commits(store))
    if not commits:
        raise JobError(f"RUN: '{uri}' has no committed shard yet; let `riskforge run` make some first")
    return StudiedRun(
        store=store,
        job=job,
        plan_digest=plan_digest,
        target_digest=target_digest,
        commits=commits,
        temperature=temperature,
    )


def check_target(run: StudiedRun) -> None:
    """Check that the run's target is still the one that it was made with.

    Raises:
        JobError: it is missing, has changed, or is of a kind that cannot be fine-tuned.
    """
    address = run.job.models.target
    try:
        if problem := untrainable(address):
            raise JobError(
                f"'{address}' is {problem}, which cannot be fine-tuned; name a folder or a factory as target, or give"
                f" the accepted samples to a training loop of your own: {export_command(run.store.uri)}"
            )
        digest = model_digest(address)
    except JobError as error:
        raise JobError([f"RUN: its models.target: {problem}" for problem in error.problems]) from None
    if digest != run.target_digest:
        raise JobError(
            f"RUN: its target '{address}' has changed since (digest {run.target_digest} in the manifest, {digest} now);"
            " restore that model, or make a new run with this one"
        )


def choose_requests(run: StudiedRun, option: str, names: Sequence[str]) -> list[str]:
    """Names of requests as given, checked.

    Raises:
        JobError: the run has no request of a name, a line each.
    """
    known = [request.name for request in run.job.requests]
    unknown = [name for name in names if name not in known]
    if unknown:
        has = ", ".join(known)
        raise JobError(
            [f"{option}: the run has no request '{name}'{nearest(name, known)}; it has {has}" for name in unknown]
        )
    return list(dict.fromkeys(names))


def is_plain(request: RequestSpec) -> bool:
    """Whether a request samples single classes by prompt alone and has no `accept` rule."""
    return not request.method_record.is_guided and request.boundary is None and not request.accept


def depends_on_context_alone(request: RequestSpec) -> bool:
    """Whether errors on a request's samples depend on class and context; guidance and screening make some anywhere."""
    is_screened = bool(request.conditioning and request.conditioning.is_screened)
    return not request.method_record.is_guided and request.boundary is None and not is_screened


def read_samples(run: StudiedRun, requests: Sequence[str]) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Image file and record of every stored sample of some requests, in order.

    Raises:
        CorruptShardError: a tar is not whole.
    """
    for record in run.commits_of(requests):
        for _, image, fields, _ in read_shard(_path(run, record, "tar")):
            yield image, fields


def read_attempts(run: StudiedRun, requests: Sequence[str], columns: list[str]) -> Iterator[dict[str, Any]]:
    """Some columns of every attempt of some requests, stored or not, in order.

    Raises:
        CorruptShardError: a parquet is not whole.
    """
    for record in run.commits_of(requests):
        yield from read_rows(_path(run, record, "parquet"), columns)


def _path(run: StudiedRun, record: CommitRecord, extension: str) -> Path:
    return run.store.fetch(f"{SHARDS}/{record.name}.{extension}")


def _identity(store: Store) -> tuple[JobSpec, str, str, float | None]:
    """Job, digests of plan and target, and its calibration, from the manifest; before there is one, from the plan."""
    try:
        if store.exists(MANIFEST):
            manifest = read_manifest(store)
            target = manifest["models"]["target"]
            return parse_job(manifest["job"]), manifest["plan_digest"], target["digest"], noted_temperature(target)
        if (stored := read_run(store)) is not None:
            temperature = planned_temperature(stored.identity)
            return JobSpec.model_validate(stored.job), stored.digest, stored.identity["models"]["target"], temperature
    except (JobError, ValueError, KeyError, TypeError) as error:
        reason = first_line(error)
        raise JobError(
            f"RUN: the job recorded in '{store.uri}' cannot be read ({reason}); use the version that made the run"
        ) from None
    raise JobError(f"RUN: '{store.uri}' holds no run; give the output folder of `riskforge run`")
