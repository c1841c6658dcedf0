"""`p_valid` from people's answers to the rows of a run: tables and reviews, real models, refusals, plans, rescoring."""

from __future__ import annotations

import csv
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine.commands.jobfile import read_job
from engine.data.review.answers import Answer, append_answers, read_answers
from engine.data.run.shards import read_shard
from engine.data.stores.opening import open_store
from engine.driver.checks import plan_job
from engine.driver.progress import PlainDisplay
from engine.errors import EXIT_OK, EXIT_USER, JobError, OutputError
from engine.generation.loading import load_scorer
from engine.generation.rescorer import rescore
from engine.job.columns import UNKNOWN
from engine.job.parsing import parse_job
from engine.job.plan import planned_validity
from engine.job.spec import JobSpec
from engine.methods.validity import ValidityModel
from engine.models.artefact_documents import document_bytes, read_document, sealed
from engine.models.artefacts import missing_artefacts
from engine.models.classifier import Classifier
from engine.models.configurations import VALIDITY_DOCUMENT
from engine.models.digests import model_digest
from engine.models.job_checks import check_addresses
from engine.models.validity import job_validity, read_validity
from engine.studies.prepare.answer_tables import read_answer_table
from engine.studies.prepare.validity import PreparedValidity, prepare_validity
from engine.studies.rescore.program import rescore_run
from tests.composed import composed_job, make_run
from tests.prepare_cases import LABELS, NUM_IMAGES, QUICKSTART, Sample, drawn_digits, write_folder, write_tables

ORACLES = ("zoo:digits/oracle", "zoo:digits/classifier-b")
NUM_RATERS = 3


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    """Digits of which every fourth has a wrong label."""
    return [
        (image, (index + 3) % 10 if number % 4 == 0 else index)
        for number, (image, index) in enumerate(drawn_digits(NUM_IMAGES))
    ]


@pytest.fixture(scope="module")
def said(samples) -> list[list[str]]:
    """What three people say of each: the digit, and sometimes nothing, more often of the noisy ones."""
    rng = np.random.default_rng(0)
    return [
        [LABELS[index] if rng.random() < (0.75 if number % 2 else 0.95) else "" for _ in range(NUM_RATERS)]
        for number, (_, index) in enumerate(drawn_digits(NUM_IMAGES))
    ]


@pytest.fixture(scope="module")
def folder(samples, tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("folder"), samples)


@pytest.fixture(scope="module")
def keys(samples) -> list[str]:
    return [f"{LABELS[index]}/{number:04d}.png" for number, (_, index) in enumerate(samples)]


def job_with(*changes: tuple[str, Any], oracles: Sequence[str] = ORACLES) -> JobSpec:
    return read_job(
        QUICKSTART,
        [("runtime.device", "cpu"), ("models.transfer", []), ("models.oracle", None), ("models.oracles", list(oracles)),
         *changes],
    )  # fmt: skip


def write_answers(path: Path, keys: Sequence[str], said: Sequence[Sequence[str]]) -> Path:
    with path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["key", "answer"])
        rows.writerows([key, answer] for key, answers in zip(keys, said, strict=True) for answer in answers)
    return path


