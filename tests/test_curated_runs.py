"""Curated runs: a real run of the zoo selected from, every command on the result, kills, damage and refusals."""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import engine
from engine.data.run.curated import (
    Curation,
    MonitorRecord,
    Proportion,
    RewardRecord,
    curation_of,
    parse_curation,
    read_curation,
)
from engine.data.run.repair import repair
from engine.data.run.resume import open_output
from engine.data.run.selection_table import LEFT_OVER, parse_selection, read_selection, selection_bytes
from engine.data.run.shards import read_shard
from engine.data.run.stored_plan import stored_plan
from engine.data.run.verify import verify
from engine.data.stores.lease import hold
from engine.data.stores.opening import open_store
from engine.driver.status import read_status, status_lines
from engine.errors import EXIT_DAMAGED, CorruptShardError, JobError, OutputError, OwnedError
from engine.models.addresses import locate
from engine.studies.curate.candidates import Parent, open_candidates
from engine.studies.curate.program import SelectionOptions, SignalRecord, find_curated
from engine.studies.curate.selection import draw_selection
from tests import corpus_cases
from tests.curated_cases import by_class, curated, files_of, killed_at
from tests.s3_cases import BUCKET

PLAIN = {"method": "prompt"}
# As the fine-tuning of a generator writes it.
TRAINING: dict[str, Any] = {
    "training": "generator",
    "parent_run": {"uri": "../<i>earlier</i>", "name": "small", "plan_digest": "p0", "shards_digest": "s0"},
    "parent_model": {"address": "zoo:digits/stable-diffusion", "digest": "m0", "license": "apache-2.0"},
    "recipe": {"steps": 60},
}
JOB: dict[str, Any] = {
    "name": "small",
    "seed": 3,
    "models": {
        "diffusion": "zoo:digits/stable-diffusion",
        "clip": "zoo:digits/clip",
        "target": "zoo:digits/classifier",
        "oracle": "zoo:digits/oracle",
    },
    "requests": [
        {"name": "plain", "method": "prompt", "classes": [0, 1, 2, 3], "count": 1, "contexts": ["", "red ink"]},
        {"name": "between", "method": "prompt", "boundary": ["three", "eight"], "count": 2},
        # The first round accepts none, so that the second accepts some beyond the quota; `none` never meets its rule.
        {"name": "quota", "classes": [7], "count": 2, "accept": {"risk": "< 0.002"}, "max_attempts": "3x"} | PLAIN,
        {"name": "none", "classes": [0], "count": 1, "accept": {"risk": ">= 99"}, "max_attempts": "1x"} | PLAIN,
    ],
    "sampling": {"num_inference_steps": 2, "scheduler": "ddim"},
    "runtime": {"device": "cpu"},
}  # fmt: skip
MONITOR = MonitorRecord(
    e_value=31.2, highest=44.0, alarm=True, level=0.05, num_audited=60, num_differing=22, covariance=-0.1,
    correlation=Proportion(value=-0.4, low=-0.6, high=-0.1), after="../earlier",
)  # fmt: skip
REWARD = RewardRecord(
    name="prefs <b>`x`</b>.jsonl", kind="preferences", digest="abc", model="linear", num_records=400,
    accuracy=Proportion(value=0.81, low=0.74, high=0.865, total=200),
)  # fmt: skip
SIGNAL = SignalRecord(reward=REWARD, monitor=MONITOR, files={"suspects.jsonl": b'{"first": "a"}\n'})


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model that was fine-tuned, a real run by it, stored as jpg, and its curated run."""
    from engine import cli

    home = tmp_path_factory.mktemp("curated")
    shutil.copytree(locate("zoo:digits/stable-diffusion").folder, home / "model")
    (home / "model/training.json").write_text(json.dumps(TRAINING), encoding="utf-8")
    models = JOB["models"] | {"diffusion": str(home / "model")}
    output = {"uri": str(home / "run"), "samples_per_shard": 5, "store_rejected": True, "image_format": "jpg"}
    (home / "job.yaml").write_text(yaml.safe_dump(JOB | {"output": output, "models": models}), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", ["riskforge", "run", str(home / "job.yaml"), "--executor", "local"])
        cli.main()
    assert not end.value.code
    curated(home / "run", home / "curated", signal_record=SIGNAL, num_candidates=3)
    return home


@pytest.fixture
def copied(home: Path, tmp_path: Path) -> Path:
    """A copy of the folder, to be damaged."""
    shutil.copytree(home, tmp_path / "home")
    return tmp_path / "home"


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of noise images in three shards, with failed samples and rejected ones."""
    return corpus_cases.make_run(tmp_path_factory.mktemp("noise") / "run", count=20)


