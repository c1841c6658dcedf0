"""Figures of the self-consuming loop on mixtures: `python tools/curation_figures.py [TABLE ...] --seeds 200`.

Tables: `attacks` (final reward by attack and budget), `monitor` (false alarms, delays, smallest trusted set),
`defences` (reward restored, records removed), `tastes` (two honest groups), `mix` (real data), `short` (optimisation
cut short), `bounds` (the bounds of one round). All of them unless named. Intervals are 95 %, over seeds.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from engine.methods.curation.bounds import gain_bounds, real_data_divergence_bound, updated_probabilities
from engine.methods.curation.loop import LoopOptions
from engine.methods.curation.mixture_guard import FIXED_FLOORS, FIXED_SIZES
from engine.methods.curation.mixture_study import ATTACKS, StudyOptions, Taste, Trajectory, simulate
from engine.methods.curation.reward_training import FitOptions
from engine.methods.curation.selection import curation_weights

CHUNK = 50
BUDGETS = (0.1, 0.2, 0.4)
AUDIT_SIZES = (30, 40, 50, 60, 80)
RATIOS = ((math.inf, "0"), (4.0, "1:4"), (2.0, "1:2"), (1.0, "1:1"), (0.5, "2:1"), (0.25, "4:1"))
TWO_TASTES = (Taste(share=0.7, mode=0), Taste(share=0.3, mode=4))


def run(options: StudyOptions) -> Trajectory:
    """A study in parts of few seeds, which stay in the processor's cache."""
    parts = [
        simulate(replace(options, num_seeds=min(CHUNK, options.num_seeds - start), seed=options.seed + start))
        for start in range(0, options.num_seeds, CHUNK)
    ]
    joined: dict[str, Any] = {
        name: torch.cat([getattr(part, name) for part in parts], -2 if name == "fixed_alarms" else 0)
        for name in ("rewards", "alarms", "fixed_alarms", "removed", "caught")
    }
    rounds = zip(*(part.measures for part in parts), strict=True)
    return Trajectory(measures=[_joined(same) for same in rounds], **joined)


def _joined(rounds: tuple[Any, ...]) -> Any:
    names = type(rounds[0]).__slots__
    return type(rounds[0])(*(torch.cat([getattr(part, name) for part in rounds]) for name in names))


def mean(values: Tensor) -> str:
    """A mean over seeds [S] with the half width of its interval."""
    return f"{float(values.mean()):.3f} ± {1.96 * float(values.std()) / math.sqrt(len(values)):.3f}"


def share(flags: Tensor) -> str:
    """A share of seeds [S] with its score interval."""
    total, value, z = len(flags), float(flags.double().mean()), 1.96
    centre = (value + z * z / (2 * total)) / (1 + z * z / total)
    half = z * math.sqrt(value * (1 - value) / total + (z / (2 * total)) ** 2) / (1 + z * z / total)
    return f"{value:.1%} [{max(0.0, centre - half):.1%}, {min(1.0, centre + half):.1%}]"


def attacks(seeds: int) -> None:
    """Users' reward after ten rounds, with the last round's measures."""
    print("attack | kappa | final reward | balance of modes | KID | covariance")
    for attack in ATTACKS:
        for kappa in BUDGETS if attack != "clean" else (0.0,):
            result = run(StudyOptions(num_seeds=seeds, attack=attack, attack_share=kappa))
            last = result.measures[-1]
            figures = [mean(values) for values in (last.balance, last.real_distance, last.covariance)]
            print(f"{attack} | {kappa} | {mean(result.rewards[:, -1, 0])} | {' | '.join(figures)}", flush=True)
            print("    by round:", " ".join(f"{value:.2f}" for value in result.rewards[..., 0].mean(0).tolist()))


def monitor(seeds: int) -> None:
    """Alarms of the audit by its size, and of fixed trusted sets."""
    print("audited records a round | attack, kappa 0.2 | in round 1 | within 2 rounds | within 10 rounds")
    for size in AUDIT_SIZES:
        for attack in ATTACKS if size == 50 else ("clean", "gradient", "gradient-reward"):
            alarms = run(StudyOptions(num_seeds=seeds, attack=attack, num_audited=size)).alarms
            figures = [share(alarms[:, index]) for index in (0, 1, -1)]
            print(f"{size} | {attack} | {' | '.join(figures)}", flush=True)
    print("fixed set | floor | attack | within 2 rounds | within 10 rounds")
    for attack in ("clean", "gradient", "gradient-reward"):
        fixed = run(StudyOptions(num_seeds=seeds, attack=attack)).fixed_alarms
        for level, floor in enumerate(FIXED_FLOORS):
            for index, size in enumerate(FIXED_SIZES):
                flags = fixed[level, index]
                print(f"{size} | {floor} | {attack} | {share(flags[:, 1])} | {share(flags[:, -1])}")


def defences(seeds: int) -> None:
    """Reward restored by acting on an alarm."""
    clean = run(StudyOptions(num_seeds=seeds)).rewards[:, -1, 0]
    print(f"clean: {mean(clean)}")
    print("attack | kappa | defence | final reward | restored | untampered removed | tampered removed")
    for attack in ("largest-difference", "gradient", "gradient-reward"):
        for kappa in (0.2, 0.4):
            options = StudyOptions(num_seeds=seeds, attack=attack, attack_share=kappa)
            attacked = run(options).rewards[:, -1, 0]
            for defence in ("influence", "trusted-only"):
                result = run(replace(options, defence=defence))
                final = result.rewards[:, -1, 0]
                restored = (final - attacked.mean()) / (clean.mean() - attacked.mean())
                removed = [mean(shares.mean((1, 2))) for shares in (result.removed, result.caught)]
                figures = " | ".join([mean(final), mean(restored), *removed])
                print(f"{attack} | {kappa} | {defence} | {figures}", flush=True)
    for defence in ("influence", "trusted-only"):
        result = run(StudyOptions(num_seeds=seeds, defence=defence))
        print(f"clean | 0 | {defence} | {mean(result.rewards[:, -1, 0])} | removed {mean(result.removed.mean((1, 2)))}")


