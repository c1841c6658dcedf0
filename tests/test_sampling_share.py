"""The share of the workers' time that is spent sampling."""

from __future__ import annotations

import pytest

from engine.driver.sampling_share import SamplingShare


def test_the_share_of_sampling_is_of_the_time_from_ready_to_the_last_commit():
    """Of all workers together; one that has committed nothing does not count."""
    watch = SamplingShare()
    watch.add_worker(0, 10.0)
    assert watch.value() is None
    watch.add_commit(0, 5.0, 18.0)
    watch.add_worker(1, 10.0)
    watch.add_commit(1, 1.0, 12.0)
    assert watch.value() == 0.6
    watch.add_worker(2, 12.0)
    watch.remove_worker(2)
    watch.add_commit(0, 2.0, 20.0)
    assert watch.value() == pytest.approx(8 / 12)