def rows_of(run: Path) -> dict[str, dict[str, Any]]:
    return {row["key"]: row for row in pq.read_table(run / "metadata.parquet").to_pylist()}


def images_of(run: Path) -> dict[str, bytes]:
    return {key: image for tar in sorted(run.glob("shards/*.tar")) for key, image, _, _ in read_shard(tar)}


def test_selected_samples_are_those_of_the_parent_byte_for_byte(home):
    """Rows and image files; the mark of provenance in them is not touched, as nothing is encoded again."""
    before, after = rows_of(home / "run"), rows_of(home / "curated")
    selected = {key for key, row in after.items() if row["accepted"]}
    images = images_of(home / "run")
    assert list(before) == list(after) and len(selected) == 4
    assert images_of(home / "curated") == {key: images[key] for key in images if key in selected}
    assert all(b"trainedAlgorithmicMedia" in images[key] for key in selected)
    for key, row in after.items():
        if key in selected:
            assert row == before[key]
            continue
        changed = {} if before[key]["status"] == "failed" else {"status": "rejected"}
        assert row == before[key] | changed | {"accepted": False, "sha256": "", "surplus": False}


def test_one_of_each_group_of_candidates_is_selected(home):
    """Candidates are stored, accepted and within their quota; images of rejected ones are stored too."""
    store = open_store(str(home / "curated"))
    selection, curation = read_selection(store), read_curation(store)
    wanted = [key for key, row in rows_of(home / "run").items() if row["accepted"] and not row["surplus"]]
    assert selection.keys == tuple(wanted) and len(wanted) == 8 + 2 + 2
    assert any(row["surplus"] for row in rows_of(home / "run").values())
    members = {group: [place for place, own in enumerate(selection.groups) if own == group] for group in range(4)}
    assert all(len(places) == 3 for places in members.values()) and LEFT_OVER not in selection.groups
    for places in members.values():
        assert sum(selection.selected[place] for place in places) == 1
        assert sum(selection.probabilities[place] for place in places) == pytest.approx(1)
    assert (curation.num_candidates, curation.num_selected, curation.num_left_over) == (12, 4, 0)
    kept = [reward for reward, is_selected in zip(selection.rewards, selection.selected, strict=True) if is_selected]
    assert curation.mean_reward_selected == pytest.approx(sum(kept) / 4)
    assert sum(count.selected for count in curation.classes) == 4


def test_groups_within_a_class_keep_the_balance(noise, tmp_path):
    done = curated(noise, tmp_path / "out", num_candidates=4, among="class")
    store = open_store(str(tmp_path / "out"))
    selection = read_selection(store)
    classes = dict(
        zip(*(open_candidates(open_store(str(noise))).column(name) for name in ("key", "class_index")), strict=True)
    )
    for group in set(selection.groups) - {LEFT_OVER}:
        own = {classes[key] for key, other in zip(selection.keys, selection.groups, strict=True) if other == group}
        assert len(own) == 1
    for count in read_curation(store).classes:
        assert count.selected == count.candidates // 4
    assert done.num_left_over == done.num_candidates - 4 * done.num_selected > 0


