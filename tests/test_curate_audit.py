"""The audit of preferences: a matching that no choice can change, and a state that goes on from file to file."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest
import safetensors.torch
import torch

from engine.data.stores.opening import open_store
from engine.errors import JobError
from engine.methods.curation.learning import LearnOptions, learn_reward, standardise
from engine.methods.curation.preferences import Pairs, Preference
from engine.studies.curate.audit import AuditedRecord, alarm_sentence, audit_records, describe_monitor, divide, unseen
from engine.studies.curate.audit_state import (
    StoredAudit,
    audit_bytes,
    new_audit,
    pair_name,
    parse_audit,
    read_audit,
    read_stopped_audit,
)
from engine.studies.curate.preference_files import PreferenceRecord

DIGEST = "c" * 32
NUM_FEATURES = 3


def record(first: str, second: str, choice: int, line: int, time: float = 0.0, rater: str = "") -> PreferenceRecord:
    preference = Preference(first=first, second=second, choice=choice, rater=rater, time=time)
    return PreferenceRecord(preference=preference, group="", line=line)


def test_pairs_of_both_files_are_withheld_and_matched_one_to_one():
    """In whatever order a file names the two samples; records beyond the trusted choices are withheld unmatched."""
    records = [record("a", "b", 0, 1), record("b", "a", 0, 2, time=-1), record("c", "d", 1, 3), record("a", "b", 1, 4)]
    trusted = [record("b", "a", 1, 1, time=9), record("a", "b", 1, 2, time=5), record("x", "y", 0, 3)]
    division = divide(records, trusted)
    assert [part.line for part in division.training] == [3] and division.num_withheld == 3
    assert [(part.record.line, part.trusted.line) for part in division.audited] == [(2, 2), (1, 1)]
    # The trusted raters prefer b, then a; the records name b first, then a.
    assert [part.trusted_label for part in division.audited] == [1.0, 1.0]


def test_no_choice_changes_the_matching():
    """All choices of six records of two pairs, exchanged one by one: who could choose the order could win the bets."""
    places = [("a", "b"), ("b", "a"), ("a", "b"), ("c", "d"), ("d", "c"), ("c", "d")]
    matchings = set()
    for changed in range(7):
        records = [record(*pair, int(n == changed), n, time=n % 2) for n, pair in enumerate(places)]
        trusted = [record(*pair, int(n != changed), n, time=-n) for n, pair in enumerate(places)]
        matchings.add(tuple((part.record.line, part.trusted.line) for part in divide(records, trusted).audited))
    assert len(matchings) == 1


class Rounds:
    """Simulated rounds of records, of which some are audited."""

    def __init__(self, count: int = 40) -> None:
        generator = torch.Generator().manual_seed(0)
        self.features = torch.randn(2 * count, NUM_FEATURES, generator=generator)
        self.records = [record(f"s{2 * n}", f"s{2 * n + 1}", n % 2, n) for n in range(count)]
        self.trusted = [record(f"s{2 * n}", f"s{2 * n + 1}", n // 2 % 2, n) for n in range(count)]
        self.checksums = {f"s{n}": f"image {n}" for n in range(2 * count)}
        pairs = self.pairs(self.records)
        self.learned = learn_reward(pairs, torch.arange(count), LearnOptions(l2=0.1))

    def pairs(self, records: list[PreferenceRecord]) -> Pairs:
        first, second = (
            self.features[[int(getattr(part.preference, name)[1:]) for part in records]] for name in ("first", "second")
        )
        return Pairs(first, second, torch.tensor([1.0 - part.preference.choice for part in records]).double())

    def audit(self, stored: StoredAudit, start: int, stop: int) -> StoredAudit:
        audited = [
            AuditedRecord(record=one, trusted=other)
            for one, other in zip(self.records[start:stop], self.trusted[start:stop], strict=True)
        ]
        return audit_records(stored, self.learned, unseen(audited, self.checksums, set(stored.names)), self.pairs)


def test_a_state_goes_on_from_its_file_as_if_it_had_never_been_stored():
    """Equal states give equal bytes; records that were bet on are not bet on again, whichever run shows the images."""
    rounds = Rounds()
    start = new_audit(standardise(rounds.features), DIGEST)
    first = rounds.audit(start, 0, 15)
    second, reread = rounds.audit(first, 10, 40), rounds.audit(parse_audit(audit_bytes(first)), 10, 40)
    assert len(second.names) == 40 == len(set(second.names)) and int(second.state.num_differing) == 20
    assert audit_bytes(second) == audit_bytes(reread)
    assert float(second.state.e_value) != float(first.state.e_value)
    assert audit_bytes(rounds.audit(second, 0, 40)) == audit_bytes(second)
    assert pair_name("x", "y") == pair_name("y", "x") != pair_name("x", "z")


def changed(data: bytes, description: dict | None = None, **tensors: torch.Tensor | None) -> bytes:
    """The file of a state with other tensors."""
    stored = safetensors.torch.load(data) | tensors
    kept = {name: value for name, value in stored.items() if value is not None}
    return safetensors.torch.save(kept, {"audit": json.dumps(description or {"version": 1, "clip": DIGEST})})


def test_a_state_that_no_monitor_wrote_is_refused(tmp_path):
    """Shapes, types, values that would silence or raise the alarm, other versions, cut files, pickles."""
    rounds = Rounds(6)
    data = audit_bytes(rounds.audit(new_audit(standardise(rounds.features), DIGEST), 0, 6))
    assert parse_audit(changed(data)).clip_digest == DIGEST
    nan = torch.full((3,), float("nan"), dtype=torch.float64)
    for bad in (
        b"", b"\x80\x04 pickle", data[:100], data[:-1], b"\xff" * 200,
        changed(data, {"version": 2, "clip": DIGEST}), changed(data, {"version": 1, "clip": 7}),
        changed(data, {"versions": 1}), safetensors.torch.save({"mean": nan}),
        changed(data, extra=torch.zeros(1)), changed(data, names=None),
        changed(data, log_wealth=nan), changed(data, log_wealth=torch.zeros(2, dtype=torch.float64)),
        changed(data, first=torch.zeros(5, 3)), changed(data, first=torch.zeros(6, 3, dtype=torch.float64)),
        changed(data, trusted=torch.full((6,), 0.5, dtype=torch.float64)),
        changed(data, scale=torch.zeros(3, dtype=torch.float64)),
        changed(data, highest=torch.tensor(-1.0, dtype=torch.float64)),
        changed(data, log_wealth=torch.full((3,), 9.0, dtype=torch.float64)),
        changed(data, num_differing=torch.tensor(7.0, dtype=torch.float64)),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=r".+"):
            parse_audit(bad)
    check_refused_folders(tmp_path, data)


def test_damaged_states_are_refused_and_never_crash():
    """300 files with bytes of their own: read as a state, or refused by a `ValueError`."""
    rounds, draw = Rounds(6), random.Random(0)
    data = audit_bytes(rounds.audit(new_audit(standardise(rounds.features), DIGEST), 0, 6))
    num_refused = 0
    for _ in range(300):
        damaged = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.randrange(len(data) if draw.random() < 0.3 else 900)] = draw.randrange(256)
        try:
            parse_audit(bytes(damaged))
        except ValueError:
            num_refused += 1
    assert num_refused > 150


def check_refused_folders(home: Path, data: bytes) -> None:
    """What `--after` says of a folder without a state, with a damaged one, and with one of another CLIP model."""
    with pytest.raises(JobError, match="--after: there is no folder"):
        read_audit(str(home / "none"), DIGEST)
    (home / "curation").mkdir()
    with pytest.raises(JobError, match="not curated with --trusted"):
        read_audit(str(home), DIGEST)
    path = home / "curation/audit.safetensors"
    path.write_bytes(data[:-1])
    with pytest.raises(JobError, match=r"is damaged .*; restore it, or leave --after out"):
        read_audit(str(home), DIGEST)
    path.write_bytes(data)
    assert len(read_audit(str(home), DIGEST).names) == 6
    assert read_stopped_audit(open_store(str(home)), DIGEST) is None
    (home / "_state").mkdir()
    path.rename(home / "_state/audit.safetensors")
    assert len(read_audit(str(home), DIGEST).names) == 6
    with pytest.raises(JobError, match=r"--output: .*another CLIP model.*or choose another --output"):
        read_stopped_audit(open_store(str(home)), "d" * 32)
    with pytest.raises(JobError, match="another CLIP model"):
        read_audit(str(home), "d" * 32)


def test_an_alarm_says_what_it_means_and_what_to_do():
    rounds = Rounds(6)
    stored = rounds.audit(new_audit(standardise(rounds.features), DIGEST), 0, 6)
    state = stored.state
    loud = parse_audit(changed(audit_bytes(stored), highest=torch.tensor(2000.0, dtype=torch.float64)))
    assert state.num_differing == 3 and not describe_monitor(stored, None, None, 0.05, None).alarm
    monitor = describe_monitor(loud, None, math.inf, 0.05, "before")
    assert (
        monitor.covariance is None
        and monitor.alarm
        and monitor.highest < 1e305
        and (monitor.num_audited, monitor.after) == (6, "before")
    )
    sentence = alarm_sentence(monitor, defence="none", is_selected=False)
    assert "3 of 6 audited records" in sentence and "nothing was selected" in sentence
    assert "--defence influence --on-alarm continue" in sentence
    assert "--on-alarm" not in alarm_sentence(monitor, defence="influence", is_selected=True)
