"""The commit: one record for a shard, whole files behind it, whoever dies or races at whatever instant."""

from __future__ import annotations

import dataclasses
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import hypothesis
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from engine.data.run.commit_packs import MERGE_BELOW_BYTES, MERGE_PACKS, PACKS, packs_to_merge
from engine.data.run.commit_record import COMMITS, CommitRecord
from engine.data.run.commits import (
    CommitPacker,
    compact_commits,
    inspect_records,
    list_commits,
    read_commit,
    read_commits,
)
from engine.data.run.counts import ShardCounts, parse_record_name, record_name
from engine.data.run.resume import open_output
from engine.data.run.shards import inspect_pair
from engine.data.stores.base import STAGING, TORN, Store
from engine.data.stores.folder import FolderStore
from engine.data.stores.opening import open_store
from engine.errors import CorruptShardError
from engine.job.plan import Plan
from tests.run_cases import commit_one, commit_rest, open_case, run_processes, tar_bytes


def assert_whole(store: Store, plan: Plan) -> None:
    """Every shard has exactly one record, and its files are what the record says and belong together."""
    names = store.list(COMMITS)
    assert [parse_record_name(Path(name).name)[0] for name in names] == list(range(plan.num_shards))  # type: ignore[index]
    for record in read_commits(store):
        tar, parquet, *others = map(store.path, record.files)
        files = inspect_pair(tar, parquet, dict(zip(record.companions, others, strict=True)))
        assert {kind: one.facts for kind, one in files.companions.items()} == record.companions
        assert (files.tar_sha256, files.tar_md5, files.tar_bytes) == (
            record.tar_sha256,
            record.tar_md5,
            record.tar_bytes,
        )
        assert (files.parquet_sha256, files.parquet_bytes) == (record.parquet_sha256, record.parquet_bytes)
        assert files.counts == record.counts


def test_commit_and_read_back(tmp_path: Path) -> None:
    store, plan, _ = open_case(tmp_path / "out")
    record = commit_one(store, plan, 1, attempt=2, worker="w7")
    assert read_commit(store, 1) == record and read_commit(store, 0) is None
    assert (record.attempt, record.worker, record.plan_digest) == (2, "w7", plan.digest)
    assert {number: one.counts for number, one in list_commits(store).items()} == {1: record.counts}
    assert record.counts == ShardCounts(ok=1, failed=1, accepted=1, accepted_per_class={"mix": 1})
    assert not [path for path in store.staging().iterdir() if path.is_dir()]


def test_a_record_of_damaged_bytes_is_reported(tmp_path: Path) -> None:
    """Also where they are no text."""
    store, plan, _ = open_case(tmp_path)
    record = commit_one(store, plan, 0)
    store.replace(record.file_name, b'{"shard": "\xff"}')
    for read in (lambda: read_commit(store, 0), lambda: list(read_commits(store))):
        with pytest.raises(CorruptShardError, match=r"not a commit record .* remove it to make the shard again"):
            read()


def test_screening_stays_with_its_record_and_old_records_have_none(tmp_path: Path) -> None:
    """A record of a version that did not screen reads as one without; packing keeps the rows."""
    store, plan, _ = open_case(tmp_path / "out", count=20)
    commit_rest(store, plan)
    record = read_commit(store, 0)
    assert record is not None and record.screening == []
    text = json.loads(record.to_json())
    assert text.pop("screening") == []
    store.replace(record.file_name, json.dumps(text).encode())
    assert read_commit(store, 0) == record
    screened = dataclasses.replace(record, screening=[[3, 4, 4, 17]])
    store.replace(record.file_name, screened.to_json().encode())
    assert compact_commits(store, max_loose=0) == plan.num_shards
    assert read_commit(store, 0) == screened


