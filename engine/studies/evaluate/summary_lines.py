"""What an evaluation found, in lines for a terminal."""

from __future__ import annotations

from engine.report.evaluation import Evaluation, Interval, Memorisation, Quality, Slices, Source
from engine.report.text import number
from engine.studies.evaluate.nearest_images import MIN_HELD_OUT
from engine.terminal import printable


def summary_lines(found: Evaluation) -> list[str]:
    """What was found, a line each."""
    lines = _unusable_lines("--real", found.real)
    lines += _unusable_lines("--train", found.memorisation.train if found.memorisation else None)
    lines += [f"left out: {printable(line)}" for line in found.left_out]
    for side in found.quality:
        lines.append(f"against {printable(side.against)}, in features of {printable(side.features)}:")
        lines += [f"  {_quality_text(one)}" for one in side.requests]
    if found.text_scores and found.text_scores.requests:
        kind = " (circular: it may have guided them)" if found.text_scores.is_circular else ""
        lines.append(f"CLIPScore under {printable(found.text_scores.model)}{kind}:")
        lines += [f"  {one.request}: {_range(one.score)} (n = {one.num_images})" for one in found.text_scores.requests]
    if found.memorisation:
        lines += _memorisation_lines(found.memorisation, has_real=found.real is not None)
    return lines + _slice_lines(found.slices)


def _unusable_lines(option: str, source: Source | None) -> list[str]:
    """How many files of a source could not be used, and the first of them with their reasons."""
    if source is None or not source.num_unusable:
        return []
    lines = [f"{option}: {source.num_unusable} files of {printable(source.address)} could not be used:"]
    lines += [f"  {printable(one)}" for one in source.unusable]
    left = source.num_unusable - len(source.unusable)
    return [*lines, f"  and {left} more"] if left else lines


def _quality_text(one: Quality) -> str:
    if one.kid is None or one.frechet is None or one.precision is None or one.recall is None:
        return f"{one.request}: {one.skipped}"
    return (
        f"{one.request}: KID x 1,000 {_range(one.kid, 1000)}, Frechet {_range(one.frechet)},"
        f" precision {one.precision.value:.2f}, recall {one.recall.value:.2f} (n = {one.num_images} each)"
    )


def _memorisation_lines(found: Memorisation, *, has_real: bool) -> list[str]:
    lines = [f"nearest of {found.train.num_images} training images of {printable(found.train.address)}:"]
    if found.thresholds is None:
        few = f"fewer than {MIN_HELD_OUT} images of --real are no training images; give more"
        hint = few if has_real else "give held-out images with --real to know what is near"
        lines.append(f"  no threshold: {hint}")
    for one in found.requests:
        distances = f"CLIP {one.clip_distance_median:.4f}, pixels {one.pixel_distance_median:.4f}"
        suspects = "" if one.num_suspects is None else f"; {one.num_suspects} of {one.num_images} suspect"
        lines.append(f"  {one.request}: median distance {distances}{suspects}")
    return lines


def _slice_lines(found: Slices) -> list[str]:
    if found.skipped:
        return [f"failures are not clustered: {found.skipped}"]
    lines = [f"{found.num_failures} failures in {len(found.slices)} clusters (silhouette {found.silhouette:.2f}):"]
    for one in found.slices:
        names = ", ".join(text for text, _ in one.texts) or "no text is near"
        rate = f"the target errs on {one.neighbourhood.value:.0%} of {one.num_neighbours} samples thereabouts"
        lines.append(f"  {one.num_failures} failures, {printable(names)}; {rate}")
    return lines


def _range(one: Interval, factor: float = 1.0) -> str:
    value, low, high = (number(part * factor) for part in (one.value, one.low, one.high))
    return f"{value} ({low} to {high})"