def test_the_likelier_the_higher_the_reward():
    """Frequencies of the draw over many seeds: Bradley-Terry, and of no reward uniform."""
    keys, counts = ["a", "b"], [0, 0]
    for seed in range(2000):
        selection = draw_selection(keys, [0, 0], [1.0, 0.0], SelectionOptions(num_candidates=2, seed=seed))
        counts[selection.selected.index(True)] += 1
        assert selection.probabilities[0] == pytest.approx(0.7310586)
    assert abs(counts[0] / 2000 - 0.7310586) < 4 * (0.25 / 2000) ** 0.5
    halves = draw_selection(keys, [0, 0], [1.0, 0.0], SelectionOptions(num_candidates=2, scale=0.0)).probabilities
    assert halves == (0.5, 0.5)


def test_killed_at_every_write_and_resumed_with_equal_bytes(noise, tmp_path):
    """Each process is really killed, one write later than the one before; none leaves damage, the last one finishes."""
    curated(noise, tmp_path / "whole")
    number = 1
    while killed_at(noise, tmp_path / "out", number):
        if (tmp_path / "out/_state/plan/000000.json").exists():
            store = open_store(str(tmp_path / "out"))
            assert not verify(store).damage
            if not store.exists("_SUCCESS"):
                assert "`riskforge curate` with the same options continues" in "".join(status_lines(read_status(store)))
        number += 1
    assert number > 8, "the process came to its end too early to prove anything"
    whole, resumed = (files_of(tmp_path / name) for name in ("whole", "out"))
    # The plan has the address of the output.
    for files in (whole, resumed):
        files["_state/plan/000000.json"] = files["_state/plan/000000.json"].replace(b"/whole", b"/out")
    assert whole == resumed
    assert read_status(open_store(str(tmp_path / "out"))).state == "complete"


def test_a_kill_does_not_change_what_was_drawn(noise, tmp_path):
    """A reward that is another one the second time (a learned one on other kernels) is not asked again."""
    signal = SignalRecord(reward=REWARD)
    whole = curated(noise, tmp_path / "whole", signal_record=signal)
    curated(noise, tmp_path / "out", signal_record=signal)
    shutil.rmtree(tmp_path / "out/_state/commits")
    (tmp_path / "out/_SUCCESS").unlink()
    resumed = curated(noise, tmp_path / "out", lambda candidates: pytest.fail("asked again"), signal)
    (tmp_path / "out/curation/curation.json").unlink()
    resumed = curated(noise, tmp_path / "out", lambda candidates: pytest.fail("asked again"), signal)
    assert read_selection(resumed.store) == read_selection(whole.store)
    assert not verify(resumed.store).damage


def test_the_same_command_does_nothing_and_other_options_are_refused(home, copied, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in (copied / "curated").rglob("*") if path.is_file()}
    again = curated(
        copied / "run", copied / "curated", lambda candidates: pytest.fail("asked again"), SIGNAL, num_candidates=3
    )
    assert again.was_complete and again.num_selected == 4
    # A file of preferences that was moved is the same one.
    options, moved = SelectionOptions(num_candidates=3), replace(REWARD, name="moved.jsonl")
    assert find_curated(open_store(str(copied / "run")), options, str(copied / "curated"), moved).was_complete
    assert {path: path.stat().st_mtime_ns for path in before} == before
    for changed, line in (
        ({"seed": 1}, "curation.seed: 0 -> 1"),
        ({"num_candidates": 2}, "curation.candidates: 3 -> 2"),
        ({"among": "class"}, 'curation.among: "run" -> "class"'),
        ({"scale": 2.0}, "curation.scale: 1.0 -> 2.0"),
    ):
        with pytest.raises(OutputError, match="another curated run") as error:
            curated(copied / "run", copied / "curated", signal_record=SIGNAL, **{"num_candidates": 3} | changed)
        assert line in str(error.value)
    other = SignalRecord(reward=replace(REWARD, digest="other"))
    with pytest.raises(OutputError, match=r'reward\.digest: "abc" -> "other"'):
        curated(copied / "run", copied / "curated", signal_record=other, num_candidates=3)
    monkeypatch.setattr(Parent, "shards_digest", "of more samples")
    with pytest.raises(OutputError, match="RUN has other samples now"):
        curated(copied / "run", copied / "curated", signal_record=SIGNAL, num_candidates=3)


