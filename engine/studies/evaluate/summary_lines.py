"""The results of an evaluation, in lines for a terminal."""

from __future__ import annotations

from engine.report.evaluation import Evaluation, Interval, Memorisation, Quality, Slices, Source
from engine.report.text import number
from engine.studies.evaluate.nearest_images import MIN_HELD_OUT
from engine.terminal import printable


def summary_lines(result: Evaluation) -> list[str]:
    """The results, a line each."""
    lines = _unusable_lines("--real", result.real)
    lines += _unusable_lines("--train", result.memorisation.train if result.memorisation else None)
    lines += [f"left out: {printable(line)}" for line in result.left_out]
    for side in result.quality:
        lines.append(f"against {printable(side.against)}, in features of {printable(side.features)}:")
        lines += [f"  {_quality_text(quality)}" for quality in side.requests]
    if result.text_scores and result.text_scores.requests:
        kind = " (circular: it may have guided them)" if result.text_scores.is_circular else ""
        lines.append(f"CLIPScore under {printable(result.text_scores.model)}{kind}:")
        lines += [
            f"  {request.request}: {_range(request.score)} (n = {request.num_images})"
            for request in result.text_scores.requests
        ]
    if result.memorisation:
        lines += _memorisation_lines(result.memorisation, has_real=result.real is not None)
    return lines + _slice_lines(result.slices)


def _unusable_lines(option: str, source: Source | None) -> list[str]:
    """How many files of a source could not be used, and the first of them with their reasons."""
    if source is None or not source.num_unusable:
        return []
    lines = [f"{option}: {source.num_unusable} files of {printable(source.address)} could not be used:"]
    lines += [f"  {printable(line)}" for line in source.unusable]
    left = source.num_unusable - len(source.unusable)
    return [*lines, f"  and {left} more"] if left else lines


def _quality_text(quality: Quality) -> str:
    if quality.kid is None or quality.frechet is None or quality.precision is None or quality.recall is None:
        return f"{quality.request}: {quality.skipped}"
    return (
        f"{quality.request}: KID x 1,000 {_range(quality.kid, 1000)}, Frechet {_range(quality.frechet)},"
        f" precision {quality.precision.value:.2f}, recall {quality.recall.value:.2f} (n = {quality.num_images} each)"
    )


def _memorisation_lines(result: Memorisation, *, has_real: bool) -> list[str]:
    lines = [f"nearest of {result.train.num_images} training images of {printable(result.train.address)}:"]
    if result.thresholds is None:
        few = f"fewer than {MIN_HELD_OUT} images of --real are no training images; give more"
        hint = few if has_real else "give held-out images with --real to know what is near"
        lines.append(f"  no threshold: {hint}")
    for request in result.requests:
        distances = f"CLIP {request.clip_distance_median:.4f}, pixels {request.pixel_distance_median:.4f}"
        suspects = "" if request.num_suspects is None else f"; {request.num_suspects} of {request.num_images} suspect"
        lines.append(f"  {request.request}: median distance {distances}{suspects}")
    return lines


def _slice_lines(result: Slices) -> list[str]:
    if result.skipped:
        return [f"failures are not clustered: {result.skipped}"]
    lines = [f"{result.num_failures} failures in {len(result.slices)} clusters (silhouette {result.silhouette:.2f}):"]
    for failure_slice in result.slices:
        names = ", ".join(text for text, _ in failure_slice.texts) or "no text is near"
        share, num_samples = failure_slice.neighbourhood.value, failure_slice.num_neighbours
        rate = f"the target errs on {share:.0%} of {num_samples} samples thereabouts"
        lines.append(f"  {failure_slice.num_failures} failures, {printable(names)}; {rate}")
    return lines


def _range(interval: Interval, factor: float = 1.0) -> str:
    value, low, high = (number(part * factor) for part in (interval.value, interval.low, interval.high))
    return f"{value} ({low} to {high})"
