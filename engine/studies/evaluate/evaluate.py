"""How good are a run's images? Against real ones, against the training set, against their texts; and where they fail.

Reads a bounded, evenly drawn sample of the stored images, writes `evaluation.json` and the report with it. Equal runs,
options and images give equal figures on a CPU.
"""

from __future__ import annotations

import contextlib
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import PIL.Image
from numpy.typing import NDArray

from engine.data.images import LabelledImage, Unusable, UnusableImageError, decode_sample, nothing_usable, open_images
from engine.data.run.file_names import EVALUATION, MANIFEST, METADATA, REPORT
from engine.data.run.manifest_reading import read_manifest
from engine.data.run.outcomes import asked_classes, target_errs
from engine.data.stores.base import STATE, Store
from engine.data.stores.lease import hold
from engine.data.stores.opening import open_store, refuse_objects
from engine.driver.progress import Display
from engine.errors import CorruptShardError, JobError, OutputError
from engine.job.class_names import distinct_names
from engine.job.plan import class_prompt
from engine.job.records import STATUS_OK, STATUS_REJECTED
from engine.job.spec import JOINT_SEPARATOR, JobSpec, RuntimeSpec
from engine.models.addresses import model_digest
from engine.models.classifier import Classifier
from engine.models.clip import Clip
from engine.models.libraries import quiet_libraries
from engine.models.runtime import choose_hardware
from engine.report.data import class_names, make_rows, open_metadata, read_table
from engine.report.evaluation import (
    Copies,
    Evaluation,
    Extremes,
    Interval,
    Memorisation,
    Pair,
    Qualities,
    Quality,
    Shown,
    Slice,
    Slices,
    Source,
    TextScore,
    TextScores,
    Thresholds,
)
from engine.report.render import write_report
from engine.report.stored_images import find_images
from engine.report.text import clip as clipped
from engine.studies.evaluate.distances import Features, frechet_interval, kernel_distance, precision_recall
from engine.studies.evaluate.extremes import Scored, boundary_extremes, risk_extremes
from engine.studies.evaluate.features import choose_extractor
from engine.studies.evaluate.image_features import Eyes, Pictures, draw_images, unit
from engine.studies.evaluate.memorisation import Found, find_nearest, order_by_nearness, thresholds_of
from engine.studies.evaluate.slices import ATTRIBUTES, Clusters, cluster, nearest_texts, neighbourhood, prototypes
from engine.studies.evaluate.slices import MAX_CLUSTERED as MAX_CLUSTERED_FAILURES
from engine.studies.intervals import Estimate, mean_interval, wilson_interval
from engine.studies.output_folders import check_folder
from engine.studies.samples import StudiedRun, choose_requests, open_study

if TYPE_CHECKING:
    import pyarrow as pa

