"""What all classifiers said of the samples of a row, by the scores that its run recorded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.run.outcomes import asked_classes
from engine.errors import JobError
from engine.job.columns import GUIDES
from engine.job.records import is_scored
from engine.job.spec import JobSpec
from engine.models.independence import are_same_models
from engine.studies.samples import StudiedRun, read_attempts
from engine.studies.transfer.rows import Design, Row

_COLUMNS = [
    "key", "request", "method", "prompt", "seed", "class_index", "kldb_classes", "status", "scored",
    "predicted_class", "risk", "transfer", "oracles",
]  # fmt: skip
Flags = NDArray[np.bool_]
Values = NDArray[np.float64]
# By column of the matrix, the oracles that count for it, as their places among those that guided nothing.
Judges = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowSamples:
    """The N scored samples of a row, and what K classifiers and O oracles say of them.

    Attributes:
        noise: of each sample what it began with: request, prompt and seed.
        errs: whether each classifier predicts a class that was not asked for, [N, K].
        risks: -log p of the class under each classifier, in nats, [N, K].
        agrees: whether each oracle that guided nothing predicts a class that was asked for, [N, O].
        num_failed: samples without scores.
    """

    row: Row
    noise: tuple[tuple[str, str, int], ...]
    errs: Flags
    risks: Values
    agrees: Flags
    num_failed: int = 0

    def __len__(self) -> int:
        return len(self.noise)

    def valid(self, place: int, judges: Sequence[int]) -> Flags:
        """Whether each sample is a valid failure of a classifier, [N]: it errs, and these oracles all agree."""
        return self.errs[:, place] & self.agrees[:, list(judges)].all(1)

    def of_request(self, request: str) -> RowSamples:
        """The samples of a request."""
        return self.take([place for place, (name, _, _) in enumerate(self.noise) if name == request])

    def take(self, rows: Sequence[int]) -> RowSamples:
        """Some of the samples, in this order."""
        chosen = list(rows)
        return RowSamples(
            row=self.row,
            noise=tuple(self.noise[place] for place in chosen),
            errs=self.errs[chosen],
            risks=self.risks[chosen],
            agrees=self.agrees[chosen],
        )


def read_row(run: StudiedRun, row: Row, design: Design, oracles: Sequence[str]) -> RowSamples:
    """The samples of a row's run.

    Args:
        oracles: addresses of those that guided nothing.

    Raises:
        JobError: no sample was scored.
        CorruptShardError: a shard is not whole.
    """
    records = list(read_attempts(run, [request.name for request in run.job.requests], _COLUMNS))
    scored = [record for record in records if is_scored(record)]
    if not scored:
        raise JobError(f"{run.store.uri}: none of its {len(records)} samples was scored; its report says why")
    said = [_said(record, run.job.models.target) for record in scored]
    asked = [asked_classes(record) for record in scored]
    addresses = list(design.classifiers.values())
    opinions = [{entry["model"]: entry["predicted_class"] for entry in record["oracles"]} for record in scored]
    return RowSamples(
        row=row,
        noise=tuple((record["request"], record["prompt"], record["seed"]) for record in scored),
        errs=np.array(
            [[one[address][0] not in wanted for address in addresses] for one, wanted in zip(said, asked, strict=True)],
            dtype=bool,
        ),
        risks=np.array([[one[address][1] for address in addresses] for one in said], dtype=np.float64),
        agrees=np.array(
            [[one[address] in wanted for address in oracles] for one, wanted in zip(opinions, asked, strict=True)],
            dtype=bool,
        ).reshape(len(scored), len(oracles)),
        num_failed=len(records) - len(scored),
    )


def _said(record: Mapping[str, Any], target: str) -> dict[str, tuple[int, float]]:
    """Predicted class and risk by the address of each classifier."""
    said = {
        entry["model"].removesuffix(GUIDES): (entry["predicted_class"], entry["risk"]) for entry in record["transfer"]
    }
    return said | {target: (record["predicted_class"], record["risk"])}


def judges_of(job: JobSpec, design: Design) -> Judges:
    """The oracles that say whether a failure of each classifier is valid: of those that guided nothing, all others."""
    oracles = job.independent_oracles
    return {
        name: tuple(place for place, oracle in enumerate(oracles) if not are_same_models(oracle, address))
        for name, address in design.classifiers.items()
    }


def common_rows(samples: Sequence[RowSamples]) -> list[RowSamples]:
    """Of several rows the samples that began with the same noise, in the same order."""
    places = [{noise: place for place, noise in enumerate(one.noise)} for one in samples]
    shared = [noise for noise in samples[0].noise if all(noise in known for known in places)]
    return [one.take([known[noise] for noise in shared]) for one, known in zip(samples, places, strict=True)]
