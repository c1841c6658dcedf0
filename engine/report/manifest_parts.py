"""What the page takes from the manifest: the lead, the figures at the top, tables of counts, and facts of the run."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import numpy as np

from engine.data.run.file_names import RESCORED_FROM
from engine.data.run.manifest_reading import manifest_error
from engine.data.run.notices import known_notices
from engine.data.run.run_warnings import known_warnings
from engine.data.stores.base import Store
from engine.job.columns import NO_CLASS
from engine.models.calibration import model_notes
from engine.report.curation import curation_section
from engine.report.data import Rows
from engine.report.partners import partner_table
from engine.report.text import ABSENT, clip, many, number, percent
from engine.report.work import acceptance_table

MAX_SCREENED_CLASSES = 100
MAX_FACT_CHARS = 400


def manifest_context(
    store: Store, manifest: dict[str, Any], rows: Rows, names: dict[int, str], some: Rows
) -> dict[str, Any]:
    """What the template needs from the manifest.

    Args:
        rows: all rows, those that are alike as one.
        some: the rows that charts are made of.

    Raises:
        CorruptShardError: some of it is of another kind than a run writes.
    """
    try:
        screening = manifest["counts"].get("screening", {})
        return {
            "lead": _lead(manifest, rows),
            "figures": _figures(manifest, rows),
            "partners": partner_table(some, manifest["job"].get("requests", [])),
            "screening": _screening(screening, names),
            "num_screening_left_out": sum(
                max(0, len(classes) - MAX_SCREENED_CLASSES) for classes in screening.values()
            ),
            "dials": _dials(manifest.get("dials", {})),
            "curation": curation_section(manifest),
            "acceptance": acceptance_table(rows, manifest["counts"].get("quotas", {})),
            "throughput_note": _throughput_note(manifest),
            "notices": known_notices(manifest),
            "warnings": known_warnings(manifest),
            "models": _models(manifest["models"]),
            "facts": _facts(manifest),
        }
    except (TypeError, KeyError, ValueError, AttributeError, ArithmeticError, IndexError) as error:
        raise manifest_error(store, f"{type(error).__name__}: {error}") from error


def _lead(manifest: dict[str, Any], rows: Rows) -> str:
    samples, shards = manifest["counts"]["samples"], manifest["counts"]["shards"]
    text = (
        f"{many(samples['ok'], 'image')} of {many(samples['attempted'], 'attempt')} in "
        f"{many(len(rows.request.names), 'request')} and {many(shards['committed'], 'shard')}, all synthetic, "
        f"scored against {manifest['job']['models']['target']}."
    )
    if RESCORED_FROM in manifest:
        text += f" New scores of the images that were made for {_first_target(manifest)}."
    if "finished" in manifest["timing"]:
        text += f" Finished {_moment(manifest['timing']['finished'])}."
    if manifest["complete"]:
        return text
    return f"{text} Not complete: {shards['committed']:,} of {shards['planned']:,} shards were there at the time."


def _first_target(manifest: dict[str, Any]) -> str:
    """The target of the run that was scored again."""
    origin = manifest[RESCORED_FROM]
    target = origin.get("target") if isinstance(origin, dict) else None
    return str(target["address"]) if target else "another target"


def _figures(manifest: dict[str, Any], rows: Rows) -> list[dict[str, Any]]:
    """The figures at the top: counts, and the rates of prompt-only and of guided samples, which are never pooled."""
    samples = manifest["counts"]["samples"]
    has_oracle = rows.scored & (rows.numbers["oracle_class"] != NO_CLASS)
    valid, strict = rows.oracle_agrees & rows.target_errs, (rows.label_valid > 0) & rows.target_errs
    rates = [
        ("Target errors", rows.target_errs, rows.scored, "predicts no class that was asked for"),
        ("Oracle agrees", rows.oracle_agrees, has_oracle, "predicts a class that was asked for"),
        ("Valid failures", valid, has_oracle, "the target errs, the oracle agrees"),
    ]
    if (is_known := rows.scored & (rows.label_valid >= 0)).any():
        rates.append(("Strictly valid failures", strict, is_known, "the target errs, the label is strictly valid"))
    return [
        _figure("Images", f"{samples['ok']:,}", f"of {many(samples['attempted'], 'attempt')}{_kept(samples)}"),
        _figure("Failed", f"{samples['failed']:,}", "attempts without an image"),
        *({"name": name, "rates": _rates(rows, flags, among), "note": note} for name, flags, among, note in rates),
    ]


def _figure(name: str, value: str, note: str) -> dict[str, Any]:
    return {"name": name, "rates": [(value, "")], "note": note}


def _rates(rows: Rows, flags: np.ndarray, among: np.ndarray) -> list[tuple[str, str]]:
    """The share of flags among prompt-only samples and among guided ones, each with its name where there are both."""
    guided = np.array(rows.guided, dtype=bool)[rows.request.codes]
    kinds = [(kind, among & which) for kind, which in (("prompt only", ~guided), ("guided", guided)) if which.any()]
    if len(kinds) < 2:
        return [(_share(rows, flags, among), "")]
    return [(_share(rows, flags, which), kind) for kind, which in kinds]


def _kept(samples: dict[str, int]) -> str:
    """How many attempts the rule of acceptance rejected, where it did."""
    rejected = samples.get("rejected", 0)
    return f"; {rejected:,} were rejected" if rejected else ""


def _share(rows: Rows, flags: np.ndarray, among: np.ndarray) -> str:
    return percent(rows.count(flags & among) / rows.count(among)) if among.any() else ABSENT


def _screening(screening: dict[str, Any], names: dict[int, str]) -> list[dict[str, Any]]:
    """Lines of the screening table: each request, then its classes."""
    lines = []
    for request, classes in screening.items():
        total = {name: sum(counts[name] for counts in classes) for name in ("samples", "screened", "draws")}
        lines.append({"name": clip(request, 120), "is_total": True, "cells": _screening_cells(total)})
        lines += [
            {"name": clip(names.get(counts["class_index"], str(counts["class_index"])), 120), "is_total": False,
             "cells": _screening_cells(counts)}
            for counts in classes[:MAX_SCREENED_CLASSES]
        ]  # fmt: skip
    return lines


def _dials(dials: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Lines of the table of dials."""
    return [
        {
            "name": clip(request, 120),
            "cells": [
                number(dial["target_risk"]),
                number(dial["risk_median"]),
                f"{percent(dial['share_within_tolerance'])} within {number(dial['tolerance'])}",
                number(dial["distance_median"]),
            ],
        }
        for request, dial in dials.items()
    ]