STUDY = "evaluate"
DEFAULT_LIMIT = 2000
# Thumbnails and pixels of so many images take a few hundred megabytes.
MAX_LIMIT = 20_000
MIN_IMAGES = 10
# Real images for each sample of a request that may be asked for: classes are matched.
REAL_FACTOR = 2
MAX_PAIRS = 12
MAX_UNUSABLE = 20
MAX_CONTEXTS = 200
MAX_CONFUSIONS = 3
# Hessel et al., "CLIPScore" (EMNLP 2021), equation 1.
TEXT_WEIGHT = 2.5
_CHUNK = 256
_COLUMNS = [
    "key", "request", "class_index", "class_name", "context", "prompt", "status", "accepted", "is_error",
    "predicted_class", "risk", "kldb", "kldb_classes", "sha256",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class EvaluateOptions:
    """What the command line asks for.

    Attributes:
        real, train: labelled images, as `engine.data.images.open_images` takes them: real ones, and those that the
            diffusion model was trained on.
        reference: name of a request whose samples the others are held against.
        clip: address of the CLIP model that looks; the job's by default.
        features: `auto`, `clip` or `inception`.
        inception: file or folder of the Inception network.
        failures: whether failures that the rule of acceptance rejected are clustered, too: `accepted` or `all`.
        limit: images of each request that are read.
    """

    real: str | None = None
    train: str | None = None
    reference: str | None = None
    clip: str | None = None
    features: str = "auto"
    inception: str | None = None
    failures: str = "accepted"
    limit: int = DEFAULT_LIMIT
    seed: int = 0

    def check(self) -> None:
        """Refuse what cannot be done.

        Raises:
            JobError: all problems, a line each.
        """
        problems = []
        if not MIN_IMAGES <= self.limit <= MAX_LIMIT:
            problems.append(f"--limit: {self.limit} is not between {MIN_IMAGES} and {MAX_LIMIT:,}")
        if self.inception is not None and self.features == "clip":
            problems.append("--inception: is for Inception's features; leave it or `--features clip` out")
        if problems:
            raise JobError(problems)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluated:
    """What came of an evaluation, and where it is."""

    evaluation: Evaluation
    document: str
    report: str


@dataclass(frozen=True, slots=True, eq=False)
class Samples:
    """Stored samples that were read: their pictures and, row by row, their metadata."""

    pictures: Pictures
    records: tuple[dict[str, Any], ...]

    def rows(self, request: str, status: str = STATUS_OK) -> NDArray[np.int64]:
        """The rows of a request with a status."""
        chosen = [row for row, one in enumerate(self.records) if one["request"] == request and one["status"] == status]
        return np.array(chosen, dtype=np.int64)

    def flags(self, name: str) -> NDArray[np.bool_]:
        """A yes-or-no field of all."""
        return np.array([one[name] for one in self.records], dtype=bool)

    @property
    def target_errs(self) -> NDArray[np.bool_]:
        """Whether the target predicts a class that was not asked for, of all."""
        return np.array([target_errs(one) for one in self.records], dtype=bool)


@dataclass(slots=True)
class Album:
    """The images that the report shows, each stored once."""

    names: dict[int, str]
    images: dict[str, str] = field(default_factory=dict)

    def show(self, kind: Literal["sample", "real", "train"], name: str, uri: str, text: str) -> Shown:
        """Put an image in, with what is said below it; a real image and a training image may have one name."""
        place = f"{kind}:{name}" if uri else ""
        if uri:
            self.images[place] = uri
        return Shown(image=place, name=clipped(name, 200), text=clipped(text, 200), is_sample=kind == "sample")

    def sample(self, samples: Samples, row: int, text: str = "") -> Shown:
        """A sample of the run."""
        record = samples.records[row]
        about = f"{self.name_asked(record)} → {self.name_of(record['predicted_class'])}"
        text = f"{about}, {text}" if text else about
        return self.show("sample", record["key"], samples.pictures.thumbnails[row], text)

    def name_of(self, index: int) -> str:
        """A class for a reader."""
        return self.names.get(index, f"class {index}")

    def name_asked(self, record: Mapping[str, Any]) -> str:
        """What a sample was conditioned on, for a reader: a class, or those of a joint prompt."""
        return JOINT_SEPARATOR.join(map(self.name_of, asked_classes(record)))


def evaluate(run_uri: str, options: EvaluateOptions, *, display: Display, folder: str | None = None) -> Evaluated:
    """Evaluate a finished run, and write its report anew.

    Args:
        folder: where `evaluation.json` and `report.html` go; into the run by default.

    Raises:
        JobError: an option is wrong, or a model or images cannot be used.
        OutputError: the run is not finished, or the folder is somebody else's.
        CorruptShardError: an image of the run cannot be read.
        OwnedError: it would go into the run, and a driver is at work there.
    """
    options.check()
    run = open_study(run_uri)
    for name in (MANIFEST, METADATA):
        if not run.store.exists(name):
            raise OutputError(f"RUN: '{run_uri}' has no {name}; let `riskforge run` finish it first")
    if options.reference is not None:
        choose_requests(run, "--reference", [options.reference])
    if folder is not None:
        refuse_objects(folder, "--output", "an evaluation that does not go into its run")
        check_folder(Path(folder).expanduser(), EVALUATION, (EVALUATION, REPORT, STATE), STUDY)
    # Whoever writes into a run holds its lease.
    with hold(run.store, notice=display.notice) if folder is None else contextlib.nullcontext():
        return _write(run, options, display, folder)


def _write(run: StudiedRun, options: EvaluateOptions, display: Display, folder: str | None) -> Evaluated:
    evaluation = _evaluate(run, options, display)
    into = run.store if folder is None else open_store(str(Path(folder).expanduser()))
    try:
        into.replace(EVALUATION, evaluation.model_dump_json(indent=1).encode() + b"\n")
        display.phase("writing the report")
        write_report(run.store, into=into)
    finally:
        if folder is not None:
            into.leave()
    return Evaluated(evaluation=evaluation, document=into.address(EVALUATION), report=into.address(REPORT))


def _evaluate(run: StudiedRun, options: EvaluateOptions, display: Display) -> Evaluation:
    job, manifest = run.job, read_manifest(run.store)
    labels = _labels(run, manifest)
    for option, address in (("--real", options.real), ("--train", options.train)):
        if address is not None:
            # A wrong path is told before models are loaded; nothing is read yet.
            open_images(address, labels, option)
    display.phase("loading the models that look at images")
    quiet_libraries()
    eyes, target = _load(job, run, options)
    samples, num_attempts = _read_samples(run, eyes, options, display)
    album = Album(distinct_names(dict(enumerate(labels))))
    names = [one.name for one in job.requests]
    real, real_source = None, None
    if options.real is not None:
        looker = Eyes(eyes.clip, eyes.extractor, target, clip_role=eyes.clip_role)
        real, real_source = _read_real(options, labels, looker, display)
    display.phase("measuring distances")
    quality = _qualities(samples, real, names, eyes.extractor.name, options)
    memorisation = _memorisation(samples, real, names, labels, eyes, options, album, display)
    display.phase("clustering failures")
    return Evaluation(
        plan_digest=run.plan_digest,
        num_attempts=num_attempts,
        limit=options.limit,
        seed=options.seed,
        real=real_source,
        samples={name: len(samples.rows(name)) for name in names},
        left_out=left_out_lines(samples.pictures),
        quality=quality,
        text_scores=_text_scores(samples, job, eyes),
        memorisation=memorisation,
        slices=_slices(samples, labels, eyes.clip, options, album),
        extremes=_extremes(job, samples, real, labels, album) if real is not None else (),
        images=album.images,
    )


def _labels(run: StudiedRun, manifest: Mapping[str, Any]) -> tuple[str, ...]:
    """The target's class names as the run noted them; of older runs, those of the classes that were asked for."""
    noted = manifest.get("models", {}).get("target", {}).get("labels")
    if isinstance(noted, list) and noted and all(isinstance(one, str) for one in noted):
        return tuple(noted)
    found = class_names(make_rows(read_table(run.store.fetch(METADATA))), [])
    return tuple(found.get(index, f"class {index}") for index in range(max(found, default=-1) + 1))


def _load(job: JobSpec, run: StudiedRun, options: EvaluateOptions) -> tuple[Eyes, Classifier | None]:
    """The models that look, and the target where there are real images to score.

    Raises:
        JobError: one cannot be loaded, or the target is another than that of the run.
    """
    device = choose_hardware(RuntimeSpec()).device
    role = "--clip" if options.clip else "models.clip"
    try:
        clip = Clip.load(options.clip or job.models.clip, device)
    except JobError as error:
        raise JobError([f"{role}: {problem}" for problem in error.problems]) from None
    judge = Clip.load(job.models.judge, device) if job.models.judge else None
    extractor = choose_extractor(options.features, clip, options.inception, device)
    if options.real is None:
        return Eyes(clip, extractor, judge=judge, clip_role=role), None
    if (digest := model_digest(job.models.target)) != run.target_digest:
        raise JobError(
            f"--real: the target '{job.models.target}' that would score the images has changed since the run (digest"
            f" {run.target_digest} in the manifest, {digest} now); restore that model, or leave --real out"
        )
    return Eyes(clip, extractor, judge=judge, clip_role=role), Classifier.load(job.models.target, device)


# Reading -------------------------------------------------------------------------------------------------------------


def _read_samples(run: StudiedRun, eyes: Eyes, options: EvaluateOptions, display: Display) -> tuple[Samples, int]:
    """At most so many images of each request and status, evenly drawn, and the number of attempts.

    Raises:
        JobError: the run has no stored image.
        CorruptShardError: an image is not where the metadata says.
    """
    import pyarrow as pa

    metadata = open_metadata(run.store.fetch(METADATA, keep=True))
    table = metadata.to_table(columns=["request", "status", "sha256"])
    chosen = _choose(table, options)
    if not chosen:
        raise JobError(f"RUN: '{run.store.uri}' has no stored image to look at")
    rows = metadata.take(pa.array(chosen, pa.int64()), columns=_COLUMNS).to_pylist()
    kept: list[dict[str, Any]] = []

    def images() -> Iterator[tuple[str, int, PIL.Image.Image]]:
        for start in range(0, len(chosen), _CHUNK):
            part = dict(zip(chosen[start : start + _CHUNK], rows[start : start + _CHUNK], strict=True))
            found = find_images(run.store, run.job.name, {row: one["key"] for row, one in part.items()})
            display.advance(f"looking at samples: {start}/{len(chosen)}")
            for record in part.values():
                if record["key"] in found:
                    kept.append(record)
                    yield record["key"], record["class_index"], _decoded(run.store, record["key"], found[record["key"]])

    pictures = eyes.look(images())
    if len(kept) < len(chosen):
        missing = len(chosen) - len(kept)
        raise CorruptShardError(
            f"{run.store.uri}: {missing} of {len(chosen)} images are not in their shards; `riskforge verify` says more"
        )
    if lines := left_out_lines(pictures):
        if not len(pictures):
            raise JobError([f"RUN: no image of '{run.store.uri}' can be looked at: {line}" for line in lines])
        for line in lines:
            display.notice(f"left out of the evaluation: {line}")
    gone = {key for key, _ in pictures.left_out}
    return Samples(pictures, tuple(record for record in kept if record["key"] not in gone)), table.num_rows


def left_out_lines(pictures: Pictures) -> tuple[str, ...]:
    """How many images a model gives unusable values for, a line for each reason."""
    counts = Counter(reason for _, reason in pictures.left_out)
    total = len(pictures) + len(pictures.left_out)
    return tuple(f"{count} of {total} images: {reason}" for reason, count in counts.most_common())


def _choose(table: pa.Table, options: EvaluateOptions) -> list[int]:
    """Row numbers of images to read, in order; equal options choose equal rows.

    Args:
        table: requests, statuses and checksums of the images, which are empty where none is stored.
    """
    import pyarrow.compute as pc

    has_image = pc.not_equal(table["sha256"], "").to_numpy()
    chosen: list[int] = []
    for request in table["request"].unique().to_pylist():
        is_here = pc.equal(table["request"], request).to_numpy() & has_image
        for status in (STATUS_OK, STATUS_REJECTED):
            rows = np.flatnonzero(is_here & pc.equal(table["status"], status).to_numpy())
            if len(rows) > options.limit:
                rng = np.random.default_rng([options.seed, zlib.crc32(f"{request} {status}".encode())])
                rows = rng.choice(rows, options.limit, replace=False)
            chosen += rows.tolist()
    return sorted(chosen)


def _decoded(store: Store, key: str, data: bytes) -> PIL.Image.Image:
    try:
        return decode_sample(data)
    except UnusableImageError as error:
        raise CorruptShardError(f"{store.uri}: the image of sample {key} {error}") from None


def _read_real(
    options: EvaluateOptions, labels: tuple[str, ...], eyes: Eyes, display: Display
) -> tuple[Pictures, Source]:
    assert options.real is not None
    return _read_source(
        options.real, "--real", labels, eyes, display, limit=REAL_FACTOR * options.limit, seed=options.seed
    )


def _read_source(
    address: str, option: str, labels: tuple[str, ...], eyes: Eyes, display: Display, *, limit: int, seed: int
) -> tuple[Pictures, Source]:
    source, unusable = open_images(address, labels, option), list[Unusable]()

    def images() -> Iterator[tuple[str, int, PIL.Image.Image]]:
        for found in draw_images(source, limit, seed, lambda text: display.advance(f"looking at {option}: {text}")):
            if isinstance(found, LabelledImage):
                yield found.name, found.class_index, found.image
            else:
                unusable.append(found)

    pictures = eyes.look(images())
    unusable += [Unusable(name, reason) for name, reason in pictures.left_out]
    if not len(pictures):
        raise JobError(nothing_usable(source, option, address, unusable))
    return pictures, _source(address, source.kind, len(pictures), unusable)


def _source(address: str, kind: str, num_images: int, unusable: Sequence[Unusable]) -> Source:
    shown = tuple(clipped(f"{one.name}: {one.reason}", 400) for one in unusable[:MAX_UNUSABLE])
    return Source(address=address, kind=kind, num_images=num_images, num_unusable=len(unusable), unusable=shown)


# Quality -------------------------------------------------------------------------------------------------------------


def _qualities(
    samples: Samples, real: Pictures | None, names: Sequence[str], features: str, options: EvaluateOptions
) -> tuple[Qualities, ...]:
    """Every request against the real images, and against the request of reference."""
    sides: list[tuple[str, Features, NDArray[np.int64], Sequence[str]]] = []
    if real is not None:
        sides.append((f"real images of {options.real}", _double(real.features), real.classes, names))
    if options.reference is not None:
        rows = samples.rows(options.reference)
        others = [name for name in names if name != options.reference]
        pictures = samples.pictures
        sides.append((f"request {options.reference}", _double(pictures.features[rows]), pictures.classes[rows], others))
    return tuple(
        Qualities(
            against=against,
            features=features,
            requests=tuple(_quality(samples, name, other, classes, options.seed) for name in wanted),
        )
        for against, other, classes, wanted in sides
    )


def _double(features: NDArray[np.float32]) -> Features:
    return features.astype(np.float64)


def _quality(samples: Samples, request: str, other: Features, classes: NDArray[np.int64], seed: int) -> Quality:
    rows = samples.rows(request)
    own, theirs = match_classes(samples.pictures.classes[rows], classes, seed)
    if len(own) < MIN_IMAGES:
        why = f"{len(own)} images of each side are of the same classes; {MIN_IMAGES} are needed"
        return Quality(request=request, num_images=len(own), skipped=why)
    first, second = _double(samples.pictures.features[rows[own]]), other[theirs]
    manifolds = precision_recall(first, second)
    return Quality(
        request=request,
        num_images=len(own),
        kid=_interval(kernel_distance(first, second, seed=seed)),
        frechet=_interval(frechet_interval(first, second, seed=seed)),
        precision=_interval(manifolds.precision),
        recall=_interval(manifolds.recall),
    )


def match_classes(
    first: NDArray[np.int64], second: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places in both sets with equally many of each class, as many as there are, drawn evenly.

    A distance between sets of other classes, or of other sizes, would tell of these.
    """
    rng = np.random.default_rng(seed)
    places: tuple[list[int], list[int]] = ([], [])
    for index in np.intersect1d(first, second):
        here = [np.flatnonzero(one == index) for one in (first, second)]
        count = min(map(len, here))
        for found, rows in zip(places, here, strict=True):
            found += sorted(rng.choice(rows, count, replace=False).tolist())
    own, theirs = (np.array(one, dtype=np.int64) for one in places)
    return own, theirs


def _interval(estimate: Estimate) -> Interval:
    return Interval(value=estimate.value, low=estimate.low, high=estimate.high)


def _text_scores(samples: Samples, job: JobSpec, eyes: Eyes) -> TextScores:
    """CLIPScore of every request: its mean over images, with Student's interval."""
    model, embeds = (eyes.judge, samples.pictures.judged) if eyes.judge else (eyes.clip, samples.pictures.clip)
    prompts = list(dict.fromkeys(one["prompt"] for one in samples.records))
    texts = unit(model.text_embeds(prompts).numpy())
    place = {prompt: number for number, prompt in enumerate(prompts)}
    cosines = (embeds * texts[[place[one["prompt"]] for one in samples.records]]).sum(1)
    scores = TEXT_WEIGHT * np.maximum(cosines, 0).astype(np.float64)
    found = []
    for name in (one.name for one in job.requests):
        if len(rows := samples.rows(name)) >= 2:
            score = _interval(mean_interval(scores[rows].tolist()))
            found.append(TextScore(request=name, num_images=len(rows), score=score))
    is_circular = eyes.judge is None and model.name == job.models.clip
    return TextScores(model=model.name, is_circular=is_circular, requests=tuple(found))


# Memorisation --------------------------------------------------------------------------------------------------------


def _memorisation(
    samples: Samples, real: Pictures | None, names: Sequence[str], labels: tuple[str, ...], eyes: Eyes,
    options: EvaluateOptions, album: Album, display: Display,
) -> Memorisation | None:  # fmt: skip
    if options.train is None:
        return None
    source, unusable, num_images = open_images(options.train, labels, "--train"), list[Unusable](), 0

    def training() -> Iterator[tuple[str, PIL.Image.Image]]:
        nonlocal num_images
        for found in source.read():
            if isinstance(found, LabelledImage):
                num_images += 1
                of = f"/{source.num_images}" if source.num_images else ""
                display.advance(f"looking at --train: {num_images}{of}")
                yield found.name, found.image
            else:
                unusable.append(found)

    def leave_out(name: str, reason: str) -> None:
        nonlocal num_images
        num_images -= 1
        unusable.append(Unusable(name, reason))

    sets = [samples.pictures] if real is None else [samples.pictures, real]
    found = find_nearest(sets, training(), eyes, leave_out)
    if not num_images:
        raise JobError(nothing_usable(source, "--train", options.train, unusable))
    thresholds = None if real is None else thresholds_of(found[1])
    return Memorisation(
        model=eyes.clip.name,
        train=_source(options.train, source.kind, num_images, unusable),
        thresholds=thresholds,
        requests=tuple(_copies(samples, name, found[0], thresholds) for name in names if len(samples.rows(name))),
        pairs=_pairs(samples, found[0], thresholds, album),
    )


def _copies(samples: Samples, request: str, found: Found, thresholds: Thresholds | None) -> Copies:
    rows = samples.rows(request)
    suspects = None if thresholds is None else int(found.suspects(thresholds)[rows].sum())
    return Copies(
        request=request,
        num_images=len(rows),
        clip_distance_median=float(np.median(found.clip_distance[rows])),
        pixel_distance_median=float(np.median(found.pixel_distance[rows])),
        num_suspects=suspects,
        suspects=None if suspects is None else _interval(wilson_interval(suspects, len(rows))),
    )


def _pairs(samples: Samples, found: Found, thresholds: Thresholds | None, album: Album) -> tuple[Pair, ...]:
    """The samples that are likeliest to be copies, each with its training image."""
    suspects = found.suspects(thresholds) if thresholds else np.zeros(len(found.names), dtype=bool)
    pairs = []
    for row in order_by_nearness(found, thresholds)[:MAX_PAIRS].tolist():
        training = album.show("train", found.names[row], found.thumbnails[row], found.names[row])
        pairs.append(
            Pair(
                sample=album.sample(samples, row),
                training=training,
                clip_distance=float(found.clip_distance[row]),
                pixel_distance=float(found.pixel_distance[row]),
                is_suspect=bool(suspects[row]),
            )
        )
    return tuple(pairs)


# Failures ------------------------------------------------------------------------------------------------------------


def _slices(samples: Samples, labels: Sequence[str], clip: Clip, options: EvaluateOptions, album: Album) -> Slices:
    target_errs, points = samples.target_errs, samples.pictures.clip
    counted = target_errs if options.failures == "all" else target_errs & samples.flags("accepted")
    failures = np.flatnonzero(counted)
    about: dict[str, Any] = {
        "which": options.failures,
        "model": clip.name,
        "num_failures": len(failures),
        "num_samples": len(points),
        "error_rate": float(target_errs.mean()),
    }
    if len(failures) > MAX_CLUSTERED_FAILURES:
        rng = np.random.default_rng(options.seed)
        failures = np.sort(rng.choice(failures, MAX_CLUSTERED_FAILURES, replace=False))
    try:
        clusters = cluster(points[failures], seed=options.seed)
    except ValueError as error:
        return Slices(**about, skipped=str(error))
    texts = _texts(samples, labels, clip)
    found = [_slice(samples, failures, clusters, number, texts, album) for number in range(len(clusters.centres))]
    return Slices(**about, silhouette=clusters.silhouette, slices=tuple(found))


Texts = list[tuple[list[str], NDArray[np.float32]]]


def _texts(samples: Samples, labels: Sequence[str], clip: Clip) -> Texts:
    """What a slice may be named by: class names, and contexts with attributes; each with embeddings."""
    counts = Counter(one["context"] for one in samples.records if one["context"])
    contexts = [context for context, _ in counts.most_common(MAX_CONTEXTS)]
    others = list(dict.fromkeys([*contexts, *ATTRIBUTES]))
    prompts = ([class_prompt(label) for label in labels], others)
    return [
        (names, unit(clip.text_embeds(some).numpy()))
        for names, some in zip((list(labels), others), prompts, strict=True)
    ]


def _slice(
    samples: Samples, failures: NDArray[np.int64], clusters: Clusters, number: int, texts: Texts, album: Album
) -> Slice:
    points, centre = samples.pictures.clip, clusters.centres[number]
    own = failures[clusters.labels == number]
    rate, num_neighbours = neighbourhood(centre, points[own], points, samples.target_errs)
    named = [
        one for (names, embeds), most in zip(texts, (1, 2), strict=True)
        for one in nearest_texts(points[own], points, names, embeds, most)
    ]  # fmt: skip
    records = [samples.records[row] for row in own]
    pairs = Counter((album.name_asked(one), album.name_of(one["predicted_class"])) for one in records)
    chosen = own[prototypes(centre, points[own])]
    return Slice(
        texts=tuple((clipped(text, 200), value) for text, value in named),
        num_failures=len(own),
        share=len(own) / len(failures),
        neighbourhood=rate,
        num_neighbours=num_neighbours,
        confusions=tuple((*pair, count) for pair, count in pairs.most_common(MAX_CONFUSIONS)),
        requests=tuple(Counter(one["request"] for one in records).most_common(MAX_CONFUSIONS)),
        prototypes=tuple(album.sample(samples, int(row)) for row in chosen),
    )


# Extremes ------------------------------------------------------------------------------------------------------------


def _extremes(
    job: JobSpec, samples: Samples, real: Pictures, labels: Sequence[str], album: Album
) -> tuple[Extremes, ...]:
    """Real images and samples, near and far from each boundary that was asked for; and of high and low risk."""
    methods = {one.name: one.method for one in job.requests}

    def show_real(row: int, text: str) -> Shown:
        predicted = album.name_of(int(real.logits[row].argmax()))
        about = f"{album.name_of(int(real.classes[row]))} → {predicted}, {text}"
        return album.show("real", real.names[row], real.thumbnails[row], about)

    def show_sample(row: int, text: str) -> Shown:
        return album.sample(samples, row, text)

    scored = Scored(
        logits=real.logits,
        classes=real.classes,
        records=samples.records,
        methods=methods,
        labels=[album.name_of(index) for index in range(len(labels))],
        show_real=show_real,
        show_sample=show_sample,
    )
    return (*boundary_extremes(scored), *risk_extremes(scored))
