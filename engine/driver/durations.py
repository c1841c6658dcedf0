"""Times as people give them: `8h`, `1h30m`, `06:00`, `2026-11-22T06:00`."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

from engine.errors import JobError

_UNITS = {"d": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0}
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[dhms])+")
_PART = re.compile(r"(\d+(?:\.\d+)?)([dhms])")
_CLOCK = re.compile(r"(\d{1,2}):(\d{2})")


def parse_duration(text: str, option: str) -> float:
    """Seconds of a length of time such as `8h`, `90m`, `1h30m` or `45` (seconds).

    Raises:
        JobError: anything else.
    """
    if re.fullmatch(r"\d+(\.\d+)?", text):
        return float(text)
    if not _DURATION.fullmatch(text):
        raise JobError(f"{option}: {text!r} is not a length of time; write it as 8h, 90m or 1h30m")
    return sum(float(number) * _UNITS[unit] for number, unit in _PART.findall(text))


def seconds_until(text: str, option: str, now: datetime) -> float:
    """Seconds from now to a moment: a time of day, the next one there is, or a date with a time.

    Args:
        now: local time, without a zone.

    Raises:
        JobError: no moment, or one that has passed.
    """
    try:
        if match := _CLOCK.fullmatch(text):
            moment = now.replace(hour=int(match[1]), minute=int(match[2]), second=0, microsecond=0)
            moment += timedelta(days=moment <= now)
        else:
            moment = datetime.fromisoformat(text)
            moment = moment.astimezone().replace(tzinfo=None) if moment.tzinfo else moment
    except (ValueError, OverflowError):
        raise JobError(f"{option}: {text!r} is not a moment; write it as 06:00 or 2026-11-22T06:00") from None
    if moment <= now:
        raise JobError(f"{option}: {text} has passed; it is {now:%Y-%m-%d %H:%M}")
    return (moment - now).total_seconds()
