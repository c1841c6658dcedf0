"""Two runs compared: simulated ones, so that the truth about them is known."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from engine.errors import JobError, OutputError
from engine.methods.intervals import Estimate
from engine.studies.compare import significance
from engine.studies.compare.baseline import pin_run, read_baseline
from engine.studies.compare.limits import Crossing, Limits, check_limits, crossed_limits
from engine.studies.compare.matching import match_rows
from engine.studies.compare.program import GroupComparison, RunComparison, compare_runs
from engine.studies.compare.scored_run import ScoredRun
from engine.studies.compare.significance import Difference
from engine.studies.compare.tables import PAGE_BEGINNING, comparison_document, comparison_markdown
from engine.studies.output_folders import check_replaces

LABELS = ("cat", "dog", "owl")
CONTEXTS = ("", "red | <b>`ink`</b>")


def text(values) -> np.ndarray:
    values = list(values)
    column = np.empty(len(values), dtype=object)
    column[:] = values
    return column


def make_night(
    rng: np.random.Generator,
    *,
    num: int = 60,
    seed: int = 0,
    shift: float = 0.0,
    noise=None,
    requests=("panel", "fresh"),
) -> ScoredRun:
    """Samples with risks that vary from sample to sample; an error is a risk above one.

    Args:
        num: samples of each request.
        seed: runs with one seed have pairs.
        shift: added to every risk.
        noise: of each sample, shared by runs with pairs; drawn when not given.
    """
    size = num * len(requests)
    order = np.arange(size)
    base = rng.normal(size=size) if noise is None else noise
    risk = np.exp(base + 0.3 * rng.normal(size=size) + shift)
    is_error = risk > 1.5
    return ScoredRun(
        address=f"runs/{seed}",
        name="sim",
        target={"address": "zoo:t", "digest": "0123456789abcdef"},
        labels=LABELS,
        methods=dict.fromkeys(requests, "prompt"),
        keys=text(f"sim-{row:06d}" for row in order),
        requests=text(requests[row // num] for row in order),
        classes=text(LABELS[row % 3] for row in order),
        contexts=text(CONTEXTS[row % 2] for row in order),
        prompts=text(f"a {LABELS[row % 3]}, {CONTEXTS[row % 2]}" for row in order),
        seeds=order + 10**6 * seed,
        is_error=is_error,
        valid=(is_error & (rng.random(size) < 0.8)).astype(float),
        scores={
            "risk": risk,
            "conformity": rng.normal(0.3, 0.05, size),
            "kldb": rng.exponential(size=size),
        },
    )


def permuted(night: ScoredRun, order: np.ndarray) -> ScoredRun:
    columns = {one.name: getattr(night, one.name) for one in fields(ScoredRun)}
    columns = {name: value[order] for name, value in columns.items() if isinstance(value, np.ndarray)}
    return replace(night, scores={name: values[order] for name, values in night.scores.items()}, **columns)


def significant(comparison) -> list[tuple[str, str, str]]:
    return [(row.request, row.group, name) for row in comparison.rows for name in comparison.significant(row)]


@pytest.mark.parametrize("is_paired", [True, False])
def test_false_alarms_are_as_rare_as_promised(monkeypatch, is_paired):
    """Two runs of one population: over all their tests together, about the level; never far more, and not never."""
    monkeypatch.setattr(significance, "RESAMPLES", (9, 9))
    rng, num_runs, alarms = np.random.default_rng(1), 100, 0
    for _ in range(num_runs):
        noise = rng.normal(size=60) if is_paired else None
        old, new = (make_night(rng, seed=0 if is_paired else seed, noise=noise, requests=("panel",)) for seed in (0, 1))
        comparison = compare_runs(old, new, levels=("request", "class"))
        assert all(bool(row.num_pairs) == is_paired for row in comparison.rows)
        alarms += bool(significant(comparison))
    assert 1 <= alarms <= num_runs * (0.05 + 3 * (0.05 * 0.95 / num_runs) ** 0.5), alarms


def test_a_planted_difference_is_found_where_it_is():
    """Class owl of the panel alone has become riskier: its row and the request's; no other class, no other request."""
    rng = np.random.default_rng(2)
    old, new = make_night(rng, seed=0, num=300), make_night(rng, seed=1, num=300)
    hit = (new.requests == "panel") & (new.classes == "owl")
    risk = np.where(hit, 4 * new.scores["risk"], new.scores["risk"])
    found = significant(compare_runs(old, replace(new, scores={**new.scores, "risk": risk}, is_error=risk > 1.5)))
    assert {("panel", "owl", "risk"), ("panel", "owl", "error_rate"), ("panel", "", "risk")} <= set(found)
    assert {request for request, _, _ in found} == {"panel"} and not {"cat", "dog"} & {group for _, group, _ in found}


