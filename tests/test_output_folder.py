"""Where a run may be: what a path and a folder show, `plan --validate` and `run` report; nothing is written."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import yaml

from engine.data.run import output_folder
from engine.data.run.output_folder import _PARENTS, _SYSTEM_TREES, check_output
from engine.data.stores.opening import open_store
from engine.errors import OutputError
from tests.run_cases import commit_one, open_case

JOB = {
    "name": "a",
    "models": {
        "diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip", "target": "zoo:digits/classifier",
    },
    "requests": [{"name": "r", "method": "prompt", "classes": "all", "count": 1}],
}  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A home folder."""
    folder = tmp_path / "people/me"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(folder))
    return folder


SYSTEM = [*_PARENTS, *_SYSTEM_TREES, "/etc/", "/etc/riskforge", "/usr/bin/x", "/proc/1/x", "/../etc", "/tmp/../etc/x"]


@pytest.mark.parametrize("uri", [*SYSTEM, *(f"file://{one}" for one in SYSTEM[:20])])
def test_folders_of_the_system_are_refused(uri):
    """Wherever they are named, there or not, with dots, with a scheme; whoever the user is."""
    with pytest.raises(OutputError, match=r"^output .*; choose another --output"):
        check_output(open_store(uri))


def test_ways_into_them_are_refused(tmp_path):
    """A link to one, a link above."""
    (tmp_path / "link").symlink_to("/etc")
    for uri in (tmp_path / "link", tmp_path / "link/x"):
        with pytest.raises(OutputError, match="part of the operating system"):
            check_output(open_store(str(uri)))


def test_the_working_folder_of_a_submitted_job_is_refused(tmp_path, monkeypatch):
    """Ray unpacks `--working-dir` there on one machine, and removes it: where relative paths lead a submitted job."""
    folder = tmp_path / "session_1/runtime_resources/working_dir_files/_ray_pkg_1"
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    for uri in ("runs/x", ".", str(folder)):
        with pytest.raises(OutputError, match="working folder of a submitted job"):
            check_output(open_store(uri))
    check_output(open_store(str(tmp_path / "runs/x")))


def test_homes_are_refused_and_what_is_in_them_is_not(home):
    """The home itself, as `~` too, and what holds it."""
    for uri in (str(home), "~", "~/", "~/.", str(home.parent), f"{home}/x/.."):
        with pytest.raises(OutputError, match="home folder"):
            check_output(open_store(uri))
    check_output(open_store("~/runs/x"))
    assert not (home / "runs").exists()


@pytest.mark.parametrize(
    "uri", ["/dev/shm/rf-x", "/var/tmp/rf-x", "/tmp/rf-x/y", "/usr/local/rf/x", "/opt/rf-x", "/rf-data/x"]
)
def test_places_of_users_are_taken(uri):
    """Nothing is made by looking."""
    check_output(open_store(uri))
    assert not Path(uri).exists()


def make_file(folder: Path) -> str:
    (folder / "out").write_text("x")
    return "is a file"


def make_below_a_file(folder: Path) -> str:
    (folder / "out").write_text("x")
    return "is a file, not a folder"


def make_full(folder: Path) -> str:
    (folder / "out/sub").mkdir(parents=True)
    return "holds files that are not of a run"


def make_hidden(folder: Path) -> str:
    (folder / "out").mkdir()
    (folder / "out/.git").write_text("x")
    return "holds files that are not of a run"


def make_export(folder: Path) -> str:
    (folder / "out").mkdir()
    (folder / "out/manifest.json").write_text('{"kind": "export"}')
    return "holds files that are not of a run"


KINDS = (make_file, make_below_a_file, make_full, make_hidden, make_export)


@pytest.mark.parametrize("make", KINDS)
@pytest.mark.parametrize("command", [("plan", "--validate"), ("run", "--executor", "local")])
def test_what_is_there_is_reported_before_anything_starts(tmp_path, call, make, command):
    """By both commands, with the remedy, code 2; the folder stays as it is."""
    reason = make(tmp_path)
    uri = tmp_path / ("out/x" if make is make_below_a_file else "out")
    path = tmp_path / "job.yaml"
    path.write_text(yaml.safe_dump(JOB | {"output": {"uri": str(uri)}}))
    before = sorted(tmp_path.rglob("*"))
    name, *options = command
    code, _, error = call(name, path, *options)
    assert code == 2 and reason in error and "--output" in error
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("is_read_only", [False, True])
def test_a_folder_that_cannot_be_written_to(tmp_path, monkeypatch, is_read_only):
    """The parent, the folder itself, the folder of a run that goes on; a finished run need not be written to."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    real = os.statvfs(tmp_path)
    flags = type("Flags", (), {"f_flag": real.f_flag | (os.ST_RDONLY if is_read_only else 0)})
    monkeypatch.setattr(output_folder.os, "statvfs", lambda path: flags)
    reason = "read-only" if is_read_only else "no permission"
    (tmp_path / "there").mkdir()
    for uri in ("there", "not/yet"):
        with pytest.raises(OutputError, match=reason):
            check_output(open_store(str(tmp_path / uri)))
    store, plan, _ = open_case(tmp_path / "run")
    with pytest.raises(OutputError, match=reason):
        check_output(store)
    for number in range(plan.num_shards):
        commit_one(store, plan, number)
    store.replace("_SUCCESS", b"x")
    check_output(store)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_real_folder_without_permission(tmp_path):
    """As the system says it."""
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    try:
        with pytest.raises(OutputError, match="no permission"):
            check_output(open_store(str(tmp_path / "x")))
    finally:
        tmp_path.chmod(stat.S_IRWXU)


def test_a_run_may_stay_where_it_is(tmp_path, monkeypatch):
    """One that earlier versions began in a folder that is refused now."""
    store, _, _ = open_case(tmp_path / "run")
    monkeypatch.setenv("HOME", str(tmp_path / "run"))
    check_output(store)


def test_object_stores_are_not_asked():
    """`plan --validate` needs no network."""
    check_output(open_store("s3://bucket/etc"))
