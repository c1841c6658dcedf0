"""An evaluation as the report's template takes it: tables, and images with what is said below them."""

from __future__ import annotations

from typing import Any

from engine.job.columns import BY_NAME
from engine.report.evaluation import (
    Evaluation,
    Extremes,
    Interval,
    Memorisation,
    Qualities,
    Shown,
    Slice,
    Source,
    TextScores,
)
from engine.report.headline import Heading, Line, Table
from engine.report.text import ABSENT, clip, number, percent

MAX_UNUSABLE_SHOWN = 3


def evaluation_context(found: Evaluation | None, num_attempts: int) -> dict[str, Any] | None:
    """What the template shows of an evaluation.

    Args:
        num_attempts: of the run as it is now.
    """
    if found is None:
        return None
    stale = found.num_attempts != num_attempts
    return {
        "lead": _lead(found),
        "stale": f"It was made when the run had {found.num_attempts:,} attempts; there are {num_attempts:,} now."
        if stale
        else "",
        "quality": [{"note": _quality_note(side), "table": _quality_table(side)} for side in found.quality],
        "text_scores": _text_table(found.text_scores) if found.text_scores and found.text_scores.requests else None,
        "text_note": _text_note(found.text_scores) if found.text_scores else "",
        "memorisation": _memorisation(found.memorisation, found) if found.memorisation else None,
        "slices": [_slice(one, found) for one in found.slices.slices],
        "slices_note": _slices_note(found),
        "extremes": [_extreme(one, found) for one in found.extremes],
    }


def _lead(found: Evaluation) -> str:
    total = sum(found.samples.values())
    text = f"{total:,} stored images were read, at most {found.limit:,} of each request"
    if found.real:
        text += f", and {found.real.num_images:,} real ones of {clip(found.real.address, 120)} ({found.real.kind})"
    left_out = "".join(f" Left out: {clip(line, 400)}." for line in found.left_out)
    return text + "." + _unusable_text(found.real) + left_out


