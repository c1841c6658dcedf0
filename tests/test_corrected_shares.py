"""Shares that people would find: coverage and bias of estimates and intervals over simulated reviews."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from engine.methods.corrected_shares import Stratum, corrected_share, human_share, weighted_share
from engine.methods.intervals import Estimate, wilson_interval

NUM_DRAWS = 200
# Of nominal 190. Over 1500 draws the least of any scene is 0.938 ("half", by people alone, as Wilson's always was).
MIN_COVERED = 184


@dataclass(frozen=True)
class Scene:
    """A population, a machine, raters and a design.

    Attributes:
        sizes, shares, drawn: of each stratum: images, share with a valid label, images that are looked at.
        sensitivity, specificity: of the machine.
        num_raters: of each image.
        missed, invented: shares of raters who do not say a valid label, and who say one that is not.
    """

    sizes: tuple[int, ...]
    shares: tuple[float, ...]
    drawn: tuple[int, ...]
    sensitivity: float = 0.98
    specificity: float = 0.95
    num_raters: int = 1
    missed: float = 0.03
    invented: float = 0.05

    @property
    def truth(self) -> float:
        """The share that raters say, over the process that makes the images."""
        shares = np.array(self.shares)
        said = shares * (1 - self.missed) + (1 - shares) * self.invented
        return float((np.array(self.sizes) * said).sum() / sum(self.sizes))

    def review(self, draw: np.random.Generator) -> tuple[float, list[Stratum]]:
        """One run of the process, and one review of it."""
        means, strata = [], []
        for size, share, drawn in zip(self.sizes, self.shares, self.drawn, strict=True):
            valid = draw.random(size) < share
            machine = draw.random(size) < np.where(valid, self.sensitivity, 1 - self.specificity)
            human = draw.binomial(self.num_raters, np.where(valid, 1 - self.missed, self.invented)) / self.num_raters
            places = draw.choice(size, drawn, replace=False)
            means.append(machine.mean())
            strata.append(Stratum(size=size, human=human[places], machine=machine[places].astype(float)))
        return float(np.average(means, weights=self.sizes)), strata

    def estimates(self) -> tuple[list[Estimate], list[Estimate]]:
        """Corrected and human-only, over `NUM_DRAWS` runs and reviews."""
        draw = np.random.default_rng(1)
        reviews = [self.review(draw) for _ in range(NUM_DRAWS)]
        corrected = [corrected_share(mean, strata) for mean, strata in reviews]
        return corrected, [human_share(strata) for _, strata in reviews]


MIXED = (0.95, 0.9, 0.7, 0.5, 0.3, 0.1)
SCENES = {
    "small": Scene((1000,), (0.9,), (30,)),
    "small, near 1": Scene((1000,), (0.98,), (30,)),
    "right machine": Scene((1000,), (0.98,), (30,), sensitivity=1.0, specificity=1.0),
    "near 0": Scene((50,) * 10, (0.02,) * 10, (5,) * 10),
    "near 1": Scene((50,) * 10, (0.99,) * 10, (5,) * 10),
    "half": Scene((1000,), (0.6,), (100,)),
    "most of all": Scene((60,), (0.8,), (40,)),
    "all": Scene((80, 40), (0.8, 0.5), (80, 40)),
    "three raters": Scene((400, 200, 100), (0.9, 0.7, 0.3), (40, 30, 30), num_raters=3, missed=0.1, invented=0.1),
    "equal parts of unequal strata": Scene((400, 200, 100, 50, 30, 20), MIXED, (10,) * 6),
    "bad machine": Scene((400, 200, 100, 50, 30, 20), MIXED, (10,) * 6, sensitivity=0.9, specificity=0.6),
    "pairs": Scene((30,) * 30, tuple(np.linspace(0.3, 1, 30)), (2,) * 30),
    "pairs, bad machine": Scene((30,) * 30, tuple(np.linspace(0.3, 1, 30)), (2,) * 30, 0.9, 0.6),
    "no machine": Scene((300, 300), (0.7, 0.4), (40, 40), sensitivity=0.0, specificity=1.0),
    "contrary machine": Scene((300, 300), (0.7, 0.4), (60, 60), sensitivity=0.1, specificity=0.1),
}  # fmt: skip


@pytest.mark.parametrize("name", SCENES)
def test_intervals_cover_what_people_say(name: str) -> None:
    """Over 200 runs and reviews, and on average the estimates are what people say."""
    scene = SCENES[name]
    for estimates in scene.estimates():
        values = np.array([one.value for one in estimates])
        assert sum(one.low <= scene.truth <= one.high for one in estimates) >= MIN_COVERED
        # What lies outside of [0, 1] is cut, which a share near an end is moved by.
        assert abs(values.mean() - scene.truth) < 4 * values.std() / np.sqrt(NUM_DRAWS) + 0.002


def test_normal_intervals_do_not_cover() -> None:
    """Why these intervals are what they are: the usual one collapses where people and machine agree on all images."""
    scene, draw = SCENES["right machine"], np.random.default_rng(1)
    covered = 0
    for _ in range(NUM_DRAWS):
        mean, (stratum,) = scene.review(draw)
        changes = stratum.human - stratum.machine
        half = 1.96 * np.sqrt(mean * (1 - mean) / stratum.size + changes.var(ddof=1) / len(changes))
        covered += abs(mean + changes.mean() - scene.truth) <= half
    assert covered < 0.8 * NUM_DRAWS


def _mean_widths(scene: Scene) -> tuple[float, float]:
    """Of the corrected estimate, and by people alone."""
    corrected, alone = ([one.high - one.low for one in estimates] for estimates in scene.estimates())
    return float(np.mean(corrected)), float(np.mean(alone))


def test_a_good_machine_saves_answers() -> None:
    """The corrected interval is narrower by a quarter or more; with a bad machine it is the wider one."""
    corrected, alone = _mean_widths(SCENES["half"])
    assert corrected < 0.75 * alone
    corrected, alone = _mean_widths(SCENES["contrary machine"])
    assert corrected > alone


def test_raters_who_err_move_the_share_of_what_they_say() -> None:
    """What is estimated is what raters say: with a tenth of them wrong it is not the share of valid labels."""
    scene = SCENES["three raters"]
    valid = np.average(scene.shares, weights=scene.sizes)
    assert abs(np.mean([one.value for one in scene.estimates()[0]]) - valid) > 0.03


def test_estimate_is_the_formula() -> None:
    """`sum_s W_s (mean_N_s(f) + mean_n_s(h - f))`, written out."""
    strata = [
        Stratum(size=30, human=np.array([1.0, 0.5, 0.0]), machine=np.array([1.0, 1.0, 0.0])),
        Stratum(size=10, human=np.array([1.0, 1.0]), machine=np.array([0.0, 1.0])),
    ]
    by_hand = 0.75 * (0.6 + -0.5 / 3) + 0.25 * (0.2 + 0.5)
    assert corrected_share(0.75 * 0.6 + 0.25 * 0.2, strata).value == pytest.approx(by_hand)
    assert human_share(strata).value == pytest.approx(0.75 * 0.5 + 0.25)


def test_strata_without_an_answer_count_as_the_others() -> None:
    """They widen nothing and move nothing: the others stand for them, and nobody at all gives no estimate."""
    seen = Stratum(size=50, human=np.array([1.0, 0.0, 1.0]), machine=np.ones(3))
    unseen = Stratum(size=50, human=np.empty(0), machine=np.empty(0))
    assert human_share([seen, unseen]).value == pytest.approx(2 / 3)
    assert corrected_share(1.0, [seen, unseen]).value == pytest.approx(2 / 3)
    assert human_share([unseen]) is None and corrected_share(0.5, [unseen]) is None


def test_all_images_looked_at_leave_the_error_of_the_process() -> None:
    """Then the interval is that of a binomial share, whatever the machine says."""
    human = np.repeat([1.0, 0.0], [70, 30])
    stratum = Stratum(size=100, human=human, machine=np.zeros(100))
    found, expected = human_share([stratum]), wilson_interval(70, 100)
    assert (found.value, found.low, found.high) == pytest.approx((expected.value, expected.low, expected.high))
    corrected = corrected_share(0.0, [stratum])
    assert (corrected.low, corrected.high) == pytest.approx((expected.low, expected.high))


def test_weighted_share_counts_by_weight() -> None:
    """Equal weights are a plain share; with unequal ones the interval is that of fewer images."""
    values = np.repeat([1.0, 0.0], [30, 10])
    plain = weighted_share(values, np.full(40, 3.0))
    expected = wilson_interval(30, 40)
    assert (plain.value, plain.low, plain.high) == pytest.approx((expected.value, expected.low, expected.high))
    uneven = weighted_share(values, np.tile([1.0, 9.0], 20))
    assert uneven.value == pytest.approx(0.75) and uneven.high - uneven.low > plain.high - plain.low
    assert weighted_share(values, np.zeros(40)) is None
