"""Merge and export: the selected samples of some runs as a new data set, without near duplicates, with real images.

The same command gives the same bytes. The data set is built under a temporary name and renamed once it is complete; at
an address of an object store its files appear one by one, `_SUCCESS` last.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.images.image_source import some_of
from engine.data.reading.corpus import Corpus, open_run
from engine.data.reading.export_card import export_card
from engine.data.reading.export_options import (
    EXPORT,
    ExportOptions,
    check_classes,
    check_export_output,
    check_options,
    check_sources,
    only_clip,
    spdx_licence,
)
from engine.data.reading.format_registry import FORMATS, ExportData, Written
from engine.data.reading.formats import class_folders, numbered_folders
from engine.data.reading.origins import ORIGINS, distinct
from engine.data.reading.real_images import RealImages, WantedReal
from engine.data.reading.selected_pairs import SelectedPairs
from engine.data.reading.selection import Chosen, SampleReader, Selection, select, shuffled
from engine.data.reading.selection_notices import selection_notices
from engine.data.reading.source import RunSource
from engine.data.run.file_names import CARD, CLASS_MAP, CLASSES, EXPORT_KIND, FOLDER_LABELS, MANIFEST, SUCCESS
from engine.data.run.manifest import software_versions
from engine.data.run.shard_writing import record_json
from engine.data.stores.base import Store
from engine.data.stores.built_output import BuiltOutput, built_output
from engine.data.stores.file_errors import explained
from engine.data.stores.folder import FolderStore
from engine.errors import JobError
from engine.job.class_names import distinct_names
from engine.job.columns import SCHEMA_VERSION
from engine.job.plan import TEMPERATURE
from engine.job.records import REAL, STATUS_OK, STATUS_REJECTED, SampleResult
from engine.models.calibration import CALIBRATION

DUPLICATES = "duplicates.csv"

_SPOOL = ".real"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """What was written.

    Attributes:
        address: its folder, or the address of an object store.
        manifest: the content of manifest.json.
        notices: what was told before work began: which keys change, which samples are taken once.
        remarks: what else the user should know, in words.
    """

    address: str
    manifest: dict[str, Any]
    notices: tuple[str, ...]
    remarks: tuple[str, ...]

    @property
    def path(self) -> Path:
        """Its folder, where that is on this machine."""
        return Path(self.address)


def export(
    uris: tuple[str, ...],
    options: ExportOptions,
    advance: Callable[[str], None] = lambda text: None,
    notify: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Write the samples of some runs as a new data set.

    Args:
        advance: progress callback.
        notify: is given each notice before anything is written.

    Raises:
        JobError: an option is wrong, the runs are incompatible, or nothing is selected.
        OutputError: the output cannot be written to.
        CorruptShardError: a run is damaged.

    Side effects:
        Nothing is left behind when it raises or is interrupted.
    """
    corpus, store = _opened(uris, options)
    selection = select(corpus, spares_surplus=_spares_surplus(options))
    notices = selection_notices(corpus, selection)
    for notice in notices:
        notify(notice)
    with built_output(store, EXPORT, SUCCESS, notify) as built:
        manifest, remarks = _Export(corpus, selection, options, built, advance).write()
    return Exported(address=store.address(), manifest=manifest, notices=notices, remarks=remarks)


def preview(uris: tuple[str, ...], options: ExportOptions) -> dict[str, Any]:
    """What an export would take of each run, and its notices; nothing is written.

    Duplicates and real images are not looked for.

    Raises:
        RiskforgeError: as `export`, as far as rows and files tell.
    """
    corpus, store = _opened(uris, options)
    selection = select(corpus, spares_surplus=_spares_surplus(options))
    taken = Counter(sample.run for sample in selection.samples)
    runs = [
        {
            "uri": source.uri,
            "name": source.name,
            "num_taken": taken[number],
            "num_identical": selection.identical[number],
            "key_prefix": selection.prefixes.get(number, ""),
        }
        for number, source in enumerate(corpus.runs)
    ]
    notices = list(selection_notices(corpus, selection))
    return {"output": store.address(), "images": len(selection.samples), "runs": runs, "notices": notices}


