"""Which generated samples are kept out of training, to be tested: whole origins, equally of all classes."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

# With fewer tested samples a share says little.
FEW_HELD_OUT = 20


def origin_groups(origins: Sequence[tuple[str, ...]]) -> list[int]:
    """The group of each sample: samples are in one group where they share an origin, also by way of others.

    Args:
        origins: of each sample, the names of its seed and of its start image, where it has one.

    Returns:
        For each sample the row of the first sample of its group.
    """
    first_of: dict[str, int] = {}
    parents = list(range(len(origins)))

    def root(row: int) -> int:
        while parents[row] != row:
            parents[row] = row = parents[parents[row]]
        return row

    for row, names in enumerate(origins):
        for name in names:
            other = root(first_of.setdefault(name, row))
            mine = root(row)
            parents[max(mine, other)] = min(mine, other)
    return [root(row) for row in range(len(origins))]


def choose_held_out(
    origins: Sequence[tuple[str, ...]], classes: Sequence[int], is_tested: Sequence[bool], share: float
) -> Tensor:
    """Which samples are held out, [N] booleans: about a share of the tested ones of each class, by whole groups.

    Groups are taken in an order that their names decide by a hash, so that equal runs give equal parts, and a run that
    has grown keeps most of its own.

    Args:
        is_tested: whether a sample, where it is held out, would be tested.
    """
    groups: dict[int, list[int]] = defaultdict(list)
    for row, group in enumerate(origin_groups(origins)):
        groups[group].append(row)
    tested = {group: [classes[row] for row in rows if is_tested[row]] for group, rows in groups.items()}
    quotas = _quotas([label for labels in tested.values() for label in labels], share)
    held_out = torch.zeros(len(origins), dtype=torch.bool)
    for group in sorted(groups, key=lambda group: _order(origins[group])):
        labels = tested[group]
        if labels and all(labels.count(label) <= quotas[label] for label in labels):
            held_out[groups[group]] = True
            for label in labels:
                quotas[label] -= 1
    return held_out


def _quotas(labels: Sequence[int], share: float) -> dict[int, int]:
    """How many samples of each class are held out: its share, where the largest remainders are rounded up."""
    counts = {label: labels.count(label) for label in sorted(set(labels))}
    quotas = {label: int(share * count) for label, count in counts.items()}
    # At least one is left for training.
    rest = min(round(share * len(labels)), len(labels) - 1) - sum(quotas.values())
    remainders = sorted(counts, key=lambda label: (quotas[label] - share * counts[label], label))
    return quotas | {label: quotas[label] + 1 for label in remainders[: max(rest, 0)]}


def _order(names: tuple[str, ...]) -> str:
    return hashlib.sha256("\0".join(names).encode()).hexdigest()
