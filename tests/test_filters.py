"""The filter language: what it selects, held against Python's own evaluation row by row, and what it refuses."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

import engine
from engine.dataset.corpus import Corpus
from engine.dataset.counts import is_joint
from engine.errors import JobError
from tests.corpus_cases import make_run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A run of the present schema version and one of the first."""
    folder = tmp_path_factory.mktemp("filters")
    new = make_run(folder / "new", name="new")
    old = make_run(folder / "old", name="old", version=1, seed=1, count=9)
    return engine.open_run(str(new), str(old))


def _oracle_agrees(row: dict[str, Any]) -> bool:
    wanted = row["kldb_classes"] if is_joint(row["key"]) else [row["class_index"]]
    return row["status"] != "failed" and row["oracle_class"] in wanted


CONDITIONS = (
    "risk > 2",
    "risk > 2 and conformity > 0.25 and oracle_agrees",
    "0.5 < risk <= 2 and not is_error",
    "0.1 < kldb < risk < 3",
    "oracle_agrees",
    "not oracle_agrees and status != 'failed'",
    "valid_failure or class_name in ['zero', \"two\"]",
    "class_index in [0, 2] and index not in (1, 2, 3)",
    "class_index in [0.0, 2]",
    "predicted_class == class_index",
    "-conformity >= -0.1",
    "conformity > -1e-3",
    "accepted == False",
    "(accepted or status == 'failed') and not (index < 3 or index > 15)",
    "context == 'red | <b>`ink`</b>'",
    "seed > 123456789012345",
    "class_index < 100000000000000000000000",
    "risk > -1e308 and index >= -9223372036854775808",
    "True",
    "1 < 2 and accepted",
    "context == ''",
    "class_name < 'p'",
)


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_filter_selects_what_python_selects(corpus: Corpus, condition: str) -> None:
    """The same text evaluated by Python itself, row by row, is the reference."""
    expected = []
    for row in corpus.to_table().to_pylist():
        agrees = _oracle_agrees(row)
        names = row | {"oracle_agrees": agrees, "valid_failure": agrees and row["is_error"]}
        if eval(condition, {}, names):
            expected.append(row["key"])
    found = corpus.filter(condition)
    assert found.to_table(["key"])["key"].to_pylist() == expected and len(found) == len(expected)
    assert found.metadata.count_rows() == len(expected)
    assert expected, "the reference selects something, or nothing is compared"


def test_the_judge_is_known_where_there_was_one(corpus: Corpus) -> None:
    """Rows of version 1 have no judge: what is not known is not selected, nor is its opposite."""
    judged = {
        row["key"]: row["judge"][0]["conformity"]
        for row in corpus.to_table(["key", "judge"]).to_pylist()
        if row["judge"]
    }
    high = corpus.filter("judge_conformity > 0.5").to_table(["key", "judge_conformity"])
    low = corpus.filter("not judge_conformity > 0.5")
    assert dict(zip(*high.to_pydict().values(), strict=True)) == {key: one for key, one in judged.items() if one > 0.5}
    assert len(high) + len(low) == len(judged) > len(high) > 0
    assert all(key.startswith("new") for key in judged)


def test_filters_chain_and_leave_the_first_alone(corpus: Corpus) -> None:
    both = corpus.filter("risk > 1").filter("accepted")
    assert len(both) == len(corpus.filter("risk > 1 and accepted")) < len(corpus.filter("risk > 1")) < len(corpus)
    assert both.conditions == ("risk > 1", "accepted") and corpus.conditions == ()


def test_filters_are_pushed_down_to_parquet(corpus: Corpus) -> None:
    """Arrow can tell from a file's statistics that no row passes: the expression is plain enough."""
    import pyarrow.compute as pc

    condition = corpus.filter("risk > 1000 and accepted")._expression
    fragments = [one for dataset in corpus._datasets for one in dataset.get_fragments()]
    assert fragments and all(not one.split_by_row_group(filter=condition) for one in fragments)
    assert all(one.split_by_row_group(filter=pc.field("risk") >= 0) for one in fragments)


