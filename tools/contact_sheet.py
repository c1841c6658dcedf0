"""Contact sheet of a run: the images of some requests in rows, enlarged without smoothing, request by request.

    uv run python tools/contact_sheet.py RUN OUTPUT.png --requests between between-plain

Requests of one seed group show the same noise in the same place.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import PIL.Image

from engine.data.images import decode_rgb
from engine.data.run.shards import read_shard

MARGIN_PIXELS = 4
GAP_PIXELS = 24


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


def sheet(groups: list[list[PIL.Image.Image]], columns: int, pixels: int) -> PIL.Image.Image:
    """All groups below each other, `columns` images of `pixels` in a row, a wider gap between groups."""
    step = pixels + MARGIN_PIXELS
    rows = [-(-len(group) // columns) for group in groups]
    height = sum(rows) * step + GAP_PIXELS * (len(groups) - 1) + MARGIN_PIXELS
    canvas = PIL.Image.new("RGB", (columns * step + MARGIN_PIXELS, height), "#888888")
    top = MARGIN_PIXELS
    for group, num_rows in zip(groups, rows, strict=True):
        for place, image in enumerate(group):
            left = MARGIN_PIXELS + place % columns * step
            enlarged = image.resize((pixels, pixels), PIL.Image.Resampling.NEAREST)
            canvas.paste(enlarged, (left, top + place // columns * step))
        top += num_rows * step + GAP_PIXELS
    return canvas


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--requests", nargs="+", required=True)
    parser.add_argument("--count", type=int, default=24)
    parser.add_argument("--columns", type=int, default=12)
    parser.add_argument("--pixels", type=int, default=64)
    arguments = parser.parse_args()
    groups = [images_of(arguments.run, request, arguments.count) for request in arguments.requests]
    if not all(groups):
        parser.error(f"{arguments.run} has no images of one of {arguments.requests}")
    sheet(groups, arguments.columns, arguments.pixels).save(arguments.output, optimize=True)


if __name__ == "__main__":
    main()
