"""Files of preference records: formats that agree, lines that are refused with their place, choices that count once."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.errors import JobError
from engine.studies.curate import preference_files
from engine.studies.curate.preference_files import FIELDS, MAX_SHOWN, read_preferences, usable_records

GOOD: dict[str, Any] = {"first": "a-000", "second": "b-001", "choice": 1, "rater": "ann", "time": 17.5, "group": "x"}


def written(folder: Path, rows: list[Any], name: str = "prefs.jsonl") -> str:
    path = folder / name
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_the_formats_agree(tmp_path):
    """Text stays text: a rater called 007 or 1e5 is not a number; columns that are left out have their defaults."""
    rows = [GOOD | {"rater": "007"}, GOOD | {"first": "c", "choice": 0, "rater": "1e5", "time": 3}]
    json_file = written(tmp_path, ["\ufeff", *rows, "\n"])
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "prefs.parquet")
    lines = [",".join(FIELDS), *(",".join(str(row[name]) for name in FIELDS) for row in rows)]
    csv_file = written(tmp_path, ["\r\n".join(lines)], "prefs.CSV")
    files = [read_preferences(path, "--preferences") for path in (json_file, csv_file, str(tmp_path / "prefs.parquet"))]
    preferences = [[record.preference for record in file.records] for file in files]
    assert preferences[0] == preferences[1] == preferences[2]
    assert [preference.rater for preference in preferences[0]] == ["007", "1e5"]
    assert {record.group for file in files for record in file.records} == {"x"}
    twice = pa.table([["a"], ["b"], [0], [1]], names=["first", "second", "choice", "choice"])
    pq.write_table(twice, tmp_path / "twice.parquet")
    with pytest.raises(JobError, match="'choice' twice"):
        read_preferences(str(tmp_path / "twice.parquet"), "--preferences")
    empty = written(tmp_path, [GOOD | {"rater": None, "time": None, "group": None}], "null.jsonl")
    assert read_preferences(empty, "--preferences").records[0].preference.rater == ""
    short = read_preferences(written(tmp_path, ["first,second,choice,time\n", "a,b,0,\n"], "short.csv"), "--trusted")
    assert (short.records[0].preference.time, short.records[0].preference.rater, short.records[0].group) == (0, "", "")
    assert short.records[0].preferred == "a" and files[0].records[0].preferred == "b-001"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (GOOD | {"choice": 2}, "choice: 2 is neither 0 (the first is preferred) nor 1 (the second is)"),
        (GOOD | {"choice": True}, "choice: True is neither"),
        (GOOD | {"choice": "0"}, "choice: '0' is neither"),
        (GOOD | {"choice": [0]}, "choice: [0] is neither"),
        (GOOD | {"second": "a-000"}, "second: 'a-000' is the first sample too; a preference needs two"),
        (GOOD | {"first": 7}, "first: 7 is not text; put it in quotes"),
        (GOOD | {"first": ""}, "first: is empty; give the key of a sample"),
        (GOOD | {"rater": "a\n\x1b[31m"}, "not printable"),
        (GOOD | {"time": "noon"}, "time: 'noon' is no number; give seconds since 1970"),
        (GOOD | {"raters": "ann"}, "'raters' is no field of a record; did you mean 'rater'?; it has first, second"),
        ({"first": "a", "second": "b"}, "choice is missing; a line is {"),
        ([1, 2], "[1, 2] is not an object"),
        ("{'first': 1}\n", "is not JSON"),
        ('{"first": "a", "second": "b", "choice": 0, "time": NaN}\n', "it holds NaN"),
        ('{"first": "\\ud800", "second": "b", "choice": 0}\n', "is not JSON"),
        ("[" * 100_000 + "\n", "is not JSON"),
        ('{"first": "a", "second": "b", "choice": 0, "time": 1e999}\n', "is too large"),
    ],
)
def test_a_line_that_is_no_record_is_refused_with_its_place(tmp_path, line, message):
    path = written(tmp_path, [GOOD, "\n", line])
    with pytest.raises(JobError) as error:
        read_preferences(path, "--preferences")
    assert len(error.value.problems) == 1
    assert error.value.problems[0].startswith(f"--preferences: {path}, line 3: ") and message in error.value.problems[0]


def test_many_bad_lines_are_counted(tmp_path):
    path = written(tmp_path, [GOOD | {"choice": number} for number in range(2, 12)])
    with pytest.raises(JobError) as error:
        read_preferences(path, "--trusted")
    assert len(error.value.problems) == MAX_SHOWN + 1 and "and 5 more lines" in error.value.problems[-1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("prefs.jsonl", "", "has no record; a line is"),
        ("prefs.txt", "x", "ends in .jsonl, .csv or .parquet"),
        ("prefs.parquet", "PAR1 no", "cannot be read as parquet"),
        ("prefs.csv", "first,second,choice\na,b,0,9\n", "'a cell without a column' is no field"),
        ("prefs.csv", 'first,second,choice\n"a\nb', "cannot be read as csv"),
        ("prefs.csv", "first,second\na,b\n", "line 2: choice is missing"),
        ("prefs.csv", "first;second;choice\na;b;0\n", "as csv ('first;second;choice' is no field of a record; it has"),
        ("prefs.csv", "first,second,choice,choice\na,b,0,1\n", "it has the column 'choice' twice"),
        ("prefs.jsonl", '{"first": "a", "second": "b", "choice": 0, "choice": 1}', "it holds 'choice' twice"),
    ],
)
def test_a_file_that_has_no_records_is_refused(tmp_path, name, content, message):
    with pytest.raises(JobError, match="--preferences") as error:
        read_preferences(written(tmp_path, [content], name), "--preferences")
    assert message in str(error.value)


def test_files_that_cannot_be_read_are_refused(tmp_path, monkeypatch):
    """No file, a folder, a pipe (which would wait for ever), another encoding, too many bytes and too many records."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "latin.csv").write_bytes(b"first,second,choice\n\xe9,b,0\n")
    for name, message in (
        ("none.jsonl", "does not exist"), ("", "is a folder"), ("pipe.jsonl", "is a pipe"), ("latin.csv", "as csv"),
    ):  # fmt: skip
        with pytest.raises(JobError, match=message):
            read_preferences(str(tmp_path / name), "--preferences")
    path = written(tmp_path, [GOOD, GOOD])
    monkeypatch.setattr(preference_files, "MAX_RECORDS", 1)
    with pytest.raises(JobError, match="more than 1 records"):
        read_preferences(path, "--preferences")
    monkeypatch.setattr(preference_files, "MAX_FILE_BYTES", 100)
    with pytest.raises(JobError, match="more than the 100"):
        read_preferences(path, "--preferences")


