"""Attacks on preference records: the hypergradient, and the order of the attacks that depends on its sign."""

from __future__ import annotations

import pytest
import torch

from engine.methods.curation.attacks import (
    ATTACKS,
    AttackOptions,
    budget,
    covariance_objective,
    curated_reward_objective,
    flips_by,
    gradient_flips,
    highest_reward_flips,
    largest_difference_flips,
    random_flips,
)
from engine.methods.curation.hypergradient import (
    SolverOptions,
    conjugate_gradient,
    hessian_product,
    hypergradient,
    margin_derivatives,
)
from engine.methods.curation.preferences import Pairs
from engine.methods.curation.reward_models import FitOptions, LinearReward, NetworkReward, fit_reward, training_loss
from engine.methods.curation.selection import draw_preferences

EXACT = SolverOptions(damping=0.0, tolerance=1e-12)


def scene(runs: tuple[int, ...], count: int = 200, scale: float = 1.0, seed: int = 0) -> tuple[Pairs, torch.Tensor]:
    """Records with four features by a linear reward, and probes [..., 100, 4]."""
    generator = torch.Generator().manual_seed(seed)
    weights = scale * torch.tensor([1.0, -1.0, 0.5, 0.0], dtype=torch.float64)
    first, second = torch.randn(2, *runs, count, 4, generator=generator, dtype=torch.float64)
    probes = torch.randn(*runs, 100, 4, generator=generator, dtype=torch.float64)
    return Pairs(first, second, draw_preferences(first @ weights, second @ weights, generator)), probes


def test_conjugate_gradients_solve_damped_systems():
    """Several runs of different condition at once, against a direct solution."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(5, 8, 8, generator=generator, dtype=torch.float64)
    matrix = root @ root.mT * torch.logspace(-3, 3, 5, dtype=torch.float64)[:, None, None]
    target = torch.randn(5, 8, generator=generator, dtype=torch.float64)
    solution = conjugate_gradient(
        lambda vector: (matrix @ vector[..., None])[..., 0], target, SolverOptions(damping=0.1, tolerance=1e-12)
    )
    expected = torch.linalg.solve(matrix + 0.1 * torch.eye(8, dtype=torch.float64), target)
    torch.testing.assert_close(solution.vector, expected, rtol=1e-8, atol=1e-10)
    assert bool(solution.convex.all()) and float(solution.residual.max()) <= 1e-12


def test_negative_curvature_is_reported():
    """At a saddle point there is no implicit derivative; the other run is solved all the same."""
    diagonal = torch.tensor([[1.0, -2.0], [1.0, 2.0]], dtype=torch.float64)
    solution = conjugate_gradient(
        lambda vector: diagonal * vector, torch.ones(2, 2, dtype=torch.float64), SolverOptions(damping=0.0)
    )
    assert solution.convex.tolist() == [False, True]
    torch.testing.assert_close(solution.vector[1], 1 / diagonal[1])


@pytest.mark.parametrize("model", [LinearReward(4), NetworkReward(4, 3)])
def test_products_equal_those_of_the_matrices(model):
    """Hessian and margin derivatives without matrices, against those that autograd builds in full."""
    pairs, _ = scene((), 30)
    generator = torch.Generator().manual_seed(1)
    parameters, vector = torch.randn(2, model.num_parameters, generator=generator, dtype=torch.float64)
    hessian = torch.func.hessian(lambda point: training_loss(model, point, pairs, 0.1))(parameters)
    torch.testing.assert_close(hessian_product(model, parameters, pairs, 0.1)(vector), hessian @ vector)
    jacobian = torch.func.jacrev(lambda point: model(point, pairs.first) - model(point, pairs.second))(parameters)
    torch.testing.assert_close(margin_derivatives(model, parameters, pairs, vector), jacobian @ vector)


@pytest.mark.parametrize(
    ("model", "step", "tolerance"), [(LinearReward(4), 1e-4, 1e-6), (NetworkReward(4, 3), 1e-2, 1e-3)]
)
@pytest.mark.parametrize("objective", [covariance_objective, curated_reward_objective])
def test_the_hypergradient_equals_finite_differences_through_retraining(model, step, tolerance, objective):
    """Labels are moved both ways, the model is trained again to convergence, and the objective is compared."""
    pairs, probes = scene((), 40)
    options = FitOptions(l2=0.05, tolerance=1e-12 if isinstance(model, LinearReward) else 1e-8, max_steps=2000)
    fitted = fit_reward(model, pairs, options, generator=torch.Generator().manual_seed(2)).parameters
    true = probes[:, 0]

    def value(parameters: torch.Tensor) -> torch.Tensor:
        return objective(true, model(parameters, probes))

    exact = hypergradient(model, fitted, pairs, value, l2=options.l2, solver=EXACT)
    assert bool(exact.solution.convex)
    differences = []
    for record in range(8):
        moved = torch.zeros(40, dtype=torch.float64)
        moved[record] = step
        up, down = (
            value(fit_reward(model, pairs.with_labels(labels), options, start=fitted).parameters)
            for labels in (pairs.labels + moved, pairs.labels - moved)
        )
        differences.append((up - down) / (2 * step))
    scale = float(exact.labels.abs().max())
    torch.testing.assert_close(exact.labels[:8], torch.stack(differences), rtol=0, atol=tolerance * scale)


def test_attacks_exchange_what_they_say():
    """Numbers within the budget, and the records that each heuristic is about."""
    pairs, _ = scene((3,), 50)
    model, parameters = LinearReward(4), torch.tensor([1.0, 0, 0, 0], dtype=torch.float64).expand(3, 4)
    assert budget(0.2, 50) == 10
    flips = random_flips(pairs.labels, 0.2, torch.Generator().manual_seed(0))
    assert flips.sum(-1).tolist() == [10] * 3 and not torch.equal(flips[0], flips[1])
    difference = (pairs.first - pairs.second)[..., 0].abs()
    by_difference = largest_difference_flips(model, parameters, pairs, 0.2)
    assert float(difference[by_difference].min()) >= 0 and by_difference.sum(-1).tolist() == [10] * 3
    highest = torch.maximum(pairs.first[..., 0], pairs.second[..., 0])
    by_height = highest_reward_flips(model, parameters, pairs, 0.2)
    for run in range(3):
        assert difference[run][by_difference[run]].min() >= difference[run][~by_difference[run]].max()
        assert highest[run][by_height[run]].min() >= highest[run][~by_height[run]].max()
    with pytest.raises(ValueError, match=r"share: 1\.2"):
        budget(1.2, 50)
    with pytest.raises(ValueError, match="num_stages 0"):
        AttackOptions(share=0.1, num_stages=0)


def test_attacks_are_known_by_name():
    """Each name is its function's, by the reward that the honest records teach."""
    pairs, probes = scene((3,), 50)
    model, options = LinearReward(4), AttackOptions(share=0.2)
    believed = fit_reward(model, pairs, options.fit).parameters
    by_reward = AttackOptions(share=0.2, objective=curated_reward_objective)
    expected = {
        "random": random_flips(pairs.labels, 0.2, torch.Generator().manual_seed(0)),
        "largest-difference": largest_difference_flips(model, believed, pairs, 0.2),
        "highest-reward": highest_reward_flips(model, believed, pairs, 0.2),
        "gradient": gradient_flips(model, believed, pairs, probes, options),
        "gradient-reward": gradient_flips(model, believed, pairs, probes, by_reward),
    }
    assert tuple(expected) == ATTACKS and not torch.equal(expected["gradient"], expected["gradient-reward"])
    for name, flips in expected.items():
        found = flips_by(name, model, pairs, probes, options, torch.Generator().manual_seed(0))
        assert torch.equal(found, flips), name