def test_a_curated_run_can_be_curated(home, tmp_path):
    """Its lineage goes on, and its candidates are what was selected before."""
    twice = curated(home / "curated", tmp_path / "twice", num_candidates=2)
    curation = read_curation(twice.store)
    assert (curation.num_candidates, curation.num_selected) == (4, 2)
    assert open_store(str(tmp_path / "twice")).absolute_address(curation.parent.uri) == str(home / "curated")
    first = read_curation(open_store(str(home / "curated"))).parent
    assert curation.ancestors == (replace(first, uri=""),)
    assert curation.parent.plan_digest == stored_plan(open_store(str(home / "curated")))[1].digest
    assert not verify(twice.store).findings


@pytest.mark.parametrize("version", [1, 2, 3])
def test_runs_of_every_schema_version(version, tmp_path):
    """With quotas, contexts, a joint prompt, failed and rejected samples; rows keep their version."""
    requests = [
        {"name": "between", "method": "boundary", "boundary": ["one", "two"], "count": 16},
        {"name": "all", "method": "prompt", "classes": "all", "count": 4, "contexts": ["", "red"], "max_attempts": "4x",
         "accept": {"risk": ">= 0"}},
    ]  # fmt: skip
    run = corpus_cases.make_run(tmp_path / "run", version=version, requests=requests)
    done = curated(run, tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert {row["schema_version"] for row in rows.values()} == {version}
    assert {row["status"] for row in rows.values()} == {"ok", "rejected", "failed"}
    assert not verify(done.store).findings and done.manifest["counts"]["quotas"] == {}
    assert done.manifest["counts"]["samples"]["accepted"] == done.num_selected == done.num_candidates // 4
    assert len(engine.open_run(str(tmp_path / "out")).samples) == done.num_selected


def test_runs_that_cannot_be_selected_from_are_refused(noise, tmp_path):
    unfinished = corpus_cases.make_run(tmp_path / "part", count=20, finish=False)
    torn = shutil.copytree(noise, tmp_path / "torn")
    next(iter(sorted(torn.glob("shards/*.tar")))).unlink()
    unlisted = shutil.copytree(noise, tmp_path / "unlisted")
    (unlisted / "metadata.parquet").write_bytes(b"PAR1")
    for run, kind, match in (
        (tmp_path / "nowhere", JobError, "there is no folder"),
        (unfinished, OutputError, "is not finished"),
        (torn, CorruptShardError, "is missing, but shard 0 is committed"),
        (unlisted, CorruptShardError, "cannot be read as the metadata"),
    ):
        with pytest.raises(kind, match=match):
            curated(run, tmp_path / "out")
        assert not (tmp_path / "out").exists()


def test_a_damaged_image_is_not_copied(noise, tmp_path):
    """The byte is inside an image, where sizes and ends of files show nothing."""
    run = shutil.copytree(noise, tmp_path / "run")
    tar = sorted(run.glob("shards/*.tar"))[1]
    data = bytearray(tar.read_bytes())
    data[600] ^= 1
    tar.write_bytes(data)
    with pytest.raises(CorruptShardError, match="is missing or not the one listed"):
        curated(run, tmp_path / "out")
    assert len(list((tmp_path / "out/_state/commits").iterdir())) == 1
    shutil.copy(sorted(noise.glob("shards/*.tar"))[1], tar)
    rows = tar.with_suffix(".parquet")
    data = bytearray(rows.read_bytes())
    data[600] ^= 1
    rows.write_bytes(data)
    with pytest.raises(CorruptShardError, match="is not the file that was committed"):
        curated(run, tmp_path / "out")
    shutil.copy(noise / "shards" / rows.name, rows)
    assert not verify(curated(run, tmp_path / "out").store).findings


@pytest.mark.parametrize(
    ("rewards", "options", "match"),
    [
        (by_class, {"num_candidates": 1000}, "--candidates: 1000 are one group, and the run has"),
        (by_class, {"num_candidates": 40, "among": "class"}, "the largest class has"),
        (by_class, {"num_candidates": 0}, "--candidates: 0"),
        (by_class, {"seed": -1}, "--seed"),
        (by_class, {"scale": float("nan")}, "--scale"),
        (by_class, {"among": "context"}, "--among: 'context' is not one of run, class"),
        (lambda candidates: [0.0], {}, "--reward: gives 1 rewards for"),
        (lambda candidates: ["good"] * len(candidates), {}, "something else than numbers"),
        (lambda candidates: [float("inf")] * len(candidates), {}, r"the reward of demo-000-mix-0000000\d is inf"),
        (lambda candidates: [1e308] * len(candidates), {"scale": 10.0}, "--scale: 10.0 makes rewards too large"),
    ],
)
def test_options_and_rewards_that_make_no_sense(rewards, options, match, noise, tmp_path):
    with pytest.raises(JobError, match=match):
        curated(noise, tmp_path / "out", rewards, **options)
    assert not (tmp_path / "out/shards").exists()


def test_outputs_that_hold_something_else_are_refused(home, noise, tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/notes.txt").write_text("mine")
    for output, match in (
        (noise, "the run itself"),
        (noise / "inside", "lies in it"),
        (home / "run", "holds a run that was not curated"),
        (home / "curated", "another curated run"),
        (tmp_path / "notes", "files that are not of a run"),
    ):
        with pytest.raises(OutputError, match=match):
            curated(noise, output)
    assert not verify(open_store(str(home / "curated"))).findings
    with hold(open_store(str(tmp_path / "owned"))), pytest.raises(OwnedError):
        curated(noise, tmp_path / "owned")


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda run: (run / "curation/curation.json").unlink(), "curation/curation.json: is missing or not whole"),
        (lambda run: (run / "curation/selection.parquet").unlink(), "curation.json: is missing or not whole"),
        (lambda run: (run / "curation/suspects.jsonl").write_bytes(b""), "suspects.jsonl: is missing or not the file"),
        (lambda run: change_document(run, seed=1), "is of another curation than the plan"),
        (lambda run: change_document(run, mean_reward=0.5), "states another curation"),
        (lambda run: change_document(run, among="nowhere"), "is not that of a curated run"),
        (lambda run: swap_selected(run), "selects other samples"),
        (lambda run: make_pipe(run), r"is not the selection of a curated run \(.*is a pipe"),
    ],
)
def test_verify_finds_damage_of_what_was_drawn(damage, match, copied):
    damage(copied / "curated")
    assert any(re.search(match, finding.text) for finding in verify(open_store(str(copied / "curated"))).damage)


