"""An evaluation as the report's template takes it: tables, and images with their captions."""

from __future__ import annotations

from typing import Any

from engine.job.columns import BY_NAME
from engine.report.evaluation import (
    Copies,
    Evaluation,
    Extremes,
    Interval,
    Memorisation,
    Qualities,
    Shown,
    Slice,
    Source,
    TextScores,
    Thresholds,
)
from engine.report.headline import Heading, Line, Table
from engine.report.text import ABSENT, clip, number, percent

MAX_UNUSABLE_SHOWN = 3


def evaluation_context(evaluation: Evaluation | None, num_attempts: int) -> dict[str, Any] | None:
    """What the template shows of an evaluation.

    Args:
        num_attempts: of the run as it is now.
    """
    if evaluation is None:
        return None
    stale = evaluation.num_attempts != num_attempts
    text_scores = evaluation.text_scores
    return {
        "lead": _lead(evaluation),
        "stale": f"It was made when the run had {evaluation.num_attempts:,} attempts; there are {num_attempts:,} now."
        if stale
        else "",
        "quality": [{"note": _quality_note(side), "table": _quality_table(side)} for side in evaluation.quality],
        "text_scores": _text_table(text_scores) if text_scores and text_scores.requests else None,
        "text_note": _text_note(text_scores) if text_scores else "",
        "memorisation": _memorisation(evaluation.memorisation, evaluation) if evaluation.memorisation else None,
        "slices": [_slice(cluster, evaluation) for cluster in evaluation.slices.slices],
        "slices_note": _slices_note(evaluation),
        "extremes": [_extreme(extremes, evaluation) for extremes in evaluation.extremes],
    }


def _lead(evaluation: Evaluation) -> str:
    total = sum(evaluation.samples.values())
    text = f"{total:,} stored images were read, at most {evaluation.limit:,} of each request"
    if evaluation.real:
        real = evaluation.real
        text += f", and {real.num_images:,} real ones of {clip(real.address, 120)} ({real.kind})"
    left_out = "".join(f" Left out: {clip(line, 400)}." for line in evaluation.left_out)
    return text + "." + _unusable_text(evaluation.real) + left_out


def _unusable_text(source: Source | None) -> str:
    """How many files of a source could not be used, and the first of them."""
    if source is None or not source.num_unusable:
        return ""
    shown = source.unusable[:MAX_UNUSABLE_SHOWN]
    left = source.num_unusable - len(shown)
    more = f"; and {left:,} more" if left else ""
    return (
        f" {source.num_unusable:,} other files could not be used: {'; '.join(clip(file, 200) for file in shown)}{more}."
    )


def _quality_note(side: Qualities) -> str:
    return (
        f"Against {clip(side.against, 200)}, in features of {clip(side.features, 200)}; equally many images of each"
        " class on both sides. KID: zero in expectation where both come from one distribution, with the middle 95 % of"
        " 50 subsets. Fréchet: biased upward for few images, so compare only rows with about equal n. Precision: share"
        " of samples that look real; recall: share of real images that samples come near to."
    )


def _quality_table(side: Qualities) -> Table:
    headings = ("KID", "x 1,000"), ("Fréchet distance", ""), ("Precision", ""), ("Recall", "")
    columns = [Heading("Request"), Heading("Images", "each side"), *(Heading(*heading) for heading in headings)]
    lines = []
    for quality in side.requests:
        figures = (quality.kid, quality.frechet, quality.precision, quality.recall)
        cells = [(f"{quality.num_images:,}", quality.skipped)]
        if not quality.skipped:
            cells += [_cell(figures[0], 1000), _cell(figures[1]), _share(figures[2]), _share(figures[3])]
        lines.append(Line(clip(quality.request, 120), "", False, cells + [("", "")] * (5 - len(cells))))
    return Table(columns, lines, 0)


def _cell(interval: Interval | None, factor: float = 1.0) -> tuple[str, str]:
    if interval is None:
        return ABSENT, ""
    return number(interval.value * factor), f"{number(interval.low * factor)} to {number(interval.high * factor)}"


def _share(interval: Interval | None) -> tuple[str, str]:
    if interval is None:
        return ABSENT, ""
    return percent(interval.value), f"{interval.low * 100:.0f} to {interval.high * 100:.0f} %"


def _text_table(scores: TextScores) -> Table:
    lines = [
        Line(clip(request.request, 120), "", False, [(f"{request.num_images:,}", ""), _cell(request.score)])
        for request in scores.requests
    ]
    return Table([Heading("Request"), Heading("Images"), Heading("CLIPScore", "mean, 95 %")], lines, 0)


def _text_note(scores: TextScores) -> str:
    text = f"2.5 times the cosine of image and prompt, not below zero, under {clip(scores.model, 200)}."
    if scores.is_circular:
        text += (
            " This is the job's own CLIP model, which guidance, conformity floors and rules of acceptance may have"
            " used: the figure is circular. Name another one as models.judge."
        )
    return text


