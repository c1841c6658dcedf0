"""The summary of a run: its exit code, what is short, and remarks on screening and risk targets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from engine.data.run.counts import ShardCounts
from engine.data.run.run_warnings import run_warnings
from engine.data.stores.opening import open_store
from engine.driver.checks import plan_job
from engine.driver.run_loop import RunLoopResult
from engine.driver.run_summary import _remarks, summarise
from engine.errors import EXIT_DRAINED, EXIT_INCOMPLETE, EXIT_OK
from tests.sleepy import make_job

FULL = ShardCounts(ok=4, accepted=4)
# A rule without a quota: `count` attempts are made.
RULE = {"accept": {"is_error": True}, "max_attempts": "1x"}


def summary(tmp_path, changes: dict[int, ShardCounts | None], drained: str = "", **request):
    """The summary of twenty samples in five shards, all accepted but for the changes; None for a missing shard."""
    job = make_job(tmp_path, 2, request=request)
    plan = plan_job(job)
    counts = {number: changes.get(number, FULL) for number in range(plan.num_shards)}
    commits = {number: SimpleNamespace(counts=shard) for number, shard in counts.items() if shard is not None}
    result = RunLoopResult(plan=plan, drained=drained, sampling_share=0.5)
    return summarise(open_store(str(tmp_path)), job, commits, result, seconds=7.0)


@pytest.mark.parametrize(
    ("changes", "drained", "code"),
    [
        ({}, "", EXIT_OK),
        ({2: None}, "", EXIT_INCOMPLETE),
        ({2: None}, "SIGTERM", EXIT_DRAINED),
        ({2: None}, "deadline", EXIT_DRAINED),
        ({2: ShardCounts(ok=3, failed=1, accepted=3)}, "", EXIT_INCOMPLETE),
        # Rejected samples were made, failed ones were not.
        ({2: ShardCounts(ok=3, rejected=1, accepted=3)}, "", EXIT_OK),
    ],
)
def test_the_exit_code_is_that_of_the_worst(tmp_path, changes, drained, code):
    """A run that stopped early may be continued; one with missing shards or samples is not complete."""
    assert summary(tmp_path, changes, drained).exit_code == code


def test_counts_are_those_of_the_committed_shards(tmp_path):
    """Attempts and failures are summed; shards count as committed only with a record."""
    made = summary(tmp_path, {0: ShardCounts(ok=2, failed=2, accepted=2), 4: None})
    assert (made.num_shards, made.num_committed, made.num_samples, made.num_failed) == (5, 4, 16, 2)
    assert (made.seconds, made.sampling_share, made.report, made.was_complete) == (7.0, 0.5, "", False)


def test_quarantined_shards_that_were_committed_after_all_are_not_listed(tmp_path):
    """A worker that was given up for dead may still commit."""
    folder = tmp_path / "_state/quarantine"
    folder.mkdir(parents=True)
    for number in (1, 2):
        (folder / f"{number:06d}.json").write_text("{}")
    assert summary(tmp_path, {2: None}).quarantined == (2,)


def test_an_unfilled_quota_is_named_with_its_class(tmp_path):
    """Not by a run that stopped early, which has not finished its rounds."""
    rule = {"accept": {"is_error": True}, "max_attempts": "2x", "classes": [3], "count": 20}
    rejected = {2: ShardCounts(ok=1, rejected=3, accepted=1)}
    made = summary(tmp_path, rejected, **rule)
    assert made.quotas == ("all: 17 of 20 wanted accepted, in 20 attempts",)
    assert made.exit_code == EXIT_INCOMPLETE and made.short == ("all, three: 17 of 20 accepted in 20 attempts",)
    assert summary(tmp_path, rejected, "SIGINT", **rule).short == ()


def manifest(screening=None, requests=None, dials=None):
    return {"counts": {"screening": screening or {}, "requests": requests or {}}, "dials": dials or {}}


def test_remarks_on_screening():
    """Over all classes, with the range of their rates."""
    classes = [
        {"screened": 3, "samples": 4, "draws": 10, "acceptance_rate": 0.3},
        {"screened": 0, "samples": 4, "draws": 20, "acceptance_rate": 0.05},
    ]
    [line] = _remarks(manifest(screening={"r": classes}))
    assert line == "r: 3 of 8 samples screened in 30 draws; acceptance rate by class 5.0% to 30.0%"


def test_draws_that_never_passed_are_a_warning():
    """Of a request, or of some of its classes by name; a class without samples so far is none of them."""
    passed, never, absent = (
        {"class_index": index, "samples": samples, "screened": screened, "draws": 5 * samples}
        for index, samples, screened in ((3, 4, 1), (5, 4, 0), (7, 0, 0))
    )
    names = {3: "three", 5: "five", 7: "seven"}
    [line] = run_warnings({"screening": {"r": [passed, never, absent]}}, names)
    assert line.startswith("r: none of 20 draws for 4 samples of five passed the screening") and "threshold" in line
    [line] = run_warnings({"screening": {"r": [never, absent]}}, names)
    assert line.startswith("r: none of 20 draws for 4 samples passed the screening")
    assert run_warnings({"screening": {"r": [passed, absent]}}, names) == []


def test_rules_that_accepted_nothing_are_a_warning():
    """Of all classes together, or of some that have a quota; one that rejected nothing is none."""
    counts = {"all": {"rejected": 9, "accepted": 0, "attempted": 9}, "some": {"rejected": 8, "accepted": 1}}
    [line] = run_warnings({"requests": counts}, {})
    assert line.startswith("all: its rule accepted none of 9 samples; ask for less in accept")
    quotas = {"some": [{"class": "a", "attempted": 4, "accepted": 0}, {"class": "b", "attempted": 5, "accepted": 1}]}
    [_, line] = run_warnings({"requests": counts, "quotas": quotas}, {})
    assert line.startswith("some: its rule accepted none of 4 samples of a; ")


def test_remarks_on_risk_targets():
    """How near the risk came to the one that was asked for."""
    dial = {"share_within_tolerance": 0.25, "tolerance": 0.1, "risk_median": 1.5, "target_risk": 2.0}
    [line] = _remarks(manifest(dials={"r": dial | {"distance_median": 0.5}}))
    assert line == "r: median risk 1.50 for a risk target of 2; 25% within 0.1, half within 0.50"