def test_a_second_commit_of_the_same_shard_changes_nothing(tmp_path: Path) -> None:
    """A late worker gets the first one's record, and no published byte changes."""
    store, plan, _ = open_case(tmp_path / "out")
    first = commit_one(store, plan, 0)
    before = {name: store.read(name) for name in store.list("shards")}
    assert commit_one(store, plan, 0, attempt=2, worker="late") == first
    assert commit_one(store, plan, 0, attempt=3, noise=1) == first
    assert {name: store.read(name) for name in store.list("shards")} == before
    assert_whole(store, Plan(plan.requests, plan.identity, ((dataclasses.replace(plan.stages[0][0], stop=4),),)))


PAIR = ("shards/demo-000000.tar", "shards/demo-000000.parquet")
ALL = (*PAIR, "starts/demo-000000.tar", "twins/demo-000000.tar")


@pytest.mark.parametrize("noise", [0, 1])
@pytest.mark.parametrize(
    "there, kept",
    [(PAIR, PAIR[:1]), (PAIR, PAIR[1:]), (PAIR, PAIR), (ALL, PAIR), (ALL, ALL[:3]), (ALL, ALL[3:]), (ALL, ALL)],
    ids=["tar", "parquet", "pair", "no companions", "no twins", "twins", "all"],
)
def test_files_without_a_record(tmp_path: Path, there: tuple[str, ...], kept: tuple[str, ...], noise: int) -> None:
    """Left by a worker that was killed before its record: a whole set is adopted; half of another try is not.

    With `noise` the next try gives other scores, as on a GPU: then the tar of one and the parquet of the other are
    each whole and still must not be paired.
    """
    paired = there == ALL
    store, plan, _ = open_case(tmp_path / "out", paired=paired)
    first = commit_one(store, plan, 0, worker="dead")
    assert tuple(first.files) == there
    before = tar_bytes(store)
    store.remove(first.file_name)
    for name in set(there) - set(kept):
        store.remove(name)
    second = commit_one(store, plan, 0, attempt=2, worker="next", noise=noise)
    adopted = kept == there or (PAIR[1] in kept and not noise)
    assert (second.worker, second.attempt) == (("dead", 1) if adopted else ("next", 2))
    assert (tar_bytes(store) == before) == (adopted or not noise)
    assert bool(store.list(TORN)) == bool(noise and not adopted)
    commit_rest(store, plan)
    assert_whole(store, plan)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("damage", ["cut", "empty", "garbage", "other shard"])
