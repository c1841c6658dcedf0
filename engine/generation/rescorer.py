"""Scores of stored images made once more, by the job's models, and held against what was stored."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from engine.data.images.decode import UnusableImageError, decode_sample
from engine.data.run.commits import list_commits
from engine.data.run.companions import companion_name, companions_of
from engine.data.run.shards import IMAGE_FORMATS, SHARDS, read_shard, shard_name, tar_entries
from engine.data.run.stored_plan import stored_plan
from engine.data.run.verify import Finding
from engine.data.stores.base import Store
from engine.errors import JobError
from engine.job.columns import BY_NAME, RECORD_COLUMNS, Role, columns_with
from engine.job.json_values import difference
from engine.job.plan import Plan, SampleSpec, planned_temperature, planned_validity
from engine.job.records import STARTS, STATUS_FAILED, TWINS
from engine.job.spec import JobSpec
from engine.models.digests import model_digests

if TYPE_CHECKING:
    import PIL.Image

    from engine.generation.scorer import Scorer

NUM_SAMPLES = 64
# Roles of the models that score, in the order of messages.
SCORING = ("clip", "target", "further_targets", "transfer", "oracle", "oracles", "judge")

# Of findings.
_NAMES = {STARTS: "start", TWINS: "twin"}


class Sample(NamedTuple):
    """A stored sample: its image file and record, and those of its companions by their folder."""

    spec: SampleSpec
    image: bytes
    record: dict[str, Any]
    companions: Mapping[str, tuple[bytes, dict[str, Any]]]


def rescore(
    store: Store, num_samples: int = NUM_SAMPLES, advance: Callable[[str], None] = lambda text: None
) -> list[Finding]:
    """Score a sample of a run's images with the job's models.

    Args:
        num_samples: images, drawn from all shards; the same ones every time.

    Returns:
        A finding for each image whose stored scores are others.

    Raises:
        JobError: a model cannot be loaded, or is another one than the run was made with.
        CorruptShardError: a shard cannot be read; `verify` says more.
    """
    from engine.generation.loading import load_scorer
    from engine.models.library_logging import quiet_libraries

    job, plan = stored_plan(store)
    chosen = _choose(store, job, plan, num_samples)
    if (first := next(chosen, None)) is None:
        return []
    _check_models(job, plan)
    advance("loading the models that score")
    quiet_libraries()
    scorer = load_scorer(job, temperature=planned_temperature(plan.identity), validity=planned_validity(plan.identity))
    findings = []
    for place, sample in enumerate(itertools.chain([first], chosen)):
        advance(f"image {place + 1} of up to {num_samples}")
        if text := _finding(scorer, sample):
            findings.append(Finding(kind="damage", text=f"{sample.spec.key}: {text}"))
    return findings


def _finding(scorer: Scorer, sample: Sample) -> str:
    """What is wrong with the stored scores of a sample or of its twin; empty where nothing is."""
    images: dict[str, PIL.Image.Image] = {}
    for kind, data in {"": sample.image, **{kind: data for kind, (data, _) in sample.companions.items()}}.items():
        try:
            images[kind] = decode_sample(data)
        except UnusableImageError as error:
            return f"its image {error}" if not kind else f"the image of its {_NAMES[kind]} {error}"
    made, twin = _scored_again(scorer, sample.spec, images)
    again = [("scored again", sample.record, made)]
    again += [("its twin scored again", sample.companions[TWINS][1], twin)] if twin else []
    for what, stored, record in again:
        if record["status"] == STATUS_FAILED:
            return f"{what}, {record['error_message']}"
        if differences := _differences(stored, record):
            return f"{what}, {'; '.join(differences)}"
    return ""


def _scored_again(
    scorer: Scorer, spec: SampleSpec, images: Mapping[str, PIL.Image.Image]
) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The record of a sample with what is measured of it and its companions, and that of its twin.

    Args:
        images: its own under the empty name, and those of its companions.
    """
    from engine.generation.pairs import distances, twin_fields, twin_spec

    embeds = {kind: scorer.embed(scorer.preprocess_clip([image])) for kind, image in images.items()}

    def scored(kind: str, spec: SampleSpec) -> dict[str, Any]:
        [record] = scorer.score([spec], scorer.preprocess([images[kind]]), embeds[kind])
        if STARTS in images:
            [record["start_distance"]] = distances(embeds[kind], embeds[STARTS])
        return record

    record, twin = scored("", spec), scored(TWINS, twin_spec(spec)) if TWINS in images else None
    if twin and twin["status"] != STATUS_FAILED:
        [distance] = distances(embeds[""], embeds[TWINS])
        record |= twin_fields(images[""], distance, images[TWINS], twin)
    return record, twin


