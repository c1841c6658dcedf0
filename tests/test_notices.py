"""Notices on their way from a worker to the user: what the hardware forced is stored, counted and shown, once.

What tests of the parts cannot see: that nothing on the way loses, doubles or trusts a sentence.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import engine.generation.worker
from engine.cli import app
from engine.data.run.commit_record import CommitRecord
from engine.data.run.commits import compact_commits, read_commit, read_commits
from engine.data.run.notices import (
    MAX_DISTINCT,
    MAX_NOTICE_CHARS,
    MAX_NOTICES,
    count_notices,
    known_notices,
    notice_lines,
    storable,
    unstored,
)
from engine.data.stores.opening import open_store
from engine.driver.executors.local import LocalExecutor
from engine.driver.run import run_job
from engine.errors import CorruptShardError
from engine.generation.notices import Notices
from engine.job.plan import Plan
from engine.job.spec import JobSpec
from tests.noticing import HALVED, HOSTILE, make_job, make_worker
from tests.run_cases import commit_one, open_case
from tests.sleepy import Faults, Recorder, SleepyWorker, run_sleepy
from tests.sleepy import make_job as make_sleepy_job
from tests.test_worker import Sampling

SHOWN = r"\x1b[31m<script>alert(1)</script> of https://***@host/model\u202e \ud800A"


def test_a_sentence_is_taken_once_and_again_when_it_was_not_stored() -> None:
    notices = Notices()
    notices.add("one")
    notices.add("two")
    notices.add("one")
    assert notices.take() == ["one", "two"] and notices.take() == []
    notices.add("one")
    assert notices.take() == []
    notices.add("three")
    notices.give_back(["two"])
    assert notices.take() == ["two", "three"]


def test_hostile_texts_become_bounded_lines() -> None:
    """Without passwords, also where the cut is within an address."""
    [line] = storable([HOSTILE])
    assert line.startswith(SHOWN) and len(line) == MAX_NOTICE_CHARS and line.endswith("…") and line.isprintable()
    [cut] = storable(["a" * 280 + " https://user:" + "secret" * 50 + "@host"])
    assert "secret" not in cut and len(cut) <= MAX_NOTICE_CHARS
    assert storable(["\x1b" * 400]) == [r"\x1b" * 74 + "\\x1…"]
    assert storable(["a", "", " \n ", "a\n", "b"]) == ["a", "b"]
    assert storable(["x" * MAX_NOTICE_CHARS]) == ["x" * MAX_NOTICE_CHARS]
    many = [f"no {number}" for number in range(MAX_NOTICES + 3)]
    assert storable(many) == many[:MAX_NOTICES]
    assert unstored(many, storable(many)) == many[MAX_NOTICES:]
    assert unstored([HOSTILE, "b"], storable([HOSTILE])) == ["b"]


def committed(tmp_path: Path, notices: list[str]) -> tuple[Any, CommitRecord]:
    store, plan, _ = open_case(tmp_path)
    record = dataclasses.replace(commit_one(store, plan, 0), notices=notices)
    store.replace(record.file_name, record.to_json().encode())
    return store, record


def test_notices_stay_with_their_record(tmp_path: Path) -> None:
    """Packed too; a record without one is that of earlier versions, which go on with such a run."""
    store, record = committed(tmp_path, ["one", "two"])
    assert read_commit(store, 0) == record
    assert compact_commits(store, max_loose=0) == 1
    assert read_commit(store, 0) == record
    assert "notices" not in dataclasses.replace(record, notices=[]).to_json()
    _, silent = committed(tmp_path / "silent", [])
    assert read_commit(open_store(str(tmp_path / "silent")), 0) == silent


@pytest.mark.parametrize(
    "value",
    ["text", {"a": 1}, [1], [None], ["x" * (MAX_NOTICE_CHARS + 1)], ["x"] * (MAX_NOTICES + 1), None],
)
def test_a_record_with_other_notices_is_none(tmp_path: Path, value: Any) -> None:
    store, record = committed(tmp_path, [])
    store.replace(record.file_name, json.dumps(json.loads(record.to_json()) | {"notices": value}).encode())
    with pytest.raises(CorruptShardError, match=r"not a commit record \(notices is not at most 20 texts of 300"):
        read_commit(store, 0)


def test_notices_are_counted_by_shards_and_bounded() -> None:
    rows = count_notices(["a", f"n{number}"] for number in range(MAX_DISTINCT + 9))
    assert rows[:2] == [{"text": "a", "shards": MAX_DISTINCT + 9}, {"text": "n0", "shards": 1}]
    assert len(rows) == MAX_DISTINCT
    assert notice_lines(rows[:2]) == [f"a ({MAX_DISTINCT + 9} shards)", "n0 (1 shard)"]


def test_notices_of_a_strange_manifest_are_left_out() -> None:
    """Of a run of an earlier version, and of one that somebody wrote by hand."""
    good = {"text": "a", "shards": 1}
    bad = [{"text": "a"}, {"text": 1, "shards": 1}, {"text": "x" * 10**6, "shards": 1}, {"text": "a", "shards": "1"}, 7]
    assert known_notices({}) == known_notices({"notices": None}) == known_notices({"notices": {"a": 1}}) == []
    assert known_notices({"notices": [*bad, good]}) == [good]
    forged = "a\nverify: no damage \x1b[2J\u202e https://user:hf_secret@host"
    shown = r"a verify: no damage \x1b[2J\u202e https://***@host"
    assert known_notices({"notices": [{"text": forged, "shards": 2}]}) == [{"text": shown, "shards": 2}]
    assert count_notices([[forged], [shown]]) == [{"text": shown, "shards": 2}]


def records_of(worker: Sampling) -> dict[int, list[str]]:
    return {record.shard: record.notices for record in read_commits(worker._store)}


def test_a_sentence_goes_with_the_shard_that_was_sampled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What was said at loading with the first one; what the next shard says not with one that is still written."""
    worker = Sampling(tmp_path, 4)
    worker.sampler.notices.add("at loading")
    worker.sampler.says = {2: "in shard 0", 5: "in shard 0", 6: "in shard 1"}
    stage = engine.generation.worker.stage_shard

    def late(*arguments: Any) -> Any:
        staged = stage(*arguments)
        worker.sampler.notices.add("before shard 1")
        return staged

    monkeypatch.setattr(engine.generation.worker, "stage_shard", late)
    assert worker.begin(0)().notices == ("at loading", "in shard 0")
    assert worker.begin(1)().notices == ("before shard 1", "in shard 1")
    assert records_of(worker) == {0: ["at loading", "in shard 0"], 1: ["before shard 1", "in shard 1"]}


