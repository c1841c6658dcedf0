"""Companions of shards: what is written beside a tar, and every way in which it can be damaged, foreign or lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.data.run.commit_record import file_names, parse_record
from engine.data.run.commits import compact_commits, read_commit
from engine.data.run.companions import COMPANIONS, TarFacts
from engine.data.run.file_names import PLANS
from engine.data.run.presence import lost_files
from engine.data.run.recorded_files import recorded_files
from engine.data.run.repair import repair
from engine.data.run.resume import open_output
from engine.data.run.shard_writing import sample_members, tar_member
from engine.data.run.shards import MAX_SAMPLE_BYTES, inspect_pair, read_shard
from engine.data.run.verify import verify
from engine.data.stores.base import TORN, Store
from engine.data.stores.object_store import ObjectStore
from engine.data.stores.opening import open_store
from engine.errors import CorruptShardError, OutputError
from engine.job.plan import Plan
from engine.job.records import STARTS, TWINS
from tests.image_cases import header
from tests.run_cases import commit_one, commit_rest, make_job, make_plan, make_results, open_case, stage, tar_bytes

NAME = "demo-000000"
END = bytes(10240)
Sample = tuple[str, bytes, dict[str, Any]]


@pytest.fixture
def case(tmp_path: Path) -> tuple[Store, Plan]:
    """A run of four shards, of which the first two have companions."""
    store, plan, _ = open_case(tmp_path, paired=True)
    commit_rest(store, plan)
    return store, plan


def retold(path: Path, change: Callable[[list[Sample]], list[Sample]]) -> None:
    """Write a tar anew with other samples."""
    samples = change([(key, image, record) for key, image, record, _ in read_shard(path)])
    members = [
        tar_member(f"{key}{name.removeprefix(record['key'])}", data)
        for key, image, record in samples
        for name, data in sample_members(record, image, "png")
    ]
    path.chmod(0o644)
    path.write_bytes(b"".join(members) + END)


def told(**changes: Any) -> Callable[[list[Sample]], list[Sample]]:
    """The record of the first sample with other values."""
    return lambda samples: [(*samples[0][:2], samples[0][2] | changes), *samples[1:]]


# What another program may have made of a tar: samples changed, or all bytes; and what is said of it.
DAMAGES: dict[str, tuple[Callable[[list[Sample]], list[Sample]] | Callable[[bytes], bytes], str]] = {
    "a sample missing": (lambda samples: samples[1:], "is missing"),
    "another order": (lambda samples: samples[::-1], "is missing"),
    "a key of no sample": (
        lambda samples: [*samples, ("x-000-000-00000000", b"x", samples[0][2] | {"key": "x-000-000-00000000"})],
        "is not listed in demo-000000.parquet",
    ),
    "a sample of another kind": (told(method="boundary"), "contradicts its row in method"),
    "another start": (told(start_key="other"), "contradicts its row in start_key"),
    "another schema": (told(schema_version=3), "fields missing"),
    "cut": (lambda data: data[: len(data) // 2], "cut short"),
    "empty": (lambda data: b"", "cut short"),
    "a link": (lambda data: header("a.png", b"2", link="/etc/passwd") + data, "not a plain file"),
    "a huge member": (lambda data: header("a.png", size=MAX_SAMPLE_BYTES + 1) + data, "cut short"),
    "a foreign name": (lambda data: tar_member("../../etc/x.exe", b"x") + data, "where an image should be"),
}
TWIN_DAMAGES = {
    "another risk": (told(risk=0.25), "contradicts its row in risk"),
    "another seed": (told(seed=1), "contradicts its row in seed"),
    "a twin of a twin": (told(twin_key=f"{NAME}-x"), "contradicts its row in twin_key"),
}
START_DAMAGES = {
    "a class that was not asked for": (told(class_index=0, class_name="zero"), "contradicts its row in class_index"),
    "a scored start": (told(scored=True), "contradicts its row in scored"),
}
CASES = [
    *((kind, name, *damage) for kind in COMPANIONS for name, damage in DAMAGES.items()),
    *((TWINS, name, *damage) for name, damage in TWIN_DAMAGES.items()),
    *((STARTS, name, *damage) for name, damage in START_DAMAGES.items()),
]


def damaged(path: Path, name: str, change: Any) -> None:
    if name in ("cut", "empty", "a link", "a huge member", "a foreign name"):
        path.chmod(0o644)
        path.write_bytes(change(path.read_bytes()))
    else:
        retold(path, change)


@pytest.mark.parametrize(("kind", "name", "change", "text"), CASES, ids=[f"{kind} {name}" for kind, name, *_ in CASES])
def test_a_companion_that_contradicts_its_shard_is_refused(
    tmp_path: Path, kind: str, name: str, change: Any, text: str
) -> None:
    """By the guarded readers, with the file's name; whatever a record says of its checksum."""
    store, plan, _ = open_case(tmp_path, paired=True)
    staged = stage(store, plan, 0)
    paths = {kind: companion.path for kind, companion in staged.companions.items()}
    assert inspect_pair(staged.tar, staged.parquet, paths) == staged
    damaged(paths[kind], name, change)
    with pytest.raises(CorruptShardError, match=text) as caught:
        inspect_pair(staged.tar, staged.parquet, paths)
    assert paths[kind].name in str(caught.value)


