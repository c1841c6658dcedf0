"""Durations and times on the command line: `8h`, `1h30m`, `06:00`, `2026-11-22T06:00`."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

from engine.errors import JobError

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[dhms])+")
_PART = re.compile(r"(\d+(?:\.\d+)?)([dhms])")
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})")


def parse_duration(text: str, option: str) -> float:
    """Seconds of a duration such as `8h`, `90m`, `1h30m` or `45` (seconds).

    Args:
        option: named in the message.

    Raises:
        JobError: `text` is no duration.
    """
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    if not _DURATION.fullmatch(text):
        raise JobError(f"{option}: {text!r} is not a duration; write it as 8h, 90m or 1h30m")
    return sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))


def seconds_until(text: str, option: str, now: datetime) -> float:
    """Seconds from now until a time: the next occurrence of a time of day, or a date with a time.

    Args:
        option: named in the message.
        now: local time, without a zone.

    Raises:
        JobError: `text` is no time, or a past one.
    """
    try:
        if match := _CLOCK.fullmatch(text):
            target = now.replace(hour=int(match[1]), minute=int(match[2]), second=0, microsecond=0)
            target += timedelta(days=target <= now)
        else:
            target = datetime.fromisoformat(text)
            target = target.astimezone().replace(tzinfo=None) if target.tzinfo else target
    except (ValueError, OverflowError):
        raise JobError(f"{option}: {text!r} is not a time; write it as 06:00 or 2026-11-22T06:00") from None
    if target <= now:
        raise JobError(f"{option}: {text} has passed; it is {now:%Y-%m-%d %H:%M}")
    return (target - now).total_seconds()
