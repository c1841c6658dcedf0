"""Figures of the self-consuming loop on Gaussian mixtures, as Markdown tables and charts.

    uv run python tools/curation_figures.py [TABLE ...] [--seeds 200] [--executor ray] [--processes 2] [--charts docs]

Tables: `bounds` (one round against the papers' bounds), `rounds` (reward by round and attack), `attacks` (the end, by
budget), `goals`, `monitor` (alarms by size of the audit), `defences` (reward restored, records removed), `tastes` (two
honest groups), `mix` (real data), `short` (optimisation cut short). All of them unless named. `rounds`, `mix` and
`short` are over ten seeds, the others over `--seeds`. Intervals are at 95 %, over seeds. With `--charts`, `rounds` and
`mix` are drawn into that folder too. Seeds are divided among processes, of this machine or of Ray.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from curation_charts import draw_mix, draw_rounds
from curation_mixtures.guard import FIXED_FLOORS, FIXED_SIZES
from curation_mixtures.study import CLEAN, StudyOptions, Taste, Trajectory
from curation_runs import Studies, mean, open_executor, percent, share

from engine.methods.curation.attacks import ATTACKS
from engine.methods.curation.bounds import gain_bounds, real_data_divergence_bound, updated_probabilities
from engine.methods.curation.loop import LoopOptions
from engine.methods.curation.reward_models import FitOptions
from engine.methods.curation.selection import curation_weights

FEW = 10
BUDGETS = (0.1, 0.2, 0.4)
GRADIENT = ("gradient", "gradient-reward")
AUDIT_SIZES = (20, 30, 40, 50, 60, 80)
# lambda, and real to curated samples in words.
RATIOS = ((math.inf, "0"), (4.0, "1:4"), (2.0, "1:2"), (1.0, "1:1"), (0.5, "2:1"), (0.25, "4:1"))
TWO_TASTES = (Taste(share=0.7, mode=0), Taste(share=0.3, mode=4))
SHOWN_ROUNDS = (0, 1, 2, 3, 5, 10)


def table(header: str, rows: Iterable[Sequence[object]]) -> None:
    """Print a Markdown table; the header's cells are divided by bars."""
    print(f"| {header} |\n|{'---|' * (header.count('|') + 1)}")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |")
    print(flush=True)


def end(result: Trajectory) -> torch.Tensor:
    """Users' reward at the end, [S]."""
    return result.rewards[:, -1, 0]


def bounds(seeds: int, work: Studies, charts: Path | None) -> None:
    """The bounds of one round on random finite supports, and where the sign of the covariance misleads."""
    generator = torch.Generator().manual_seed(0)
    rows: list[tuple[object, ...]] = []
    for candidates in (2, 4, 8, None):
        weights = torch.rand(100 * seeds, 6, generator=generator, dtype=torch.float64)
        mass = weights / weights.sum(-1, keepdim=True)
        own, other = 2 * torch.randn(2, 100 * seeds, 6, generator=generator, dtype=torch.float64)
        for phi in (0.0, 0.5, 1.0):
            result = gain_bounds(mass, own, other, share=phi, num_candidates=candidates)
            slack = 1e-9 * result.upper.abs()
            inside = (result.lower <= result.gain + slack) & (result.gain <= result.upper + slack)
            misled = (result.covariance >= 0) & (result.gain < -slack)
            rows.append((candidates or "many", phi, share(inside), share(misled)))
    table("K | adversarial share phi | gain within its bounds | covariance >= 0 and reward falls", rows)
    real, rows = torch.full((10,), 0.1, dtype=torch.float64), []
    rewards = 10 - torch.arange(10, dtype=torch.float64)
    for weight, ratio in (*RATIOS, (0.2, "5:1")):
        mass, path = real, []
        for _ in range(11):
            path.append(float((mass * rewards).sum()))
            mass = updated_probabilities(mass, curation_weights(mass, rewards, 4), real, weight)
        divergence = float(torch.special.xlogy(mass, mass / real).sum())
        shown = [f"{path[index]:.2f}" for index in SHOWN_ROUNDS]
        rows.append((ratio, *shown, f"{divergence:.3f}", f"{real_data_divergence_bound(4, weight):.3f}"))
    print("Ten classes, reward 10 - index, K = 4, exact:")
    header = " | ".join(f"round {index}" for index in SHOWN_ROUNDS)
    table(f"real to curated | {header} | KL to the real data | its bound", rows)


def rounds(seeds: int, work: Studies, charts: Path | None) -> None:
    """Users' reward by round."""
    studies = {("clean", 0.0): StudyOptions(num_seeds=FEW)}
    for kappa in BUDGETS:
        for attack in ATTACKS:
            studies[attack, kappa] = StudyOptions(num_seeds=FEW, attack=attack, attack_share=kappa)
        for attack in GRADIENT:
            studies[f"{attack}, defended", kappa] = replace(studies[attack, kappa], defence="influence")
    results = work.run(studies)
    rows = []
    for (attack, kappa), result in results.items():
        values = [mean(result.rewards[:, index, 0]) for index in SHOWN_ROUNDS]
        rows.append((attack, kappa, *values))
    table(f"attack | kappa | {' | '.join(f'round {index}' for index in SHOWN_ROUNDS)}", rows)
    if charts:
        paths = {key: result.rewards[..., 0] for key, result in results.items()}
        draw_rounds(paths, BUDGETS, charts / "curation-reward.svg")


