"""Factories are checked once: what makes a check due again, what is never kept or believed, and where files are."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.errors import JobError
from engine.models import factories, factory_files, program_description
from engine.models.digests import model_digest
from engine.models.factory_cache import check_unchanged, keep_import_folders, kept_import_folders
from engine.models.user_cache import cache_file, read_cached, write_cached
from tests.conftest import REPOSITORY
from tests.program_cases import FACTORY

CODE = (
    FACTORY.replace("seed=5", "")
    .replace("import torch\n", "import torch\nfrom kept_parts import BIAS\nCALLS = []\n", 1)
    .replace("torch.manual_seed(seed)", "CALLS.append(1)\n    torch.manual_seed(int(open('seed.txt').read()) + BIAS)")
)


def is_installed_or_ours(path: Path) -> bool:
    return path.is_relative_to(REPOSITORY) or factories.is_installed(path)


@functools.cache
def is_of_library_or_ours(file: Path) -> bool:
    return is_installed_or_ours(file.resolve())


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a factory that opens a file and imports another, and a cache; started from another folder."""
    folder, elsewhere = tmp_path / "jobs", tmp_path / "elsewhere"
    folder.mkdir()
    elsewhere.mkdir()
    (folder / "kept_nets.py").write_text(CODE)
    (folder / "kept_parts.py").write_text("BIAS = 0\n")
    (folder / "seed.txt").write_text("5")
    monkeypatch.chdir(elsewhere)
    monkeypatch.setenv("RISKFORGE_CACHE", str(tmp_path / "cache"))
    # That of the processes that the tests start; a check goes by it.
    monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
    monkeypatch.setattr(program_description, "_KNOWN", {})
    monkeypatch.setattr(factories, "_FOLDERS", [])
    monkeypatch.setattr(sys, "path", [*sys.path])
    # A process of pytest has imported all of the tests, which are no modules of a user.
    monkeypatch.setattr(factory_files, "is_installed", is_installed_or_ours)
    monkeypatch.setattr(factory_files, "_is_of_library", is_of_library_or_ours)
    # As in a process that starts after the files were written.
    monkeypatch.setattr(factory_files, "_STARTED", float("inf"))
    factories.add_import_folders([str(elsewhere), str(folder)])
    yield folder
    for name in ("kept_nets", "kept_parts"):
        sys.modules.pop(name, None)


def described(program: str = "kept_nets:net") -> tuple[str, int]:
    """Digest of a factory as a new process sees it, and how often its function was called for that."""
    for name in ("kept_nets", "kept_parts"):
        sys.modules.pop(name, None)
    program_description._KNOWN.clear()
    digest = model_digest(program)
    module = sys.modules.get("kept_nets")
    return digest, len(module.CALLS) if module else 0


def entry(home: Path) -> Path:
    (path,) = (home.parent / "cache/factories").iterdir()
    return path


def test_a_factory_is_called_again_only_where_something_has_changed(home: Path) -> None:
    """Its file, a module next to it, a file that it opens, by content; a job next to it is none of them."""
    first, num_calls = described()
    assert num_calls == 2 and described() == (first, 0)
    (home / "job.yaml").write_text("name: edited")
    assert described() == (first, 0)
    (home / "seed.txt").write_text("6")
    second = described()
    assert second[0] != first and second[1] == 2 and described() == (second[0], 0)
    (home / "seed.txt").write_text("5")
    assert described()[0] == first
    (home / "kept_parts.py").write_text("BIAS = 1000\n")
    assert described()[0] not in (first, second[0])
    (home / "kept_nets.py").write_text(CODE.replace("temperature=2.0", "temperature=3.25"))
    changed = described()
    assert changed[1] == 2 and program_description.program_temperature("kept_nets:net") == 3.25


def test_weights_next_to_a_factory_count_though_python_does_not_see_them_opened(home: Path) -> None:
    """safetensors opens files itself; and so do the variables and files that the code names."""
    (home / "new.safetensors").write_bytes(b"weights")
    assert described()[1] == 2 and described()[1] == 0
    (home / "new.safetensors").write_bytes(b"other")
    assert described()[1] == 2


