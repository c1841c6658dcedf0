"""The evaluation of a run: planted copies are found, distances order what they should, failures fall into clusters.

The run's images are composed digits, so that it is known which of them are copies; its scores are real ones.
"""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest
import torch

from engine import cli
from engine.data.images import ImageSource, LabelledImage, digits
from engine.data.images.encoding import encode
from engine.data.run.commit_shard import commit_shard
from engine.data.run.file_names import EVALUATION
from engine.data.run.finalise import finalise
from engine.data.run.resume import open_output
from engine.data.run.shard_writing import stage_shard
from engine.data.run.shards import shard_name
from engine.data.stores.base import Store
from engine.data.stores.lease import hold
from engine.data.stores.opening import open_store
from engine.driver.progress import PlainDisplay
from engine.errors import EXIT_OWNED, EXIT_USER, CorruptShardError, JobError, OutputError
from engine.generation.loading import load_scorer
from engine.job.parsing import parse_job
from engine.job.plan import Plan, build_plan
from engine.job.records import SampleResult
from engine.job.spec import JobSpec
from engine.models.digests import model_digest
from engine.models.library_logging import quiet_libraries
from engine.report.data import open_metadata
from engine.report.evaluation import Evaluation, read_evaluation
from engine.report.render import write_report
from engine.studies.evaluate import image_features
from engine.studies.evaluate.clusters import cluster, nearest_texts, neighbourhood
from engine.studies.evaluate.extractors import Inception, find_inception
from engine.studies.evaluate.image_features import pixel_distances, small_pixels
from engine.studies.evaluate.image_registry import ImageRegistry
from engine.studies.evaluate.inputs import draw_images
from engine.studies.evaluate.options import EvaluateOptions
from engine.studies.evaluate.program import evaluate
from engine.studies.evaluate.quality import match_classes
from engine.studies.evaluate.summary_lines import summary_lines
from engine.studies.output_folders import check_folder, check_results

RUN = {"batch_size": 4, "duration_seconds": 0.1, "attempt": 1, "worker": "w0"}
HOSTILE = "\x1b[31m<script>alert(1)</script>\u202e"
REQUESTS = ("copied", "noised", "fresh", "inverted", "between")
NUM_TRAIN, NUM_REAL = 400, 300


class Drawn:
    """Images for the samples of a run, taken in order from composed digits of their class."""

    def __init__(self) -> None:
        self.train = digits.compose_split("train", NUM_TRAIN, seed=5)
        self.fresh = digits.compose_split("validation", 400, seed=6)
        self._taken: dict[tuple[str, int], int] = {}

    def pixels(self, request: str, index: int) -> np.ndarray:
        """An image for a request and class: of the training set, like it, or neither."""
        source = self.train if request in ("copied", "noised") else self.fresh
        place = self._taken.get((request, index), 0)
        self._taken[request, index] = place + 1
        image = source.images[np.flatnonzero(source.labels == index)[place]]
        if request == "noised":
            noise = np.random.default_rng(place).normal(0, 2, image.shape)
            return np.clip(image + noise, 0, 255).round().astype(np.uint8)
        return 255 - image if request == "inverted" else image


def make_job(uri: Path) -> JobSpec:
    models = {"diffusion": "zoo:digits/stable-diffusion", "clip": "zoo:digits/clip", "target": "zoo:digits/classifier"}
    requests: list[dict[str, Any]] = [
        {
            "name": name,
            "method": "prompt",
            "classes": "all",
            "count": 6,
            "contexts": [HOSTILE if name == "fresh" else ""],
        }
        for name in REQUESTS[:4]
    ]
    requests[3]["method"] = "risky"
    requests.append({"name": "between", "method": "boundary", "boundary": ["three", "eight"], "count": 12})
    return parse_job(
        {
            "name": "judged", "models": models, "requests": requests,
            "output": {"uri": str(uri), "samples_per_shard": 60},
        }
    )  # fmt: skip


