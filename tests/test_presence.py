"""A file of a run that is gone, empty or of another size: named or written again, never "all there"."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.data.run import commit_packs, commit_shard
from engine.data.run.commit_record import CommitRecord
from engine.data.run.commits import compact_commits
from engine.data.run.counts import ShardCounts, record_name
from engine.data.run.file_names import SUCCESS
from engine.data.run.presence import lost_files
from engine.data.run.recorded_files import recorded_files
from engine.data.stores.opening import open_store
from engine.driver.executors.local import LocalExecutor
from engine.errors import EXIT_OK, CorruptShardError
from tests.sleepy import run_sleepy, tars

COUNT = 1
CLOSING = (
    "metadata.parquet", "manifest.json", "README.md", "report.html", "shards/wids.json", "shards/_info.json",
    "shards/surplus.txt", SUCCESS,
)  # fmt: skip


def run(output: Path):
    return run_sleepy(output, COUNT, LocalExecutor(1))


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run of three shards."""
    output = tmp_path_factory.mktemp("runs") / "finished"
    assert run(output).exit_code == EXIT_OK
    return output


def copy(finished: Path, output: Path, state: str) -> Path:
    """A copy of the run: as it ended, or as it was before its last shard."""
    shutil.copytree(finished, output)
    if state == "unfinished":
        for name in (SUCCESS, "manifest.json", "metadata.parquet", "report.html", "README.md"):
            (output / name).unlink()
        for path in [*output.glob("shards/*000002.*"), *output.glob("_state/commits/000002.*")]:
            path.unlink()
    return output


def unlink(path: Path) -> None:
    path.unlink()


def empty(path: Path) -> None:
    path.write_bytes(b"")


