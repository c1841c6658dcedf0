"""Reviews: what is drawn and shown, what a browser may know, how answers are stored, returned and read."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given as example
from hypothesis import strategies as st

from engine.data.reading.corpus import open_run
from engine.data.review.answers import (
    append_answers,
    check_rater,
    has_answers,
    last_answers,
    read_answers,
)
from engine.data.run.verify import verify
from engine.data.stores.base import Store
from engine.data.stores.object_store import ObjectStore
from engine.data.stores.opening import open_store
from engine.errors import JobError, OutputError
from engine.studies.curate.preference_files import read_preferences
from engine.studies.review.design import MIN_DISTANCE, order_of, read_design, stored_digests
from engine.studies.review.images import ReviewImages
from engine.studies.review.page import class_keys, entries, file_page, images_by_id, server_page, shown_labels
from engine.studies.review.program import write_file
from engine.studies.review.records import MAX_TIME, AnswerBook
from engine.studies.review.returned import import_files
from engine.studies.review.strata import allocate, draw_stratified
from tests.pair_cases import DIGITS
from tests.review_cases import (
    GUIDED,
    PLAIN,
    SESSION,
    TIME,
    answer_all,
    given,
    make_reviewed_run,
    open_small,
    pixels_of,
    write_reals,
)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A run that tests draw from and do not answer."""
    return make_reviewed_run(tmp_path_factory.mktemp("review") / "run")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_reviewed_run(tmp_path_factory.mktemp("made") / "run")


@pytest.fixture
def run(made: Store, tmp_path: Path) -> Store:
    """A run of the test's own."""
    return open_store(str(shutil.copytree(made.uri, tmp_path / "run")))


# The draw ----------------------------------------------------------------------------------------------------------


@example(st.dictionaries(st.sampled_from("abcdefgh"), st.integers(1, 60), min_size=1), st.integers(0, 400))
def test_allocation_is_proportional_within_bounds(sizes: dict[str, int], number: int) -> None:
    """As many as asked for, if there are; the minimum of each stratum where the number suffices, else its share."""
    counts, total = allocate(sizes, number), sum(sizes.values())
    assert sum(counts.values()) == min(number, total)
    assert all(0 <= counts[name] <= size for name, size in sizes.items())
    floor = {name: min(2, size) for name, size in sizes.items()}
    if sum(floor.values()) <= number:
        assert all(counts[name] >= least for name, least in floor.items())
    else:
        assert all(abs(counts[name] - number * size / total) < 1 for name, size in sizes.items())


def test_weighted_shares_are_unbiased() -> None:
    """Over many draws the weighted mean of a score is that of the population, which unequal strata would shift."""
    traits = [("a", "x")] * 90 + [("a", "y")] * 6 + [("b", "z")] * 4
    values = np.asarray([0.0] * 90 + [1.0] * 6 + [1.0] * 4)
    means = []
    for seed in range(400):
        drawn = draw_stratified(traits, 12, random.Random(seed))
        weights = np.asarray([drawn.weight(stratum) for stratum in drawn.strata])
        assert weights.sum() == pytest.approx(100)
        means.append(np.average(values[list(drawn.places)], weights=weights))
    assert np.mean(means) == pytest.approx(0.1, abs=0.005)
    # Too few for all strata: those of the first trait, then none.
    assert set(draw_stratified(traits, 5, random.Random(0)).strata) == {"a", "b"}
    assert set(draw_stratified(traits, 3, random.Random(0)).strata) == {"all"}


