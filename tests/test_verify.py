"""Verify, repair and status on real runs with real damage: what is broken is found, taken out, and made again."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import sys

import pytest

from engine.data.run.commit_record import COMMITS
from engine.data.run.commit_shard import commit_shard
from engine.data.run.commits import compact_commits, forget_commit, list_commits, read_commit
from engine.data.run.counts import ShardCounts
from engine.data.run.repair import repair
from engine.data.run.shard_writing import stage_shard
from engine.data.run.shards import shard_name
from engine.data.run.verify import check_samples, check_shard, verify
from engine.data.stores.base import TORN
from engine.data.stores.lease import hold
from engine.data.stores.opening import open_store
from engine.driver.executors.local import LocalExecutor
from engine.driver.status import read_status, status_lines
from engine.errors import EXIT_DAMAGED, EXIT_OK, CorruptShardError, OutputError, RiskforgeError
from tests.run_cases import commit_rest, make_job, make_plan, make_results, open_case
from tests.sleepy import Faults, run_sleepy, tars


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A finished run of five shards."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    assert run_sleepy(output, 2, LocalExecutor(1)).exit_code == EXIT_OK
    return output


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of it to break."""
    return shutil.copytree(whole, tmp_path / "copy")


def flip(path, at: int) -> None:
    """Change a bit."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def damage_member(output):
    flip(output / "shards/sleepy-000001.tar", 560)


def damage_padding(output):
    """Only the checksum sees it."""
    flip(output / "shards/sleepy-000001.tar", -1)


def damage_parquet(output):
    path = output / "shards/sleepy-000001.parquet"
    flip(path, path.stat().st_size // 2)


def damage_writer(output):
    """Of the parquet, too, the checksum alone sees what no reader looks at: the name of the program that wrote it."""
    path = output / "shards/sleepy-000001.parquet"
    content = path.read_bytes()
    assert content.count(b"parquet-cpp-arrow") == 1
    path.write_bytes(content.replace(b"parquet-cpp-arrow", b"parquet-cpp-Arrow"))


def damage_cut(output):
    path = output / "shards/sleepy-000001.tar"
    path.write_bytes(path.read_bytes()[:-4096])


def damage_missing(output):
    (output / "shards/sleepy-000001.parquet").unlink()


def damage_swapped(output):
    """Both files of another shard: whole, and not this shard's."""
    for kind in ("tar", "parquet"):
        shutil.copy(output / f"shards/sleepy-000002.{kind}", output / f"shards/sleepy-000001.{kind}")


def damage_record(output):
    [path] = (output / COMMITS).glob("000001.*")
    path.write_text(path.read_text()[:50])


def damage_counts(output):
    """A record whose name has other counts."""
    [path] = (output / COMMITS).glob("000001.*")
    path.rename(path.with_name(path.name.replace("ok=4", "ok=3")))


def damage_doubled(output):
    """Two records for one shard."""
    [path] = (output / COMMITS).glob("000001.*")
    shutil.copy(path, path.with_name(path.name.replace("ok=4", "ok=3")))


DAMAGES = [
    damage_member, damage_padding, damage_parquet, damage_writer, damage_cut, damage_missing, damage_swapped,
    damage_record, damage_counts, damage_doubled,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda one: one.__name__)
@pytest.mark.parametrize("is_packed", [False, True], ids=["loose", "packed"])
def test_damage_is_found_taken_out_and_made_again(copy, whole, damage, is_packed):
    """Whatever is broken: the shard is named, nothing else is touched, and the next run gives the clean bytes."""
    store = open_store(str(copy))
    if is_packed:
        if damage in (damage_record, damage_counts, damage_doubled):
            pytest.skip("a pack is one file")
        compact_commits(store, max_loose=0)
    damage(copy)
    before = {path.name: path.read_bytes() for path in copy.glob("shards/sleepy-00000[0234].*")}
    found = verify(store).damage
    assert {one.shard for one in found} == {1} and verify(store).damage == found
    with hold(store):
        assert repair(store).to_make == (1,)
    assert not (copy / "_SUCCESS").exists() and sorted(list_commits(store)) == [0, 2, 3, 4]
    if damage in (damage_member, damage_record):
        assert run_sleepy(copy, 2, LocalExecutor(1)).exit_code == EXIT_OK
        assert tars(copy) == tars(whole) and not verify(store).damage
    assert before == {path.name: path.read_bytes() for path in copy.glob("shards/sleepy-00000[0234].*")}