def count_rows(keys: Sequence[str], said: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    return [
        {"key": key} | {label: answers.count(label) for label in LABELS} | {"none": answers.count("")}
        for key, answers in zip(keys, said, strict=True)
    ]


def prepare(answers: Path, data: Path | None, home: Path, job: JobSpec | None = None) -> PreparedValidity:
    display = PlainDisplay(io.StringIO())
    return prepare_validity(job or job_with(), str(answers), data and str(data), display=display, folder=str(home))


@pytest.fixture(scope="module")
def prepared(folder, keys, said, tmp_path_factory) -> PreparedValidity:
    home = tmp_path_factory.mktemp("validity")
    return prepare(write_answers(home / "answers.csv", keys, said), folder, home / "artefact")


def test_the_artefact_says_what_plain_models_and_people_say(prepared, samples, said, classifier):
    """Probabilities, errors and counts against a direct computation, image by image."""
    fit, answered = prepared.fit, prepared.answered
    assert fit.model is not None and fit.is_balanced and (fit.num_images, fit.num_answers) == (240, 720)
    images, labels = [image for image, _ in samples], np.array([label for _, label in samples])
    p_labels = [
        Classifier.load(address).score(images).softmax(1).numpy()[np.arange(len(images)), labels] for address in ORACLES
    ]
    errs = classifier.score(images).argmax(1).numpy() != labels
    counts = [answers.count(LABELS[label]) for label, answers in zip(labels, said, strict=True)]
    expected = list(zip(*p_labels, counts, errs, strict=True))
    found = [(*image.p_labels, image.num_agreeing, image.target_errs) for image in answered.images]
    assert np.allclose(sorted(found), sorted(expected), atol=1e-5)
    [document] = prepared.path.glob("*.json")
    assert document.name == VALIDITY_DOCUMENT and prepared.path.name.startswith("validity-")
    fields = read_document(prepared.path, VALIDITY_DOCUMENT)
    assert [oracle["digest"] for oracle in fields["models"]["oracles"]] == [model_digest(one) for one in ORACLES]
    assert fields["classes"] == list(LABELS) and len(fields["evaluation"]["groups"]) == 3


def test_every_form_of_a_table_gives_the_same_artefact(prepared, folder, keys, said, samples, tmp_path):
    """Single answers or counts, CSV, JSON lines or parquet, rows in another order, images from other files."""
    rows = count_rows(keys, said)[::-1]
    with (tmp_path / "counts.csv").open("w", encoding="utf-8-sig", newline="") as file:
        table = csv.DictWriter(file, list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    (tmp_path / "counts.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "counts.parquet")
    paths = [tmp_path / f"counts.{ending}" for ending in ("csv", "jsonl", "parquet")]
    first, *others = (read_answer_table(path, LABELS) for path in paths)
    for table in others:
        assert table.rows == first.rows and table.counts.keys() == first.counts.keys()
        assert all(np.array_equal(table.counts[key], first.counts[key]) for key in first.counts)
    assert prepare(tmp_path / "counts.csv", folder, tmp_path / "artefacts").path.name == prepared.path.name
    write_tables(tmp_path / "tables", samples)
    order = np.random.default_rng(0).permutation(len(samples)).tolist()
    names = [f"validation-00000-of-00002.parquet row {row}" for row in range(90)]
    names += [f"validation-00001-of-00002.parquet row {row}" for row in range(len(samples) - 90)]
    single = [{"key": name, "answer": answer or None, "when": "now"}
              for name, number in zip(names, order, strict=True) for answer in said[number]]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(single), tmp_path / "single.parquet")
    other = prepare(tmp_path / "single.parquet", tmp_path / "tables", tmp_path / "artefacts")
    assert other.path.name == prepared.path.name and other.was_there
    assert other.answered.notes == ("columns that are not read: when",)


def test_the_command_says_what_the_fit_is_worth(call, folder, keys, said, tmp_path):
    answers = write_answers(tmp_path / "answers.csv", [*keys, "broken"], [*said, ["one"]])
    (folder / "seven" / "broken.png").write_bytes(b"no image")
    answers.write_text(answers.read_text().replace("broken,", "seven/broken.png,"))
    oracles = f"models.oracles={list(ORACLES)}"
    code, out, _ = call(
        "prepare", QUICKSTART, "--answers", answers, "--data", folder, "--output", tmp_path / "made",
        "--set", "models.oracle=null", "--set", "models.transfer=[]", "--set", oracles,
    )  # fmt: skip
    (folder / "seven" / "broken.png").unlink()
    assert code == EXIT_OK
    for text in ("240 with 720 answers", "unused         1", "seven/broken.png", "zoo:digits/classifier-b: weight",
                 "target errs", "wrong labels", "verdict        usable; AUC", "models: {validity:"):  # fmt: skip
        assert text in out, text


def test_answers_that_cannot_be_used_are_counted_and_named(folder, keys, said, tmp_path):
    rows = count_rows(keys, said)
    rows[7] |= dict.fromkeys([*LABELS, "none"], 0)
    path = tmp_path / "counts.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    found = prepare(path, folder, tmp_path / "artefact")
    assert [item.name for item in found.answered.unused] == [keys[7]] and found.fit.num_images == len(keys) - 1
    fields = read_document(found.path, VALIDITY_DOCUMENT)
    assert fields["unused"] == [{"name": keys[7], "reason": "nobody answered about it"}]


HEAD = "key,answer\n"
COUNTS = "key," + ",".join(LABELS) + "\n"


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.csv", HEAD, ["no row"]),
        ("a.csv", "", ["no column 'key'"]),
        ("a.csv", "image,answer\na,one\n", ["no column 'key'"]),
        ("a.csv", "key,answer,key\na,one,b\n", ["column 'key' twice"]),
        ("a.csv", HEAD + "a,onne\n", ["row 1, column 'answer'", "'onne' is not a class", "leave it empty"]),
        ("a.csv", HEAD + "a,one\n,two\n", ["row 2, column 'key'", "empty"]),
        ("a.csv", HEAD + "a,one,two\n", ["row 1: has 3 values and the header 2"]),
        ("a.csv", "key,answer,one\na,one,2\n", ["'answer' and 'one'"]),
        ("a.csv", HEAD.encode() + b"a,\xff\n", ["not UTF-8"]),
        ("a.csv", HEAD + 'a,"one\n', ["cannot be read as CSV", "check its quotes"]),
        ("a.csv", HEAD + f'a,"{"x" * 200_000}\n', ["field larger than", "closing quote is missing"]),
        ("a.csv", "key;answer\na;one\n", ["separated by semicolons; separate them by commas"]),
        ("a.csv", "key,one\na,3\n", ["no column for the class 'zero'"]),
        ("a.csv", COUNTS.replace("two", "tvo") + "a" + ",1" * 10, ["'tvo'", "no class of the target", "'two'"]),
        ("a.csv", COUNTS + "a,-1" + ",1" * 9, ["row 1, column 'zero'", "'-1' is no number of people"]),
        ("a.csv", COUNTS + "a,1.5" + ",1" * 9, ["row 1, column 'zero'", "'1.5'", "whole number"]),
        ("a.csv", COUNTS + "a," + ",1" * 9, ["row 1, column 'zero'", "is empty"]),
        ("a.csv", COUNTS + "a" + ",1" * 10 + "\na" + ",1" * 10, ["row 2, column 'key'", "that of row 1 too"]),
        ("a.csv", COUNTS + ("a,x" + ",1" * 9 + "\n") * 9, ["row 1", "more problems like these"]),
        ("a.jsonl", '{"key": "a", "answer": null}\n{"key": "b", "anwser": "one"}\n',
         ["row 2, column 'answer': is missing; give a class name, or \"\" for none of these"]),
        ("a.jsonl", '{"key": "a", "answer": 3}\n', ["row 1, column 'answer'", "3 is no class name"]),
        ("a.jsonl", '{"key": "a", "answer": "one"}\n{"key": \n', ["line 2: is not JSON"]),
        ("a.jsonl", '{"key": "a", "key": "b", "answer": "one"}\n', ["line 1", "twice"]),
        ("a.jsonl", "[1]\n", ["line 1: is [1]"]),
        ("a.jsonl", '{"key": ["a"], "answer": "one"}\n', ["column 'key'", "is no text"]),
        ("a.parquet", b"PAR1 and nothing", ["cannot be read as parquet"]),
        ("a.txt", HEAD + "a,one", ["no file of answers by its name"]),
        ("a.csv", HEAD + "zero/nowhere.png,one\n", ["row 1", "zero/nowhere.png", "is no image of --data"]),
    ],
)  # fmt: skip
def test_a_wrong_table_is_refused_with_row_and_column(call, folder, tmp_path, name, content, parts):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    code, out, err = call("prepare", QUICKSTART, "--answers", path, "--data", folder, "--output", tmp_path / "made")
    assert code == EXIT_USER and not out and "Traceback" not in err and not (tmp_path / "made").exists()
    for part in ("--answers", *parts):
        assert part in err, (part, err)