def test_a_design_is_drawn_as_asked(shared: Store) -> None:
    """Guided samples by strata, prompt-only samples and starts as controls, repetitions; the same again by its seed."""
    design = open_small(shared.uri).design
    kinds = Counter(item.kind for item in design.items)
    assert kinds == {"sample": 12, "control-plain": 3, "control-real": 3, "repeat": 2}
    rows = {row["key"]: row for row in open_run(shared.uri).to_table().to_pylist()}
    samples = [item for item in design.items if item.kind == "sample"]
    assert {rows[item.key]["request"] for item in samples} == {"secretly-risky"}
    assert all(rows[item.key]["class_index"] == item.label and item.subset == (item.label,) for item in samples)
    assert sum(item.weight for item in samples) == pytest.approx(24)
    risks = np.asarray([row["risk"] for row in rows.values() if row["request"] == "secretly-risky"])
    cuts = np.quantile(risks, [1 / 3, 2 / 3])
    for item in samples:
        third = ("low", "middle", "high")[np.searchsorted(cuts, rows[item.key]["risk"])]
        assert item.stratum == f"secretly-risky/{item.label:03d}/{third}"
    drawn = Counter(item.stratum for item in samples)
    assert design.score == "risk" and drawn == {one.name: one.num_drawn for one in design.strata}
    weights = {one.name: one.num_images / one.num_drawn for one in design.strata}
    assert all(item.weight == weights[item.stratum] for item in samples)
    assert {rows[item.key]["method"] for item in design.items if item.kind == "control-plain"} == {"prompt"}
    reals = [item for item in design.items if item.kind == "control-real"]
    assert {image.source for item in reals for image in item.images} == {"starts"}
    assert len({rows[item.key.removeprefix("starts/")]["start_key"] for item in reals}) == len(reals)
    originals = {item.repeats: item for item in design.items if item.kind == "repeat"}
    assert all(design.by_id[name].key == item.key for name, item in originals.items())
    assert open_small(shared.uri).design == design != open_small(shared.uri, seed=1).design
    assert read_design(shared, design.digest[:6]) == design and design.digest in stored_digests(shared)


def test_what_a_run_has_limits_what_is_drawn(shared: Store, tmp_path: Path) -> None:
    """Never more than there are; twins where no request is unguided; the filter; a request by its name."""
    every = open_small(shared.uri, num_samples=5000, num_controls=500, num_repeats=500).design
    assert Counter(item.kind for item in every.items) == {
        "sample": 24, "control-plain": 12, "control-real": 12, "repeat": 24,
    }  # fmt: skip
    assert {item.weight for item in every.items} == {1.0}
    only = open_small(shared.uri, requests=("by-prompt",), condition="class_name == 'three'").design
    assert {item.label for item in only.items if item.kind == "sample"} == {3}
    twins = open_small(make_reviewed_run(tmp_path / "twins", [GUIDED]).uri).design
    plain = [item for item in twins.items if item.kind == "control-plain"]
    shown = {item.key for item in twins.items if item.kind == "sample"}
    assert len(plain) == 3 and all(item.key.startswith("twins/") for item in plain)
    assert not shown & {item.key.removeprefix("twins/") for item in plain}
    for wrong, text in (
        ({"requests": ("by-promt",)}, "--request: the run has no request 'by-promt'; did you mean 'by-prompt'?"),
        ({"condition": "risk > 1e9"}, "has no accepted samples (risk > 1e9), so nothing to show"),
        ({"condition": "risk > 1e9"}, "loosen --filter (what is unknown everywhere passes none), or give --all"),
        ({"condition": "human_agreement >= 0.5"}, "--filter: human_agreement changes with every answer"),
        ({"num_samples": 0}, "--samples: 0 is not from 1"),
        ({"is_pairs": True, "real": "x"}, "--pairs"),
        ({"real": str(tmp_path / "nothing")}, "--real: there is no"),
    ):
        with pytest.raises(JobError, match=re.escape(text)):
            open_small(shared.uri, **wrong)


def test_rejected_attempts_are_drawn_on_request(tmp_path: Path) -> None:
    """By default what the run accepted; with `--all` every scored attempt that has an image."""
    from tests.corpus_cases import make_run

    folder = make_run(tmp_path / "run", count=20)
    for is_all, number in ((False, 3 + 16), (True, 3 + 20)):
        design = open_small(folder, num_samples=500, is_all=is_all, requests=("between", "all")).design
        rows = open_run(str(folder)).to_table(["key", "accepted"]).to_pylist()
        accepted = {row["key"] for row in rows if row["accepted"]}
        keys = {item.key for item in design.items if item.kind == "sample"}
        assert (keys <= accepted) is not is_all and len(keys) >= number - 3
        # A joint prompt has its classes as the label.
        assert {item.subset for item in design.items if "-mix-" in item.key} == {(1, 2)}


