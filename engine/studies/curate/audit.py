"""The audit of preference records: which of them trusted raters judged again, and what the monitor makes of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import torch

from engine.data.run.curated import MonitorRecord, Proportion
from engine.methods.curation.learning import LearnedReward
from engine.methods.curation.monitor import Agreement, Audit, continue_audit
from engine.methods.curation.preferences import Pairs
from engine.studies.curate.audit_state import StoredAudit, pair_name
from engine.studies.curate.preference_files import PreferenceRecord

# Wealth beyond it is as certain, and no exponential of it overflows.
_MAX_LOG = 700.0

ToPairs = Callable[[Sequence[PreferenceRecord]], Pairs]


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditedRecord:
    """A record and the trusted choice about the same pair.

    Attributes:
        record: of the preferences.
        trusted: of a trusted rater.
    """

    record: PreferenceRecord
    trusted: PreferenceRecord

    @property
    def trusted_label(self) -> float:
        """1 where the trusted rater prefers the record's first sample, else 0."""
        return float(self.trusted.preferred == self.record.preference.first)


@dataclass(frozen=True, slots=True, kw_only=True)
class Division:
    """Records that train, and records that are audited and train nothing.

    Attributes:
        training: records of pairs that no trusted rater judged.
        audited: records with a trusted choice each, in the order in which the monitor bets on them.
        num_withheld: records that do not train.
    """

    training: tuple[PreferenceRecord, ...]
    audited: tuple[AuditedRecord, ...]
    num_withheld: int

    @property
    def records(self) -> tuple[PreferenceRecord, ...]:
        """Those that train and those that are audited."""
        return (*self.training, *(part.record for part in self.audited))


def divide(records: Sequence[PreferenceRecord], trusted: Sequence[PreferenceRecord]) -> Division:
    """Withhold every pair that trusted raters judged, and match its records with their choices one to one.

    Neither the matching nor the order depends on a choice, or the bets would not be fair: both are by time, then line.
    """

    def when(record: PreferenceRecord) -> tuple[float, int]:
        return record.preference.time, record.line

    judged = {record.pair for record in trusted}
    waiting: dict[frozenset[str], list[PreferenceRecord]] = defaultdict(list)
    for record in sorted(records, key=when):
        if record.pair in judged:
            waiting[record.pair].append(record)
    audited = [
        AuditedRecord(record=waiting[choice.pair].pop(0), trusted=choice)
        for choice in sorted(trusted, key=when)
        if waiting[choice.pair]
    ]
    training = tuple(record for record in records if record.pair not in judged)
    return Division(training=training, audited=tuple(audited), num_withheld=len(records) - len(training))


def unseen(
    audited: Sequence[AuditedRecord], checksums: Mapping[str, str], names: Collection[str]
) -> list[tuple[str, AuditedRecord]]:
    """Audited records of pairs that no earlier audit has bet on, each with the name of its pair.

    A coin that was seen is no bet; images are known by their checksums, whatever the run.
    """
    named = [(_name_of(part.record, checksums), part) for part in audited]
    return [(name, part) for name, part in named if name not in names]


def unknown_pairs(
    records: Sequence[PreferenceRecord], checksums: Mapping[str, str], names: Collection[str]
) -> list[PreferenceRecord]:
    """Records of pairs that are not among the names of pairs."""
    return [record for record in records if _name_of(record, checksums) not in names]


def _name_of(record: PreferenceRecord, checksums: Mapping[str, str]) -> str:
    return pair_name(checksums[record.preference.first], checksums[record.preference.second])


def audit_records(
    stored: StoredAudit, learned: LearnedReward, audited: Sequence[tuple[str, AuditedRecord]], to_pairs: ToPairs
) -> StoredAudit:
    """Bet on records that the earlier state has not seen.

    Args:
        stored: the state so far.
        learned: the reward, which none of these records and no trusted choice has trained; a defended one would know
            the trusted choices before the bet.
        audited: named records.
        to_pairs: gives raw features and labels of records.
    """
    if not audited:
        return stored
    pairs = to_pairs([part.record for _, part in audited])
    trusted = torch.tensor([part.trusted_label for _, part in audited], dtype=torch.float64)
    scaled = stored.standardisation.pairs(pairs)
    earlier = Pairs(stored.first.double(), stored.second.double(), stored.state.trusted)
    state = continue_audit(
        stored.state,
        Audit(scaled.first - scaled.second, pairs.labels.double(), trusted, learned.margins(pairs)),
        learned.margins(earlier),
    )
    return StoredAudit(
        state=state,
        first=torch.cat([stored.first, pairs.first.float()]),
        second=torch.cat([stored.second, pairs.second.float()]),
        standardisation=stored.standardisation,
        names=(*stored.names, *(name for name, _ in audited)),
        clip_digest=stored.clip_digest,
    )


def describe_monitor(
    stored: StoredAudit, agreement: Agreement | None, covariance: float | None, level: float, after: str | None
) -> MonitorRecord:
    """What the state says, for people and files.

    Args:
        stored: the state after this round.
        agreement: of the learned reward with one that is fitted to trusted choices; None without any.
        covariance: with it, likewise.
        level: of the alarm.
        after: the run that was continued.
    """
    state = stored.state
    correlation = None
    if agreement is not None:
        value, low, high = (float(part) for part in (agreement.correlation, agreement.low, agreement.high))
        correlation = Proportion(value=value, low=low, high=high)
    return MonitorRecord(
        e_value=math.exp(min(_MAX_LOG, float(state.log_wealth.logsumexp(-1)))),
        highest=math.exp(min(_MAX_LOG, float(state.highest))),
        alarm=bool(state.alarm(level)),
        level=level,
        num_audited=len(stored.names),
        num_differing=int(state.num_differing),
        covariance=covariance if covariance is not None and math.isfinite(covariance) else None,
        correlation=correlation,
        after=after or "",
    )


def alarm_sentence(monitor: MonitorRecord, *, defence: str, is_selected: bool) -> str:
    """What an alarm means, and what to do.

    Args:
        monitor: what it says.
        defence: that was asked for.
        is_selected: whether the run was curated all the same.
    """
    removal = "" if defence != "none" else "remove the suspects by `--defence influence --on-alarm continue`, or "
    outcome = "" if is_selected else ", and nothing was selected (the alarm is kept in --output, for --after too)"
    remedy = "" if is_selected else f", {removal}select all the same by `--on-alarm continue`"
    return (
        f"the monitor has raised its alarm: the preferences disagree with the trusted raters (the choices differ in"
        f" {monitor.num_differing} of {monitor.num_audited} audited records; e-value {monitor.highest:.3g}, where"
        f" honest records ever reach {1 / monitor.level:.3g} in at most {monitor.level:.0%} of all series of runs). A"
        f" reward that is learned from them may select against your users{outcome}; look at who made the records and"
        f" when{remedy}"
    )
