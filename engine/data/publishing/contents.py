"""What of a run or an export is pushed: its data, and the documents that say what they are.

Not pushed are the engine's own files, rows that are in `metadata.parquet` too, answers of people, scores of other
targets, and whatever else lies in the folder. Documents and rows name no folders, buckets or machines.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.data.publishing.complete import check_data_set, check_run, image_names
from engine.data.publishing.hub_card import completed_card
from engine.data.publishing.private_text import PrivatePlaces
from engine.data.publishing.public_rows import PublicRows
from engine.data.run.commits import read_commits
from engine.data.run.companions import COMPANIONS
from engine.data.run.file_names import (
    CARD,
    CLASS_MAP,
    CLASSES,
    EVALUATION,
    EXPORT_KIND,
    FOLDER_LABELS,
    MANIFEST,
    METADATA,
    REPORT,
    RESCORED_FROM,
    SUCCESS,
    SURPLUS_LIST,
    TIMM_INFO,
    TWINS_TABLE,
    WIDS_INDEX,
)
from engine.data.run.manifest_reading import manifest_error, read_manifest
from engine.data.run.schema import tar_features
from engine.data.run.shards import IMAGE_FORMATS, SHARDS, file_digest, read_tar
from engine.data.run.stored_plan import read_run, stored_plan
from engine.data.stores.base import STATE, Store
from engine.data.stores.file_errors import explained
from engine.errors import CorruptShardError, JobError, OutputError
from engine.methods.strict_json import parse_json

DUPLICATES = "duplicates.csv"
# Of a manifest on the Hub: what was pushed with it.
PUSHED = "pushed"
_PLAIN = (SUCCESS, TWINS_TABLE, WIDS_INDEX, TIMM_INFO, SURPLUS_LIST, CLASSES, FOLDER_LABELS, CLASS_MAP, DUPLICATES)
_TAR_FOLDERS = (SHARDS, *COMPANIONS)
_TRAIN = re.compile(r"train-\d{5,}-of-\d{5,}\.parquet")
_PATTERNS = {"imagefolder": [METADATA, "*/*"], "parquet": ["train-*.parquet"], "pairs": ["train-*.parquet"]}


@dataclass(frozen=True, slots=True, kw_only=True)
class PushedFile:
    """A file to push.

    Attributes:
        name: in the data set and in the repository.
        num_bytes: its size.
        sha256: its checksum where it is recorded, or of content that was made for the push; else empty.
        content: bytes or file, where it is not pushed as the data set has it.
    """

    name: str
    num_bytes: int
    sha256: str = ""
    content: bytes | Path | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contents:
    """What is pushed of a data set.

    Attributes:
        store: of the data set.
        name: of the job, or of the export.
        digest: of the plan, or of the content of an export; equal where a later state of the same run is pushed.
        data: tars, parquet files and images, which are pushed first.
        closing: what describes them, which is pushed together, last.
        left_out: names in the folder that are not pushed, without the engine's own.
        patterns: of the card, of the files that are data.
    """

    store: Store
    name: str
    digest: str
    data: list[PushedFile]
    closing: list[PushedFile]
    left_out: list[str]
    patterns: list[str]

    @property
    def files(self) -> Iterator[PushedFile]:
        """All of them."""
        yield from self.data
        yield from self.closing


def read_contents(store: Store, work: Path, *, with_report: bool = False) -> Contents:
    """What is pushed of a complete run or export.

    Args:
        work: a folder of this process, for files that are made for the push.
        with_report: whether `report.html` is pushed, too.

    Raises:
        JobError: there is no such folder.
        OutputError: it holds neither, or is not complete, with the command that completes it.
        CorruptShardError: it is damaged.
    """
    if not store.is_there():
        raise JobError(f"RUN: there is no folder '{store.uri}'; give the output folder of a run or an export")
    is_run = read_run(store) is not None
    manifest = read_manifest(store) if store.exists(MANIFEST) else {}
    _check_kind(store, manifest, is_run)
    if is_run:
        check_run(store)
    sizes = _sizes(store, manifest, is_run)
    if not is_run:
        check_data_set(store, manifest, sizes)
    checksums = _recorded(store) if is_run else None
    data = [
        PushedFile(name=name, num_bytes=num_bytes, sha256=(checksums or {}).get(name, ""))
        for name, num_bytes in sizes.items()
        # A tar without a record is not of the run.
        if _is_data(name) and (checksums is None or name in checksums)
    ]
    documents = _Documents(store, manifest, work, sizes)
    closing = documents.files(with_report)
    pushed = {file.name for file in (*data, *closing)}
    return Contents(
        store=store,
        name=str(manifest.get("name") or store.name),
        digest=_digest(manifest),
        data=data,
        closing=closing,
        left_out=_left_out(store, pushed),
        patterns=documents.patterns,
    )


def _digest(manifest: Mapping[str, Any]) -> str:
    return str(manifest.get("plan_digest") or manifest.get("digest") or "")


def _check_kind(store: Store, manifest: Mapping[str, Any], is_run: bool) -> None:
    """Refuse what is neither a run nor an export.

    Raises:
        OutputError: with what it is, as far as that can be told.
    """
    if RESCORED_FROM in manifest:
        raise OutputError(
            f"RUN: {store.uri} has the scores that `riskforge rescore` made, and no images; give the folder of the run"
        )
    if is_run:
        return
    if not (manifest.get("kind") == EXPORT_KIND or "plan_digest" in manifest):
        raise OutputError(
            f"RUN: {store.uri} holds no run and no export; give the output of `riskforge run`, `curate`, `merge` or"
            " `export` (a model is uploaded by `hf upload`)"
        )
    if not manifest.get("name") or not _digest(manifest):
        raise manifest_error(store, "it lacks name or digest")


def _sizes(store: Store, manifest: Mapping[str, Any], is_run: bool) -> dict[str, int]:
    """Bytes of the files that may be pushed, by name, in order."""
    sizes = {name.lstrip("/"): size for name, size in store.sizes("").items()}
    images = [] if is_run or manifest.get("format") != "imagefolder" else image_names(store)
    folders = [*_TAR_FOLDERS, METADATA, *sorted({name.partition("/")[0] for name in images})]
    for folder in folders:
        if store.is_folder(folder):
            sizes |= store.sizes(folder)
    wanted = set(images)
    return {name: sizes[name] for name in sorted(sizes) if _is_pushed(name) or name in wanted}


def _is_pushed(name: str) -> bool:
    return name in (CARD, MANIFEST, EVALUATION, REPORT, *_PLAIN) or _is_rows(name) or _is_data(name)


def _is_rows(name: str) -> bool:
    return name.partition("/")[0] == METADATA and name.endswith(".parquet")


def _is_data(name: str) -> bool:
    folder, separator, file = name.rpartition("/")
    if not separator:
        return _TRAIN.fullmatch(name) is not None
    if folder in _TAR_FOLDERS:
        return file.endswith(".tar")
    return folder != METADATA and name not in _PLAIN and file.rpartition(".")[2] in IMAGE_FORMATS


def _recorded(store: Store) -> dict[str, str]:
    """Checksums of the files of shards by name, as their records have them.

    Raises:
        CorruptShardError: a record cannot be read.
    """
    return {name: sha256 for record in read_commits(store) for name, (sha256, _) in record.files.items()}


def _left_out(store: Store, pushed: set[str]) -> list[str]:
    """Names in the folder of which nothing is pushed."""
    shown = {name.partition("/")[0] for name in pushed}
    return [name for name in store.list() if name not in shown and name != STATE]


class _Documents:
    """The files that describe a data set, as they are pushed."""

    def __init__(self, store: Store, manifest: dict[str, Any], work: Path, sizes: Mapping[str, int]) -> None:
        self._store, self._manifest, self._sizes = store, manifest, sizes
        self._places, self._rows = PrivatePlaces(), PublicRows(work)
        self.patterns: list[str] = []

    def files(self, with_report: bool) -> list[PushedFile]:
        """All of them; the marker of a complete data set is the last one."""
        manifest = self._places.document(self._manifest)
        card = self._card()
        manifest[PUSHED] = {"card": git_digest(card.encode())}
        made = {CARD: card.encode(), MANIFEST: _json(manifest)}
        if EVALUATION in self._sizes:
            made[EVALUATION] = _json(self._places.document(self._parsed(EVALUATION)))
        if with_report:
            made[REPORT] = self._places.text(self._text(REPORT)).encode()
        files = [_of_bytes(name, data) for name, data in made.items()]
        files += [self._of_rows(name) for name in self._sizes if _is_rows(name)]
        files += [PushedFile(name=name, num_bytes=self._sizes[name]) for name in _PLAIN if name in self._sizes]
        return sorted(files, key=lambda file: (file.name == SUCCESS, file.name))

    def _card(self) -> str:
        text = self._text(CARD)
        has_tars = self._manifest.get("format", "webdataset") == "webdataset"
        files = _PATTERNS.get(str(self._manifest.get("format")), [f"{SHARDS}/*.tar"])
        card = completed_card(text, self._store.address(CARD), files, self._features if has_tars else None)
        self.patterns = card.patterns
        return self._places.text(card.text)

    def _features(self) -> list[dict[str, Any]]:
        """Types of the members of the tars."""
        version = self._manifest.get("schema_version", 1)
        labels = self._labels()
        try:
            return tar_features(self._image_format(), version, labels)
        except (ValueError, KeyError, TypeError) as error:
            raise manifest_error(self._store, f"schema_version: {error}") from error

    def _labels(self) -> list[str]:
        models = self._manifest.get("models")
        target = models.get("target") if isinstance(models, dict) else None
        labels = (target.get("labels") if isinstance(target, dict) else None) or self._manifest.get("labels")
        return list(map(str, labels)) if isinstance(labels, list) else []

    def _image_format(self) -> str:
        """The extension of the images in the tars."""
        if read_run(self._store) is not None:
            return stored_plan(self._store)[0].output.image_format
        tars = (name for name in self._sizes if name.startswith(f"{SHARDS}/") and name.endswith(".tar"))
        members = (member for name in tars for member, _ in read_tar(self._store.fetch(name)))
        first = next(members, "")
        return first.rpartition(".")[2] or IMAGE_FORMATS[0]

    def _of_rows(self, name: str) -> PushedFile:
        path = self._rows.write(self._store.fetch(name, keep=True))
        with explained(path):
            return PushedFile(
                name=name, num_bytes=path.stat().st_size, sha256=file_digest(path, "sha256"), content=path
            )

    def _text(self, name: str) -> str:
        if name not in self._sizes:
            raise OutputError(f"RUN: {self._store.uri} has no {name}; the command that made it writes it again")
        try:
            return self._store.read(name).decode()
        except UnicodeDecodeError:
            raise CorruptShardError(f"{self._store.address(name)}: is not a text in UTF-8; make it again") from None

    def _parsed(self, name: str) -> Any:
        try:
            return parse_json(self._store.read(name))
        except ValueError as error:
            raise CorruptShardError(f"{self._store.address(name)}: is not JSON ({error}); remove it") from None


def _of_bytes(name: str, data: bytes) -> PushedFile:
    return PushedFile(name=name, num_bytes=len(data), sha256=hashlib.sha256(data).hexdigest(), content=data)


def _json(document: Any) -> bytes:
    return (json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode()


def git_digest(content: bytes | Path) -> str:
    """What git calls a file of this content: how the Hub names small files."""
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    digest = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False)
    with io.BytesIO(content) if isinstance(content, bytes) else content.open("rb") as file:
        while chunk := file.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()