def attacks(seeds: int, work: Studies, charts: Path | None) -> None:
    """The last round by attack and budget, and the order of the attacks."""
    studies = {("clean", 0.0): StudyOptions(num_seeds=seeds)}
    for attack in ATTACKS:
        for kappa in BUDGETS:
            studies[attack, kappa] = StudyOptions(num_seeds=seeds, attack=attack, attack_share=kappa)
    results, rows = work.run(studies), []
    for key, result in results.items():
        last = result.measures[-1]
        rows.append((*key, mean(end(result)), mean(last.balance), mean(last.real_distance), mean(last.covariance, 3)))
    table("attack | kappa | users' reward | balance of modes | kernel distance | Cov(e^r, e^r~)", rows)
    for kappa in BUDGETS:
        order = sorted(ATTACKS, key=lambda attack: float(end(results[attack, kappa]).mean()))
        print(f"kappa {kappa}, the most harmful first: {', '.join(order)}\n")


def goals(seeds: int, work: Studies, charts: Path | None) -> None:
    """What monitor and defences are to reach."""
    base = StudyOptions(num_seeds=seeds)
    studies: dict[tuple[str, object], StudyOptions] = {
        ("clean", size): replace(base, num_audited=size) for size in AUDIT_SIZES
    }
    for attack in GRADIENT:
        hit = replace(base, attack=attack)
        studies |= {(attack, size): replace(hit, num_audited=size) for size in AUDIT_SIZES}
        studies[attack, "influence"] = replace(hit, defence="influence")
        for defence in ("influence", "group"):
            loop = LoopOptions(num_candidates=8)
            studies[attack, f"two tastes, {defence}"] = replace(hit, tastes=TWO_TASTES, loop=loop, defence=defence)
    results = work.run(studies)
    usual = base.num_audited
    rows = [("false alarms in ten rounds", "<= 5 %", f"{usual} audited", share(results["clean", usual].alarms[:, -1]))]
    clean = end(results["clean", usual]).mean()
    for attack in GRADIENT:
        noticed = {size: results[attack, size].alarms[:, 1] for size in AUDIT_SIZES}
        rows.append((f"{attack} 0.2 noticed in two rounds", ">= 95 %", f"{usual} audited", share(noticed[usual])))
        enough = [size for size in AUDIT_SIZES if float(noticed[size].double().mean()) >= 0.95]
        if enough:
            rows.append(("smallest audit that does", "", f"{enough[0]} audited", share(noticed[enough[0]])))
        lost = end(results[attack, usual]).mean()
        restored = (end(results[attack, "influence"]) - lost) / (clean - lost)
        rows.append((f"{attack} 0.2: lost reward restored", ">= 80 %", "influence", percent(restored, 1)))
        for defence in ("influence", "group"):
            removed = results[attack, f"two tastes, {defence}"].removed.mean(1)
            excess = mean(100 * (removed[:, 1] - removed[:, 0]), 1)
            rows.append((f"{attack} 0.2: minority's records removed, less majority's", "<= 5 points", defence, excess))
    table("goal | at | with | measured", rows)


def monitor(seeds: int, work: Studies, charts: Path | None) -> None:
    """Alarms of the audit by its size, and of fixed trusted sets."""
    base = StudyOptions(num_seeds=seeds)
    studies = {
        (size, attack): replace(base, attack=attack, num_audited=size)
        for size in AUDIT_SIZES
        for attack in (CLEAN, *(ATTACKS if size == base.num_audited else GRADIENT))
    }
    results = work.run(studies)
    rows = [(*key, *(share(result.alarms[:, index]) for index in (0, 1, -1))) for key, result in results.items()]
    table("audited a round | attack, kappa 0.2 | in round 1 | within 2 | within 10", rows)
    rows = []
    for attack in ("clean", *GRADIENT):
        fixed = results[base.num_audited, attack].fixed_alarms
        for level, floor in enumerate(FIXED_FLOORS):
            for index, size in enumerate(FIXED_SIZES):
                flags = fixed[level, index]
                rows.append((size, floor, attack, share(flags[:, 1]), share(flags[:, -1])))
    table("fixed set | floor | attack, kappa 0.2 | within 2 rounds | within 10", rows)


