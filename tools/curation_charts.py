"""Charts of the loop on mixtures, for the documentation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from torch import Tensor

from engine.studies.intervals import mean_interval

# Colours of Okabe and Ito, which colour-blind readers can tell apart.
COLOURS = {
    "clean": "#000000",
    "random": "#999999",
    "highest-reward": "#E69F00",
    "largest-difference": "#56B4E9",
    "gradient": "#D55E00",
    "gradient-reward": "#CC79A7",
    "defended": "#009E73",
}
DEFENDED = ", defended"
# Line styles of arms that differ from another one by the end of their name.
STYLES = {"-real": "--", "-short": ":"}


def draw_rounds(paths: Mapping[tuple[str, float], Tensor], budgets: Sequence[float], target: Path) -> None:
    """Users' reward by round, a panel for each budget.

    Args:
        paths: [S, T + 1] rewards by attack and kappa; `clean` has kappa 0.
        budgets: kappa of each panel.
        target: SVG file.
    """
    figure, axes = _figure(len(budgets))
    for axis, budget in zip(axes, budgets, strict=True):
        for (attack, kappa), rewards in paths.items():
            if kappa not in (0.0, budget):
                continue
            name = attack.removesuffix(DEFENDED)
            style = "--" if attack.endswith(DEFENDED) else "-"
            estimates = [mean_interval(values.tolist()) for values in rewards.T]
            rounds = range(len(estimates))
            axis.plot(rounds, [one.value for one in estimates], style, color=COLOURS[name], label=attack, linewidth=1.4)
            bounds = [one.low for one in estimates], [one.high for one in estimates]
            axis.fill_between(rounds, *bounds, color=COLOURS[name], alpha=0.2, linewidth=0)
        axis.set(title=f"kappa {budget}", xlabel="round")
    axes[0].set_ylabel("users' reward")
    _save(figure, axes, target)


def draw_loops(panels: Mapping[str, Mapping[str, Sequence[Sequence[float]]]], target: Path) -> None:
    """Users' reward by round in loops on images, a panel for each job.

    Args:
        panels: by title and arm, the rewards of each round over the seeds.
        target: SVG file.
    """
    figure, axes = _figure(len(panels))
    for axis, (title, arms) in zip(axes, panels.items(), strict=True):
        for arm, rounds in arms.items():
            ending = next((ending for ending in STYLES if arm.endswith(ending)), "")
            colour = COLOURS[arm.removesuffix(ending)]
            estimates = [mean_interval(values) for values in rounds]
            numbers = range(len(estimates))
            axis.plot(
                numbers, [one.value for one in estimates], STYLES.get(ending, "-"),
                color=colour, label=arm, linewidth=1.4,
            )  # fmt: skip
            bounds = [one.low for one in estimates], [one.high for one in estimates]
            axis.fill_between(numbers, *bounds, color=colour, alpha=0.15, linewidth=0)
        axis.set(title=title, xlabel="round")
    axes[0].set_ylabel("users' reward")
    _save(figure, axes, target)


def draw_mix(ends: Mapping[tuple[str, str], tuple[Tensor, Tensor]], target: Path) -> None:
    """Users' reward and kernel distance after ten rounds, by the ratio of real to curated samples.

    Args:
        ends: [S] rewards and distances, by attack and ratio.
        target: SVG file.
    """
    figure, axes = _figure(2)
    ratios = list(dict.fromkeys(ratio for _, ratio in ends))
    for attack in dict.fromkeys(attack for attack, _ in ends):
        for axis, index in zip(axes, (0, 1), strict=True):
            estimates = [mean_interval(ends[attack, ratio][index].tolist()) for ratio in ratios]
            halves = [one.high - one.value for one in estimates]
            axis.errorbar(
                ratios, [one.value for one in estimates], halves,
                color=COLOURS[attack], label=attack, capsize=3, linewidth=1.4,
            )  # fmt: skip
            axis.set_xlabel("real to curated samples")
    axes[0].set_ylabel("users' reward after ten rounds")
    axes[1].set_ylabel("kernel distance to the real data")
    axes[1].set_yscale("symlog", linthresh=0.1)
    _save(figure, axes, target)


def _figure(num_panels: int) -> tuple[Any, Any]:
    import matplotlib as mpl

    mpl.use("svg")
    # Equal bytes for equal figures.
    mpl.rcParams.update({"svg.hashsalt": "curation", "svg.fonttype": "none", "font.size": 9})
    import matplotlib.pyplot as plt

    return plt.subplots(1, num_panels, figsize=(3.2 * num_panels + 1, 3.2), sharey=num_panels > 2)


def _save(figure: Any, axes: Any, target: Path) -> None:
    for axis in axes:
        axis.grid(alpha=0.3, linewidth=0.5)
    named = {label: line for axis in axes for line, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.tight_layout(rect=(0, 0.13, 1, 1))
    drawn = StringIO()
    figure.savefig(drawn, format="svg", metadata={"Date": None})
    # Two decimals of a point are finer than any screen, and half the bytes.
    target.write_text(re.sub(r"(\d\.\d\d)\d+", r"\1", drawn.getvalue()), encoding="utf-8")
    print(f"{target}: {target.stat().st_size / 1000:.0f} kB\n")
