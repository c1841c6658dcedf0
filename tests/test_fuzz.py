"""What comes from outside, bent and broken at random: job files and tars.

A job is valid or refused in a few lines; a tar gives samples, findings or an error of this project. Never anything
else, nothing is written, and time stays bounded. `RISKFORGE_FUZZ=3000` tries so many of each.
"""

from __future__ import annotations

import copy
import functools
import io
import json
import os
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import PIL.Image
import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from engine.commands.jobfile import parse_override, read_job
from engine.data.images import LabelledImage, Unusable, webdataset
from engine.data.run.commit_record import COMMITS
from engine.data.run.shards import inspect_pair, read_shard, read_tar
from engine.data.run.verify import verify
from engine.data.stores.opening import open_store
from engine.driver.executors.local import LocalExecutor
from engine.errors import CorruptShardError, JobError, RiskforgeError
from engine.job.plan import resolve_requests
from engine.job.spec import JobSpec, RequestSpec
from engine.models.job_checks import check_addresses
from engine.models.labels import read_labels
from tests.conftest import REPOSITORY
from tests.job_cases import ENGINE_JOBS
from tests.sleepy import run_sleepy

MAX_EXAMPLES = int(os.environ.get("RISKFORGE_FUZZ", "0"))
MAX_LINES, MAX_CHARS = 60, 3000


def fuzz(examples: int) -> Callable[[Any], Any]:
    """Settings of a property that is tried so many times; the same ones every time, but where more are asked for."""
    return settings(
        max_examples=MAX_EXAMPLES or examples,
        derandomize=not MAX_EXAMPLES,
        # In milliseconds: what grows without bounds takes longer, a busy machine does not.
        deadline=60_000,
        database=None,
        suppress_health_check=list(HealthCheck),
    )


# Job files ------------------------------------------------------------------------------------------------------------

JOBS = [yaml.safe_load(path.read_text()) for path in ENGINE_JOBS]
TEXTS = st.one_of(
    st.text(max_size=12),
    st.sampled_from(
        ["", "../x", "a b", "\x1b[31m", "\u202e", "zoo:digits/classifier", "zoo:", "x:y", "os:abort", "/dev/null",
         "~", "4x",
         ">= 1", "all", "auto", "{class}", "{}", "s3://a", "a" * 5000, "null", "1e9", "\ud800", "nan", "three",
         "\n", "-"]
    ),
)  # fmt: skip
VALUES = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.sampled_from([-1, 0, 2**53, 2**80, 10**29]),
        st.floats(),
        TEXTS,
        st.dates(),
        st.binary(max_size=4),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.one_of(TEXTS, st.integers(), st.none(), st.booleans()), inner, max_size=3),
    ),
    max_leaves=6,
)
FIELDS = sorted({*JobSpec.model_fields, *RequestSpec.model_fields, "step", "alpha", "every", "custom", "parameters"})


def places(value: Any, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Where there is something in a value, the value itself left out."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, one in items for place in [(*where, key), *places(one, (*where, key))]]


JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
).map(lambda value: json.dumps(value).encode())


@st.composite
def bent_jobs(draw: st.DrawFn) -> Any:
    """A job of the repository, with a few things replaced, removed, added or swapped."""
    job = copy.deepcopy(draw(st.sampled_from(JOBS)))
    for _ in range(draw(st.integers(1, 3))):
        found = places(job)
        if not found:
            break
        *parents, last = draw(st.sampled_from(found))
        inner = functools.reduce(lambda value, key: value[key], parents, job)
        kind = draw(st.sampled_from(["replace", "remove", "add", "copy"]))
        if kind == "replace":
            inner[last] = draw(VALUES)
        elif kind == "remove":
            del inner[last]
        elif isinstance(inner, list):
            inner.append(draw(VALUES) if kind == "add" else copy.deepcopy(inner[last]))
        else:
            inner[draw(st.one_of(TEXTS, st.sampled_from(FIELDS)))] = (
                draw(VALUES) if kind == "add" else copy.deepcopy(inner[last])
            )
    return job


