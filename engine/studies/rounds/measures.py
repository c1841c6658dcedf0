"""From right and wrong predictions of all rounds to figures: accuracies, changes, forgetting, failures left."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.methods.intervals import Estimate, wilson_interval
from engine.studies.crossed import crossed_difference
from engine.studies.retrain.arm_records import BEFORE, ArmChoice
from engine.studies.retrain.changes import ArmChange, compare_arms, weak_contexts
from engine.studies.rounds.convergence import FailureCount, decay_rate
from engine.studies.rounds.design import Design
from engine.studies.rounds.failures import FoundSample, RequestFailures, count_failures, read_found
from engine.studies.rounds.failures import weak_contexts as weak_in_run
from engine.studies.rounds.forgetting import Forgetting, measure_forgetting
from engine.studies.rounds.material import CORRUPTED, OTHER, SEEN, Material
from engine.studies.rounds.player import Played
from engine.studies.samples import depends_on_context_alone

Rows = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Weak:
    """The contexts that are to gain.

    Attributes:
        contexts: those of them that test images have.
        missing: those that none has.
        source: how they were chosen, in words.
    """

    contexts: tuple[str, ...]
    missing: tuple[str, ...]
    source: str


@dataclass(frozen=True, kw_only=True)
class Figures:
    """All figures of a study; rounds from 0, the target before, to R."""

    design: Design
    material: Material
    played: Played

    @cached_property
    def found(self) -> dict[tuple[str, int], list[FoundSample]]:
        """By arm and round of the run, the scored samples of the risky requests."""
        kept: dict[str, list[FoundSample]] = {}
        found = {}
        for key, run in self.played.runs.items():
            if run.store.uri not in kept:
                kept[run.store.uri] = read_found(run, self.design.risky)
            found[key] = kept[run.store.uri]
        return found

    @cached_property
    def weak(self) -> Weak:
        """The contexts that are to gain: given, found by the first run, or those of the test images."""
        known, spec = set(self.plain_rows), self.design.spec
        if spec.weak is not None:
            return Weak(contexts=spec.weak, missing=(), source="given")
        alone = {request.name for request in self.design.job.requests if depends_on_context_alone(request)}
        first = next((samples for (_, number), samples in self.found.items() if number == 1), [])
        first = [sample for sample in first if sample.request in alone]
        if len({sample.context for sample in first} & known) > 1:
            names = weak_in_run(first)
            return Weak(
                contexts=tuple(name for name in names if name in known),
                missing=tuple(name for name in names if name not in known),
                source="found by the first run: more valid failures than in the other contexts (Fisher's test, Holm)",
            )
        chosen = weak_contexts({BEFORE: [self.played.before[: self.material.num_plain]]}, self._contexts)
        return Weak(
            contexts=chosen,
            missing=(),
            source="chosen on the test images themselves, which flatters a gain: the first run has no unguided samples"
            " in several of their contexts",
        )

    @cached_property
    def plain_rows(self) -> dict[str, Rows]:
        """The rows of each context of the test images, without corruptions."""
        return {name: rows for name, rows in self.material.rows_of.items() if self.material.kind(name) != CORRUPTED}

    @cached_property
    def groups(self) -> dict[str, Rows]:
        """Rows of the test images in weak contexts, in distribution, in other contexts, and of the corrupted copies."""
        kinds = self.material.kinds
        weak = [self.plain_rows[name] for name in self.weak.contexts]
        return {
            "weak": np.unique(np.concatenate(weak)) if weak else np.empty(0, np.int64),
            "seen": np.flatnonzero(kinds == SEEN),
            "other": np.flatnonzero(kinds == OTHER),
            "corrupted": np.flatnonzero(kinds == CORRUPTED),
        }

    @cached_property
    def units(self) -> NDArray[np.int64]:
        """Of each test image, the number of its origin, [N]."""
        return _numbered(np.array(self.material.test.origins))

    @property
    def _contexts(self) -> tuple[tuple[str, ...], ...]:
        return self.material.test.contexts[: self.material.num_plain]

    def right(self, arm: str, number: int) -> NDArray[np.bool_]:
        """Whether predictions are right, [S, N] of seed and image; of the target before [1, N]."""
        return self.played.right[arm][:, number - 1] if number and arm != BEFORE else self.played.before[None]

    def accuracy(self, arm: str, number: int, rows: Rows) -> Estimate | None:
        """On some test images, with its interval over seeds and images; None where there are none."""
        if not len(rows):
            return None
        right = self.right(arm, number)[:, rows]
        if len(right) == 1:
            return wilson_interval(int(right.sum()), right.size)
        estimate = crossed_difference(right.astype(np.float64), units=_numbered(self.units[rows])).estimate
        return Estimate(estimate.value, max(0.0, estimate.low), estimate.high)

    def difference(self, arm: str, base: str, number: int, rows: Rows) -> Estimate | None:
        """Accuracy of an arm less that of another after a round, with its interval over seeds and images."""
        if not len(rows):
            return None
        values = self.right(arm, number)[:, rows].astype(np.float64) - self.right(base, number)[:, rows]
        return crossed_difference(values, units=_numbered(self.units[rows])).estimate

    def change(self, arm: str) -> ArmChange:
        """What an arm changes after the last round against the base, context by context."""
        last, base = self.design.spec.rounds, self.design.base
        count = self.material.num_plain
        right = {name: [*self.right(name, last)[:, :count]] for name in (arm, base)}
        return compare_arms(
            right,
            self._contexts,
            arm=arm,
            base=base,
            weak=self.weak.contexts,
            origins=self.material.test.origins[:count],
        )

    def forgetting(self, arm: str) -> Forgetting | None:
        """By context, after the last round; None where test images have no contexts."""
        if not self.plain_rows:
            return None
        trained = self.played.right[arm][..., : self.material.num_plain]
        before = np.broadcast_to(self.played.before[: self.material.num_plain], (len(trained), 1, trained.shape[-1]))
        right = np.concatenate([before, trained], axis=1)
        return measure_forgetting(right, self.plain_rows, self.material.test.origins[: self.material.num_plain])

    def failures(self, arm: str, number: int) -> list[RequestFailures]:
        """Failures of the network after a round, by request, all together first; none where no run counted them."""
        found = self.found.get((arm, number + 1))
        return count_failures(found) if found is not None else []

    def decay(self, arm: ArmChoice) -> Estimate | None:
        """The rate at which failures vanish from round to round."""
        counts = [self.failures(arm.label, number) for number in range(self.design.spec.rounds + 1)]
        return decay_rate([FailureCount(rows[0].valid_failures, rows[0].attempts) for rows in counts if rows])


def failure_rate(rows: Sequence[RequestFailures]) -> Estimate | None:
    """Valid failures among all attempts; None where there are none."""
    if not rows or not rows[0].attempts:
        return None
    return wilson_interval(rows[0].valid_failures, rows[0].attempts)


def _numbered(units: NDArray[Any]) -> Rows:
    return np.asarray(np.unique(units, return_inverse=True)[1])