def make_pipe(run: Path) -> None:
    (run / "curation/selection.parquet").unlink()
    os.mkfifo(run / "curation/selection.parquet")


def change_document(run: Path, **changes: Any) -> None:
    path = run / "curation/curation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def swap_selected(run: Path) -> None:
    """Select another sample of the first group, with a checksum that agrees."""
    selection = parse_selection((run / "curation/selection.parquet").read_bytes())
    first = [place for place, group in enumerate(selection.groups) if group == 0]
    taken = next(place for place in first if selection.selected[place])
    other = next(place for place in first if place != taken)
    flags = [place == other or (is_selected and place != taken) for place, is_selected in enumerate(selection.selected)]
    data = selection_bytes(replace(selection, selected=tuple(flags)))
    (run / "curation/selection.parquet").write_bytes(data)
    path = run / "curation/curation.json"
    document = json.loads(path.read_text())
    document["files"]["selection.parquet"] = hashlib.sha256(data).hexdigest()
    path.write_text(json.dumps(document))


def test_lost_files_and_shards_are_made_again(noise, tmp_path):
    """By the same command, as `repair` and `verify` say; bytes are equal."""
    out = tmp_path / "out"
    signal = SignalRecord(reward=REWARD, files={"suspects.jsonl": b"{}\n"})
    curated(noise, out, signal_record=signal)
    before = files_of(out)
    (out / "curation/suspects.jsonl").unlink()
    (out / "curation/selection.parquet").unlink()
    (out / "shards/demo-000001.tar").write_bytes(b"")
    store = open_store(str(out))
    with pytest.raises(CorruptShardError, match="`riskforge curate` with the same options makes them again"):
        curated(noise, out, signal_record=signal)
    assert repair(store).to_make == (1,)
    curated(noise, out, signal_record=signal)
    assert files_of(out) == before and not verify(store).damage
    (out / "curation/curation.json").unlink()
    (out / "curation/selection.parquet").unlink()
    with pytest.raises(CorruptShardError, match="was selected by other rewards"):
        curated(noise, out, lambda candidates: [float(index) for index in candidates.class_indices], signal)
    curated(noise, out, signal_record=signal)
    assert files_of(out) == before and not verify(store).damage
    (out / "curation/suspects.jsonl").write_bytes(b"changed")
    with pytest.raises(CorruptShardError, match="the same options give another one"):
        (out / "_SUCCESS").unlink()
        curated(noise, out, signal_record=replace(signal, files={"suspects.jsonl": b"other"}))


