"""What two runs are called in headings: their dates, or what else tells them apart."""

from __future__ import annotations

from pathlib import PurePosixPath

from engine.studies.compare.scored_run import ScoredRun

MAX_NAME_CHARS = 40


def night_names(old: ScoredRun, new: ScoredRun) -> tuple[str, str]:
    """Short names of two runs: their dates; where these are equal, or not known, with the names of jobs or folders."""
    nights = _night(old), _night(new)
    if old.night and new.night and nights[0] != nights[1]:
        return nights
    for names in ((old.name, new.name), (_folder(old), _folder(new)), (old.target["address"], new.target["address"])):
        if names[0] != names[1]:
            return _name(old.night, names[0]), _name(new.night, names[1])
    return _name(old.night, "old"), _name(new.night, "new")


def _night(run: ScoredRun) -> str:
    """The date of a run; scores of another classifier than that night's say so."""
    return f"{run.night} rescored" if run.is_rescored else run.night


def _folder(run: ScoredRun) -> str:
    return PurePosixPath(run.address.rstrip("/")).name


def _name(night: str, name: str) -> str:
    short = name if len(name) <= MAX_NAME_CHARS else f"…{name[1 - MAX_NAME_CHARS :]}"
    return short if not night or night in short else f"{night} {short}"
