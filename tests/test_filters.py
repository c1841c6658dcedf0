"""The filter language: what it selects, compared with a slow evaluation row by row, and what it refuses."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import engine
from engine.data.images.encoding import encode
from engine.data.reading.corpus import Corpus
from engine.data.reading.export import export
from engine.data.reading.export_options import ExportOptions
from engine.data.run.counts import is_joint
from engine.errors import JobError
from engine.job.columns import MEASURED
from tests.corpus_cases import make_run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """A run of the present schema version and one of the first."""
    folder = tmp_path_factory.mktemp("filters")
    new = make_run(folder / "new", name="new")
    old = make_run(folder / "old", name="old", version=1, seed=1, count=9)
    return engine.open_run(str(new), str(old))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """Runs of schema versions 1 to 3, and data sets with real images of the present version and of the one before."""
    folder = tmp_path_factory.mktemp("mixed")
    runs = [make_run(folder / f"v{one}", name=f"v{one}", version=one, seed=one, count=9) for one in (1, 2, 3)]
    for number in range(12):
        place = folder / "real" / ("one", "two")[number % 2] / f"{number}.png"
        place.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        place.write_bytes(encode(noise, "png"))
    options = {"real": str(folder / "real"), "real_ratio": 0.3}
    new = export((str(runs[2]),), ExportOptions(output=str(folder / "new"), name="new", **options)).path
    old = export((str(runs[1]),), ExportOptions(output=str(folder / "old"), name="old", **options)).path
    table = pq.read_table(old / "metadata.parquet").drop_columns(["scored"])
    place = table.column_names.index("schema_version")
    version = pa.array([2] * len(table), pa.int64())
    pq.write_table(table.set_column(place, table.schema.field(place), version), old / "metadata.parquet")
    return engine.open_run(*map(str, (*runs, new, old)))


def _names(row: dict[str, Any]) -> dict[str, Any]:
    """A row with derived names; what models measure is unknown, None, where none did."""
    asked = row["kldb_classes"] if is_joint(row["key"]) else [row["class_index"]]
    agrees = row["oracle_class"] in asked
    errs = row["predicted_class"] not in asked
    names = row | {"target_errs": errs, "oracle_agrees": agrees, "valid_failure": errs and agrees}
    names["judge_conformity"] = row["judge"][0]["conformity"] if row["judge"] else None
    is_scored = row["status"] != "failed" and row["method"] != "real"
    assert row["scored"] is is_scored
    unknown = MEASURED | {"target_errs", "oracle_agrees", "valid_failure"}
    return names if is_scored else names | dict.fromkeys(unknown)


def _evaluated(node: ast.expr, names: dict[str, Any]) -> Any:
    """Kleene's logic: a comparison with what is unknown is unknown, and so is what hangs on it."""
    match node:
        case ast.Constant():
            return node.value
        case ast.Name():
            return names[node.id]
        case ast.UnaryOp(op=ast.Not()):
            inner = _evaluated(node.operand, names)
            return None if inner is None else not inner
        case ast.UnaryOp():
            inner = _evaluated(node.operand, names)
            return None if inner is None else -inner
        case ast.BoolOp():
            parts = [_evaluated(one, names) for one in node.values]
            decides = isinstance(node.op, ast.Or)
            return decides if decides in parts else None if None in parts else not decides
        case ast.List() | ast.Tuple():
            return [_evaluated(one, names) for one in node.elts]
        case ast.Compare():
            values = [_evaluated(one, names) for one in (node.left, *node.comparators)]
            pairs = zip(node.ops, values, values[1:], strict=False)
            parts = [None if None in (a, b) else _COMPARE[type(op)](a, b) for op, a, b in pairs]
            return False if False in parts else None if None in parts else True
    raise AssertionError(ast.dump(node))


_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], bool]] = {
    ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge, ast.Eq: operator.eq,
    ast.NotEq: operator.ne, ast.In: lambda a, b: a in b, ast.NotIn: lambda a, b: a not in b,
}  # fmt: skip


def _selected(corpus: Corpus, condition: str) -> list[str]:
    """Keys of the rows that a condition holds of, by the slow evaluation."""
    root = ast.parse(condition, mode="eval").body
    return [row["key"] for row in corpus.to_table().to_pylist() if _evaluated(root, _names(row)) is True]