@pytest.mark.parametrize("kind", COMPANIONS)
@pytest.mark.parametrize("damage", ["missing", "cut", "foreign", "other image", "folder"])
def test_verify_finds_a_damaged_companion_and_repair_mends_it(case: Any, kind: str, damage: str) -> None:
    store, plan = case
    before, path = tar_bytes(store), store.path(f"{kind}/{NAME}.tar")
    if damage in ("missing", "folder"):
        path.unlink()
    if damage == "folder":
        path.mkdir()
    elif damage == "cut":
        path.chmod(0o644)
        path.write_bytes(before[f"{kind}/{NAME}.tar"][:-512])
    elif damage == "foreign":
        path.chmod(0o644)
        path.write_bytes(before[f"{kind}/demo-000001.tar"])
    elif damage == "other image":
        retold(path, lambda samples: [(samples[0][0], b"\x89PNG other", samples[0][2]), *samples[1:]])
    [finding] = verify(store).damage
    assert finding.shard == 0 and f"{kind}/{NAME}.tar" in finding.text
    assert repair(store).to_make == (0,)
    assert commit_rest(store, plan) == [0] and tar_bytes(store) == before and not verify(store).damage


@pytest.mark.parametrize("packed", [False, True])
def test_lost_companions_are_seen_by_listings(case: Any, packed: bool) -> None:
    """Missing or of another size, also where the records are packed; a run without companions has none to lose."""
    store, _ = case
    sizes = {name: size for folder in ("shards", *COMPANIONS) for name, size in store.sizes(folder).items()}
    assert compact_commits(store, max_loose=0 if packed else 100) == 4 * packed
    assert {name: size for _, name, size in recorded_files(store)} == sizes and len(sizes) == 4 * 2 + 2 * 2
    assert lost_files(store) == []
    store.remove(f"{STARTS}/{NAME}.tar")
    store.replace(f"{TWINS}/demo-000001.tar", b"x")
    assert lost_files(store) == [
        f"{STARTS}/{NAME}.tar: is missing, but shard 0 is committed",
        f"{TWINS}/demo-000001.tar: has 1 bytes, but {sizes['twins/demo-000001.tar']} were committed as shard 1",
    ]


def test_a_record_has_companions_only_where_there_are_some(case: Any) -> None:
    """What an earlier version wrote is read; what one would refuse is written only where it is needed."""
    store, _ = case
    paired, plain = read_commit(store, 0), read_commit(store, 3)
    assert paired is not None and plain is not None
    assert list(paired.companions) == list(COMPANIONS) and "companions" not in json.loads(plain.to_json())
    assert list(paired.files) == file_names(NAME, COMPANIONS)
    for record in (paired, plain):
        assert parse_record("x", record.to_json()) == record


@pytest.mark.parametrize(
    "companions",
    [{"others": {}}, {"twins": {}}, [], {"twins": {"sha256": 1, "md5": "", "bytes": 1}}]
    + [{"twins": {"sha256": "", "md5": "", "bytes": size}} for size in (-1, True, "1", 1.5)],
)
def test_a_record_with_odd_companions_is_refused(case: Any, companions: Any) -> None:
    record = json.loads(read_commit(case[0], 0).to_json()) | {"companions": companions}
    with pytest.raises(CorruptShardError, match="not a commit record"):
        parse_record("x", json.dumps(record))


