"""Markdown tables of measured arms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from guidance_arms.measures import ratio_of_medians

Figures = Mapping[str, Any]


def tables_of(kind: str, sets: Mapping[str, Mapping[str, Figures]]) -> str:
    """A table a set, and for goals the ratios to the prompts alone."""
    parts = [_set_table(title, arms) for title, arms in sets.items()]
    return "\n\n".join(parts + ([_ratio_table(sets)] if kind == "goals" else [])) + "\n"


def _set_table(title: str, arms: Mapping[str, Figures]) -> str:
    first = next(iter(arms.values()))
    is_joint = "kldb" in first
    names = list(first["kldb" if is_joint else "errors"])
    measure = "KLDB" if is_joint else "errors"
    heads = ["arm", "cost", *(f"{measure}, {name}" for name in names)]
    heads += [] if is_joint else ["risk", "within 0.2", "valid failures"]
    heads += ["valid", "KID x 1,000", *(["of the nearest quarter"] if is_joint else []), "twins, dB"]
    lines = [f"**{title}**, {first['count']} samples an arm", "", _row(heads), "|" + "---|" * len(heads)]
    for arm, one in arms.items():
        cells = [arm, f"{one['cost']:.2f}"]
        if is_joint:
            cells += [f"{one['kldb'][name]:.3f}" for name in names]
        else:
            cells += [f"{one['errors'][name]:.2f}" for name in names]
            cells += [f"{one['risk']:.2f}", f"{one['near']:.0%}", f"{one['valid_failures']:.2f}"]
        distance = one["twin_psnr_db"]
        cells += [f"{one['valid']:.2f}", f"{one['kid_x1000']:.0f}"]
        cells += [f"{one['kid_x1000_of_nearest']:.0f}"] if is_joint else []
        cells += ["" if distance is None else f"{distance:.1f}"]
        lines.append(_row(cells))
    return "\n".join(lines)


def _ratio_table(sets: Mapping[str, Mapping[str, Figures]]) -> str:
    """Medians of `perceptible` by those of the prompts alone, and how much of the target's fall others share."""
    heads = ["classes", "target, of the prompt's", "classifier-b, of the prompt's", "its fall by the target's"]
    lines = [_row(heads), "|" + "---|" * len(heads)]
    for title, arms in sets.items():
        if not {"prompt", "perceptible"} <= arms.keys() or "kldb" not in arms["prompt"]:
            continue
        before, after = arms["prompt"], arms["perceptible"]
        ratios = [
            ratio_of_medians(after["values"][name], before["values"][name]) for name in ("target", "classifier-b")
        ]
        falls = [before["kldb"][name] - after["kldb"][name] for name in ("target", "classifier-b")]
        shown = [f"{own:.3f} ({low:.3f} to {high:.3f})" for own, low, high in ratios]
        lines.append(_row([title, *shown, f"{falls[1] / falls[0]:.0%}"]))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
