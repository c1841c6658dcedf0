"""Batch sizes from simulated memory: what is chosen fits, and is the largest that does."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.generation.batching import MAX_BATCH, MEMORY_SHARE, MULTIPLE, BatchSize, Peak, fitting_size

GIB = 2**30


def peak(size: int, *, base: float, a_sample: float) -> Peak:
    return Peak(size, int(base + a_sample * size))


@given(
    base=st.floats(0, 40 * GIB),
    a_sample=st.floats(2**20, 4 * GIB),
    memory=st.integers(8 * GIB, 140 * GIB),
    most=st.integers(1, MAX_BATCH),
)
def test_the_largest_that_fits(base, a_sample, memory, most):
    """On a line: within the share of the memory and what is asked for, and a step more would break one of them."""
    first, second = (peak(size, base=base, a_sample=a_sample) for size in (8, 16))
    size = fitting_size(first, second, memory, most)
    assert size <= most and (size % MULTIPLE == 0 or size == most)
    if size > second.size:
        assert base + a_sample * size <= MEMORY_SHARE * memory + a_sample
    if second.size < size + MULTIPLE <= most:
        assert base + a_sample * (size + MULTIPLE) > MEMORY_SHARE * memory - MULTIPLE * 2


def test_small_latents_are_made_by_the_thousand():
    """A digit takes a few megabytes: the size is far above what doubling from eight would reach in a shard or two."""
    sizes = BatchSize()
    sizes.observe(peak(8, base=GIB, a_sample=5e6), 80 * GIB)
    assert sizes.size == 16 and sizes.grows
    sizes.observe(peak(16, base=GIB, a_sample=5e6), 80 * GIB)
    assert sizes.size == MAX_BATCH and not sizes.grows


def test_a_photograph_fills_the_memory_in_two_batches():
    """Three gibibytes a sample on 80: 8, 16, then 21 rounded down; a smaller last batch of a shard teaches nothing."""
    sizes = BatchSize()
    sizes.observe(peak(5, base=4 * GIB, a_sample=3 * GIB), 80 * GIB)
    assert sizes.size == 8 and sizes.grows
    for size in (8, 16):
        sizes.observe(peak(size, base=4 * GIB, a_sample=2.5 * GIB), 80 * GIB)
    assert sizes.size == 24 and not sizes.grows


def test_out_of_memory_halves_and_remembers():
    """Also in the middle of finding out: what did not fit once is not tried again."""
    sizes = BatchSize()
    sizes.observe(peak(8, base=0, a_sample=GIB), 12 * GIB)
    sizes.halve(16)
    assert sizes.size == 8
    sizes.observe(peak(8, base=0, a_sample=GIB), 12 * GIB)
    assert sizes.size == 8 and not sizes.grows
    sizes.halve(1)
    assert sizes.size == 1


def test_memory_that_does_not_grow_is_no_limit():
    """Two equal peaks, where workspaces hide the samples: as many as are asked for."""
    assert fitting_size(Peak(8, GIB), Peak(16, GIB), 80 * GIB, 100) == 96
    with pytest.raises(ValueError, match="not larger"):
        fitting_size(Peak(16, 1), Peak(8, 2), GIB)


def test_a_limit_learnt_elsewhere_caps_what_is_found_out():
    """Below it the size still grows; at it the size stays, and a limit never rises again."""
    sizes = BatchSize()
    sizes.cap(48)
    for size in (8, 16):
        sizes.observe(peak(size, base=GIB, a_sample=5e6), 80 * GIB)
    assert (sizes.size, sizes.grows, sizes.limit) == (48, False, 48)
    sizes.cap(64)
    assert (sizes.size, sizes.limit) == (48, 48)
    sizes.halve(48)
    assert (sizes.size, sizes.limit) == (24, 24)


@given(limits=st.lists(st.integers(1, 64), max_size=4), a_sample=st.floats(2**20, 4 * GIB))
def test_limits_may_come_at_any_time(limits, a_sample):
    """Before the first batch, between two, after: no batch is larger than the least of them so far."""
    sizes = BatchSize()
    for limit in [*limits, 64, 64, 64]:
        sizes.cap(limit)
        assert 1 <= sizes.size <= sizes.limit <= limit
        sizes.observe(peak(sizes.size, base=GIB, a_sample=a_sample), 80 * GIB)
        assert 1 <= sizes.size <= sizes.limit
    assert not sizes.grows


def test_a_size_that_was_asked_for_is_capped_too():
    """A number in the job does not grow, and gives way."""
    sizes = BatchSize(32, grows=False)
    sizes.cap(64)
    assert (sizes.size, sizes.limit) == (32, 64)
    sizes.cap(16)
    assert sizes.size == 16


@pytest.mark.parametrize("size", [4, 8])
def test_two_batches_of_one_size_are_no_line(size):
    """Nor is a smaller one after a larger."""
    with pytest.raises(ValueError, match=f"a batch of {size} is not larger than one of 8"):
        fitting_size(peak(8, base=0, a_sample=GIB), peak(size, base=0, a_sample=GIB), 80 * GIB)
