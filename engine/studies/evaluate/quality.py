"""Quality of a run's images: distances to other images, and agreement with their texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.job.spec import JobSpec
from engine.methods.intervals import Estimate
from engine.report.evaluation import Interval, Qualities, Quality, TextScore, TextScores
from engine.studies.evaluate.distances import Features, frechet_interval, kernel_distance, precision_recall
from engine.studies.evaluate.image_features import ImageFeatures, VisionModels, unit
from engine.studies.evaluate.inputs import StudiedSamples
from engine.studies.evaluate.options import MIN_IMAGES, EvaluateOptions
from engine.studies.intervals import mean_interval

# Hessel et al., "CLIPScore" (EMNLP 2021), equation 1.
TEXT_WEIGHT = 2.5


def qualities(
    samples: StudiedSamples, real: ImageFeatures | None, names: Sequence[str], features: str, options: EvaluateOptions
) -> tuple[Qualities, ...]:
    """Every request compared with the real images, and with the reference request.

    Args:
        names: of the requests.
        features: name of the extractor.
    """
    sides: list[tuple[str, Features, NDArray[np.int64], Sequence[str]]] = []
    if real is not None:
        sides.append((f"real images of {options.real}", _double(real.features), real.classes, names))
    if options.reference is not None:
        rows = samples.rows(options.reference)
        others = [name for name in names if name != options.reference]
        images = samples.images
        sides.append((f"request {options.reference}", _double(images.features[rows]), images.classes[rows], others))
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


def _quality(samples: StudiedSamples, request: str, other: Features, classes: NDArray[np.int64], seed: int) -> Quality:
    rows = samples.rows(request)
    own, theirs = match_classes(samples.images.classes[rows], classes, seed)
    if len(own) < MIN_IMAGES:
        why = f"{len(own)} images of each side are of the same classes; {MIN_IMAGES} are needed"
        return Quality(request=request, num_images=len(own), skipped=why)
    first, second = _double(samples.images.features[rows[own]]), other[theirs]
    manifolds = precision_recall(first, second)
    return Quality(
        request=request,
        num_images=len(own),
        kid=interval_of(kernel_distance(first, second, seed=seed)),
        frechet=interval_of(frechet_interval(first, second, seed=seed)),
        precision=interval_of(manifolds.precision),
        recall=interval_of(manifolds.recall),
    )


def match_classes(
    first: NDArray[np.int64], second: NDArray[np.int64], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Places in both sets with equally many of each class, as many as there are, drawn evenly.

    Otherwise a distance would measure the mixtures of classes, or the sizes of the sets.
    """
    rng = np.random.default_rng(seed)
    places: tuple[list[int], list[int]] = ([], [])
    for index in np.intersect1d(first, second):
        rows_of_class = [np.flatnonzero(classes == index) for classes in (first, second)]
        count = min(map(len, rows_of_class))
        for side, rows in zip(places, rows_of_class, strict=True):
            side += sorted(rng.choice(rows, count, replace=False).tolist())
    own, theirs = (np.array(side, dtype=np.int64) for side in places)
    return own, theirs


def interval_of(estimate: Estimate) -> Interval:
    """An estimate as the document of an evaluation has it."""
    return Interval(value=estimate.value, low=estimate.low, high=estimate.high)


def text_scores(samples: StudiedSamples, job: JobSpec, models: VisionModels) -> TextScores:
    """CLIPScore of every request: its mean over images, with Student's interval (Hessel et al. 2021, equation 1)."""
    model, embeds = (models.judge, samples.images.judged) if models.judge else (models.clip, samples.images.clip)
    prompts = list(dict.fromkeys(record["prompt"] for record in samples.records))
    texts = unit(model.text_embeds(prompts).numpy())
    row_of = {prompt: row for row, prompt in enumerate(prompts)}
    cosines = (embeds * texts[[row_of[record["prompt"]] for record in samples.records]]).sum(1)
    scores = TEXT_WEIGHT * np.maximum(cosines, 0).astype(np.float64)
    requests = []
    for name in (request.name for request in job.requests):
        if len(rows := samples.rows(name)) >= 2:
            score = interval_of(mean_interval(scores[rows].tolist()))
            requests.append(TextScore(request=name, num_images=len(rows), score=score))
    is_circular = models.judge is None and model.name == job.models.clip
    return TextScores(model=model.name, is_circular=is_circular, requests=tuple(requests))
