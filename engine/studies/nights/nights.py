"""Two runs beside one another: what a target fails on now and did not, by request, class and context.

A sample of one run is the pair of a sample of the other where request, prompt and seed are equal: both began with one
noise. A request whose samples are pairs is compared pair by pair, any other as two groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from engine.data.run.file_names import MANIFEST, METADATA, SUCCESS
from engine.data.run.manifest_reading import read_manifest
from engine.data.run.outcomes import ASKED, ERRS, errors, joint_rows, oracle_agreement, scored_rows
from engine.data.run.schema import check_rows
from engine.data.run.summary import class_texts
from engine.data.stores.file_errors import explained
from engine.data.stores.opening import open_store
from engine.errors import JobError, OutputError
from engine.job.class_names import distinct_names
from engine.job.spec import JOINT_SEPARATOR
from engine.studies.intervals import LEVEL
from engine.studies.nights.differences import Difference, holm, median_difference, share_difference

if TYPE_CHECKING:
    import pyarrow as pa

LEVELS = ("request", "class", "context")
SHARES = ("error_rate", "valid_failures")
MEDIANS = ("risk", "conformity", "kldb")
METRICS = (*SHARES, *MEDIANS)
# Of these more is worse.
FAILURES = ("error_rate", "valid_failures", "risk")
# Fewer samples than this on a side are not compared.
MIN_SAMPLES = 5
# With fewer pairs than this share of the smaller side, a request is compared as two groups.
MIN_PAIRED_SHARE = 0.8
# How much more one class and context may have grown in number than another, before groups are cut to equal parts.
MAX_IMBALANCE = 1.1
MAX_LISTED = 20

_COLUMNS = [
    *ASKED, *ERRS, "request", "method", "class_name", "prompt", "context", "seed", "status", "risk", "conformity",
    "kldb", "oracle_class",
]  # fmt: skip

Texts = NDArray[np.object_]
Rows = NDArray[np.intp]


@dataclass(frozen=True, slots=True, kw_only=True)
class Night:
    """The scored samples of a run, a column each, [N].

    Attributes:
        target: `address` and `digest` of the classifier that scored.
        methods: of each request, by name.
        classes: what was asked for: a class, or the classes of a joint prompt.
        is_error: whether the target predicts a class that was not asked for.
        valid: 1 where the target errs and the oracle agrees, 0 where not, NaN without an oracle.
        unknown: requests of which neither of the two is known; of earlier baselines those with a joint prompt.
    """

    address: str
    name: str
    target: dict[str, str]
    labels: tuple[str, ...]
    methods: dict[str, str]
    keys: Texts
    requests: Texts
    classes: Texts
    contexts: Texts
    prompts: Texts
    seeds: NDArray[np.int64]
    is_error: NDArray[np.bool_]
    valid: NDArray[np.float64]
    risk: NDArray[np.float64]
    conformity: NDArray[np.float64]
    kldb: NDArray[np.float64]
    unknown: frozenset[str] = frozenset()

    def metric(self, name: str, rows: Rows) -> Any:
        """A metric's column at some rows; None where it is not known of any of them."""
        if name in SHARES and not self.unknown.isdisjoint(self.requests[rows]):
            return None
        if name == "error_rate":
            return self.is_error[rows]
        if name == "valid_failures":
            values = self.valid[rows]
            return None if np.isnan(values).any() else values > 0
        return getattr(self, name)[rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """A request, or one class or context of it, in both runs.

    Attributes:
        level: `request`, `class` or `context`.
        group: name of the class, or the context; empty for a request.
        num_pairs: pairs compared; 0 where the groups are.
        differences: by metric.
        adjusted: p by metric after Holm, over the whole comparison; of the tests that could reject.
        num_arisen, num_mended: pairs that fail now and did not, and the other way round.
    """

    request: str
    level: str
    group: str
    num_old: int
    num_new: int
    num_pairs: int
    num_arisen: int
    num_mended: int
    differences: dict[str, Difference]
    adjusted: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """A sample whose failure is new or mended; `key` is that of the newer run."""

    key: str
    old_key: str
    request: str
    class_name: str
    context: str
    old_risk: float
    new_risk: float


@dataclass(frozen=True, slots=True, kw_only=True)
class NightComparison:
    """What has changed between two runs.

    Attributes:
        notes: what was not compared, and why.
    """

    old: Night
    new: Night
    confidence: float
    rows: tuple[Compared, ...]
    arisen: tuple[Change, ...]
    mended: tuple[Change, ...]
    notes: tuple[str, ...]

    def significant(self, row: Compared) -> list[str]:
        """Metrics of a row that differ after the correction."""
        return [name for name, p_value in row.adjusted.items() if p_value < 1 - self.confidence]


# Reading -------------------------------------------------------------------------------------------------------------


def read_night(address: str) -> Night:
    """The scored samples of a run, or of a folder of `riskforge rescore`.

    Raises:
        OutputError: there is no such folder, or nothing that a finished run has.
        CorruptShardError: its manifest cannot be read.
    """
    import pyarrow as pa
    import pyarrow.dataset
    import pyarrow.parquet as pq

    store = open_store(address)
    if not store.exists(METADATA) or not store.exists(MANIFEST):
        raise OutputError(
            f"{address}: holds no {MANIFEST} with {METADATA}; give the folder of a run, or of a rescoring, that has"
            " come to its end"
        )
    path = store.fetch(METADATA)
    manifest = read_manifest(store)
    try:
        target = manifest["models"]["target"]
        with explained(path):
            table = pq.read_table(path, columns=_COLUMNS, partitioning=None).combine_chunks()
        check_rows(table, store.address(METADATA))
        return _night(store.uri, str(manifest["name"]), target, table)
    except (ValueError, KeyError, TypeError, AttributeError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise OutputError(f"{address}: cannot be read as a run ({reason}); `riskforge verify` says more") from error


def _night(address: str, name: str, target: dict[str, Any], table: pa.Table) -> Night:
    table = table.filter(scored_rows(table)).combine_chunks()
    labels = tuple(map(str, target["labels"]))
    oracle = oracle_agreement(table)
    is_error = errors(table)
    numbers = {one: np.asarray(table[one].to_numpy(), dtype=float) for one in MEDIANS}
    requests, methods = (_shared(table[one]) for one in ("request", "method"))
    return Night(
        address=address,
        name=name,
        target={key: str(target[key]) for key in ("address", "digest")},
        labels=labels,
        methods=dict(zip(requests.tolist(), methods.tolist(), strict=True)),
        keys=texts_of(table["key"].to_pylist()),
        requests=requests,
        classes=_class_names(table, labels),
        contexts=_shared(table["context"]),
        prompts=_shared(table["prompt"]),
        seeds=np.asarray(table["seed"].to_numpy(), dtype=np.int64),
        is_error=is_error,
        valid=np.where(oracle < 0, np.nan, (oracle > 0) & is_error),
        risk=numbers["risk"],
        conformity=numbers["conformity"],
        kldb=numbers["kldb"],
    )


def _class_names(table: pa.Table, labels: Sequence[str]) -> Texts:
    """What was asked for, row by row; rows of one class share one text."""
    texts = _shared(class_texts(table, labels))
    joint = np.flatnonzero(joint_rows(table))
    names = distinct_names(dict(enumerate(labels)))
    shared: dict[tuple[int, ...], str] = {}
    for row, members in zip(joint, table["kldb_classes"].take(joint).to_pylist(), strict=True):
        texts[row] = shared.setdefault(tuple(members), JOINT_SEPARATOR.join(names[one] for one in members))
    return texts


def _shared(column: pa.Array | pa.ChunkedArray) -> Texts:
    """A column of texts with one object for each distinct text, not one for each row."""
    import pyarrow as pa

    whole = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    encoded = whole.dictionary_encode()
    return texts_of(encoded.dictionary.to_pylist())[encoded.indices.to_numpy()]


def texts_of(values: Sequence[str]) -> Texts:
    """A column of texts."""
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


# Comparing -----------------------------------------------------------------------------------------------------------


def compare_nights(
    old: Night,
    new: Night,
    *,
    confidence: float = LEVEL,
    levels: Sequence[str] = LEVELS,
    advance: Callable[[str], None] = lambda text: None,
) -> NightComparison:
    """Compare two runs, request by request, each also by class and by context.

    Args:
        confidence: level of the intervals; one less it is the level of the tests, over all of them together.
        levels: which of `LEVELS` to compare at.

    Raises:
        JobError: the runs share nothing that could be compared.
    """
    _check_comparable(old, new)
    notes = list(_differing(old, new))
    rows: list[Compared] = []
    changes: dict[bool, list[Change]] = {True: [], False: []}
    for request in dict.fromkeys(old.requests):
        if request not in new.methods:
            continue
        advance(f"comparing request {request}")
        sides, is_paired, about = _match(old, new, request)
        notes += about
        if sides is None:
            continue
        rows += _compare_request(old, new, request, sides, is_paired, confidence, levels)
        if is_paired and request not in old.unknown | new.unknown:
            for is_new in changes:
                changes[is_new] += _changes(old, new, sides, is_new)
    if not rows:
        places = " or ".join(levels)
        raise JobError(
            [
                f"{old.address} and {new.address}: have nothing to compare: no {places} has {MIN_SAMPLES} samples"
                " in both; compare larger runs, or at other levels (--by)",
                *notes,
            ]
        )
    return NightComparison(
        old=old,
        new=new,
        confidence=confidence,
        rows=tuple(_adjusted(rows)),
        arisen=tuple(changes[True]),
        mended=tuple(changes[False]),
        notes=tuple(notes),
    )


def _check_comparable(old: Night, new: Night) -> None:
    if lines := label_differences(old.labels, new.labels):
        raise JobError([f"{old.address} and {new.address}: their targets have other classes", *lines])
    if not set(old.methods) & set(new.methods):
        raise JobError(
            f"{old.address} and {new.address}: share no request; the first has {_listed(old.methods)}, the second"
            f" {_listed(new.methods)}"
        )


def label_differences(old: Sequence[str], new: Sequence[str]) -> list[str]:
    """Lines for the classes that two lists do not have in common, or in another order."""
    lines = [f"class {index}: {a!r} -> {b!r}" for index, (a, b) in enumerate(zip(old, new, strict=False)) if a != b]
    if len(lines) > MAX_LISTED:
        lines[MAX_LISTED:] = [f"and {len(lines) - MAX_LISTED} more"]
    return lines + ([f"number of classes: {len(old)} -> {len(new)}"] if len(old) != len(new) else [])


def _listed(names: Sequence[str] | dict[str, str]) -> str:
    some = list(names)
    more = f" and {len(some) - MAX_LISTED} more" if len(some) > MAX_LISTED else ""
    return (", ".join(map(repr, some[:MAX_LISTED])) or "none") + more


def _differing(old: Night, new: Night) -> Iterator[str]:
    """What the two runs do not share."""
    for first, second in ((old, new), (new, old)):
        if missing := [name for name in first.methods if name not in second.methods]:
            yield f"only in {first.address}: {_listed(missing)}"
    for one in (old, new):
        if one.unknown:
            yield (
                f"{one.address}: is a baseline from before errors of joint prompts were counted outside their classes,"
                f" so those of {_listed(sorted(one.unknown))} are not compared; pin it again"
            )
    for name in old.methods:
        if old.methods[name] != new.methods.get(name, old.methods[name]):
            yield f"request {name!r}: method {old.methods[name]} -> {new.methods[name]}"


def _match(old: Night, new: Night, request: str) -> tuple[tuple[Rows, Rows] | None, bool, list[str]]:
    """Rows of a request in both runs, whether they are pairs, and what is left out; no rows where there are too few.

    Without pairs only classes and contexts count that both runs have, and in equal parts: another mixture would differ
    by itself.
    """
    a, b = (np.flatnonzero(one.requests == request) for one in (old, new))
    first, second = _identities(old, new, a, b)
    is_unique = all(len(np.unique(side)) == len(side) for side in (first, second))
    shared, of_a, of_b = np.intersect1d(first, second, return_indices=True)
    if is_unique and len(shared) >= max(MIN_SAMPLES, MIN_PAIRED_SHARE * min(len(a), len(b))):
        order = np.argsort(of_a)
        rows = (a[of_a[order]], b[of_b[order]])
        left = [len(side) - len(shared) for side in (first, second)]
        about = (
            [f"request {request!r}: {left[0]} and {left[1]} samples without a pair are left out"] if any(left) else []
        )
        return (rows[0], rows[1]), True, about
    strata = [set(zip(one.classes[rows], one.contexts[rows], strict=True)) for one, rows in ((old, a), (new, b))]
    common, about = strata[0] & strata[1], []
    if strata[0] != strata[1]:
        about = [f"request {request!r}: only the {len(common)} classes and contexts that both runs have are compared"]
        a, b = (
            np.array([row for row in rows if (one.classes[row], one.contexts[row]) in common], dtype=np.intp)
            for one, rows in ((old, a), (new, b))
        )
    before = len(a) + len(b)
    a, b = _balanced(old, new, a, b)
    if left_out := before - len(a) - len(b):
        about.append(
            f"request {request!r}: {left_out} samples are left out, so that both runs have each class and context"
            " equally often"
        )
    if min(len(a), len(b)) < MIN_SAMPLES:
        return None, False, [f"request {request!r}: {len(a)} and {len(b)} samples are too few to compare"]
    return (a, b), False, about


def _identities(old: Night, new: Night, a: Rows, b: Rows) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """A number for each row of both runs, equal where prompt and seed are."""
    known: dict[str, int] = {}
    sides = ((old, a), (new, b))
    prompts = np.array([known.setdefault(text, len(known)) for one, rows in sides for text in one.prompts[rows]])
    seeds, codes = np.unique(np.concatenate([one.seeds[rows] for one, rows in sides]), return_inverse=True)
    numbers = prompts.astype(np.int64) * len(seeds) + codes
    return numbers[: len(a)], numbers[len(a) :]


def _balanced(old: Night, new: Night, a: Rows, b: Rows) -> tuple[Rows, Rows]:
    """Rows of both runs with one mixture of classes and contexts; all of them where it is about one already.

    A quota makes more attempts where fewer are accepted, so that an easy class is a larger part where it became easier.
    Of a class and context that has more in one run the first ones by key are kept, as many as the other run has.
    """
    found: tuple[dict[tuple[str, str], list[int]], ...] = ({}, {})
    for strata, one, rows in zip(found, (old, new), (a, b), strict=True):
        for row in sorted(rows.tolist(), key=lambda row: str(one.keys[row])):
            strata.setdefault((one.classes[row], one.contexts[row]), []).append(row)
    ratios = [len(found[1][name]) / len(rows) for name, rows in found[0].items()]
    if not ratios or max(ratios) <= MAX_IMBALANCE * min(ratios):
        return a, b
    kept = [
        [row for name, rows in strata.items() for row in rows[: min(len(found[0][name]), len(found[1][name]))]]
        for strata in found
    ]
    return np.array(sorted(kept[0]), dtype=np.intp), np.array(sorted(kept[1]), dtype=np.intp)


def _compare_request(
    old: Night,
    new: Night,
    request: str,
    sides: tuple[Rows, Rows],
    is_paired: bool,
    confidence: float,
    levels: Sequence[str],
) -> Iterator[Compared]:
    a, b = sides
    groups: list[tuple[str, str, Rows, Rows]] = [("request", "", a, b)]
    for level, first, second in (("class", old.classes, new.classes), ("context", old.contexts, new.contexts)):
        names = list(dict.fromkeys(first[a]))
        if len(names) > 1:
            # Pairs have one prompt, so their class and context are those of the first.
            chosen = ((name, first[a] == name, (first[a] if is_paired else second[b]) == name) for name in names)
            groups += [(level, name, a[of_a], b[of_b]) for name, of_a, of_b in chosen]
    for level, name, one, other in groups:
        if level in levels and min(len(one), len(other)) >= MIN_SAMPLES:
            yield _compare_rows(old, new, (request, level, name), one, other, is_paired, confidence)


def _compare_rows(
    old: Night, new: Night, name: tuple[str, str, str], a: Rows, b: Rows, is_paired: bool, confidence: float
) -> Compared:
    differences = {}
    for metric in METRICS:
        first, second = old.metric(metric, a), new.metric(metric, b)
        if first is not None and second is not None:
            measure = share_difference if metric in SHARES else median_difference
            differences[metric] = measure(first, second, is_paired=is_paired, level=confidence)
    is_known = is_paired and "error_rate" in differences
    arisen, mended = (new.is_error[b] & ~old.is_error[a], old.is_error[a] & ~new.is_error[b]) if is_known else ((), ())
    return Compared(
        request=name[0],
        level=name[1],
        group=name[2],
        num_old=len(a),
        num_new=len(b),
        num_pairs=len(a) if is_paired else 0,
        num_arisen=int(sum(arisen)),
        num_mended=int(sum(mended)),
        differences=differences,
    )


def _changes(old: Night, new: Night, sides: tuple[Rows, Rows], is_new: bool) -> Iterator[Change]:
    """The pairs that fail now and did not, or the other way round, by key."""
    pairs = [(a, b) for a, b in zip(*sides, strict=True) if (old.is_error[a], new.is_error[b]) == (not is_new, is_new)]
    for a, b in sorted(pairs, key=lambda pair: str(new.keys[pair[1]])):
        yield Change(
            key=new.keys[b],
            old_key=old.keys[a],
            request=new.requests[b],
            class_name=new.classes[b],
            context=new.contexts[b],
            old_risk=float(old.risk[a]),
            new_risk=float(new.risk[b]),
        )


def _adjusted(rows: list[Compared]) -> Iterator[Compared]:
    """The rows with p values adjusted over all tests of all rows that could reject."""
    places = [
        (place, metric) for place, row in enumerate(rows) for metric, one in row.differences.items() if one.can_reject
    ]
    values = holm([rows[place].differences[metric].p_value for place, metric in places])
    adjusted: list[dict[str, float]] = [{} for _ in rows]
    for (place, metric), value in zip(places, values, strict=True):
        adjusted[place][metric] = value
    return (replace(row, adjusted=one) for row, one in zip(rows, adjusted, strict=True))


def unfinished(addresses: Sequence[str]) -> list[str]:
    """Of runs and rescorings those without `_SUCCESS`: their figures are of a part, or from before they grew."""
    return [one for one in addresses if not open_store(one).exists(SUCCESS)]


# Judging -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What may change before a comparison fails.

    Attributes:
        increases: by metric, how much it may grow in a request; crossed where the whole interval lies beyond.
        fail_on: `never`; `significant-increase`, of `FAILURES`; or `any-significant` difference, after Holm.
    """

    increases: dict[str, float] = field(default_factory=dict)
    fail_on: str = "never"


def check_limits(limits: Limits, confidence: float, levels: Sequence[str] = ()) -> None:
    """Refuse numbers and levels that mean nothing.

    Raises:
        JobError: with all of them.
    """
    problems = [
        f"--max-{option}-increase: {limits.increases[metric]} is not a number of 0 or more"
        for metric, option in (("error_rate", "error"), ("valid_failures", "valid-failure"), ("risk", "risk"))
        if metric in limits.increases and not 0 <= limits.increases[metric] < math.inf
    ]
    if not 0.5 <= confidence < 1:
        problems.append(f"--confidence: {confidence} is not between 0.5 and 1, such as 0.95")
    problems += [f"--by: {one!r} is not one of {', '.join(LEVELS)}" for one in levels if one not in LEVELS]
    if problems:
        raise JobError(problems)


def breaches(comparison: NightComparison, limits: Limits) -> list[str]:
    """The limits that are crossed, in words, a line each.

    Raises:
        JobError: a limit could not be held against any request.
    """
    known = {metric for row in comparison.rows if row.level == "request" for metric in row.differences}
    if unknown := [metric for metric in limits.increases if metric not in known]:
        raise JobError([f"the limit of {metric_name(one)}: no request has it in both runs" for one in unknown])
    lines = []
    for row in comparison.rows:
        for metric, allowed in limits.increases.items():
            found = row.differences.get(metric) if row.level == "request" else None
            if found is not None and found.change.low > allowed:
                lines.append(
                    f"{row_name(row)}: {metric_name(metric)} grew by {found.change.value:.3g} (at least"
                    f" {found.change.low:.3g} at {comparison.confidence:.0%}); {allowed:g} is allowed"
                )
        for metric in comparison.significant(row) if limits.fail_on != "never" else ():
            found = row.differences[metric]
            is_worse = metric in FAILURES and _is_up(found)
            if is_worse or limits.fail_on == "any-significant":
                lines.append(
                    f"{row_name(row)}: {metric_name(metric)} {found.old:.3g} -> {found.new:.3g} is significant"
                    f" (p {row.adjusted[metric]:.2g} after Holm)"
                )
    return lines


def _is_up(found: Difference) -> bool:
    """Whether a difference is a growth; where both medians are one, the interval's side tells."""
    return found.change.value > 0 or (found.change.value == 0 and found.change.high > -found.change.low)


def row_name(row: Compared) -> str:
    """A row in words."""
    return row.request if row.level == "request" else f"{row.request}, {row.level} {row.group or 'none'}"


def metric_name(metric: str) -> str:
    """A metric in words."""
    names = {"error_rate": "error rate", "valid_failures": "valid failures", "risk": "median risk"}
    return names.get(metric, {"kldb": "median KLDB"}.get(metric, f"median {metric}"))
