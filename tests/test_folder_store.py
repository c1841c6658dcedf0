"""The store of a folder: locks, publishing, errors of the disk, staging."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from engine.data.run.commits import list_commits
from engine.data.stores.base import LOCKS, STAGING
from engine.data.stores.opening import open_store
from engine.errors import OutputError
from tests.conftest import REPOSITORY
from tests.run_cases import commit_rest, open_case


def test_a_lock_is_held_by_one_and_dies_with_its_process(tmp_path: Path) -> None:
    """The holder is reported; after SIGKILL it is free, whatever its file says; a regular end leaves no file."""
    program = (
        "import sys, time; from engine.data.stores.opening import open_store\n"
        "with open_store(sys.argv[1]).try_lock('driver', 'the first') as holder:\n"
        "    print(repr(holder), flush=True); time.sleep(3600)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True
    )
    store = open_store(str(tmp_path))
    assert process.stdout is not None and process.stdout.readline() == "''\n"
    with store.try_lock("driver", "the second") as holder:
        assert holder == "the first"
    process.kill()
    process.wait()
    assert (tmp_path / LOCKS / "driver").exists()
    with store.try_lock("driver", "the second") as holder:
        assert holder == ""
        with store.try_lock("driver", "the third") as other:
            assert other == "the second"
    assert not (tmp_path / LOCKS / "driver").exists()


@pytest.mark.parametrize("name", ["../x", "/etc/x", "shards/../../x"])
def test_names_do_not_lead_out_of_the_store(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="inside the store"):
        open_store(str(tmp_path)).publish(name, b"")


def test_publish_never_overwrites(tmp_path: Path) -> None:
    store = open_store(str(tmp_path / "out"))
    outside = tmp_path / "outside"
    outside.write_bytes(b"first")
    assert store.publish("a/b", outside) and not store.publish("a/b", b"second")
    assert store.read("a/b") == b"first" and outside.exists()
    store.replace("a/b", b"third")
    assert store.read("a/b") == b"third"
    assert store.list("a") == ["a/b"] and store.list("nowhere") == []
    assert list(store.staging().iterdir()) == []


def test_bytes_are_on_the_disk_before_their_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a power cut a published file is whole: its bytes are synced, then linked, then the folder is synced."""
    store, calls, sync, link = open_store(str(tmp_path)), list[str](), os.fsync, os.link
    (tmp_path / "outside").write_bytes(b"data")
    (store.staging() / "staged").write_bytes(b"data")

    def synced(descriptor: int) -> None:
        calls.append("folder" if Path(f"/proc/self/fd/{descriptor}").is_dir() else "bytes")
        sync(descriptor)

    def linked(*paths: Path) -> None:
        calls.append("name")
        link(*paths)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "link", linked)
    (tmp_path / "a").mkdir()
    for number, data in enumerate((b"data", tmp_path / "outside", store.staging() / "staged")):
        calls.clear()
        assert store.publish(f"a/{number}", data) and calls == ["bytes", "name", "folder"]
    calls.clear()
    store.replace("a/0", b"other")
    assert calls == ["bytes", "folder"]


@pytest.mark.parametrize(
    ("number", "words"),
    [(errno.ENOSPC, "disk is full"), (errno.EROFS, "read-only"), (errno.EPERM, "hard links"), (errno.EIO, "error")],
)
def test_what_the_disk_refuses_is_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
) -> None:
    """Path and remedy, and nothing half written is left."""
    store, plan, _ = open_case(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        with pytest.raises(OutputError, match=words) as caught:
            commit_rest(store, plan)
    assert "demo-000000.tar" in str(caught.value)
    assert list_commits(store) == {} and store.list("shards") == []
    assert len(commit_rest(store, plan)) == plan.num_shards


def test_a_file_size_limit_is_explained(tmp_path: Path) -> None:
    """A real refusal by the kernel in the middle of a tar, not a patched call."""
    program = (
        "import resource, signal, sys; from pathlib import Path\n"
        "from engine.data.run.shard_writing import stage_shard\n"
        "from tests.run_cases import *\n"
        "plan = make_plan(make_job(Path(sys.argv[1])))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (3000, 3000))\n"
        "try: stage_shard(Path(sys.argv[1]), 'demo-000000', make_results(plan, plan.shard(0)), 'png')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = _python(program, tmp_path)
    assert done.stdout.startswith("OutputError") and "samples_per_shard" in done.stdout, done
    assert list(tmp_path.iterdir()) == []


def test_a_folder_without_permission_is_explained(tmp_path: Path) -> None:
    """As an ordinary user, which the tests may not be."""
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    for parent in (folder, *folder.parents):
        if parent != Path("/tmp") and parent.is_relative_to("/tmp"):
            parent.chmod(0o555 if parent == folder else 0o755)
    program = (
        "import os, sys; from pathlib import Path\n"
        "from tests.run_cases import *\n"
        "if os.getuid() == 0: os.setuid(65534)\n"
        "try: open_case(Path(sys.argv[1]) / 'locked')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = _python(program, tmp_path)
    assert done.stdout.startswith("OutputError") and "no permission" in done.stdout, done
    assert str(folder) in done.stdout


def _python(program: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program, *map(str, arguments)]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=400, check=False)


def test_a_regular_end_leaves_nothing_in_staging(tmp_path: Path) -> None:
    program = "import sys; from tests.run_cases import *; commit_one(*open_case(Path(sys.argv[1]))[:2], 0)"
    done = _python(program, tmp_path)
    assert done.returncode == 0 and not done.stderr, done
    assert len(list_commits(open_store(str(tmp_path)))) == 1
    assert list((tmp_path / STAGING).iterdir()) == []