def outcome(attack: AttackOptions, scale: float = 1.0) -> torch.Tensor:
    """The objective [20] after training on the attacked records."""
    pairs, probes = scene((20,), scale=scale)
    model = LinearReward(4)
    clean = fit_reward(model, pairs, attack.fit).parameters
    flips = gradient_flips(model, clean, pairs, probes, attack)
    assert int(flips.sum(-1).max()) <= budget(attack.share, 200)
    attacked = fit_reward(model, pairs.flipped(flips), attack.fit).parameters
    return attack.objective(model(clean, probes), model(attacked, probes))


@pytest.mark.parametrize("objective", [covariance_objective, curated_reward_objective])
def test_signed_flips_beat_unsigned_and_random_ones(objective):
    """In every one of 20 runs with noisy raters, whose labels the users would partly like to see exchanged.

    The size of a hypergradient without its sign spends the budget on records whose exchange helps the users.
    """
    signed = outcome(AttackOptions(share=0.1, objective=objective), scale=0.3)
    unsigned = outcome(AttackOptions(share=0.1, objective=objective, signed=False), scale=0.3)
    assert bool((signed < unsigned).all())
    pairs, probes = scene((20,), scale=0.3)
    model, fit = LinearReward(4), FitOptions()
    flips = random_flips(pairs.labels, 0.1, torch.Generator().manual_seed(0))
    clean, attacked = (fit_reward(model, part, fit).parameters for part in (pairs, pairs.flipped(flips)))
    assert bool((signed < objective(model(clean, probes), model(attacked, probes))).all())


def test_stages_and_budget_make_the_attack_stronger():
    one = outcome(AttackOptions(share=0.2, objective=curated_reward_objective))
    five = outcome(AttackOptions(share=0.2, objective=curated_reward_objective, num_stages=5))
    small = outcome(AttackOptions(share=0.05, objective=curated_reward_objective))
    assert float(five.mean()) < float(one.mean()) < float(small.mean())


def test_the_penalty_keeps_the_attacked_reward_close():
    """alpha: a larger weight leaves the learned reward closer to the true one on the probes."""
    pairs, probes = scene((20,))
    model, distances = LinearReward(4), []
    clean = fit_reward(model, pairs, FitOptions()).parameters
    for weight in (0.0, 1.0, 10.0):
        attack = AttackOptions(share=0.2, distance_weight=weight, num_stages=4)
        flips = gradient_flips(model, clean, pairs, probes, attack)
        attacked = fit_reward(model, pairs.flipped(flips), FitOptions()).parameters
        distances.append(float((model(attacked, probes) - model(clean, probes)).square().mean()))
    assert distances[0] > 1.1 * distances[1] > 2 * distances[2]


def test_the_objectives_are_what_curation_does():
    """The curated reward is the mean true reward after one exact round of curation by many candidates."""
    own, learned = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = learned.exp() / learned.exp().mean()
    torch.testing.assert_close(curated_reward_objective(own, learned), (weights * own).mean())
    expected = (own.exp() * learned.exp()).mean() - own.exp().mean() * learned.exp().mean()
    torch.testing.assert_close(covariance_objective(own, learned), expected)
