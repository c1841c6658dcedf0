"""Answers to pairs as preference records, which `riskforge curate --preferences FILE` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from engine.data.review.answers import PAIR, last_answers, read_answers
from engine.data.stores.base import Store
from engine.data.stores.file_errors import explained
from engine.errors import JobError
from engine.studies.output_folders import check_replaces


def write_preferences(store: Store, path: Path, rater: str = "") -> int:
    """Write the choices between pairs as JSON lines; "equal" is no preference, and a repetition only a check.

    Args:
        rater: whose alone; empty for all raters'.

    Returns:
        The number of records.

    Raises:
        JobError: there are none, or the file's name ends otherwise.
        OutputError: another file has this name.
    """
    lines = list(_lines(store, rater))
    if not lines:
        whose = f"of '{rater}' " if rater else ""
        raise JobError(
            f"--preferences: {store.uri} has no answers {whose}to pairs; let people compare some by `riskforge review"
            " RUN --pairs`"
        )
    if path.suffix.lower() != ".jsonl":
        raise JobError(f"--preferences: '{path}' does not end in .jsonl, the format that is written; rename it")
    check_replaces("--preferences", path, '{"first": ')
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return len(lines)


def _lines(store: Store, rater: str) -> Iterator[str]:
    for row in last_answers(read_answers(store)).to_pylist():
        is_choice = row["mode"] == PAIR and row["answer_class"] >= 0 and row["kind"] == "sample"
        if is_choice and rater in ("", row["rater"]):
            yield json.dumps(
                {
                    "first": row["key"], "second": row["other_key"], "choice": row["answer_class"],
                    "rater": row["rater"], "time": datetime.fromisoformat(row["answered_at"]).timestamp(),
                }
            )  # fmt: skip
