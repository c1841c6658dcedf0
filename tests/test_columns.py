"""The table of columns: its rows are whole, earlier schema versions are what they were, each place keeps its order."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import pytest

from engine.data.run.schema import arrow_schema
from engine.job.acceptance import FLAGS, ORACLE_CONDITION, SCORES
from engine.job.columns import (
    BY_NAME,
    COLUMNS,
    DERIVED_NAMES,
    ENTRY_SCORES,
    MEASURED,
    NO_CLASS,
    NO_ROLE,
    SCHEMA_VERSION,
    Column,
    Role,
    by_rank,
    columns_with,
    entry_scores_with,
    enumerated,
    target_first,
    units_text,
)
from engine.job.records import check_record
from engine.report.gallery import range_titles, sort_titles
from tests.conftest import REPOSITORY
from tests.run_cases import make_job, make_plan, make_result

# The last version whose scores are listed below; later ones may add some.
LISTED = 3
# Of the columns of metadata.parquet, noted before there was a table of them; a run of a version has them for good.
DIGESTS = {1: "bbbf579eb10a4ca0", 2: "4b2cede341fc4053", 3: "6fd489360b758325", 4: "639e0fe616dade94"}
SHOWN = Role.INSPECTED | Role.SUMMARISED | Role.COMPARED | Role.SORTS | Role.RANGES | Role.DRAWN


@pytest.mark.parametrize("column", COLUMNS, ids=lambda column: column.name)
def test_a_row_is_whole(column: Column) -> None:
    """A role has what the place that reads it needs."""
    assert column.description and "\n" not in column.description and 1 <= column.since <= SCHEMA_VERSION
    if column.roles & SHOWN:
        assert column.type == "float" and column.title and column.measured_by
    if Role.ACCEPTS in column.roles:
        assert column.type in ("float", "bool") or column.alias == ORACLE_CONDITION
    if Role.VERIFIED in column.roles:
        assert (column.type == "float" or column.is_class) and column.measured_by and column.tolerance > 0
    if column.parts:
        assert column.parts[0].name == "model" and column.empty == []
    assert all(part.alias or part.roles in (NO_ROLE, Role.VERIFIED) for part in column.parts)


def test_names_are_distinct() -> None:
    """Conditions, filters and the gallery look a score up by its name."""
    names = [column.name for column in COLUMNS]
    assert len(set(names)) == len(names)
    assert not set(names) & set(DERIVED_NAMES) and ENTRY_SCORES.keys() <= DERIVED_NAMES.keys()
    assert all(set(derived.needs) <= set(names) for derived in DERIVED_NAMES.values())
    assert all(entry.score.type == entry.part.type for entry in ENTRY_SCORES.values())
    ranks = [column.rank for column in COLUMNS if column.rank is not None]
    assert sorted(ranks) == list(range(1, len(ranks) + 1))


def test_empty_values_are_new_and_of_the_type() -> None:
    assert BY_NAME["predicted_class"].empty == BY_NAME["oracle_class"].empty == NO_CLASS
    assert (BY_NAME["seed"].empty, BY_NAME["risk"].empty, BY_NAME["scored"].empty, BY_NAME["key"].empty) == (
        0, 0.0, False, "",
    )  # fmt: skip
    lists = [column for column in COLUMNS if column.is_list]
    assert {column.name for column in lists} == {"kldb_classes", "soft_label", "transfer", "judge", "oracles"}
    assert all(column.empty == [] and column.empty is not column.empty for column in lists)


@pytest.mark.parametrize("version", DIGESTS)
def test_the_columns_of_a_version_do_not_change(version: int) -> None:
    """Names, order, types and descriptions; a later version may only add."""
    rows = [
        (field.name, str(field.type), field.nullable, field.metadata[b"description"].decode())
        for field in arrow_schema(surplus=True, version=version)
    ]
    assert hashlib.sha256(repr(rows).encode()).hexdigest()[:16] == DIGESTS[version]


def test_each_place_has_its_scores_in_its_order() -> None:
    """What users see is in one order from version to version; a new score may only be added."""
    assert listed(FLAGS) == ["is_error", "screened"]
    assert listed(SCORES) == [
        "risk", "p_label", "conformity", "conformity_margin", "kldb", "kldb_balance", "kldb_mass", "entropy",
        "judge_conformity", "judge_conformity_margin",
    ]  # fmt: skip
    places = {
        Role.INSPECTED: ["risk", "p_label", "conformity", "conformity_margin", "kldb", "entropy"],
        Role.SUMMARISED: ["risk", "conformity", "kldb", "entropy"],
        Role.COMPARED: ["risk", "conformity", "kldb"],
        Role.VERIFIED: [
            "risk", "predicted_class", "conformity", "conformity_margin", "kldb", "entropy", "oracle_class",
        ],
    }  # fmt: skip
    assert {role: listed(column.name for column in columns_with(role)) for role in places} == places
    drawn = listed(column.name for column in by_rank(columns_with(Role.DRAWN)))
    assert drawn == ["risk", "kldb", "conformity", "entropy"]
    assert list(entry_scores_with(Role.SUMMARISED)) == ["judge_conformity"]
    assert listed(sort_titles([])) == [
        "risk", "kldb", "conformity", "entropy", "p_label", "conformity_margin", "kldb_balance", "kldb_mass",
    ]  # fmt: skip
    assert listed(range_titles([])) == ["risk", "conformity", "kldb", "entropy", "p_label"]
    assert len(listed(MEASURED)) == 15


def listed(names: Iterable[str]) -> list[str]:
    """The names of scores that were there when the lists above were written."""
    columns = {name: ENTRY_SCORES[name].column if name in ENTRY_SCORES else BY_NAME[name] for name in names}
    return [name for name, column in columns.items() if column.since <= LISTED]


def test_texts_that_name_scores() -> None:
    scores = [column for column in target_first(columns_with(Role.SUMMARISED)) if column.since <= LISTED]
    assert [column.label for column in scores] == ["risk", "KLDB", "entropy", "conformity"]
    assert units_text(scores, is_full=False) == "risk, KLDB and entropy are in nats, conformity is a cosine"
    assert units_text([BY_NAME["p_label"]], is_full=True) == ""
    assert enumerated(["a"]) == "a" and enumerated(["a", "b"]) == "a and b"
    entry = ENTRY_SCORES["judge_conformity_margin"]
    assert (entry.title, entry.heading) == ("Conformity margin, judge", "judge's conformity margin")


def test_the_page_about_filters_lists_every_derived_name() -> None:
    page = (REPOSITORY / "docs/reading.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in page for name in DERIVED_NAMES)


def test_a_record_has_its_fields_in_the_order_of_the_table(tmp_path: Path) -> None:
    """The bytes of a tar depend on it; numbers are finite, and of their own type."""
    record = make_result(make_plan(make_job(tmp_path)).requests[0].sample(0)).record
    with pytest.raises(ValueError, match="fields missing, unknown or out of order"):
        check_record(dict(reversed(record.items())))
    for value in (float("nan"), float("inf"), 1):
        with pytest.raises(ValueError, match=r"risk = .* is not a valid float"):
            check_record(record | {"risk": value})


@pytest.mark.parametrize("entries", [[1], ["x"], [{"model": "m"}], [{"model": "m", "conformity": 1, "x": 0.0}], 1])
def test_a_record_with_other_entries_is_refused(tmp_path: Path, entries: object) -> None:
    """By the name of the column, whatever the list holds in a record that somebody else wrote."""
    record = make_result(make_plan(make_job(tmp_path)).requests[0].sample(0)).record
    check_record(record)
    with pytest.raises(ValueError, match=r"judge = .* is not a valid judges"):
        check_record(record | {"judge": entries})
