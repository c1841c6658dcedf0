"""A joint prompt has no wrong class among its own: every table, filter and rule counts what lies outside."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine
from engine.data.images import digits
from engine.data.reading.inspection import inspect
from engine.data.run.counts import is_joint
from engine.data.run.outcomes import (
    asked_classes,
    errors,
    is_scored_expression,
    oracle_agreement,
    predicts_asked_expression,
    scored_rows,
    target_errs,
    target_errs_expression,
)
from engine.data.run.resume import open_output
from engine.data.run.summary import summarise
from engine.data.run.verify import verify
from engine.data.stores.opening import open_store
from engine.driver.executors.local import LocalExecutor
from engine.driver.progress import PlainDisplay, medians_table
from engine.driver.run import run_job
from engine.job.acceptance import is_accepted
from engine.job.parsing import parse_job
from engine.job.plan import Plan, build_plan
from engine.models.digests import model_digests
from engine.models.library_logging import quiet_libraries
from engine.report.data import error_pairs
from engine.report.gallery import make_tile
from engine.report.headline import summary_table
from engine.report.render import write_report
from engine.report.row_sums import sum_rows
from engine.report.work import class_table
from engine.studies.compare.baseline import ERRORS_OUTSIDE, pin_run, read_baseline
from engine.studies.compare.program import compare_runs
from engine.studies.compare.scored_run import read_scored_run
from engine.studies.evaluate.image_registry import ImageRegistry
from engine.studies.evaluate.inputs import StudiedSamples
from tests.corpus_cases import make_run
from tests.run_cases import LABELS

NUM_SCORED = 17  # Of 20 of a request, every seventh failed.
NAMES = dict(enumerate(LABELS))


def planted(num_outside: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Joint samples of which so many are read as outside their classes, all others as the class that is not closest.

    The oracle always reads the closest class, the transfer model does as the target.
    """

    def change(record: dict[str, Any]) -> dict[str, Any]:
        if not is_joint(record["key"]):
            return record
        [other] = set(record["kldb_classes"]) - {record["class_index"]}
        predicted = 0 if record["index"] < num_outside else other
        transfer = [{"model": "zoo:r", "predicted_class": predicted, "risk": 1.0}]
        return record | {
            "predicted_class": predicted, "is_error": True, "oracle_class": record["class_index"], "transfer": transfer
        }  # fmt: skip

    return change


@pytest.fixture(scope="module", params=[0, 3])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run between one and two; the number of predictions outside them."""
    return make_run(tmp_path_factory.mktemp("joint") / "run", change=planted(request.param)), request.param


def share(num_outside: int) -> float:
    return num_outside / NUM_SCORED


def test_the_figures_of_the_run(case: tuple[Path, int]) -> None:
    """Those of the run's own table, of `inspect`, and of the manifest; transfer models too."""
    run, num_outside = case
    manifest = json.loads((run / "manifest.json").read_text())["summary"][0]
    groups = [summarise(run / "metadata.parquet")[0], inspect(engine.open_run(str(run))).groups[0]]
    figures = [manifest, *(vars_of(group) for group in groups)]
    for one in figures:
        assert one["request"] == "between" and one["oracle_agreement"] == 1
        assert one["error_rate"] == one["valid_failure_rate"] == pytest.approx(share(num_outside))
    assert groups[0].transfer[0].error_rate == pytest.approx(share(num_outside))
    shown = [next(iter(column.cells)) for column in medians_table(groups[:1]).columns]
    assert shown.count(f"{share(num_outside):.0%}") == 3 and "100%" in shown


def vars_of(group: Any) -> dict[str, Any]:
    return {name: getattr(group, name) for name in group.__slots__}


def test_the_tables_of_the_report(case: tuple[Path, int]) -> None:
    """Headline, by class, most frequent errors, gallery, and the five figures at the top."""
    run, num_outside = case
    sums = sum_rows(run / "metadata.parquet")
    rows, totals, classes = sums.outcomes, sums.totals.groups(), sums.class_groups()
    percent = f"{share(num_outside) * 100:.1f} %"
    for made in (summary_table(summarise(run / "metadata.parquet"), totals), class_table(classes, rows, totals, NAMES)):
        assert made is not None
        [line] = [one for one in made.lines if one.name == "between"]
        cells = dict(zip([one.name for one in made.columns[1:]], [text for text, _ in line.cells], strict=True))
        assert (cells["Errors"], cells["Valid failures"], cells["Oracle"]) == (percent, percent, "100.0 %")
        assert cells["Transfer errors"] == percent
    pairs = {(asked, read): count for asked, read, count in error_pairs(rows, NAMES, rows.scored) if " and " in asked}
    assert pairs == ({("one and two", "zero"): num_outside} if num_outside else {})
    joint = [row for row in pq.read_table(run / "metadata.parquet").to_pylist() if is_joint(row["key"])]
    outcomes = [make_tile(row, b"", NAMES, 1000).outcomes for row in joint if row["scored"]]
    assert outcomes.count(["error", "valid"]) == num_outside and outcomes.count(["right"]) == NUM_SCORED - num_outside
    write_report(open_store(str(run)), labels=LABELS)
    page = (run / "report.html").read_text()
    scored = engine.open_run(str(run)).filter("scored").to_table().to_pylist()
    for is_guided, kind in ((False, "prompt only"), (True, "guided")):
        errs = [target_errs(row) for row in scored if (row["method"] != "prompt") == is_guided]
        assert re.search(rf"Target errors.{{0,200}}{sum(errs) / len(errs) * 100:.1f} % <span>{kind}", page, re.DOTALL)


