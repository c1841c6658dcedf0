"""Batch sizes from simulated memory: what is chosen fits, and is the largest that does; how shards are divided."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.generation.batching import (
    GOOD_BATCHES,
    MAX_BATCH,
    MEMORY_SHARE,
    MULTIPLE,
    BatchSize,
    BatchSizes,
    Cut,
    Peak,
    even_size,
    fitting_size,
    useful_size,
)
from engine.job.parsing import parse_job
from engine.job.plan import build_plan
from engine.models.hardware import Hardware
from tests.test_isolation import DIGESTS

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
    """Also in the middle of finding out: what failed is not tried again at once."""
    sizes = BatchSize()
    sizes.observe(peak(8, base=0, a_sample=GIB), 12 * GIB)
    sizes.shrink(16, through=8)
    assert (sizes.size, sizes.limit) == (8, 8)
    sizes.observe(peak(8, base=0, a_sample=GIB), 12 * GIB)
    assert sizes.size == 8 and not sizes.grows
    sizes.shrink(8, through=0)
    assert (sizes.size, sizes.limit) == (1, 1)


def good(sizes: BatchSize, number: int, size: int | None = None) -> None:
    for _ in range(number):
        sizes.went_through(size or sizes.size)


def test_a_size_that_was_lowered_grows_back():
    """After enough good batches by a half; a limit is told to others only once it is proven, and none at the end."""
    sizes = BatchSize.fixed(32)
    sizes.shrink(32, through=16)
    good(sizes, GOOD_BATCHES - 1)
    assert (sizes.size, sizes.limit) == (16, 16)
    good(sizes, 1)
    assert (sizes.size, sizes.limit) == (24, 16)
    good(sizes, 1)
    assert (sizes.size, sizes.limit) == (24, 24)
    good(sizes, GOOD_BATCHES)
    assert (sizes.size, sizes.limit) == (32, 24)
    good(sizes, 1)
    assert (sizes.size, sizes.limit) == (32, 0)
    good(sizes, 5 * GOOD_BATCHES)
    assert (sizes.size, sizes.limit) == (32, 0)


def test_after_each_failure_it_waits_twice_as_long():
    """A size that never fits costs ever fewer batches; what is proven stays, whatever parts the failed batch took."""
    sizes = BatchSize.fixed(32)
    waits = []
    for _ in range(4):
        sizes.shrink(sizes.size, through=sizes.size // 2)
        waits.append(0)
        while sizes.size <= 16:
            good(sizes, 1)
            waits[-1] += 1
        assert sizes.size == 24
    assert waits == [GOOD_BATCHES, 2 * GOOD_BATCHES, 4 * GOOD_BATCHES, 8 * GOOD_BATCHES]
    sizes.shrink(24, through=12)
    assert sizes.size == 16


def test_memory_that_became_less_is_believed():
    """What went through before another process took memory does not now."""
    sizes = BatchSize.fixed(32)
    good(sizes, 3)
    sizes.shrink(32, through=8)
    assert (sizes.size, sizes.limit) == (8, 8)


def test_the_rest_of_a_shard_is_no_good_batch():
    """It says nothing of the size."""
    sizes = BatchSize.fixed(32)
    sizes.shrink(32, through=16)
    good(sizes, 10 * GOOD_BATCHES, size=8)
    assert sizes.size == 16
    good(sizes, GOOD_BATCHES, size=15)
    assert sizes.size == 24


def test_memory_that_does_not_grow_is_no_limit():
    """Two equal peaks, where workspaces hide the samples: as many as are asked for."""
    assert fitting_size(Peak(8, GIB), Peak(16, GIB), 80 * GIB, 100) == 96
    with pytest.raises(ValueError, match="not larger"):
        fitting_size(Peak(16, 1), Peak(8, 2), GIB)


def test_a_limit_learnt_elsewhere_caps_what_is_found_out():
    """Below it the size still grows; at it the size stays, until good batches raise it here."""
    sizes = BatchSize()
    sizes.cap(48)
    assert (sizes.size, sizes.grows) == (8, True)
    for size in (8, 16):
        sizes.observe(peak(size, base=GIB, a_sample=5e6), 80 * GIB)
    assert (sizes.size, sizes.grows, sizes.limit) == (48, False, 48)
    sizes.cap(64)
    assert (sizes.size, sizes.limit) == (48, 48)
    good(sizes, GOOD_BATCHES)
    assert (sizes.size, sizes.limit) == (72, 48)


def test_a_limit_learnt_elsewhere_lowers_nothing_that_is_proven_here():
    """The other machine shared its GPU with somebody; a limit is told with every shard."""
    sizes = BatchSize.fixed(32)
    good(sizes, 1, size=24)
    sizes.cap(16)
    assert (sizes.size, sizes.limit) == (24, 24)
    good(sizes, GOOD_BATCHES)
    sizes.cap(16)
    assert (sizes.size, sizes.limit) == (32, 24)
    good(sizes, 1)
    sizes.cap(16)
    assert (sizes.size, sizes.limit) == (32, 0)


@given(limits=st.lists(st.integers(1, 64), max_size=4), a_sample=st.floats(2**20, 4 * GIB))
def test_limits_may_come_at_any_time(limits, a_sample):
    """Before the first batch, between two, after: no batch is larger than the least of them so far."""
    sizes = BatchSize()
    least = MAX_BATCH
    for limit in [*limits, 64, 64, 64]:
        sizes.cap(limit)
        least = min(least, limit)
        assert 1 <= sizes.size <= least
        sizes.observe(peak(sizes.size, base=GIB, a_sample=a_sample), 80 * GIB)
        assert 1 <= sizes.size <= least
    assert not sizes.grows


def test_a_size_that_was_asked_for_is_capped_too():
    """A number in the job does not grow, and gives way."""
    sizes = BatchSize.fixed(32)
    sizes.cap(64)
    assert (sizes.size, sizes.limit) == (32, 0)
    sizes.cap(16)
    assert (sizes.size, sizes.limit) == (16, 16)


@given(num_samples=st.integers(1, 5000), size=st.integers(1, 512))
def test_shards_are_divided_evenly(num_samples, size):
    """In as few batches as the size allows, whose sizes differ by one at most, though only the rest is known."""
    sizes, left = [], num_samples
    while left:
        sizes.append(even_size(left, size))
        left -= sizes[-1]
    assert len(sizes) == -(-num_samples // size)
    assert max(sizes) <= size and max(sizes) - min(sizes) <= 1


def test_two_hundred_and_fifty_six_at_144_are_two_of_128():
    assert (even_size(256, 144), even_size(128, 144), even_size(10, 4), even_size(6, 4)) == (128, 128, 4, 3)


@pytest.mark.parametrize(("side", "size"), [(64, 64), (96, 28), (128, 16), (8, 4096), (4, 4096), (1024, 1)])
def test_no_more_rows_than_keep_a_gpu_busy(side, size):
    """64 of 64 x 64 latents; small images are made by the thousand."""
    assert useful_size(side * side) == size
    sizes = BatchSize()
    sizes.bound(size)
    for _ in range(3):
        sizes.observe(peak(sizes.size, base=GIB, a_sample=5e6), 80 * GIB)
    assert sizes.size == (size - size % MULTIPLE if size >= MULTIPLE else size) and not sizes.grows


def test_a_number_of_the_job_is_bound_by_nothing():
    """It may be there to fill the memory."""
    sizes = BatchSize.fixed(144)
    sizes.bound(64)
    assert (sizes.size, sizes.most) == (144, 144)


def make_sizes(
    *, samples_per_shard: int = 256, batch_size: int | str = 144, counts=(256, 512), **hardware
) -> BatchSizes:
    """Sizes of requests of those counts, that share a model."""
    request = {"method": "prompt", "classes": ["zero"]}
    job = parse_job(
        {
            "name": "sizes",
            "models": {"diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip", "target": "zoo:x/y"},
            "requests": [request | {"name": f"r{place}", "count": count} for place, count in enumerate(counts)],
            "output": {"uri": "out", "samples_per_shard": samples_per_shard},
            "runtime": {"batch_size": batch_size},
        }
    )
    kind = Hardware(
        **{"device": "cuda", "dtype": "float16", "attention": "sdpa", "gradient_checkpointing": "auto"} | hardware
    )
    return BatchSizes(job, build_plan(job, ["zero", "one"], DIGESTS), kind, lambda request: "model")


def cuts(sizes: BatchSizes, request: int, num_samples: int, cpu_rows: int | None = None) -> list[Cut]:
    """The batches of a shard."""
    found = []
    while num_samples:
        found.append(sizes.next(request, num_samples, cpu_rows))
        num_samples -= found[-1].num_samples
    return found


def test_batches_on_a_gpu_are_even_and_not_filled_up():
    assert cuts(make_sizes(), 0, 256) == [Cut(128, 128)] * 2
    assert cuts(make_sizes(), 0, 300) == [Cut(100, 100)] * 3


def test_compiled_batches_have_one_shape():
    """That of the largest shard, for all requests of a model; a rest is filled up to it, and never more."""
    sizes = make_sizes(compile=True)
    assert cuts(sizes, 0, 256) == cuts(sizes, 1, 256) == [Cut(128, 128)] * 2
    assert cuts(sizes, 1, 131) == [Cut(66, 128), Cut(65, 128)] and cuts(sizes, 1, 7) == [Cut(7, 128)]
    sizes.of(0).shrink(128, through=64)
    assert cuts(sizes, 1, 256) == [Cut(64, 64)] * 4
    assert cuts(make_sizes(compile=True, counts=(10, 20)), 0, 10) == [Cut(10, 20)]


def test_nothing_is_compiled_while_the_size_is_to_be_found():
    """The batches that find it come once; they are not even, as a smaller one would teach nothing."""
    sizes = make_sizes(compile=True, batch_size="auto")
    assert not sizes.is_found(0) and sizes.next(0, 20, None) == Cut(8, 8, is_compiled=False)
    for size in (8, 16):
        sizes.of(0).observe(peak(size, base=4 * GIB, a_sample=GIB), 80 * GIB)
    assert sizes.is_found(1) and sizes.next(1, 256, None) == Cut(64, 64)


def test_a_size_on_trial_is_compiled_once_it_is_proven():
    """A compilation takes minutes, and a trial may fail, as the size before did; what is proven stays compiled."""
    sizes = make_sizes(compile=True)
    sizes.of(0).shrink(128, through=64)
    good(sizes.of(0), GOOD_BATCHES)
    assert sizes.of(0).size == 96
    assert cuts(sizes, 0, 256) == [Cut(number, 86, is_compiled=False) for number in (86, 85, 85)]
    sizes.of(0).went_through(86)
    assert all(cut.is_compiled for cut in cuts(sizes, 0, 256))


def test_deterministic_batches_keep_the_size_of_the_job():
    """The shape decides bytes: also what is told by other machines does not change it."""
    sizes = make_sizes(deterministic=True)
    sizes.limit(0, 8)
    assert cuts(sizes, 0, 256) == [Cut(144, 144), Cut(112, 144)] and sizes.of(0).limit == 0


def test_batches_on_a_cpu_keep_their_rows():
    """Whatever the size is."""
    sizes = make_sizes(device="cpu", batch_size=4)
    assert cuts(sizes, 0, 20, 16) == [Cut(16, 16), Cut(4, 16)]


@pytest.mark.parametrize("size", [4, 8])
def test_two_batches_of_one_size_are_no_line(size):
    """Nor is a smaller one after a larger."""
    with pytest.raises(ValueError, match=f"a batch of {size} is not larger than one of 8"):
        fitting_size(peak(8, base=0, a_sample=GIB), peak(size, base=0, a_sample=GIB), 80 * GIB)
