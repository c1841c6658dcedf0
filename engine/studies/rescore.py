"""The images of a run under another target: new metadata beside the old, nothing sampled again.

A folder of a rescoring holds `shards/NAME-000000.parquet` for every committed shard of the run, published one by one,
so that the same command continues after a kill or after the run has grown; then `metadata.parquet`, `manifest.json`
with `rescored_from`, and `_SUCCESS` last. It holds no images: those are the run's. Rows are the run's, in its order.
What depends on the target is scored anew, `accepted`, `status` and `surplus` by the run's own rules; everything else is
kept. A row whose image is not stored is `failed` with `NOT_STORED` as its message; one of which a classifier gives
values that are not finite with a message that names the classifier.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.data.run.commits import CommitSummary, list_commits
from engine.data.run.file_names import MANIFEST, METADATA, PLANS, RESCORED, RESCORED_FROM, RESCORING, SUCCESS
from engine.data.run.manifest import software_versions
from engine.data.run.manifest_reading import read_manifest
from engine.data.run.metadata_table import write_metadata
from engine.data.run.schema import arrow_schema
from engine.data.run.shards import ROWS_PER_GROUP, SHARDS, read_rows, read_shard, shard_name
from engine.data.run.stored_plan import stored_plan
from engine.data.run.summary import count_classes, count_requests, plain, summarise
from engine.data.run.surplus import quotas_of
from engine.data.stores.base import Store
from engine.data.stores.file_errors import explained
from engine.data.stores.lease import hold
from engine.data.stores.opening import open_store
from engine.errors import CorruptShardError, JobError, OutputError
from engine.job.acceptance import is_accepted
from engine.job.plan import Plan, SampleSpec, digest_of
from engine.job.records import RUN_FIELDS, STATUS_FAILED, STATUS_OK, STATUS_REJECTED, failed_record, in_version
from engine.job.spec import JobSpec
from engine.methods.strict_json import parse_json
from engine.models.addresses import model_digest, read_labels, resolve
from engine.models.targets import is_foreign
from engine.studies.nights.night_tables import summary_document
from engine.studies.nights.nights import NightComparison, compare_nights, label_differences, read_night

if TYPE_CHECKING:
    from engine.models.classifier import Classifier

NOT_STORED = "not scored again: no image is stored"
BATCH = 64
DIGEST_CHARS = 8

Row = dict[str, Any]
# What was asked for, the image's file (empty where none is stored), and the row of the run.
Sample = tuple[SampleSpec, bytes, Row]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescored:
    """What came of a rescoring.

    Attributes:
        folder: where it lies.
        num_scored: images scored by this call; those of an earlier one are not counted.
        num_images: images with a new score, of `num_rows` rows.
        num_failed: images without one, because a classifier gives values that are not finite.
        failure: the most frequent reason, which names the classifier.
        is_complete: whether the run is, so that no shard is to come.
        comparison: before and after; None where nothing could be compared, for this `reason`.
    """

    folder: str
    target: str
    num_scored: int
    num_images: int
    num_rows: int
    num_accepted: int
    num_failed: int
    failure: str
    is_complete: bool
    comparison: NightComparison | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Models:
    """Addresses and digests of the classifiers that score anew; `transfer` and `oracle` only where asked for."""

    target: str
    transfer: tuple[str, ...]
    oracle: str | None
    digests: dict[str, Any]


class _Scoring:
    """The classifiers, loaded when the first image is there to be scored."""

    def __init__(self, job: JobSpec, models: _Models, advance: Callable[[str], None]) -> None:
        self._job, self._models, self._advance = job, models, advance
        self._loaded: tuple[Classifier, list[Classifier], Classifier | None] | None = None
        self.num_scored = 0

    def _load(self) -> tuple[Classifier, list[Classifier], Classifier | None]:
        if self._loaded is None:
            import torch

            from engine.models.classifier import Classifier
            from engine.models.libraries import quiet_libraries

            self._advance("loading the classifiers")
            quiet_libraries()
            device = "cuda" if torch.cuda.is_available() and self._job.runtime.device != "cpu" else "cpu"
            transfer = [Classifier.load(address, device) for address in self._models.transfer]
            oracle = Classifier.load(self._models.oracle, device) if self._models.oracle else None
            self._loaded = Classifier.load(self._models.target, device), transfer, oracle
        return self._loaded

    def records(self, samples: Sequence[Sample]) -> list[Row]:
        """The stored rows of samples with an image, with everything new that the classifiers decide.

        A sample of which one gives values that are not finite is `failed`, and its message names the classifier.
        """
        import torch

        from engine.data.images.decode import UnusableImageError, decode_sample
        from engine.generation.scorer import oracle_classes, target_fields, transfer_entries
        from engine.methods.finiteness import Faults

        target, transfer, oracle = self._load()
        images, faults = [], Faults(len(samples))
        for spec, data, _ in samples:
            try:
                images.append(decode_sample(data))
            except UnusableImageError as error:
                raise CorruptShardError(f"{spec.key}: its image {error}; `riskforge verify` says more") from None
        labels = torch.tensor([row["class_index"] for _, _, row in samples])
        fields = target_fields(target, [spec.cell for spec, _, _ in samples], images, labels, faults)
        rows = [row | new for (_, _, row), new in zip(samples, fields, strict=True)]
        if transfer:
            for row, entries in zip(rows, transfer_entries(transfer, images, labels, faults), strict=True):
                row["transfer"] = entries
        if oracle:
            for row, seen in zip(rows, oracle_classes(oracle, images, faults).tolist(), strict=True):
                row["oracle_class"] = seen
        self.num_scored += len(images)
        return [
            _failed(spec, old, faults[place]) if faults[place] else row
            for place, ((spec, _, old), row) in enumerate(zip(samples, rows, strict=True))
        ]


def rescore_run(
    address: str,
    target: str,
    *,
    transfer: Sequence[str] = (),
    oracle: str | None = None,
    output: str | None = None,
    advance: Callable[[str], None] = lambda text: None,
    notice: Callable[[str], None] = lambda text: None,
) -> Rescored:
    """Score all stored images of a run by another target.

    Args:
        address: folder of the run.
        target: address of the classifier, with the classes of the run's.
        transfer: classifiers in the place of the run's transfer models; none keeps those and their scores.
        oracle: the same for the oracle.
        output: the folder; by default `RUN/rescored/TARGET-DIGEST`.
        advance: hears how far it is.
        notice: hears what is waited for.

    Raises:
        JobError: a model is not there or has other classes.
        OutputError: there is no run, or the folder is something else's.
        CorruptShardError: a shard of the run is damaged.
        OwnedError: another process rescores into this folder, or it lies in the run and a driver is at work there.
    """
    store = open_store(address)
    job, plan = stored_plan(store)
    labels = _labels_of(store, job)
    models = _check_models(target, transfer, oracle, labels)
    folder = open_store(output or store.address(f"{RESCORED}/{_folder_name(target, models)}"))
    about = {"plan_digest": plan.digest, "models": models.digests}
    _check_folder(folder, store, about)
    with ExitStack() as held:
        if _is_inside(folder, store):
            held.enter_context(hold(store, notice=notice))
        held.enter_context(hold(folder, notice=notice))
        folder.clean_staging()
        folder.replace(RESCORING, (json.dumps(about, indent=1) + "\n").encode())
        commits = list_commits(store)
        if not commits:
            raise OutputError(f"{store.uri}: no shard is committed yet; there is nothing to score")
        scoring = _Scoring(job, models, advance)
        started = time.time()
        for place, number in enumerate(sorted(commits)):
            advance(f"shard {place + 1} of {len(commits)}, {scoring.num_scored} images scored")
            _rescore_shard(store, folder, job, plan, number, scoring)
        _finish(store, folder, job, plan, commits, models, labels, started)
        is_complete = store.exists(SUCCESS)
        manifest = read_manifest(folder)
        comparison, reason = _compare(store, folder, advance)
        if comparison is not None:
            manifest["comparison"] = summary_document(comparison)
        folder.replace(MANIFEST, _json(manifest))
        if is_complete:
            folder.replace(SUCCESS, f"{plan.digest}\n".encode())
    samples = manifest["counts"]["samples"]
    num_failed, failure = _failures(folder.fetch(METADATA))
    return Rescored(
        folder=folder.uri,
        target=target,
        num_scored=scoring.num_scored,
        num_images=samples[STATUS_OK] + samples[STATUS_REJECTED],
        num_rows=samples["attempted"],
        num_accepted=samples["accepted"],
        num_failed=num_failed,
        failure=failure,
        is_complete=is_complete,
        comparison=comparison,
        reason=reason,
    )


# What is asked for ---------------------------------------------------------------------------------------------------


def _labels_of(store: Store, job: JobSpec) -> list[str]:
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


def _check_models(target: str, transfer: Sequence[str], oracle: str | None, labels: list[str]) -> _Models:
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
    return _Models(target=target, transfer=tuple(transfer), oracle=oracle, digests=digests)


def _folder_name(target: str, models: _Models) -> str:
    """Name of a target for people, and a digest of all that scores anew: the target's own where that is all."""
    last = target.rstrip("/").replace("\\", "/").rsplit("/", 1)[-1].rsplit(":", 1)[-1]
    name = "".join(letter if letter.isalnum() or letter in "-_." else "-" for letter in last).strip(".-")[:60]
    digest = models.digests["target"] if len(models.digests) == 1 else digest_of(models.digests)
    return f"{name or 'target'}-{digest[:DIGEST_CHARS]}"