@pytest.mark.parametrize(
    ("condition", "message"),
    [
        ("rsik > 2", r"at character 1: 'rsik' is not a column; did you mean 'risk'\?"),
        ("accepted and  riskk > 2", r"at character 15: 'riskk' is not a column"),
        ("true", r"did you mean 'True'\?"),
        ("__import__('os')", r"at character 1: \"__import__\('os'\)\" is not of this language"),
        ("risk.real > 1", "is not of this language"),
        ("[x for x in (1,)]", "is not of this language"),
        ("(lambda: 1)()", "is not of this language"),
        ("risk if accepted else kldb", "is not of this language"),
        ("f'{risk}' == 'a'", "is not of this language"),
        ("risk + 1 > 2", "'risk \\+ 1' is not of this language"),
        ("risk ** 9 > 1", "is not of this language"),
        ("(a := 1) > 0", "is not of this language"),
        ("risk is 2", "compares by `is`"),
        ("risk", "'risk' is a number; a condition is needed"),
        ("not risk", "'risk' is a number; compare it"),
        ("'a' and accepted", "is a text; compare it"),
        ("risk > 'high'", "compares a number with a text"),
        ("accepted > False", "orders flags"),
        ("accepted == 1", "compares a flag with a number"),
        ("class_name in 'three'", "is not a list"),
        ("class_name in [1]", "is a number in a list for a text"),
        ("risk in [class_index]", "a list holds nothing else"),
        ("risk in [1] == True", "compares on after `in`"),
        ("soft_label > 1", "'soft_label' is a column of lists"),
        ("transfer", "is a column of lists"),
        ("risk > 1e999", "is too large for a number"),
        ("risk > 1" + "0" * 400, "is too large for a number"),
        ("risk > 1" + "0" * 5000, "filter"),
        ("risk > nan", "'nan' is not a column"),
        ("risk > 1j", "is neither a number nor a text"),
        ("risk > None", "is neither a number nor a text"),
        ("class_name == '\\ud800'", "is not a text in Unicode"),
        ("", "invalid syntax; write such as risk > 2 and oracle_agrees"),
        ("   ", "invalid syntax"),
        ("risk >", "at character [0-9]+: invalid syntax"),
        ("risk = 2", "filter 'risk = 2': at character"),
        ("risk > 2\0", "filter"),
        ("(" * 5000 + "risk > 1" + ")" * 5000, "filter"),
        ("not " * 5000 + "accepted", "filter"),
        (" and ".join(["accepted"] * 1000), "one part too many"),
        ("accepted or " * 10_000, "it has 120000 characters"),
    ],
)
def test_what_is_not_of_the_language_is_refused(corpus: Corpus, condition: str, message: str) -> None:
    with pytest.raises(JobError, match=message) as refused:
        corpus.filter(condition)
    assert len(str(refused.value)) < 1500 and str(refused.value).isprintable()


def test_long_lists_are_read(corpus: Corpus) -> None:
    keys = corpus.to_table(["key"])["key"].to_pylist()
    chosen = [*keys[::2], *(f"none-{number}" for number in range(3000))]
    assert corpus.filter(f"key in {chosen}").to_table(["key"])["key"].to_pylist() == keys[::2]


def test_numbers_for_weights(corpus: Corpus) -> None:
    rows = corpus.to_table().to_pylist()
    for text, reference in (
        ("risk", lambda row: row["risk"]),
        ("1 + 2 * is_error", lambda row: 1 + 2 * row["is_error"]),
        ("(risk - -1) / 2", lambda row: (row["risk"] + 1) / 2),
        ("0.5 + (risk > 2)", lambda row: 0.5 + (row["risk"] > 2)),
        ("class_index / 2", lambda row: row["class_index"] / 2),
    ):
        values = corpus.numbers(text, "weights")
        assert [*values(0), *values(1)] == pytest.approx([reference(row) for row in rows]), text
    for text, message in (("class_name", "is a text; a number is needed"), ("risk % 2", "is not of this language")):
        with pytest.raises(JobError, match=rf"weights .*{message}"):
            corpus.numbers(text, "weights")


def test_not_a_number_is_no_weight_and_no_quantile(tmp_path: Path) -> None:
    """The engine writes none; another program may."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from engine.inspection import quantiles

    path = make_run(tmp_path / "run", count=4) / "metadata.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("risk")
    values = [math.nan, math.inf, *table["risk"].to_pylist()[2:]]
    pq.write_table(table.set_column(place, table.schema.field("risk"), pa.array(values, pa.float64())), path)
    corpus = engine.open_run(str(tmp_path / "run"))
    assert 0 < quantiles(corpus)["risk"][0] <= quantiles(corpus)["risk"][-1] == max(values[2:])
    with pytest.raises(JobError, match=r"weights 'risk': is nan for .* \(2 such samples\)"):
        corpus.to_torch(weights="risk")