def test_pairs_find_what_groups_do_not(monkeypatch):
    """The same small shift: noise that both runs share is taken out by pairing."""
    monkeypatch.setattr(significance, "RESAMPLES", (9, 9))
    rng, paired, unpaired = np.random.default_rng(3), 0, 0
    for _ in range(8):
        noise = rng.normal(size=120)
        old, new = make_night(rng, noise=noise), make_night(rng, noise=noise, shift=0.2)
        paired += len(significant(compare_runs(old, new)))
        other = replace(new, seeds=new.seeds + 10**7)
        unpaired += len(significant(compare_runs(old, other)))
    assert paired > 5 * max(1, unpaired), (paired, unpaired)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_order_of_rows_does_not_matter(seed):
    """Not with pairs, not with groups; not for a figure, a sample or a note."""
    rng = np.random.default_rng(4)
    old, new = make_night(rng), make_night(rng, seed=seed)
    first = compare_runs(old, new)
    second = compare_runs(
        permuted(old, np.random.default_rng(5).permutation(120)),
        permuted(new, np.random.default_rng(6).permutation(120)),
    )
    key = lambda row: (row.request, row.level, row.group)  # noqa: E731
    assert sorted(first.rows, key=key) == sorted(second.rows, key=key)
    assert sorted(map(str, first.new_failures)) == sorted(map(str, second.new_failures)) and first.notes == second.notes


def test_a_run_against_itself_is_all_zeros():
    """No difference, no test, no failure new or mended, no limit crossed."""
    night = make_night(np.random.default_rng(7))
    comparison = compare_runs(night, night)
    every = [one for row in comparison.rows for one in row.differences.values()]
    assert len(comparison.rows) == 2 * (1 + 3 + 2) and len(every) == 5 * len(comparison.rows)
    assert {one.change.value for one in every} == {0.0} and {one.p_value for one in every} == {1.0}
    assert not comparison.new_failures and not comparison.fixed and not comparison.notes
    assert not crossed_limits(comparison, Limits(increases={"error_rate": 0.0, "risk": 0.0}, fail_on="any-significant"))


def test_new_and_mended_failures_are_named():
    """Two samples turned wrong, one right."""
    old = make_night(np.random.default_rng(8))
    wrong, right = np.flatnonzero(~old.is_error)[:2], np.flatnonzero(old.is_error)[:1]
    is_error = old.is_error.copy()
    is_error[wrong], is_error[right] = True, False
    comparison = compare_runs(old, replace(old, is_error=is_error))
    by_risk = sorted(wrong, key=lambda row: -old.scores["risk"][row])
    assert [one.key for one in comparison.new_failures] == [f"sim-{row:06d}" for row in by_risk]
    assert [one.key for one in comparison.fixed] == [f"sim-{row:06d}" for row in right]
    row = comparison.rows[0]
    assert (row.num_new_failures, row.num_fixed, row.num_pairs) == (2, 1, 60)
    assert row.differences["error_rate"].change.value == pytest.approx(1 / 60)


