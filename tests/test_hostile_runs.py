"""Runs whose files somebody bent: every file, bent in every way, before every command that reads runs.

Each ends by itself with an exit code of the contract, without a traceback, and, unless what it says is right all the
same, with a message that names the file.
"""

from __future__ import annotations

import copy
import functools
import json
import math
import os
import random
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from engine import cli
from engine.data.run.commit_record import COMMITS
from engine.data.run.commits import compact_commits
from engine.data.run.file_names import COMPARISON, EVALUATION, MANIFEST, METADATA, STUDY, TWINS_TABLE
from engine.data.run.schema import arrow_schema
from engine.data.run.twins_table import FoundTwins, twins_table, write_twins
from engine.data.stores.opening import open_store
from engine.driver.executors.local import LocalExecutor
from engine.errors import EXIT_DAMAGED, EXIT_OK, JobError
from engine.generation.artefact import load_conditioning
from engine.models.configurations import ARTEFACT_DOCUMENT, read_config
from engine.models.program_settings import side_settings
from engine.studies.compare.baseline import read_baseline
from tests.conftest import REPOSITORY
from tests.sleepy import run_sleepy

CODES = {0, 1, 2, 3, 4}
MAX_CHARS = 3000
# Nothing that is read of a run of ten samples takes longer, whatever stands in its place.
MAX_SECONDS = 20
RESCORED = "rescored/other"

Bend = Callable[[Path], object]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three shards with starts and some twins, with an evaluation and new scores."""
    home = tmp_path_factory.mktemp("sound")
    run, images = home / "run", home / "images"
    for number in range(10):
        (images / str(number)).mkdir(parents=True)
        PIL.Image.new("RGB", (4, 4)).save(images / str(number) / "a.png")
    paired = {"method": "risky", "twin": True, "start": {"images": str(images), "strength": 0.5}}
    run_sleepy(run, 1, LocalExecutor(1), request=paired)
    (run / EVALUATION).write_text(json.dumps(EVALUATED))
    (run / COMPARISON).write_text(json.dumps(COMPARED))
    (run / STUDY).write_text(json.dumps(STUDIED))
    _find_twins(run)
    scores = run / RESCORED
    (scores / "_state").mkdir(parents=True)
    manifest = json.loads((run / MANIFEST).read_text())
    (scores / MANIFEST).write_text(json.dumps(manifest | {"rescored_from": {"uri": "../.."}}))
    shutil.copy(run / METADATA, scores / METADATA)
    (scores / "_state/rescoring.json").write_text("{}")
    (scores / "_SUCCESS").write_text("")
    return run


def _find_twins(run: Path) -> None:
    """As an evaluation does; here each sample is its own."""
    keys = pq.read_table(run / METADATA)["key"].to_pylist()
    fields = {"twin_psnr_db": 30.0, "twin_distance": 0.5, "twin_predicted_class": 1, "twin_risk": 1.0}
    digest = json.loads((run / MANIFEST).read_text())["plan_digest"]
    rows = twins_table([{"key": key, "twin_key": key} | fields for key in keys])
    write_twins(open_store(str(run)), FoundTwins(rows=rows, plan_digest=digest, num_attempts=len(keys), clip="c"))


EVALUATED: dict[str, Any] = {
    "study": "evaluate", "document_version": 1, "plan_digest": "x", "num_attempts": 10, "limit": 10, "seed": 0,
    "real": None, "samples": {}, "quality": [], "text_scores": None, "memorisation": None,
    "slices": {"which": "all", "model": "m", "num_failures": 0, "num_samples": 10, "error_rate": 0.0},
    "extremes": [], "images": {},
}  # fmt: skip


_SIDE = {"address": "away", "name": "sleepy", "night": "", "target": {"address": "t", "digest": "d"}, "num_samples": 9}
COMPARED: dict[str, Any] = {
    "old": _SIDE, "new": _SIDE, "baseline": "b.json", "confidence": 0.95, "correction": "Holm",
    "metric_names": {"risk": "median risk"}, "notes": ["n"], "crossed": ["c"],
    "rows": [
        {
            "request": "r", "level": "request", "group": "", "num_old": 9, "num_new": 9, "num_pairs": 9,
            "num_new_failures": 1, "num_mended": 0,
            "metrics": {"risk": {"old": 1.0, "new": 2.0, "change": 1.0, "low": 0.5, "high": 1.5, "significant": True}},
        }
    ],
    "new_failures": [
        {
            "key": "sleepy-000-000-00000000", "old_key": "k", "request": "r", "class_name": "c", "context": "",
            "old_predicted_class": 0, "old_predicted_class_name": "a", "predicted_class": 1,
            "predicted_class_name": "b", "old_risk": 0.1, "new_risk": 2.0,
        }
    ],
    "mended": [], "unpaired_failures": [], "num_new_failures": 1, "num_mended": 0, "num_unpaired_failures": 0,
}  # fmt: skip

STUDIED: dict[str, Any] = {
    "study": "sweep", "version": 1, "riskforge": "0", "status": "complete", "name": "n", "command": "c",
    "date": "2026-11-30", "hardware": "h", "seconds": 1.0, "versions": {"torch": "2"}, "arguments": {"count": 2},
    "runs": ["cells"], "findings": ["f"], "notes": ["n"],
    "tables": [
        {
            "name": "table", "title": "t", "note": "",
            "columns": [{"name": "n", "title": "n", "unit": "", "digits": 2, "note": ""}, {"name": "r", "title": "r"}],
            "rows": [[1, {"value": 1.0, "low": 0.5, "high": 1.5}], ["a", None]],
        }
    ],
    "figures": [{"name": "figure", "caption": "c", "svg": "<svg/>"}],
}  # fmt: skip


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    """A copy of it to bend."""
    return shutil.copytree(sound, tmp_path / "run", symlinks=True)


# What is called ------------------------------------------------------------------------------------------------------


def call(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[int, str, str]:
    """Run the command line in this process, for some seconds; gives exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["riskforge", *arguments])
    before = signal.signal(signal.SIGALRM, stuck)
    signal.alarm(MAX_SECONDS)
    try:
        cli.main()
    except SystemExit as end:
        return (int(end.code or 0), *capsys.readouterr())
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    raise AssertionError("the command line ends by SystemExit")


