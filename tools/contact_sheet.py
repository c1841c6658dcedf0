"""Contact sheet of a run: the images of some requests in rows, enlarged without smoothing, request by request.

    uv run python tools/contact_sheet.py RUN OUTPUT.png --requests between between-plain
    uv run python tools/contact_sheet.py RUN OUTPUT.png --pairs risky-s030

Requests of one seed group show the same noise in the same place. With --pairs, a column is a sample: the real image
that it started from (where there is one), its unguided twin, the sample, and ten times their difference on grey.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import PIL.Image

from engine.data.images import decode_rgb
from engine.data.run.shards import SHARDS, read_shard
from engine.job.records import STARTS, TWINS

MARGIN_PIXELS = 4
GAP_PIXELS = 24
AMPLIFICATION, GREY = 10, 128


def images_of(run: Path, request: str, folder: str = SHARDS) -> dict[str, PIL.Image.Image]:
    """The images of a request by key, in the order of their keys; of a folder of companions, theirs."""
    return {
        key: decode_rgb(data)
        for path in sorted((run / folder).glob("*.tar"))
        for key, data, record, _ in read_shard(path)
        if record["request"] == request
    }


def pairs_of(run: Path, request: str, count: int) -> list[list[PIL.Image.Image]]:
    """Starts, twins, samples and amplified differences of the first samples with a twin; starts only where all have."""
    samples, twins, starts = (images_of(run, request, folder) for folder in (SHARDS, TWINS, STARTS))
    chosen = [key for key in samples if key in twins][:count]
    rows = [[starts[key] for key in chosen]] if all(key in starts for key in chosen) else []
    rows += [[images[key] for key in chosen] for images in (twins, samples)]
    return [*rows, [amplified(sample, twin) for twin, sample in zip(*rows[-2:], strict=True)]]


def amplified(sample: PIL.Image.Image, twin: PIL.Image.Image) -> PIL.Image.Image:
    """Difference of two images, ten times as large, on grey."""
    difference = np.asarray(sample, dtype=int) - np.asarray(twin, dtype=int)
    return PIL.Image.fromarray((GREY + AMPLIFICATION * difference).clip(0, 255).astype(np.uint8))


def sheet(groups: list[list[PIL.Image.Image]], columns: int, pixels: int, gap: int = GAP_PIXELS) -> PIL.Image.Image:
    """All groups below each other, `columns` images of `pixels` in a row, a wider gap between groups."""
    step = pixels + MARGIN_PIXELS
    rows = [-(-len(group) // columns) for group in groups]
    height = sum(rows) * step + gap * (len(groups) - 1) + MARGIN_PIXELS
    canvas = PIL.Image.new("RGB", (columns * step + MARGIN_PIXELS, height), "#888888")
    top = MARGIN_PIXELS
    for group, num_rows in zip(groups, rows, strict=True):
        for place, image in enumerate(group):
            left = MARGIN_PIXELS + place % columns * step
            enlarged = image.resize((pixels, pixels), PIL.Image.Resampling.NEAREST)
            canvas.paste(enlarged, (left, top + place // columns * step))
        top += num_rows * step + gap
    return canvas


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    shown = parser.add_mutually_exclusive_group(required=True)
    shown.add_argument("--requests", nargs="+")
    shown.add_argument("--pairs", metavar="REQUEST")
    parser.add_argument("--count", type=int, help="default: 24, with --pairs 10")
    parser.add_argument("--columns", type=int, help="default: 12, with --pairs --count")
    parser.add_argument("--pixels", type=int, help="default: 64, with --pairs 96")
    arguments = parser.parse_args()
    run, pairs = arguments.run, arguments.pairs
    count = arguments.count or (10 if pairs else 24)
    names = [pairs] if pairs else arguments.requests
    groups = pairs_of(run, pairs, count) if pairs else [list(images_of(run, name).values())[:count] for name in names]
    if not all(groups):
        parser.error(f"{run} has no {'twins' if pairs else 'images'} of one of {names}")
    columns, pixels = arguments.columns or (count if pairs else 12), arguments.pixels or (96 if pairs else 64)
    gap = 0 if pairs else GAP_PIXELS
    sheet(groups, columns, pixels, gap).save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
