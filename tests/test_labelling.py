"""Labels are read in one way: whatever their Unicode, case and type, and where classes are called by numbers."""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import itertools
import json
import unicodedata
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.data.images import LabelledImage, UnusableImageError
from engine.data.images.labelling import Labelling
from engine.job.class_lookup import find_class, folded, is_index
from tests.image_cases import DIGITS, grey, level_of, read, split, write_files, write_table, write_tar

FORMS = ("NFC", "NFD", "NFKC", "NFKD")
WRITTEN: dict[str, Callable[[str], str]] = {
    **{form: lambda text, form=form: unicodedata.normalize(form, text) for form in FORMS},
    "upper": str.upper,
    "lower": str.lower,
    "title": str.title,
    "underscores": lambda text: text.replace(" ", "_"),
    "blanks": lambda text: text.replace(" ", "  "),
    "no-break": lambda text: text.replace(" ", "\xa0"),
}
# Accents, syllables, ligatures, full width, a letter whose capital is two, the Angstrom sign, blanks.
NAMES = (
    "café",
    "jalapeño",
    "ねこ ガ",
    "한국",
    "ﬁsh tank",
    "\uff21\uff22\uff23",
    "straße",
    "Å unit",
    "great white",
    "Ω",
)


def as_folders(root: Path, texts: Sequence[str]) -> Path:
    return write_files(root, {f"{text}/{row}.png": grey(row) for row, text in enumerate(texts)})


def as_cls(root: Path, texts: Sequence[str]) -> Path:
    pairs = [[(f"{row}.png", grey(row)), (f"{row}.cls", text.encode())] for row, text in enumerate(texts)]
    return write_tar(root / "a.tar", itertools.chain(*pairs))


def as_class_name(root: Path, texts: Sequence[str]) -> Path:
    pairs = [
        [(f"{row}.png", grey(row)), (f"{row}.json", json.dumps({"class_name": text}).encode())]
        for row, text in enumerate(texts)
    ]
    return write_tar(root / "a.tar", itertools.chain(*pairs))


def as_strings(root: Path, texts: Sequence[str]) -> Path:
    return write_table(root / "a.parquet", [grey(row) for row in range(len(texts))], pa.array(texts))


def as_dictionary(root: Path, texts: Sequence[str]) -> Path:
    column = pa.array(texts).dictionary_encode()
    return write_table(root / "a.parquet", [grey(row) for row in range(len(texts))], column)


def as_own_names(root: Path, texts: Sequence[str]) -> Path:
    names = list(dict.fromkeys(texts))
    column = pa.array([names.index(text) for text in texts])
    return write_table(root / "a.parquet", [grey(row) for row in range(len(texts))], column, names)


def as_csv(root: Path, texts: Sequence[str]) -> Path:
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("file_name", "label"), *((f"{row}.png", text) for row, text in enumerate(texts))])
    files = {f"{row}.png": grey(row) for row in range(len(texts))}
    return write_files(root, files | {"metadata.csv": buffer.getvalue().encode()})


def as_jsonl(root: Path, texts: Sequence[str]) -> Path:
    lines = [json.dumps({"file_name": f"in/{row}.png", "label": text}) for row, text in enumerate(texts)]
    files = {f"in/{row}.png": grey(row) for row in range(len(texts))}
    return write_files(root, files | {"metadata.jsonl": "\n".join(lines).encode()})


SOURCES = {
    one.__name__: one
    for one in (
        as_folders, as_cls, as_class_name, as_strings, as_dictionary, as_own_names, as_csv, as_jsonl,
    )
}  # fmt: skip


@pytest.mark.parametrize("own", FORMS)
@pytest.mark.parametrize("source", SOURCES)
def test_a_name_is_found_however_it_is_written(tmp_path, source, own):
    """Every form of Unicode, case, underscores and blanks, in every place of labels; the target's names too."""
    labels = [unicodedata.normalize(own, name) for name in NAMES]
    pairs = {write(name): index for index, name in enumerate(NAMES) for write in WRITTEN.values()}
    texts = list(pairs)
    found = read(SOURCES[source](tmp_path, texts), labels)
    assert len(found) == len(texts)
    wrong = [
        one for one in found if not isinstance(one, LabelledImage) or one.class_index != pairs[texts[level_of(one)]]
    ]
    assert not wrong


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=5, unique=True), st.sampled_from(sorted(WRITTEN)))
def test_a_written_name_is_its_class_or_several_and_never_another(labels, written):
    """Over texts of any letters: what is found is equal once case, forms and blanks are left out."""
    for index, label in enumerate(labels):
        if not folded(label):
            continue
        assert index in find_class(label, labels)
        for other in find_class(WRITTEN[written](label), labels):
            parts = [folded(part) for part in (labels[other], *labels[other].split(","))]
            assert folded(WRITTEN[written](label)) in parts