def test_torn_files_without_a_record_are_moved_aside(tmp_path: Path, name: str, damage: str) -> None:
    store, plan, _ = open_case(tmp_path / "out", paired=name not in PAIR)
    commit_one(store, plan, 1)
    whole = store.read(name.replace("000000", "000001"))
    torn = {"cut": whole[: len(whole) // 2], "empty": b"", "garbage": b"x" * 20480, "other shard": whole}[damage]
    store.publish(name, torn)
    commit_rest(store, plan)
    assert_whole(store, plan)
    assert torn in [store.read(name) for name in store.list(TORN)]


def test_a_committed_file_that_is_damaged_is_reported_not_replaced(tmp_path: Path) -> None:
    store, plan, _ = open_case(tmp_path / "out")
    commit_one(store, plan, 0)
    path = store.path("shards/demo-000000.tar")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(CorruptShardError, match=r"demo-000000\.tar: is not the file that was committed"):
        commit_one(store, plan, 0, attempt=2)
    path.unlink()
    with pytest.raises(CorruptShardError, match=r"demo-000000\.tar: is missing, but shard 0 is committed"):
        commit_one(store, plan, 0, attempt=2, noise=1)
    assert not path.exists(), "a file of another attempt in its place"
    assert commit_one(store, plan, 0, attempt=2) == read_commit(store, 0)
    assert_whole(store, Plan(plan.requests, plan.identity, ((dataclasses.replace(plan.stages[0][0], stop=4),),)))


def test_committed_files_that_another_attempt_replaced_are_refused(tmp_path: Path) -> None:
    """Files that are equal to the staged ones are not the committed ones all the same."""
    other, plan, _ = open_case(tmp_path / "other")
    commit_one(other, plan, 0, noise=1)
    store, plan, _ = open_case(tmp_path / "out")
    commit_one(store, plan, 0)
    for name in other.list("shards"):
        store.replace(name, other.read(name))
    with pytest.raises(CorruptShardError, match=r"demo-000000\.tar: is not the file that was committed"):
        commit_one(store, plan, 0, attempt=2, noise=1)


def test_two_records_for_one_shard_are_refused(tmp_path: Path) -> None:
    store, plan, _ = open_case(tmp_path / "out")
    record = commit_one(store, plan, 0)
    other = dataclasses.replace(record, counts=ShardCounts(ok=3, failed=1))
    store.publish(other.file_name, other.to_json().encode())
    with pytest.raises(CorruptShardError, match="shard 0 has two records"):
        list_commits(store)


def test_an_unreadable_record_is_reported(tmp_path: Path) -> None:
    store, plan, _ = open_case(tmp_path / "out")
    record = commit_one(store, plan, 0)
    store.replace(record.file_name, b"{}")
    with pytest.raises(CorruptShardError, match="not a commit record"):
        read_commit(store, 0)


MOMENTS = [
    *(("sample", count, False) for count in (2, 7)),
    # Links: 1 is the plan; then tar, parquet and record of each shard.
    *(("before-link", count, False) for count in (1, 2, 3, 4)),
    *(("after-link", count, False) for count in (2, 3, 4)),
    # With companions between parquet and record.
    *(("before-link", count, True) for count in (2, 3, 4, 5, 6)),
    *(("after-link", count, True) for count in (6,)),
]


def test_sigkill_at_any_instant_then_resume(tmp_path: Path) -> None:
    """Real processes die while staging and around each publish; the resumed run has the tars of an uninterrupted one.

    What a test within one process cannot see: nothing is flushed, no `finally` runs, locks end with their process.
    """
    whole = {}
    for paired in (False, True):
        whole_store, whole_plan, _ = open_case(tmp_path / f"whole-{paired}", paired=paired)
        commit_rest(whole_store, whole_plan)
        whole[paired] = tar_bytes(whole_store)
    outs = {moment: tmp_path / "-".join(map(str, moment)) for moment in MOMENTS}
    assert run_processes(*([("kill", outs[moment], *moment)] for moment in MOMENTS)) == [-9] * len(MOMENTS)
    for moment, out in outs.items():
        store, plan, _ = open_case(out, paired=moment[2])
        done = len(list_commits(store))
        assert len(commit_rest(store, plan)) == plan.num_shards - done
        assert tar_bytes(store) == whole[moment[2]], moment
        assert_whole(store, plan)
        left = [name for name in store.list(STAGING) if not Path(name).name.startswith(str(os.getpid()))]
        assert left == [] and store.list(TORN) == [], moment


def test_two_processes_commit_the_same_shards_at_once(tmp_path: Path) -> None:
    """One record and one whole pair for each shard, also when the two disagree about the samples."""
    agree, differ, paired = tmp_path / "agree", tmp_path / "differ", tmp_path / "paired"
    stores = [open_case(out, count=16, paired=out == paired)[:2] for out in (agree, differ, paired)]
    racers = [
        [("race", out, noise, out == paired) for noise in (0, int(out != agree))] for out in (agree, differ, paired)
    ]
    assert run_processes(*racers) == [0] * 6
    for store, plan in stores:
        assert_whole(store, plan)
    assert stores[0][0].list(TORN) == []


def test_staging_of_the_living_is_kept(tmp_path: Path) -> None:
    """A second driver that opens the run must not pull the files from under a worker that is still staging."""
    store, plan, job = open_case(tmp_path / "out")
    mine = store.staging() / "half.tar"
    mine.write_bytes(b"half")
    dead = store.path(f"{STAGING}/123-dead")
    dead.mkdir()
    (dead / "half.tar").write_bytes(b"half")
    open_output(open_store(store.uri), plan, job, "auto", confirmed=False)
    assert mine.exists() and not dead.exists()


def test_packs_hold_what_was_loose(tmp_path: Path) -> None:
    """Packing changes no answer, also when it was interrupted before the loose records were removed."""
    store, plan, _ = open_case(tmp_path / "out", count=40)
    for number in (5, 0, 3, 9, 1):
        commit_one(store, plan, number)
    before, records = list_commits(store), list(read_commits(store))
    loose = {name: store.read(name) for name in store.list(COMMITS)}
    assert compact_commits(store) == 0 and compact_commits(store, max_loose=5) == 0
    assert compact_commits(store, max_loose=2) == 5
    assert store.list(COMMITS) == [] and len(store.list(PACKS)) == 1
    assert list_commits(store) == before and list(read_commits(store)) == records
    assert read_commit(store, 3) == records[2] and read_commit(store, 4) is None
    assert commit_one(store, plan, 3, attempt=2) == records[2], "a packed shard is still committed"
    for name, data in loose.items():
        store.publish(name, data)
    commit_one(store, plan, 2)
    assert compact_commits(store, max_loose=2) == 6
    assert [record.shard for record in read_commits(store)] == [0, 1, 2, 3, 5, 9]
    commit_rest(store, plan)
    assert sorted(list_commits(store)) == list(range(plan.num_shards))


def test_counts_that_do_not_fit_are_read_from_inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, plan, _ = open_case(tmp_path / "out")
    monkeypatch.setattr("engine.data.run.counts.MAX_NAME_CHARS", 60)
    record = commit_one(store, plan, 2)
    assert store.list(COMMITS) == [f"{COMMITS}/000002.ok=4.rejected=0.failed=0.accepted=4.many.json"]
    assert list_commits(store)[2].counts == record.counts
    assert compact_commits(store, max_loose=0) == 1
    assert list_commits(store)[2].counts == record.counts


def test_a_hundred_thousand_records_are_listed_in_a_second(tmp_path: Path) -> None:
    """Names only: no file is opened and nothing is asked of the disk for each record."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else tmp_path) as folder:
        store = open_store(folder)
        store.path(COMMITS).mkdir(parents=True)
        tails = [
            record_name(0, ShardCounts(ok=256, accepted=ok + mix, accepted_per_class={"003": ok, "mix": mix}))[6:]
            for ok in range(1, 33)
            for mix in range(1, 33)
        ]
        descriptor = os.open(store.path(COMMITS), os.O_RDONLY)
        for number in range(100_000):
            os.mknod(f"{number:06d}{tails[number % 1024]}", dir_fd=descriptor)
        os.close(descriptor)
        seconds = []
        for _ in range(2):
            started = time.process_time()
            listed = list_commits(store)
            seconds.append(time.process_time() - started)
    assert len(listed) == 100_000 and listed[99_999].counts.ok == 256
    assert min(seconds) < 4, seconds


def loose_record(number: int) -> CommitRecord:
    """A record that describes no files: what is tested is where it lies."""
    return CommitRecord(
        shard=number,
        name=f"a-{number:06d}",
        plan_digest="p",
        request=0,
        start=number,
        stop=number + 1,
        attempt=1,
        worker="w",
        counts=ShardCounts(ok=1, accepted=1, accepted_per_class={"000": 1}),
        tar_sha256="0" * 64,
        tar_md5="0" * 32,
        tar_bytes=3,
        parquet_sha256="0" * 64,
        parquet_bytes=5,
        timing={},
    )


class KilledError(Exception):
    """In place of a signal."""


class MortalStore(FolderStore):
    """A folder whose process dies before one of its changes."""

    lives = -1

    def publish(self, name: str, data: bytes | Path) -> bool:
        self._live()
        return super().publish(name, data)

    def remove(self, name: str) -> None:
        self._live()
        super().remove(name)

    def _live(self) -> None:
        self.lives -= 1
        if self.lives == 0:
            raise KilledError


class PackingRun(RuleBasedStateMachine):
    """Drivers of one run commit, pack, merge and die in any order; after each step every record is there once."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.drivers = [MortalStore(Path(self.folder.name)) for _ in range(2)]
        self.packers = [CommitPacker(driver, every=3) for driver in self.drivers]
        self.committed: set[int] = set()

    @rule(who=st.integers(0, 1), number=st.integers(0, 40), lives=st.integers(0, 6))
    def commit(self, who: int, number: int, lives: int) -> None:
        """A worker commits a shard, of which the driver hears, even twice; some drivers die of it."""
        record = loose_record(number)
        if number not in self.committed:
            self.drivers[1 - who].publish(record.file_name, record.to_json().encode())
            self.committed.add(number)
        self._may_die(who, lives, lambda: self.packers[who].add(record))

    @rule(who=st.integers(0, 1), lives=st.integers(0, 8), max_loose=st.integers(0, 3))
    def compact(self, who: int, lives: int, max_loose: int) -> None:
        """A driver starts, or closes the run."""
        self._may_die(who, lives, lambda: compact_commits(self.drivers[who], max_loose))

    def _may_die(self, who: int, lives: int, act: Callable[[], object]) -> None:
        self.drivers[who].lives = lives
        try:
            act()
        except KilledError:
            self.packers[who] = CommitPacker(self.drivers[who], every=3)
        self.drivers[who].lives = -1

    @invariant()
    def every_record_is_there_once(self) -> None:
        """Whatever anybody reads."""
        store = self.drivers[0]
        assert list_commits(store).keys() == self.committed
        assert [record.shard for record in read_commits(store)] == sorted(self.committed)
        assert sorted(number for number, _ in inspect_records(store)) == sorted(self.committed)

    def teardown(self) -> None:
        self.folder.cleanup()


def test_no_order_of_packing_merging_and_dying_loses_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("engine.data.run.commit_packs.MERGE_PACKS", 3)
    # Packs of two sizes: a pack of some records takes a kilobyte or two.
    monkeypatch.setattr("engine.data.run.commit_packs.MERGE_BELOW_BYTES", (1_700, 2_200))
    run_state_machine_as_test(
        PackingRun, settings=hypothesis.settings(max_examples=6, stateful_step_count=25, deadline=None)
    )


def test_a_pack_that_is_merged_while_it_is_read_stays_readable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Listed before, opened after: the reader lists again. Opened before: it reads what it has opened."""
    store = open_store(str(tmp_path))
    monkeypatch.setattr("engine.data.run.commit_packs.MERGE_PACKS", 3)
    packer = CommitPacker(store, every=2)
    for number in range(4):
        store.publish(loose_record(number).file_name, loose_record(number).to_json().encode())
        packer.add(loose_record(number))
    reading = read_commits(store)
    assert next(reading).shard == 0 and len(store.list(PACKS)) == 2
    listed = store.list(PACKS)
    for number in (4, 5):
        store.publish(loose_record(number).file_name, loose_record(number).to_json().encode())
        packer.add(loose_record(number))
    assert store.list(PACKS) == [f"{PACKS}/000003.parquet"] and not store.list(COMMITS)
    assert [record.shard for record in reading] == [1, 2, 3]
    real, lists = store.list, [listed]
    monkeypatch.setattr(store, "list", lambda folder="": lists.pop() if folder == PACKS and lists else real(folder))
    assert list(list_commits(store)) == list(range(6)) and not lists


@given(st.lists(st.integers(100, 3 * 10**7), max_size=60))
def test_few_packs_are_left_however_large_they_are(sizes: list[int]) -> None:
    """Merging ends, and a run of any length has at most nine packs of each size below ten megabytes."""
    packs = {f"{number:06d}": size for number, size in enumerate(sizes)}
    for number in range(1000, 1000 + len(sizes)):
        if not (names := packs_to_merge(packs)):
            break
        assert len(names) >= MERGE_PACKS
        packs[f"{number:06d}"] = sum(packs.pop(name) for name in names)
    assert not packs_to_merge(packs) and sum(packs.values()) == sum(sizes)
    for low, high in zip((0, *MERGE_BELOW_BYTES), MERGE_BELOW_BYTES, strict=False):
        assert sum(low <= size < high for size in packs.values()) < MERGE_PACKS