def _screening_cells(counts: dict[str, Any]) -> list[str]:
    rate = percent(counts["screened"] / counts["draws"]) if counts["draws"] else ABSENT
    return [f"{counts[name]:,}" for name in ("samples", "screened", "draws")] + [rate]


def _throughput_note(manifest: dict[str, Any]) -> str:
    """How fast the run was as a whole, as far as its manifest records it."""
    timing, attempted = manifest["timing"], manifest["counts"]["samples"]["attempted"]
    text = "Per sample: the time of a batch, sampling and decoding, divided by its size."
    seconds = timing.get("sampling_seconds")
    if isinstance(seconds, int | float) and seconds > 0:
        text += (
            f" With scoring the workers took {_moment(seconds)} for {many(attempted, 'attempt')}:"
            f" {attempted / seconds:,.2f} a second and worker."
        )
    share = timing.get("sampling_share")
    if isinstance(share, int | float):
        text += f" In the last start {percent(float(share))} of the workers' time went into sampling and scoring."
    return text


def _models(models: dict[str, Any]) -> list[dict[str, str]]:
    """A line for each model of the manifest."""
    lines = []
    for role, value in models.items():
        for model in value if isinstance(value, list) else [value]:
            known = model if isinstance(model, dict) else {"address": str(model)}
            address, digest = (str(known.get(name, "")) for name in ("address", "digest"))
            notes = ["guides"] if known.get("guides") is True else []
            note = clip("; ".join([*notes, *model_notes(known)]), MAX_FACT_CHARS)
            lines.append({"role": role, "address": address, "digest": digest, "note": note})
    return lines


def _facts(manifest: dict[str, Any]) -> list[tuple[str, str]]:
    """Further facts of the run, as names and values."""
    facts = [("Job", manifest["name"]), ("Seed", str(manifest["job"].get("seed", 0)))]
    facts.append(("Plan digest", manifest["plan_digest"]))
    facts += [(_title(name), _moment(value)) for name, value in manifest["timing"].items() if name != "sampling_share"]
    facts.append(("Hardware", _pairs(manifest["hardware"])))
    facts.append(("Versions", _pairs(manifest["versions"])))
    return [(name, clip(value, MAX_FACT_CHARS)) for name, value in facts if value]


def _title(name: str) -> str:
    plain = name.removesuffix("_seconds").replace("_", " ")
    return plain[:1].upper() + plain[1:]


def _moment(value: Any) -> str:
    """A time of the manifest: a length in seconds, or a moment where it counts them since 1970."""
    if not isinstance(value, int | float):
        return str(value)
    if value > 1e9:
        return datetime.fromtimestamp(value, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    return f"{value:,.1f} s"


def _pairs(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
