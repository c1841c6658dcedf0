"""Twins and starts of a real run of the digits zoo: what is stored of them, what is measured, and who reads it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import PIL.Image
import pyarrow.parquet as pq
import pytest
import torch
import webdataset
import yaml

from engine import cli
from engine.data.images import Unusable, open_images
from engine.data.images.decode import decode_sample
from engine.data.run.commits import read_commits
from engine.data.run.companions import COMPANIONS
from engine.data.run.shard_writing import sample_members, tar_member
from engine.data.run.shards import read_shard
from engine.data.run.stored_plan import stored_plan
from engine.data.run.verify import verify
from engine.data.stores.opening import open_store
from engine.driver.checks import check_job
from engine.driver.cost import BYTES_PER_RECORD, job_cost
from engine.driver.progress import PlainDisplay
from engine.errors import CorruptShardError
from engine.generation.generator import Generator
from engine.generation.notices import Notices
from engine.generation.pairs import no_twin, psnr_db
from engine.generation.rescorer import rescore
from engine.generation.results import NOT_FINITE, ImageBatch, SampledImages
from engine.generation.scorer import Scorer
from engine.job.acceptance import is_accepted
from engine.job.parsing import parse_job
from engine.job.records import STARTS, TWINS
from engine.methods.guidance.rules import GradientHealth
from engine.models.classifier import Classifier
from engine.models.clip import Clip
from engine.models.pipelines.safety import FLAGGED
from engine.studies.rescore.program import rescore_run
from tests.composed import TARGET
from tests.curated_cases import curated, files_of, killed_at
from tests.image_cases import DIGITS
from tests.poisoned import overflowing_when_bright, poisoned

START = {"images": "digits:test", "strength": 0.5}
SHARED: dict[str, Any] = {"classes": [3, 8], "count": 2, "seed_group": "shared", "start": START}
JOB: dict[str, Any] = {
    "name": "pairs",
    "models": {
        "diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip", "target": "zoo:digits/classifier",
    },
    "requests": [
        {"name": "risky", "method": "risky", "twin": True} | SHARED,
        {"name": "plain", "method": "prompt"} | SHARED,
        # Of its attempts some are far from their twins.
        {"name": "near", "method": "boundary", "boundary": [3, 8], "twin": True, "count": 2, "max_attempts": "4x",
         "accept": {"twin_psnr_db": ">= 36", "twin_distance": "< 1"}},
    ],
    "sampling": {"num_inference_steps": 4, "scheduler": "ddim"},
    "guidance": {"boundary": {"preset": "adversarial", "every": 1}},
    "runtime": {"device": "cpu"},
}  # fmt: skip
PLAN = "_state/plan/000000.json"
Stored = dict[str, tuple[bytes, dict[str, Any]]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with starts, twins, and a quota of which rejected samples are not stored."""
    home = tmp_path_factory.mktemp("pairs")
    output = {"uri": str(home / "run"), "samples_per_shard": 4, "store_rejected": False}
    (home / "job.yaml").write_text(yaml.safe_dump(JOB | {"output": output}))
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr("sys.argv", ["riskforge", "run", str(home / "job.yaml"), "--executor", "local"])
        cli.main()
    assert not end.value.code
    return home / "run"


def stored(run: Path, folder: str) -> Stored:
    tars = sorted((run / folder).glob("*.tar"))
    return {key: (image, record) for tar in tars for key, image, record, _ in read_shard(tar)}


def rows_of(run: Path) -> list[dict[str, Any]]:
    return pq.read_table(run / "metadata.parquet").to_pylist()


def of_request(samples: Stored, name: str) -> Stored:
    return {key: sample for key, sample in samples.items() if sample[1]["request"] == name}


def test_a_twin_is_the_sample_that_the_prompt_alone_makes(run: Path) -> None:
    """Image byte for byte, and every field of its record but key and request, from the same noise and start."""
    twins, plain = of_request(stored(run, TWINS), "risky"), of_request(stored(run, "shards"), "plain")
    assert len(twins) == len(plain) == 4
    for (image, twin), (other, sample) in zip(twins.values(), plain.values(), strict=True):
        assert image == other
        assert twin | {"key": "", "request": ""} == sample | {"key": "", "request": ""}
        assert twin["start_key"] and twin["start_distance"] > 0


