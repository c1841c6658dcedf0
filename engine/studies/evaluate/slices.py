"""Slices of failures: clusters of samples on which the target errs, with names, error rates and prototypes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.job.plan import class_prompt
from engine.models.clip import Clip
from engine.report.evaluation import Slice, Slices
from engine.report.text import clip as clipped
from engine.studies.evaluate.clusters import (
    ATTRIBUTES,
    MAX_CLUSTERED,
    Clusters,
    cluster,
    nearest_texts,
    neighbourhood,
    prototypes,
)
from engine.studies.evaluate.image_features import unit
from engine.studies.evaluate.image_registry import ImageRegistry
from engine.studies.evaluate.inputs import StudiedSamples
from engine.studies.evaluate.options import EvaluateOptions

MAX_CONTEXTS = 200
MAX_CONFUSIONS = 3


def failure_slices(
    samples: StudiedSamples, labels: Sequence[str], clip: Clip, options: EvaluateOptions, registry: ImageRegistry
) -> Slices:
    """Cluster the failures of a run, and describe each cluster.

    Args:
        labels: class names in index order.
        clip: the model whose embeddings are clustered and name the clusters.
    """
    target_errs, points = samples.target_errs, samples.images.clip
    counted = target_errs if options.failures == "all" else target_errs & samples.flags("accepted")
    failures = np.flatnonzero(counted)
    counts: dict[str, Any] = {
        "which": options.failures,
        "model": clip.name,
        "num_failures": len(failures),
        "num_samples": len(points),
        "error_rate": float(target_errs.mean()),
    }
    if len(failures) > MAX_CLUSTERED:
        rng = np.random.default_rng(options.seed)
        failures = np.sort(rng.choice(failures, MAX_CLUSTERED, replace=False))
    try:
        clusters = cluster(points[failures], seed=options.seed)
    except ValueError as error:
        return Slices(**counts, skipped=str(error))
    texts = _texts(samples, labels, clip)
    numbers = range(len(clusters.centres))
    slices = tuple(_slice(samples, failures, clusters, number, texts, registry) for number in numbers)
    return Slices(**counts, silhouette=clusters.silhouette, slices=slices)


Texts = list[tuple[list[str], NDArray[np.float32]]]


def _texts(samples: StudiedSamples, labels: Sequence[str], clip: Clip) -> Texts:
    """Possible names of a slice with their embeddings: those of classes, and contexts with attributes."""
    counts = Counter(record["context"] for record in samples.records if record["context"])
    contexts = [context for context, _ in counts.most_common(MAX_CONTEXTS)]
    others = list(dict.fromkeys([*contexts, *ATTRIBUTES]))
    prompts = ([class_prompt(label) for label in labels], others)
    return [
        (names, unit(clip.text_embeds(some).numpy()))
        for names, some in zip((list(labels), others), prompts, strict=True)
    ]


def _slice(
    samples: StudiedSamples,
    failures: NDArray[np.int64],
    clusters: Clusters,
    number: int,
    texts: Texts,
    registry: ImageRegistry,
) -> Slice:
    points, centre = samples.images.clip, clusters.centres[number]
    own = failures[clusters.labels == number]
    rate, num_neighbours = neighbourhood(centre, points[own], points, samples.target_errs)
    named = [
        pair for (names, embeds), most in zip(texts, (1, 2), strict=True)
        for pair in nearest_texts(points[own], points, names, embeds, most)
    ]  # fmt: skip
    records = [samples.records[row] for row in own]
    pairs = Counter((registry.name_asked(record), registry.name_of(record["predicted_class"])) for record in records)
    chosen = own[prototypes(centre, points[own])]
    return Slice(
        texts=tuple((clipped(text, 200), value) for text, value in named),
        num_failures=len(own),
        share=len(own) / len(failures),
        neighbourhood=rate,
        num_neighbours=num_neighbours,
        confusions=tuple((*pair, count) for pair, count in pairs.most_common(MAX_CONFUSIONS)),
        requests=tuple(Counter(record["request"] for record in records).most_common(MAX_CONFUSIONS)),
        prototypes=tuple(registry.sample(samples, int(row)) for row in chosen),
    )