def test_a_huge_table_is_not_read(tmp_path):
    path = tmp_path / "huge.csv"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(JobError, match="more than the"):
        read_answer_table(path, LABELS)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--answers", "a.csv", "--only", "calibration", "--data", "x"], "omit --only"),
        (["--answers", "a.csv", "--executor", "ray", "--data", "x"], "omit --only"),
        (["--answers", "nowhere.csv", "--data", "x"], "there is no 'nowhere.csv'"),
        (["--answers", "s3://bucket/run", "--data", "x"], "omit it"),
        ([], "--data: names no images"),
    ],
)
def test_options_that_do_not_go_together(call, arguments, reason):
    code, _, err = call("prepare", QUICKSTART, *arguments)
    assert code == EXIT_USER and reason in err


def test_a_table_needs_the_images_and_the_job_an_oracle(call, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(HEAD + "a,one\n")
    assert "--data: has to name" in call("prepare", QUICKSTART, "--answers", path)[2]
    command = ("prepare", QUICKSTART, "--answers", path, "--data", "x", "--set", "models.oracle=null")
    rule = ("--set", "requests=[{name: a, method: prompt, classes: all, count: 1}]")
    assert "models.oracle: there is none" in call(*command, *rule)[2]


# The artefact in a job.


def with_validity(path: Path, *changes: tuple[str, Any], oracles: Sequence[str] = ORACLES) -> JobSpec:
    return job_with(("models.validity", str(path)), *changes, oracles=oracles)


def refusal(job: JobSpec) -> str:
    with pytest.raises(JobError) as error:
        check_addresses(job)
    return str(error.value)


def test_a_job_takes_it_by_its_folder_or_the_one_above(prepared):
    for path in (prepared.path, prepared.path.parent):
        validity = job_validity(with_validity(path))
        assert validity is not None and validity.model == prepared.fit.model
        check_addresses(with_validity(path))
    assert read_validity(str(prepared.path.parent / "later")) is None


def test_other_oracles_are_refused_by_name(prepared):
    assert "in this order" in refusal(with_validity(prepared.path, oracles=ORACLES[::-1]))
    text = refusal(with_validity(prepared.path, oracles=ORACLES[:1]))
    assert "models.validity" in text and "is of 2 oracles" in text and "--answers" in text


def changed(prepared: PreparedValidity, home: Path, **fields: Any) -> Path:
    """A copy of an artefact with other fields, sealed as if it were made so."""
    document = read_document(prepared.path, VALIDITY_DOCUMENT) | fields
    content = {key: value for key, value in document.items() if key not in ("digest", "schema_version")}
    home.mkdir()
    (home / VALIDITY_DOCUMENT).write_bytes(document_bytes(sealed(content)))
    return home


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"classes": ["cat", "dog"]}, "other classes"),
        ({"model": None, "verdict": "no usable fit: too few"}, "has no usable fit: too few; collect more answers"),
        ({"model": {"intercept": 0.0, "weights": [1.0]}}, "not laid out"),
        ({"model": {"intercept": 0.0, "weights": [1.0, -0.1]}}, "not laid out"),
        ({"model": {"intercept": True, "weights": [1.0, 1.0]}}, "not laid out"),
        ({"model": {"intercept": 0.0, "weights": "11"}}, "not laid out"),
        ({"model": "linear"}, "not laid out"),
        ({"num_images": -1}, "not laid out"),
        ({"models": {"oracles": []}}, "not laid out"),
    ],
)
def test_an_artefact_that_cannot_be_used_is_refused(prepared, tmp_path, fields, reason):
    text = refusal(with_validity(changed(prepared, tmp_path / "changed", **fields)))
    assert text.startswith("models.validity: ") and reason in text


