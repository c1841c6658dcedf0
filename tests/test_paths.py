"""A path is a path: no part of it is taken for a URL, a pattern, a command, a variable or an escape."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import engine
from engine.data.reading.export import export
from engine.data.reading.export_options import ExportOptions
from engine.data.reading.inspection import inspect
from engine.data.run.verify import verify
from engine.data.stores.opening import open_store
from engine.report.render import write_report
from engine.studies.compare.scored_run import read_scored_run
from tests.corpus_cases import make_run
from tests.run_cases import LABELS

# What webdataset, fsspec, glob, braceexpand, Arrow, URLs and shells read otherwise than it is written.
NAMES = (
    "a#b", "#", "a?b", "?", "a%20b", "%s", "a b", "{a,b}", "{0..3}", "a::b", "a|b", "[ab]", "a*b", "*", "ünï",
    "pipe:touch made", "http:x", "https:x", "file:x", "memory:x", "ais:x", "-", "${HOME}", "$HOME", "a=b", "a&b",
    "a'b", 'a"b', "a\\b", "a;b", "a@b:c", "x.tar", "..a", "a,b", "zip:x", "a\u0301",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("paths") / "run", count=3)


def check_readers(uri: str, run: Path) -> None:
    """Rows and images as from a folder with a plain name, by every reader."""
    corpus, plain = engine.open_run(uri), engine.open_run(str(run))
    assert corpus.to_table().equals(plain.to_table()) and len(corpus.filter("risk >= 0")) > 0
    keys = plain.samples.to_table(["key"])["key"].to_pylist()
    assert [one["__key__"] for one in corpus.to_webdataset()] == keys
    data, wanted = corpus.to_torch(), plain.to_torch()
    assert [data[number][0].equal(wanted[number][0]) for number in range(len(keys))] == [True] * len(keys)


@pytest.mark.parametrize("is_relative", [False, True], ids=["absolute", "relative"])
@pytest.mark.parametrize("name", NAMES)
def test_a_run_is_read_from_a_folder_of_any_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, is_relative: bool
) -> None:
    """The name is that of the run's folder, or of one above it."""
    monkeypatch.chdir(tmp_path)
    folder = Path(name) if is_relative else tmp_path / name / "run"
    shutil.copytree(run, folder)
    check_readers(str(folder), run)
    assert [one.name for one in tmp_path.iterdir()] == [name], "nothing is run, fetched or made"


@pytest.mark.parametrize("name", NAMES[::6])
def test_a_data_set_is_written_to_a_folder_of_any_name(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Exports of every format, reports, and what reads whole runs."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(run, name)
    for kind in ("webdataset", "imagefolder", "parquet"):
        export((name,), ExportOptions(output=f"{name}-{kind}", format=kind))
    check_readers(f"{name}-webdataset", export((name,), ExportOptions(output="plain")).path)
    store = open_store(name)
    assert verify(store).findings == () and inspect(engine.open_run(name)).document["rows"] > 0
    write_report(store, labels=LABELS)
    assert read_scored_run(name).keys.tolist() == read_scored_run(str(run)).keys.tolist()
    made = {name, "plain", *(f"{name}-{kind}" for kind in ("webdataset", "imagefolder", "parquet"))}
    assert {one.name for one in tmp_path.iterdir()} == made


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text(alphabet="ab#?%{}[]*:|. ,;&=+@!~^$'\"\\é", min_size=1, max_size=12))
def test_names_of_such_letters_are_read(run: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / f"x{name}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(run, folder)
    check_readers(str(folder), run)