def _unusable_text(source: Source | None) -> str:
    """How many files of a source could not be used, and the first of them."""
    if source is None or not source.num_unusable:
        return ""
    shown = source.unusable[:MAX_UNUSABLE_SHOWN]
    left = source.num_unusable - len(shown)
    more = f"; and {left:,} more" if left else ""
    return (
        f" {source.num_unusable:,} other files could not be used: {'; '.join(clip(one, 200) for one in shown)}{more}."
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
    for one in side.requests:
        figures = (one.kid, one.frechet, one.precision, one.recall)
        cells = [(f"{one.num_images:,}", one.skipped)]
        if not one.skipped:
            cells += [_cell(figures[0], 1000), _cell(figures[1]), _share(figures[2]), _share(figures[3])]
        lines.append(Line(clip(one.request, 120), "", False, cells + [("", "")] * (5 - len(cells))))
    return Table(columns, lines, 0)


def _cell(one: Interval | None, factor: float = 1.0) -> tuple[str, str]:
    if one is None:
        return ABSENT, ""
    return number(one.value * factor), f"{number(one.low * factor)} to {number(one.high * factor)}"


def _share(one: Interval | None) -> tuple[str, str]:
    return (ABSENT, "") if one is None else (percent(one.value), f"{one.low * 100:.0f} to {one.high * 100:.0f} %")


def _text_table(found: TextScores) -> Table:
    lines = [
        Line(clip(one.request, 120), "", False, [(f"{one.num_images:,}", ""), _cell(one.score)])
        for one in found.requests
    ]
    return Table([Heading("Request"), Heading("Images"), Heading("CLIPScore", "mean, 95 %")], lines, 0)


def _text_note(found: TextScores) -> str:
    text = f"2.5 times the cosine of image and prompt, not below zero, under {clip(found.model, 200)}."
    if found.is_circular:
        text += (
            " This is the job's own CLIP model, which guidance, conformity floors and rules of acceptance may have"
            " used: the figure is circular. Name another one as models.judge."
        )
    return text


def _memorisation(found: Memorisation, whole: Evaluation) -> dict[str, Any]:
    columns = [
        Heading("Request"),
        Heading("Images"),
        Heading("CLIP distance", "median"),
        Heading("Pixel distance", "median"),
    ]
    limits = found.thresholds
    columns += [Heading("Suspect", "95 %")] if limits else []
    lines = []
    for one in found.requests:
        cells = [
            (f"{one.num_images:,}", ""), (number(one.clip_distance_median), ""), (number(one.pixel_distance_median), "")
        ]  # fmt: skip
        if limits and one.suspects:
            share = one.suspects
            spread = f"{share.value * 100:.1f} % ({share.low * 100:.1f} to {share.high * 100:.1f} %)"
            cells.append((f"{one.num_suspects:,}", spread))
        lines.append(Line(clip(one.request, 120), "", False, cells))
    if limits:
        cells = [(f"{limits.num_held_out:,}", ""), (number(limits.clip_distance_median), ""),
                 (number(limits.pixel_distance_median), ""),
                 (f"{limits.num_suspects:,}", f"{limits.num_suspects / limits.num_held_out * 100:.1f} %")]  # fmt: skip
        lines.append(Line("held-out real images", "for comparison", True, cells))
    return {
        "note": _memorisation_note(found),
        "table": Table(columns, lines, 0),
        "pairs": [
            {
                "sample": _shown(pair.sample, whole),
                "training": _shown(pair.training, whole),
                "is_suspect": pair.is_suspect,
                "text": f"CLIP {number(pair.clip_distance)}, pixels {number(pair.pixel_distance)}",
            }
            for pair in found.pairs
        ],
    }


def _memorisation_note(found: Memorisation) -> str:
    text = (
        f"Of every sample the nearest of {found.train.num_images:,} training images of {clip(found.train.address, 120)}"
        f" in the space of {clip(found.model, 120)}: distance is one minus the cosine, and that of pixels the root mean"
        " square at 32 x 32 in [0, 1]."
    )
    text += _unusable_text(found.train)
    limits = found.thresholds
    if limits is None:
        return text + " Without enough held-out real images (--real) nothing tells how near is near."
    text += (
        f" Suspect: nearer in both than all but one in a hundred of {limits.num_held_out:,} held-out real images"
        f" ({number(limits.clip_distance)} and {number(limits.pixel_distance)})."
    )
    if limits.num_shared:
        text += f" {limits.num_shared:,} held-out images are training images themselves and were left out."
    return text


def _slices_note(found: Evaluation) -> str:
    slices = found.slices
    kind = "accepted failures" if slices.which == "accepted" else "failures, rejected ones too"
    if slices.skipped:
        return f"Not clustered: {slices.skipped}."
    return (
        f"{slices.num_failures:,} {kind} among {slices.num_samples:,} images, clustered in the space of"
        f" {clip(slices.model, 120)} (silhouette {number(slices.silhouette or 0.0)}; near 0 the clusters run into each"
        " other). Each is named by the texts that its images are nearer to than all images are; the rate is that of all"
        f" images as near to its centre as its own, {percent(slices.error_rate)} over everything."
    )


def _slice(one: Slice, whole: Evaluation) -> dict[str, Any]:
    rate = one.neighbourhood
    return {
        "name": ", ".join(clip(text, 80) for text, _ in one.texts) or "no text is near",
        "texts": ", ".join(f"{clip(text, 80)} (+{value:.3f})" for text, value in one.texts),
        "size": f"{one.num_failures:,} failures, {percent(one.share)} of all",
        "rate": f"{percent(rate.value)} ({rate.low * 100:.0f} to {rate.high * 100:.0f} %) of {one.num_neighbours:,}"
        " images thereabouts are errors",
        "confusions": ", ".join(f"{clip(a, 60)} → {clip(b, 60)} ({count:,})" for a, b, count in one.confusions),
        "requests": ", ".join(f"{clip(name, 60)} ({count:,})" for name, count in one.requests),
        "images": [_shown(image, whole) for image in one.prototypes],
    }


def _extreme(one: Extremes, whole: Evaluation) -> dict[str, Any]:
    label = BY_NAME[one.score].title
    medians = [ABSENT if value is None else number(value) for value in (one.median_real, one.median_samples)]
    return {
        "title": clip(one.title, 200),
        "note": f"{label}, median: {medians[0]} over {one.num_real:,} real images, {medians[1]} over"
        f" {one.num_samples:,} samples.",
        "rows": [{"title": row.title, "images": [_shown(image, whole) for image in row.images]} for row in one.rows],
    }


def _shown(one: Shown, whole: Evaluation) -> dict[str, Any]:
    uri = whole.images.get(one.image, "")
    return {
        "uri": uri,
        "is_tiny": uri.startswith("data:image/png"),
        "name": one.name,
        "text": one.text,
        "key": one.name if one.is_sample else "",
    }
