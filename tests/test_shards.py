"""Shards: what goes in comes out, the same in gives the same bytes, and damage is noticed."""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engine.data.run.schema import arrow_schema
from engine.data.run.shard_writing import stage_shard, tar_member
from engine.data.run.shards import IMAGE_FORMATS, ShardFiles, inspect_pair, read_rows, read_shard, read_tar
from engine.driver.cost import BYTES_PER_PIXEL
from engine.errors import CorruptShardError, OutputError
from engine.job.columns import COLUMNS, RECORD_COLUMNS, RUN_COLUMNS, SCHEMA_VERSION
from engine.job.records import SampleResult
from tests.run_cases import make_job, make_plan, make_result, make_results

RUN = {"batch_size": 1, "duration_seconds": 0.25, "attempt": 1, "worker": "w"}
FLOATS = st.floats(allow_nan=False, allow_infinity=False)
TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
BY_KIND: dict[str, st.SearchStrategy[Any]] = {
    "int": st.integers(-(2**63), 2**63 - 1),
    "float": FLOATS,
    "bool": st.booleans(),
    "str": TEXTS,
    "ints": st.lists(st.integers(0, 999), max_size=4),
    "floats": st.lists(FLOATS, max_size=4),
    "transfers": st.lists(
        st.builds(
            lambda model, predicted, risk: {"model": model, "predicted_class": predicted, "risk": risk},
            TEXTS,
            st.integers(-1, 999),
            FLOATS,
        ),
        max_size=2,
    ),
    "judges": st.lists(
        st.builds(
            lambda model, cosine, margin: {"model": model, "conformity": cosine, "conformity_margin": margin},
            TEXTS,
            FLOATS,
            FLOATS,
        ),
        max_size=1,
    ),
    "oracles": st.lists(
        st.builds(
            lambda model, predicted, p_label: {"model": model, "predicted_class": predicted, "p_label": p_label},
            TEXTS,
            st.integers(-1, 999),
            FLOATS,
        ),
        max_size=2,
    ),
}
KEYS = st.from_regex(r"[a-z0-9]{1,9}-[0-9]{3}-([0-9]{3}|mix)-[0-9]{8}", fullmatch=True)


@st.composite
def results(draw: st.DrawFn) -> SampleResult:
    """Any sample that the schema allows."""
    record = {column.name: draw(BY_KIND[column.type]) for column in RECORD_COLUMNS}
    record |= {"key": draw(KEYS), "status": draw(st.sampled_from(["ok", "rejected", "failed"]))}
    record["schema_version"] = SCHEMA_VERSION
    image = draw(st.binary(min_size=1, max_size=2000)) if record["status"] == "ok" else b""
    return SampleResult(record=record, image=image, run=dict(RUN))


@pytest.fixture
def staged(tmp_path: Path) -> ShardFiles:
    plan = make_plan(make_job(tmp_path, count=10))
    return stage_shard(tmp_path, "demo-000001", make_results(plan, plan.shard(1)), "png")


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(results(), max_size=3, unique_by=lambda result: result.record["key"]))
def test_what_is_written_is_read(samples: list[SampleResult]) -> None:
    """Any record and image the schema allows survives tar, json and parquet; plain `tarfile` agrees."""
    with tempfile.TemporaryDirectory() as folder:
        files = stage_shard(Path(folder), "x-000000", samples, "png")
        ok = [one for one in samples if one.record["status"] == "ok"]
        expected = [(one.record["key"], one.image, one.record, one.record["class_index"]) for one in ok]
        assert list(read_shard(files.tar)) == expected
        rows = list(read_rows(files.parquet))
        names = [column.name for column in RECORD_COLUMNS]
        assert [{name: row[name] for name in names} for row in rows] == [sample.record for sample in samples]
        assert inspect_pair(files.tar, files.parquet) == files
        assert files.counts.attempted == len(samples)
        with tarfile.open(files.tar) as tar:
            assert [member.name.partition(".")[2] for member in tar] == ["png", "json", "cls"] * len(ok)


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_a_damaged_tar_is_refused_or_unchanged(staged: ShardFiles, data: st.DataObject) -> None:
    """Cut, flipped and foreign bytes end in `CorruptShardError`, never in another exception or in other samples."""
    good, expected = staged.tar.read_bytes(), list(read_shard(staged.tar))
    place = data.draw(st.integers(0, len(good) - 1))
    bad = data.draw(
        st.sampled_from(
            [good[:place], good[:place] + bytes([good[place] ^ 255]) + good[place + 1 :], good[place:], b""]
        )
    )
    path = staged.tar.with_name("bad.tar")
    path.write_bytes(bad + data.draw(st.sampled_from([b"", b"x"])))
    try:
        inspect_pair(path, staged.parquet)
    except CorruptShardError as error:
        assert str(path) in str(error)
    else:
        assert list(read_shard(path)) == expected


