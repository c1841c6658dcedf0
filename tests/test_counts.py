"""The counts of a shard, and their encoding in the name of its commit record."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.run.counts import MAX_NAME_CHARS, ShardCounts, count_rows, num_stored, parse_record_name, record_name
from tests.run_cases import make_job

CODES = st.one_of(st.integers(0, 12000).map(lambda number: f"{number:03d}"), st.just("mix"))
COUNTS = st.builds(
    lambda rejected, failed, classes: ShardCounts(
        ok=sum(classes.values()),
        rejected=rejected,
        failed=failed,
        accepted=sum(classes.values()),
        accepted_per_class=classes,
    ),
    st.integers(0, 10**6),
    st.integers(0, 10**6),
    st.dictionaries(CODES, st.integers(1, 3), max_size=30),
)


@settings(deadline=None)
@given(st.integers(0, 10**9), COUNTS)
def test_a_record_name_has_its_counts(number: int, counts: ShardCounts) -> None:
    """The names alone carry the counts; where they do not fit, the name says that they are inside."""
    name = record_name(number, counts)
    assert len(name) <= MAX_NAME_CHARS
    parsed = parse_record_name(name)
    assert parsed is not None and parsed[0] == number
    assert parsed[1] in (counts, None) and (parsed[1] is None) == (".many." in name)


def test_a_name_of_the_longest_length_has_its_counts() -> None:
    """Of 200 characters; with more, the counts are in the record alone."""
    lengths = set()
    for number in range(20, 30):
        for accepted in (1, 10, 100, 1000, 10_000):
            classes = {f"{2 * index:03d}": 1 for index in range(number)}
            counts = ShardCounts(ok=accepted, accepted=number, accepted_per_class=classes)
            full = len(f"000001.ok={accepted}.rejected=0.failed=0.accepted={number}.") + 6 * number - 1 + len(".json")
            assert (".many." in record_name(1, counts)) == (full > MAX_NAME_CHARS)
            lengths.add(full)
    assert {MAX_NAME_CHARS, MAX_NAME_CHARS + 1} <= lengths


@given(st.text(max_size=60))
def test_other_names_are_not_records(name: str) -> None:
    assert parse_record_name(name) is None
    assert parse_record_name(f"000001.ok=1.rejected=0.failed=0.accepted=1.000-99999999=1{name}.json") is None


def test_a_thousand_classes_fit_in_a_name() -> None:
    """Equal neighbours are joined: a shard that goes through many classes keeps its counts in the name."""
    classes = {f"{number:03d}": 1 for number in range(256)}
    name = record_name(7, ShardCounts(ok=256, accepted=256, accepted_per_class=classes))
    assert name == "000007.ok=256.rejected=0.failed=0.accepted=256.000-255=1.json"


def test_counting() -> None:
    rows = [
        {"key": "my-mix-1-job-000-003-00000000", "status": "ok", "accepted": True},
        {"key": "my-mix-1-job-000-mix-00000000", "status": "ok", "accepted": False},
        {"key": "my-mix-1-job-000-003-00000001", "status": "rejected", "accepted": False},
    ]
    assert count_rows(rows) == ShardCounts(ok=2, rejected=1, accepted=1, accepted_per_class={"003": 1})


@pytest.mark.parametrize(("stores_rejected", "num_images"), [(False, 5), (True, 8)])
def test_images_of_a_tar_are_counted_as_they_are_stored(tmp_path: Path, stores_rejected: bool, num_images: int) -> None:
    """Rejected ones only where the job stores them, failed ones never."""
    output = {"uri": str(tmp_path), "store_rejected": stores_rejected}
    assert num_stored(make_job(tmp_path, output=output), ShardCounts(ok=5, rejected=3, failed=2)) == num_images