def test_what_a_record_does_not_take_goes_with_the_next_shard(tmp_path: Path) -> None:
    """Because it is full, or another worker has committed the shard; the answer of a lost one is that of its record."""
    other, worker = Sampling(tmp_path, 4), Sampling(tmp_path, 4)
    other.sampler.notices.add("other")
    other.begin(0)()
    texts = [f"no {number}" for number in range(MAX_NOTICES + 1)]
    for text in texts:
        worker.sampler.notices.add(text)
    assert worker.begin(0)().notices == ("other",)
    assert worker.begin(1)().notices == tuple(texts[:MAX_NOTICES])
    assert worker.begin(2)().notices == (texts[-1],)
    assert worker.begin(3)().notices == ()
    assert worker.begin(2, attempt=2)().notices == (texts[-1],)
    assert records_of(worker) == {0: ["other"], 1: texts[:MAX_NOTICES], 2: [texts[-1]], 3: []}


def test_an_adopted_shard_has_the_notices_of_who_adopts_it(tmp_path: Path) -> None:
    """The files are of a worker that died before its record, and its notices with it; ours are in no other record."""
    dead, worker = Sampling(tmp_path, 4), Sampling(tmp_path, 4)
    dead.begin(0)()
    dead._store.remove(read_commit(dead._store, 0).file_name)  # type: ignore[union-attr]
    worker.sampler.notices.add("ours")
    assert worker.begin(0, attempt=2)().notices == ("ours",)
    assert worker.begin(1)().notices == ()
    assert [record.attempt for record in read_commits(worker._store)] == [1, 1]


