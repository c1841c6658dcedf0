"""Contact sheet of a run: the images of some requests in rows, enlarged without smoothing, request by request.

    uv run python tools/contact_sheet.py RUN OUTPUT.png --requests between between-plain
    uv run python tools/contact_sheet.py RUN OUTPUT.png --pairs risky-s030
    uv run python tools/contact_sheet.py RUN OUTPUT.png --filters "accepted" "not accepted and oracle_agrees"

Requests of one seed group show the same noise in the same place. With --pairs, a column is a sample: the real image
that it started from (where there is one), its unguided twin, the sample, and ten times their difference on grey. With
--filters, a group is what passes a filter, spread evenly over the run.
"""

from __future__ import annotations

import argparse
from itertools import islice
from pathlib import Path

import numpy as np
import PIL.Image

from engine import open_run
from engine.data.images import decode_rgb
from engine.data.run.shards import read_shard
from engine.errors import JobError

MARGIN_PIXELS = 4
GAP_PIXELS = 24
AMPLIFICATION, GREY = 10, 128


def images_of(run: Path, request: str, count: int) -> list[PIL.Image.Image]:
    """The first images of a request, in the order of their keys."""
    found = []
    for path in sorted(run.glob("shards/*.tar")):
        for _, data, record, _ in read_shard(path):
            if record["request"] == request:
                found.append(decode_rgb(data))
                if len(found) == count:
                    return found
    return found


def filtered(run: Path, condition: str, count: int) -> list[PIL.Image.Image]:
    """Stored images that pass a filter, evenly spaced in the order of their keys."""
    keys = sorted(open_run(str(run)).filter(condition).filter("sha256 != ''").to_table(["key"])["key"].to_pylist())
    chosen = {keys[len(keys) * place // count] for place in range(count)} if len(keys) > count else set(keys)
    return [
        decode_rgb(data)
        for path in sorted(run.glob("shards/*.tar"))
        for key, data, _, _ in read_shard(path)
        if key in chosen
    ]


def pairs_of(run: Path, request: str, count: int, skip: int = 0) -> list[list[PIL.Image.Image]]:
    """Starts (where they have some), twins, samples and amplified differences of samples after the first `skip`."""
    every = open_run(str(run)).filter(f"request == '{request}'").pairs()
    pairs = [pair for pair in islice(every, skip, skip + count) if pair.twin is not None]
    starts = [pair.start for pair in pairs if pair.start is not None]
    twins, samples = [pair.twin for pair in pairs if pair.twin is not None], [pair.image for pair in pairs]
    rows = [twins, samples, [amplified(sample, twin) for sample, twin in zip(samples, twins, strict=True)]]
    return [starts, *rows] if starts else rows


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
    shown.add_argument("--filters", nargs="+", metavar="EXPR")
    parser.add_argument("--count", type=int, help="default: 24, with --pairs 10")
    parser.add_argument("--skip", type=int, default=0, help="of the pairs")
    parser.add_argument("--columns", type=int, help="default: 12, with --pairs --count")
    parser.add_argument("--pixels", type=int, help="default: 64, with --pairs 96")
    arguments = parser.parse_args()
    run, pairs = arguments.run, arguments.pairs
    count = arguments.count or (10 if pairs else 24)
    names = [pairs] if pairs else arguments.filters or arguments.requests
    images = filtered if arguments.filters else images_of
    try:
        groups = pairs_of(run, pairs, count, arguments.skip) if pairs else [images(run, one, count) for one in names]
    except JobError as error:
        parser.error(str(error))
    if not all(groups):
        parser.error(f"{run} has no {'twins' if pairs else 'images'} of one of {names}")
    columns, pixels = arguments.columns or (count if pairs else 12), arguments.pixels or (96 if pairs else 64)
    gap = 0 if pairs else GAP_PIXELS
    sheet(groups, columns, pixels, gap).save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