def test_what_is_measured_of_two_images_is_measured_of_the_stored_ones(run: Path) -> None:
    """By numpy and the CLIP model alone; what the target says of a twin is in the twin's own record."""
    clip, samples = Clip.load("zoo:digits/clip"), stored(run, "shards")
    twins, starts = stored(run, TWINS), stored(run, STARTS)
    assert set(twins) == {key for key, (_, record) in samples.items() if record["request"] != "plain"}
    assert set(starts) == {key for key, (_, record) in samples.items() if record["request"] != "near"}

    def distance(first: bytes, second: bytes) -> float:
        one, other = clip.image_embeds([decode_sample(first), decode_sample(second)])
        return 1 - float(torch.cosine_similarity(one, other, dim=0))

    for key, (image, record) in samples.items():
        twin, start = twins.get(key), starts.get(key)
        if start is not None:
            assert record["start_distance"] == pytest.approx(distance(image, start[0]), abs=1e-5)
            assert (start[1]["start_key"], start[1]["start_sha256"]) == (record["start_key"], record["start_sha256"])
            assert (start[1]["method"], start[1]["scored"]) == ("real", False) and record["strength"] == 0.5
        if twin is None:
            assert {name: record[name] for name in no_twin()} == no_twin()
            continue
        pixels, others = (np.asarray(decode_sample(one), float) for one in (image, twin[0]))
        assert record["twin_psnr_db"] == pytest.approx(
            10 * np.log10(255**2 / ((pixels - others) ** 2).mean()), abs=1e-4
        )
        assert record["twin_distance"] == pytest.approx(distance(image, twin[0]), abs=1e-5)
        assert (record["twin_key"], record["twin_risk"]) == (key, twin[1]["risk"])
        assert record["twin_predicted_class"] == twin[1]["predicted_class"] and twin[1]["method"] == "prompt"


def test_psnr_of_equal_images_is_a_number() -> None:
    white, black = (PIL.Image.new("RGB", (8, 8), color) for color in ("white", "black"))
    assert psnr_db(white, white) == 100.0 and psnr_db(white, black) == 0.0


def test_real_images_are_not_marked_as_synthetic(run: Path) -> None:
    """All others are."""
    for folder, marked in (("shards", True), (TWINS, True), (STARTS, False)):
        assert {b"trainedAlgorithmicMedia" in image for image, _ in stored(run, folder).values()} == {marked}
    items = list(open_images(str(run / STARTS), DIGITS).read())
    assert not any(item.is_synthetic for item in items) and len(items) == 8


def test_a_start_that_a_model_made_stays_marked(run: Path, tmp_path: Path) -> None:
    """Samples of a run are no photographs, also where others start from them."""
    raw = JOB | {"output": {"uri": str(tmp_path / "run")}, "requests": [JOB["requests"][1] | {"count": 1}]}
    marked = []
    for images in (run / "shards", run / STARTS):
        raw["requests"][0] |= {"start": START | {"images": str(images)}}
        checked = check_job(parse_job(raw), PlainDisplay(io.StringIO()), lambda: None)
        results = Generator(checked.job, checked.plan).next_batch(0, [checked.plan.requests[0].sample(0)])
        marked.append([b"trainedAlgorithmicMedia" in one.companions[STARTS].image() for one in results])
    assert marked == [[True], [False]]


@pytest.mark.parametrize("folder", ["shards", *COMPANIONS])
def test_webdataset_reads_each_folder(run: Path, folder: str) -> None:
    """One set of members each, under the same keys."""
    urls = sorted(map(str, (run / folder).glob("*.tar")))
    read = list(webdataset.WebDataset(urls, shardshuffle=False).decode("pil").to_tuple("__key__", "png", "json", "cls"))
    assert [(key, record, label) for key, _, record, label in read] == [
        (key, record, record["class_index"]) for key, (_, record) in stored(run, folder).items()
    ]
    assert {image.size for _, image, _, _ in read} == {(32, 32)}


def test_a_run_as_a_set_of_images_is_its_samples(run: Path) -> None:
    """Starts and twins are none of them, and no files that nobody knows."""
    items = list(open_images(str(run), DIGITS).read())
    surplus = [item for item in items if isinstance(item, Unusable)]
    assert len(items) == len(stored(run, "shards")) and all("beyond" in item.reason for item in surplus)


