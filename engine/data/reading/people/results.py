"""The results of a review, as plain data."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from engine.methods.agreement import Agreement
from engine.methods.intervals import Estimate

# Levels of `GroupShares`.
WHOLE, REQUEST, CLASS = "all", "request", "class"
# A rater who answers fewer of the controls and repetitions alike fails the attention checks.
MIN_ATTENTION = 0.7
# With fewer of them nothing can be said.
MIN_CHECKS = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """How many of some answers are as expected."""

    num_right: int
    total: int

    @property
    def share(self) -> float | None:
        """None without an answer."""
        return self.num_right / self.total if self.total else None


@dataclass(frozen=True, slots=True, kw_only=True)
class RaterResult:
    """A rater.

    Attributes:
        num_answers: that count, controls and repetitions included.
        num_none: of these, "none of these" or "cannot tell".
        real: answers to real images that are their label.
        plain: answers to prompt-only samples that are their label.
        repeats: answers to repetitions that are as the first one was.
        seconds: median for an answer.
    """

    name: str
    num_answers: int
    num_none: int
    real: Count
    plain: Count
    repeats: Count
    seconds: float

    @property
    def is_inattentive(self) -> bool:
        """Whether the attention checks fail; the answers count all the same."""
        checks = (self.real, self.repeats)
        return any(check.total >= MIN_CHECKS and (check.share or 0.0) < MIN_ATTENTION for check in checks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """A share of a group's images.

    Attributes:
        machine: by the machine's verdicts; None without them.
        human: by people alone, over the strata; None where nobody looked at an image.
        corrected: the machine's, corrected by people's answers; None without either.
    """

    machine: float | None
    human: Estimate | None
    corrected: Estimate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupShares:
    """All that was reviewed, a request or a class of it.

    Attributes:
        level: `all`, `request` or `class`.
        name: of the request or class; empty for all.
        num_images: in the population.
        num_reviewed: of these, images that people looked at.
        valid: images whose label people say.
        failures: valid ones on which the target errs.
    """

    level: str
    name: str
    num_images: int
    num_reviewed: int
    valid: Shares
    failures: Shares


@dataclass(frozen=True, slots=True, kw_only=True)
class StratumResult:
    """A stratum of the design.

    Attributes:
        num_images, num_drawn: of the design; 0 where the design is not stored.
        human: mean share of raters who say the label, of the images that were looked at.
    """

    name: str
    num_images: int
    num_drawn: int
    num_reviewed: int
    human: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class RuleResult:
    """A rule that takes images for valid, against people.

    Attributes:
        kept: share of the population that it takes.
        precision: of what it takes, the share that people say.
        recall: of what people say, the share that it takes.
        wrong_passed: of wrong labels on which the target errs, the share that it takes.
    """

    name: str
    kept: float
    precision: Estimate | None
    recall: Estimate | None
    wrong_passed: Estimate | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoreResult:
    """How well a score orders images by whether people say the label."""

    name: str
    auc: Estimate


@dataclass(frozen=True, slots=True, kw_only=True)
class Recommendation:
    """The least threshold of a score from which on people agree often enough.

    Attributes:
        goal: that the lower bound of the precision reaches.
        threshold: None where no threshold does.
        rule: the rule of this threshold; where there is none, that of the threshold with the highest lower bound.
    """

    score: str
    goal: float
    threshold: float | None
    rule: RuleResult | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PeopleResults:
    """What people's answers say of a run.

    Attributes:
        design: digest of the design that the estimates are of.
        population: what its items stand for, in words.
        requests: of the population.
        num_images: in the population.
        num_drawn: items of the design that are no controls; 0 where it is not stored.
        num_reviewed: images among these with an answer.
        machine: the name of the machine's verdict; empty without an oracle.
        agreement: of the raters.
        groups: all, then requests, then classes.
        notes: what a reader has to know of the figures.
    """

    design: str
    population: str
    requests: tuple[str, ...]
    num_images: int
    num_drawn: int
    num_reviewed: int
    machine: str
    raters: tuple[RaterResult, ...]
    agreement: Agreement
    groups: tuple[GroupShares, ...]
    strata: tuple[StratumResult, ...]
    rules: tuple[RuleResult, ...]
    scores: tuple[ScoreResult, ...]
    recommendation: Recommendation | None
    notes: tuple[str, ...]

    @property
    def whole(self) -> GroupShares:
        """The figures over all that was reviewed."""
        return self.groups[0]

    def to_document(self) -> dict[str, Any]:
        """As plain data, for `--json`."""
        document = dataclasses.asdict(self)
        for rater, fields in zip(self.raters, document["raters"], strict=True):
            fields["is_inattentive"] = rater.is_inattentive
        return document