def _check_folder(folder: Store, source: Store, about: dict[str, Any]) -> None:
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


# Scoring -------------------------------------------------------------------------------------------------------------


def _rescore_shard(store: Store, folder: Store, job: JobSpec, plan: Plan, number: int, scoring: _Scoring) -> None:
    """Publish the new rows of a shard, unless they are there."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    name = f"{SHARDS}/{shard_name(job.name, number)}.parquet"
    if folder.exists(name):
        if _identities(folder.fetch(name)) == _identities(store.fetch(name)):
            return
        # The run was repaired, and this shard made again.
        folder.remove(name)
    schema = arrow_schema(version=plan.schema_version)
    staged = folder.staging() / f"{shard_name(job.name, number)}.parquet"
    with explained(staged), pq.ParquetWriter(staged, schema, compression="zstd") as writer:
        held: list[Row] = []
        for row in _new_rows(store, job, plan, number, scoring):
            held.append(row)
            if len(held) == ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(held, schema=schema))
                held = []
        if held:
            writer.write_table(pa.Table.from_pylist(held, schema=schema))
    folder.publish(name, staged)
    staged.unlink(missing_ok=True)


def _identities(path: Path) -> list[tuple[str, str]]:
    return [(row["key"], row["sha256"]) for row in read_rows(path, ["key", "sha256"])]


def _new_rows(store: Store, job: JobSpec, plan: Plan, number: int, scoring: _Scoring) -> Iterator[Row]:
    """The rows of a shard in their order."""
    stem = f"{SHARDS}/{shard_name(job.name, number)}"
    images = read_shard(store.fetch(f"{stem}.tar"))
    specs = {spec.key: spec for spec in plan.samples(plan.shard(number))}
    waiting: list[Sample] = []
    for row in read_rows(store.fetch(f"{stem}.parquet")):
        spec, image = specs.get(row["key"]), b""
        if spec is None:
            where = store.address(f"{stem}.parquet")
            raise CorruptShardError(f"{where}: {row['key']} is not in the plan; `riskforge verify` says more")
        if row["sha256"]:
            key, image, _, _ = next(images, ("", b"", {}, 0))
            if key != row["key"]:
                where = store.address(f"{stem}.tar")
                raise CorruptShardError(f"{where}: lacks the image of {row['key']}; `riskforge repair` takes it out")
        waiting.append((spec, image, row))
        if len(waiting) == BATCH:
            yield from _scored(waiting, job, plan, number, scoring)
            waiting = []
    yield from _scored(waiting, job, plan, number, scoring)


def _scored(waiting: list[Sample], job: JobSpec, plan: Plan, number: int, scoring: _Scoring) -> Iterator[Row]:
    """New rows of some samples: scored by batches, those without an image as they are."""
    rule = job.requests[plan.shard(number).request].accept
    with_image = [one for one in waiting if one[1]]
    made = iter(scoring.records(with_image) if with_image else ())
    for spec, image, row in waiting:
        if image:
            record = next(made)
            if record["status"] == STATUS_FAILED:
                yield record
                continue
            accepted = is_accepted(rule, record, spec.cell.classes, plan.schema_version)
            yield record | {"accepted": accepted, "status": STATUS_OK if accepted else STATUS_REJECTED}
        elif row["status"] == STATUS_FAILED:
            yield row
        else:
            yield _failed(spec, row, NOT_STORED)


def _failed(spec: SampleSpec, row: Row, message: str) -> Row:
    """The row of a sample without new scores."""
    return in_version(failed_record(spec, message), row["schema_version"]) | _kept(row)


def _kept(row: Row) -> Row:
    """What a row without an image keeps: how it was sampled, and the names of classes, which no stored plan has."""
    names = ("class_name", "class_index", "prompt", "screened", "guided_steps", "zero_gradients", "nonfinite_gradients")
    return {name: row[name] for name in (*names, *RUN_FIELDS)}


# Closing -------------------------------------------------------------------------------------------------------------


def _finish(
    store: Store,
    folder: Store,
    job: JobSpec,
    plan: Plan,
    commits: dict[int, CommitSummary],
    models: _Models,
    labels: list[str],
    started: float,
) -> None:
    """Write metadata and manifest over all shards."""
    folder.remove(SUCCESS)
    write_metadata(folder, job.name, commits, schema_version=plan.schema_version, quotas=quotas_of(plan))
    groups = summarise(folder.fetch(METADATA))
    counts = count_requests(groups)
    totals = {name: sum(one[name] for one in counts.values()) for name in next(iter(counts.values()))}
    new_job = job.model_copy(update={"models": job.models.model_copy(update=_new_addresses(models))})
    manifest = {
        "schema_version": plan.schema_version,
        "name": job.name,
        "complete": store.exists(SUCCESS),
        "plan_digest": plan.digest,
        RESCORED_FROM: _origin(store, folder, job, plan, len(commits)),
        "job": new_job.model_dump(mode="json", exclude_none=True),
        "models": _described(store, job, plan, models, labels),
        "versions": software_versions(),
        "hardware": {"machine": platform.machine()},
        "timing": {"run_seconds": time.time() - started, "finished": time.time()},
        "counts": {
            "shards": {"planned": plan.num_shards, "committed": len(commits)},
            "samples": {"planned": plan.num_samples, **totals},
            "requests": counts,
            "classes": count_classes(folder.fetch(METADATA)),
            "quotas": {},
            "screening": {},
        },
        "summary": [plain(group) for group in groups],
        "dials": {},
        "shards": [],
    }
    folder.replace(MANIFEST, _json(manifest))


def _origin(store: Store, folder: Store, job: JobSpec, plan: Plan, num_shards: int) -> dict[str, Any]:
    """Where images and old scores are: relative to the folder where that lies inside the run."""
    is_inside = _is_inside(folder, store)
    uri = Path(os.path.relpath(store.place, folder.place)).as_posix() if is_inside else store.uri
    return {
        "uri": uri,
        "plan_digest": plan.digest,
        "num_shards": num_shards,
        "target": {"address": job.models.target, "digest": plan.identity["models"]["target"]},
    }


def _is_inside(folder: Store, store: Store) -> bool:
    return folder.place.is_relative_to(store.place)


def _new_addresses(models: _Models) -> dict[str, Any]:
    transfer = {"transfer": models.transfer} if models.transfer else {}
    return {"target": models.target} | transfer | ({"oracle": models.oracle} if models.oracle else {})


def _described(store: Store, job: JobSpec, plan: Plan, models: _Models, labels: list[str]) -> dict[str, Any]:
    """The models of the manifest: the run's, with those that scored anew in their places."""
    digests = plan.identity["models"]
    described: dict[str, Any] = {"clip": {"address": job.models.clip, "digest": digests["clip"]}}
    with suppress(OutputError, CorruptShardError, KeyError, TypeError):
        described = read_manifest(store)["models"]
    described["target"] = {"address": models.target, "digest": models.digests["target"], "labels": labels}
    if models.transfer:
        pairs = zip(models.transfer, models.digests["transfer"], strict=True)
        described["transfer"] = [{"address": address, "digest": digest} for address, digest in pairs]
    if models.oracle:
        described["oracle"] = {"address": models.oracle, "digest": models.digests["oracle"]}
    return described


def _failures(metadata: Path) -> tuple[int, str]:
    """How many stored images have no new score, and the most frequent reason."""
    import pyarrow.compute as pc

    from engine.report.data import failures, open_metadata

    dataset, is_stored = open_metadata(metadata), pc.field("sha256") != ""
    counted = failures(dataset, is_stored)
    num_failed = dataset.count_rows(filter=is_stored & (pc.field("status") == STATUS_FAILED))
    return num_failed, counted[0][0] if counted else ""


def _compare(store: Store, folder: Store, advance: Callable[[str], None]) -> tuple[NightComparison | None, str]:
    """Before and after, request by request and context by context, or why there is nothing to compare."""
    try:
        return compare_nights(read_night(store.uri), read_night(folder.uri), advance=advance), ""
    except (JobError, OutputError, CorruptShardError) as error:
        return None, str(error)


def _json(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()
