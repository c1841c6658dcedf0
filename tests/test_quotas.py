"""Quotas: rounds that follow from what is committed alone, filled or capped, and exact after any interruption."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pyarrow.parquet as pq
import pytest

from engine.data.run.commits import list_commits
from engine.data.run.resume import open_output
from engine.data.run.stored_plan import publish_rounds, read_run
from engine.data.stores.opening import open_store
from engine.driver.executors.local import LocalExecutor
from engine.driver.run import run_job
from engine.errors import EXIT_INCOMPLETE, EXIT_OK, JobError, OutputError, OwnedError, RiskforgeError
from engine.job.parsing import parse_job
from engine.job.plan import Extent, build_plan, next_stage
from engine.job.quotas import MAX_GROWTH, Quotas, replay, round_size
from tests.sleepy import Faults, Recorder, make_job, run_sleepy, tars

RULE = {"accept": {"is_error": True}}
DIGITS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
DIGESTS = {"diffusion": {"zoo:digits/stable-diffusion": ""}, "clip": "", "target": "", "transfer": [], "oracle": ""}


def plan_of(tmp_path, **request):
    """A plan of one request with quotas."""
    job = make_job(tmp_path, request.pop("count", 3), request=RULE | request)
    return build_plan(job, DIGITS, DIGESTS)


def play(plan, yields, seed: int):
    """Rounds until the end; shards are settled in an order drawn from the seed. All extents, and the quotas."""
    draw, quotas, samples_per_shard = random.Random(seed), Quotas(plan.requests, plan.extents, 4), 4
    waiting = list(plan.shards())
    while waiting:
        shard = waiting.pop(draw.randrange(len(waiting)))
        taken = [
            random.Random(f"{shard.cell}-{at}").random() < yields[shard.cell] for at in range(shard.start, shard.stop)
        ]
        quotas.settle(shard, len(taken), sum(taken))
        num_before = plan.num_shards
        plan = plan.grown(quotas.advance())
        waiting += [plan.shard(number) for number in range(num_before, plan.num_shards)]
        assert all(extent.samples_per_shard == samples_per_shard for extent in plan.extents)
    return plan, quotas


def test_any_order_gives_the_same_plan(tmp_path):
    """Which shard is where may not depend on who was quicker; here many orders, in files only one can be tried."""
    plan = plan_of(tmp_path, count=20, max_attempts="8x")
    yields = [0.0, 0.05, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1.0, 0.02]
    first, quotas = play(plan, yields, 0)
    for seed in range(1, 30):
        assert play(plan, yields, seed)[0].extents == first.extents
    assert quotas.is_final
    for one in quotas.standings():
        assert one.accepted >= one.wanted == 20 or one.attempted == 160
    attempts = [one.attempted for one in quotas.standings()]
    assert attempts[0] == 160 and attempts[8] == 20 and 20 < attempts[5] < 45


def test_an_interrupted_run_decides_what_it_would_have_decided(tmp_path):
    """From extents and counts alone, after any number of settled shards."""
    plan = plan_of(tmp_path, count=20, max_attempts="8x")
    yields = [0.1 * (1 + cell) for cell in range(10)]
    wanted, _ = play(plan, yields, 0)
    whole = {shard.number: shard for shard in wanted.shards()}
    counts = {number: Taken(shard, yields) for number, shard in whole.items()}
    committed: dict[int, Taken] = {}
    while True:
        quotas = replay(plan, committed, (), 4)
        plan = plan.grown(quotas.advance())
        missing = [number for number in range(plan.num_shards) if number not in committed]
        if not missing:
            break
        number = missing[-1] if len(missing) % 2 else missing[0]
        committed[number] = counts[number]
    assert plan.extents == wanted.extents


class Taken:
    """Counts of a shard."""

    def __init__(self, shard, yields) -> None:
        span = range(shard.start, shard.stop)
        self.attempted = len(span)
        self.accepted = sum(random.Random(f"{shard.cell}-{at}").random() < yields[shard.cell] for at in span)


def test_rounds_are_neither_timid_nor_reckless():
    """As many as the measured yield asks for; never beyond the limit, nor many times what was measured on."""
    assert round_size(100, 1000, 100, 100, 50) == 100  # 50 missing at (50 + 1) / (100 + 2)
    assert round_size(100, 1000, 100, 100, 99) == 1
    assert round_size(100, 10_000, 100, 100, 0) == MAX_GROWTH * 100
    assert round_size(100, 150, 100, 100, 0) == 50
    assert round_size(100, 1000, 100, 100, 47) == 113  # 53 missing at (47 + 1) / (100 + 2), to the nearest
    assert round_size(100, 150, 100, 20, 0) == 50, "attempts of a shard in quarantine count"
    assert round_size(100, 100, 100, 100, 0) == round_size(100, 1000, 200, 200, 100) == 0


def test_a_round_aims_at_what_is_missing():
    """By the yield that it is decided on, over all of its inputs: under one and a half times what is missing."""
    for wanted in (1, 2, 3, 5, 16, 40):
        for attempted in (1, 2, 5, 16, 40, 100):
            for accepted in range(min(wanted, attempted + 1)):
                size, missing = round_size(wanted, 10**9, attempted, attempted, accepted), wanted - accepted
                assert size >= 1 and 2 * size * (accepted + 1) < 3 * missing * (attempted + 2)


@pytest.mark.parametrize("wanted", [4, 20, 100])
@pytest.mark.parametrize("share", [0.05, 0.1, 0.3, 0.5, 0.7, 0.9, 0.97, 1.0])
def test_the_last_round_makes_little_more_than_is_missing(wanted, share):
    """Played with the yield that a class really has: surplus stays small, and so does the number of rounds."""
    surplus, rounds, overshoots, num_runs = 0, 0, 0, 200
    for seed in range(num_runs):
        draw, planned, accepted, size = random.Random(seed), 0, 0, wanted
        while size:
            missing, made = wanted - accepted, sum(draw.random() < share for _ in range(size))
            planned, accepted, rounds = planned + size, accepted + made, rounds + 1
            is_wide = size * share > 2 * missing
            size = round_size(wanted, 10**9, planned, planned, accepted)
        surplus += accepted - wanted
        # The first round for a class that was unlucky before may be wide, as nothing else is known of it.
        overshoots += is_wide
    assert overshoots <= 0.15 * num_runs
    assert surplus / num_runs <= max(3.0, 0.1 * wanted) and rounds / num_runs < 6
    assert share < 1 or (surplus, rounds) == (0, num_runs)


def test_the_first_round_is_as_large_as_the_quota(tmp_path):
    """Also a small one: where all are accepted nothing is made in vain."""
    for count in (1, 3, 40):
        assert {extent.stop for extent in plan_of(tmp_path, count=count).extents} == {count}


def test_a_grown_quota_begins_no_round_by_itself(tmp_path):
    """Whether another one is needed, and how large, is decided by the yield of those before."""
    small, grown = (plan_of(tmp_path, count=count, max_attempts="8x") for count in (20, 50))
    assert next_stage(grown.requests, small.stages, 4) == ()


def test_shards_in_quarantine_use_up_their_positions(tmp_path):
    """The next round of their class begins after them, and their attempts are not samples; one that was committed
    after all counts once."""
    plan = plan_of(tmp_path, count=20, max_attempts="8x")
    quotas = replay(plan, {7: Settled(4, 2)}, range(plan.num_shards), 4)
    extents = quotas.advance()
    assert [(extent.cell, extent.start) for extent in extents] == [(cell, 20) for cell in range(10)]
    assert [standing.attempted for standing in quotas.standings()] == [0, 4, *[0] * 8]


@dataclass(frozen=True)
class Settled:
    """Counts of a shard."""

    attempted: int
    accepted: int


@pytest.mark.parametrize("max_attempts", ["1x", 3])
def test_no_room_for_more_means_attempts(tmp_path, max_attempts):
    """`count` attempts are made and the rule only marks them: plan, keys and shards as without a rule."""
    plan = plan_of(tmp_path, max_attempts=max_attempts)
    plain = build_plan(make_job(tmp_path, 3), DIGITS, DIGESTS)
    assert plan.extents == plain.extents and "quota" not in plan.identity["requests"][0]


def test_contexts_take_turns_and_count_together(tmp_path):
    """The quota of a class is over all its contexts; keys and seeds are those of a plan without quotas."""
    contexts = {"contexts": ["red ink", "small"]}
    plan = plan_of(tmp_path, count=9, **contexts)
    samples = list(plan.samples(plan.shard(0)))
    assert [one.context for one in samples] == ["red ink", "small"] * 2
    assert {one.cell.names for one in samples} == {("zero",)} and plan.requests[0].spec.num_wanted == 18
    plain = build_plan(make_job(tmp_path, 9, request=contexts), DIGITS, DIGESTS)
    made = {one.key: one for shard in plan.shards() for one in plan.samples(shard)}
    same = {one.key: one for shard in plain.shards() for one in plain.samples(shard)}
    assert made.keys() == same.keys() and all(made[key].seed == same[key].seed for key in same)


@pytest.fixture(scope="module")
def clean(tmp_path_factory):
    """A run with quotas of six, made by one worker; class 0 has 20 % accepted, class 9 92 %."""
    output = tmp_path_factory.mktemp("runs") / "clean"
    summary = run_sleepy(output, 6, LocalExecutor(1), request=RULE)
    assert summary.exit_code == EXIT_OK and not summary.short and (output / "_SUCCESS").exists()
    return output


def test_a_quota_is_filled_and_the_first_count(clean):
    """Exactly six of a class count, the first in the order of indices; later ones are surplus, none is lost."""
    rows = pq.read_table(clean / "metadata.parquet").to_pylist()
    for label in range(10):
        of_class = [row for row in rows if row["key"].split("-")[2] == f"{label:03d}"]
        assert [row["index"] for row in of_class] == list(range(len(of_class)))
        accepted = [row for row in of_class if row["accepted"]]
        assert [row["surplus"] for row in accepted] == [False] * 6 + [True] * (len(accepted) - 6)
        assert not any(row["surplus"] for row in of_class if not row["accepted"])
    numbers = sorted(list_commits(open_store(str(clean))))
    assert numbers == list(range(len(numbers)))
    again = run_sleepy(clean, 6, LocalExecutor(1), request=RULE)
    assert again.was_complete and again.exit_code == EXIT_OK


def test_other_workers_and_a_resume_give_the_same_bytes(clean, tmp_path):
    """Three workers, and a run that is ended after every few shards by a shard that the user must mend."""
    run_sleepy(tmp_path / "three", 6, LocalExecutor(3), request=RULE)
    assert tars(tmp_path / "three") == tars(clean)
    resumed = tmp_path / "resumed"
    num_shards = len(list_commits(open_store(str(clean))))
    for stop in (3, num_shards // 2, num_shards - 2):
        with pytest.raises(RiskforgeError):
            run_sleepy(resumed, 6, LocalExecutor(2), request=RULE, faults=Faults(user_fault_at=stop))
        assert len(list_commits(open_store(str(resumed)))) >= stop - 2
    run_sleepy(resumed, 6, LocalExecutor(2), request=RULE)
    assert tars(resumed) == tars(clean)
    stages = [open_store(str(one)) for one in (clean, resumed)]
    first, second = ([extent for stage in read_run(one).stages for extent in stage] for one in stages)
    assert first == second


def test_a_round_that_a_driver_added_after_it_had_lost_the_run_is_adopted(tmp_path):
    """A driver that was frozen wakes and plans a round before it hears of its successor, which must not give up.

    The two may find other numbers of rounds due at a time; only other rounds are somebody else's run.
    """
    job = make_job(tmp_path, 6, request=RULE)
    store = open_store(str(tmp_path))
    plan = open_output(store, build_plan(job, DIGITS, DIGESTS), job, "auto", confirmed=False)
    first, second = (Extent(request=0, cell=cell, start=6, stop=16, samples_per_shard=4) for cell in (0, 1))
    frozen = publish_rounds(store, plan, (first,))
    owner = publish_rounds(store, plan, (first, second))
    assert publish_rounds(store, frozen, (second,)).stages == owner.stages == read_run(store).stages
    with pytest.raises(OwnedError):
        publish_rounds(store, plan, (second,))


def test_a_quota_that_cannot_be_filled_is_told_by_class(tmp_path):
    """Exit code 3, the marker (no work is left), each class by name; a higher limit then goes on."""
    limited = RULE | {"max_attempts": "2x"}
    summary = run_sleepy(tmp_path, 8, LocalExecutor(1), request=limited)
    assert summary.exit_code == EXIT_INCOMPLETE and (tmp_path / "_SUCCESS").exists()
    assert summary.short[0].startswith("all, zero: ") and summary.short[0].endswith(" of 8 accepted in 16 attempts")
    again = run_sleepy(tmp_path, 8, LocalExecutor(1), request=limited)
    assert again.was_complete and (again.exit_code, again.short) == (EXIT_INCOMPLETE, summary.short)
    before = tars(tmp_path)
    filled = run_sleepy(tmp_path, 8, LocalExecutor(1), request=RULE)
    assert filled.exit_code == EXIT_OK and {name: tars(tmp_path)[name] for name in before} == before


def test_a_grown_quota_extends_and_a_smaller_one_is_refused(clean, tmp_path):
    """The attempts that are there count."""
    import shutil

    shutil.copytree(clean, tmp_path / "grown")
    summary = run_sleepy(tmp_path / "grown", 9, LocalExecutor(1), request=RULE)
    made = tars(tmp_path / "grown")
    assert summary.exit_code == EXIT_OK and {name: made[name] for name in tars(clean)} == tars(clean)
    assert sum(not row["surplus"] for row in accepted_rows(tmp_path / "grown")) == 90
    with pytest.raises(JobError, match=r"requests.0.count: 8 is below the 9 asked for in this output"):
        run_sleepy(tmp_path / "grown", 8, LocalExecutor(1), request=RULE)
    with pytest.raises(OutputError, match=r"requests\.0\.quota: true -> absent"):
        run_sleepy(tmp_path / "grown", 9, LocalExecutor(1), request=RULE | {"max_attempts": "1x"})


def accepted_rows(output):
    """Rows of accepted samples."""
    return [row for row in pq.read_table(output / "metadata.parquet").to_pylist() if row["accepted"]]


def test_a_shard_in_quarantine_does_not_hold_up_its_class(tmp_path):
    """The others make up for it; retried, it fills its place, and the first in index order count anew."""
    summary = run_sleepy(tmp_path, 6, LocalExecutor(2), request=RULE, faults=Faults(error=(0,)))
    assert summary.exit_code == EXIT_INCOMPLETE and summary.quarantined == (0,) and not summary.short
    again = run_sleepy(tmp_path, 6, LocalExecutor(1), request=RULE, retry=True)
    assert again.exit_code == EXIT_OK
    rows = [row for row in accepted_rows(tmp_path) if "-000-000-" in row["key"]]
    assert [row["surplus"] for row in rows] == [False] * 6 + [True] * (len(rows) - 6)


def test_requests_with_and_without_quotas_go_together(tmp_path):
    """Each by its own rules; shards stay without gaps."""
    raw = make_job(tmp_path, 2).model_dump(mode="json", exclude_none=True)
    raw["requests"].append(raw["requests"][0] | RULE | {"name": "picky", "classes": [0, 9]})
    summary = run_job(
        parse_job(raw),
        executor=LocalExecutor(2),
        resume="auto",
        confirmed=False,
        display=Recorder(),
        make_worker=make_worker,
    )
    assert summary.exit_code == EXIT_OK
    accepted = [row for row in accepted_rows(tmp_path) if row["request"] == "picky" and not row["surplus"]]
    assert len(accepted) == 4


def make_worker(job, plan):
    """A sleepy worker."""
    from tests.sleepy import make_sleepy

    return make_sleepy(job, plan, faults=Faults())
