"""Two classes of one name, as ImageNet's cranes, stay apart wherever classes are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from engine.data.reading.corpus import open_run
from engine.data.reading.export import export
from engine.data.reading.export_options import ExportOptions
from engine.data.reading.inspection import inspect
from engine.data.stores.opening import open_store
from engine.job.class_names import distinct_names, distinct_pairs
from engine.report.render import write_report
from engine.studies.compare.program import compare_runs
from engine.studies.compare.scored_run import read_scored_run
from tests.corpus_cases import make_run

CRANES = ["crane", "ox", "crane"]
APART = ["crane (0)", "crane (2)", "ox"]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """No sample of the first class is an error, half of the second's are, and all of the third's."""
    requests = [{"name": "all", "method": "prompt", "classes": "all", "count": 14, "accept": {"is_error": True}}]
    return make_run(
        tmp_path_factory.mktemp("cranes") / "run",
        labels=CRANES,
        requests=requests,
        change=_renamed,
    )


def _renamed(record: dict[str, Any]) -> dict[str, Any]:
    label = record["class_index"]
    return record | {"class_name": CRANES[label], "is_error": label > record["index"] % 2}


def test_only_double_names_have_an_index() -> None:
    assert distinct_names({0: "crane", 1: "ox", 134: "crane"}) == {0: "crane (0)", 1: "ox", 134: "crane (134)"}
    pairs = distinct_pairs([(-1, "ox"), (1, "ox"), (1, "ox"), (2, "")])
    assert pairs == {(-1, "ox"): "ox", (1, "ox"): "ox", (2, ""): ""}


def test_the_manifest_counts_them_apart(run: Path) -> None:
    counts = json.loads((run / "manifest.json").read_text())["counts"]
    assert {name: sum(one.values()) for name, one in counts["classes"].items()} == dict.fromkeys(APART, 14)
    assert [one["class"] for one in counts["quotas"]["all"]] == ["crane (0)", "ox", "crane (2)"]


def test_the_report_has_a_line_for_each(run: Path, tmp_path: Path) -> None:
    write_report(open_store(str(run)), labels=CRANES, into=open_store(str(tmp_path)))
    page = (tmp_path / "report.html").read_text()
    table = page.split('aria-label="Summary by class"', 1)[1].split("</table>", 1)[0]
    assert all(f'title="{name}"' in table for name in APART) and 'title="crane"' not in table
    assert "crane (2)" in page.split("</table>")[-1], "the gallery, too"


def test_a_comparison_has_a_row_for_each(run: Path) -> None:
    night = read_scored_run(str(run))
    found = compare_runs(night, night)
    rows = {row.group: row for row in found.rows if row.level == "class"}
    assert sorted(rows) == APART
    rates = {name: row.differences["error_rate"].old for name, row in rows.items()}
    assert rates["crane (0)"] < rates["ox"] < rates["crane (2)"] == 1


def test_readers_and_exports_count_them_apart(run: Path, tmp_path: Path) -> None:
    corpus = open_run(str(run))
    assert inspect(corpus).document["classes"] == dict.fromkeys(APART, 14)
    export((str(run),), ExportOptions(output=str(tmp_path / "out")))
    assert list(json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]["classes"]) == APART
