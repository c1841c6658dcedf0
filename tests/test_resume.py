"""Opening an output: continued, extended, emptied or refused; foreign files are never touched."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from engine.data.run.commits import list_commits
from engine.data.run.file_names import PLANS, SUCCESS
from engine.data.run.resume import open_output
from engine.data.run.stored_plan import read_run
from engine.data.stores.base import DRIVER_LOCK, STAGING, Store
from engine.data.stores.folder import FolderStore
from engine.data.stores.opening import open_store
from engine.errors import JobError, OutputError
from engine.job.plan import Plan
from tests.run_cases import commit_rest, make_job, make_plan, open_case, tar_bytes


def reopen(uri: Path, resume: str = "auto", confirmed: bool = False, **changes: object) -> Plan:
    """Open an output for a job as the command line would."""
    job = make_job(uri, **changes)  # type: ignore[arg-type]
    return open_output(open_store(str(uri)), make_plan(job), job, resume, confirmed)


def tree(folder: Path) -> dict[str, bytes]:
    """All files under a folder but those in the making."""
    files = {str(path.relative_to(folder)): path for path in folder.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in files.items() if not name.startswith(STAGING)}


def layout(plan: Plan) -> list[str]:
    return [sample.key for shard in plan.shards() for sample in plan.samples(shard)]


def test_a_new_output_is_made_with_its_parents(tmp_path: Path) -> None:
    store, plan, job = open_case(tmp_path / "a" / "b")
    stored = read_run(store)
    assert stored is not None and stored.digest == plan.digest and stored.stages == plan.stages
    assert stored.job == job.model_dump(mode="json")


def test_the_same_job_continues(tmp_path: Path) -> None:
    """Nothing is planned again; what `runtime` says may change; an own folder without a plan yet is taken up."""
    store, plan, _ = open_case(tmp_path)
    commit_rest(store, plan)
    store.publish(SUCCESS, b"")
    again = reopen(tmp_path, runtime={"workers": 3})
    assert again.stages == plan.stages and store.exists(SUCCESS)
    assert store.list(PLANS) == [f"{PLANS}/000000.json"]
    assert commit_rest(store, again) == []


def test_an_output_that_died_before_its_plan_is_new(tmp_path: Path) -> None:
    open_store(str(tmp_path)).staging()
    assert reopen(tmp_path, "never").num_shards == 4


def test_grown_counts_append_shards(tmp_path: Path) -> None:
    """Old shards keep their numbers and samples, new ones follow without a gap; the marker goes while work remains."""
    store, plan, _ = open_case(tmp_path, count=6)
    commit_rest(store, plan)
    store.publish(SUCCESS, b"")
    before = tar_bytes(store)
    grown = reopen(tmp_path, count=11)
    assert layout(grown)[: plan.num_samples] == layout(plan)
    assert sorted(layout(grown)) == sorted(layout(make_plan(make_job(tmp_path, count=11))))
    assert not store.exists(SUCCESS) and len(grown.stages) == 2
    assert commit_rest(store, grown) == [4, 5]
    assert tar_bytes(store).items() >= before.items()
    assert reopen(tmp_path, count=11).stages == grown.stages
    assert read_run(store).job["requests"][0]["count"] == 11  # type: ignore[union-attr]


def test_shrunk_counts_are_refused(tmp_path: Path) -> None:
    reopen(tmp_path, count=6)
    with pytest.raises(JobError, match=r"requests\.0\.count: 5 is below the 6"):
        reopen(tmp_path, count=5)


def test_another_plan_is_refused_with_the_difference(tmp_path: Path) -> None:
    """Every line names a field of the job with both values, and the remedies follow."""
    reopen(tmp_path)
    before = tree(tmp_path)
    with pytest.raises(OutputError) as caught:
        reopen(tmp_path, seed=7, sampling={"num_inference_steps": 12})
    lines = str(caught.value).splitlines()
    assert "  seed: 0 -> 7" in lines
    assert "  requests.0.sampling.num_inference_steps: 40 -> 12" in lines
    assert str(tmp_path) in lines[0] and "--resume overwrite --yes" in lines[-1] and "--output" in lines[-1]
    assert tree(tmp_path) == before


def test_a_long_difference_is_cut(tmp_path: Path) -> None:
    requests = [{"name": f"r{n}", "method": "prompt", "classes": "all", "count": 1} for n in range(30)]
    reopen(tmp_path, requests=requests)
    changed = [request | {"seed_group": "other"} for request in requests]
    with pytest.raises(OutputError, match="and 10 more differences"):
        reopen(tmp_path, requests=changed)


def test_never_wants_an_empty_output(tmp_path: Path) -> None:
    reopen(tmp_path, "never")
    with pytest.raises(OutputError, match=r"not empty.*--resume auto"):
        reopen(tmp_path, "never")
    other = tmp_path / "other"
    other.mkdir()
    (other / "x").touch()
    with pytest.raises(OutputError, match="not empty"):
        reopen(other, "never")


@pytest.mark.parametrize("resume", ["auto", "overwrite"])
def test_a_foreign_folder_is_refused(tmp_path: Path, resume: str) -> None:
    """Somebody's files without a plan of ours: named, with control characters escaped, and untouched."""
    (tmp_path / "thesis\x1b[2J.tex").write_text("years of work")
    (tmp_path / "shards").mkdir()
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=r"'shards', 'thesis\\x1b\[2J\.tex'"):
        reopen(tmp_path, resume, confirmed=True)
    assert tree(tmp_path) == before