def test_limits_are_crossed_when_the_whole_interval_lies_beyond():
    """More and more errors: at some point, and from there on; `any-significant` hears improvements too."""
    rng = np.random.default_rng(9)
    noise = rng.normal(size=120)
    old = make_night(rng, noise=noise)
    limits = Limits(increases={"error_rate": 0.1})
    crossed = []
    for shift in (0.0, 0.2, 0.5, 1.0, 2.0):
        comparison = compare_runs(old, make_night(rng, noise=noise, shift=shift))
        lows = [row.differences["error_rate"].change.low for row in comparison.rows if row.level == "request"]
        lines = crossed_limits(comparison, limits)
        assert len(lines) == sum(low > 0.1 for low in lows)
        crossed.append(len(lines))
    assert crossed[0] == 0 and crossed[-1] == 2 and crossed == sorted(crossed)
    better = compare_runs(make_night(rng, noise=noise, shift=2.0), old)
    assert not crossed_limits(better, Limits(fail_on="significant-increase"))
    assert crossed_limits(better, Limits(fail_on="any-significant"))
    assert crossed_limits(
        compare_runs(old, make_night(rng, noise=noise, shift=2.0)), Limits(fail_on="significant-increase")
    )


def test_misuse_is_refused():
    """Nothing shared, other classes, a limit without its figures, numbers that mean nothing."""
    rng = np.random.default_rng(10)
    night = make_night(rng)
    with pytest.raises(JobError, match=r"share no request; the first has 'panel', 'fresh', the second 'other'"):
        compare_runs(night, make_night(rng, requests=("other",)))
    with pytest.raises(JobError, match=r"class 2: 'owl' -> 'cow'"):
        compare_runs(night, replace(night, labels=("cat", "dog", "cow")))
    with pytest.raises(JobError, match="too few to compare"):
        compare_runs(make_night(rng, num=4), make_night(rng, num=4, seed=1))
    blind = replace(night, valid=np.full(120, np.nan))
    comparison = compare_runs(blind, blind)
    with pytest.raises(JobError, match="valid failures: no request has it"):
        crossed_limits(comparison, Limits(increases={"valid_failures": 0.1}))
    for limits, level in ((Limits(increases={"risk": -1.0}), 0.95), (Limits(increases={"risk": float("nan")}), 0.95)):
        with pytest.raises(JobError, match="--max-risk-increase"):
            check_limits(limits, level)
    with pytest.raises(JobError, match="--confidence"):
        check_limits(Limits(), 1.5)


def test_groups_are_compared_over_what_both_runs_have():
    """A context that only one run has would move the request's figures by itself; it is left out, with a note."""
    rng = np.random.default_rng(11)
    old, new = make_night(rng, seed=0, num=300), make_night(rng, seed=1, num=300)
    risk = np.where(new.contexts == "", new.scores["risk"], 50.0)
    contexts = text(one and "new" for one in new.contexts)
    new = replace(new, contexts=contexts, scores={**new.scores, "risk": risk})
    comparison = compare_runs(old, new)
    assert comparison.rows[0].num_old == comparison.rows[0].num_new == 150
    assert "only the 3 classes and contexts that both runs have" in comparison.notes[0]
    assert abs(comparison.rows[0].differences["risk"].change.value) < 0.5