def halve(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def lengthen(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0" * 512)


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def lead_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


def lead_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def make_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGES = (unlink, empty, halve, lengthen, make_folder, lead_nowhere, lead_to_itself, make_pipe)
CASES = [
    *itertools.product(("tar", "parquet"), ("finished", "unfinished"), DAMAGES[:2]),
    *itertools.product(("tar",), ("finished",), DAMAGES[2:]),
]


@pytest.mark.parametrize(("kind", "state", "damage"), CASES)
def test_a_lost_file_of_a_committed_shard_is_reported_and_made_again_after_repair(
    finished, tmp_path, call, kind, state, damage: Callable[[Path], None]
):
    """`run` ends without the marker, with shard, file and remedy; `status` says the same; the remedy works."""
    output = copy(finished, tmp_path / "run", state)
    name = f"shards/sleepy-000001.{kind}"
    damage(output / name)
    with pytest.raises(CorruptShardError) as caught:
        run(output)
    assert name in str(caught.value) and "shard 1" in str(caught.value)
    assert f"riskforge repair {output}" in str(caught.value)
    assert caught.value.exit_code == 2 and not (output / SUCCESS).exists()
    code, out, _ = call("status", output, "--json")
    found = json.loads(out)
    assert code == 0 and found["state"] == "damaged" and name in found["lost"][0]
    assert name in call("status", output)[1]
    assert call("repair", output)[0] == 0
    assert run(output).exit_code == EXIT_OK and (output / SUCCESS).exists()
    assert tars(output) == tars(finished)
    assert call("verify", output)[0] == 0


# The card ends with what it says last: half of one could be a text of the user.
REWRITTEN = [
    *itertools.product(CLOSING, [unlink]),
    *itertools.product(("README.md", SUCCESS), [empty]),
    *itertools.product(("metadata.parquet", "manifest.json", "report.html", "shards/wids.json"), [halve]),
    *itertools.product(("manifest.json", "shards/surplus.txt"), [make_pipe, lead_to_itself]),
]


@pytest.mark.parametrize(("name", "damage"), REWRITTEN)
def test_a_file_over_all_shards_is_written_again(finished, tmp_path, call, name, damage):
    """What is made from the shards needs no remedy but the same command."""
    output = copy(finished, tmp_path / "run", "finished")
    before = json.loads((finished / "manifest.json").read_text())
    damage(output / name)
    state = json.loads(call("status", output, "--json")[1])["state"]
    assert state == "stopped" and "riskforge run" in call("status", output)[1]
    is_data = name not in ("README.md", "report.html") and (name, damage) != (SUCCESS, unlink)
    code, out, _ = call("verify", output)
    assert code == is_data and (f"damage: {name}: is missing" in out) == is_data
    summary = run(output)
    assert summary.exit_code == EXIT_OK and not summary.was_complete
    assert (output / name).stat().st_size == pytest.approx((finished / name).stat().st_size, rel=0.2)
    assert call("verify", output)[0] == 0 and call("report", output)[0] == 0
    after = json.loads((output / "manifest.json").read_text())
    if name != "manifest.json":
        # What the machines were is not known any more when nothing is made.
        assert after["hardware"] == before["hardware"]
    assert run(output).was_complete


@pytest.mark.parametrize("state", ["finished", "unfinished"])
@pytest.mark.parametrize("damage", [unlink, halve])
@pytest.mark.parametrize("is_packed", [False, True])
def test_a_lost_record_is_reported_or_its_shard_committed_again(finished, tmp_path, call, state, damage, is_packed):
    """Without its record a shard is not committed: its files are adopted. A record that cannot be read is named."""
    output = copy(finished, tmp_path / "run", state)
    if is_packed:
        compact_commits(open_store(str(output)), max_loose=0)
    path = next(output.glob("_state/packs/*" if is_packed else "_state/commits/000001.*"))
    damage(path)
    if damage is unlink:
        assert run(output).exit_code == EXIT_OK and tars(output) == tars(finished)
        return
    with pytest.raises(CorruptShardError):
        run(output)
    if not is_packed:
        assert not (output / SUCCESS).exists()
        assert call("repair", output)[0] == 0
        assert run(output).exit_code == EXIT_OK and tars(output) == tars(finished)


def test_a_file_that_goes_during_the_run_leaves_no_marker(tmp_path, monkeypatch):
    """Lost between the first look and the end: the marker is the last word, so it looks again."""
    output, commit = tmp_path / "run", commit_shard.commit_shard

    def losing(store, *arguments, **options):
        record = commit(store, *arguments, **options)
        if record.shard == 2:
            (output / "shards/sleepy-000000.tar").unlink()
        return record

    monkeypatch.setattr("engine.generation.worker.commit_shard", losing)
    with pytest.raises(CorruptShardError, match=r"sleepy-000000\.tar: is missing"):
        run(output)
    assert not (output / SUCCESS).exists()


def test_packed_records_are_looked_through_without_being_parsed(tmp_path):
    """A million shards resume in seconds: 20,000 records in a pack take no longer than their names, some times over."""
    store = open_store(str(tmp_path))
    counts = ShardCounts(ok=1, rejected=0, failed=0, accepted=1, accepted_per_class={"000": 1})
    about = {"plan_digest": "p", "request": 0, "attempt": 1, "worker": "w", "counts": counts, "timing": {}}
    about |= {"tar_sha256": "0" * 64, "tar_md5": "0" * 32, "parquet_sha256": "0" * 64}
    records = [
        CommitRecord(shard=n, name=f"a-{n:06d}", start=n, stop=n + 1, tar_bytes=3, parquet_bytes=5, **about)
        for n in range(20_000)
    ]
    staged = store.staging() / "pack.parquet"
    commit_packs.write_pack(staged, ((record_name(one.shard, counts), one) for one in records))
    assert store.publish(f"{commit_packs.PACKS}/000000.parquet", staged)
    started = time.process_time()
    found = list(recorded_files(store))
    assert time.process_time() - started < 5
    assert found == [
        (one.shard, f"shards/{one.name}.{kind}", size) for one in records for kind, size in (("tar", 3), ("parquet", 5))
    ]
    assert len(lost_files(store)) == 40_000
