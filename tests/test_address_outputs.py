"""Outputs at addresses of an object store: the same files as in a folder, the last one last, nothing after an error."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engine.data.reading import export as export_module
from engine.data.reading.export import export
from engine.data.reading.export_options import EXPORT, ExportOptions
from engine.data.run.file_names import SUCCESS
from engine.data.stores import built_output as built_module
from engine.data.stores.artefact_folders import publish_artefact
from engine.data.stores.built_output import UNFINISHED, built_output, occupying_names
from engine.data.stores.folder import FolderStore
from engine.data.stores.lease import hold
from engine.data.stores.object_store import ObjectStore
from engine.errors import OutputError, OwnedError
from engine.studies.output_folders import check_results
from tests.conftest import REPOSITORY
from tests.corpus_cases import make_run
from tests.s3_cases import connected, objects

# The last file of an export is uploaded by itself; before it, the process that runs this is killed.
KILLED = """
import os, signal, sys
from engine.data.reading.export import export
from engine.data.reading.export_options import ExportOptions
from engine.data.run.file_names import SUCCESS
from engine.data.stores.object_store import ObjectStore

publish = ObjectStore.publish
def die(store, name, data):
    if name == SUCCESS:
        os.kill(os.getpid(), signal.SIGKILL)
    return publish(store, name, data)
ObjectStore.publish = die
export((sys.argv[1],), ExportOptions(output=sys.argv[2]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("addresses") / "run")


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", ["webdataset", "imagefolder"])
def test_an_export_is_that_of_a_folder(run: Path, s3_store: ObjectStore, tmp_path: Path, name: str) -> None:
    """Byte for byte, without a rest of its making, here or there; a second one is refused, as in a folder."""
    options: dict[str, Any] = {"format": name, "samples_per_shard": 4}
    export((str(run),), ExportOptions(output=str(tmp_path / "out"), **options))
    exported = export((str(run),), ExportOptions(output=s3_store.uri, **options))
    assert exported.address == s3_store.uri and objects(s3_store) == files(tmp_path / "out")
    with pytest.raises(OutputError, match=rf"--output: {s3_store.uri} is not empty \('.*'\)"):
        export((str(run),), ExportOptions(output=s3_store.uri))


def test_large_files_leave_this_machine_early(
    run: Path, s3_store: ObjectStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before the last shard is written the first ones are uploaded, and not on this disk any more."""
    monkeypatch.setattr(built_module, "MAX_WAITING", 1)
    seen = []
    write = export_module._json_file

    def look(document: Any) -> bytes:
        [built] = s3_store_staging()
        seen.append(([one for one in objects(s3_store) if one.endswith(".tar")], list(built.rglob("*.tar"))))
        return write(document)

    def s3_store_staging() -> list[Path]:
        return [path for path in tmp_path.rglob("built-*") if path.is_dir()]

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setattr(export_module, "_json_file", look)
    export((str(run),), ExportOptions(output=s3_store.uri, samples_per_shard=2))
    uploaded, left = seen[0]
    assert len(uploaded) > len(left) and len(left) <= 1


def test_an_error_leaves_nothing(run: Path, s3_store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does an interruption, after files are there already."""

    def stop(*_: Any) -> None:
        assert objects(s3_store)
        raise KeyboardInterrupt

    monkeypatch.setattr(export_module, "export_card", stop)
    with pytest.raises(KeyboardInterrupt):
        export((str(run),), ExportOptions(output=s3_store.uri, samples_per_shard=4))
    assert not objects(s3_store)


def test_a_killed_export_begins_again(run: Path, s3_store: ObjectStore, tmp_path: Path) -> None:
    """By the same command; to others the place is taken, and readers see that it is not complete."""
    command = [sys.executable, "-c", KILLED, str(run), s3_store.uri]
    assert subprocess.run(command, cwd=REPOSITORY, check=False).returncode == -9
    assert SUCCESS not in objects(s3_store) and UNFINISHED in objects(s3_store)
    assert occupying_names(s3_store, "retrain") and not occupying_names(s3_store, EXPORT)
    with pytest.raises(OutputError, match="no earlier `riskforge retrain` has left there"):
        check_results(s3_store.uri, "retrain.json", ("retrain.json", "model"), "retrain")
    export((str(run),), ExportOptions(output=s3_store.uri))
    export((str(run),), ExportOptions(output=str(tmp_path / "out")))
    assert objects(s3_store) == files(tmp_path / "out")


def test_one_writes_at_a_time(run: Path, s3_store: ObjectStore) -> None:
    with hold(connected(s3_store.name)), pytest.raises(OwnedError, match="another driver is running on it"):
        export((str(run),), ExportOptions(output=s3_store.uri))


def test_results_replace_earlier_ones(s3_store: ObjectStore, tmp_path: Path) -> None:
    """In a folder and at an address: none of the old files is left, and those that are named as another's are kept."""
    for store in (s3_store, FolderStore(tmp_path / "out")):
        for text in ("first", "second"):
            check_results(store.uri, "retrain.json", ("retrain.json", "model"), "retrain")
            with built_output(store, "retrain", "retrain.json") as built:
                (built.path / "model").mkdir()
                (built.path / f"model/{text}").write_text(text)
                (built.path / "retrain.json").write_text(json.dumps({"study": "retrain"}))
        assert set(store.list()) == {"retrain.json", "model"} and store.list("model") == ["model/second"]
    s3_store.replace("mine.txt", b"")
    with pytest.raises(OutputError, match=r"no earlier `riskforge retrain` has left there \('mine.txt'"):
        check_results(s3_store.uri, "retrain.json", ("retrain.json", "model"), "retrain")


def test_an_artefact_is_published_once(s3_store: ObjectStore) -> None:
    """Its document last: half of one is completed, an equal one is found, another one is refused."""

    def digest_in(path: Path) -> str:
        return hashlib.sha256((path / "numbers").read_bytes()).hexdigest()

    content = {"numbers": b"12", "document.json": b"{}"}
    digest = hashlib.sha256(b"12").hexdigest()
    name = f"kind-{digest[:12]}"
    s3_store.replace(f"{name}/numbers", b"12")
    path, was_there = publish_artefact(s3_store, "kind", digest, content, digest_in)
    assert files(path) == content and path.name == name and not was_there
    assert publish_artefact(connected(s3_store.name), "kind", digest, content, digest_in)[1]
    s3_store.replace(f"{name}/numbers", b"13")
    with pytest.raises(OutputError, match=rf"{s3_store.uri}/{name}: is there with other content"):
        publish_artefact(connected(s3_store.name), "kind", digest, content, digest_in)