def validate(path: Path, overrides: list[str]) -> None:
    """As `riskforge plan JOB --validate` does, as far as the job goes: it is valid, or is refused in a few lines."""
    try:
        job = read_job(path, [parse_override(text) for text in overrides])
        # An address of a model may be code that somebody wants to run: not that of a test.
        if not any(":" in one.method for one in job.requests) and is_of_the_zoo(job):
            check_addresses(job)
            open_store(job.output.uri)
            labels = read_labels(job.models.target)
            if labels is not None:
                resolve_requests(job, labels)
    except RiskforgeError as error:
        lines = error.problems if isinstance(error, JobError) else [str(error)]
        assert lines and len(lines) <= MAX_LINES
        for line in lines:
            assert line.strip() and len(line) <= MAX_CHARS, line
            assert "https://" not in line and "pydantic" not in line.lower(), line


def is_of_the_zoo(job: JobSpec) -> bool:
    """Whether no model of a job is an address that runs code."""
    models = job.models
    classifiers = [*models.targets, *models.transfer, *([models.oracle] if models.oracle else [])]
    return all(one.startswith("zoo:") or ":" not in one for one in classifiers)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that nothing may be written to but what a test puts there."""
    return tmp_path_factory.mktemp("fuzz")


@given(job=bent_jobs())
@fuzz(200)
def test_a_bent_job_is_valid_or_refused_in_a_few_lines(home: Path, job: Any) -> None:
    """Near the truth, where checks between fields meet what no check has seen."""
    path = home / "job.yaml"
    path.write_text(yaml.safe_dump(job, allow_unicode=False), encoding="utf-8")
    validate(path, [])
    assert [one.name for one in home.iterdir()] == ["job.yaml"]


PIECES = st.sampled_from(
    ["name: a\n", "- ", "? ", ": ", "&a ", "*a ", "!!int ", "!!timestamp ", "!!python/name:os.system ", "<<: ",
     "{", "}", "[", "]",
     "'", '"', "|\n", ">\n", "\t", "%YAML 1.1\n", "---\n", "...\n", "#", "0x", "1:2", "=", "!!set ", "!!omap ",
     "!!binary ", "~", "\n ",
     "requests:\n- ", "seed: ", "models: ", "\ufeff", "\x85", "\u2028", "\x00"]
)  # fmt: skip


@given(content=st.one_of(st.binary(max_size=60), st.lists(st.one_of(PIECES, st.text(max_size=4)), max_size=14)))
@fuzz(300)
def test_any_bytes_are_refused_in_a_few_lines(home: Path, content: bytes | list[str]) -> None:
    """Bytes, and the words of YAML in any order."""
    path = home / "job.yaml"
    path.write_bytes(content if isinstance(content, bytes) else "".join(content).encode("utf-8", "surrogatepass"))
    validate(path, [])


@given(overrides=st.lists(
    st.one_of(
        st.text(max_size=20),
        st.builds(
            "{}={}".format,
            st.lists(st.sampled_from([*FIELDS, "0", "-1", "99", ""]), max_size=4).map(".".join),
            st.one_of(st.lists(PIECES, max_size=4).map("".join), st.text(max_size=10), st.integers().map(str)),
        ),
    ),
    max_size=3,
))  # fmt: skip
@fuzz(300)
def test_any_override_is_taken_or_refused_in_a_few_lines(overrides: list[str]) -> None:
    """`--set` leads to every place, and to none."""
    validate(REPOSITORY / "jobs/quickstart.yaml", overrides)


# Tars -----------------------------------------------------------------------------------------------------------------

LABELS = ("zero", "one", "two")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    output = tmp_path_factory.mktemp("fuzz-run") / "run"
    run_sleepy(output, 1, LocalExecutor(1))
    return output


def bytes_of_image() -> bytes:
    """A picture."""
    buffer = io.BytesIO()
    PIL.Image.new("RGB", (8, 8), (200, 10, 30)).save(buffer, "png")
    return buffer.getvalue()


MEMBERS = st.tuples(
    st.sampled_from(
        ["a.png", "a.cls", "a.json", "b.jpg", "../out.png", "/tmp/riskforge-escaped.png", "x/../../y.cls",
         "a..png", ".png", "é.png",
         "a" * 300 + ".png", "", "a.png/", "a\n.cls"]
    ),
    st.sampled_from([tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE,
    tarfile.CHRTYPE,
                     tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.CONTTYPE, tarfile.GNUTYPE_SPARSE, tarfile.XHDTYPE,
                     tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, b"?"]),
    st.one_of(
        st.just(bytes_of_image()),
        st.sampled_from([b"1", b"one", b"999999999999", b"{}", b'{"class_index": 1}', b"[" * 3000, b"",
        b"12 size=999999\n",
                         b"20 GNU.sparse.size=9\n", b"30 GNU.sparse.major=1\n30 GNU.sparse.minor=0\n", b"9 path=x\n"]),
        st.binary(max_size=40),
    ),
    st.sampled_from(["/etc/passwd", "../../x", "a.png", ""]),
)  # fmt: skip


# As the size of a member: too large in both ways of writing it, and negative.
NUMBERS = [b"77777777777", b"\x80" + bytes(10) + b"\x7f", b"\xff" * 12, b"-1"]


@st.composite
def bent_tars(draw: st.DrawFn) -> bytes:
    """A tar of members of all kinds, or of a run, with a few bytes changed, inserted, cut off or repeated."""
    if draw(st.booleans()):
        data = bytearray(draw(st.sampled_from(run_tars())))
    else:
        buffer = io.BytesIO()
        kind = draw(st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]))
        with tarfile.open(fileobj=buffer, mode="w", format=kind) as tar:
            for name, type_, content, link in draw(st.lists(MEMBERS, max_size=5)):
                info = tarfile.TarInfo(name)
                info.type, info.linkname, info.size = type_, link, len(content)
                buffer.write(info.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512))
            tar.offset = buffer.tell()
        data = bytearray(buffer.getvalue())
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        # Fields of a header: size, checksum, type, link, magic.
        at = at // 512 * 512 + draw(st.sampled_from([0, 100, 124, 128, 135, 148, 156, 157, 257, 345, 482, at % 512]))
        what = draw(st.sampled_from(["flip", "write", "cut", "insert"]))
        if what == "cut":
            del data[at:]
        elif what == "flip" and at < len(data):
            data[at] ^= draw(st.integers(1, 255))
        else:
            some = draw(
                st.one_of(
                    st.binary(max_size=12), st.sampled_from([b"77777777777", b"\x80" + bytes(10) + b"\x7f", b"-1"])
                )
            )
            data[at : at + (len(some) if what == "write" else 0)] = some
        if draw(st.booleans()):
            mend(data, at // 512 * 512)
    return bytes(data)


def mend(data: bytearray, at: int) -> None:
    """Put the right checksum into a header: what is wrong is then read on."""
    block = data[at : at + 512]
    if len(block) == 512:
        block[148:156] = b" " * 8
        data[at + 148 : at + 156] = b"%06o\0 " % sum(block)


@functools.cache
def run_tars() -> list[bytes]:
    """Tars as a run writes them."""
    from tests.run_cases import make_job, make_plan, make_results

    plan = make_plan(make_job(Path("/nowhere")))
    return [written(list(make_results(plan, plan.shard(number)))) for number in range(2)]


def written(results: list[Any]) -> bytes:
    from engine.data.run.shard_writing import sample_members, tar_member

    stored = [one for one in results if one.image]
    members = [tar_member(*member) for one in stored for member in sample_members(one.record, one.image, "png")]
    return b"".join(members) + bytes(10240)


@given(data=st.one_of(bent_tars(), st.binary(max_size=600), st.binary(min_size=512, max_size=1024)))
@fuzz(400)
def test_a_bent_tar_gives_samples_findings_or_an_error_of_ours(home: Path, data: bytes) -> None:
    """By both readers, with all of it bounded by the size of the file; nothing is unpacked."""
    path = home / "data.tar"
    path.write_bytes(data)
    for read in (read_tar, read_shard):
        try:
            assert sum(len(one[1]) for one in read(path)) <= len(data)
        except CorruptShardError as error:
            assert str(error).startswith(f"{path}: ")
    num_found = 0
    for found in webdataset([path], LABELS).read():
        assert isinstance(found, LabelledImage | Unusable)
        assert found.name.isprintable() and (isinstance(found, LabelledImage) or found.reason.isprintable())
        num_found += 1
    assert num_found <= len(data) // 512 + 1
    path.unlink()
    assert not Path("/tmp/riskforge-escaped.png").exists() and not (home.parent / "out.png").exists()
    assert not [one for one in home.iterdir() if one.name != "job.yaml"]


def same_shard(before: bytes, after: bytes) -> bool:
    """Whether two commit records tell the same of a shard, if not of its making."""
    try:
        first, second = (json.loads(one.decode(errors="replace")) for one in (before, after))
        return first.keys() == second.keys() and all(
            first[name] == second[name] for name in first if name not in ("worker", "attempt", "timing")
        )
    except (ValueError, AttributeError):
        return False


@example(data=b"", place="record", at=403, by=1)
@example(data=b"", place="parquet", at=140, by=128)
@given(
    data=bent_tars(),
    place=st.sampled_from(["tar", "parquet", "record", "plan"]),
    at=st.integers(0, 10**6),
    by=st.integers(1, 255),
)
@fuzz(60)
def test_verify_finds_whatever_is_broken(whole: Path, data: bytes, place: str, at: int, by: int) -> None:
    """A foreign or bent tar, and a changed byte in any file of the run: findings, or an error of ours.

    Of a record, what it tells of the making (worker, times) can be checked against nothing.
    """
    files = {
        "tar": whole / "shards/sleepy-000001.tar",
        "parquet": whole / "shards/sleepy-000001.parquet",
        "record": next((whole / COMMITS).glob("000001.*")),
        "plan": next((whole / "_state/plan").glob("*.json")),
    }
    path, before = files[place], files[place].read_bytes()
    bent = bytearray(before)
    bent[at % len(bent)] ^= by
    try:
        path.write_bytes(data if place == "tar" else bytes(bent))
        if place == "record" and same_shard(before, bytes(bent)):
            return
        if place != "plan":
            assert {one.shard for one in verify(open_store(str(whole))).damage} == {1}
            return
        verify(open_store(str(whole)))
    except RiskforgeError as error:
        assert place == "plan" and len(str(error)) < MAX_CHARS
    finally:
        path.write_bytes(before)


@given(
    data=st.one_of(
        st.binary(max_size=300), st.recursive(VALUES, st.lists).map(lambda one: json.dumps(one, default=str).encode())
    )
)
@fuzz(50)
def test_a_plan_that_is_none_is_refused(whole: Path, data: bytes) -> None:
    """Other JSON, and bytes, in the place of a run's plan."""
    [path] = (whole / "_state/plan").glob("*.json")
    before = path.read_bytes()
    try:
        path.write_bytes(data)
        with pytest.raises(RiskforgeError):
            verify(open_store(str(whole)))
    finally:
        path.write_bytes(before)


def test_a_pair_is_not_read_into_memory_by_its_header(home: Path) -> None:
    """A header that promises a terabyte, in a file of a kilobyte."""
    info = tarfile.TarInfo("a.png")
    info.size = 2**40
    path = home / "huge.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(1024))
    with pytest.raises(CorruptShardError, match="cut short"):
        list(read_tar(path))
    with pytest.raises(CorruptShardError):
        inspect_pair(path, path)
    assert all(isinstance(one, Unusable) for one in webdataset([path], LABELS).read())
    path.unlink()
