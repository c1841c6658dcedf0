"""The section of a curated run: where it comes from, what selected it, and what that did to the balance of classes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup, escape

from engine.data.run.curated import ClassCount, Curation, curation_of
from engine.data.run.curation_text import curation_facts
from engine.report.charts import nice_ticks
from engine.report.headline import Heading, Line, Table
from engine.report.text import clip, percent

# With more classes the bars would be thinner than their gaps.
MAX_BARS = 40
MAX_LINES = 100
WIDTH, PLOT_HEIGHT = 900, 174
LEFT, RIGHT, TOP = 48, 8, 12
FLOOR = TOP + PLOT_HEIGHT
# Below the bars, for names across and for turned ones.
ACROSS, TURNED = 24, 64
MAX_ACROSS = 12
# Share of a class's width that its two bars fill.
_FILLED = 0.76
SERIES = ("candidates", "selected")
MAX_FACT_CHARS = 600


def curation_section(manifest: Mapping[str, Any]) -> dict[str, Any] | None:
    """What the template needs to show the curation of a run; None of a run that was not curated.

    Raises:
        ValueError: the manifest has another kind of curation than the engine writes.
    """
    curation = curation_of(manifest)
    if curation is None:
        return None
    return {
        "facts": [(name, clip(text, MAX_FACT_CHARS)) for name, text in curation_facts(curation)],
        "has_alarm": curation.monitor is not None and curation.monitor.alarm,
        "series": SERIES,
        "chart": _chart(curation) if len(curation.classes) <= MAX_BARS else None,
        "table": _table(curation),
    }


def _shares(curation: Curation, count: ClassCount) -> tuple[float, float]:
    """Share of a class among the candidates and among the selected samples."""
    return count.candidates / max(curation.num_candidates, 1), count.selected / max(curation.num_selected, 1)


def _table(curation: Curation) -> Table:
    """A line for each class; of many the ones whose share changed most, in their order."""
    by_change = sorted(curation.classes, key=lambda count: -abs(_change(curation, count)))
    kept = set(by_change[:MAX_LINES])
    lines = [_line(curation, count) for count in curation.classes if count in kept]
    headings = [
        Heading("Class"),
        Heading("Candidates", "share of them"),
        Heading("Selected", "share of them"),
        Heading("Change of the share", "in points"),
        Heading("Selected of the candidates"),
    ]
    return Table(headings, lines, len(curation.classes) - len(lines))


def _change(curation: Curation, count: ClassCount) -> float:
    before, after = _shares(curation, count)
    return after - before


def _line(curation: Curation, count: ClassCount) -> Line:
    before, after = _shares(curation, count)
    cells = [
        (f"{count.candidates:,}", percent(before)),
        (f"{count.selected:,}", percent(after)),
        (f"{(after - before) * 100:+.1f}", ""),
        (percent(count.selected / max(count.candidates, 1)), ""),
    ]
    return Line(clip(count.name, 120), "", False, cells)


def _chart(curation: Curation) -> Markup:
    """Two bars for each class: its share of the candidates, and of the selected samples."""
    shares = [_shares(curation, count) for count in curation.classes]
    top = max((max(pair) for pair in shares), default=0.0) * 1.05 or 1.0
    step = (WIDTH - LEFT - RIGHT) / max(len(shares), 1)
    height = FLOOR + (ACROSS if len(shares) <= MAX_ACROSS else TURNED)
    parts = [_axis(top)]
    for place, (count, pair) in enumerate(zip(curation.classes, shares, strict=True)):
        left, width = LEFT + step * (place + (1 - _FILLED) / 2), step * _FILLED / 2
        for number, (share, name) in enumerate(zip(pair, SERIES, strict=True)):
            tall = share / top * PLOT_HEIGHT
            outline = f"M{left + number * width:.1f} {FLOOR}v{-tall:.1f}h{width:.1f}v{tall:.1f}z"
            title = escape(f"{count.name}: {percent(share)} of the {name}")
            parts.append(f'<path class="bar s{number}" d="{outline}"><title>{title}</title></path>')
        parts.append(_label(clip(count.name, 12), left + width, len(shares)))
    return Markup(
        f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="Share of each class among candidates and selected'
        f' samples">{"".join(parts)}</svg>'
    )


def _axis(top: float) -> str:
    parts = []
    for tick in nice_ticks(0, top, 4):
        y = FLOOR - tick / top * PLOT_HEIGHT
        parts.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick * 100:g}</text>')
    parts.append(f'<path class="axis" d="M{LEFT} {FLOOR}H{WIDTH - RIGHT}"/>')
    middle = TOP + PLOT_HEIGHT / 2
    parts.append(f'<text transform="translate(12 {middle}) rotate(-90)" text-anchor="middle">share (%)</text>')
    return "".join(parts)


def _label(text: str, x: float, num_classes: int) -> str:
    """The name of a class below its bars; turned where many of them share the width."""
    y = FLOOR + 16
    if num_classes <= MAX_ACROSS:
        return f'<text x="{x:.1f}" y="{y}" text-anchor="middle">{escape(text)}</text>'
    return f'<text transform="translate({x + 4:.1f} {y - 6}) rotate(-60)" text-anchor="end">{escape(text)}</text>'
