"""Spoilt digits: what is asked of their reader follows what was done to the strokes."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "tools" / "zoo"))
from unreadable import KINDS, DoubtfulDigits, doubtful_digits


def draw(kind: str, count: int = 100, plain_share: float = 0.25) -> DoubtfulDigits:
    """Test digits of one kind."""
    rng = np.random.default_rng(3)
    return doubtful_digits("test", count, rng=rng, kinds={kind: 1.0}, plain_share=plain_share, augment=False)


def on_label(drawn: DoubtfulDigits) -> np.ndarray:
    """What the targets give to the labels, [N]."""
    return drawn.targets[np.arange(len(drawn.labels)), drawn.labels]


@pytest.mark.parametrize("kind", KINDS)
def test_targets_are_distributions(kind: str) -> None:
    """Whatever was done; and equal streams give equal digits."""
    drawn, again = draw(kind), draw(kind)
    assert drawn.images.shape == (100, 32, 32, 3) and drawn.targets.shape == (100, 10)
    assert drawn.targets.min() >= 0 and np.allclose(drawn.targets.sum(-1), 1, atol=1e-5)
    assert np.array_equal(drawn.images, again.images) and np.array_equal(drawn.targets, again.targets)


def test_whole_digits_have_their_labels_and_scribbles_none() -> None:
    assert (on_label(draw("intact")) == 1).all()
    assert np.allclose(draw("scribble").targets, 0.1)


def test_two_digits_on_each_other_share_the_target() -> None:
    """Half each, or all where both are the same class."""
    shares = np.sort(draw("overlay").targets, axis=-1)
    assert set(np.round(shares[:, -1], 3)) == {0.5, 1.0} and np.allclose(shares[:, -2:].sum(-1), 1)


def test_a_target_falls_with_the_ink_that_is_lost() -> None:
    """Of white digits on black, those that were erased most are believed least."""
    whole, erased = draw("intact", 400, plain_share=1.0), draw("erased", 400, plain_share=1.0)
    assert np.array_equal(whole.labels, erased.labels)
    kept, target = erased.images.mean((1, 2, 3)) / whole.images.mean((1, 2, 3)), on_label(erased)
    few, many = np.quantile(kept, [0.2, 0.8])
    assert target[kept < few].mean() < 0.5 * target[kept > many].mean()
    assert 0.05 < np.mean(target == 1) < 0.5 and target.min() < 0.2


def test_kinds_come_by_their_shares() -> None:
    kinds = doubtful_digits("train", 2000, rng=np.random.default_rng(0)).kinds
    for kind, share in KINDS.items():
        assert abs(np.mean(kinds == kind) - share) < 0.04
    assert sum(KINDS.values()) == pytest.approx(1)