def test_a_check_that_is_kept_needs_no_torch(home: Path) -> None:
    """Importing torch is most of what a check takes; in a process of its own."""
    digest, _ = described()
    code = (
        "import sys; from engine.models import factories, program_description as p, digests;"
        f" factories.add_import_folders([{str(home)!r}]); print(digests.model_digest('kept_nets:net'),"
        " p.program_untrainable('kept_nets:net') == '', 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.split() == [digest, "True", "False"]


@pytest.mark.parametrize(
    "kind", ["torn", "nested", "others' digest", "no settings", "writable", "link", "pipe", "list"]
)
def test_what_is_broken_or_of_others_is_not_believed(kind: str, home: Path) -> None:
    """The factory is called as if there were no file, and the file is replaced where it can be."""
    digest, _ = described()
    path = entry(home)
    data = path.read_bytes()
    document = json.loads(data)
    contents = {
        "torn": data[:200],
        "nested": b"[" * 100_000,
        "no digest": json.dumps(document | {"digest": "x" * 32}).encode(),
        "no settings": json.dumps(document | {"settings": {"labels": 3}}).encode(),
        "list": json.dumps(document | {"depends_on": []}).encode(),
    }
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "writable":
        path.chmod(0o666)
    else:
        path.unlink()
        other = home / "other.json"
        other.write_bytes(data)
        path.symlink_to(other) if kind == "link" else os.mkfifo(path)
    assert described() == (digest, 2) and described() == (digest, 0)
    assert path.stat().st_mode & 0o777 == 0o600 and not path.is_symlink()


def test_without_a_cache_folder_nothing_is_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty: switched off; a file in its place: as if there were none."""
    for place in ("", str(home / "seed.txt")):
        monkeypatch.setenv("RISKFORGE_CACHE", place)
        assert described()[1] == 2 and described()[1] == 2
    assert not (home.parent / "cache").exists()


def test_failures_and_changed_modules_are_not_kept(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mended factory works at once; a module that was edited after its import is not what its file says."""
    (home / "seed.txt").write_text("none")
    with pytest.raises(JobError, match="ValueError"):
        described()
    (home / "seed.txt").unlink()
    with pytest.raises(JobError, match=r"FileNotFoundError.*; files that it opens are looked up in '.*jobs'"):
        described()
    assert not (home.parent / "cache").exists()
    (home / "seed.txt").write_text("5")
    monkeypatch.setattr(factory_files, "_STARTED", 0.0)
    assert described()[1] == 2 and not (home.parent / "cache").exists()


def test_other_weights_than_were_checked_are_refused_once(home: Path) -> None:
    """Where something unseen decides the weights, a run must not have the digest of others."""
    described()
    check_unchanged("kept_nets:net", entry(home).read_text().split('"digest": "')[1][:32])
    with pytest.raises(JobError, match="give the command again"):
        check_unchanged("kept_nets:net", "0" * 32)
    check_unchanged("kept_nets:net", "0" * 32)


def test_writers_at_the_same_time_leave_a_whole_file(home: Path) -> None:
    """Every reader sees the document of one of them."""
    path = cache_file("factories", "shared")
    documents: list[dict[str, Any]] = [{"writer": number, "text": str(number) * 50_000} for number in range(4)]
    write_cached(path, documents[0])
    threads = [
        threading.Thread(target=lambda one=one: [write_cached(path, one) for _ in range(40)]) for one in documents
    ]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        assert read_cached(path) in documents
    assert path is not None and [file.name for file in path.parent.iterdir()] == [path.name]


def test_files_are_found_next_to_the_factory_then_the_job_then_in_the_working_folder(home: Path) -> None:
    """The same network from wherever the command is given; old jobs with files in the working folder go on."""
    beside, _ = described()
    (Path.cwd() / "seed.txt").write_text("6")
    assert described()[0] == beside and Path.cwd().name == "elsewhere"
    (home / "seed.txt").unlink()
    there = described()
    assert there[0] != beside and described() == (there[0], 0)
    package = home / "kept_package"
    package.mkdir()
    (package / "nets.py").write_text(CODE)
    (home / "seed.txt").write_text("5")
    assert factories.working_folders("kept_package.nets:net")[:2] == [package, home]
    importlike = described("kept_package.nets:net")[0]
    (package / "seed.txt").write_text("6")
    sys.modules.pop("kept_package.nets", None)
    assert described("kept_package.nets:net")[0] != importlike


def test_a_run_does_not_say_where_code_is_but_the_user_s_cache_does(home: Path) -> None:
    """`retrain RUN` from anywhere finds the factory of a run that was made here."""
    keep_import_folders("/runs/mine")
    assert kept_import_folders("/runs/mine") == [Path.cwd(), home] and kept_import_folders("/runs/others") == []