def test_what_is_rejected_has_no_companion(run: Path) -> None:
    """Its row keeps what was measured of both; accepted are those that the rule on the twin accepts."""
    rows = [row for row in rows_of(run) if row["request"] == "near"]
    assert {row["status"] for row in rows} == {"ok", "rejected"}
    for row in rows:
        assert row["accepted"] == (row["twin_psnr_db"] >= 36) == bool(row["sha256"])
        assert row["twin_key"] == row["key"] and row["twin_distance"] >= 0
    assert set(of_request(stored(run, TWINS), "near")) == {row["key"] for row in rows if row["accepted"]}


def test_a_score_that_is_absent_is_accepted_by_no_rule() -> None:
    record = {"twin_psnr_db": -1.0, "start_distance": -1.0}
    for name in record:
        assert not is_accepted({name: "< 5"}, record, (3,)) and not is_accepted({name: "> -2"}, record, (3,))
        assert is_accepted({name: "< 5"}, record | {name: 0.0}, (3,))


def test_manifest_and_card_count_companions(run: Path) -> None:
    """And the size of a plan counts their images."""
    manifest, card = json.loads((run / "manifest.json").read_text()), (run / "README.md").read_text()
    for kind in COMPANIONS:
        tars = sorted((run / kind).glob("*.tar"))
        size = sum(tar.stat().st_size for tar in tars)
        images = len(stored(run, kind))
        assert manifest["companions"][kind] == {"folder": kind, "images": images, "tars": len(tars), "bytes": size}
        assert f"`{kind}/*.tar`" in card and f"{images} " in card
    listed = {shard["name"]: shard.get("companions", {}) for shard in manifest["shards"]}
    assert listed == {
        record.name: {kind: {"bytes": one.bytes, "sha256": one.sha256} for kind, one in record.companions.items()}
        for record in read_commits(open_store(str(run)))
    }
    assert "No image is a photograph" not in card and "Every other file says so itself" in card
    job, plan = stored_plan(open_store(str(run)))
    sizes = [
        (one.num_bytes - one.num_samples * BYTES_PER_RECORD) / one.num_samples for one in job_cost(job, plan).requests
    ]
    assert [round(size / sizes[1], 3) for size in sizes] == [1.5, 1.0, 1.0]


def test_verify_scores_twins_again(run: Path, tmp_path: Path) -> None:
    """Every byte, and every score from the stored images; two twins exchanged are found by what is measured of them."""
    assert not verify(open_store(str(run))).findings and not rescore(open_store(str(run)))
    copy = open_store(str(shutil.copytree(run, tmp_path / "copy")))
    path = copy.path(f"{TWINS}/pairs-000000.tar")
    pixels = {key: image for key, image, _, _ in read_shard(path)}
    first, second, *_ = pixels
    data = path.read_bytes()
    path.chmod(0o644)
    # Of different lengths: the archive is written anew.
    exchanged = pixels | {first: pixels[second], second: pixels[first]}
    members = [
        tar_member(name, part)
        for key, _, record, _ in read_shard(path)
        for name, part in sample_members(record, exchanged[key], "png")
    ]
    path.write_bytes(b"".join(members) + bytes(10240))
    assert data != path.read_bytes()
    found = [finding.text for finding in rescore(copy)]
    assert {text.partition(":")[0] for text in found} == {first, second} and all(
        "twin_psnr_db" in text for text in found
    )


def test_another_target_sees_the_twins_too(run: Path, tmp_path: Path) -> None:
    """What it says of the stored twin; without an image there is nothing to say, and what it does not measure stays."""
    rescored = rescore_run(str(run), "zoo:digits/classifier-b", output=str(tmp_path / "rescored"))
    other, twins, labels = Classifier.load("zoo:digits/classifier-b"), stored(run, TWINS), stored(run, TWINS)
    before = {row["key"]: row for row in rows_of(run)}
    for row in rows_of(Path(rescored.folder)):
        old = before[row["key"]]
        if row["key"] not in twins:
            assert {name: row[name] for name in no_twin()} == no_twin() | {"twin_key": old["twin_key"]}
            continue
        log_p = other.score([decode_sample(twins[row["key"]][0])]).log_softmax(1)[0]
        label = labels[row["key"]][1]["class_index"]
        assert row["twin_risk"] == pytest.approx(-float(log_p[label]), abs=1e-4)
        assert row["twin_predicted_class"] == int(log_p.argmax())
        for name in ("twin_key", "twin_psnr_db", "twin_distance", "start_key", "start_distance", "strength"):
            assert row[name] == old[name]