def stuck(*_: Any) -> None:
    """What the alarm does."""
    raise AssertionError(f"nothing came of it in {MAX_SECONDS} s")


def check(name: str, path: Path, code: int, out: str, err: str, *, is_named: bool = True) -> None:
    """A command ended as it may where a file is bent."""
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code in CODES and "Traceback" not in err, (code, err)
    assert all(
        len(line) < MAX_CHARS for line in [*lines, *out.splitlines()] if name not in ("status", "inspect-key")
    ), err[:2000]
    if code and name != "verify":
        assert lines, (out, err)
        wanted = (path.name, str(path.parent), "other plan", "another plan", "there is no run")
        assert not is_named or any(text in err for text in wanted), err


def commands(run: Path) -> dict[str, list[str]]:
    """Command lines of all commands that read a run, as far as they load no models; the writing ones last."""
    out = run.parent
    return {
        "status": ["status", str(run), "--json"],
        "status-text": ["status", str(run)],
        "verify": ["verify", str(run)],
        "inspect": ["inspect", str(run)],
        "inspect-key": ["inspect", str(run), "--key", "sleepy-000-000-00000000"],
        "inspect-scores": ["inspect", str(run / RESCORED)],
        "compare": ["compare", str(run), str(run)],
        "compare-scores": ["compare", str(run), str(run / RESCORED)],
        "merge": ["merge", str(run), "--output", str(out / "merged")],
        "export": ["export", str(run), "--output", str(out / "exported")],
        "export-parquet": ["export", str(run), "--output", str(out / "exported-parquet"), "--format", "parquet"],
        "export-pairs": ["export", str(run), "--output", str(out / "exported-pairs"), "--format", "pairs"],
        "push": ["push", str(run), "--to", "hf://datasets/ada/x", "--dry-run"],
        "evaluate": ["evaluate", str(run), "--real", str(out / "nothing")],
        "rescore": ["rescore", str(run), "--target", str(out / "nothing")],
        "report": ["report", str(run)],
        "retry": ["retry", str(run), "--executor", "local"],
        "repair": ["repair", str(run)],
    }


