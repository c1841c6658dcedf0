"""New rows of the shards of a run: scored by batches, in their order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.data.run.commit_record import file_names, file_pair
from engine.data.run.schema import arrow_schema
from engine.data.run.shards import ROWS_PER_GROUP, SHARDS, TarSample, read_rows, read_samples, shard_name
from engine.data.stores.file_errors import explained
from engine.errors import CorruptShardError
from engine.job.acceptance import is_accepted
from engine.job.columns import NO_CLASS, RUN_COLUMNS, UNKNOWN, Role, columns_with
from engine.job.plan import SampleSpec
from engine.job.records import STATUS_FAILED, STATUS_OK, STATUS_REJECTED, TWINS, failed_record, in_version
from engine.job.spec import JobSpec
from engine.studies.rescore.inputs import Models, Rescoring

if TYPE_CHECKING:
    from engine.generation.oracle_scoring import Oracles
    from engine.models.oracles import Oracle

NOT_STORED = "not scored again: no image is stored"
BATCH = 64
Row = dict[str, Any]


class Sample(NamedTuple):
    """An attempt.

    Attributes:
        image: the file, empty where none is stored.
        row: that of the run.
        twin: its stored twin.
    """

    spec: SampleSpec
    image: bytes
    row: Row
    twin: TarSample | None = None


class Scoring:
    """The new classifiers, loaded when the first image is scored."""

    def __init__(self, job: JobSpec, models: Models, labels: Sequence[str], advance: Callable[[str], None]) -> None:
        self._job, self._models, self._labels, self._advance = job, models, labels, advance
        self._loaded: tuple[Oracle, list[Oracle], Oracles] | None = None
        self.num_scored = 0

    def _load(self) -> tuple[Oracle, list[Oracle], Oracles]:
        if self._loaded is None:
            import torch

            from engine.generation.oracle_scoring import Oracles
            from engine.models.classifier import Classifier
            from engine.models.library_logging import quiet_libraries
            from engine.models.relabelled import load_classifier_for, load_oracle_for, with_labels

            self._advance("loading the classifiers")
            quiet_libraries()
            device = "cuda" if torch.cuda.is_available() and self._job.runtime.device != "cpu" else "cpu"
            labels, maps = self._labels, self._models.label_map
            transfer = [load_classifier_for(address, device, labels, maps) for address in self._models.transfer]
            own = Classifier.load(self._models.target, device, self._models.temperature)
            target = with_labels(own, labels, maps)
            models = [load_oracle_for(address, device, labels, maps) for address in self._models.oracles]
            oracles = Oracles(models, is_guiding=self._job.oracle_guides, validity=self._models.validity)
            self._loaded = target, transfer, oracles
        return self._loaded

    def records(self, samples: Sequence[Sample]) -> list[Row]:
        """The rows of samples with an image, updated by the outputs of the new classifiers; those of twins too.

        A sample for which a classifier gives non-finite values is `failed`, and its message names the classifier.
        """
        import torch

        from engine.data.images.decode import decode_stored
        from engine.generation.scorer import asked_of, target_fields, transfer_entries
        from engine.methods.finiteness import Faults

        target, transfer, oracles = self._load()
        images = [decode_stored(sample.image, f"{sample.spec.key}: its image") for sample in samples]
        faults = Faults(len(samples))
        labels = torch.tensor([sample.row["class_index"] for sample in samples])
        cells = [sample.spec.cell for sample in samples]
        fields = target_fields(target, cells, target.score(images), labels, faults)
        rows = [sample.row | new for sample, new in zip(samples, fields, strict=True)]
        self._add_twins(target, samples, rows)
        if transfer:
            logits = [model.score(images) for model in transfer]
            digests, guided = self._models.digests["transfer"], self._models.guided
            guiding = [model for model, digest in zip(transfer, digests, strict=True) if digest in guided]
            for row, entries in zip(rows, transfer_entries(transfer, logits, labels, faults, guiding), strict=True):
                row["transfer"] = entries
        if oracles.models:
            fields = oracles.fields(oracles.preprocess(images), asked_of(cells, labels), faults)
            for row, new in zip(rows, fields, strict=True):
                row |= {name: value for name, value in new.items() if name in row}
        self.num_scored += len(images)
        return [
            _failed(sample.spec, sample.row, faults[place]) if faults[place] else row
            for place, (sample, row) in enumerate(zip(samples, rows, strict=True))
        ]

    def _add_twins(self, target: Oracle, samples: Sequence[Sample], rows: Sequence[Row]) -> None:
        """What the new target says of the twins, in the rows of their samples; nothing where it is not finite."""
        import torch

        from engine.data.images.decode import decode_stored
        from engine.generation.scorer import target_fields
        from engine.methods.finiteness import Faults

        paired = [(sample, row, sample.twin) for sample, row in zip(samples, rows, strict=True) if sample.twin]
        if not paired:
            return
        images = [decode_stored(twin.image, f"{sample.spec.key}: the image of its twin") for sample, _, twin in paired]
        labels, faults = torch.tensor([twin.label for _, _, twin in paired]), Faults(len(paired))
        cells = [sample.spec.cell for sample, _, _ in paired]
        fields = target_fields(target, cells, target.score(images), labels, faults)
        for place, ((_, row, _), new) in enumerate(zip(paired, fields, strict=True)):
            scores = (NO_CLASS, UNKNOWN) if faults[place] else (new["predicted_class"], new["risk"])
            row |= dict(zip(("twin_predicted_class", "twin_risk"), scores, strict=True))


def rescore_shard(rescoring: Rescoring, number: int, scoring: Scoring) -> None:
    """Publish the new rows of a shard, unless they are published already."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder, stem = rescoring.folder, shard_name(rescoring.job.name, number)
    name = f"{SHARDS}/{stem}.parquet"
    if folder.exists(name):
        if _identities(folder.fetch(name)) == _identities(rescoring.run.fetch(name)):
            return
        # The run was repaired, and this shard was sampled again.
        folder.remove(name)
    schema = arrow_schema(version=rescoring.plan.schema_version)
    staged = folder.staging() / f"{stem}.parquet"
    with explained(staged), pq.ParquetWriter(staged, schema, compression="zstd") as writer:
        group: list[Row] = []
        for row in _new_rows(rescoring, number, scoring):
            group.append(row)
            if len(group) == ROWS_PER_GROUP:
                writer.write_table(pa.Table.from_pylist(group, schema=schema))
                group = []
        if group:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
    folder.publish(name, staged)
    staged.unlink(missing_ok=True)