def test_a_run_reports_what_its_generator_noticed(tmp_path: Path) -> None:
    """Real models, real files: from the generator to the terminal, record, manifest, report, `status` and `inspect`.

    From an actor, too: `test_failures_of_cuda_in_an_actor_cost_no_strike` in tests/test_executors.py.
    """
    output, display = tmp_path / "out", Recorder()
    run_job(
        make_job(output), executor=LocalExecutor(1), resume="auto", confirmed=False, display=display,
        make_worker=make_worker,
    )  # fmt: skip
    [line] = storable([HOSTILE])
    stored = [text for record in read_commits(open_store(str(output))) for text in record.notices]
    assert stored == [line, HALVED]
    assert [text for text in display.notices if text in (line, HALVED)] == [line, HALVED]
    rows = [{"text": line, "shards": 1}, {"text": HALVED, "shards": 1}]
    assert json.loads((output / "manifest.json").read_text())["notices"] == rows
    page = (output / "report.html").read_text()
    assert 'id="notices"' in page and '<a href="#notices">' in page
    assert HALVED in page and "&lt;script&gt;alert(1)" in page
    assert "<script>alert" not in page and "\x1b" not in page
    everything = b"".join(path.read_bytes() for path in output.rglob("*") if path.is_file())
    assert b"hf_secret" not in everything
    shown = CliRunner().invoke(app, ["status", str(output)]).output
    assert f"notice: {HALVED}\n" in shown and f"notice: {line}\n" in shown
    assert json.loads(CliRunner().invoke(app, ["status", str(output), "--json"]).output)["notices"] == [line, HALVED]
    shown = CliRunner().invoke(app, ["inspect", str(output)]).output
    assert f"  notice     {HALVED} (1 shard)\n" in shown
    [described] = json.loads(CliRunner().invoke(app, ["inspect", str(output), "--json"]).output)["runs"]
    assert described["notices"] == rows


def test_an_unfinished_run_shows_its_notices_too(tmp_path: Path) -> None:
    """`status` from the journal, `inspect` from the records that can be read; a run without any says nothing."""
    run_sleepy(tmp_path, 2, LocalExecutor(1))
    assert "notice: " not in CliRunner().invoke(app, ["status", str(tmp_path)]).output
    assert "#notices" not in (tmp_path / "report.html").read_text()
    store = open_store(str(tmp_path))
    record = read_commit(store, 2)
    assert record is not None
    store.replace(record.file_name, dataclasses.replace(record, notices=["later"]).to_json().encode())
    broken = read_commit(store, 1)
    assert broken is not None
    store.replace(broken.file_name, b"{")
    (tmp_path / "_SUCCESS").unlink()
    (tmp_path / "manifest.json").unlink()
    [journal] = tmp_path.glob("_state/events/*.jsonl")
    events = [{"event": "notice", "text": text, "time": 1.0} for text in ("first", "se\ncond", "first", "x" * 10**5)]
    journal.write_text("".join(json.dumps(event) + "\n" for event in events))
    shown = CliRunner().invoke(app, ["status", str(tmp_path)]).output
    assert re.findall("notice: (.*)", shown) == ["first", "se cond", "x" * (MAX_NOTICE_CHARS - 1) + "…"]
    assert "  notice     later (1 shard)\n" in CliRunner().invoke(app, ["inspect", str(tmp_path)]).output


class Repeating(Notices):
    """Says the same all the time, as the many workers of a cluster do."""

    def take(self) -> list[str]:
        """The sentence."""
        return ["all say so"]


def make_talking(job: JobSpec, plan: Plan, **_: Any) -> SleepyWorker:
    worker = SleepyWorker(job, plan, Faults())
    worker._sleeper.notices = Repeating()
    return worker


def test_the_driver_shows_a_sentence_of_many_workers_once(tmp_path: Path) -> None:
    """Every record has it, and the manifest counts them."""
    display, job = Recorder(), make_sleepy_job(tmp_path, 2)
    executor = LocalExecutor(2)
    run_job(job, executor=executor, resume="auto", confirmed=False, display=display, make_worker=make_talking)
    assert [record.notices for record in read_commits(open_store(str(tmp_path)))] == [["all say so"]] * 5
    assert display.notices.count("all say so") == 1
    assert json.loads((tmp_path / "manifest.json").read_text())["notices"] == [{"text": "all say so", "shards": 5}]