def test_another_mixture_of_classes_is_no_difference():
    """Each class errs as often as before, but the quota of the worst one took more attempts: nothing has changed."""
    rng = np.random.default_rng(16)
    rates = {"cat": 0.1, "dog": 0.5, "owl": 0.9}

    def night(seed: int, weights: tuple[float, float, float]) -> ScoredRun:
        classes = text(rng.choice(LABELS, 600, p=weights))
        is_error = rng.random(600) < np.array([rates[one] for one in classes])
        made = make_night(rng, seed=seed, num=600, requests=("quota",))
        return replace(made, classes=classes, contexts=text([""] * 600), is_error=is_error)

    old, new = night(0, (0.4, 0.3, 0.3)), night(1, (0.1, 0.2, 0.7))
    comparison = compare_runs(old, new)
    # That much would be seen in all of them as they are.
    assert new.is_error.mean() - old.is_error.mean() > 0.2
    assert not [row for row in comparison.rows if "error_rate" in comparison.significant(row)]
    first, *classes = comparison.rows
    assert first.num_old == first.num_new == sum(row.num_old for row in classes) < 600
    assert "so that both runs have each class and context equally often" in comparison.notes[0]
    # Four times as many of each class is the same mixture: none is left out.
    even = replace(old, classes=text(LABELS[row % 3] for row in range(600)), seeds=old.seeds + 10**8)
    some = permuted(even, np.arange(600)[np.arange(600) // 3 % 4 == 0])
    assert len(some.keys) == 150 and not compare_runs(replace(some, seeds=some.seeds + 10**8), even).notes


def test_a_pinned_run_is_the_run(tmp_path):
    """Every column comes back as it was, so every figure does; what is no baseline is refused."""
    night = make_night(np.random.default_rng(12))
    night = replace(night, valid=np.where(night.requests == "panel", night.valid, np.nan))
    path = tmp_path / "deep/baseline.json"
    pin_run(night, path)
    read = read_baseline(path)
    for one in fields(ScoredRun):
        a, b = getattr(night, one.name), getattr(read, one.name)
        if isinstance(a, np.ndarray):
            assert np.array_equal(a, b, equal_nan=one.name == "valid"), one.name
        elif one.name == "scores":
            assert list(a) == list(b) and all(np.array_equal(a[name], b[name]) for name in a)
        elif one.name != "is_baseline":
            assert a == b, one.name
    assert read.is_baseline and not night.is_baseline
    assert not list(tmp_path.glob("deep/.*"))
    document = json.loads(path.read_text())
    changes = (
        {"baseline_version": 2},
        {"risk": document["risk"][:-1]},
        {"risk": [float("nan"), *document["risk"][1:]]},
        {"keys": {"values": [], "codes": [3]}},
    )
    for change in changes:
        path.write_text(json.dumps(document | change))
        with pytest.raises(JobError, match="is not a baseline"):
            read_baseline(path)
    for content in ("[]", "{", "null"):
        path.write_text(content)
        with pytest.raises(JobError, match="is not a baseline"):
            read_baseline(path)
    with pytest.raises(JobError, match="cannot be read"):
        read_baseline(Path(tmp_path / "nowhere.json"))


def test_only_what_compare_wrote_is_written_over(tmp_path):
    """A wrong name after --pin or --markdown must not cost a run its metadata, or CI its baseline."""
    night = make_night(np.random.default_rng(3))
    page = comparison_markdown(compare_runs(night, night))
    baseline, other = tmp_path / "baseline.json", tmp_path / "metadata.parquet"
    pin_run(night, baseline)
    pin_run(night, baseline)
    other.write_bytes(b"PAR1\xff")
    for option, path in (("--pin", other), ("--markdown", other), ("--markdown", baseline)):
        before = path.read_bytes()
        with pytest.raises(OutputError, match=f"{option}: .* was not written by this option"):
            pin_run(night, path) if option == "--pin" else check_replaces(option, path, PAGE_BEGINNING)
        assert path.read_bytes() == before
    with pytest.raises(OutputError, match=r"--pin: .* is a folder; name a file"):
        pin_run(night, Path())
    for content in ("", page):
        other.write_text(content)
        check_replaces("--markdown", other, PAGE_BEGINNING)


def test_markdown_and_json_hold_no_markup_of_others():
    """Contexts are hostile input; JSON is JSON."""
    rng = np.random.default_rng(13)
    comparison = compare_runs(make_night(rng), make_night(rng, shift=1.0))
    crossing = Crossing(place=comparison.rows[0].place, metric="risk", text="<i>")
    assert "``context red \\| <b>`ink`</b>``" in comparison_markdown(comparison, [crossing])
    document = json.loads(json.dumps(comparison_document(comparison, Limits(), []), allow_nan=False))
    assert len(document["rows"]) == 12 and document["correction"] == "Holm"
    assert {one["key"] for one in document["new_failures"]} <= set(comparison.new.keys)


def row_with(
    differences: dict[str, Difference], adjusted: dict[str, float], *, level: str = "request"
) -> GroupComparison:
    return GroupComparison(
        request="panel", level=level, group="" if level == "request" else "owl", num_old=60, num_new=60, num_pairs=0,
        num_new_failures=0, num_fixed=0, differences=differences, adjusted=adjusted,
    )  # fmt: skip


def comparison_of(*rows: GroupComparison) -> RunComparison:
    run = make_night(np.random.default_rng(0))
    return RunComparison(old=run, new=run, confidence=0.95, rows=rows, new_failures=(), fixed=(), notes=())


def difference(value: float, low: float, high: float) -> Difference:
    return Difference(old=1.0, new=1.0 + value, change=Estimate(value, low, high), p_value=0.01, test="any")


def test_a_limit_is_crossed_above_it_and_by_requests_alone():
    """The low end of the interval decides, not the value; at the limit nothing is crossed; no class crosses it."""
    limits = Limits(increases={"risk": 0.25})
    for low, num_crossed in ((0.25, 0), (0.2501, 1), (-0.5, 0)):
        rows = [row_with({"risk": difference(0.5, low, 1.0)}, {}, level=level) for level in ("request", "class")]
        assert len(crossed_limits(comparison_of(*rows), limits)) == num_crossed
    [line] = crossed_limits(comparison_of(row_with({"risk": difference(0.5, 0.3, 1.0)}, {})), limits)
    assert line.text == "panel: median risk grew by 0.5 (at least 0.3 at 95%); 0.25 is allowed"


@pytest.mark.parametrize(
    ("metric", "change", "p_value", "increase", "anything"),
    [
        ("risk", (0.5, 0.1, 0.9), 0.049, 1, 1),
        ("risk", (0.5, 0.1, 0.9), 0.051, 0, 0),
        ("risk", (-0.5, -0.9, -0.1), 0.01, 0, 1),
        ("risk", (0.0, -0.1, 0.3), 0.01, 1, 1),
        ("risk", (0.0, -0.3, 0.1), 0.01, 0, 1),
        ("conformity", (0.5, 0.1, 0.9), 0.01, 0, 1),
        ("error_rate", (0.5, 0.1, 0.9), 0.01, 1, 1),
    ],
)
def test_significant_changes_fail_by_their_side(metric, change, p_value, increase, anything):
    """More failures or risk fail either way, less of them and other metrics with `any-significant` alone."""
    comparison = comparison_of(row_with({metric: difference(*change)}, {metric: p_value}, level="class"))
    for fail_on, number in (("never", 0), ("significant-increase", increase), ("any-significant", anything)):
        assert len(crossed_limits(comparison, Limits(fail_on=fail_on))) == number, fail_on


@pytest.mark.parametrize(("num_shared", "is_paired"), [(48, True), (47, False)])
def test_pairs_need_four_fifths_of_the_smaller_side(num_shared, is_paired):
    """Below that, a request is compared as two groups; a sample that is there twice has no pair."""
    old, new = (
        make_night(np.random.default_rng(1), requests=("panel",)),
        make_night(np.random.default_rng(2), requests=("panel",)),
    )
    new = replace(new, seeds=np.where(np.arange(60) < num_shared, new.seeds, new.seeds + 10**6))
    match = match_rows(old, new, "panel")
    assert match.is_paired == is_paired and len(match.old) == len(match.new) == (num_shared if is_paired else 60)
    if is_paired:
        assert (old.seeds[match.old] == new.seeds[match.new]).all() and "12 and 12 samples" in match.notes[0]
        twice = replace(new, seeds=np.where(np.arange(60) == 3, new.seeds[0], new.seeds))
        prompts = twice.prompts.copy()
        prompts[3] = prompts[0]
        assert not match_rows(old, replace(twice, prompts=prompts), "panel").is_paired


@pytest.mark.parametrize(("num", "is_enough"), [(5, True), (4, False)])
def test_five_samples_a_side_are_enough(num, is_enough):
    old, new = (make_night(np.random.default_rng(seed), num=num, seed=seed, requests=("panel",)) for seed in (0, 1))
    old = replace(old, classes=text(["cat"] * num), contexts=text([""] * num))
    new = replace(new, classes=old.classes, contexts=old.contexts)
    match = match_rows(old, new, "panel")
    assert match.is_enough == is_enough and not match.is_paired
    assert match.notes == ([] if is_enough else [f"request 'panel': {num} and {num} samples are too few to compare"])
