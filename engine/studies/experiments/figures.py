"""Figures of studies as SVG, by matplotlib: equal figures give equal bytes, and no text is taken for a formula."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

# Distinguished by people who see few colours (Okabe and Ito 2008).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B8A000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_STYLE: dict[str, Any] = {
    "svg.hashsalt": "riskforge",
    # Text stays text: smaller files, and readable by search.
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "text.parse_math": False,
    "savefig.facecolor": "white",
}


def draw(width: float, height: float, paint: Callable[[Any], None]) -> str:
    """A figure as SVG.

    Args:
        width, height: in inches.
        paint: draws on the matplotlib figure that it is given.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with rc_context(_STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        paint(figure)
        written = io.StringIO()
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": "riskforge"})
    return written.getvalue()


def series_style(number: int) -> dict[str, Any]:
    """Colour and marker of a series."""
    return {"color": COLOURS[number % len(COLOURS)], "marker": MARKERS[number % len(MARKERS)]}