@pytest.fixture(scope="module")
def drawn() -> Drawn:
    return Drawn()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, drawn: Drawn) -> Store:
    """A finished run without a report."""
    quiet_libraries()
    folder = tmp_path_factory.mktemp("evaluate") / "run"
    job = make_job(folder)
    digests = {"clip": model_digest(job.models.clip), "target": model_digest(job.models.target)}
    plan = build_plan(job, digits.CLASS_NAMES, {"diffusion": {job.models.diffusion: "d"}, "transfer": []} | digests)
    store = open_store(str(folder))
    plan = open_output(store, plan, job, "auto", confirmed=False)
    scorer = load_scorer(job)
    for shard in plan.shards():
        specs = list(plan.samples(shard))
        pixels = [drawn.pixels(spec.request, spec.cell.classes[spec.index % len(spec.cell.classes)]) for spec in specs]
        records = scorer.records(specs, [PIL.Image.fromarray(one) for one in pixels])
        results = [SampleResult(record, encode(one, "png"), RUN) for record, one in zip(records, pixels, strict=True)]
        name = shard_name(job.name, shard.number)
        staged = stage_shard(store.staging(), name, results, "png")
        commit_shard(store, plan.digest, shard, name, staged, 1, "w0", {"total_seconds": 1.0})
    close(store, job, plan)
    return store


def close(store: Store, job: JobSpec, plan: Plan) -> None:
    target = {"address": job.models.target, "digest": model_digest(job.models.target), "labels": digits.CLASS_NAMES}
    about = {"target": target, "diffusion": {"address": job.models.diffusion, "digest": "d"}}
    finalise(store, job, plan, models=about, timing={}, versions={}, hardware={})


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, drawn: Drawn) -> dict[str, str]:
    """Folders by class of the training images and of held-out ones."""
    home = tmp_path_factory.mktemp("data")
    for name, some in (("train", drawn.train), ("real", digits.compose_split("test", NUM_REAL, seed=7))):
        for place, (image, label) in enumerate(zip(some.images, some.labels, strict=True)):
            path = home / name / digits.CLASS_NAMES[label] / f"{place:04d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(image, "png"))
    return {name: str(home / name) for name in ("train", "real")}


@pytest.fixture(scope="module")
def evaluated(
    finished: Store, folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Store, Evaluation]:
    """Everything at once, with the report, in a copy of the run."""
    store = open_store(str(shutil.copytree(finished.root, tmp_path_factory.mktemp("copy") / "run")))
    options = EvaluateOptions(real=folders["real"], train=folders["train"], reference="fresh")
    return store, evaluate(store.uri, options, display=PlainDisplay(io.StringIO())).evaluation


def test_planted_copies_are_found(evaluated: tuple[Store, Evaluation]) -> None:
    """Exact and slightly noised copies of training images are suspect, unseen images are not more than by chance; and
    the nearest pairs in the report are copies."""
    found = evaluated[1].memorisation
    assert found is not None and found.thresholds is not None
    assert found.train.num_images == NUM_TRAIN and found.thresholds.num_held_out == NUM_REAL
    shares = {one.request: one.suspects.value for one in found.requests if one.suspects}
    assert shares["copied"] == 1.0 and shares["noised"] >= 0.9
    assert max(shares[name] for name in ("fresh", "inverted", "between")) <= 0.1
    assert len(found.pairs) == 12 and all(pair.is_suspect for pair in found.pairs)
    exact = [pair for pair in found.pairs if "-000-" in pair.sample.name]
    assert exact and all(pair.pixel_distance == 0 and pair.clip_distance < 1e-5 for pair in exact)
    images = evaluated[1].images
    assert all(images[pair.sample.image] == images[pair.training.image] for pair in exact)
    unknown = evaluated[1].model_copy(update={"memorisation": found.model_copy(update={"thresholds": None})})
    assert "images of --real are no training images; give more" in "\n".join(summary_lines(unknown))
    assert "give held-out images" in "\n".join(summary_lines(unknown.model_copy(update={"real": None})))


