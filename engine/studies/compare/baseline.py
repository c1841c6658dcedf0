"""A baseline: what a comparison needs of a run, pinned into one file, so that the run need not be kept."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.data.run.counts import JOINT_KEY
from engine.data.stores.file_errors import explained
from engine.errors import JobError
from engine.job.columns import stored_names
from engine.job.plan import TEMPERATURE, usable_temperature
from engine.methods.strict_json import parse_json
from engine.models.untrusted_files import read_whole
from engine.studies.compare.scored_run import (
    MEDIANS,
    ScoredRun,
    Texts,
    common_shares,
    night_of,
    read_scored_run,
    texts_of,
)
from engine.studies.output_folders import check_replaces

BASELINE_VERSION = 1
# Present in baselines whose errors of joint prompts are predictions outside their classes.
ERRORS_OUTSIDE = "errors_are_outside_subsets"
# A pinned run has some values of every sample.
MAX_BASELINE_BYTES = 2**30
BASELINE_BEGINNING = '{"baseline_version": '
# Earlier baselines do not have them.
_LATER_COLUMNS: dict[str, type] = {"strictly_valid": float, "predicted": np.int64}
_TEXT_COLUMNS = ("keys", "requests", "classes", "contexts", "prompts")


def pin_run(run: ScoredRun, path: Path) -> None:
    """Write what a comparison needs of a run into a file, so that the run need not be kept.

    Raises:
        OutputError: the file cannot be written, or is there and no baseline.
    """
    check_replaces("--pin", path, BASELINE_BEGINNING)
    document = {
        "baseline_version": BASELINE_VERSION,
        "address": run.address,
        "name": run.name,
        "target": run.target | ({} if run.temperature is None else {TEMPERATURE: run.temperature}),
        "labels": list(run.labels),
        "methods": run.methods,
        **{name: _packed(getattr(run, name)) for name in _TEXT_COLUMNS},
        "seeds": run.seeds.tolist(),
        "is_error": run.is_error.astype(int).tolist(),
        ERRORS_OUTSIDE: True,
        "valid": _flags(run.valid),
        **({} if run.strictly_valid is None else {"strictly_valid": _flags(run.strictly_valid)}),
        **({} if run.predicted is None else {"predicted": run.predicted.tolist()}),
        "night": run.night,
        **({"num_scored": run.num_scored} if run.num_scored > len(run.keys) else {}),
        **{name: values.tolist() for name, values in run.scores.items()},
    }
    text = json.dumps(document, ensure_ascii=False, allow_nan=False) + "\n"
    part = path.with_name(f".{path.name}.part")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(text, encoding="utf-8")
        part.replace(path)


def _flags(values: NDArray[np.float64]) -> list[int | None]:
    return [None if np.isnan(value) else int(value) for value in values]


def _packed(column: Texts) -> dict[str, Any]:
    values, codes = np.unique(column.astype(str), return_inverse=True) if len(column) else (column, column)
    return {"values": values.tolist(), "codes": codes.tolist()}


def _unpacked(packed: dict[str, Any]) -> Texts:
    return texts_of([str(packed["values"][code]) for code in packed["codes"]])


def read_baseline(path: Path) -> ScoredRun:
    """A run as `pin_run` wrote it.

    Raises:
        JobError: the file cannot be read, or is no such file.
    """
    try:
        document = parse_json(read_whole(path, MAX_BASELINE_BYTES))
        if document["baseline_version"] != BASELINE_VERSION:
            raise ValueError(f"version {document['baseline_version']}")
        return _unpinned(document)
    except OSError as error:
        raise JobError(f"--baseline {path}: cannot be read ({error.strerror or error})") from None
    except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError) as error:
        raise JobError(
            f"--baseline {path}: is not a baseline of this version ({error}); `riskforge compare RUN --pin FILE` writes"
            " one"
        ) from None


def _unpinned(document: dict[str, Any]) -> ScoredRun:
    columns: dict[str, Any] = {name: _unpacked(document[name]) for name in _TEXT_COLUMNS}
    columns |= {"valid": np.array(document["valid"], dtype=float)}
    columns |= {name: np.array(document[name], dtype=kind) for name, kind in _LATER_COLUMNS.items() if name in document}
    columns |= {"seeds": np.array(document["seeds"], dtype=np.int64)}
    columns |= {"is_error": np.array(document["is_error"], dtype=bool)}
    scores = {name: np.array(document[name], dtype=float) for name in stored_names(MEDIANS, document)}
    if len({column.shape for column in (columns | scores).values()}) != 1 or columns["seeds"].ndim != 1:
        raise ValueError("its columns have different lengths")
    if any(np.isnan(values).any() for values in scores.values()):
        raise ValueError("a score is no number")
    temperature = document["target"].get(TEMPERATURE)
    return ScoredRun(
        address=str(document["address"]),
        name=str(document["name"]),
        target={key: str(document["target"][key]) for key in ("address", "digest")},
        temperature=None if temperature is None else usable_temperature(temperature),
        labels=tuple(map(str, document["labels"])),
        methods={str(name): str(method) for name, method in document["methods"].items()},
        night=str(document.get("night", "")) or night_of({}, str(document["address"])),
        is_baseline=True,
        num_scored=int(document.get("num_scored", 0)),
        unknown=_unknown(document, columns),
        scores=scores,
        **columns,
    )


def _unknown(document: dict[str, Any], columns: dict[str, Any]) -> frozenset[str]:
    """The requests with a joint prompt, in a baseline that counted their errors otherwise."""
    if document.get(ERRORS_OUTSIDE):
        return frozenset()
    pairs = zip(columns["keys"], columns["requests"], strict=True)
    return frozenset(request for key, request in pairs if re.search(JOINT_KEY, key))


def open_pair(addresses: Sequence[str], baseline: Path | None) -> tuple[ScoredRun, ScoredRun]:
    """The older and the newer of two runs, or a baseline and a run.

    Raises:
        JobError: not two of them.
    """
    if len(addresses) + (baseline is not None) != 2:
        raise JobError("compare: takes two runs, or one run with --baseline FILE, or one with --pin FILE")
    if baseline is not None:
        return read_baseline(baseline), read_scored_run(addresses[0])
    shares = common_shares(addresses)
    old, new = (read_scored_run(address, shares) for address in addresses)
    return old, new
