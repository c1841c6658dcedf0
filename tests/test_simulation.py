"""Whole runs under fire in a simulated world: the short form of `tools/simulate.py`, which draws thousands of them.

What the tests of single rules cannot see: that nothing is lost, nothing is twice, quotas are filled or capped, and it
ends, whatever happens in whatever order, over restarts of the driver.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from engine.driver.scheduling import endgame, scheduler
from tools import simulate
from tools.simulate import BrokenInvariantError, Fleet, LargeRun, play


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_runs_under_fire_end_with_the_shards_of_a_calm_one(first):
    """Each sample committed once or accounted for; plan and shards equal to those of a run without accidents."""
    for seed in range(first, first + 20):
        play(seed)


def test_the_simulation_detects_a_third_attempt(monkeypatch):
    """As above: a shard that two workers hold is given to no other."""
    stragglers = endgame.stragglers

    def forgetful(state):
        return stragglers(state._replace(rivals=type(state.rivals)()))

    monkeypatch.setattr(endgame, "stragglers", forgetful)
    with pytest.raises(BrokenInvariantError, match="three workers"):
        for seed in range(200):
            play(seed)


def test_the_simulation_detects_strikes_for_lost_nodes(monkeypatch):
    """A test that cannot fail would show nothing: with this rule broken, some seed must."""

    def attribute(state, event, worker):
        return on_lost(state, simulate.WorkerLost(event.worker, False, event.message), worker)

    on_lost = scheduler._on_lost
    monkeypatch.setattr(scheduler, "_on_lost", attribute)
    with pytest.raises(BrokenInvariantError):
        for seed in range(200):
            play(seed)


def test_a_large_run_is_busy_to_its_end():
    """Failures and all, workers wait for next to nothing, and are not paid for while others make the last shards."""
    found = LargeRun(Fleet(num_workers=60, num_shards=6_000)).play()
    assert found.efficiency > 0.993 and found.whole_efficiency > 0.993 and found.num_failures > 1


def test_slow_workers_do_not_hold_up_the_end():
    """A shard that a slow worker began last is attempted by another one, too."""
    slow = Fleet(num_workers=60, num_shards=900, slow_share=0.03)
    found, held = LargeRun(slow).play(), LargeRun(replace(slow, follows_work=False)).play()
    assert found.num_second > 0 and found.simulated_hours < 0.95 * held.simulated_hours
    assert found.whole_efficiency > held.whole_efficiency + 0.05