def test_distances_order_what_they_should(evaluated: tuple[Store, Evaluation]) -> None:
    """Unseen digits lie near real ones, inverted ones do not; the reference is not held against itself."""
    real, reference = evaluated[1].quality
    assert real.features == "CLIP zoo:digits/clip" and "fresh" not in {one.request for one in reference.requests}
    by_name = {one.request: one for one in real.requests}
    fresh, inverted = by_name["fresh"], by_name["inverted"]
    assert fresh.num_images == inverted.num_images == 60
    assert fresh.kid and inverted.kid and fresh.frechet and inverted.frechet and fresh.precision and inverted.recall
    assert fresh.kid.value < inverted.kid.value and fresh.frechet.value < inverted.frechet.value
    assert fresh.precision.value > 0.5
    assert {one.request: one.num_images for one in reference.requests}["copied"] == 60


def test_scores_of_texts_say_when_they_are_circular(evaluated: tuple[Store, Evaluation]) -> None:
    found = evaluated[1].text_scores
    assert found is not None and found.is_circular and found.model == "zoo:digits/clip"
    assert [one.request for one in found.requests] == list(REQUESTS)
    assert all(0 <= one.score.low <= one.score.value <= one.score.high <= 2.5 for one in found.requests)


def test_extremes_are_extremes(evaluated: tuple[Store, Evaluation]) -> None:
    """The samples shown near the boundary are those of the lowest KLDB, the real images of the classes asked for."""
    store, found = evaluated
    boundary, *risky = found.extremes
    rows = open_metadata(store.path("metadata.parquet")).to_table().to_pylist()
    between = sorted((row for row in rows if row["request"] == "between"), key=lambda row: row["kldb"])
    shown = {row.title: row.images for row in boundary.rows}
    assert boundary.title == "three and eight" and boundary.num_samples == 12
    assert [one.name for one in shown["Samples, nearest"]] == [row["key"] for row in between[:6]]
    assert [one.name for one in shown["Samples, farthest"]] == [row["key"] for row in between[::-1][:6]]
    assert all(one.text.startswith(("three →", "eight →")) for one in shown["Real, nearest"])
    assert {one.score for one in risky} == {"risk"} and len(risky) == 6
    assert boundary.median_real is not None and boundary.num_real > 20


def test_failures_fall_into_slices(evaluated: tuple[Store, Evaluation]) -> None:
    """They add up to all failures, each with prototypes, and the target errs more often there than over everything."""
    found = evaluated[1].slices
    assert not found.skipped and sum(one.num_failures for one in found.slices) == found.num_failures
    assert sum(one.share for one in found.slices) == pytest.approx(1)
    largest = found.slices[0]
    assert largest.neighbourhood.value > found.error_rate and largest.num_neighbours >= 0.9 * largest.num_failures
    assert largest.prototypes and sum(count for _, _, count in largest.confusions) <= largest.num_failures