def test_the_table_of_the_card(case: tuple[Path, int]) -> None:
    run, num_outside = case
    lines = (run / "README.md").read_text().splitlines()
    head = next(line for line in lines if line.startswith("| request |")).split(" | ")
    cells = dict(zip(head, next(line for line in lines if line.startswith("| between |")).split(" | "), strict=True))
    assert cells["errors"] == cells["valid failures"] == f"{share(num_outside):.1%}"
    assert f"errors {share(num_outside):.1%}" in cells["transfer"]


def test_filters(case: tuple[Path, int]) -> None:
    run, num_outside = case
    joint = engine.open_run(str(run)).filter("request == 'between'")
    for condition in ("target_errs", "valid_failure", "target_errs and predicted_class == 0"):
        assert len(joint.filter(condition)) == num_outside
    assert len(joint.filter("not target_errs")) == NUM_SCORED - num_outside


def test_what_evaluate_clusters(case: tuple[Path, int]) -> None:
    """Failures, and what is said below an image."""
    run, num_outside = case
    records = tuple(row for row in pq.read_table(run / "metadata.parquet").to_pylist() if row["request"] == "between")
    scored = tuple(row for row in records if row["scored"])
    samples = StudiedSamples(SimpleNamespace(thumbnails=[""] * len(scored)), scored)  # type: ignore[arg-type]
    assert samples.target_errs.sum() == num_outside
    assert ImageRegistry(NAMES).sample(samples, len(scored) - 1).text.startswith("one and two → ")


def test_two_nights_are_compared_by_it(tmp_path: Path) -> None:
    """What changed is three predictions outside; pairs that went from one class of the subset to the other are none."""
    sides = [read_scored_run(str(make_run(tmp_path / f"n{num}", change=planted(num)))) for num in (0, 3)]
    comparison = compare_runs(*sides)
    row = next(one for one in comparison.rows if one.request == "between" and one.level == "request")
    assert (row.differences["error_rate"].old, row.differences["error_rate"].new) == (0, pytest.approx(share(3)))
    assert row.differences["valid_failures"].new == pytest.approx(share(3))
    assert (row.num_new_failures, row.num_fixed) == (3, 0)
    assert {one.request for one in comparison.new_failures} == {"between"}


def test_a_baseline_that_counted_otherwise_says_nothing_of_joint_prompts(tmp_path: Path) -> None:
    """It has no predictions to count anew: shares of such a request are left out, by name; its medians are compared."""
    night = read_scored_run(str(make_run(tmp_path / "run", change=planted(3))))
    pin_run(night, tmp_path / "new.json")
    notes = compare_runs(read_baseline(tmp_path / "new.json"), night).notes
    assert all("not compared, with fewer than the 5 samples" in note for note in notes)
    document = json.loads((tmp_path / "new.json").read_text())
    assert document.pop(ERRORS_OUTSIDE) is True
    old = tmp_path / "old.json"
    old.write_text(json.dumps(document | {"is_error": [1] * len(night.keys)}))
    comparison = compare_runs(read_baseline(old), night)
    rows = {one.request: one for one in comparison.rows if one.level == "request"}
    assert set(rows["between"].differences) == {"risk", "conformity", "kldb"}
    assert any("'between' are not compared; pin it again" in note for note in comparison.notes)
    assert not [one for one in (*comparison.new_failures, *comparison.fixed) if one.request == "between"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.booleans(), st.integers(0, 3), st.sets(st.integers(0, 3), min_size=2), st.integers(-1, 3),
                  st.integers(-1, 3)),
        min_size=1, max_size=8,
    )
)  # fmt: skip
def test_tables_and_records_agree(drawn: list[tuple[bool, int, set[int], int, int]]) -> None:
    """The definition in words, against the columns of a table and one record after the other."""
    rows = [
        {
            "key": f"x-000-{'mix' if joint else f'{label:03d}'}-{number:08d}",
            "class_index": label,
            "kldb_classes": sorted(subset),
            "predicted_class": predicted,
            "is_error": predicted != label,
            "oracle_class": oracle,
        }
        for number, (joint, label, subset, predicted, oracle) in enumerate(drawn)
    ]
    asked = [subset if joint else {label} for joint, label, subset, _, _ in drawn]
    table = pa.Table.from_pylist(rows)
    assert [set(asked_classes(row)) for row in rows] == asked
    assert errors(table).tolist() == [row["predicted_class"] not in some for row, some in zip(rows, asked, strict=True)]
    assert errors(table).tolist() == [target_errs(row) for row in rows]
    agrees = [
        -1.0 if row["oracle_class"] < 0 else float(row["oracle_class"] in some)
        for row, some in zip(rows, asked, strict=True)
    ]
    assert oracle_agreement(table).tolist() == agrees
    assert values(table, target_errs_expression(4)) == errors(table).tolist()
    assert values(table, predicts_asked_expression("oracle_class", 4)) == [value == 1.0 for value in agrees]