CONDITIONS = (
    "risk > 2",
    "risk > 2 and conformity > 0.25 and oracle_agrees",
    "0.5 < risk <= 2 and not is_error",
    "0.1 < kldb < risk < 3",
    "oracle_agrees",
    "not oracle_agrees and status != 'failed'",
    "valid_failure or class_name in ['zero', \"two\"]",
    "target_errs and not is_error or target_errs",
    "not scored and status == 'failed'",
    "scored or index > 3",
    "not (risk < 1)",
    "not (predicted_class not in [0, 1])",
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
    """The same text evaluated in Python, row by row, is the reference."""
    expected = _selected(corpus, condition)
    found = corpus.filter(condition)
    assert found.to_table(["key"])["key"].to_pylist() == expected and len(found) == len(expected)
    assert found.metadata.count_rows() == len(expected)
    assert expected, "the reference selects something, or nothing is compared"


_NUMBERS = ("risk", "kldb", "predicted_class", "oracle_class", "judge_conformity", "index", "class_index")
_COLUMN = st.sampled_from(_NUMBERS)
_ATOMS = st.one_of(
    st.builds("{} {} {}".format, _COLUMN, st.sampled_from(["<", ">=", "==", "!="]), st.integers(-1, 3)),
    st.builds("0.1 < {} <= {}".format, _COLUMN, _COLUMN),
    st.builds("{} {} [0, 1, -1]".format, _COLUMN, st.sampled_from(["in", "not in"])),
    st.sampled_from(
        ["is_error", "target_errs", "oracle_agrees", "valid_failure", "scored", "accepted", "surplus", "True",
         "method == 'real'", "request in ['between']", "is_error == False", "target_errs in [True]"]
    ),
)  # fmt: skip
_CONDITIONS = st.recursive(
    _ATOMS,
    lambda inner: st.one_of(
        st.builds("not ({})".format, inner),
        st.builds("({}) and ({})".format, inner, inner),
        st.builds("({}) or ({})".format, inner, inner),
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(condition=_CONDITIONS)
def test_what_was_not_scored_is_selected_by_no_score(mixed: Corpus, condition: str) -> None:
    """Failed samples and real images, of any version, whatever stands in their columns and however it is negated."""
    assert mixed.filter(condition).to_table(["key"])["key"].to_pylist() == _selected(mixed, condition)


@pytest.mark.parametrize("name", sorted({*MEASURED} - {"kldb_classes", "transfer", "judge", "oracles"}))
def test_no_measured_column_selects_a_real_image(mixed: Corpus, name: str) -> None:
    """Neither a condition nor its opposite; every column that a model fills is among them."""
    real = mixed.filter("method == 'real'")
    assert len(real) == 10 and not any(real.to_table(["scored"])["scored"].to_pylist())
    wanted = "True" if name == "is_error" else "0"
    for condition in (f"{name} == {wanted}", f"{name} != {wanted}", f"not {name} == {wanted}", f"{name} in [{wanted}]"):
        assert len(real.filter(condition)) == 0, condition


def test_weights_leave_out_what_was_not_scored(mixed: Corpus) -> None:
    """With a warning; an expression that says what they weigh keeps them."""
    some = mixed.samples
    with pytest.warns(UserWarning, match=r"weights 'risk': 10 of \d+ samples were not scored"):
        weighed = some.to_torch(weights="risk")
    scored = some.filter("scored").to_table(["key", "risk"])
    assert weighed.keys == scored["key"].to_pylist() and weighed.weights.tolist() == scored["risk"].to_pylist()
    kept = some.to_torch(weights="1 + 3 * (scored and target_errs)")
    rows = some.to_table(["scored", "target_errs"]).to_pylist()
    assert kept.weights.tolist() == [4 if row["scored"] and row["target_errs"] else 1 for row in rows]
    with pytest.raises(JobError, match="weights 'risk': 10 of 10 samples were not scored"):
        mixed.filter("method == 'real'").to_torch(weights="risk")


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

    fragments = [(one, dataset.schema) for dataset in corpus._datasets for one in dataset.get_fragments()]
    for text in ("risk > 1000 and accepted", "not (risk <= 1000)", "valid_failure and kldb < 0"):
        condition = corpus.filter(text)._expression
        assert fragments and all(not one.split_by_row_group(filter=condition, schema=all_) for one, all_ in fragments)
    assert all(one.split_by_row_group(filter=pc.field("risk") >= 0, schema=all_) for one, all_ in fragments)


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
        ("", "it is empty; write such as risk > 2 and oracle_agrees"),
        ("   ", "it is empty"),
        ("risk >", "at its end: invalid syntax"),
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
    corpus = corpus.filter("scored")
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
    from engine.data.reading.inspection import quantiles

    path = make_run(tmp_path / "run", count=4) / "metadata.parquet"
    table = pq.read_table(path)
    place = table.column_names.index("risk")
    values = [math.nan, math.inf, *table["risk"].to_pylist()[2:]]
    pq.write_table(table.set_column(place, table.schema.field("risk"), pa.array(values, pa.float64())), path)
    corpus = engine.open_run(str(tmp_path / "run"))
    assert 0 < quantiles(corpus)["risk"][0] <= quantiles(corpus)["risk"][-1] == max(values[2:])
    with pytest.raises(JobError, match=r"weights 'risk': is nan for .* \(2 such samples\)"):
        corpus.to_torch(weights="risk")