def test_a_selection_reads_back_and_anything_else_is_refused(home):
    data = (home / "curated/curation/selection.parquet").read_bytes()
    selection = parse_selection(data)
    assert selection_bytes(selection) == data
    keys, groups, flags = selection.keys, selection.groups, selection.selected
    table = pq.read_table(io.BytesIO(data))
    for other in (table.drop_columns(["group"]), table.append_column("more", table["group"]), table.slice(0, 0).cast(
        pa.schema([field.with_nullable(True) for field in table.schema])
    )):  # fmt: skip
        pq.write_table(other, buffer := io.BytesIO())
        with pytest.raises(ValueError, match="columns are others"):
            parse_selection(buffer.getvalue())
    for changes in (
        {"keys": (keys[0], keys[0], *keys[2:])},
        {"keys": ("../key", *keys[1:])},
        {"groups": tuple(0 for _ in groups)},
        {"selected": tuple(not flag for flag in flags)},
        {"selected": tuple(False for _ in flags)},
        {"rewards": (math.nan, *selection.rewards[1:])},
    ):
        with pytest.raises(ValueError):
            parse_selection(selection_bytes(replace(selection, **changes)))
    for torn in (b"", data[:-9], b"PAR1" + data[20:]):
        with pytest.raises(ValueError):
            parse_selection(torn)


def test_a_curation_reads_back_and_anything_else_is_refused(home):
    """Every field of the document missing, of another type, or added: a document is from outside."""
    document = json.loads((home / "curated/curation/curation.json").read_text())
    curation = parse_curation(document)
    assert isinstance(curation, Curation) and curation.to_document() == document
    num_refused = 0
    for path in places(document):
        for value in (None, [], {}, "text", "x" * 5000, -1, True, math.inf):
            if not is_allowed(path, value):
                with pytest.raises(ValueError):
                    parse_curation(changed(document, path, lambda part, key, value=value: part.__setitem__(key, value)))
                num_refused += 1
        if isinstance(path[-1], str) and path != ("files", "suspects.jsonl"):
            with pytest.raises(ValueError):
                parse_curation(changed(document, path, lambda part, key: part.pop(key)))
            with pytest.raises(ValueError):
                parse_curation(changed(document, path, lambda part, key: part.__setitem__("more", 0)))
    assert num_refused > 300


def changed(document: Any, path: tuple[Any, ...], change: Callable[[Any, Any], object]) -> Any:
    """A copy of a document in which the value at a path is changed."""
    part = whole = json.loads(json.dumps(document))
    for step in path[:-1]:
        part = part[step]
    change(part, path[-1])
    return whole


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Paths of all values in a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, part in inner for place in ((*path, key), *places(part, (*path, key)))]


def is_allowed(path: tuple[Any, ...], value: Any) -> bool:
    """Whether a value is one that the field may have."""
    field = path[-1]
    if value is None:
        return field in ("monitor", "accuracy", "correlation", "covariance")
    if value == [] or value == {}:
        return field == "ancestors" and value == []
    if isinstance(value, str):
        texts = ("uri", "name", "plan_digest", "shards_digest", "kind", "digest", "model", "defence", "after")
        return len(value) < 5000 and (field in texts or (path[0] == "files" and len(path) == 2))
    if value is True:
        return field == "alarm"
    numbers = (
        "mean_reward",
        "mean_reward_selected",
        "value",
        "low",
        "high",
        "e_value",
        "highest",
        "covariance",
        "scale",
    )
    return field in numbers and value == -1


