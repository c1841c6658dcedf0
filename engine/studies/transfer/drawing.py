"""Heat maps with their figures in the cells; what guided is outlined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from engine.studies.experiments.figures import draw

# Guided: a full line. Left out of the ensemble, the figure that says how far failures carry: a dashed one.
FULL, DASHED = "solid", "dashed"
_DARK = 0.55
_CELL_WIDTH, _CELL_HEIGHT, _MARGIN = 0.95, 0.42, 1.7


@dataclass(frozen=True, slots=True, kw_only=True)
class HeatMap:
    """Shares by row and column.

    Attributes:
        shares: [rows][columns]; None where there is none.
        outlines: style of the frame by row and column.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    shares: Sequence[Sequence[float | None]]
    outlines: dict[tuple[int, int], str]
    row_title: str
    column_title: str


def draw_maps(maps: Sequence[HeatMap]) -> str:
    """Heat maps next to each other as SVG."""
    width = sum(_MARGIN + _CELL_WIDTH * len(one.columns) for one in maps)
    height = 1.4 + _CELL_HEIGHT * max(len(one.rows) for one in maps)

    def paint(figure: Any) -> None:
        for place, one in enumerate(maps):
            _paint(figure.add_subplot(1, len(maps), place + 1), one)

    return draw(width, height, paint)


def _paint(axes: Any, one: HeatMap) -> None:
    import numpy as np

    shares = np.array([[np.nan if share is None else share for share in row] for row in one.shares])
    axes.pcolormesh(np.ma.masked_invalid(shares), cmap="Blues", vmin=0, vmax=1, edgecolors="white", linewidth=1)
    axes.grid(visible=False)
    axes.invert_yaxis()
    axes.set_xticks([place + 0.5 for place in range(len(one.columns))], one.columns, rotation=30, ha="right")
    axes.set_yticks([place + 0.5 for place in range(len(one.rows))], one.rows)
    axes.tick_params(length=0)
    axes.set_title(one.title)
    axes.set_xlabel(one.column_title)
    axes.set_ylabel(one.row_title)
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)
    for row, values in enumerate(one.shares):
        for column, share in enumerate(values):
            if share is not None:
                colour = "white" if share > _DARK else "black"
                axes.text(column + 0.5, row + 0.5, f"{share:.2f}", ha="center", va="center", color=colour)
    for (row, column), style in one.outlines.items():
        _outline(axes, row, column, style)


def _outline(axes: Any, row: int, column: int, style: str) -> None:
    from matplotlib.patches import Rectangle

    inset = 0.04
    size = 1 - 2 * inset
    frame = Rectangle(
        (column + inset, row + inset), size, size, fill=False, edgecolor="#D55E00", linewidth=2, linestyle=style
    )
    axes.add_patch(frame)