def test_exact_names_come_before_similar_ones():
    """Classes that differ by case or form alone stay apart, and what fits both is ambiguous."""
    labels = ("Polish", "polish", "cafe\u0301", "caf\u00e9", "a b", "a_b", "crane", "ox", "crane")
    assert [find_class(label, labels) for label in labels[:6]] == [[0], [1], [2], [3], [4], [5]]
    assert find_class("POLISH", labels) == [0, 1] and find_class("crane", labels) == [6, 8]
    assert find_class("crane (8)", labels) == [8] and find_class("crane (7)", labels) == []
    assert find_class("_", labels) == find_class("", (*labels, "")) == find_class("_", ("ox, ", "_ ")) == []


@pytest.mark.parametrize("count", [2, 3])
def test_a_name_of_several_classes_is_reported_with_their_indices(count):
    """Two of one name are as many as three: none of them is guessed; an index next to the name decides."""
    labelling = Labelling(("crane", "ox", *["crane"] * (count - 1)))
    indices = [0, *range(2, count + 1)]
    with pytest.raises(
        UnusableImageError, match=f"is the name of classes {', '.join(map(str, indices))}; give the index"
    ):
        labelling.of_name("crane")
    assert [labelling.of_named_index("crane", index) for index in indices] == indices
    assert labelling.of_name("ox") == 1 and labelling.is_class("crane") and labelling.classes_of("crane") == indices


numbers = st.one_of(
    st.integers(0, 12).map(str), st.sampled_from(["00", "01", "007", "-1", "90", "180", "٣", "\uff13", "1.0"])
)
names = st.sampled_from(["cat", "dog", "7, seven", "class 1"])


@pytest.mark.parametrize("source", SOURCES)
@settings(max_examples=25, deadline=None)
@given(labels=st.lists(numbers, min_size=1, max_size=6, unique=True), more=st.lists(names, max_size=2, unique=True),
       texts=st.lists(numbers, min_size=1, max_size=8, unique=True))  # fmt: skip
def test_numbers_are_names_where_classes_are_called_by_numbers(tmp_path_factory, source, labels, more, texts):
    """A label is a name of its class, as an index it is used nowhere; every image is used or named."""
    labels = [*labels, *more]
    found = read(SOURCES[source](tmp_path_factory.mktemp("numbers"), texts), labels)
    assert len(found) == len(texts)
    for one in found:
        if isinstance(one, LabelledImage) and any(is_index(folded(label)) for label in labels):
            assert one.class_index in find_class(texts[level_of(one)], labels)


@pytest.mark.parametrize("source", sorted(set(SOURCES) - {"as_class_name", "as_own_names"}))
def test_names_and_indices_in_one_set_are_not_mixed(tmp_path, source):
    """Where one label is a name, a number beside it is named; in tars the first label decides, and that alone."""
    used, reasons = split(read(SOURCES[source](tmp_path, ["three", "4", "eight"]), DIGITS))
    assert sorted(used.values()) == [3, 8]
    assert [reason for reason in reasons.values() if "other labels of the set are class names" in reason]
    only, none = split(read(SOURCES[source](tmp_path / "numbers", ["3", "004"]), DIGITS))
    assert sorted(only.values()) == [3, 4] and not none


def test_the_first_label_decides_whatever_is_around_it(tmp_path):
    """Files of labels often end with a line break."""
    texts = ["3\n", "eight\n", " 4 "]
    assert sorted(split(read(as_cls(tmp_path, texts), DIGITS))[0].values()) == [3, 4, 8]


@pytest.mark.parametrize("name", ["7", "07", "-1", "1.0", "1e3", "0.5", "\uff13", "\u0663", "one, 1", "1_0", "10-20"])
def test_numbers_of_any_kind_are_names(tmp_path, name):
    """A target with one such class has no indices in texts."""
    used, reasons = split(read(as_folders(tmp_path, ["0", "cat"]), (name, "cat", "dog")))
    assert list(used.values()) == [1] and "called by numbers" in reasons["0/0.png"]


def test_whole_numbers_in_columns_are_no_names(tmp_path):
    """An index without names is used for a target of words, and where it is the name of the same class."""
    images, column = [grey(row) for row in range(3)], pa.array([0, 1, 2])
    path = write_table(tmp_path / "a.parquet", images, column)
    assert list(split(read(path, DIGITS))[0].values()) == [0, 1, 2]
    assert list(split(read(path, ("0", "1", "2")))[0].values()) == [0, 1, 2]
    used, reasons = split(read(path, ("0", "2", "1")))
    assert list(used.values()) == [0] and all("called by numbers" in reason for reason in reasons.values())