def test_a_damaged_artefact_is_refused(prepared, tmp_path):
    copy = shutil.copytree(prepared.path, tmp_path / "copy")
    document = copy / VALIDITY_DOCUMENT
    document.write_text(document.read_text().replace('"num_answers": 720', '"num_answers": 721'))
    assert "is not what it was (digest)" in refusal(with_validity(copy))


def test_a_condition_on_p_valid_needs_the_artefact(call, prepared, tmp_path):
    rule = ("requests.0.accept", {"p_valid": ">= 0.5"})
    with pytest.raises(JobError, match=r"models\.validity"):
        job_with(rule)
    later = with_validity(tmp_path / "later", rule)
    assert any("--answers FILE --output" in line for line in missing_artefacts(later))
    assert not missing_artefacts(with_validity(prepared.path, rule))


def test_a_folder_of_other_things_is_no_estimate_to_come(tmp_path):
    """An empty folder may become one, and so may one with artefacts of other kinds; a run or the system's may not."""
    assert read_validity(str(tmp_path / "later")) is None and read_validity(str(tmp_path)) is None
    (tmp_path / "manifest.json").write_text("{}")
    for folder in (tmp_path, "/etc"):
        with pytest.raises(JobError, match="holds other files and no artefact; give the folder"):
            read_validity(str(folder))
    artefact = tmp_path / "calibration-0123456789ab"
    artefact.mkdir()
    (artefact / "calibration.json").write_text("{}")
    assert read_validity(str(tmp_path)) is None
    with pytest.raises(JobError, match="is an artefact of another kind; give the folder of a validity artefact"):
        read_validity("zoo:digits/conditioning")


def test_a_plan_has_the_estimate_only_where_the_job_does(prepared):
    plan = plan_job(with_validity(prepared.path))
    assert planned_validity(plan.identity) == prepared.fit.model
    without = plan_job(job_with())
    assert "validity" not in without.identity["models"] and planned_validity(without.identity) is None
    assert without.digest != plan.digest