def test_equal_evaluations_give_equal_bytes(
    evaluated: tuple[Store, Evaluation], folders: dict[str, str], tmp_path: Path, s3_server: str
) -> None:
    """Into another folder, and to an address: the run is left as it was."""
    store, _ = evaluated
    before = {path: path.read_bytes() for path in Path(store.uri).glob("*.*") if path.is_file()}
    options = EvaluateOptions(real=folders["real"], train=folders["train"], reference="fresh")
    into = tmp_path / "elsewhere"
    found = evaluate(store.uri, options, display=PlainDisplay(io.StringIO()), folder=str(into))
    assert Path(found.document).read_bytes() == before[store.path(EVALUATION)]
    assert Path(found.report).read_bytes() == before[store.path("report.html")]
    assert {path: path.read_bytes() for path in before} == before
    # The same command again finds what it left itself, also where an earlier version left an empty `_state`.
    assert sorted(path.name for path in into.iterdir()) == [EVALUATION, "report.html"]
    (into / "_state/staging").mkdir(parents=True)
    check_results(str(into), EVALUATION, (EVALUATION, "report.html", "_state"), "evaluate")
    uploaded = evaluate(store.uri, options, display=PlainDisplay(io.StringIO()), folder="s3://bucket/elsewhere")
    assert uploaded.document == f"s3://bucket/elsewhere/{EVALUATION}"
    elsewhere = open_store("s3://bucket/elsewhere")
    for path in (found.document, found.report):
        assert elsewhere.read(Path(path).name) == Path(path).read_bytes()
    check_results(elsewhere.uri, EVALUATION, (EVALUATION, "report.html"), "evaluate")
    (into / "notes.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"--output: .*notes\.txt is a file, not a folder"):
        check_folder(into / "notes.txt/deep", EVALUATION, (EVALUATION,), "evaluate")
    with pytest.raises(OutputError, match=r"--output: .*notes\.txt"):
        evaluate(store.uri, options, display=PlainDisplay(io.StringIO()), folder=str(into))


def test_the_report_shows_it_all(evaluated: tuple[Store, Evaluation]) -> None:
    page = evaluated[0].read("report.html").decode()
    for title in ("Quality", "Image and prompt", "Where it fails", "Near and far", "Copies of training images"):
        assert title in page
    assert "KID" in page and "CLIP zoo:digits/clip" in page and "circular" in page
    assert page.count('class="pair suspect"') == 12
    assert "<script>alert" not in page and "\x1b" not in "\n".join(summary_lines(evaluated[1]))


def test_an_evaluation_goes_with_its_run(evaluated: tuple[Store, Evaluation], tmp_path: Path) -> None:
    """Resume and overwrite know the file; a run that has grown since says so; a torn file does not stop the report."""
    store = open_store(str(shutil.copytree(evaluated[0].root, tmp_path / "run")))
    text = store.read(EVALUATION).decode()
    store.replace(EVALUATION, text.replace('"num_attempts": 252', '"num_attempts": 250').encode())
    write_report(store)
    assert "It was made when the run had 250 attempts; there are 252 now." in store.read("report.html").decode()
    store.replace(EVALUATION, text[:1000].encode())
    write_report(store)
    assert "cannot be read as an evaluation" in store.read("report.html").decode()
    job = make_job(tmp_path / "run")
    digests = {"clip": model_digest(job.models.clip), "target": "another"}
    plan = build_plan(job, digits.CLASS_NAMES, {"diffusion": {job.models.diffusion: "d"}, "transfer": []} | digests)
    open_output(store, plan, job, "overwrite", confirmed=True)
    assert not store.exists(EVALUATION)


def test_an_image_of_an_evaluation_must_be_an_image(evaluated: tuple[Store, Evaluation], tmp_path: Path) -> None:
    """An address in a changed file never reaches the page."""
    store = open_store(str(tmp_path))
    document = json.loads(evaluated[0].read(EVALUATION))
    place = next(iter(document["images"]))
    document["images"][place] = "https://example.org/x.png"
    store.replace(EVALUATION, json.dumps(document).encode())
    with pytest.raises(Exception, match=r"cannot be read as an evaluation \(images\."):
        read_evaluation(store)


def test_images_of_one_name_stay_apart() -> None:
    """A real image and a training image may lie at the same place in their folders."""
    registry = ImageRegistry({})
    shown = [registry.show(kind, "zero/0001.png", f"data:image/png;base64,{kind}", "") for kind in ("real", "train")]
    assert [registry.images[one.image] for one in shown] == [
        "data:image/png;base64,real",
        "data:image/png;base64,train",
    ]


def test_a_run_with_a_driver_at_work_is_left_alone(finished: Store, call: Any) -> None:
    """Nothing is written into it, and nothing is measured first."""
    with hold(finished):
        code, _, err = call("evaluate", finished.uri)
    assert code == EXIT_OWNED and "another driver is running on it" in err and not finished.exists(EVALUATION)


def test_without_options_it_still_tells_something(finished: Store, tmp_path: Path) -> None:
    """No real images, no training set: texts and failures; a small limit bounds what is read."""
    found = evaluate(
        finished.uri, EvaluateOptions(limit=10), display=PlainDisplay(io.StringIO()), folder=str(tmp_path / "out")
    ).evaluation
    assert found.quality == () and found.memorisation is None and found.extremes == () and found.real is None
    assert found.samples == dict.fromkeys(REQUESTS, 10)
    assert not finished.exists(EVALUATION)


def test_images_that_are_gone_end_it(finished: Store, tmp_path: Path) -> None:
    """Figures of the rest would look like figures of the run."""
    copy = open_store(str(shutil.copytree(finished.root, tmp_path / "run")))
    tar = sorted(copy.path("shards").glob("*.tar"))[0]
    # A whole tar without samples.
    tar.write_bytes(bytes(10240))
    with pytest.raises(CorruptShardError, match=r"images are not in their shards; `riskforge verify`"):
        evaluate(copy.uri, EvaluateOptions(), display=PlainDisplay(io.StringIO()))
    assert not copy.exists(EVALUATION)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--reference", "fresch"], r"--reference: the run has no request 'fresch'; did you mean 'fresh'\?"),
        (["--real", "/nowhere"], r"--real: there is no '/nowhere'"),
        (["--train", "/nowhere"], r"--train: there is no '/nowhere'"),
        (["--limit", "3"], r"--limit: 3 is not between 10 and 20,000"),
        (["--features", "inception"], r"--features: inception has no weights on this machine"),
        (["--inception", "/nowhere.pt"], r"--inception: there is no file '/nowhere.pt'"),
        (["--clip", "zoo:digits/klip"], r"--clip: .*klip"),
        (["--clip", "zoo:digits/classifier"], r"--clip: .* is a model of type 'resnet'; a CLIP model is needed"),
    ],
)
def test_what_cannot_be_done_is_named(
    finished: Store, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    options: list[str], message: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    output = ["--output", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["riskforge", "evaluate", finished.uri, *options, *output])
    with pytest.raises(SystemExit) as end:
        cli.main()
    said = capsys.readouterr().err
    assert end.value.code == EXIT_USER and "Traceback" not in said and not (tmp_path / "out").exists()
    assert re.search(message, said), said


def test_classes_are_matched() -> None:
    """Equally many of each class on both sides, of all that both have."""
    first, second = np.array([0] * 5 + [1] * 9 + [2] * 4), np.array([1] * 3 + [0] * 8 + [7] * 6)
    own, theirs = match_classes(first, second, seed=0)
    assert sorted(first[own].tolist()) == sorted(second[theirs].tolist()) == [0] * 5 + [1] * 3
    assert len(set(own.tolist())) == 8 and match_classes(first, second, 0)[0].tolist() == own.tolist()


def test_images_are_drawn_evenly_and_the_others_are_not_decoded() -> None:
    decoded: list[int] = []

    def one(number: int) -> LabelledImage:
        decoded.append(number)
        return LabelledImage(str(number), PIL.Image.new("RGB", (4, 4)), 0)

    def items(start: int) -> Iterator[Any]:
        return (lambda number=number: one(number) for number in range(start, start + 500))

    source = ImageSource("made", None, tuple((lambda start=start: items(start)) for start in (0, 500)))
    names = [found.name for found in draw_images(source, 100, 3, lambda text: None)]
    assert len(names) == len(decoded) == 100 and [int(name) for name in names] == sorted(decoded)
    assert 30 < sum(number < 500 for number in decoded) < 70
    assert names == [found.name for found in draw_images(source, 100, 3, lambda text: None)]
    assert len(list(draw_images(source, 5000, 3, lambda text: None))) == 1000


def test_pixels_are_compared_whatever_the_size() -> None:
    """The same picture at two sizes is near, another one is far; equal ones are at zero."""
    image = PIL.Image.fromarray(
        np.kron(np.random.default_rng(0).integers(0, 256, (32, 32, 3)), np.ones((8, 8, 1))).astype(np.uint8)
    )
    small, other = image.resize((64, 64)), PIL.Image.fromarray(255 - np.asarray(image))
    pixels = small_pixels([image, small, other])
    same, near, far = pixel_distances(np.stack([pixels[0]] * 3), pixels)
    assert same == 0 and near < 0.05 < 0.4 < far


def test_pixels_are_compared_a_part_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The parts do not show, and as floats there is never more than one of them."""
    first, second = np.random.default_rng(0).integers(0, 256, (2, 600, 32, 32, 3), dtype=np.uint8)
    whole = pixel_distances(first, second)
    monkeypatch.setattr(image_features, "_ROWS", 7)
    tracemalloc.start()
    parts = pixel_distances(first, second)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert np.array_equal(parts, whole) and len(whole) == 600 and peak < first.nbytes


def groups_of(sizes: tuple[int, ...], dim: int = 12) -> np.ndarray:
    """Points of length one about as many axes."""
    rng = np.random.default_rng(0)
    points = np.concatenate([np.eye(dim)[axis] + rng.normal(0, 0.05, (size, dim)) for axis, size in enumerate(sizes)])
    return np.asarray(points / np.linalg.norm(points, axis=1, keepdims=True), np.float32)


def test_clusters_are_found_counted_and_numbered_by_size() -> None:
    """k is chosen: three groups give three clusters, the largest first, the same ones every time."""
    points = groups_of((20, 40, 30))
    found = cluster(points)
    assert np.bincount(found.labels).tolist() == [40, 30, 20] and found.silhouette > 0.7
    assert [int(one) for one in (found.labels[0], found.labels[25], found.labels[80])] == [2, 0, 1]
    assert cluster(points).labels.tolist() == found.labels.tolist()


def test_too_few_or_equal_failures_are_no_clusters() -> None:
    for points in (groups_of((5, 5)), np.repeat(groups_of((1,)), 50, axis=0)):
        with pytest.raises(ValueError, match="too few"):
            cluster(points)


def test_a_slice_is_named_by_what_sets_it_apart() -> None:
    """Not by the text that is near to everything."""
    points = groups_of((30, 30))
    texts = np.stack([points.mean(0), points[:30].mean(0), points[30:].mean(0)])
    named = nearest_texts(points[:30], points, ["all", "first", "second"], texts)
    assert named[0][0] == "first" and "second" not in dict(named)


def test_the_neighbourhood_counts_what_is_right_too() -> None:
    points = groups_of((40, 40))
    is_error = np.arange(80) < 10
    rate, count = neighbourhood(points[:40].mean(0), points[:10], points, is_error)
    assert 10 <= count <= 40 and rate.value == pytest.approx(is_error[:40].sum() / 40, abs=0.15)
    assert rate.low < rate.value < rate.high


class _Layers(torch.nn.Module):
    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels.mean((2, 3)).repeat(1, 683)[:, :2048, None, None]


class _Network(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = _Layers()

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return self.layers(pixels)


def test_inception_is_read_where_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in the format of FID's network, in TORCH_HOME or where it is said to be; features of clean-fid's scale."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert find_inception(None) is None
    path = tmp_path / "inception-2015-12-05.pt"
    torch.jit.save(torch.jit.script(_Network()), str(path))
    assert find_inception(None) == path == find_inception(str(tmp_path))
    extractor = Inception(path)
    images = [PIL.Image.new("RGB", size, (255, 128, 0)) for size in ((20, 30), (400, 299))]
    features = extractor.features(images, np.empty((2, 1), np.float32))
    assert features.shape == (2, 2048) and extractor.name == "Inception"
    assert np.allclose(features[:, :3], [127 / 128, 0, -1], atol=1e-5)
    torch.jit.save(torch.jit.script(_Layers()), str(path))
    with pytest.raises(JobError, match="is not the Inception of FID"):
        Inception(path)