def _identities(path: Path) -> list[tuple[str, str]]:
    return [(row["key"], row["sha256"]) for row in read_rows(path, ["key", "sha256"])]


def _new_rows(rescoring: Rescoring, number: int, scoring: Scoring) -> Iterator[Row]:
    """The rows of a shard in their order.

    Raises:
        CorruptShardError: a row is not in the plan, or an image is missing.
    """
    store, plan = rescoring.run, rescoring.plan
    specs = {spec.key: spec for spec in plan.samples(plan.shard(number))}
    waiting: list[Sample] = []
    for row, samples in _stored(rescoring, number):
        spec = specs.get(row["key"])
        if spec is None:
            where = store.address(file_pair(shard_name(rescoring.job.name, number))[1])
            raise CorruptShardError(f"{where}: {row['key']} is not in the plan; `riskforge verify` says more")
        image = samples[SHARDS].image if samples else b""
        waiting.append(Sample(spec, image, row, samples.get(TWINS)))
        if len(waiting) == BATCH:
            yield from _scored(waiting, rescoring, number, scoring)
            waiting = []
    yield from _scored(waiting, rescoring, number, scoring)


def _stored(rescoring: Rescoring, number: int) -> Iterator[tuple[Row, dict[str, TarSample]]]:
    """The rows of a shard with their images and twins.

    Raises:
        CorruptShardError: as `read_samples`.
    """
    has_twins = rescoring.job.requests[rescoring.plan.shard(number).request].twin
    kinds = (TWINS,) if has_twins else ()
    tar, parquet, *twins = map(rescoring.run.fetch, file_names(shard_name(rescoring.job.name, number), kinds))
    try:
        yield from read_samples(tar, parquet, dict(zip(kinds, twins, strict=True)))
    except CorruptShardError as error:
        raise CorruptShardError(f"{error}; `riskforge repair` takes the shard out") from None


def _scored(waiting: list[Sample], rescoring: Rescoring, number: int, scoring: Scoring) -> Iterator[Row]:
    """New rows of some samples: one batch of those with an image is scored, the others are kept."""
    plan = rescoring.plan
    rule = rescoring.job.requests[plan.shard(number).request].accept
    with_image = [sample for sample in waiting if sample.image]
    records = iter(scoring.records(with_image) if with_image else ())
    for spec, image, row, _ in waiting:
        if image:
            record = next(records)
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
    """The fields that a row without an image keeps: how it was sampled, and class names, which no stored plan has."""
    kept = (*columns_with(Role.SAMPLED), *RUN_COLUMNS)
    return {column.name: row[column.name] for column in kept if column.name in row}