def test_no_usable_fit_is_stored_with_its_verdict(folder, keys, said, tmp_path):
    """A study with too few answers leaves its verdict, and a job refuses it by name."""
    found = prepare(write_answers(tmp_path / "few.csv", keys[:20], said[:20]), folder, tmp_path / "artefact")
    assert found.fit.model is None and "40 are needed" in found.fit.verdict
    assert "40 are needed" in refusal(with_validity(found.path))


# A run with the estimate, and answers about its samples.


@pytest.fixture(scope="module")
def run(prepared, tmp_path_factory) -> Path:
    """Composed digits, scored by the real oracles; a rule in words."""
    output = tmp_path_factory.mktemp("runs") / "made"
    job = composed_job(output, count=3)
    models = job.models.model_dump() | {"oracle": None, "oracles": ORACLES, "validity": str(prepared.path)}
    requests = [request.model_dump() for request in job.requests]
    requests[1]["accept"] = "is_error and p_valid >= 0.5"
    return make_run(composed_job(output, count=3, models=models, requests=requests))


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return pq.read_table(folder / "metadata.parquet").to_pylist()


def test_every_row_has_the_estimate_by_its_own_probabilities(run, prepared):
    """Anybody can compute it again from the row."""
    rows = rows_of(run)
    for row in rows:
        p_labels = [oracle["p_label"] for oracle in row["oracles"]]
        assert row["p_valid"] == pytest.approx(prepared.fit.model.p_valid(p_labels), abs=1e-6)
        assert row["oracle_p_label_min"] == min(p_labels)
    errors = [row for row in rows if row["request"] == "errors"]
    assert all(row["accepted"] == (row["is_error"] and row["p_valid"] >= 0.5) for row in errors)
    assert 0 < sum(row["accepted"] for row in errors) < len(errors)
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["models"]["validity"]["verdict"] == prepared.fit.verdict


def test_the_scorer_of_a_job_has_the_estimate(run, prepared):
    """As a worker loads it, and as `verify --deep` scores again."""
    job = with_validity(prepared.path)
    tar = next((run / "shards").glob("*.tar"))
    images = [PIL.Image.open(io.BytesIO(image)).convert("RGB") for _, image, _, _ in read_shard(tar)][:4]
    specs = list(plan_job(job).samples(plan_job(job).shard(0)))[: len(images)]
    scored = load_scorer(job, validity=prepared.fit.model).records(specs, images)
    plain = load_scorer(job).records(specs, images)
    for row, without in zip(scored, plain, strict=True):
        assert row["p_valid"] == pytest.approx(
            prepared.fit.model.p_valid([oracle["p_label"] for oracle in row["oracles"]]), abs=1e-6
        )
        assert without["p_valid"] == UNKNOWN and without["oracles"] == row["oracles"]


def test_other_oracles_have_no_estimate(run):
    """Scored again by the same oracles it stays, by others it is unknown."""
    old = [row["p_valid"] for row in rows_of(run)]
    for oracles, is_known in ((ORACLES, True), (ORACLES[::-1], False)):
        done = rescore_run(str(run), "zoo:digits/classifier", oracles=oracles)
        new = [row["p_valid"] for row in rows_of(Path(done.folder))]
        assert new == pytest.approx(old, abs=1e-5) if is_known else set(new) == {UNKNOWN}
        manifest = json.loads((Path(done.folder) / "manifest.json").read_text())
        assert ("validity" in manifest["models"]) == is_known
        assert (manifest["job"]["models"].get("validity") is not None) == is_known


def test_a_plan_with_another_estimate_is_not_continued(run, prepared, tmp_path):
    other = changed(prepared, tmp_path / "other", model={"intercept": 1.0, "weights": [0.1, 0.1]})
    raw = json.loads((run / "manifest.json").read_text())["job"]
    raw["models"]["validity"] = str(other)
    with pytest.raises(OutputError, match=r"models\.validity\.weights\.1: 0\.\d+ -> 0\.1"):
        make_run(parse_job(raw))


def answer(key: str, label: int, said: int, rater: str, number: int, **changes: Any) -> Answer:
    fields: dict[str, Any] = {
        "version": 1, "rater": rater, "session": "s", "item": f"i{number}", "key": key, "kind": "sample",
        "mode": "choice", "answer": LABELS[said] if said >= 0 else "", "answer_class": said, "other_key": "",
        "question_class": -1, "label": label, "subset": [label], "stratum": "all", "weight": 1.0, "retracted": False,
        "seconds": 1.0, "answered_at": f"2026-11-30T08:{number // 60 % 60:02d}:{number % 60:02d}Z", "design": "d",
    }  # fmt: skip
    return Answer(**(fields | changes))