def defences(seeds: int, work: Studies, charts: Path | None) -> None:
    """Reward restored by acting on an alarm, and what is removed of tampered and of other records."""
    kinds, attacked = ("none", "influence", "trusted-only"), ("largest-difference", *GRADIENT)
    base = StudyOptions(num_seeds=seeds)
    studies = {("clean", 0.0, defence): replace(base, defence=defence) for defence in kinds}
    for attack in attacked:
        for kappa in (0.2, 0.4):
            hit = replace(base, attack=attack, attack_share=kappa)
            studies |= {(attack, kappa, defence): replace(hit, defence=defence) for defence in kinds}
    results, rows = work.run(studies), []
    clean = end(results["clean", 0.0, "none"]).mean()
    for (attack, kappa, defence), result in results.items():
        lost = end(results[attack, kappa, "none"]).mean()
        restored = percent((end(result) - lost) / (clean - lost), 1) if attack != "clean" and defence != "none" else ""
        acted = defence == "influence"
        untampered = percent(result.removed.mean((1, 2)), 1) if acted else ""
        tampered = percent(result.caught.mean((1, 2)), 1) if acted and attack != "clean" else ""
        rows.append((attack, kappa, defence, mean(end(result)), restored, untampered, tampered))
    table("attack | kappa | defence | users' reward | restored | untampered removed | tampered removed", rows)


def tastes(seeds: int, work: Studies, charts: Path | None) -> None:
    """Two honest groups of 70 % and 30 % with opposite tastes, K = 8."""
    base = StudyOptions(num_seeds=seeds, tastes=TWO_TASTES, loop=LoopOptions(num_candidates=8))
    studies = {("clean", "one reward for both"): replace(base, pooled=True), ("clean", "none"): base}
    for attack in GRADIENT:
        for defence in ("none", "influence", "group"):
            studies[attack, defence] = replace(base, attack=attack, defence=defence)
    rows = []
    for (attack, defence), result in work.run(studies).items():
        occupancy, removed = result.measures[-1].occupancy, result.removed.mean(1)
        near = " / ".join(percent(occupancy[:, modes].sum(-1)) for modes in ([7, 0, 1], [3, 4, 5]))
        finals = " / ".join(mean(result.rewards[:, -1, group]) for group in (0, 1))
        parts = " / ".join(percent(removed[:, group], 1) for group in (0, 1))
        excess = mean(100 * (removed[:, 1] - removed[:, 0]), 1)
        cells = (parts, excess) if defence in ("influence", "group") else ("", "")
        rows.append((attack, defence, finals, near, *cells))
    table("attack 0.2 | defence | reward of each | samples near each | untampered removed of each | points more", rows)


def mix(seeds: int, work: Studies, charts: Path | None) -> None:
    """Real data in the mix: they bound the drift, and restore no preference."""
    studies = {
        (attack, ratio): StudyOptions(num_seeds=FEW, attack=attack, loop=LoopOptions(curated_weight=weight))
        for attack in ("clean", *GRADIENT)
        for weight, ratio in RATIOS
    }
    results = work.run(studies)
    rows = []
    for (attack, ratio), result in results.items():
        last = result.measures[-1]
        rows.append((ratio, attack, mean(end(result)), mean(last.real_distance), mean(last.balance)))
    table("real to curated | attack, kappa 0.2 | users' reward | kernel distance to the real data | balance", rows)
    if charts:
        drawn = {key: (end(result), result.measures[-1].real_distance) for key, result in results.items()}
        draw_mix(drawn, charts / "curation-mix.svg")


def short(seeds: int, work: Studies, charts: Path | None) -> None:
    """Training of the reward model, refit of the generator, or search of the attacker cut short."""
    variants = {
        **{f"Newton steps of the reward model: {n}": {"fit": FitOptions(max_steps=n)} for n in (1, 2, 3, 100)},
        **{f"EM steps of a refit: {n}": {"em_steps": n} for n in (1, 2, 5, 20)},
        **{f"stages of the attack: {n}": {"num_stages": n} for n in (1, 2, 5, 20)},
    }
    kinds = ("clean", *GRADIENT)
    studies = {
        (name, attack): replace(StudyOptions(num_seeds=FEW, attack=attack), **change)  # type: ignore[arg-type]
        for name, change in variants.items()
        for attack in kinds
    }
    results = work.run(studies)
    rows = [(name, *(mean(end(results[name, attack])) for attack in kinds)) for name in variants]
    table(f"cut short | {' | '.join(kinds)}", rows)


TABLES: dict[str, Callable[[int, Studies, Path | None], None]] = {
    "bounds": bounds, "rounds": rounds, "attacks": attacks, "goals": goals, "monitor": monitor, "defences": defences,
    "tastes": tastes, "mix": mix, "short": short,
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], default=list(TABLES))
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--executor", choices=["local", "ray"], default="local")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--charts", type=Path)
    options = parser.parse_args(arguments)
    with open_executor(options.executor, options.processes) as executor:
        work = Studies(executor)
        for name in options.tables:
            start = time.monotonic()
            print(f"## {name}\n")
            TABLES[name](options.seeds, work, options.charts)
            print(f"({time.monotonic() - start:.0f} s)\n", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
