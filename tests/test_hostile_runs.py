"""Runs whose files somebody bent: every file, bent in every way, before every command that reads runs.

Each ends by itself with an exit code of the contract, without a traceback, and, unless what it says is right all the
same, with a message that names the file.
"""

from __future__ import annotations

import copy
import functools
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from engine.dataset.commits import COMMITS
from engine.dataset.state import EVALUATION, MANIFEST, METADATA
from engine.executors.local import LocalExecutor
from tests.sleepy import run_sleepy

CODES = {0, 1, 2, 3, 4}
MAX_CHARS = 3000
# Nothing that is read of a run of ten samples takes longer, whatever stands in its place.
MAX_SECONDS = 20
RESCORED = "rescored/other"

Bend = Callable[[Path], None]


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three shards, with an evaluation and new scores."""
    run = tmp_path_factory.mktemp("sound") / "run"
    run_sleepy(run, 1, LocalExecutor(1))
    (run / EVALUATION).write_text(json.dumps(EVALUATED))
    scores = run / RESCORED
    (scores / "_state").mkdir(parents=True)
    manifest = json.loads((run / MANIFEST).read_text())
    (scores / MANIFEST).write_text(json.dumps(manifest | {"rescored_from": {"uri": "../.."}}))
    shutil.copy(run / METADATA, scores / METADATA)
    (scores / "_state/rescoring.json").write_text("{}")
    (scores / "_SUCCESS").write_text("")
    return run


EVALUATED: dict[str, Any] = {
    "study": "evaluate", "document_version": 1, "plan_digest": "x", "num_attempts": 10, "limit": 10, "seed": 0,
    "real": None, "samples": {}, "quality": [], "text_scores": None, "memorisation": None,
    "slices": {"which": "all", "model": "m", "num_failures": 0, "num_samples": 10, "error_rate": 0.0},
    "extremes": [], "images": {},
}  # fmt: skip


@pytest.fixture
def run(sound: Path, tmp_path: Path) -> Path:
    """A copy of it to bend."""
    return shutil.copytree(sound, tmp_path / "run", symlinks=True)


# What is called ------------------------------------------------------------------------------------------------------


def commands(run: Path) -> dict[str, list[str]]:
    """Command lines of all commands that read a run, as far as they load no models; the writing ones last."""
    out = run.parent
    return {
        "status": ["status", str(run), "--json"],
        "status-text": ["status", str(run)],
        "verify": ["verify", str(run)],
        "inspect": ["inspect", str(run)],
        "inspect-key": ["inspect", str(run), "--key", "sleepy-000-000-00000000"],
        "inspect-scores": ["inspect", str(run / RESCORED)],
        "compare": ["compare", str(run), str(run)],
        "compare-scores": ["compare", str(run), str(run / RESCORED)],
        "merge": ["merge", str(run), "--output", str(out / "merged")],
        "export": ["export", str(run), "--output", str(out / "exported")],
        "export-parquet": ["export", str(run), "--output", str(out / "exported-parquet"), "--format", "parquet"],
        "evaluate": ["evaluate", str(run), "--real", str(out / "nothing")],
        "rescore": ["rescore", str(run), "--target", str(out / "nothing")],
        "report": ["report", str(run)],
        "retry": ["retry", str(run), "--executor", "local"],
        "repair": ["repair", str(run)],
    }


# What is bent --------------------------------------------------------------------------------------------------------

FILES = {
    "plan": "_state/plan/000000.json",
    "record": f"{COMMITS}/000001.*",
    "lease": "_state/lease/*.json",
    "events": "_state/events/*.jsonl",
    "tar": "shards/sleepy-000001.tar",
    "parquet": "shards/sleepy-000001.parquet",
    "metadata": METADATA,
    "manifest": MANIFEST,
    "evaluation": EVALUATION,
    "success": "_SUCCESS",
    "wids": "shards/wids.json",
    "scores-manifest": f"{RESCORED}/{MANIFEST}",
    "scores-metadata": f"{RESCORED}/{METADATA}",
}
DOCUMENTS = ("plan", "record", "lease", "manifest", "evaluation", "scores-manifest")


def place_of(run: Path, name: str) -> Path:
    """Where the file of a role is in a run."""
    [path] = run.glob(FILES[name])
    return path


def replaced(make: Callable[[Path], None]) -> Bend:
    """Something else in the place of a file."""

    def bend(path: Path) -> None:
        path.unlink()
        make(path)

    return bend


def rewritten(change: Callable[[bytes], bytes]) -> Bend:
    """Other bytes."""
    return lambda path: path.write_bytes(change(path.read_bytes())) and None


def flipped(at: float) -> Bend:
    """Another bit, at a share of the length."""
    return rewritten(
        lambda data: bytes(
            [*data[: int(at * len(data))], data[int(at * len(data))] ^ 4, *data[int(at * len(data)) + 1 :]]
        )
    )


def sparse(path: Path) -> None:
    """A terabyte of nothing."""
    with path.open("wb") as file:
        file.truncate(2**40)


BENDS: dict[str, Bend] = {
    "missing": Path.unlink,
    "empty": rewritten(lambda data: b""),
    "half": rewritten(lambda data: data[: len(data) // 2]),
    "random": rewritten(lambda data: random.Random(0).randbytes(len(data))),
    "zeros": rewritten(lambda data: bytes(len(data))),
    "deep": rewritten(lambda data: b"[" * 200_000 + b"]" * 200_000),
    "deep-objects": rewritten(lambda data: b'{"a":' * 2000 + b"1" + b"}" * 2000),
    "nan": rewritten(lambda data: b"NaN"),
    "infinite": rewritten(lambda data: b'{"counts": -Infinity}'),
    "huge-float": rewritten(lambda data: b'{"counts": 1e999}'),
    "huge-int": rewritten(lambda data: b'{"counts": ' + b"9" * 5000 + b"}"),
    "large-int": rewritten(lambda data: b'{"counts": ' + b"9" * 400 + b"}"),
    "null": rewritten(lambda data: b"null"),
    "list": rewritten(lambda data: b"[]"),
    "object": rewritten(lambda data: b"{}"),
    "text": rewritten(lambda data: b'"text"'),
    "number": rewritten(lambda data: b"7"),
    "half-character": rewritten(lambda data: b'{"name": "\\ud800"}'),
    "utf-16": rewritten(lambda data: data.decode("latin-1").encode("utf-16")),
    "flip-early": flipped(0.02),
    "flip": flipped(0.5),
    "flip-late": flipped(0.99),
    "pipe": replaced(os.mkfifo),
    "device": replaced(lambda path: path.symlink_to("/dev/zero")),
    "sparse": replaced(sparse),
    "folder": replaced(Path.mkdir),
    "loop": replaced(lambda path: path.symlink_to(path.name)),
    "dangling": replaced(lambda path: path.symlink_to("nowhere")),
}


# Fields --------------------------------------------------------------------------------------------------------------

VALUES: list[Any] = [
    None, True, -1, 1.5, 2**62, 1e300, "", "x", "../../x", "/etc/passwd", "a" * 5000, "\x1b[31m", [], [None], {},
    {"../x": 1}, [[1]], {"a": {"b": []}},
]  # fmt: skip


def places(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is something in a document."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield (*where, key)
        yield from places(inner, (*where, key))


def with_value(document: Any, place: tuple[Any, ...], value: Any) -> bytes:
    """A document with another value at a place."""
    bent = copy.deepcopy(document)
    *parents, last = place
    functools.reduce(lambda inner, key: inner[key], parents, bent)[last] = value
    return json.dumps(bent).encode()