@pytest.fixture(scope="module")
def reviewed(run, tmp_path_factory) -> Path:
    """Two people who go by the first oracle; an answer that is taken back, a repeat and a pair of each."""
    copy = shutil.copytree(run, tmp_path_factory.mktemp("reviewed") / "made")
    rng, rows, people = np.random.default_rng(1), rows_of(run), ValidityModel(intercept=-6.5, weights=(0.9,))
    for rater in ("ann", "bob"):
        records = []
        for number, row in enumerate(rows):
            agrees = people.p_valid([row["oracles"][0]["p_label"]])
            said = row["class_index"] if rng.random() < agrees else -1
            records.append(answer(row["key"], row["class_index"], said, rater, number))
        first = records[0]
        records.append(first | {"retracted": True, "answered_at": "2026-11-30T09:00:00Z"})
        records.append(first | {"kind": "repeat", "item": "again", "answered_at": "2026-11-30T09:00:01Z"})
        records.append(first | {"mode": "pair", "item": "pair", "answered_at": "2026-11-30T09:00:02Z"})
        records.append(answer("composed-000-000-99999999", 0, 0, rater, 3599))
        append_answers(open_store(str(copy)), rater, records)
    return copy


def run_job_of(run: Path) -> JobSpec:
    raw = json.loads((run / "manifest.json").read_text())["job"]
    return parse_job(raw | {"output": raw["output"] | {"uri": str(run)}})


def test_answers_about_a_run_are_joined_with_its_metadata(reviewed, tmp_path):
    rows = rows_of(reviewed)
    found = prepare(reviewed, None, tmp_path / "artefact", run_job_of(reviewed))
    answered = found.answered
    # The first was taken back by both, and one key is no sample.
    assert found.fit.num_images == len(rows) - 1 and found.fit.num_answers == 2 * (len(rows) - 1)
    assert [(item.name, item.reason) for item in answered.unused] == [
        ("composed-000-000-99999999", "is no sample of the run")
    ]
    assert answered.num_raters == 2 and "4 answers" in answered.notes[0]
    by_key = {row["key"]: row for row in rows}
    for image in answered.images:
        row = by_key[image.order[1]]
        assert image.p_labels == tuple(oracle["p_label"] for oracle in row["oracles"])
        assert image.target_errs == row["is_error"] and image.num_asked == 2
    assert found.fit.model is not None and found.fit.model.weights[0] > found.fit.model.weights[1]


def test_exported_records_are_about_the_run_of_the_job(reviewed, tmp_path):
    """One file with the records of all raters, in any order."""
    table = read_answers(open_store(str(reviewed)))
    path = tmp_path / "records.parquet"
    pq.write_table(table.take(list(range(len(table)))[::-1]), path)
    job = run_job_of(reviewed)
    alone, of_run = prepare(path, None, tmp_path / "a", job), prepare(reviewed, None, tmp_path / "b", job)
    assert alone.path.name == of_run.path.name


def test_a_run_of_other_oracles_is_refused(reviewed, tmp_path):
    job = run_job_of(reviewed)
    models = job.models.model_copy(update={"oracles": ORACLES[::-1], "validity": None})
    with pytest.raises(JobError, match=r"models\.oracles: are not those of the run"):
        prepare(reviewed, None, tmp_path / "artefact", job.model_copy(update={"models": models}))


def test_a_run_without_answers_is_refused(run, tmp_path):
    with pytest.raises(JobError, match="riskforge review"):
        prepare(run, None, tmp_path / "artefact", run_job_of(run))


def test_answers_of_other_classes_are_refused(run, tmp_path):
    copy = shutil.copytree(run, tmp_path / "made")
    key = rows_of(copy)[0]["key"]
    append_answers(open_store(str(copy)), "ann", [answer(key, 0, 0, "ann", 0, answer="cat")])
    with pytest.raises(JobError, match="'cat'"):
        prepare(copy, None, tmp_path / "artefact", run_job_of(copy))


def test_deep_verification_computes_the_estimate_again(run):
    findings = rescore(open_store(str(run)), num_samples=5)
    # Composed runs have no conformity, which is then found too.
    assert findings and not any("p_valid" in finding.text or "oracle" in finding.text for finding in findings)
