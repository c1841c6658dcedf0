"""The monitor: its wealth is a fair game where nothing is wrong, exactly; and it finds what is."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from engine.methods.curation.monitor import (
    Audit,
    AuditState,
    accuracy_log_e_value,
    combined_e_value,
    continue_audit,
    start_audit,
    trusted_agreement,
)
from engine.methods.curation.preferences import Pairs
from engine.methods.curation.reward_models import FitOptions, LinearReward, fit_reward, margins
from engine.methods.curation.selection import draw_preferences

TRUTH = torch.tensor([1.0, -0.5, 0.0], dtype=torch.float64)


def test_the_mean_wealth_of_an_audit_is_exactly_one():
    """All 4^3 outcomes of three records over two rounds, each with its probability.

    The learned reward is wrong, the raters are noisy. A bettor who saw a coin before the bet would not be fair.
    """
    differences = torch.tensor([[1.0, 0.3], [-2.0, 1.0], [0.5, -1.5]], dtype=torch.float64)
    chance = torch.tensor([0.8, 0.35, 0.6], dtype=torch.float64)
    learned = differences @ torch.tensor([-3.0, 2.0], dtype=torch.float64)
    outcomes = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)), dtype=torch.float64)
    choices, trusted = outcomes[:, :3], outcomes[:, 3:]
    mass = torch.ones(64, dtype=torch.float64)
    for labels in (choices, trusted):
        mass = mass * torch.where(labels > 0, chance, 1 - chance).prod(-1)
    state = start_audit((64,), 2)
    for part, earlier in ((slice(0, 2), None), (slice(2, 3), learned[:2].expand(64, 2))):
        rows = differences[part].expand(64, -1, 2)
        audit = Audit(rows, choices[:, part], trusted[:, part], learned[part].expand(64, -1))
        state = continue_audit(state, audit, earlier)
        assert float((mass * state.e_value).sum()) == pytest.approx(1, abs=1e-12)
    assert float(state.e_value.std()) > 0.2
    assert torch.equal(state.num_differing, (choices != trusted).sum(-1).double())


def run_audits(num_runs: int, num_rounds: int, num_audited: int, flip_share: float, seed: int = 0) -> AuditState:
    """Audits of rounds with a learned reward of their own; the records with the largest margins are exchanged."""
    generator = torch.Generator().manual_seed(seed)
    state, model = start_audit((num_runs,), 3), LinearReward(3)
    for _ in range(num_rounds):
        rows = 2 * torch.randn(num_runs, 100 + num_audited, 3, generator=generator, dtype=torch.float64)
        margin = rows @ TRUTH
        labels = draw_preferences(margin, torch.zeros_like(margin), generator)
        exchanged = margin.abs() > margin.abs().quantile(1 - flip_share, -1, keepdim=True)
        attacked = torch.where(exchanged, 1 - labels, labels)
        pairs = Pairs(rows, torch.zeros_like(rows), attacked)
        training, audited = pairs.take(torch.arange(100)), pairs.take(torch.arange(100, 100 + num_audited))
        learned = fit_reward(model, training, FitOptions(tolerance=1e-4)).parameters
        again = draw_preferences(margin[:, 100:], torch.zeros(num_runs, num_audited, dtype=torch.float64), generator)
        audit = Audit(audited.first, audited.labels, again, margins(model, learned, audited))
        state = continue_audit(state, audit, model(learned, state.differences))
    return state


def test_false_alarms_of_a_run_of_ten_rounds_are_at_most_five_in_a_hundred():
    """1,000 clean runs of ten audits of 15: at most 5 % ever raise an alarm, within four standard deviations."""
    alarms = run_audits(1000, 10, 15, 0.0).alarm()
    assert float(alarms.double().mean()) <= 0.05 + 4 * math.sqrt(0.05 * 0.95 / 1000)


def test_exchanged_labels_raise_the_alarm_and_it_stays():
    """200 runs with 20 % of the labels exchanged: 95 % are noticed within two audits of 80; fewer by small ones."""
    alarms = run_audits(200, 2, 80, 0.2)
    assert float(alarms.alarm().double().mean()) >= 0.95
    assert float(run_audits(200, 2, 10, 0.2).alarm().double().mean()) < 0.5
    generator = torch.Generator().manual_seed(1)
    rows = 4 * torch.randn(200, 30, 3, generator=generator, dtype=torch.float64)
    choices = (torch.rand(200, 30, generator=generator) < 0.5).double()
    later = continue_audit(alarms, Audit(rows, choices, 1 - choices, rows @ -TRUTH))
    assert float(later.e_value.median()) < 20 < float(alarms.e_value.median())
    assert bool((later.alarm() | ~alarms.alarm()).all())


@pytest.mark.parametrize("floor", [0.3, 0.5, 0.65])
def test_an_accuracy_at_its_floor_is_no_evidence(floor):
    """All outcomes of six choices: mean e-value 1 at the floor, below 1 above it, above 1 under it."""
    outcomes = torch.tensor(list(itertools.product((0.0, 1.0), repeat=6)), dtype=torch.float64)
    means = []
    for accuracy in (floor, floor + 0.2, floor - 0.2):
        chance = (accuracy * outcomes + (1 - accuracy) * (1 - outcomes)).prod(-1)
        means.append(float(chance @ accuracy_log_e_value(outcomes, floor).exp()))
    assert means[0] == pytest.approx(1) and means[1] < 1 < means[2]


def test_dependent_rounds_share_the_level():
    """The same evidence in all of 200 rounds: the sum stays below it, whatever the dependence."""
    logs = torch.full((200,), math.log(20.0), dtype=torch.float64)
    combined = combined_e_value(logs)
    assert float(combined[0]) == pytest.approx(10) and 19 < float(combined[-1]) < 20
    assert bool((combined.diff() > 0).all())


def test_agreement_with_a_trusted_reward():
    """Near 1 for the users' reward, near -1 for its reverse; the interval holds its own estimate and excludes zero."""
    generator = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 3, 200, 3, generator=generator, dtype=torch.float64)
    trusted = Pairs(first, second, draw_preferences(first @ TRUTH, second @ TRUTH, generator))
    probes = torch.randn(3, 500, 3, generator=generator, dtype=torch.float64)
    learned = torch.stack([TRUTH, -TRUTH, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)])
    result = trusted_agreement(LinearReward(3), trusted, learned, probes, FitOptions(), generator)
    assert result.correlation[0] > 0.8 and result.low[0] > 0.5
    assert result.correlation[1] < -0.3 and result.high[1] < 0
    assert result.low[2] < 0 < result.high[2]
    assert bool(((result.low <= result.correlation) & (result.correlation <= result.high)).all())