def values(table: pa.Table, expression: pc.Expression) -> list[bool]:
    """An expression, row by row."""
    return pa.dataset.dataset(table).to_table(columns={"value": expression})["value"].to_pylist()


@pytest.mark.parametrize("missing", [(), ("scored",), ("method",), ("scored", "method")])
def test_what_models_scored(missing: tuple[str, ...]) -> None:
    """The column says it; before there was one, everything but failed samples and real images was."""
    rows = [
        {"status": status, "method": method, "scored": scored}
        for status in ("ok", "rejected", "failed")
        for method in ("prompt", "real")
        for scored in (True, False, None)
    ]
    table = pa.Table.from_pylist(rows).drop_columns(missing)
    expected = [
        row["status"] != "failed"
        and (("method" in missing or row["method"] != "real") if row["scored"] is None or "scored" in missing
             else row["scored"])
        for row in rows
    ]  # fmt: skip
    assert scored_rows(table).tolist() == expected
    assert values(table, is_scored_expression(table.column_names)) == expected


# Acceptance ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize(("predicted", "errs"), [(3, False), (8, False), (5, True)])
def test_the_rule_asks_for_what_the_tables_count(predicted: int, errs: bool, wanted: bool) -> None:
    """Runs of earlier schema versions go on by the rule that they began with: another class than the closest."""
    record = {"predicted_class": predicted, "is_error": predicted != 3, "class_index": 3}
    assert is_accepted({"is_error": wanted}, record, (3, 8)) == (errs == wanted)
    assert is_accepted({"is_error": wanted}, record, (3, 8), 2) == ((predicted != 3) == wanted)
    assert is_accepted({"is_error": wanted}, record, (3,)) == ((predicted != 3) == wanted)


def make_real(folder: Path, version: int) -> list[dict[str, Any]]:
    """A run of the zoo's models between two digits that began in a schema version; its rows."""
    request = {
        "name": "between",
        "method": "boundary",
        "boundary": ["three", "eight"],
        "count": 4,
        "max_attempts": "1x",
    }
    job = parse_job(
        {
            "name": "real",
            "models": {"diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip",
                       "target": "zoo:digits/classifier", "oracle": "zoo:digits/oracle"},
            "requests": [request | {"accept": {"is_error": False}}],
            "sampling": {"scheduler": "lms", "num_inference_steps": 6, "guidance_scale": 3.0},
            "guidance": {"boundary": {"every": 2}},
            "output": {"uri": str(folder), "store_rejected": True},
            "runtime": {"device": "cpu"},
        }
    )  # fmt: skip
    quiet_libraries()
    plan = build_plan(job, list(digits.CLASS_NAMES), model_digests(job))
    begun = Plan(plan.requests, plan.identity, plan.stages, version)
    open_output(open_store(str(folder)), begun, job, "auto", confirmed=False)
    run_job(job, executor=LocalExecutor(1), resume="auto", confirmed=False, display=PlainDisplay(sys.stderr))
    assert verify(open_store(str(folder))).findings == ()
    return pq.read_table(folder / "metadata.parquet").to_pylist()


def test_real_boundary_runs_accept_by_the_rule_of_their_version(tmp_path: Path) -> None:
    """The stored column keeps its meaning; rule and table count predictions outside; an old run goes on as it was."""
    new, old = (make_real(tmp_path / f"v{version}", version) for version in (3, 2))
    for rows in (new, old):
        assert len(rows) == 4 and all(row["kldb_classes"] == [3, 8] for row in rows)
        assert all(row["is_error"] == (row["predicted_class"] != row["class_index"]) for row in rows)
    assert any(row["is_error"] for row in new) and all(row["scored"] for row in new)
    assert [row["accepted"] for row in new] == [row["predicted_class"] in (3, 8) for row in new]
    assert [row["accepted"] for row in old] == [not row["is_error"] for row in old] and "scored" not in old[0]
    for version, rows in ((3, new), (2, old)):
        [group] = summarise(tmp_path / f"v{version}" / "metadata.parquet")
        assert group.error_rate == np.mean([row["predicted_class"] not in (3, 8) for row in rows])