def commit_changed(uri, **changes):
    """A run of one stage whose first shard is consistent in itself, with a changed field of its second sample."""
    store, plan, _ = open_case(uri)
    shard, name = plan.shard(0), shard_name("demo", 0)
    results = list(make_results(plan, shard))
    results[1].record.update(changes)
    staged = stage_shard(store.staging(), name, results, "png")
    commit_shard(store, plan.digest, shard, name, staged, 1, "w0", {})
    commit_rest(store, plan)
    return store, plan


@pytest.mark.parametrize("field", ["seed", "key"])
def test_a_sample_that_is_not_the_planned_one_is_damage(tmp_path, field):
    """Tar, parquet and record agree, checksums included: only the plan shows that the seed or the key is another."""
    plan = make_plan(make_job(tmp_path / "run"))
    sample = list(plan.samples(plan.shard(0)))[1]
    other = {"seed": sample.seed + 1, "key": sample.key.replace("demo", "other")}[field]
    store, _ = commit_changed(tmp_path / "run", **{field: other})
    [finding] = verify(store).damage
    assert finding.shard == 0 and "holds other samples than the plan has in shard 0" in finding.text
    with hold(store):
        assert repair(store).to_make == (0,)
    commit_rest(store, plan)
    assert not verify(store).damage


def test_files_of_other_seeds_are_neither_adopted_nor_left(tmp_path):
    """Without a record: `repair` moves them aside, and so does the worker that makes the shard."""
    for number, settle in enumerate((lambda store: repair(store), lambda store: None)):
        store, plan = commit_changed(tmp_path / str(number), seed=1)
        assert len(forget_commit(store, 0)) == 1
        with hold(store):
            settle(store)
        assert bool(store.list(TORN)) == (number == 0)
        commit_rest(store, plan)
        assert len(store.list(TORN)) == 2 and not verify(store).damage


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"plan_digest": "0" * 64}, "was made by another plan"),
        ({"start": 1}, "its record has other samples than the plan"),
        ({"stop": 3}, "its record has other samples than the plan"),
        ({"request": 7}, "its record has other samples than the plan"),
        ({"tar_md5": "0" * 32}, "is not the file that was committed"),
        ({"parquet_bytes": 1}, "is not the file that was committed"),
        (
            {"counts": ShardCounts(ok=4, accepted=3, accepted_per_class={"mix": 3})},
            "holds other counts than its record",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_record_that_does_not_fit_its_shard_is_damage(tmp_path, changes, text):
    """Of any shard, also the last; files and name are what they were, or the name's counts are changed along."""
    store, plan, _ = open_case(tmp_path, count=4)
    commit_rest(store, plan)
    for number in (0, plan.num_shards - 1):
        record = read_commit(store, number)
        store.remove(record.file_name)
        changed = dataclasses.replace(record, **changes)
        store.replace(changed.file_name, changed.to_json().encode())
        damage = {finding.shard: finding.text for finding in verify(store).damage}
        assert number in damage and text in damage[number]


@pytest.mark.parametrize("places", [[1, 0, 2, 3], [0, 1, 2]], ids=["order", "missing"])
def test_the_rows_of_a_shard_are_its_samples_in_order(tmp_path, places):
    """All of them."""
    store, plan, _ = open_case(tmp_path, count=4)
    results = list(make_results(plan, plan.shard(0)))
    for chosen, is_right in ((range(len(results)), True), (places, False)):
        staged = stage_shard(store.staging(), "rows", [results[place] for place in chosen], "png")
        with contextlib.nullcontext() if is_right else pytest.raises(CorruptShardError, match="holds other samples"):
            check_samples(plan, 0, staged.parquet)


def test_a_shard_beyond_the_plan_is_damage(tmp_path):
    """The first that there is none of."""
    store, plan, _ = open_case(tmp_path, count=4)
    commit_rest(store, plan)
    record = dataclasses.replace(read_commit(store, 0), shard=plan.num_shards)
    with pytest.raises(CorruptShardError, match="is committed and not in the plan"):
        check_shard(plan, record, [tmp_path, tmp_path])


def test_a_shard_in_quarantine_is_not_missing_as_well(tmp_path):
    assert run_sleepy(tmp_path, 2, LocalExecutor(1), faults=Faults(error=(1,))).exit_code != EXIT_OK
    texts = [finding.text for finding in verify(open_store(str(tmp_path))).findings]
    assert "shard 1 is in quarantine" in texts and not any("are not committed" in text for text in texts)


def test_a_whole_run_has_no_findings(whole):
    """Nothing is found, nothing is changed."""
    store = open_store(str(whole))
    verdict = verify(store)
    assert (verdict.findings, verdict.num_committed, verdict.num_samples) == ((), 5, 20)


def test_what_is_unfinished_is_no_damage(copy):
    """Files without a record, whole or torn, and a missing marker; repair takes only the torn ones away."""
    store = open_store(str(copy))
    for number in (1, 2):
        next((copy / COMMITS).glob(f"00000{number}.*")).unlink()
    damage_member(copy)
    (copy / "_SUCCESS").unlink()
    verdict = verify(store)
    assert not verdict.damage and {one.shard for one in verdict.findings} == {1, 2, None}
    with hold(store):
        assert repair(store).to_make == ()
    assert not (copy / "shards/sleepy-000001.tar").exists() and (copy / "shards/sleepy-000002.tar").exists()
    assert store.list(TORN)
    assert run_sleepy(copy, 2, LocalExecutor(1)).exit_code == EXIT_OK


def test_a_marker_over_a_run_that_is_not_whole_is_damage(copy):
    """And metadata that lack rows."""
    next((copy / COMMITS).glob("000001.*")).unlink()
    assert [one.text for one in verify(open_store(str(copy))).damage] == [
        "1 of 5 shards are not committed",
        "metadata.parquet: has 20 rows, the shards have 16",
    ]


def test_status_is_read_from_the_store(copy, tmp_path):
    """Complete, stopped, running; quotas with what they lack; shards in quarantine."""
    store = open_store(str(copy))
    assert read_status(store).state == "complete"
    with hold(store):
        (copy / "_SUCCESS").unlink()
        found = read_status(store)
        assert found.state == "running" and f"{found.driver}" in "\n".join(status_lines(found))
    assert read_status(store).state == "stopped"
    rule = {"accept": {"is_error": True}}
    with pytest.raises(RiskforgeError):
        run_sleepy(tmp_path / "q", 6, LocalExecutor(1), request=rule, faults=Faults(error=(0,), user_fault_at=9))
    [request] = read_status(open_store(str(tmp_path / "q"))).requests
    assert request.wanted == 60 and 0 < request.missing < 60 and request.planned >= 60
    found = read_status(open_store(str(tmp_path / "q")))
    assert found.last_event["event"] == "aborted" and found.num_committed == 8 and found.quarantined == (0,)
    with pytest.raises(OutputError, match="there is no run"):
        read_status(open_store(str(tmp_path / "nothing")))


def test_the_commands_print_text_and_json(copy, capsys, monkeypatch):
    """Exit codes and JSON."""
    from engine.cli import main

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["riskforge", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, capsys.readouterr().out

    assert call("verify", copy) == (0, "5 of 5 shards, 20 samples: no damage\n")
    damage_member(copy)
    code, out = call("verify", copy, "--json")
    assert code == EXIT_DAMAGED and json.loads(out)["damaged"] and json.loads(out)["findings"][0]["shard"] == 1
    assert json.loads(call("repair", copy, "--json")[1])["to_make"] == [1]
    assert json.loads(call("status", copy, "--json")[1])["num_committed"] == 4
    assert "4 of 5 shards" in call("status", copy)[1]