@pytest.mark.parametrize("names", [["eight", "three"], {"0": "eight", "1": "three"}])
def test_an_index_beyond_the_names_of_its_file_is_reported(tmp_path, names):
    """It never becomes an index of the target; -1 is a missing label."""
    column = pa.array([1, 0, 2, 5, -1, -2, None, 2**40])
    path = write_table(tmp_path / "a.parquet", [grey(row) for row in range(8)], column, names)
    used, reasons = split(read(path, DIGITS))
    assert list(used.values()) == [3, 8] and len(reasons) == 6
    assert "has 0 to 1" in reasons["a.parquet row 2"] and "has no label" in reasons["a.parquet row 4"]


def test_names_that_are_numbers_are_names_of_their_file(tmp_path):
    """`ClassLabel` names such as 10 are no indices; the bare enumeration 0 to n - 1 names nothing and is one."""
    images, column = [grey(0), grey(1)], pa.array([0, 1])
    write_table(tmp_path / "a.parquet", images, column, ["1", "0"])
    assert not split(read(tmp_path / "a.parquet", ("cat", "dog")))[0]
    write_table(tmp_path / "b.parquet", images, column, ["0", "1"])
    assert list(split(read(tmp_path / "b.parquet", ("cat", "dog")))[0].values()) == [0, 1]


def test_files_with_and_without_names_are_not_one_set(tmp_path):
    """Numbers of a file without names are named where another file has names; texts are read in both."""
    write_table(tmp_path / "a.parquet", [grey(0)], pa.array([0]), ["eight"])
    write_table(tmp_path / "b.parquet", [grey(1)], pa.array([0]))
    write_table(tmp_path / "c.parquet", [grey(2)], pa.array(["three"]))
    used, reasons = split(read(tmp_path, DIGITS))
    assert used == {"a.parquet row 0": 8, "c.parquet row 0": 3} and "without class names" in reasons["b.parquet row 0"]


@pytest.mark.parametrize("where", ["README.md", "dataset_infos.json", "dataset_info.json"])
def test_class_names_of_a_card_are_those_of_its_files(tmp_path, where):
    """A file that has none of its own; without the card its numbers would be the target's."""
    header = "---\ndataset_info:\n  features:\n  - name: label\n    dtype:\n      class_label:\n        names:\n"
    feature = {"features": {"label": {"names": ["eight", "three"], "_type": "ClassLabel"}}}
    text = {
        "README.md": header + "          '0': eight\n          '1': three\n---\nwords\n",
        "dataset_infos.json": json.dumps({"default": feature}),
        "dataset_info.json": json.dumps(feature),
    }
    (tmp_path / where).write_text(text[where])
    write_table(tmp_path / "data/a.parquet", [grey(row) for row in range(3)], pa.array([0, 1, 2]))
    used, reasons = split(read(tmp_path, DIGITS))
    assert list(used.values()) == [8, 3] and set(reasons) == {"data/a.parquet row 2", where}
    for path in (tmp_path / "data", tmp_path / "data/a.parquet"):
        assert list(split(read(path, DIGITS))[0].values()) == [8, 3]


def test_a_card_with_several_lists_of_names_gives_none(tmp_path):
    """Of two configurations, of which nothing says whose a file is: numbers are named, names are used."""
    lists = {name: {"features": {"label": {"names": [name, "three"]}}} for name in ("eight", "one")}
    (tmp_path / "dataset_infos.json").write_text(json.dumps(lists))
    write_table(tmp_path / "a.parquet", [grey(0)], pa.array([1]))
    assert "without class names" in split(read(tmp_path, DIGITS))[1]["a.parquet row 0"]
    write_table(tmp_path / "a.parquet", [grey(0)], pa.array(["three"]))
    assert list(split(read(tmp_path, DIGITS))[0].values()) == [3]


VALUES: list[pa.Array] = [
    *(pa.array([3], kind) for kind in (pa.int8(), pa.int16(), pa.int32(), pa.int64())),
    *(pa.array([3], kind) for kind in (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())),
    *(pa.array(["three"], kind) for kind in (pa.string(), pa.large_string(), pa.string_view())),
    pa.array(["three"]).dictionary_encode(),
    pa.array([3]).dictionary_encode(),
]
NO_LABELS: list[pa.Array] = [
    *(pa.array([3.0], kind) for kind in (pa.float32(), pa.float64())),
    pa.array([float("nan")]),
    pa.array([True]),
    pa.array([None], pa.int64()),
    pa.array([None], pa.string()),
    pa.array([None], pa.null()),
    pa.array([""]),
    pa.array([b"three"]),
    pa.array([[3]]),
    pa.array([["three"]]),
    pa.array([{"a": 3}]),
    pa.array([decimal.Decimal("3")]),
    pa.array([datetime.date(2024, 1, 3)]),
    pa.array([datetime.datetime(2024, 1, 3)]),
    pa.array([2**63 - 1]),
    pa.array([-3]),
]


