"""Scores of stored images made once more, by the job's models, and held against what was stored."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from typing import Any

from engine.data.images.decode import UnusableImageError, decode_sample
from engine.data.run.commits import list_commits
from engine.data.run.shards import IMAGE_FORMATS, SHARDS, read_shard, shard_name, tar_entries
from engine.data.run.stored_plan import stored_plan
from engine.data.run.verify import Finding
from engine.data.stores.base import Store
from engine.errors import JobError
from engine.job.plan import Plan, SampleSpec, difference
from engine.job.records import STATUS_FAILED
from engine.job.spec import JobSpec
from engine.models.addresses import model_digests

NUM_SAMPLES = 64
# Of scores in nats and cosines; a GPU and its batches move them a little.
TOLERANCE = 1e-3
SCORES = ("risk", "conformity", "conformity_margin", "kldb", "entropy")
READINGS = ("predicted_class", "oracle_class")
SCORING = ("clip", "target", "transfer", "oracle", "judge")
# Of the entries of a list, one for each model.
ENTRY_SCORES = {"transfer": ("risk",), "judge": ("conformity", "conformity_margin")}

Sample = tuple[SampleSpec, bytes, dict[str, Any]]


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
    from engine.generation.generator import load_scorer
    from engine.models.libraries import quiet_libraries

    job, plan = stored_plan(store)
    chosen = _choose(store, job, plan, num_samples)
    if (first := next(chosen, None)) is None:
        return []
    _check_models(job, plan)
    advance("loading the models that score")
    quiet_libraries()
    scorer = load_scorer(job)
    findings = []
    for place, (spec, image, stored) in enumerate(itertools.chain([first], chosen)):
        advance(f"image {place + 1} of up to {num_samples}")
        try:
            decoded = decode_sample(image)
        except UnusableImageError as error:
            findings.append(Finding(kind="damage", text=f"{spec.key}: its image {error}"))
            continue
        [made] = scorer.records([spec], [decoded])
        if made["status"] == STATUS_FAILED:
            findings.append(Finding(kind="damage", text=f"{spec.key}: scored again, {made['error_message']}"))
        elif differences := _differences(stored, made):
            findings.append(Finding(kind="damage", text=f"{spec.key}: scored again, {'; '.join(differences)}"))
    return findings


def _check_models(job: JobSpec, plan: Plan) -> None:
    """Refuse models that have changed: what they score tells nothing of the images."""
    before, now = plan.identity["models"], model_digests(job, is_made=True)
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
        # One at a time: a shard of somebody else's may hold gigabytes.
        for key, image, record, _ in read_shard(path):
            if key in drawn:
                yield drawn[key], image, record
        num_left -= len(drawn)
        if not num_left:
            return


def _differences(stored: dict[str, Any], made: dict[str, Any]) -> list[str]:
    """Scores that are not the stored ones."""
    pairs = [(name, stored[name], made[name]) for name in SCORES if abs(stored[name] - made[name]) > TOLERANCE]
    pairs += [(name, stored[name], made[name]) for name in READINGS if stored[name] != made[name]]
    for role, names in ENTRY_SCORES.items():
        # Version 1 has no judge, and its job names none.
        for before, after in zip(stored.get(role, []), made[role], strict=True):
            pairs += [
                (f"{name} of {before['model']}", before[name], after[name])
                for name in names
                if abs(before[name] - after[name]) > TOLERANCE
            ]
    return [f"{name} {before:.6g} -> {after:.6g}" for name, before, after in pairs]