def test_a_manifest_of_no_curated_run_has_no_curation(home):
    manifest = json.loads((home / "run/manifest.json").read_text())
    assert "curation" not in manifest and curation_of(manifest) is None
    with pytest.raises(ValueError):
        curation_of(manifest | {"curation": {}})


def test_commands_on_a_curated_run(home, copied, call, tmp_path):
    """Each reads it as a run, and those that show runs say where it comes from and what its monitor says."""
    run, said = str(copied / "curated"), {}
    for name, *arguments in (
        ("verify", run),
        ("status", run),
        ("inspect", run),
        ("compare", str(copied / "run"), run),
        ("report", run),
        ("merge", run, "--output", str(tmp_path / "merged")),
        ("export", run, "--output", str(tmp_path / "exported"), "--format", "imagefolder"),
        ("rescore", run, "--target", "zoo:digits/classifier-b"),
        ("repair", run),
    ):
        code, out, err = call(name, *arguments)
        assert code == 0, (name, out, err)
        said[name] = out
    for name in ("status", "inspect", "compare"):
        assert "e-value 31.2" in said[name] and "ALARM" in said[name], said[name]
        assert "4 of 12 candidates" in said[name] and "../run" in said[name]
    assert "8 pairs" in said["compare"]
    assert "4 images in" in said["merge"] and "nothing to repair" in said["repair"]
    assert len(list((tmp_path / "exported").rglob("*.jpg"))) == 4
    document = json.loads(call("compare", str(copied / "run"), run, "--json")[1])
    assert document["new"]["curation"]["monitor"]["alarm"] and "curation" not in document["old"]
    assert json.loads(call("status", run, "--json")[1])["curation"]["num_candidates"] == 12
    assert "curation" not in json.loads(call("status", str(copied / "run"), "--json")[1])
    assert "curation" in json.loads(call("inspect", run, "--json")[1])["runs"][0]


def test_images_of_a_curated_run_have_the_scores_that_are_stored(home, call):
    code, out, err = call("verify", str(home / "curated"), "--deep")
    assert code == 0 and "no damage" in out, (out, err)