def test_equal_samples_give_equal_tar_bytes(tmp_path: Path) -> None:
    """Attempt, worker, timing and folder leave no trace in the tar, and `tarfile` would write the same bytes."""
    plan = make_plan(make_job(tmp_path))
    shard = plan.shard(0)
    first = stage_shard(tmp_path, "demo-000000", make_results(plan, shard), "png")
    second = stage_shard(tmp_path, "other", make_results(plan, shard, attempt=3, worker="w9"), "png")
    assert first.tar.read_bytes() == second.tar.read_bytes()
    assert first.parquet_sha256 != second.parquet_sha256
    reference = io.BytesIO()
    with tarfile.open(fileobj=reference, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in read_tar(first.tar):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    assert first.tar.read_bytes() == reference.getvalue()


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 1024])
def test_members_are_padded_to_blocks(size: int) -> None:
    """As `tarfile` pads them; contents of whole blocks have no padding."""
    reference = io.BytesIO()
    with tarfile.open(fileobj=reference, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        info = tarfile.TarInfo("a.png")
        info.size = size
        tar.addfile(info, io.BytesIO(bytes(size)))
    member = tar_member("a.png", bytes(size))
    assert len(member) == 512 + -(-size // 512) * 512 and reference.getvalue().startswith(member)


def test_members_are_plain_and_anonymous(staged: ShardFiles) -> None:
    """As `tarfile` sees them: ustar, time 0, owner 0, mode 0644, padded to a record."""
    with tarfile.open(staged.tar) as tar:
        members = tar.getmembers()
    assert members
    for member in members:
        assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
        assert member.mode == 0o644 and member.isreg()
    assert staged.tar_bytes % 10240 == 0 and staged.tar.stat().st_size == staged.tar_bytes


def test_json_member_has_every_field_and_nothing_that_json_lacks(staged: ShardFiles) -> None:
    for name, data in read_tar(staged.tar):
        if name.endswith(".json"):
            assert data.endswith(b"}\n")
            fields = json.loads(data, parse_constant=lambda text: pytest.fail(text))
            assert list(fields) == [column.name for column in RECORD_COLUMNS]


def test_parquet_has_every_attempt_and_no_nullable_column(staged: ShardFiles) -> None:
    """Failed samples are rows too; readers find the same schema in every file."""
    table = pq.read_table(staged.parquet)
    assert table.schema.equals(arrow_schema(), check_metadata=True)
    assert table.column_names == [column.name for column in (*RECORD_COLUMNS, *RUN_COLUMNS)]
    assert not any(field.nullable for field in table.schema)
    assert set(table["status"].to_pylist()) == {"ok", "failed"}
    assert [row["sha256"] == "" for row in table.to_pylist()] == [s == "failed" for s in table["status"].to_pylist()]
    assert [column.name for column in COLUMNS] == arrow_schema(surplus=True).names


def test_foreign_readers_open_the_tar(staged: ShardFiles, tmp_path: Path) -> None:
    """webdataset and Hugging Face `datasets` see the same samples without this project."""
    import datasets
    import webdataset as wds

    expected = list(read_shard(staged.tar))
    samples = list(wds.WebDataset(str(staged.tar), shardshuffle=False).decode("pil").to_tuple("png", "cls", "json"))
    assert [(cls, record) for _, cls, record in samples] == [(cls, record) for _, _, record, cls in expected]
    assert samples[0][0].size == (4, 4)
    loaded = datasets.load_dataset(
        "webdataset", data_files=str(staged.tar), cache_dir=str(tmp_path / "cache"), split="train"
    )
    assert [row["__key__"] for row in loaded] == [key for key, *_ in expected]
    assert [row["json"]["risk"] for row in loaded] == [record["risk"] for _, _, record, _ in expected]
    assert loaded[0]["png"].size == (4, 4) and loaded[0]["cls"] == expected[0][3]


@pytest.mark.parametrize("change", ["image of another sample", "record", "row missing", "sample missing"])
def test_a_pair_that_is_not_of_one_piece_is_noticed(staged: ShardFiles, tmp_path: Path, change: str) -> None:
    """Each file is whole by itself; only reading both together shows that they do not belong to one attempt."""
    plan = make_plan(make_job(tmp_path, count=10))
    samples = list(make_results(plan, plan.shard(1)))
    if change == "image of another sample":
        samples[0] = SampleResult(samples[0].record, samples[2].image, samples[0].run)
    elif change == "record":
        samples[0].record["risk"] += 1e-9
    elif change == "row missing":
        del samples[0]
    else:
        samples.append(make_result(plan.requests[0].sample(99)))
    other = stage_shard(tmp_path, "demo-000001", samples, "png")
    with pytest.raises(CorruptShardError):
        inspect_pair(other.tar, staged.parquet)
    with pytest.raises(CorruptShardError):
        inspect_pair(staged.tar, other.parquet)


def test_every_image_format_is_known_everywhere() -> None:
    """The job's formats, the encoder's and the estimate's."""
    from engine.data.images.encoding import _OPTIONS

    assert set(IMAGE_FORMATS) == set(BYTES_PER_PIXEL) == set(_OPTIONS)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    """A tar with a link in it, a tar of another tool, and a text file named parquet."""
    path = tmp_path / "foreign.tar"
    with tarfile.open(path, "w") as tar:
        link = tarfile.TarInfo("a.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(CorruptShardError, match="not a plain file"):
        list(read_shard(path))
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("notes.txt")
        member.size = 2
        tar.addfile(member, io.BytesIO(b"hi"))
    with pytest.raises(CorruptShardError, match="where an image should"):
        list(read_shard(path))
    path.write_bytes(b"hello")
    with pytest.raises(CorruptShardError, match="not a whole parquet"):
        list(read_rows(path))
    with pytest.raises(OutputError, match="no such file"):
        list(read_shard(tmp_path / "absent.tar"))


def test_staging_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """The error of the sampler comes through as it is, and no half shard stays behind."""
    plan = make_plan(make_job(tmp_path))

    def broken():  # type: ignore[no-untyped-def]
        yield from make_results(plan, plan.shard(0))
        raise RuntimeError("sampler")

    with pytest.raises(RuntimeError, match="sampler"):
        stage_shard(tmp_path, "demo-000000", broken(), "png")
    twice = [make_result(plan.requests[0].sample(0))] * 2
    with pytest.raises(ValueError, match="twice"):
        stage_shard(tmp_path, "demo-000000", twice, "png")
    nan = make_result(plan.requests[0].sample(0))
    nan.record["risk"] = float("nan")
    with pytest.raises(ValueError, match="risk"):
        stage_shard(tmp_path, "demo-000000", [nan], "png")
    assert list(tmp_path.iterdir()) == []


def test_a_sample_of_the_cases_is_as_the_schema_wants() -> None:
    """The made-up samples of these tests are valid, so that they prove something."""
    from engine.job.records import check_record

    check_record(make_result(make_plan(make_job(Path("x"))).requests[0].sample(0)).record)