def _opened(uris: tuple[str, ...], options: ExportOptions) -> tuple[Corpus, Store]:
    """The rows to choose from, and the place of the output, checked."""
    check_options(options)
    corpus = open_run(*uris)
    store = check_export_output(options, corpus)
    check_sources(corpus, options)
    if options.condition:
        corpus = corpus.filter(options.condition, "--filter")
    corpus.with_images(rejected=options.with_rejected, surplus=options.with_surplus).check_any()
    surplus = options.with_surplus or _spares_surplus(options)
    return corpus.with_images(rejected=options.with_rejected, surplus=surplus), store


def _spares_surplus(options: ExportOptions) -> bool:
    """Whether samples beyond their quota may take the place of near duplicates."""
    return options.deduplicate is not None and not options.with_surplus


class _Export:
    """One export: the selected samples, and its files."""

    def __init__(
        self,
        corpus: Corpus,
        selection: Selection,
        options: ExportOptions,
        built: BuiltOutput,
        advance: Callable[[str], None],
    ) -> None:
        self._corpus, self._selection, self._options, self._advance = corpus, selection, options, advance
        self._format = FORMATS[options.format]
        self._built, self._store = built, FolderStore(built.path)
        self._pairs = SelectedPairs(corpus, self._selection) if self._format.has_pairs else None
        self._reader = SampleReader(corpus, self._selection)
        self._labels = corpus.labels or _labels_of_rows(corpus)
        self._names = distinct_names(dict(enumerate(self._labels)))
        check_classes([*selection.samples, *selection.spare], self._labels)
        self._origins = distinct(origin for source in corpus.runs for origin in source.origins)
        self._digest = hashlib.sha256()
        self._counts: dict[str, dict[str, dict[str, int]]] = {"requests": {}, "classes": {}}
        self._present: set[int] = set()

    def write(self) -> tuple[dict[str, Any], tuple[str, ...]]:
        """Write everything, `_SUCCESS` last."""
        with contextlib.closing(self._reader), contextlib.closing(self._pairs or contextlib.ExitStack()):
            image_format = self._image_format()
            kept, deduplication = self._deduplicated()
            with contextlib.closing(self._mixed(kept, image_format)) as real:
                written = self._write_samples(kept, real, image_format)
                manifest = self._manifest(kept, real, deduplication)
        store = self._store
        store.replace(CLASSES, _json_file({str(index): label for index, label in enumerate(self._labels)}))
        store.replace(MANIFEST, _json_file(manifest))
        store.replace(CARD, export_card(manifest, written, self._labels, self._origins).encode())
        store.replace(SUCCESS, f"{manifest['digest']}\n".encode())
        store.remove_tree("_state")
        return manifest, tuple(self._remarks(deduplication, real))

    def _image_format(self) -> str:
        """The one format that the images of shards have."""
        formats = self._reader.image_formats
        if len(formats) > 1 and self._format.has_one_image_format:
            others = " or ".join(f"`{name}`" for name, other in FORMATS.items() if not other.has_one_image_format)
            raise JobError(
                f"RUN: the runs have images of different formats ({', '.join(formats)}), and shards have one; merge"
                f" runs of one format, or use `riskforge export --format` with {others}"
            )
        return formats[0] if len(formats) == 1 else "png"

    def _deduplicated(self) -> tuple[list[Chosen], dict[str, Any]]:
        """The samples without near duplicates, and the manifest's account of those."""
        samples, threshold = self._selection.samples, self._options.deduplicate
        if threshold is None:
            return samples, {}
        from engine.data.reading.deduplication import deduplicate

        address = self._options.clip or only_clip(self._corpus)
        done = deduplicate(self._corpus, self._selection, self._reader, self._names, threshold, address, self._advance)
        with explained(self._store.path(DUPLICATES)), self._store.path(DUPLICATES).open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["dropped", "kept", "similarity"])
            writer.writerows(done.rows)
        summary = {
            "threshold": threshold,
            "clip": address,
            "dropped": done.num_dropped,
            "topped_up": done.num_topped_up,
            "list": DUPLICATES,
            "cells": done.cells,
        }
        return done.kept, summary

    def _mixed(self, kept: list[Chosen], image_format: str) -> RealImages:
        """The real images to mix in; the samples may include real ones already."""
        options = self._options
        real = RealImages(self._store.path(_SPOOL), options.name, image_format)
        if options.real is None:
            return real
        if not self._corpus.labels:
            raise JobError(
                "--mix-real: the runs do not state their classes, so labels of real images cannot be matched"
            )
        real.draw(options.real, self._corpus.labels, self._wanted_real(kept), options.seed, self._advance)
        if taken := {sample.key for sample in self._selection.samples} & set(real.keys):
            raise JobError(f"--name: the key '{min(taken)}' is taken by a sample of the runs; choose another --name")
        return real

    def _wanted_real(self, kept: list[Chosen]) -> WantedReal:
        """How many real images are missing, and of which classes they may be."""
        options = self._options
        there = Counter(sample.class_index for sample in kept if sample.is_real)
        synthetic = frozenset(sample.class_index for sample in kept if not sample.is_real)
        num_there = there.total()
        count = max(1, round((len(kept) - num_there) * options.real_ratio / (1 - options.real_ratio))) - num_there
        if count < 1 and options.real_per_class is None:
            raise JobError(
                f"--real-ratio: {num_there} of the {len(kept)} samples are real images of an earlier export, a share of"
                f" {options.real_ratio:g} or more; leave them out (--filter \"method != 'real'\"), or drop --mix-real"
            )
        is_any = options.real_classes == "all"
        return WantedReal(
            classes=frozenset(range(len(self._labels))) if is_any else synthetic or frozenset(there),
            count=count,
            per_class=options.real_per_class,
            there=there,
        )

    def _write_samples(self, kept: list[Chosen], real: RealImages, image_format: str) -> Written:
        options = self._options
        total = len(kept) + len(real.keys)
        order = shuffled([*(sample.key for sample in kept), *real.keys], options.seed)
        samples = self._counted(self._read(order, kept, real, image_format), total)
        return self._format.load_writer()(
            ExportData(
                store=self._store,
                name=options.name,
                samples=samples,
                num_samples=total,
                labels=self._labels,
                folders=self._folders,
                samples_per_shard=options.samples_per_shard,
                image_format=image_format,
                pairs=self._pairs.images if self._pairs else None,
                finished=self._built.finished,
            )
        )

    @property
    def _folders(self) -> list[str]:
        """The folder of each class."""
        return class_folders(self._labels) if self._options.folders == "name" else numbered_folders(self._labels)

    def _read(
        self, order: list[int], kept: list[Chosen], real: RealImages, image_format: str
    ) -> Iterator[tuple[SampleResult, str]]:
        """Samples and the extensions of their images."""
        for number in order:
            if number < len(kept):
                sample = kept[number]
                result = self._reader.read(sample)
                if self._pairs:
                    result.record = self._pairs.with_twin(result.record)
                if result.record["twin_key"]:
                    # A twin has the key of its sample, or is another sample of the same run.
                    result.record["twin_key"] = self._selection.prefixes.get(sample.run, "") + result.record["twin_key"]
                yield result, self._reader.format_of(sample)
            else:
                yield real.read(number - len(kept), self._labels), image_format

    def _counted(self, samples: Iterator[tuple[SampleResult, str]], total: int) -> Iterator[tuple[SampleResult, str]]:
        """The same samples, counted and digested on their way."""
        for number, (result, extension) in enumerate(samples):
            record = result.record
            self._present.add(record["class_index"])
            self._digest.update(record_json(record) + hashlib.sha256(result.image).digest())
            for file in self._pairs.images(record["key"]) if self._pairs else ():
                self._digest.update(hashlib.sha256(file.data if file else b"").digest())
            for column, name in (("requests", record["request"]), ("classes", self._names[record["class_index"]])):
                counts = self._counts[column].setdefault(name, {STATUS_OK: 0, STATUS_REJECTED: 0, REAL: 0})
                counts[record["status"]] += 1
                counts[REAL] += record["method"] == REAL
            self._advance(f"sample {number + 1} of {total}")
            yield result, extension

    def _manifest(self, kept: list[Chosen], real: RealImages, deduplication: dict[str, Any]) -> dict[str, Any]:
        options = self._options
        return {
            "schema_version": SCHEMA_VERSION,
            "name": options.name,
            "complete": True,
            "kind": EXPORT_KIND,
            "format": options.format,
            "digest": self._digest.hexdigest(),
            "filter": options.condition,
            "seed": options.seed,
            "samples_per_shard": options.samples_per_shard,
            "with_rejected": options.with_rejected,
            "with_surplus": options.with_surplus,
            "license": spdx_licence(options.license),
            "authors": list(options.authors),
            # Known ones alone: names that rows happen to have would keep this data set from other ones.
            "labels": list(self._corpus.labels),
            "models": _common_models(self._corpus.runs),
            "sources": [self._source(number, kept) for number in range(len(self._corpus.runs))],
            ORIGINS: [origin.document() for origin in self._origins],
            "deduplication": deduplication,
            "real": self._real(real) if options.real is not None else {},
            "versions": software_versions(),
            "counts": self._all_counts(kept, len(real.keys)),
        }

    def _real(self, real: RealImages) -> dict[str, Any]:
        """The manifest's account of the real images."""
        return {
            "address": self._options.real,
            "ratio": self._options.real_ratio,
            "per_class": self._options.real_per_class or 0,
            "classes": self._options.real_classes,
            "num_usable": real.usable.total(),
            "num_of_other_classes": real.num_of_other_classes,
            "num_unusable": len(real.unusable),
            "num_taken": len(real.keys),
        }

    def _all_counts(self, kept: list[Chosen], num_drawn: int) -> dict[str, Any]:
        """The counts of the manifest.

        Args:
            num_drawn: real images that this export mixed in.
        """
        num_images, num_real = len(kept) + num_drawn, num_drawn + sum(sample.is_real for sample in kept)
        classes = self._counts["classes"]
        statuses = {name: sum(counts[name] for counts in classes.values()) for name in (STATUS_OK, STATUS_REJECTED)}
        num_shards = -(-num_images // self._options.samples_per_shard)
        return {
            "images": num_images,
            "generated": num_images - num_real,
            "real": num_real,
            "shards": {"committed": num_shards} if self._format.is_sharded else {},
            "samples": {"attempted": num_images, "failed": 0, **statuses},
            "requests": dict(sorted(self._counts["requests"].items())),
            "classes": dict(sorted(classes.items())),
        }

    def _source(self, number: int, kept: list[Chosen]) -> dict[str, Any]:
        source = self._corpus.runs[number]
        return {
            "uri": source.uri,
            "name": source.name,
            "state": source.state,
            "plan_digest": source.digest,
            "rows_sha256": source.rows_digest(),
            "models": source.models or source.known_models(),
            "num_taken": sum(sample.run == number for sample in kept),
            "num_identical": self._selection.identical[number],
            "key_prefix": self._selection.prefixes.get(number, ""),
        }

    def _remarks(self, deduplication: dict[str, Any], real: RealImages) -> Iterator[str]:
        for source in self._corpus.runs:
            if not source.is_finished:
                yield f"{source.uri} is {source.state}"
        if self._format.has_class_folders and not self._numbers_agree():
            yield (
                "torchvision and timm number the class folders that exist in sorted order, which is not the label;"
                f" take labels from {FOLDER_LABELS} or {CLASS_MAP}, as the code in {CARD} does"
            )
        if deduplication:
            from engine.data.reading.deduplication import deduplication_lines

            yield from deduplication_lines(deduplication, len(self._selection.samples))
        if real.num_of_other_classes:
            yield (
                f"{real.num_of_other_classes} real images are of classes that no sample has, and were left out;"
                " --real-classes all takes them"
            )
        if real.unusable:
            yield f"{len(real.unusable)} real files could not be used: {some_of(real.unusable)}"

    def _numbers_agree(self) -> bool:
        """Whether who numbers the folders of classes with images in their order has the labels."""
        folders = self._folders
        return sorted(self._present, key=folders.__getitem__) == list(range(len(self._present)))


def _labels_of_rows(corpus: Corpus) -> tuple[str, ...]:
    """Class names from the rows, where no manifest has them; also of rows that the filter rejects."""
    table = Corpus(corpus.runs).to_table(["class_index", "class_name"])
    names = dict(zip(table["class_index"].to_pylist(), table["class_name"].to_pylist(), strict=True))
    return tuple(names.get(index, f"class {index}") for index in range(max(names) + 1))


def _json_file(document: Any) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def _common_models(runs: tuple[RunSource, ...]) -> dict[str, Any]:
    """The models that all runs have in common, by role."""
    first = runs[0].models
    return {
        role: model
        for role, model in first.items()
        if all(_deciding(run.models.get(role)) == _deciding(model) for run in runs)
    }


def _deciding(model: Any) -> Any:
    """A model's description without its own temperature: its digest covers it, and earlier versions did not note it."""
    if not isinstance(model, dict) or model.get(CALIBRATION) is not None:
        return model
    return {name: value for name, value in model.items() if name != TEMPERATURE}