def test_nothing_is_sampled_into_a_curated_run(copied, call):
    """`run` and `retry` say what to do; `--resume overwrite` removes it as any run, with its folder `curation`."""
    output = ("--output", str(copied / "curated"))
    before = files_of(copied / "curated")
    for arguments in (("run", copied / "job.yaml", *output, "--executor", "local"), ("retry", copied / "curated")):
        code, _, err = call(*map(str, arguments))
        assert code and "holds a curated run" in err and "riskforge curate" in err
    code, _, err = call("run", str(copied / "job.yaml"), *output, "--resume", "overwrite", "--executor", "local")
    assert code and "add --yes" in err
    assert files_of(copied / "curated") == before and not verify(open_store(str(copied / "curated"))).findings
    store = open_store(str(copied / "curated"))
    job, plan = stored_plan(open_store(str(copied / "run")))
    (copied / "curated/curation/notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"notes\.txt"):
        open_output(store, plan, job, "overwrite", confirmed=True)
    (copied / "curated/curation/notes.txt").unlink()
    open_output(store, plan, job, "overwrite", confirmed=True)
    assert not (copied / "curated/curation").exists() and not store.list("shards")


def test_damage_is_reported_with_the_command_that_mends_it(copied, call):
    (copied / "curated/shards/small-000001.tar").write_bytes(b"")
    code, out, _ = call("status", str(copied / "curated"))
    assert "`riskforge curate` with the same options makes them again" in out
    code, out, _ = call("verify", str(copied / "curated"))
    assert code == EXIT_DAMAGED and "small-000001.tar" in out
    _, out, _ = call("repair", str(copied / "curated"))
    assert "1 shards are missing now; `riskforge curate` with the same options makes them again" in out
    (copied / "curated/README.md").unlink()
    curated(copied / "run", copied / "curated", signal_record=SIGNAL, num_candidates=3)
    code, out, _ = call("verify", str(copied / "curated"))
    assert code == 0, out


def test_report_and_card_of_a_curated_run(home):
    """The names of users are escaped in both; the card of its parent has no such section."""
    page = (home / "curated/report.html").read_text(encoding="utf-8")
    section = page[page.index('<section id="curation">') : page.index('<section id="distributions">')]
    assert "raised an alarm" in section and "4 of 12 candidates" in section and "e-value 31.2" in section
    assert "prefs &lt;b&gt;" in section and "<b>`x`" not in page
    assert section.count('class="bar s0"') == section.count('class="bar s1"')
    assert '<section id="curation">' not in (home / "run/report.html").read_text(encoding="utf-8")
    card = (home / "curated/README.md").read_text(encoding="utf-8")
    assert "selected from another run" in card and "`../run, job small" in card and "``prefs <b>`x`" in card
    assert "## Curation" not in (home / "run/README.md").read_text(encoding="utf-8")


def test_a_run_names_what_its_model_was_fine_tuned_on(home, call):
    """By the folder of the model; its curated run names it too, and every page escapes it."""
    model = {name: TRAINING["parent_model"][name] for name in ("address", "digest")}
    stated = {"parent_run": TRAINING["parent_run"], "parent_model": model}
    for run in ("run", "curated"):
        [described] = json.loads((home / run / "manifest.json").read_text())["models"]["diffusion"]
        assert described["trained_on"] == stated
        page = (home / run / "report.html").read_text(encoding="utf-8")
        assert "fine-tuned on the run ../&lt;i&gt;earlier" in page and "<i>earlier" not in page
        assert (
            "`fine-tuned on the run ../<i>earlier</i>, small, plan p0, from" in (home / run / "README.md").read_text()
        )
        assert "fine-tuned on the run ../<i>earlier</i>" in call("inspect", str(home / run))[1]


def test_what_others_wrote_into_a_manifest_is_refused_or_shown(copied, call):
    """A curation or a training of another kind ends in a sentence, in every command that shows it."""
    path = copied / "curated/manifest.json"
    manifest = json.loads(path.read_text())
    for changes in ({"curation": {"parent": "\x1b[31m"}}, {"curation": 3}):
        path.write_text(json.dumps(manifest | changes))
        for command in (("report",), ("compare", str(copied / "run")), ("verify",)):
            code, out, err = call(*command, str(copied / "curated"))
            assert code and "Traceback" not in err and "\x1b" not in out + err, (command, err)
            assert "manifest.json" in out + err or "cannot be read as a run" in err
    manifest["models"]["diffusion"][0]["trained_on"] = {"parent_run": {"plan_digest": ["\x1b[31m"]}}
    path.write_text(json.dumps(manifest))
    code, out, err = call("inspect", str(copied / "curated"))
    assert not code and "parent_run.plan_digest is not a text" in out and "\x1b" not in out + err
    code, _, err = call("report", str(copied / "curated"))
    assert code and "manifest.json" in err and "Traceback" not in err


def test_a_curated_run_on_an_object_store(noise, tmp_path, s3_server):
    """From a folder to S3 and from there to a folder; bytes are those of a local one, addresses are whole."""
    local, remote = curated(noise, tmp_path / "out"), curated(noise, f"s3://{BUCKET}/curated")
    tars = [name for name in local.store.list("shards") if name.endswith((".tar", ".parquet"))]
    assert [remote.store.read(name) for name in tars] == [local.store.read(name) for name in tars]
    assert read_selection(remote.store) == read_selection(local.store)
    assert read_curation(remote.store).parent.uri == str(noise)
    assert not verify(remote.store).findings and curated(noise, remote.store.uri).was_complete
    twice = curated(remote.store.uri, tmp_path / "twice", num_candidates=2)
    assert read_curation(twice.store).parent.uri == remote.store.uri and not verify(twice.store).findings