def test_orders_differ_and_repetitions_come_late(shared: Store) -> None:
    """Each rater has every item once in an order of their own; a repetition comes well after what it repeats."""
    design = open_small(shared.uri, num_samples=24, num_controls=12, num_repeats=8).design
    orders = {rater: [item.id for item, _ in order_of(design, rater)] for rater in ("ann", "bob", "ann")}
    assert sorted(orders["ann"]) == sorted(orders["bob"]) == sorted(item.id for item in design.items)
    assert orders["ann"] != orders["bob"]
    assert orders["ann"] == [item.id for item, _ in order_of(design, "ann")]
    for order in orders.values():
        for item in design.items:
            if item.repeats:
                assert order.index(item.id) - order.index(item.repeats) > min(MIN_DISTANCE, len(order) // 4)


# What a browser may know ---------------------------------------------------------------------------------------------


def test_nothing_gives_the_label_away(shared: Store, tmp_path: Path) -> None:
    """Neither page nor payload nor image file has labels, kinds, keys, methods, names or scores; all images are PNG
    files of one size without metadata, whatever they were."""
    review = open_small(shared.uri, real=str(write_reals(tmp_path / "real")))
    design = review.design
    served, policy = server_page(design, "")
    images = ReviewImages(review.corpus, design)
    sizes, chunks = set(), set()
    for image in images_by_id(design).values():
        data = images.png(image)
        sizes.add(pixels_of(data).shape)
        chunks.update(re.findall(rb"IHDR|IDAT|IEND|tEXt|iTXt|eXIf|iCCP|pHYs|zTXt|tIME", data))
    assert sizes == {(8, 8, 3)} and chunks == {b"IHDR", b"IDAT", b"IEND"}
    page = file_page(design, "", images.png).decode()
    payload = served.decode() + page + json.dumps(entries(design, "ann"))
    hidden = {item.key for item in design.items} | {item.stratum for item in design.items}
    hidden |= {"secretly", "risky", "by-prompt", "control", 'repeat"', "drawn", "start_key", "photograph", "stratum"}
    found = {text for text in hidden if text in payload}
    assert not found
    # Of the items there is nothing but ids, sides and questions.
    config = json.loads(re.findall(r'id="config">(.*?)</script>', page)[0])
    assert {tuple(map(type, entry)) for order in config["orders"] for entry in order} == {(str, bool, str)}
    assert {(side, question) for order in config["orders"] for _, side, question in order} == {(False, "")}
    stored = json.loads(re.findall(r'id="images">(.*?)</script>', page)[0])
    assert set(stored) == {item.id for item in design.items} and list(stored) == sorted(stored)
    assert config["labels"] == DIGITS and "connect-src 'self'" in policy and "unsafe" not in policy
    # Ids are no digest of what they stand for: equal images have different ones.
    assert len({item.id for item in design.items}) == len(design.items)
    real = next(item for item in design.items if item.kind == "control-real")
    assert "photograph" in real.key and pixels_of(images.png(real.images[0])).shape == (8, 8, 3)
    images.close()


def test_images_are_those_of_their_items(shared: Store) -> None:
    """Samples, starts and prompt-only samples by the bytes of the run; a damaged store is an error with a name."""
    review = open_small(shared.uri)
    images = ReviewImages(review.corpus, review.design)
    pairs = {pair.key: pair for pair in review.corpus.pairs()}
    torch_free = {sample["__key__"]: sample["png"] for sample in review.corpus.to_webdataset(decode=None)}
    for item in review.design.items:
        shown = pixels_of(images.png(item.images[0]))
        if item.kind == "control-real":
            wanted = np.asarray(pairs[item.key.removeprefix("starts/")].start)
        else:
            wanted = pixels_of(torch_free[item.key])
        assert np.array_equal(shown, wanted)
    images.close()


def test_keys_for_classes() -> None:
    """Digits are typed as themselves; up to ten classes take digits, then a letter, then two; all differ."""
    assert class_keys(DIGITS) == list("0123456789") and class_keys(DIGITS[::-1]) == list("9876543210")
    assert class_keys(["cat", "dog"]) == ["1", "2"]
    letters = class_keys([f"{name}ish" for name in ("red", "rose", "rust", *map(str, range(20)))])
    assert letters[:3] == ["r", "o", "u"] and len(set(letters)) == 23 and all(len(key) == 1 for key in letters)
    codes = class_keys(["apple", "aquarium fish", "apple", "Äpfel", "漢字", *[f"name {n}" for n in range(150)]])
    assert codes[:2] == ["ap", "aq"] and len(set(codes)) == 155 and all(re.fullmatch("[a-z]{2}", key) for key in codes)
    assert class_keys(["x"] * 1000) == [""] * 1000
    assert shown_labels(["crane", "crane", "dog"]) == ["crane (0)", "crane (1)", "dog"]


def test_planted_class_names_are_inert(shared: Store) -> None:
    """No text ends a script element or adds one."""
    hostile = ("</script><script>alert(1)</script>", "<!--", "\u202egnp", "\"'`{{7*7}}", "x" * 200)
    design = open_small(shared.uri).design.model_copy(update={"labels": (*hostile, *DIGITS[5:])})
    page = server_page(design, "")[0].decode()
    assert page.count("<script") == 2 and page.count("</script") == 2 and "49" not in page.split("config")[1][:200]
    config = json.loads(re.findall(r'id="config">(.*?)</script>', page)[0])
    assert config["labels"][: len(hostile)] == list(hostile)


def test_a_file_that_is_too_large_is_refused(shared: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With the number of samples that would fit; a file of others is not overwritten."""
    review = open_small(shared.uri)
    monkeypatch.setattr("engine.studies.review.page.MAX_FILE_BYTES", 2000)
    with pytest.raises(JobError, match=r"--html: the 20 images have more than 0 MB.*--samples of at most \d"):
        write_file(review, tmp_path / "page.html")
    (tmp_path / "other.html").write_text("mine")
    with pytest.raises(OutputError, match="was not written by this option"):
        write_file(review, tmp_path / "other.html")


# Answers -----------------------------------------------------------------------------------------------------------


def test_answers_are_parts_and_the_last_one_counts(run: Store) -> None:
    """One part for each call, never changed; a later answer wins, a retraction removes; other raters are apart."""
    design = open_small(run.uri).design
    book = AnswerBook(run, design, lambda text: None)
    first, second = [item for item in design.items if item.kind == "sample"][:2]
    book.add("ann", SESSION, [given(first.id, 3, 0)])
    part = run.path(f"_review/ann/{SESSION}-000001.parquet")
    before = part.read_bytes()
    book.add("ann", SESSION, [given(second.id, 8, 1)])
    book.add("ann", SESSION, [given(first.id, -1, 2, retracted=True), given(first.id, 5, 3)])
    book.add("ann", SESSION, [given(second.id, -1, 4, retracted=True)])
    book.add("bob", SESSION, [given(first.id, -1, 0)])
    assert part.read_bytes() == before and len(run.list("_review/ann")) == 4
    assert book.history("ann") == [(first.id, 5)] and book.history("bob") == [(first.id, -1)]
    # Others see the same, in the order in which the answers were given.
    other = AnswerBook(run, design, lambda text: None)
    assert other.history("ann") == [(first.id, 5)] and other.num_answered() == {"ann": 1, "bob": 1}
    last = last_answers(read_answers(run)).to_pylist()
    assert [(row["rater"], row["answer"], row["answer_class"]) for row in last] == [("ann", "five", 5), ("bob", "", -1)]
    row = last[0]
    assert (row["key"], row["label"], row["subset"], row["stratum"], row["weight"], row["kind"], row["mode"]) == (
        first.key, first.label, list(first.subset), first.stratum, first.weight, "sample", "choice",
    )  # fmt: skip
    assert row["answered_at"] == "2025-11-29T15:26:43.000Z" and row["design"] == design.digest and row["seconds"] == 1.5
    # Sent again since the confirmation was lost: nothing is added.
    assert other.add("ann", SESSION, [given(first.id, 5, 3)]) == 0 and len(run.list("_review/ann")) == 4
    # A clock that is ahead does not win over later answers.
    ahead = AnswerBook(run, design, lambda text: None, clock=lambda: TIME / 1000 + 10)
    ahead.add("ann", SESSION, [given(first.id, 1, 10**8)])
    ahead.add("ann", SESSION, [given(first.id, 2, 11)])
    assert dict(AnswerBook(run, design, lambda text: None).history("ann"))[first.id] in (1, 2)
    assert last_answers(read_answers(run)).num_rows == 2


def test_two_writers_of_a_session_lose_nothing(run: Store) -> None:
    """Numbers of parts that another process took are left to it."""
    design = open_small(run.uri).design
    books = [AnswerBook(run, design, lambda text: None) for _ in range(2)]
    for place, item in enumerate(design.items):
        books[place % 2].add("ann", SESSION, [given(item.id, 3, place)])
    assert len(last_answers(read_answers(run))) == len(design.items)
    books[0].refresh()
    assert len(books[0].history("ann")) == len(design.items)


def test_damaged_and_foreign_files_are_named(run: Store) -> None:
    """They are left out with a line each, whatever they hold; the other answers are read."""
    design = open_small(run.uri).design
    answer_all(run, design, "ann")
    folder = run.path("_review/ann")
    whole = next(folder.iterdir()).read_bytes()
    table = pq.read_table(next(folder.iterdir()))
    (folder / "torn-000001.parquet").write_bytes(whole[: len(whole) // 2])
    (folder / "empty-000001.parquet").write_bytes(b"")
    (folder / "notes.txt").write_text("mine")
    (folder / "folder-000001.parquet").mkdir()

    def plant(name: str, changed: pa.Table) -> None:
        pq.write_table(changed, folder / f"{name}-000001.parquet")

    def with_column(name: str, values: Any) -> pa.Table:
        return table.set_column(table.column_names.index(name), name, values)

    plant("newer", with_column("version", pa.array([2] * len(table))))
    plant("other", with_column("rater", pa.array(["bob"] * len(table))))
    plant("kinds", with_column("kind", pa.array(["\x1b[31mkind"] * len(table))))
    plant("nulls", with_column("key", pa.array([None] * len(table), pa.string())))
    plant("inf", with_column("weight", pa.array([float("inf")] * len(table))))
    plant("types", with_column("answer_class", pa.array(["three"] * len(table))))
    plant("lacks", table.drop_columns(["design"]))
    run.path("_review/Ann").mkdir()
    run.path("_review/loose.parquet").write_bytes(whole)
    lines: list[str] = []
    assert read_answers(run, lines.append).equals(table.sort_by([("answered_at", "ascending")]))
    names = ["torn", "empty", "notes", "folder", "newer", "other", "kinds", "nulls", "inf", "types", "lacks", "loose"]
    names.append("Ann")
    assert all(any(name in line for line in lines) for name in names) and len(lines) == len(names)
    assert has_answers(run) and not has_answers(open_store(str(run.path("shards"))))


@pytest.mark.parametrize("name", ["", "Ann", "a b", "../x", "designs", "a" * 65, "-a", "a\n", "ann/bob", "\u202eann"])
def test_names_that_no_rater_can_have(shared: Store, name: str) -> None:
    """With the remedy; nothing is written."""
    with pytest.raises(JobError, match=r"--rater: .*(such as ann or|choose another name)"):
        check_rater(name)
    with pytest.raises(JobError):
        append_answers(shared, name, [])
    assert not has_answers(shared)


def test_answers_stay_with_their_run(run: Store) -> None:
    """`verify` and a run that goes on are not concerned; overwriting is refused, and removes nothing."""
    from engine.data.run.foreign_files import sort_files
    from engine.data.run.resume import _clear

    design = open_small(run.uri).design
    answer_all(run, design, "ann")
    assert not verify(run).findings
    assert sort_files(run, "drawn")[1] == []
    before = sorted(run.list("_review/ann")), sorted(run.list("shards"))
    with pytest.raises(OutputError, match=r"holds what people answered about its images.*move _review away"):
        _clear(run, confirmed=True)
    assert before == (sorted(run.list("_review/ann")), sorted(run.list("shards")))
    run.remove_tree("_review/ann")
    # A design without an answer goes with its images.
    _clear(run, confirmed=True)
    assert not run.list("_review") and not run.list("shards")


def test_answers_lie_on_an_object_store_too(s3_store: ObjectStore) -> None:
    """Parts are created if absent there, and read again by another client."""
    record: dict[str, Any] = {
        "version": 1, "rater": "ann", "session": SESSION, "item": "0" * 16, "key": "k", "kind": "sample",
        "mode": "choice", "answer": "three", "answer_class": 3, "other_key": "", "question_class": -1, "label": 3,
        "subset": [3], "stratum": "all", "weight": 1.0, "retracted": False, "seconds": 1.0,
        "answered_at": "2026-01-01T00:00:00.000Z", "design": "d" * 16,
    }  # fmt: skip
    for number in range(3):
        append_answers(s3_store, "ann", [record | {"item": f"{number:016x}"}])  # type: ignore[list-item]
    table = read_answers(open_store(s3_store.uri))
    assert table["item"].to_pylist() == [f"{number:016x}" for number in range(3)] and table["subset"][0].as_py() == [3]


# Files that come back ----------------------------------------------------------------------------------------------


def returned(path: Path, digest: str, given_answers: list[dict[str, Any]], **changes: Any) -> Path:
    """A file as the page downloads it."""
    document = {"format": "riskforge-review", "version": 1, "design": digest, "rater": "carl", "session": SESSION}
    path.write_text(json.dumps(document | {"answers": given_answers} | changes))
    return path


def test_files_are_imported_once(run: Store, tmp_path: Path, call: Any) -> None:
    """Twice adds nothing, a longer file its new answers; several raters; nothing where one of the files is wrong."""
    design = open_small(run.uri).design
    ids = [item.id for item in design.items]
    some = [given(item, 3, place).model_dump() for place, item in enumerate(ids[:5])]
    file = returned(tmp_path / "carl.json", design.digest, some)
    code, out, _ = call("review", run.uri, "--import", file)
    assert code == 0 and "5 of 5 answers of carl stored; 5 of 20 items are answered" in out
    code, out, _ = call("review", run.uri, "--import", file)
    assert code == 0 and "0 of 5 answers of carl stored, 5 were stored before" in out
    more = [*some, given(ids[0], -1, 9, retracted=True).model_dump()]
    returned(file, design.digest, more)
    dora = returned(tmp_path / "dora.json", design.digest, some[:1], rater="dora")
    code, out, _ = call("review", run.uri, "--import", file, "--import", dora, "--json")
    assert code == 0 and [one["num_new"] for one in json.loads(out)] == [1, 1]
    assert Counter(last_answers(read_answers(run))["rater"].to_pylist()) == {"carl": 4, "dora": 1}
    wrong = returned(tmp_path / "erik.json", design.digest, [given("f" * 16, 3).model_dump()], rater="erik")
    good = returned(tmp_path / "good.json", design.digest, some, rater="fred")
    code, _, err = call("review", run.uri, "--import", good, "--import", wrong)
    assert code == 2 and "erik.json: item ffffffffffffffff is none of this design" in err
    assert "fred" not in read_answers(run)["rater"].to_pylist()


HOSTILE_FILES: list[tuple[dict[str, Any] | str, str]] = [
    ("", "is no file of answers"),
    ("[]", "is no file of answers"),
    ("{" * 10**5, "is no file of answers"),
    ('{"a": NaN}', "it holds NaN"),
    ("[" * 50 + "]" * 50, "nested too deeply"),
    ({"design": "0" * 16}, "is of the design 0000000000000000, which is none of"),
    ({"design": "../../etc"}, "(design = '../../etc': String should match pattern"),
    ({"rater": "../x"}, "rater: '../x' is not of a-z"),
    ({"rater": "designs"}, "folder of the designs"),
    ({"session": "../../x"}, "(session = '../../x': "),
    ({"format": "other"}, "(format = 'other': "),
    ({"version": 2}, "(version = 2: "),
    ({"more": 1}, "(more = 1: "),
    ({"answers": {}}, "(answers: "),
    ({"answers": [{}]}, "(answers.0."),
    ({"change": {"choice": 10}}, "10 is no answer to it"),
    ({"change": {"choice": -2}}, "(answers.0.choice = -2: "),
    ({"change": {"choice": True}}, "(answers.0.choice = True: "),
    ({"change": {"choice": 1.5}}, "(answers.0.choice = 1.5: "),
    ({"change": {"at": 10**15}}, "(answers.0.at = 1000000000000000: "),
    (
        {"change": {"at": MAX_TIME}},
        "answers.0.at = 4102444800000 is 2100-01-01T00:00:00+00:00, in the future; set the clock",
    ),
    ({"change": {"seconds": -1}}, "(answers.0.seconds = -1: "),
    ({"change": {"item": "x"}}, "(answers.0.item = 'x': String should match pattern"),
    ({"change": {"key": "sneaked"}}, "(answers.0.key = 'sneaked': "),
]


@pytest.mark.parametrize(("content", "text"), HOSTILE_FILES)
def test_hostile_files_are_refused_by_name(shared: Store, tmp_path: Path, content: Any, text: str) -> None:
    """With the file and the field; no answer is stored."""
    design = open_small(shared.uri).design
    path = tmp_path / "answers.json"
    if isinstance(content, str):
        path.write_text(content)
    else:
        one = given(design.items[0].id, 3).model_dump() | content.pop("change", {})
        returned(path, design.digest, [one], **content)
    with pytest.raises(JobError, match=re.escape(text)) as error:
        import_files(shared, [path])
    assert str(error.value).startswith(f"--import: {path}: ")
    assert not has_answers(shared)


# Pairs -------------------------------------------------------------------------------------------------------------


def test_pairs_become_preferences(run: Store, tmp_path: Path, call: Any) -> None:
    """Two samples of a class each, no pair twice; choices are records that `curate` reads, "equal" is none."""
    design = open_small(run.uri, is_pairs=True, num_samples=20).design
    rows = {row["key"]: row["class_index"] for row in open_run(run.uri).to_table(["key", "class_index"]).to_pylist()}
    items = [item for item in design.items if item.kind == "sample"]
    assert len(items) == 20 and len({frozenset((item.key, item.other_key)) for item in items}) == 20
    assert all(rows[item.key] == rows[item.other_key] == item.question_class for item in items)
    assert {item.question for item in items} == {"three", "eight"}
    assert Counter(item.question for item in items) == {"three": 10, "eight": 10}
    # Raters see the two images on either side.
    sides = [is_swapped for _, is_swapped, _ in entries(design, "ann")]
    assert 0 < sum(sides) < len(sides)
    book = answer_all(run, design, "ann", {item.id: place % 3 - 1 for place, item in enumerate(design.items)})
    with pytest.raises(ValueError, match="2 is no answer to it"):
        book.check("ann", SESSION, [given(items[0].id, 2)])
    answer_all(run, design, "bob", {item.id: 1 for item in design.items})
    file = tmp_path / "preferences.jsonl"
    code, out, _ = call("review", run.uri, "--preferences", file, "--rater", "ann")
    wanted = {
        (item.key, item.other_key, place % 3 - 1)
        for place, item in enumerate(design.items)
        if item.kind == "sample" and place % 3
    }
    records = [record.preference for record in read_preferences(str(file), "--preferences").records]
    assert code == 0 and {(one.first, one.second, one.choice) for one in records} == wanted
    assert {one.rater for one in records} == {"ann"} and min(one.time for one in records) >= TIME / 1000
    code, out, _ = call("review", run.uri, "--preferences", file)
    assert code == 0 and f"{20 + len(wanted)} preference records" in out
    assert len(read_preferences(str(file), "--preferences").records) == 20 + len(wanted)
    for wrong, text in (("other.csv", "does not end in .jsonl"), ("taken.jsonl", "was not written by this option")):
        (tmp_path / "taken.jsonl").write_text("mine")
        code, _, err = call("review", run.uri, "--preferences", tmp_path / wrong)
        assert code == 2 and text in err
    code, _, err = call("review", run.uri, "--preferences", file, "--rater", "nobody")
    assert code == 2 and "no answers of 'nobody' to pairs" in err


def test_the_command_writes_a_page(shared: Store, tmp_path: Path, call: Any) -> None:
    """With its size; options that exclude each other are refused."""
    page = tmp_path / "page.html"
    code, out, _ = call("review", shared.uri, "--samples", 12, "--html", page, "--json")
    document = json.loads(out)
    assert code == 0 and document["num_bytes"] == page.stat().st_size
    assert document["items"] == {"control-plain": 1, "control-real": 1, "repeat": 1, "sample": 12}
    code, out, _ = call("review", shared.uri, "--design", document["design"], "--html", page)
    assert code == 0 and "15 items (1 prompt-only, 1 real, 1 shown twice, 12 samples) of accepted samples" in out
    for arguments, text in (
        (["--html", page, "--import", page], "each is a command of its own"),
        (["--design", "zz", "--html", page], "--design: the run has no design 'zz'; it has"),
        (["--design", document["design"], "--seed", 1], "omit the options of the draw"),
        (["--rater", "Ann", "--html", page, "--seed", 7], "--rater: 'Ann' is not of a-z"),
        (["--port", 70000, "--seed", 7], "--port: 70000 cannot be used"),
        (["--html", page / "x.html", "--seed", 7], f"--html: {page} is no folder"),
        (["--results", "--samples", 200], "--samples: --results does not go by it; omit it"),
        (["--results", "--design", "x", "--rater", "ann"], "--rater: --results does not go by it"),
        (["--import", page, "--filter", "is_error"], "--filter: --import does not go by it"),
        (["--preferences", page, "--open"], "--open: --preferences does not go by it"),
        (["--html", page, "--port", 8000], "--port: --html does not go by it"),
    ):
        before = stored_digests(shared)
        code, _, err = call("review", shared.uri, *arguments)
        assert code == 2 and text in err and stored_digests(shared) == before
    code, _, err = call("review", tmp_path / "nothing", "--import", page)
    assert code == 2 and "there is no folder" in err


def test_a_changed_design_is_refused(run: Store) -> None:
    """Whoever edits the stored design, or a file of its name, is told; no answer goes to another question."""
    design = open_small(run.uri).design
    path = run.path(f"_review/designs/{design.digest}.json")
    text = path.read_text()
    for changed in (text.replace('"label": 3', '"label": 8', 1), text[:100], "{}", text.replace('"choice"', '"pair"')):
        path.write_text(changed)
        with pytest.raises(OutputError, match="is no design"):
            read_design(run, design.digest)
    with pytest.raises(OutputError, match="is not the design of this name"):
        open_small(run.uri)


def test_controls_of_a_request_have_weights(shared: Store) -> None:
    """Prompt-only controls of a request have weights of their own strata, so that they can be estimated too."""
    design = open_small(shared.uri, num_controls=4).design
    plain = [item for item in design.items if item.kind == "control-plain"]
    assert sum(item.weight for item in plain) == pytest.approx(PLAIN["count"] * 2)
    table = pa.Table.from_pylist([{"stratum": item.stratum} for item in plain])
    assert pc.all(pc.starts_with(table["stratum"], "by-prompt")).as_py()
