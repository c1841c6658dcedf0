"""Which generated samples are held out of a retraining: whole origins, every class its share, always the same."""

from __future__ import annotations

from collections import Counter

import numpy as np

from engine.studies.retrain.held_out import choose_held_out, origin_groups


def origins(seeds: list[int], starts: list[int]) -> list[tuple[str, ...]]:
    """Names as the records of samples have them; a start below zero is none."""
    return [
        (f"seed {seed}", *([f"start {start}"] if start >= 0 else [])) for seed, start in zip(seeds, starts, strict=True)
    ]


def test_samples_are_joined_by_seed_by_start_and_by_way_of_others() -> None:
    """The third joins the first two; the last has neither in common with any."""
    assert origin_groups(origins([1, 2, 1, 3, 4], [7, 8, 8, -1, 9])) == [0, 0, 0, 3, 4]


def test_no_origin_is_on_both_sides_and_every_class_gives_its_share() -> None:
    """Seeds and starts of the two sides are apart, also where samples that are not tested share them."""
    rng = np.random.default_rng(0)
    seeds, starts = rng.integers(0, 250, 400).tolist(), rng.integers(-100, 200, 400).tolist()
    classes = rng.integers(0, 4, 400).tolist()
    is_tested = (rng.random(400) < 0.6).tolist()
    names = origins(seeds, [start if start >= 100 else -1 for start in starts])
    held_out = choose_held_out(names, classes, is_tested, 0.25).tolist()
    sides = [{name for name, is_out in zip(names, held_out, strict=True) if is_out is side} for side in (True, False)]
    assert not {part for name in sides[0] for part in name} & {part for name in sides[1] for part in name}
    total = Counter(label for label, tested in zip(classes, is_tested, strict=True) if tested)
    out = Counter(
        label for label, tested, is_out in zip(classes, is_tested, held_out, strict=True) if tested and is_out
    )
    assert all(abs(out[label] - 0.25 * total[label]) <= 2 for label in total)


def test_few_samples_of_many_classes_are_shared_out_and_something_is_left() -> None:
    """Two of each of ten classes: the share is that of all together, at most one of a class more than of another."""
    names, classes = origins(list(range(20)), [-1] * 20), [number % 10 for number in range(20)]
    held_out = choose_held_out(names, classes, [True] * 20, 0.2)
    assert int(held_out.sum()) == 4 and len({classes[row] for row in held_out.nonzero()[:, 0].tolist()}) == 4
    assert int(choose_held_out(names[:2], classes[:2], [True, True], 0.9).sum()) == 1
    assert int(choose_held_out(names[:1], classes[:1], [True], 0.9).sum()) == 0
    assert int(choose_held_out(names, classes, [True] * 20, 0.0).sum()) == 0


def test_the_choice_follows_from_the_names_alone() -> None:
    """The same samples in another order are the same choice."""
    names, classes = origins(list(range(40)), [-1] * 40), [number % 2 for number in range(40)]
    held_out = choose_held_out(names, classes, [True] * 40, 0.25).tolist()
    order = np.random.default_rng(1).permutation(40).tolist()
    again = choose_held_out([names[row] for row in order], [classes[row] for row in order], [True] * 40, 0.25).tolist()
    assert {names[row] for row in range(40) if held_out[row]} == {names[order[row]] for row in range(40) if again[row]}
