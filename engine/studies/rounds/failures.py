"""What the run of a round says of its target: valid failures, and the contexts that they are in."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.data.run.outcomes import asked_classes, target_errs
from engine.job.columns import ASKED, ERRS, NO_CLASS
from engine.job.records import STATUS_FAILED
from engine.studies.compare.significance import holm
from engine.studies.samples import StudiedRun, read_attempts

LEVEL = 0.05
ALL_REQUESTS = "all"
_COLUMNS = ["request", "context", "status", "accepted", "oracle_class", *ASKED, *ERRS]


class FoundSample(NamedTuple):
    """A scored sample: what it was asked for, and what came of it.

    Attributes:
        is_valid_failure: whether the target errs and the oracle agrees with the label; without an oracle, whether it
            errs.
    """

    request: str
    context: str
    is_valid_failure: bool
    is_accepted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFailures:
    """Counts of a request, or of `ALL_REQUESTS`."""

    request: str
    attempts: int
    valid_failures: int
    accepted: int


def read_found(run: StudiedRun, requests: Sequence[str]) -> list[FoundSample]:
    """Every scored sample of some requests, stored or not."""
    return [
        FoundSample(
            row["request"],
            row["context"],
            target_errs(row) and row["oracle_class"] in (NO_CLASS, *asked_classes(row)),
            row["accepted"],
        )
        for row in read_attempts(run, requests, _COLUMNS)
        if row["status"] != STATUS_FAILED
    ]


def count_failures(samples: Iterable[FoundSample]) -> list[RequestFailures]:
    """Counts of all requests together, and of each."""
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    counts[ALL_REQUESTS] = [0, 0, 0]
    for sample in samples:
        for name in (ALL_REQUESTS, sample.request):
            for place, value in enumerate((1, sample.is_valid_failure, sample.is_accepted)):
                counts[name][place] += value
    return [
        RequestFailures(request=name, attempts=attempts, valid_failures=failures, accepted=accepted)
        for name, (attempts, failures, accepted) in counts.items()
    ]


def weak_contexts(samples: Sequence[FoundSample]) -> list[str]:
    """Contexts with more valid failures than the others, the weakest first.

    Fisher's exact test, one-sided, of each context against all others together, adjusted by Holm over the contexts. It
    is decided by generated samples alone, so that test images can measure what comes of it.

    Args:
        samples: of requests whose failures depend on the context alone, not on guidance.
    """
    from scipy.stats import fisher_exact

    totals = Counter(sample.context for sample in samples)
    failures = Counter(sample.context for sample in samples if sample.is_valid_failure)
    num_failures, contexts = failures.total(), sorted(totals)
    if len(contexts) < 2:
        return []
    p_values = []
    for context in contexts:
        own, others = failures[context], num_failures - failures[context]
        table = [[own, totals[context] - own], [others, len(samples) - totals[context] - others]]
        p_values.append(float(fisher_exact(table, alternative="greater").pvalue))
    weak = [context for context, p_value in zip(contexts, holm(p_values), strict=True) if p_value < LEVEL]
    return sorted(weak, key=lambda context: (-failures[context] / totals[context], context))