def test_damaged_files_are_refused_and_never_crash(tmp_path):
    """100 damaged files of each format: read, or refused by a `JobError` of bounded length."""
    draw, rows = random.Random(0), [GOOD | {"rater": f"r{number}"} for number in range(3)]
    written(tmp_path, rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "prefs.parquet")
    lines = [",".join(FIELDS), *(",".join(str(row[name]) for name in FIELDS) for row in rows)]
    written(tmp_path, ["\n".join(lines)], "prefs.csv")
    for suffix in ("jsonl", "csv", "parquet"):
        data = (tmp_path / f"prefs.{suffix}").read_bytes()
        path, num_refused = tmp_path / f"damaged.{suffix}", 0
        for _ in range(100):
            damaged = bytearray(data[: draw.choice([len(data), draw.randrange(len(data))])])
            for _ in range(draw.randint(1, 4)):
                damaged[draw.randrange(len(damaged) or 1) : 1] = bytes([draw.randrange(256)])
            path.write_bytes(damaged)
            try:
                read_preferences(str(path), "--preferences")
            except JobError as error:
                num_refused += 1
                assert len(str(error)) < 3000
        assert num_refused > 30


def test_the_last_choice_of_a_rater_about_a_pair_counts(tmp_path):
    """In either order of the samples, by time and then by line; without a rater only equal records are one."""
    swapped = {"first": "b-001", "second": "a-000"}
    rows = [
        GOOD | {"time": 5}, GOOD | swapped | {"time": 9, "choice": 1}, GOOD | {"time": 7},
        GOOD | {"rater": "bob"}, GOOD | {"rater": "bob", "choice": 0},
        GOOD | {"rater": ""}, GOOD | {"rater": ""}, GOOD | {"rater": "", "choice": 0},
    ]  # fmt: skip
    file = read_preferences(written(tmp_path, rows), "--preferences")
    assert [record.line for record in file.records] == [2, 5, 7, 8]
    assert (file.num_lines, file.num_repeated) == (8, 4)
    assert file.records[0].preferred == "a-000"


def test_records_of_other_samples_are_left_out_and_named(tmp_path):
    """Of samples that the run does not have, or has no image of; only where none is left the file is refused."""
    rows = [GOOD, GOOD | {"first": "gone"}, GOOD | {"second": "gone"}, GOOD | {"first": "failed"}]
    file = read_preferences(
        written(tmp_path, [row | {"rater": f"r{n}"} for n, row in enumerate(rows)]), "--preferences"
    )
    is_stored = {"a-000": True, "b-001": True, "failed": False}
    usable = usable_records(file, is_stored, "--preferences")
    assert [record.line for record in usable.records] == [1]
    assert usable.left_out == (
        "2 of 4 records name a sample that the run does not have: 'gone' (line 2)",
        "1 of 4 records name a sample of which the run stores no image: 'failed' (line 4)",
    )
    with pytest.raises(JobError, match="no record is left; give records of this run's samples"):
        usable_records(file, {}, "--preferences")