@pytest.mark.parametrize("column", VALUES, ids=lambda column: str(column.type))
def test_whole_numbers_and_texts_of_every_width_are_labels(tmp_path, column):
    assert list(split(read(write_table(tmp_path / "a.parquet", [grey(0)], column), DIGITS))[0].values()) == [3]


@pytest.mark.parametrize("column", NO_LABELS, ids=lambda column: f"{column.type} {column[0]}")
def test_values_of_other_types_are_reported(tmp_path, column):
    """With names of the file and without."""
    for names in (None, list(DIGITS)):
        used, reasons = split(read(write_table(tmp_path / "a.parquet", [grey(0)], column, names), DIGITS))
        assert not used and list(reasons) == ["a.parquet row 0"]


@pytest.mark.parametrize(
    ("cls", "record", "index"),
    [
        ("3", {"class_index": 3}, 3),
        ("3", {"class_index": 3, "class_name": "three"}, 3),
        ("three", {"class_index": 3}, 3),
        ("3", {"class_index": 5}, None),
        ("three", {"class_name": "five"}, None),
        ("3", {"class_index": 3, "class_name": "five"}, 5),
        ("3", {"class_index": 3, "class_name": "cat"}, None),
        ("3", {"caption": "x"}, 3),
        (None, {"class_name": "three"}, 3),
        (None, {"class_index": "3"}, None),
        (None, {"class_index": 10}, None),
    ],
)
def test_the_labels_of_a_sample_agree(tmp_path, cls, record, index):
    """Two classes are named; a record with a name is of another order of classes where its index is not that name's."""
    members = [("a.png", grey(0)), *([("a.cls", cls.encode())] if cls else []), ("a.json", json.dumps(record).encode())]
    used, reasons = split(read(write_tar(tmp_path / "a.tar", members), DIGITS))
    assert list(used.values()) == ([] if index is None else [index]) and len(reasons) == (index is None)


def test_the_samples_of_a_run_keep_their_class_where_classes_are_called_by_numbers(tmp_path):
    """`.cls` holds the index 1, `.json` the name beside it: not the class that is called 1."""
    labels = ("1", "3", "5", "7")
    members = [
        (f"{index}.{end}", data)
        for index, name in enumerate(labels)
        for end, data in (
            ("png", grey(index)),
            ("json", json.dumps({"class_index": index, "class_name": name}).encode()),
            ("cls", str(index).encode()),
        )
    ]
    found = read(write_tar(tmp_path / "a.tar", members), labels)
    assert [(level_of(one), one.class_index) for one in found] == [(index, index) for index in range(4)]
    bare, reasons = split(read(write_tar(tmp_path / "b.tar", [one for one in members if "json" not in one[0]]), labels))
    assert not bare and all("class_name" in reason or "none of them" in reason for reason in reasons.values())


def test_a_list_of_labels_decides_and_its_folders_agree(tmp_path):
    """Images that are listed twice, not at all, or in the folder of another class are named; so is what is missing."""
    rows = [("x/a.png", "three"), ("x/b.png", "3"), ("eight/c.png", "three"), ("gone.png", "one"),
            ("x/d.png", "one"), ("x/d.png", "two")]  # fmt: skip
    write_files(tmp_path, {name: grey(0) for name, _ in rows if name != "gone.png"} | {"x/e.png": grey(0)})
    text = "file_name,label\n" + "".join(f"{name},{label}\n" for name, label in rows)
    (tmp_path / "metadata.csv").write_text(text)
    used, reasons = split(read(tmp_path, DIGITS))
    assert used == {"x/a.png": 3}
    assert sorted(reasons) == ["eight/c.png", "gone.png", "x/b.png", "x/d.png", "x/e.png"]
    (tmp_path / "metadata.csv").write_text("file_name,text\nx/a.png,words\n")
    assert "no column label" in split(read(tmp_path, DIGITS))[1]["metadata.csv"]


def test_an_exported_folder_is_read_by_its_list(tmp_path):
    """Its folders may be numbers, its indices are those of its own names."""
    labels = ["1", "3", "a/b"]
    features = {"label": {"names": ["a/b", "3", "1"], "_type": "ClassLabel"}}
    rows = {"file_name": [f"{index:04d}/{index}.png" for index in range(3)], "label": [2, 1, 0]}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(pa.table(rows).replace_schema_metadata(metadata), tmp_path / "metadata.parquet")
    write_files(tmp_path, {name: grey(row) for row, name in enumerate(rows["file_name"])})
    found = read(tmp_path, labels)
    assert [(level_of(one), one.class_index) for one in found] == [(0, 0), (1, 1), (2, 2)]
