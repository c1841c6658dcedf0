"""The signal of people's preference records in a round of pipelines: learned, watched and defended as by `curate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from engine.data.run.file_names import AUDIT
from engine.driver.progress import Display
from engine.errors import JobError
from engine.studies.curate.candidates import Candidates
from engine.studies.curate.options import CurateOptions
from engine.studies.curate.preference_files import read_preferences
from engine.studies.curate.program import SignalRecord
from engine.studies.curate.selection import SelectionOptions
from engine.studies.curate.signal import learn_signal, read_signal
from engine.studies.loop.results import CURATED, GENERATED
from engine.studies.loop.spec import LoopSpec, MonitorSpec
from engine.studies.samples import open_study


class NoRecordsError(JobError):
    """People have not chosen between samples of a round yet."""


@dataclass(frozen=True, slots=True, eq=False)
class RecordedSignal:
    """A reward learned from a file of records.

    Attributes:
        rewards: [N] of the candidates, in nats.
        record: for the curated run, with the files of reward, monitor and suspects.
    """

    rewards: Tensor
    record: SignalRecord

    @property
    def alarm(self) -> Tensor:
        """[] whether the monitor has raised its alarm by now."""
        return torch.tensor(self.record.monitor is not None and self.record.monitor.alarm)

    def measures(self, lane: int) -> dict[str, Any]:
        """What `loop.json` has of it; which records were tampered with is not known."""
        accuracy, monitor = self.record.reward.accuracy, self.record.monitor
        return {
            "accuracy": accuracy
            and {"value": accuracy.value, "low": accuracy.low, "high": accuracy.high, "records": accuracy.total},
            "monitor": monitor
            and {
                "e_value": monitor.e_value,
                "alarm": monitor.alarm,
                "audited": monitor.num_audited,
                "differing": monitor.num_differing,
            },
            "removed": None,
        }


def learn_recorded(
    spec: LoopSpec, arm: str, candidates: Candidates, before: Sequence[Path], seed: int, display: Display
) -> RecordedSignal:
    """Learn the reward of a round from the job's files, read now.

    Args:
        spec: the loop, with `curation.preferences`.
        arm: name of the arm, whose defence acts.
        candidates: of the round.
        before: folders of the rounds before, whose samples records may name too. The monitor of the last one is
            continued.
        seed: of the split of the records.
        display: of the round.

    Raises:
        NoRecordsError: the preferences have no pair of samples of this round.
        JobError: a file is not as it must be.
    """
    assert spec.curation.preferences is not None
    own, file = set(candidates.keys), read_preferences(spec.curation.preferences, "--preferences")
    if not any(record.pair <= own for record in file.records):
        raise NoRecordsError(candidates.parent.store.uri)
    earlier = before[-1] / CURATED if before else None
    continued = earlier is not None and spec.curation.trusted is not None and (earlier / AUDIT).is_file()
    options = CurateOptions(
        preferences=spec.curation.preferences,
        trusted=spec.curation.trusted,
        after=str(earlier) if continued else None,
        defence=spec.arms[arm].defence,
        defends_at_alarm=True,
        level=spec.monitor.level if spec.monitor else MonitorSpec().level,
        selection=SelectionOptions(seed=seed),
    )
    # Who removes old runs for their space loses their records alone.
    runs = [open_study(str(path / GENERATED)) for path in before if (path / GENERATED).is_dir()]
    inputs = read_signal(open_study(candidates.parent.store.uri), options, before=runs)
    learned = learn_signal(inputs, options, display)
    for note in learned.notes:
        display.notice(note)
    return RecordedSignal(torch.tensor(list(learned.rewards(candidates)), dtype=torch.float64), learned.signal)