def _check_models(job: JobSpec, plan: Plan) -> None:
    """Refuse models that have changed: their scores prove nothing about the images."""
    before, now = plan.identity["models"], model_digests(job, of_existing_run=True)
    changed = [line for role in SCORING for line in difference(before.get(role), now.get(role), f"models.{role}")]
    if changed:
        raise JobError([f"{line}: not the model that scored this run; --deep needs that one" for line in changed])


def _choose(store: Store, job: JobSpec, plan: Plan, num_samples: int) -> Iterator[Sample]:
    """Images of shards in an order drawn from the plan's digest, a few of each."""
    draw = random.Random(plan.digest)
    numbers = sorted(list_commits(store))
    draw.shuffle(numbers)
    each = max(1, -(-num_samples // max(1, len(numbers))))
    num_left = num_samples
    for number in numbers:
        path = store.fetch(f"{SHARDS}/{shard_name(job.name, number)}.tar")
        held = {
            key
            for key, _, extension in (name.partition(".") for name, _, _ in tar_entries(path))
            if extension in IMAGE_FORMATS
        }
        specs = [spec for spec in plan.samples(plan.shard(number)) if spec.key in held]
        drawn = {spec.key: spec for spec in draw.sample(specs, min(each, num_left, len(specs)))}
        kinds = companions_of(job.requests[plan.shard(number).request])
        others = {kind: _read(store, job, number, kind, drawn) for kind in kinds}
        # One at a time: a shard may hold gigabytes, and other software may have written it.
        for key, image, record, _ in read_shard(path):
            if key in drawn:
                companions = {kind: images[key] for kind, images in others.items() if key in images}
                yield Sample(drawn[key], image, record, companions)
        num_left -= len(drawn)
        if not num_left:
            return


def _read(
    store: Store, job: JobSpec, number: int, kind: str, keys: Mapping[str, SampleSpec]
) -> dict[str, tuple[bytes, dict[str, Any]]]:
    """Image files and records of some samples of a companion of a shard."""
    path = store.fetch(companion_name(kind, shard_name(job.name, number)))
    return {key: (image, record) for key, image, record, _ in read_shard(path) if key in keys}


def _differences(stored: dict[str, Any], made: dict[str, Any]) -> list[str]:
    """The scores that differ from the stored ones, in words."""
    return [
        f"{text} {before:.6g} -> {after:.6g}"
        for name, text, before, after in _verified(stored, made)
        if _differs(name, before, after)
    ]


def _verified(stored: dict[str, Any], made: dict[str, Any]) -> Iterator[tuple[str, str, float, float]]:
    """The scores to compare: name, name with the model of an entry, stored and new value.

    A run of an earlier schema version lacks later columns, and so do its rows.
    """
    # Scores first, then classes.
    for column in sorted(columns_with(Role.VERIFIED), key=lambda column: column.type != "float"):
        if column.name in stored:
            yield column.name, column.name, stored[column.name], made[column.name]
    for column in RECORD_COLUMNS:
        names = [part.name for part in column.parts if Role.VERIFIED in part.roles]
        if not names or column.name not in stored:
            continue
        old, new = stored[column.name], made[column.name]
        yield column.name, f"entries of {column.name}", len(old), len(new)
        for before, after in zip(old, new, strict=False):
            for name in names:
                yield name, f"{name} of {before['model']}", before[name], after[name]


def _differs(name: str, before: float, after: float) -> bool:
    """Whether a value is not the stored one: beyond the tolerance of a score; of a class, any other."""
    column = BY_NAME[name]
    return abs(before - after) > column.tolerance if column.type == "float" else before != after
