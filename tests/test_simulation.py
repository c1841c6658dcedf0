"""Whole runs under fire in a simulated world: the short form of `tools/simulate.py`, which draws thousands of them.

What the tests of single rules cannot see: that nothing is lost, nothing is twice, quotas are filled or capped, and it
ends, whatever happens in whatever order, over restarts of the driver.
"""

from __future__ import annotations

import pytest

from engine.driver.scheduling import scheduler
from tools import simulate
from tools.simulate import BrokenInvariantError, play, scale


@pytest.mark.parametrize("first", range(0, 60, 20))
def test_runs_under_fire_end_with_the_shards_of_a_calm_one(first):
    """Each sample committed once or accounted for; plan and shards equal to those of a run without accidents."""
    for seed in range(first, first + 20):
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


def test_a_large_run_is_busy():
    """Five hundred workers, failures and all, wait for next to nothing but the last shards."""
    found = scale(num_workers=500, num_shards=20_000, shard_seconds=300, failures_an_hour=0.01, load_seconds=60)
    assert found.efficiency > 0.96 and found.num_failures > 5