def finished(folder: Path) -> Store:
    """An output with every kind of file that a run writes."""
    store, plan, _ = open_case(folder)
    commit_rest(store, plan)
    for name in ("metadata.parquet", "manifest.json", "README.md", "report.html", "_SUCCESS", "shards/wids.json"):
        store.publish(name, b"x")
    store.publish("_state/quarantine/000001.json", b"{}")
    return store


def test_overwrite_removes_what_the_run_wrote(tmp_path: Path) -> None:
    store = finished(tmp_path)
    with pytest.raises(OutputError, match=r"4 shards; add --yes"):
        reopen(tmp_path, "overwrite", seed=1)
    assert len(list_commits(store)) == 4
    plan = reopen(tmp_path, "overwrite", confirmed=True, seed=1)
    assert set(tree(tmp_path)) == {f"{PLANS}/000000.json"}
    assert read_run(store).digest == plan.digest  # type: ignore[union-attr]


def test_overwrite_keeps_the_lock_of_the_driver(tmp_path: Path) -> None:
    """Removed, another driver could take it while this one works."""
    finished(tmp_path)
    store = open_store(str(tmp_path))
    with store.try_lock(DRIVER_LOCK, "the first"):
        reopen(tmp_path, "overwrite", confirmed=True)
        with store.try_lock(DRIVER_LOCK, "the second") as holder:
            assert holder == "the first"


@pytest.mark.parametrize("foreign", ["notes.txt", "shards/photo.jpg", "shards/other-000000.tar", "sub/deep/file"])
def test_overwrite_keeps_its_hands_off_other_files(tmp_path: Path, foreign: str) -> None:
    finished(tmp_path)
    (tmp_path / foreign).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / foreign).write_bytes(b"mine")
    before = tree(tmp_path)
    with pytest.raises(OutputError, match=foreign.split("/deep")[0]):
        reopen(tmp_path, "overwrite", confirmed=True)
    assert tree(tmp_path) == before


def test_overwrite_does_not_follow_links_out_of_the_output(tmp_path: Path) -> None:
    treasure = tmp_path / "treasure"
    treasure.mkdir()
    (treasure / "gold").write_bytes(b"gold")
    finished(tmp_path / "out")
    (tmp_path / "out" / "_state" / "events").symlink_to(treasure)
    (tmp_path / "out" / "_state" / "quarantine" / "link").symlink_to(treasure / "gold")
    reopen(tmp_path / "out", "overwrite", confirmed=True)
    assert (treasure / "gold").read_bytes() == b"gold"


def test_overwrite_that_was_interrupted_is_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan goes last: at every instant the folder is still known as the run's own."""
    finished(tmp_path)
    removed = 0
    original = FolderStore.remove

    def remove(self: Store, name: str) -> None:
        nonlocal removed
        removed += 1
        if removed == 5:
            raise KeyboardInterrupt
        original(self, name)

    monkeypatch.setattr(FolderStore, "remove", remove)
    with pytest.raises(KeyboardInterrupt):
        reopen(tmp_path, "overwrite", confirmed=True, seed=1)
    assert not (tmp_path / SUCCESS).exists()
    reopen(tmp_path, "overwrite", confirmed=True, seed=1)
    assert set(tree(tmp_path)) == {f"{PLANS}/000000.json"}


def test_two_drivers_that_begin_at_once_agree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The slower one finds a plan where it saw none: it continues it, or refuses its own."""
    original = FolderStore.publish

    def publish(self: Store, name: str, data: bytes | Path) -> bool:
        if name.startswith(PLANS):
            monkeypatch.setattr(FolderStore, "publish", original)
            reopen(tmp_path)
        return original(self, name, data)

    monkeypatch.setattr(FolderStore, "publish", publish)
    assert reopen(tmp_path, count=9).stages[0][0].stop == 6
    assert len(read_run(open_store(str(tmp_path))).stages) == 2  # type: ignore[union-attr]


def test_a_damaged_plan_is_reported(tmp_path: Path) -> None:
    reopen(tmp_path)
    for bad in (b"{", b"[]", b'{"plan_version": 99}'):
        (tmp_path / PLANS / "000000.json").write_bytes(bad)
        with pytest.raises(OutputError, match=r"000000\.json: cannot be read as the plan"):
            reopen(tmp_path)


def test_dead_staging_is_cleaned_when_a_run_is_opened(tmp_path: Path) -> None:
    store, _, _ = open_case(tmp_path)
    dead = store.path(STAGING) / "77-dead"
    dead.mkdir(parents=True)
    (dead / "demo-000000.tar").write_bytes(b"half")
    Path(f"{dead}.lock").touch()
    (store.path(STAGING) / "stray.tmp").touch()
    reopen(tmp_path)
    left = {Path(name).name.split("-")[0] for name in store.list(STAGING)}
    assert left <= {str(os.getpid())}