@pytest.mark.parametrize("number", [0, 3])
def test_a_record_lists_the_companions_of_its_request(case: Any, number: int) -> None:
    """No fewer and no others: a tar that nothing names would never be checked."""
    store, _ = case
    record = read_commit(store, number)
    facts = TarFacts(sha256="", md5="", bytes=0)
    others = {} if record.companions else {TWINS: facts}
    store.publish(f"{TWINS}/demo-000003.tar", END)
    store.replace(record.file_name, replace(record, companions=others).to_json().encode())
    [finding] = verify(store).damage
    assert finding.shard == number and "beside its own, and its request has" in finding.text


def test_a_companion_of_a_whole_shard_that_was_lost_is_restored(case: Any) -> None:
    """By whoever makes the shard again byte for byte; other bytes are refused."""
    store, plan = case
    before = tar_bytes(store)
    store.remove(f"{TWINS}/{NAME}.tar")
    with pytest.raises(CorruptShardError, match=rf"{TWINS}/{NAME}\.tar: is missing, but shard 0 is committed"):
        commit_one(store, plan, 0, attempt=2, noise=1)
    # What the refused attempt had published at the vacant name is out of the way.
    [aside] = store.list(TORN)
    assert aside.startswith(f"{TORN}/{NAME}.tar.") and not store.exists(f"{TWINS}/{NAME}.tar")
    commit_one(store, plan, 0, attempt=2)
    assert tar_bytes(store) == before and store.list(TORN) == [aside]


def test_companions_without_a_record_are_unfinished(case: Any) -> None:
    """Whole ones are left to be adopted, others are moved away."""
    store, plan = case
    for number in (0, 1):
        store.remove(read_commit(store, number).file_name)
    for name in ("shards/demo-000001.tar", "shards/demo-000001.parquet", f"{STARTS}/demo-000001.tar"):
        store.remove(name)
    assert {finding.shard for finding in verify(store).findings if finding.shard is not None} == {0, 1}
    repair(store)
    assert store.exists(f"{TWINS}/{NAME}.tar") and not store.exists(f"{TWINS}/demo-000001.tar")
    assert commit_rest(store, plan) == [0, 1] and not verify(store).damage


@pytest.mark.parametrize("foreign", ["twins/notes.txt", "twins/other-000000.tar", "starts/demo-000000.parquet"])
def test_overwriting_removes_companions_and_nothing_else(case: Any, tmp_path: Path, foreign: str) -> None:
    store, _ = case
    store.publish(foreign, b"mine")
    job = make_job(tmp_path, seed=1)

    def overwritten() -> None:
        open_output(open_store(str(tmp_path)), make_plan(job), job, "overwrite", confirmed=True)

    with pytest.raises(OutputError, match=foreign):
        overwritten()
    assert store.exists(f"{TWINS}/{NAME}.tar")
    store.remove(foreign)
    overwritten()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["_state"] and store.list(PLANS)


def test_a_folder_of_companions_makes_no_run(tmp_path: Path) -> None:
    (tmp_path / TWINS).mkdir()
    (tmp_path / TWINS / "mine.tar").write_bytes(b"x")
    with pytest.raises(OutputError, match="'twins'"):
        open_case(tmp_path, paired=True)


def test_a_bucket_has_companions_too(case: Any, s3_store: ObjectStore) -> None:
    """The same bytes; what is lost is seen by listings, taken out and made again."""
    store, plan, _ = open_case(s3_store.uri, paired=True)
    commit_rest(store, plan)
    assert tar_bytes(store) == tar_bytes(case[0]) and not verify(store).damage
    store.remove(f"{TWINS}/{NAME}.tar")
    assert lost_files(store) == [f"{TWINS}/{NAME}.tar: is missing, but shard 0 is committed"]
    assert repair(store).to_make == (0,) and commit_rest(store, plan) == [0]
    assert tar_bytes(store) == tar_bytes(case[0]) and not verify(store).damage


@pytest.mark.parametrize("change", [{"twin_key": ""}, {"start_key": ""}])
def test_a_row_and_its_companions_are_written_together(tmp_path: Path, change: dict[str, str]) -> None:
    """A second image that the row does not name is a fault of the program, and leaves nothing behind."""
    store, plan, _ = open_case(tmp_path, paired=True)
    results = list(make_results(plan, plan.shard(0)))
    results[0].record |= change
    with pytest.raises(ValueError, match="contradict each other"):
        stage(store, plan, 0, iter(results))
    assert not [path for path in store.staging().iterdir() if path.is_dir()]