def test_a_curated_run_copies_the_companions_of_what_it_selects(run: Path, tmp_path: Path) -> None:
    """Byte for byte, also where it was killed around their publishing; a damaged tar of the parent is refused."""
    copy = shutil.copytree(run, tmp_path / "run")
    curated(copy, tmp_path / "curated")
    selected = {row["key"] for row in rows_of(tmp_path / "curated") if row["accepted"]}
    for kind in COMPANIONS:
        parent = stored(copy, kind)
        kept = stored(tmp_path / "curated", kind)
        assert kept == {key: sample for key, sample in parent.items() if key in selected} and len(kept) < len(parent)
    assert not verify(open_store(str(tmp_path / "curated"))).findings
    for number in (7, 10):
        assert killed_at(copy, tmp_path / f"killed-{number}", number)
        curated(copy, tmp_path / f"killed-{number}")
        whole, resumed = (files_of(tmp_path / name) for name in ("curated", f"killed-{number}"))
        # The plan has the address of the output.
        assert whole | {PLAN: b""} == resumed | {PLAN: b""}
    (copy / TWINS / "pairs-000000.tar").unlink()
    with pytest.raises(CorruptShardError, match=r"twins/pairs-000000\.tar"):
        curated(copy, tmp_path / "damaged")


def make_batch(
    run: Path, number: int, *, target: str = TARGET, store_rejected: bool = False, **kept: Any
) -> ImageBatch:
    """Two samples of a request, one with a bright twin, the other with one that is much like it."""
    job, plan = stored_plan(open_store(str(run)))
    job = job.model_copy(update={"output": job.output.model_copy(update={"store_rejected": store_rejected})})
    pixels = np.random.default_rng(0).integers(55, 65, (2, 32, 32, 3), dtype=np.uint8)
    images = SampledImages(
        specs=[plan.requests[number].sample(position) for position in range(2)],
        num_samples=2,
        pixels=pixels,
        is_finite=[True, True],
        health=GradientHealth.of(2),
        draws=[],
        twins=pixels + np.array([190, 3], dtype=np.uint8)[:, None, None, None],
        is_twin_finite=kept.get("is_twin_finite", [True, True]),
    )
    scorer = Scorer(Classifier.load(target), Clip.load("zoo:digits/clip"))
    batch = ImageBatch(images, job, plan, number, scorer, kept.get("checker"), kept.get("notices", Notices()))
    batch.preprocess()
    return batch


@pytest.mark.parametrize("fault", ["not finite", "flagged", "no score"])
def test_a_twin_with_a_fault_leaves_its_sample(run: Path, fault: str, tmp_path: Path) -> None:
    """It is neither stored nor measured, and a notice says why; the other twin of the batch is."""
    target, notices = TARGET, Notices()
    if fault == "no score":
        target = poisoned(TARGET, tmp_path / "bad", overflowing_when_bright)
    checker = SimpleNamespace(
        preprocess=lambda images: torch.tensor([float(np.mean(image)) for image in images]),
        faults_of=lambda means: [FLAGGED if mean > 128 else "" for mean in means],
    )
    batch = make_batch(
        run,
        0,
        target=target,
        checker=checker if fault == "flagged" else None,
        notices=notices,
        is_twin_finite=[fault != "not finite", True],
    )
    alone, both = batch.score()
    assert alone.record["status"] == both.record["status"] == "ok"
    assert {name: alone.record[name] for name in no_twin()} == no_twin() and TWINS not in alone.companions
    assert both.record["twin_psnr_db"] == pytest.approx(10 * np.log10(255**2 / 9), abs=1e-4)
    assert decode_sample(both.companions[TWINS].image()).size == (32, 32)
    [text] = notices.take()
    reason = {"not finite": NOT_FINITE, "flagged": FLAGGED, "no score": "models.target '"}[fault]
    assert text.startswith(f"requests.0: a twin was left out: {reason}")


@pytest.mark.parametrize("store_rejected", [False, True])
def test_a_rejected_sample_and_its_twin_are_stored_together(run: Path, store_rejected: bool) -> None:
    rejected, accepted = make_batch(run, 2, store_rejected=store_rejected).score()
    assert (rejected.record["status"], accepted.record["status"]) == ("rejected", "ok")
    assert bool(rejected.image) == (TWINS in rejected.companions) == store_rejected and TWINS in accepted.companions
    assert rejected.record["twin_key"] == rejected.record["key"]