# What is bent --------------------------------------------------------------------------------------------------------

FILES = {
    "plan": "_state/plan/000000.json",
    "record": f"{COMMITS}/000001.*",
    "lease": "_state/lease/*.json",
    "events": "_state/events/*.jsonl",
    "tar": "shards/sleepy-000001.tar",
    "twin-tar": "twins/sleepy-000001.tar",
    "start-tar": "starts/sleepy-000001.tar",
    "parquet": "shards/sleepy-000001.parquet",
    "metadata": METADATA,
    "manifest": MANIFEST,
    "evaluation": EVALUATION,
    "comparison": COMPARISON,
    "study": STUDY,
    "twins": TWINS_TABLE,
    "success": "_SUCCESS",
    "wids": "shards/wids.json",
    "scores-manifest": f"{RESCORED}/{MANIFEST}",
    "scores-metadata": f"{RESCORED}/{METADATA}",
}
DOCUMENTS = ("plan", "record", "lease", "manifest", "evaluation", "comparison", "study", "scores-manifest")


def place_of(run: Path, name: str) -> Path:
    """Where the file of a role is in a run."""
    [path] = run.glob(FILES[name])
    return path


def replaced(make: Callable[[Path], None]) -> Bend:
    """Something else in the place of a file."""

    def bend(path: Path) -> None:
        path.unlink()
        make(path)

    return bend


def rewritten(change: Callable[[bytes], bytes]) -> Bend:
    """Other bytes."""
    return lambda path: path.write_bytes(change(path.read_bytes()))


def flipped(at: float) -> Bend:
    """Another bit, at a share of the length."""

    def flip(data: bytes) -> bytes:
        bent = bytearray(data)
        bent[int(at * len(bent))] ^= 4
        return bytes(bent)

    return lambda path: path.stat().st_size and rewritten(flip)(path)


def sparse(path: Path) -> None:
    """A terabyte of nothing."""
    with path.open("wb") as file:
        file.truncate(2**40)