def _memorisation(memorisation: Memorisation, whole: Evaluation) -> dict[str, Any]:
    return {
        "note": _memorisation_note(memorisation),
        "table": _memorisation_table(memorisation),
        "pairs": [
            {
                "sample": _shown(pair.sample, whole),
                "training": _shown(pair.training, whole),
                "is_suspect": pair.is_suspect,
                "text": f"CLIP {number(pair.clip_distance)}, pixels {number(pair.pixel_distance)}",
            }
            for pair in memorisation.pairs
        ],
    }


def _memorisation_table(memorisation: Memorisation) -> Table:
    """The requests, and below them the held-out real images where there are any."""
    headings = ("Request", ""), ("Images", ""), ("CLIP distance", "median"), ("Pixel distance", "median")
    limits = memorisation.thresholds
    columns = [*(Heading(*heading) for heading in headings), *([Heading("Suspect", "95 %")] if limits else [])]
    lines = []
    for copies in memorisation.requests:
        cells = _distances(copies)
        if limits and copies.suspects:
            share = copies.suspects
            spread = f"{share.value * 100:.1f} % ({share.low * 100:.1f} to {share.high * 100:.1f} %)"
            cells.append((f"{copies.num_suspects:,}", spread))
        lines.append(Line(clip(copies.request, 120), "", False, cells))
    if limits:
        share_of_all = f"{limits.num_suspects / limits.num_held_out * 100:.1f} %"
        cells = [*_distances(limits), (f"{limits.num_suspects:,}", share_of_all)]
        lines.append(Line("held-out real images", "for comparison", True, cells))
    return Table(columns, lines, 0)


def _distances(images: Copies | Thresholds) -> list[tuple[str, str]]:
    """Number of images, and the medians of their distances to training images."""
    count = images.num_images if isinstance(images, Copies) else images.num_held_out
    medians = (images.clip_distance_median, images.pixel_distance_median)
    return [(f"{count:,}", ""), *((number(median), "") for median in medians)]


def _memorisation_note(memorisation: Memorisation) -> str:
    train = memorisation.train
    text = (
        f"Of every sample the nearest of {train.num_images:,} training images of {clip(train.address, 120)} in the"
        f" space of {clip(memorisation.model, 120)}: distance is one minus the cosine, and that of pixels the root mean"
        " square at 32 x 32 in [0, 1]."
    )
    text += _unusable_text(train)
    limits = memorisation.thresholds
    if limits is None:
        return text + " Without enough held-out real images (--real) nothing tells how near is near."
    text += (
        f" Suspect: nearer in both than all but one in a hundred of {limits.num_held_out:,} held-out real images"
        f" ({number(limits.clip_distance)} and {number(limits.pixel_distance)})."
    )
    if limits.num_shared:
        text += f" {limits.num_shared:,} held-out images are training images themselves and were left out."
    return text


def _slices_note(evaluation: Evaluation) -> str:
    slices = evaluation.slices
    kind = "accepted failures" if slices.which == "accepted" else "failures, rejected ones too"
    if slices.skipped:
        return f"Not clustered: {slices.skipped}."
    return (
        f"{slices.num_failures:,} {kind} among {slices.num_samples:,} images, clustered in the space of"
        f" {clip(slices.model, 120)} (silhouette {number(slices.silhouette or 0.0)}; near 0 the clusters run into each"
        " other). Each is named by the texts that its images are nearer to than all images are; the rate is that of all"
        f" images as near to its centre as its own, {percent(slices.error_rate)} over everything."
    )


def _slice(cluster: Slice, whole: Evaluation) -> dict[str, Any]:
    rate = cluster.neighbourhood
    return {
        "name": ", ".join(clip(text, 80) for text, _ in cluster.texts) or "no text is near",
        "texts": ", ".join(f"{clip(text, 80)} (+{value:.3f})" for text, value in cluster.texts),
        "size": f"{cluster.num_failures:,} failures, {percent(cluster.share)} of all",
        "rate": f"{percent(rate.value)} ({rate.low * 100:.0f} to {rate.high * 100:.0f} %) of {cluster.num_neighbours:,}"
        " images thereabouts are errors",
        "confusions": ", ".join(f"{clip(a, 60)} → {clip(b, 60)} ({count:,})" for a, b, count in cluster.confusions),
        "requests": ", ".join(f"{clip(name, 60)} ({count:,})" for name, count in cluster.requests),
        "images": [_shown(image, whole) for image in cluster.prototypes],
    }


def _extreme(extremes: Extremes, whole: Evaluation) -> dict[str, Any]:
    label = BY_NAME[extremes.score].title
    medians = [ABSENT if value is None else number(value) for value in (extremes.median_real, extremes.median_samples)]
    return {
        "title": clip(extremes.title, 200),
        "note": f"{label}, median: {medians[0]} over {extremes.num_real:,} real images, {medians[1]} over"
        f" {extremes.num_samples:,} samples.",
        "rows": [
            {"title": row.title, "images": [_shown(image, whole) for image in row.images]} for row in extremes.rows
        ],
    }


def _shown(shown: Shown, whole: Evaluation) -> dict[str, Any]:
    uri = whole.images.get(shown.image, "")
    return {
        "uri": uri,
        "is_tiny": uri.startswith("data:image/png"),
        "name": shown.name,
        "text": shown.text,
        "key": shown.name if shown.is_sample else "",
    }
