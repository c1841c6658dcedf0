"""Defences, alone and in the loop: what is removed, what is restored, and who is kept."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from curation_mixtures.study import StudyOptions, Taste, simulate

from engine.methods.curation.attacks import AttackOptions, curated_reward_objective, gradient_flips
from engine.methods.curation.defences import RemovalOptions, removal_effects, remove_by_group, remove_by_influence
from engine.methods.curation.hypergradient import SolverOptions
from engine.methods.curation.loop import LoopOptions
from engine.methods.curation.preferences import Pairs
from engine.methods.curation.reward_models import (
    FitOptions,
    LinearReward,
    NetworkReward,
    fit_reward,
    margins,
    preference_losses,
)
from engine.methods.curation.selection import draw_preferences

MODEL = LinearReward(4)
TRUTH = torch.tensor([2.0, -1.5, 1.0, 0.0], dtype=torch.float64)
SMALL = StudyOptions(num_seeds=12, num_rounds=5, num_records=300, loop=LoopOptions(num_training=300))


def records(runs: tuple[int, ...], count: int, weights: torch.Tensor, seed: int) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, *runs, count, 4, generator=generator, dtype=torch.float64)
    return Pairs(first, second, draw_preferences(first @ weights, second @ weights, generator))


def attacked(pairs: Pairs, share: float) -> tuple[Pairs, torch.Tensor]:
    clean = fit_reward(MODEL, pairs, FitOptions()).parameters
    options = AttackOptions(share=share, objective=curated_reward_objective, num_stages=3)
    flips = gradient_flips(MODEL, clean, pairs, pairs.first, options)
    return pairs.flipped(flips), flips


@pytest.mark.parametrize("model", [MODEL, NetworkReward(4, 3)])
def test_effects_equal_what_leaving_out_does(model):
    """A record is made lighter by a little, the model trained again, and the trusted loss compared."""
    pairs, trusted = records((), 40, TRUTH, 0), records((), 30, TRUTH, 1)
    linear = isinstance(model, LinearReward)
    fit = FitOptions(l2=0.05, tolerance=1e-12 if linear else 1e-8, max_steps=2000)
    options = RemovalOptions(fit=fit, solver=SolverOptions(damping=0, tolerance=1e-12))
    weights = torch.ones(40, dtype=torch.float64)
    weights[30:] = 0
    fitted = fit_reward(model, pairs, fit, weights=weights, generator=torch.Generator().manual_seed(0)).parameters

    def loss(parameters: torch.Tensor) -> float:
        return float(preference_losses(margins(model, parameters, trusted), trusted.labels).mean())

    effects, step, measured = removal_effects(model, fitted, pairs, trusted, options, weights), 1e-2, []
    for record in range(6):
        values = []
        for side in (1, -1):
            moved = weights.clone()
            moved[record] -= side * step
            values.append(loss(fit_reward(model, pairs, fit, start=fitted, weights=moved).parameters))
        measured.append((values[0] - values[1]) / (2 * step))
    scale = float(effects[:30].abs().max())
    torch.testing.assert_close(effects[:6], torch.tensor(measured, dtype=torch.float64), rtol=0, atol=2e-3 * scale)


def test_removal_finds_the_exchanged_records():
    """20 runs: most exchanged records go, few others do, and the learned reward points where it should again."""
    pairs, trusted = records((20,), 300, TRUTH, 0), records((20,), 60, TRUTH, 1)
    poisoned, flips = attacked(pairs, 0.2)
    kept = remove_by_influence(MODEL, poisoned, trusted, RemovalOptions())
    assert float((1 - kept)[flips].mean()) > 0.7 and float((1 - kept)[~flips].mean()) < 0.15
    before, after = (
        torch.cosine_similarity(fit_reward(MODEL, poisoned, FitOptions(), weights=weights).parameters, TRUTH, -1)
        for weights in (torch.ones_like(kept), kept)
    )
    assert float(after.min()) > 0.8 > float(before.mean())


def test_little_is_removed_where_nothing_is_wrong():
    pairs, trusted = records((20,), 300, TRUTH, 2), records((20,), 60, TRUTH, 3)
    kept = remove_by_influence(MODEL, pairs, trusted, RemovalOptions())
    assert float((1 - kept).mean()) < 0.1
    assert float((1 - kept).mean(-1).max()) <= 0.4 + 1e-9


def test_no_record_is_removed_that_helps():
    """One stage with room for nearly all records: only those go whose removal is predicted to lower the loss."""
    pairs, trusted = records((20,), 300, TRUTH, 4), records((20,), 60, TRUTH, 5)
    poisoned, _ = attacked(pairs, 0.2)
    options, everyone = RemovalOptions(share=0.9, num_stages=1), torch.ones_like(pairs.labels)
    removed = remove_by_influence(MODEL, poisoned, trusted, options) == 0
    fitted = fit_reward(MODEL, poisoned, options.fit).parameters
    effects = removal_effects(MODEL, fitted, poisoned, trusted, options, everyone)
    assert int(removed.sum()) > 0 and float(effects[removed].max()) < 0


def two_groups(seed: int) -> tuple[Pairs, torch.Tensor]:
    """210 records of one taste and 90 of the opposite one, in 20 runs, and the group of each."""
    parts = records((20,), 210, TRUTH, seed), records((20,), 90, -TRUTH, seed + 1)
    joined = Pairs(*(torch.cat([getattr(part, name) for part in parts], 1) for name in ("first", "second", "labels")))
    return joined, torch.arange(2).repeat_interleave(torch.tensor([210, 90]))


def test_removal_by_group_keeps_an_honest_minority():
    """Untampered records of the minority: pooled removal takes five points more of them, removal by group does not.

    Tampered records of the minority are found by group alone, too.
    """
    honest, groups = two_groups(0)
    trusted, judges = two_groups(2)
    parts = [attacked(honest.take((groups == group).nonzero()[:, 0]), 0.2) for group in (0, 1)]
    pairs = honest.with_labels(torch.cat([part.labels for part, _ in parts], -1))
    flips = torch.cat([flips for _, flips in parts], -1)
    excess, found = [], []
    for kept in (
        remove_by_influence(MODEL, pairs, trusted, RemovalOptions()),
        remove_by_group(MODEL, pairs, groups, trusted, judges, RemovalOptions()),
    ):
        removed = [(1 - kept)[:, groups == group] for group in (0, 1)]
        tampered = [flips[:, groups == group] for group in (0, 1)]
        excess.append(float(removed[1][~tampered[1]].mean() - removed[0][~tampered[0]].mean()))
        found.append(float(removed[1][tampered[1]].mean()))
    assert excess[1] < 0.05 < excess[0]
    assert found[0] < 0.1 and found[1] > 0.9
    with pytest.raises(ValueError, match="group 1 has records but no trusted one"):
        remove_by_group(MODEL, pairs, groups, trusted.take(torch.arange(50)), judges[:50], RemovalOptions())


def test_the_loop_is_attacked_noticed_and_defended():
    """Twelve seeds of five rounds: the reward rises, the attack stops it, the alarm comes, the defence restores it."""
    clean = simulate(SMALL)
    hit = simulate(replace(SMALL, attack="gradient-reward"))
    saved = simulate(replace(SMALL, attack="gradient-reward", defence="influence"))
    finals = [float(study.rewards[:, -1].mean()) for study in (clean, hit, saved)]
    assert finals[1] < finals[2] < finals[0]
    assert (finals[2] - finals[1]) / (finals[0] - finals[1]) > 0.8
    assert float(clean.rewards[:, 0].mean()) == pytest.approx(-2.04, abs=0.05) and finals[1] < -2
    assert float(clean.alarms[:, -1].double().mean()) < 0.2 < 0.9 < float(hit.alarms[:, 2].double().mean())
    assert torch.equal(hit.alarms, saved.alarms | hit.alarms) and not saved.alarms.all()
    for shares in (saved.removed, saved.caught):
        assert float(shares[~saved.alarms].sum()) == 0 < float(shares[saved.alarms].sum())
    assert torch.equal(simulate(SMALL).rewards, clean.rewards)


def test_real_data_bound_the_drift_and_restore_no_preference():
    """Four real samples for each curated one: the attacked loop stays near the real data, and as bad for users."""
    attack = replace(SMALL, attack="gradient-reward")
    alone, mixed = simulate(attack), simulate(replace(attack, loop=LoopOptions(num_training=300, curated_weight=0.25)))
    distances = [float(study.measures[-1].real_distance.mean()) for study in (alone, mixed)]
    assert abs(distances[1]) < 0.3 * abs(distances[0])
    assert float(mixed.rewards[:, -1].mean()) < -1.9


def test_both_honest_groups_survive_defended_by_group():
    """Opposite tastes of 70 % and 30 %, K = 8: the minority's side of the circle outlives the attack only by group."""
    tastes = (Taste(share=0.7, mode=0), Taste(share=0.3, mode=4))
    loop = LoopOptions(num_training=300, num_candidates=8)
    two = replace(SMALL, num_seeds=6, tastes=tastes, loop=loop, num_audited=100, num_rounds=6, attack="gradient-reward")
    shares = [
        simulate(replace(two, defence=defence)).measures[-1].occupancy[:, 3:6].sum(-1).mean()
        for defence in ("group", "influence")
    ]
    assert float(shares[0]) > 0.12 > float(shares[1])


def test_studies_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="attack 'none': one of clean"):
        StudyOptions(attack="none")
    with pytest.raises(ValueError, match="do not add up to 1"):
        StudyOptions(tastes=(Taste(share=0.5, mode=0),))
    with pytest.raises(ValueError, match="share 1"):
        RemovalOptions(share=1)
