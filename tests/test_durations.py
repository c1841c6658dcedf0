"""Durations and times as people write them."""

import time
from datetime import datetime

import pytest

from engine.driver.durations import parse_duration, seconds_until
from engine.errors import JobError

NOW = datetime(2026, 11, 21, 22, 30)


@pytest.mark.parametrize(
    ("text", "seconds"), [("8h", 28800), ("1h30m", 5400), ("45", 45), ("1.5", 1.5), ("0.5d", 43200), ("2m5s", 125)]
)
def test_lengths(text, seconds):
    """Units add up; a bare number is of seconds."""
    assert parse_duration(text, "--grace") == seconds


def test_a_time_of_day_is_the_next_one():
    """Tonight's 06:00 is tomorrow's; a date with a time is itself."""
    assert seconds_until("06:00", "--deadline", NOW) == 7.5 * 3600
    assert seconds_until("6:00", "--deadline", NOW) == 7.5 * 3600
    assert seconds_until("22:31", "--deadline", NOW) == 60
    assert seconds_until("22:30", "--deadline", NOW) == 86400
    assert seconds_until("2026-11-22T00:00", "--deadline", NOW) == 5400


def test_a_time_with_a_zone_is_converted_to_local_time(monkeypatch):
    """22:30 here is 20:30 in London."""
    monkeypatch.setenv("TZ", "XXX-2")
    time.tzset()
    try:
        assert seconds_until("2026-11-21T21:30+00:00", "--deadline", NOW) == 3600
        assert seconds_until("2026-11-21T23:30+02:00", "--deadline", NOW) == 3600
    finally:
        monkeypatch.undo()
        time.tzset()


@pytest.mark.parametrize("text", ["", "8 h", "h", "-5", "25:00", "noon", "2026-11-20T00:00", "2026-11-21T22:30"])
def test_others_are_refused_with_the_option(text):
    """And an example; the present or a past time is refused, too."""
    with pytest.raises(JobError, match=r"^--max-duration: .*write it as 8h"):
        parse_duration("soon" + text, "--max-duration")
    with pytest.raises(JobError, match=r"^--deadline: "):
        seconds_until(text, "--deadline", NOW)