BENDS: dict[str, Bend] = {
    "missing": Path.unlink,
    "empty": rewritten(lambda data: b""),
    "half": rewritten(lambda data: data[: len(data) // 2]),
    "random": rewritten(lambda data: random.Random(0).randbytes(len(data))),
    "zeros": rewritten(lambda data: bytes(len(data))),
    "deep": rewritten(lambda data: b"[" * 200_000 + b"]" * 200_000),
    "deep-objects": rewritten(lambda data: b'{"a":' * 2000 + b"1" + b"}" * 2000),
    "nan": rewritten(lambda data: b"NaN"),
    "infinite": rewritten(lambda data: b'{"counts": -Infinity}'),
    "huge-float": rewritten(lambda data: b'{"counts": 1e999}'),
    "huge-int": rewritten(lambda data: b'{"counts": ' + b"9" * 5000 + b"}"),
    "large-int": rewritten(lambda data: b'{"counts": ' + b"9" * 400 + b"}"),
    "null": rewritten(lambda data: b"null"),
    "list": rewritten(lambda data: b"[]"),
    "object": rewritten(lambda data: b"{}"),
    "text": rewritten(lambda data: b'"text"'),
    "number": rewritten(lambda data: b"7"),
    "half-character": rewritten(lambda data: b'{"name": "\\ud800"}'),
    "utf-16": rewritten(lambda data: data.decode("latin-1").encode("utf-16")),
    "flip-early": flipped(0.02),
    "flip": flipped(0.5),
    "flip-late": flipped(0.99),
    "pipe": replaced(os.mkfifo),
    "device": replaced(lambda path: path.symlink_to("/dev/zero")),
    "sparse": replaced(sparse),
    "folder": replaced(Path.mkdir),
    "loop": replaced(lambda path: path.symlink_to(path.name)),
    "dangling": replaced(lambda path: path.symlink_to("nowhere")),
}


# Fields --------------------------------------------------------------------------------------------------------------

VALUES: list[Any] = [
    None, True, -1, 1.5, 2**62, 1e300, "", "x", "../../x", "/etc/passwd", "a" * 5000, "\x1b[31m", [], [None], {},
    {"../x": 1}, [[1]], {"a": {"b": []}},
]  # fmt: skip


def places(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is something in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*where, key)
        yield from places(inner, (*where, key))


def with_value(document: Any, place: tuple[Any, ...], value: Any) -> bytes:
    """A document with another value at a place."""
    bent = copy.deepcopy(document)
    *parents, last = place
    functools.reduce(lambda inner, key: inner[key], parents, bent)[last] = value
    return json.dumps(bent).encode()


# Rows ----------------------------------------------------------------------------------------------------------------

ODD: dict[str, list[Any]] = {
    "float": [math.nan, math.inf, -math.inf, 1e308, -1.0, None],
    "int": [-1, 2**31 - 1, -(2**31), None],
    "int64": [-1, 2**62, -(2**62), None],
    "string": ["", "no-hyphens-at-the-end-", "nohyphens", "../../x", "a" * 5000, "\x1b[31m\n", None],
    "bool": [True, False, None],
    "list": [[], None, [-1] * 50],
    "entries": [[], None],
}


def kind_of(column: pa.DataType) -> str:
    """The entry of `ODD` for a type of columns."""
    if pa.types.is_integer(column):
        return "int64" if column.bit_width == 64 else "int"
    if pa.types.is_list(column) and pa.types.is_struct(column.value_type):
        return "entries"
    kinds = {"float": pa.types.is_floating, "string": pa.types.is_string, "bool": pa.types.is_boolean}
    return next((kind for kind, is_kind in kinds.items() if is_kind(column)), "list")


def with_column(path: Path, name: str, value: Any, *, every: bool) -> None:
    """Put a value into a column of a parquet file, in its first row or in every one."""
    table = pq.read_table(path, partitioning=None)
    place, kind = table.schema.get_field_index(name), table.schema.field(name).type
    values = table.column(name).to_pylist()
    values[: len(values) if every else 1] = [value] * (len(values) if every else 1)
    pq.write_table(table.set_column(place, pa.field(name, kind), pa.array(values, kind)), path)


def without_column(path: Path, name: str) -> None:
    """Take a column out of a parquet file."""
    pq.write_table(pq.read_table(path, partitioning=None).drop_columns([name]), path)


def as_text(path: Path, name: str) -> None:
    """Make texts of a column's values."""
    table = pq.read_table(path, partitioning=None)
    values = pa.array([str(one) for one in table.column(name).to_pylist()])
    pq.write_table(table.set_column(table.schema.get_field_index(name), name, values), path)


# Tests ---------------------------------------------------------------------------------------------------------------


def draw(cases: list[Any], num: int, seed: int) -> list[Any]:
    """So many cases, or as many as `RISKFORGE_FUZZ` says; the same every time."""
    num = max(num, int(os.environ.get("RISKFORGE_FUZZ", "0")))
    return random.Random(seed).sample(cases, min(num, len(cases)))


READING = [
    "status",
    "status-text",
    "verify",
    "inspect",
    "inspect-key",
    "inspect-scores",
    "compare-scores",
    "export-parquet",
    "export-pairs",
    "push",
]
WRITING = ["report", "repair", "merge", "compare"]
# These alone load torch; nothing comes of them, as what they are to score with is not there.
SCORING = ["evaluate", "rescore"]
BENT_FILES = [(role, bend) for role in FILES for bend in BENDS]
HANGING = [(role, bend) for role in FILES for bend in ("pipe", "device", "sparse", "deep")]


@pytest.mark.parametrize(("role", "bend"), sorted({*draw(BENT_FILES, 25, 0), *HANGING}))
def test_a_bent_file_is_named(
    run: Path, role: str, bend: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By some commands that read runs, each time others."""
    path = place_of(run, role)
    BENDS[bend](path)
    # Where a shard is missing, `retry` would load models and make it.
    is_of_shard = role in ("record", "tar", "twin-tar", "start-tar", "parquet")
    writing = WRITING + SCORING + ([] if is_of_shard else ["retry"])
    names = [*random.Random(f"{role}{bend}").sample(READING, 3), random.Random(bend + role).choice(writing)]
    for name in names:
        code, out, err = call(commands(run)[name], capsys, monkeypatch)
        # A folder without its plan is none of a run, and some files are no concern of a command.
        check(name, path, code, out, err, is_named=bend != "missing" and name not in SCORING)


def documents() -> list[tuple[str, int, int]]:
    """Roles of documents with numbers of a place, which are taken modulo how many there are, and of a value."""
    return [(role, place, value) for role in DOCUMENTS for place in range(60) for value in range(len(VALUES))]


@pytest.mark.parametrize(("role", "place", "value"), draw(documents(), 30, 1))
def test_a_bent_field_is_named(
    run: Path, role: str, place: int, value: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values of other kinds, names that lead out of the run, and what steers terminals."""
    path = place_of(run, role)
    document = json.loads(path.read_text(encoding="utf-8"))
    found = list(places(document))
    path.write_bytes(with_value(document, found[place * 7 % len(found)], VALUES[value]))
    draws = random.Random(f"{role}{place}{value}")
    for name in [*draws.sample(READING, 2), draws.choice(WRITING)]:
        code, out, err = call(commands(run)[name], capsys, monkeypatch)
        check(name, path, code, out, err)
        assert "\x1b" not in out + err


@functools.cache
def columns() -> list[tuple[str, str, Any]]:
    """Roles of tables, with a column and what becomes of it."""
    schema = arrow_schema(surplus=True)
    found: list[tuple[str, str, Any]] = []
    for role in ("metadata", "parquet", "scores-metadata"):
        for field in schema:
            if role != "parquet" or field.name != "surplus":
                odd = ODD[kind_of(field.type)]
                found += [(role, field.name, (value, every)) for value in odd for every in (False, True)]
                found += [(role, field.name, "dropped"), (role, field.name, "text")]
    return found


@pytest.mark.parametrize("number", draw(list(range(len(columns()))), 30, 2))
def test_bent_rows_are_named(
    run: Path, number: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values that are not finite, keys without hyphens, nulls, columns that lack or are of another type."""
    role, column, change = columns()[number]
    path = place_of(run, role)
    if change == "dropped":
        without_column(path, column)
    elif change == "text":
        as_text(path, column)
    else:
        with_column(path, column, change[0], every=change[1])
    draws = random.Random(number)
    for name in [*draws.sample(READING, 2), draws.choice(WRITING)]:
        code, out, err = call(commands(run)[name], capsys, monkeypatch)
        # Commands look at rows by the run, and `--key` at those that there are.
        check(name, path, code, out, err, is_named=False)


@pytest.mark.parametrize("name", ["twin_risk", "twin_key", "twin_predicted_class"])
def test_what_no_twin_has_is_not_exported(
    run: Path, name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs are found by the rows, which are checked as a record before they are written."""
    path = place_of(run, "metadata")
    with_column(path, name, {"twin_risk": math.inf}.get(name), every=True)
    code, out, err = call(commands(run)["export-pairs"], capsys, monkeypatch)
    check("export-pairs", path, code, out, err)
    assert code or name == "twin_key"


@pytest.mark.parametrize(
    ("name", "value", "command"), [("duration_seconds", math.nan, "merge"), ("risk", 1e308, "report")]
)
def test_numbers_that_no_run_writes_end_no_command_in_a_traceback(
    run: Path,
    name: str,
    value: float,
    command: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What depends on the run is checked as records are; axes end where numbers do."""
    path = place_of(run, "metadata")
    with_column(path, name, value, every=True)
    code, out, err = call(commands(run)[command], capsys, monkeypatch)
    check(command, path, code, out, err, is_named=False)
    assert bool(code) == (command == "merge")


@pytest.mark.parametrize("classes", [[None], ["x"], [[1]], [1.5], [-1], [True], "one", {"a": 1}, None, 3])
def test_a_plan_of_other_classes_is_named(
    run: Path, classes: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are looked up by their numbers."""
    path = place_of(run, "plan")
    plan = json.loads(path.read_text())
    plan["identity"]["requests"][0]["classes"][1] = classes
    path.write_text(json.dumps(plan))
    for name in ("status", "verify", "repair"):
        code, out, err = call(commands(run)[name], capsys, monkeypatch)
        assert code == 2 and "cannot be read as the plan of a run" in err, (out, err)


@pytest.mark.parametrize("requests", [None, "x", [None], [{}], [{"name": {}}]])
def test_a_plan_of_other_requests_is_named(
    run: Path, requests: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are compared with those of a job by their names."""
    path = place_of(run, "plan")
    plan = json.loads(path.read_text())
    plan["identity"]["requests"] = requests
    path.write_text(json.dumps(plan))
    code, _, err = call(commands(run)["status"], capsys, monkeypatch)
    assert code == 2 and "cannot be read as the plan of a run" in err


def test_a_manifest_whose_name_leads_elsewhere_is_named(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not the metadata, of which nothing is wrong."""
    manifest = json.loads((run / MANIFEST).read_text())
    (run / MANIFEST).write_text(json.dumps(manifest | {"name": "../../x"}))
    code, _, err = call(["report", str(run)], capsys, monkeypatch)
    assert code == 2 and f"{MANIFEST}: cannot be read as a manifest (name '../../x' is not that of a job)" in err
    assert METADATA not in err


@pytest.mark.parametrize("address", ["a" * 5000, "\0", "..", "/dev/null"])
def test_an_odd_address_of_the_run_that_was_rescored_is_named(
    run: Path, address: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No path has some of them."""
    path = place_of(run, "scores-manifest")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rescored_from": {"uri": address}}))
    code, out, err = call(commands(run)["inspect-scores"], capsys, monkeypatch)
    check("inspect-scores", path, code, out, err)


def test_verify_goes_on_past_damaged_records(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records of every kind of damage, and each is reported; `repair` takes them all out."""
    [first] = (run / COMMITS).glob("000000.*")
    [second] = (run / COMMITS).glob("000001.*")
    [third] = (run / COMMITS).glob("000002.*")
    first.write_bytes(b"[" * 200_000)
    second.write_text(second.read_text().replace("sleepy-000001", "../../../../etc/passwd"))
    third.unlink()
    os.mkfifo(third)
    code, out, _ = call(["verify", str(run)], capsys, monkeypatch)
    assert code == EXIT_DAMAGED
    assert "000000.ok=4.rejected=0.failed=0.accepted=4" in out and "it is nested too deeply" in out
    assert "name '../../../../etc/passwd' is not that of a shard" in out and "is a pipe, not a file" in out
    assert out.count("damage: ") == 3
    assert call(["repair", str(run)], capsys, monkeypatch)[0] == EXIT_OK
    assert not list((run / COMMITS).iterdir()), "so that the next run makes the shards again"


@pytest.mark.parametrize("bend", ["missing", "pipe", "device", "sparse", "folder", "loop", "dangling", "empty"])
def test_what_stands_in_the_place_of_a_shard_is_damage(
    run: Path, bend: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two shards at once; `repair` moves it aside, whatever it is, and takes the shards out."""
    for name in ("sleepy-000000.tar", "sleepy-000002.parquet"):
        BENDS[bend](run / "shards" / name)
    BENDS[bend](run / METADATA)
    code, out, _ = call(["verify", str(run)], capsys, monkeypatch)
    assert code == EXIT_DAMAGED and "shards/sleepy-000000.tar: " in out and "shards/sleepy-000002.parquet: " in out
    assert call(["repair", str(run)], capsys, monkeypatch)[0] == EXIT_OK
    assert [path.name for path in (run / "shards").glob("*.tar")] == ["sleepy-000001.tar"]
    assert call(["verify", str(run)], capsys, monkeypatch)[0] == EXIT_OK, "what lacks is to be made again"


@pytest.mark.parametrize("bend", ["empty", "half", "random", "flip", "pipe", "device", "folder"])
def test_a_bent_pack_of_records_is_named(
    run: Path, bend: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records of old shards lie in one file."""
    compact_commits(open_store(str(run)), max_loose=0)
    [path] = (run / "_state/packs").iterdir()
    BENDS[bend](path)
    for name in ("status", "verify", "inspect", "report"):
        code, out, err = call(commands(run)[name], capsys, monkeypatch)
        check(name, path, code, out, err)
        # A byte may be of no consequence.
        assert code or name != "verify" or bend == "flip"


DOCUMENTS_OF_OTHERS: dict[str, tuple[str, Callable[[Path], object]]] = {
    "artefact": (ARTEFACT_DOCUMENT, lambda path: load_conditioning(path.parent)),
    "config": ("config.json", read_config),
    "settings": ("model.pt.json", lambda path: side_settings(path.with_name("model.pt"), "model.pt")),
    "baseline": ("baseline.json", read_baseline),
}


@pytest.mark.parametrize("kind", DOCUMENTS_OF_OTHERS)
@pytest.mark.parametrize("bend", [bend for bend in BENDS if bend not in ("flip", "flip-early", "flip-late", "object")])
def test_documents_of_others_are_refused(tmp_path: Path, kind: str, bend: str) -> None:
    """Artefacts, settings of models and pinned runs, whatever stands in their place: named, at once, in few words."""
    name, read = DOCUMENTS_OF_OTHERS[kind]
    path = tmp_path / name
    path.write_text('{"schema_version": 1, "classes": ["a", "b"]}')
    (tmp_path / "statistics.safetensors").write_bytes(b"")
    BENDS[bend](path)
    if kind == "config" and bend in ("nan", "infinite", "huge-float", "large-int", "half-character", "utf-16"):
        return  # Some models of others have such values in their configurations.
    before = signal.signal(signal.SIGALRM, stuck)
    signal.alarm(MAX_SECONDS)
    try:
        with pytest.raises(JobError) as caught:
            read(path)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert str(tmp_path) in str(caught.value) or "model.pt" in str(caught.value)
    assert len(str(caught.value)) < MAX_CHARS


# Files of the package, of this process and of the system, and images, which have a limit of their own.
READ_OTHERWISE = {
    "data/run/card_loading.py", "data/stores/lease.py", "data/stores/object_appends.py",
    "data/stores/conditional_put.py", "driver/executors/activity.py", "driver/executors/ray_layout.py",
    "driver/executors/software.py",
    "data/images/class_folders.py", "models/custom_methods.py", "report/render.py", "report/style.py",
    "studies/review/page.py",
}  # fmt: skip


def test_files_of_others_are_read_by_one_function() -> None:
    """Whatever is read whole anywhere else is in one of few modules."""
    whole = re.compile(r"\.read_(?:text|bytes)\(|json\.load\(")
    modules = sorted((REPOSITORY / "engine").rglob("*.py"))
    found = {path for path in modules if whole.search(path.read_text(encoding="utf-8"))}
    assert {path.relative_to(REPOSITORY / "engine").as_posix() for path in found} <= READ_OTHERWISE