def tastes(seeds: int) -> None:
    """Two honest groups of 70 % and 30 % with opposite tastes, K = 8."""
    print("attack 0.2 | defence | reward of each | modes near each | untampered removed of each | difference (points)")
    base = StudyOptions(num_seeds=seeds, tastes=TWO_TASTES, loop=LoopOptions(num_candidates=8))
    for attack, defence, pooled in (
        ("clean", "none", False),
        ("clean", "none", True),
        ("gradient-reward", "none", False),
        ("gradient-reward", "influence", False),
        ("gradient-reward", "group", False),
        ("gradient", "none", False),
        ("gradient", "group", False),
    ):
        result = run(replace(base, attack=attack, defence=defence, pooled=pooled))
        occupancy = result.measures[-1].occupancy
        near = [mean(occupancy[:, modes].sum(-1)) for modes in ([7, 0, 1], [3, 4, 5])]
        finals = [mean(result.rewards[:, -1, group]) for group in (0, 1)]
        removed = result.removed.mean(1)
        parts = [mean(removed[:, group]) for group in (0, 1)]
        name = f"{attack} | {defence}{' (one reward)' if pooled else ''}"
        difference = 100 * (removed[:, 1] - removed[:, 0])
        print(f"{name} | {', '.join(finals)} | {', '.join(near)} | {', '.join(parts)} | {mean(difference)}", flush=True)


def mix(seeds: int) -> None:
    """Real data in the mix: it bounds the drift, and restores no preference."""
    print("real to curated | attack 0.2 | final reward | KID | balance")
    for weight, ratio in RATIOS:
        for attack in ("clean", "gradient", "gradient-reward"):
            result = run(StudyOptions(num_seeds=seeds, attack=attack, loop=LoopOptions(curated_weight=weight)))
            last = result.measures[-1]
            figures = [mean(values) for values in (result.rewards[:, -1, 0], last.real_distance, last.balance)]
            print(f"{ratio} | {attack} | {' | '.join(figures)}", flush=True)


def short(seeds: int) -> None:
    """Training of the reward model, or of the generator, cut short."""
    print("Newton steps of the reward model | attack 0.2 | final reward")
    for steps in (1, 2, 3, 100):
        for attack in ("clean", "gradient", "gradient-reward"):
            result = run(StudyOptions(num_seeds=seeds, attack=attack, fit=FitOptions(max_steps=steps)))
            print(f"{steps} | {attack} | {mean(result.rewards[:, -1, 0])}", flush=True)
    print("steps of expectation-maximisation in a refit | attack 0.2 | final reward")
    for steps in (1, 2, 20):
        for attack in ("clean", "gradient", "gradient-reward"):
            result = run(StudyOptions(num_seeds=seeds, attack=attack, em_steps=steps))
            print(f"{steps} | {attack} | {mean(result.rewards[:, -1, 0])}", flush=True)


def bounds(seeds: int) -> None:
    """The bounds of one round on random finite supports, and where the sign of the covariance misleads."""
    generator = torch.Generator().manual_seed(0)
    print("K | share phi | gain within bounds | covariance >= 0 and gain < 0, phi = 1")
    for candidates in (2, 4, 8, None):
        weights = torch.rand(100 * seeds, 6, generator=generator, dtype=torch.float64)
        mass = weights / weights.sum(-1, keepdim=True)
        own, other = 2 * torch.randn(2, 100 * seeds, 6, generator=generator, dtype=torch.float64)
        for phi in (0.0, 0.5, 1.0):
            result = gain_bounds(mass, own, other, share=phi, num_candidates=candidates)
            slack = 1e-9 * result.upper.abs()
            inside = (result.lower <= result.gain + slack) & (result.gain <= result.upper + slack)
            misled = (result.covariance >= 0) & (result.gain < -slack)
            print(f"{candidates or 'many'} | {phi} | {share(inside)} | {share(misled)}")
    print("ten classes, reward 10 - index, K = 4: real to curated | reward before each round | KL to real data | bound")
    real = torch.full((10,), 0.1, dtype=torch.float64)
    rewards = 10 - torch.arange(10, dtype=torch.float64)
    for weight, ratio in (*RATIOS, (0.2, "5:1")):
        mass, path = real, []
        for _ in range(11):
            path.append(float((mass * rewards).sum()))
            mass = updated_probabilities(mass, curation_weights(mass, rewards, 4), real, weight)
        divergence = float(torch.special.xlogy(mass, mass / real).sum())
        limit = real_data_divergence_bound(4, weight)
        print(f"{ratio} | {' '.join(f'{value:.2f}' for value in path)} | {divergence:.3f} | {limit:.3f}")


TABLES: dict[str, Callable[[int], None]] = {
    "bounds": bounds, "attacks": attacks, "monitor": monitor, "defences": defences, "tastes": tastes, "mix": mix,
    "short": short,
}  # fmt: skip


def main(arguments: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="*", choices=[*TABLES, []], default=list(TABLES))
    parser.add_argument("--seeds", type=int, default=200)
    options = parser.parse_args(arguments)
    for name in options.tables:
        start = time.monotonic()
        print(f"\n{name}, {options.seeds} seeds")
        TABLES[name](options.seeds)
        print(f"{time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
