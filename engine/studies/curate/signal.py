"""The reward learned from preference records: from files to rewards, with accuracy, monitor and suspects."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import safetensors.torch
import torch

from engine.data.run.curated import MonitorRecord, Proportion, RewardRecord
from engine.data.run.file_names import AUDIT, CURATION, REWARD, SUSPECTS
from engine.data.stores.base import Store
from engine.data.stores.opening import open_store
from engine.driver.progress import Display
from engine.errors import JobError
from engine.job.json_values import digest_of
from engine.methods.curation.learning import (
    Groups,
    LearnedReward,
    NetworkReward,
    Suspects,
    agreement_with_trusted,
    covariance_with_trusted,
    find_suspects,
    learn_reward,
    standardise,
    unordered_pairs,
)
from engine.methods.curation.preferences import Pairs
from engine.methods.curation.reward_models import Accuracy
from engine.models.digests import model_digest
from engine.studies.curate.audit import Division, audit_records, describe_monitor, divide, unknown_pairs, unseen
from engine.studies.curate.audit_state import StoredAudit, audit_bytes, new_audit, read_audit, read_stopped_audit
from engine.studies.curate.candidates import Candidates
from engine.studies.curate.features import SampleFeatures, embed_samples, image_checksums
from engine.studies.curate.options import CurateOptions
from engine.studies.curate.preference_files import PreferenceFile, PreferenceRecord, read_preferences, usable_records
from engine.studies.curate.program import SignalRecord
from engine.studies.samples import StudiedRun

# Samples over which the agreement with a trusted reward is measured.
MAX_PROBES = 2000
# Trusted choices, the latest ones, that the reward which it is measured with is fitted to, again for each resample.
MAX_FITTED = 500
_CHANCE = 0.5


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalInputs:
    """What is known before any model is loaded.

    Attributes:
        run: whose samples the records compare.
        before: earlier runs, whose samples they may compare too.
        preferences: as read.
        trusted: records of trusted raters that can be used; empty without a file.
        division: of the usable preferences.
        checksums: of the images, by key of all samples.
        earlier: state of the monitor that is continued.
        left_out: why records are not used, a line each.
        record: description of the reward, without what training gives.
    """

    run: StudiedRun
    before: tuple[StudiedRun, ...]
    preferences: PreferenceFile
    trusted: tuple[PreferenceRecord, ...]
    division: Division
    checksums: Mapping[str, str]
    earlier: StoredAudit | None
    left_out: tuple[str, ...]
    record: RewardRecord


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class LearnedSignal:
    """A learned reward and what is known of it.

    Attributes:
        signal: for the curated run.
        rewards: of candidates, [N].
        num_withheld: records that trained nothing, as trusted raters judged their pairs.
        notes: what a user should know, a line each.
    """

    signal: SignalRecord
    rewards: Callable[[Candidates], Sequence[float]]
    num_withheld: int
    notes: tuple[str, ...]


def read_signal(
    run: StudiedRun, options: CurateOptions, output: Store | None = None, before: Sequence[StudiedRun] = ()
) -> SignalInputs:
    """Read and check the files of preferences, and the state of the monitor.

    Args:
        run: that is curated.
        options: with the files.
        output: of the curation. Where an alarm stopped an earlier one there, its monitor is continued, or running
            again with other records would be a way around the alarm.
        before: earlier runs, whose samples the records may name too; no key is in two of them.

    Raises:
        JobError: a file is not as it must be, or no record is left to learn from.
        CorruptShardError: the run's metadata cannot be read.
    """
    assert options.preferences is not None
    preferences = read_preferences(options.preferences, "--preferences")
    trusted = read_preferences(options.trusted, "--trusted") if options.trusted is not None else None
    checksums = {key: checksum for one in (run, *before) for key, checksum in image_checksums(one).items()}
    is_stored = {key: bool(checksum) for key, checksum in checksums.items()}
    usable = usable_records(preferences, is_stored, "--preferences")
    judged = usable_records(trusted, is_stored, "--trusted") if trusted is not None else None
    trusted_records = judged.records if judged is not None else ()
    division = divide(usable.records, trusted_records)
    if not division.training:
        raise JobError(
            f"--trusted: {options.trusted}: has every pair that --preferences compares, so that no record is left to"
            " learn from; audited pairs are withheld, give trusted choices about a part of them"
        )
    if options.defence == "group":
        _check_groups(division.training, trusted_records, options)
    clip = model_digest(run.job.models.clip)
    digests = [preferences.digest, trusted.digest if trusted is not None else ""]
    earlier = _earlier_audit(options, output, clip)
    # Earlier trusted choices are among those that a defence compares records with.
    series = {} if earlier is None else {"series": hashlib.sha256(audit_bytes(earlier)).hexdigest()[:32]}
    digest = digest_of({"files": digests, "clip": clip, **options.identity(), **series})
    left_out = [f"--preferences: {line}" for line in usable.left_out]
    left_out += [f"--trusted: {line}" for line in judged.left_out] if judged is not None else []
    return SignalInputs(
        run=run,
        before=tuple(before),
        preferences=preferences,
        trusted=trusted_records,
        division=division,
        checksums=checksums,
        earlier=earlier,
        left_out=tuple(left_out),
        record=RewardRecord(name=preferences.path, kind="preferences", digest=digest),
    )


def _earlier_audit(options: CurateOptions, output: Store | None, clip_digest: str) -> StoredAudit | None:
    if options.trusted is None:
        return None
    stopped = read_stopped_audit(output, clip_digest) if output is not None else None
    if stopped is None and options.after is not None:
        return read_audit(options.after, clip_digest)
    return stopped


def _check_groups(
    records: Sequence[PreferenceRecord], trusted: Sequence[PreferenceRecord], options: CurateOptions
) -> None:
    """Check that every record has a group that trusted raters belong to.

    Raises:
        JobError: one has none.
    """
    named = (("--preferences", options.preferences, records), ("--trusted", options.trusted, trusted))
    for option, path, part in named:
        for record in part:
            if not record.group:
                raise JobError(
                    f"{option}: {path}, line {record.line}: group is missing, which --defence group compares raters by;"
                    " name the group of each rater, or use --defence influence"
                )
    judges = {record.group for record in trusted}
    for record in records:
        if record.group not in judges:
            raise JobError(
                f"--trusted: {options.trusted}: has no choice of group '{record.group}', which --preferences has in"
                f" line {record.line}; have a trusted rater of that group choose, or use --defence influence"
            )


def learn_signal(inputs: SignalInputs, options: CurateOptions, display: Display) -> LearnedSignal:
    """Learn the reward, audit it, and remove suspect records.

    Raises:
        JobError: the CLIP model cannot be used, or the earlier monitor has features of another size.
        CorruptShardError: an image of the run cannot be read.
    """
    records = (*inputs.division.records, *inputs.trusted)
    named = {key for record in records for key in record.pair}
    features = embed_samples(inputs.run, display, inputs.before, named)
    display.phase("learning the reward")
    return _Learning(inputs, options, features).signal()


class _Learning:
    """One reward being learned."""

    def __init__(self, inputs: SignalInputs, options: CurateOptions, features: SampleFeatures) -> None:
        self._inputs, self._options, self._features = inputs, options, features
        self._standardisation = standardise(features.values)
        training = inputs.division.training
        self._pairs = self._pairs_of(training)
        keys = [(record.preference.first, record.preference.second) for record in training]
        self._numbers = unordered_pairs([first for first, _ in keys], [second for _, second in keys])

    def signal(self) -> LearnedSignal:
        learned = self._learn()
        audit = self._audit(learned)
        suspects = self._suspects(learned, audit)
        final = learned if suspects is None else self._learn(suspects.weights)
        monitor = self._monitor(learned, audit)
        features = self._features
        return LearnedSignal(
            signal=SignalRecord(
                reward=self._record(final, suspects),
                monitor=monitor,
                files=self._files(final, audit, suspects),
            ),
            rewards=lambda candidates: final(features.of(candidates.keys)).tolist(),
            num_withheld=self._inputs.division.num_withheld,
            notes=self._notes(final, monitor),
        )

    def _pairs_of(self, records: Sequence[PreferenceRecord]) -> Pairs:
        """Raw features and labels of records."""
        first = self._features.of([record.preference.first for record in records])
        second = self._features.of([record.preference.second for record in records])
        labels = torch.tensor([1.0 - record.preference.choice for record in records], dtype=torch.float64)
        return Pairs(first, second, labels)

    def _learn(self, weights: torch.Tensor | None = None) -> LearnedReward:
        options = self._options.learning
        return learn_reward(self._pairs, self._numbers, options, standardisation=self._standardisation, weights=weights)

    def _audit(self, learned: LearnedReward) -> StoredAudit | None:
        """The state of the monitor after this round; None without trusted choices."""
        inputs = self._inputs
        if self._options.trusted is None:
            return None
        stored = inputs.earlier or new_audit(self._standardisation, self._features.clip_digest)
        num_features, earlier = self._features.values.shape[-1], len(stored.standardisation.mean)
        if earlier != num_features:
            raise JobError(
                f"--after: the monitor of '{self._options.after}' has {earlier} features of an image, models.clip of"
                f" RUN gives {num_features}; use the same model, or leave --after out to start a new monitor"
            )
        audited = unseen(inputs.division.audited, inputs.checksums, set(stored.names))
        return audit_records(stored, learned, audited, self._pairs_of)

    def _trusted(self, audit: StoredAudit) -> Pairs:
        """All trusted choices: those of this round's file, and those that earlier audits had."""
        earlier = self._inputs.earlier
        if earlier is None:
            return self._pairs_of(self._inputs.trusted)
        # A choice that the series has already counts once.
        now = self._pairs_of(unknown_pairs(self._inputs.trusted, self._inputs.checksums, set(earlier.names)))
        count = len(earlier.names)
        labels = audit.state.trusted[:count]
        return Pairs(
            torch.cat([earlier.first, now.first]),
            torch.cat([earlier.second, now.second]),
            torch.cat([labels, now.labels]),
        )

    def _suspects(self, learned: LearnedReward, audit: StoredAudit | None) -> Suspects | None:
        """The records that the chosen defence removes; None without a defence."""
        options = self._options
        if options.defence == "none" or audit is None:
            return None
        if options.defends_at_alarm and not bool(audit.state.alarm(options.level)):
            return None
        if options.defence == "influence":
            return find_suspects(learned, self._pairs, self._trusted(audit), options.learning, options.removal)
        # Earlier audits do not know the groups of their raters.
        trusted = self._pairs_of(self._inputs.trusted)
        return find_suspects(learned, self._pairs, trusted, options.learning, options.removal, self._groups())

    def _groups(self) -> Groups:
        numbers: dict[str, int] = {}
        parts = [
            torch.tensor([numbers.setdefault(record.group, len(numbers)) for record in records])
            for records in (self._inputs.division.training, self._inputs.trusted)
        ]
        return Groups(records=parts[0], trusted=parts[1])

    def _monitor(self, learned: LearnedReward, audit: StoredAudit | None) -> MonitorRecord | None:
        if audit is None:
            return None
        own = self._features.values[: self._features.num_own]
        probes = own[:: max(1, -(-len(own) // MAX_PROBES))]
        trusted = self._trusted(audit)
        latest = trusted.take(torch.arange(max(0, len(trusted) - MAX_FITTED), len(trusted)))
        agreement = agreement_with_trusted(learned, latest, probes, self._options.learning)
        covariance = covariance_with_trusted(learned, latest, probes, self._options.learning)
        return describe_monitor(audit, agreement, covariance, self._options.level, _address(self._options.after))

    def _record(self, final: LearnedReward, suspects: Suspects | None) -> RewardRecord:
        base = self._inputs.record
        return RewardRecord(
            name=base.name,
            kind=base.kind,
            digest=base.digest,
            model=self._options.learning.model,
            num_records=final.num_used,
            num_removed=suspects.num_removed if suspects is not None else 0,
            defence=self._options.defence if suspects is not None else "",
            accuracy=_proportion(final.accuracy),
        )

    def _files(self, final: LearnedReward, audit: StoredAudit | None, suspects: Suspects | None) -> dict[str, bytes]:
        files = {REWARD: _reward_bytes(final, self._features)}
        if audit is not None:
            files[AUDIT] = audit_bytes(audit)
        if suspects is not None:
            files[SUSPECTS] = self._suspect_lines(suspects)
        return {name.removeprefix(f"{CURATION}/"): data for name, data in files.items()}

    def _suspect_lines(self, suspects: Suspects) -> bytes:
        """The removed records, the worst first, a line of JSON each."""
        removed = (suspects.weights == 0).nonzero()[:, 0].tolist()
        effects = suspects.effects.tolist()
        lines = []
        for index in sorted(removed, key=lambda index: effects[index]):
            record = self._inputs.division.training[index]
            preference = record.preference
            line = {
                "first": preference.first, "second": preference.second, "choice": preference.choice,
                "rater": preference.rater, "time": preference.time, "group": record.group, "line": record.line,
                "effect": effects[index], "why": _reason(effects[index], record.group, self._options.defence),
            }  # fmt: skip
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
        return "".join(lines).encode()

    def _notes(self, final: LearnedReward, monitor: MonitorRecord | None) -> tuple[str, ...]:
        notes, labels = [], self._pairs.labels
        if self._options.trusted is not None and not self._inputs.division.audited:
            notes.append(
                "no pair is in both --preferences and --trusted, so nothing is audited; have trusted raters choose"
                " again in some of the pairs"
            )
        waits = self._options.defence == "none" or self._options.defends_at_alarm
        if not waits and (monitor is None or not monitor.alarm):
            notes.append(
                "the monitor has no evidence against the preferences; where they are honest, a defence removes"
                " about a fifth of them wrongly (docs/commands.md)"
            )
        if len(labels) > 1 and bool((labels == labels[0]).all()):
            notes.append(f"every record prefers the {'first' if labels[0] else 'second'} sample; are they choices?")
        if final.accuracy is None:
            notes.append("the records are about a single pair, so no accuracy can be measured; give more")
        elif final.accuracy.low <= _CHANCE:
            notes.append(
                f"the reward is not known to predict better than chance ({final.accuracy.num_pairs} held-out records);"
                " more records would tell"
            )
        if not final.converged:
            notes.append("the fit of the reward has not converged; the reward is that of its last step")
        return tuple(notes)


def _address(uri: str | None) -> str | None:
    return None if uri is None else open_store(uri).uri


def _reason(effect: float, group: str, defence: str) -> str:
    trusted = f"the trusted choices of group '{group}'" if defence == "group" else "the trusted choices"
    if effect < 0:
        return f"pulls the reward away from {trusted}: without it, their mean loss is predicted to fall"
    return f"once worse records were removed, it pulled the reward away from {trusted}"


def _proportion(accuracy: Accuracy | None) -> Proportion | None:
    if accuracy is None:
        return None
    return Proportion(value=accuracy.value, low=accuracy.low, high=accuracy.high, total=accuracy.num_pairs)


def _reward_bytes(final: LearnedReward, features: SampleFeatures) -> bytes:
    """The file of a reward: standardisation and parameters, and what they are parameters of."""
    description = {
        "model": "network" if isinstance(final.model, NetworkReward) else "linear",
        "width": final.model.width if isinstance(final.model, NetworkReward) else 0,
        "clip": features.clip_digest,
        "l2": final.l2,
    }
    tensors = {
        "parameters": final.parameters.contiguous(),
        "mean": final.standardisation.mean.contiguous(),
        "scale": final.standardisation.scale.contiguous(),
    }
    return safetensors.torch.save(tensors, {"reward": json.dumps(description)})
