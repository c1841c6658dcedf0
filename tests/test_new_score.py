"""A score is added to a copy of the engine by a formula, a line in the scorer and a row; everything then has it."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest

from tests import commands
from tests.new_score import MEANING, NAME, PIECES, SINCE, TITLE, copy_engine

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a run of the copy comes to."""
    home = tmp_path_factory.mktemp("score")
    copy_engine(home)
    done = commands.python("-m", "tests.new_score", home, folder=home, PYTHONPATH=str(home))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["engine"] == str(home / "engine/__init__.py")
    return found  # type: ignore[no-any-return]


def test_a_score_is_three_pieces_in_three_files() -> None:
    """None of them has more than the formula, the line or the row."""
    assert list(PIECES) == ["methods/scores.py", "generation/scorer.py", "job/columns.py"]
    assert PIECES["generation/scorer.py"][1].count("\n") == 1
    assert PIECES["job/columns.py"][1].count("Column(") == 1


def test_rows_and_records_have_it(made: dict[str, Any]) -> None:
    """In the parquet and in the json of the tars, within its range, and true to its formula."""
    values = {row["key"]: row[NAME] for row in made["rows"]}
    assert len(values) == 16 and all(-1 <= value <= 1 for value in values.values()) and len(set(values.values())) > 8
    assert {record["key"]: record[NAME] for record in made["records"]} == values
    assert {record["schema_version"] for record in made["records"]} == {SINCE}
    # The lead is below p of the class, and negative exactly where the target errs.
    assert all((record[NAME] < 0) == record["is_error"] for record in made["records"])
    assert all(record[NAME] <= record["p_label"] for record in made["records"])


def test_a_rule_of_acceptance_asks_for_it(made: dict[str, Any]) -> None:
    """`accept` keeps what the score says, and a wrong condition lists it among those that there are."""
    asked = [row for row in made["rows"] if row["request"] == "guided"]
    assert {row["status"] for row in asked} == {"ok", "rejected"}
    assert all((row["status"] == "ok") == (row[NAME] < 0) for row in asked)
    assert f" {NAME}," in made["unknown_condition"]


def test_filters_and_inspection_know_it(made: dict[str, Any]) -> None:
    wanted = [row["key"] for row in made["rows"] if row[NAME] < 0]
    assert made["filtered"] == wanted
    values = [row[NAME] for row in made["rows"]]
    quantiles = made["inspection"]["quantiles"][NAME]
    assert quantiles[0] == min(values) and quantiles[-1] == max(values)


def test_scoring_again_compares_it(made: dict[str, Any]) -> None:
    """Nothing is found in the run as it was made; a stored value that is another is, and nothing else."""
    assert made["verified"] == []
    assert len(made["bent"]) == 16
    assert all(f"scored again, {NAME} " in text and ";" not in text for text in made["bent"])


def test_summary_card_and_terminal_have_its_median(made: dict[str, Any]) -> None:
    groups = {group["request"]: group for group in made["manifest"]["summary"]}
    for request, group in groups.items():
        values = [row[NAME] for row in made["rows"] if row["request"] == request]
        assert group[NAME]["median"] == pytest.approx(statistics.median(values))
        assert f"{group[NAME]['median']:.3g} (" in made["card"]
    header = "| request | context | images / attempts | errors | risk | KLDB | entropy | lead | conformity |"
    assert header in made["card"] and f"| `{NAME}` | {MEANING} |" in made["card"]
    assert "`risk`, `kldb`, `entropy` and\n  `lead` are those of one target" in made["card"]
    assert f" {NAME} " in made["terminal"]


def test_the_report_draws_sorts_and_limits_it(made: dict[str, Any]) -> None:
    page = made["report"]
    assert f"<b>{TITLE}</b> {MEANING}</figcaption>" in page and f"Histogram of {TITLE} by request" in page
    assert f'<th scope="col">{TITLE}<small>median</small></th>' in page
    assert f'<option value="{NAME}">{TITLE}</option>' in page and f'id="min-{NAME}"' in page
    assert f"{TITLE}<small>above partner; median change</small>" in page
    assert f'"{NAME}":' in page.split('id="gallery-data">')[1]


def test_comparisons_and_baselines_have_it(made: dict[str, Any]) -> None:
    assert made["compared"] == ["error_rate", "risk", "conformity", "kldb", NAME]


def test_the_reference_pages_list_it(made: dict[str, Any]) -> None:
    assert f"| `{NAME}` | float | {SINCE} | {MEANING} |" in made["pages"]["metadata.md"]
    assert f"in version {SINCE} `{NAME}`" in made["pages"]["metadata.md"]
    assert f"`{NAME}`, " in made["pages"]["job-file.md"]


def test_a_run_of_the_version_before_is_read_without_it(made: dict[str, Any]) -> None:
    """Its report and card have no column for it; together with a newer run each row has what it has."""
    earlier = made["earlier"]
    assert earlier["findings"] == [] and NAME not in earlier["alone"]["quantiles"]
    assert all(NAME not in group for group in earlier["alone"]["groups"]) and earlier["alone"]["groups"]
    for text in (earlier["report"], earlier["card"]):
        assert TITLE not in text and f"`{NAME}`" not in text
    assert earlier["filtered"] == [row["key"] for row in made["rows"]]
    known = {group["request"]: NAME in group for group in earlier["groups"]}
    assert known["guided"] and not known["between"]
