"""A fourth export format, as somebody would add it: images and a CSV table. `tests/test_extending.py` installs it."""

from __future__ import annotations

import csv

from engine.data.reading.format_registry import ExportData, Written
from engine.data.stores.file_errors import explained
from engine.job.columns import RECORD_COLUMNS

LOADING = """## Loading

`samples.csv` has a line for each image: its path, its label, and the columns that are no lists."""


def write_table(data: ExportData) -> Written:
    """Write `images/KEY.png` and `samples.csv`; holds one image at a time."""
    names = [column.name for column in RECORD_COLUMNS if not column.is_list]
    root = data.store.root
    with explained(root), (root / "samples.csv").open("w", newline="", encoding="utf-8") as file:
        (root / "images").mkdir()
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["file_name", "label", *names])
        for result, extension in data.samples:
            record = result.record
            path = f"images/{record['key']}.{extension}"
            (root / path).write_bytes(result.image)
            table.writerow([path, record["class_index"], *(record[name] for name in names)])
    return Written(data_files=["samples.csv"], loading=LOADING)
