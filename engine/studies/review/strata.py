"""Drawing a stratified sample: which strata, how many of each, and which."""

from __future__ import annotations

import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

# Fewer of a stratum say nothing about its spread.
MIN_PER_STRATUM = 2
WHOLE = "all"


@dataclass(frozen=True, slots=True)
class Drawn:
    """What was drawn of a population.

    Attributes:
        places: in the population, in its order.
        strata: of each of these, its name.
        sizes: images of each stratum in the population.
    """

    places: tuple[int, ...]
    strata: tuple[str, ...]
    sizes: dict[str, int]

    def weight(self, stratum: str) -> float:
        """Images of a stratum for each one that was drawn."""
        return self.sizes[stratum] / self.strata.count(stratum)


def draw_stratified(traits: Sequence[Sequence[str]], number: int, draw: random.Random) -> Drawn:
    """Draw some of a population, in proportion to its strata and at least `MIN_PER_STRATUM` of each.

    Strata are the finest ones for which the number suffices: by all traits, or by the first of them alone.

    Args:
        traits: of each member, from coarse to fine, such as request, class and third of the score.
        number: to draw; all where there are fewer.
    """
    names = _strata(traits, number)
    sizes = Counter(names)
    members: dict[str, list[int]] = defaultdict(list)
    for place, name in enumerate(names):
        members[name].append(place)
    counts = allocate(sizes, number)
    places = sorted(place for name in sorted(members) for place in draw.sample(members[name], counts[name]))
    return Drawn(tuple(places), tuple(names[place] for place in places), dict(sorted(sizes.items())))


def _strata(traits: Sequence[Sequence[str]], number: int) -> list[str]:
    num_traits = len(traits[0]) if traits else 0
    for depth in range(num_traits, 0, -1):
        names = ["/".join(trait[:depth]) for trait in traits]
        if sum(min(MIN_PER_STRATUM, size) for size in Counter(names).values()) <= number:
            return names
    return [WHOLE] * len(traits)


def allocate(sizes: dict[str, int], number: int) -> dict[str, int]:
    """How many to draw of each stratum: in proportion to its size, with a minimum, and never more than it has."""
    total = sum(sizes.values())
    number = min(number, total)
    floor = MIN_PER_STRATUM if sum(min(MIN_PER_STRATUM, size) for size in sizes.values()) <= number else 0
    counts = {name: min(floor, size) for name, size in sizes.items()}
    # Those that are furthest below their share come first.
    waiting = [(counts[name] - number * sizes[name] / total, name) for name in sorted(sizes)]
    heapq.heapify(waiting)
    for _ in range(number - sum(counts.values())):
        excess, name = heapq.heappop(waiting)
        while counts[name] == sizes[name]:
            excess, name = heapq.heappop(waiting)
        counts[name] += 1
        heapq.heappush(waiting, (excess + 1, name))
    return counts
