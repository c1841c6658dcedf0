"""What is drawn: groups of K candidates, and one sample of each by Bradley-Terry."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.data.run.curated import AMONG
from engine.data.run.selection_table import LEFT_OVER, Selection
from engine.errors import JobError
from engine.job.spec import MAX_SEED

if TYPE_CHECKING:
    import torch

DEFAULT_CANDIDATES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectionOptions:
    """How groups are made and drawn from.

    Attributes:
        num_candidates: K, size of a group.
        among: `run`: groups over all candidates; `class`: each within one class, which keeps the balance of classes.
        seed: of the groups and the draws, a non-negative integer below 2^53.
        scale: factor of the rewards; 0 selects at random.
    """

    num_candidates: int = DEFAULT_CANDIDATES
    among: str = "run"
    seed: int = 0
    scale: float = 1.0


def check_options(options: SelectionOptions) -> None:
    """Check the options.

    Raises:
        JobError: all problems, a line each.
    """
    problems = []
    if options.num_candidates < 1:
        problems.append(f"--candidates: {options.num_candidates} is not a number of candidates; give 1 or more")
    if options.among not in AMONG:
        problems.append(f"--among: {options.among!r} is not one of {', '.join(AMONG)}")
    if not 0 <= options.seed < MAX_SEED:
        problems.append(f"--seed: {options.seed} is not an integer from 0 to {MAX_SEED - 1}")
    if not math.isfinite(options.scale):
        problems.append(f"--scale: {options.scale} is not a finite number")
    if problems:
        raise JobError(problems)


def check_enough(class_indices: Sequence[int], options: SelectionOptions) -> None:
    """Check that the candidates fill a group; needs no reward.

    Raises:
        JobError: they do not.
    """
    sizes = [len(places) for places in _strata(class_indices, options.among)]
    if max(sizes, default=0) >= options.num_candidates:
        return
    where = "the run has" if options.among == "run" else "the largest class has"
    raise JobError(
        f"--candidates: {options.num_candidates} are one group, and {where} {max(sizes, default=0)} accepted samples"
        " with an image; give a smaller number, or a larger run"
    )


def draw_selection(
    keys: Sequence[str], class_indices: Sequence[int], rewards: Sequence[float], options: SelectionOptions
) -> Selection:
    """Shuffle candidates, cut them into groups of K, and draw one of each by Bradley-Terry.

    Args:
        keys, class_indices, rewards: of the candidates, [N].

    Raises:
        JobError: a reward is not a finite number, naming the key, or there are too few candidates.
    """
    import torch

    from engine.methods.curation.selection import select, selection_probabilities

    check_rewards(keys, rewards)
    check_enough(class_indices, options)
    generator = torch.Generator().manual_seed(options.seed)
    # [G, K] places of the candidates.
    strata = _strata(class_indices, options.among)
    members = torch.cat([_groups(places, options.num_candidates, generator) for places in strata])
    scaled = options.scale * torch.tensor(rewards, dtype=torch.float64)
    if not scaled.isfinite().all():
        raise JobError(f"--scale: {options.scale} makes rewards too large to compute with; give a smaller one")
    chosen = members.gather(1, select(scaled[members], generator)[:, None])[:, 0]
    groups = torch.full((len(keys),), LEFT_OVER, dtype=torch.int64)
    groups[members] = torch.arange(len(members))[:, None].expand_as(members)
    probabilities = torch.zeros(len(keys), dtype=torch.float64)
    probabilities[members] = selection_probabilities(scaled[members])
    selected = torch.zeros(len(keys), dtype=torch.bool)
    selected[chosen] = True
    return Selection(
        keys=tuple(keys),
        groups=tuple(groups.tolist()),
        rewards=tuple(map(float, rewards)),
        probabilities=tuple(probabilities.tolist()),
        selected=tuple(selected.tolist()),
    )


def check_rewards(keys: Sequence[str], rewards: Sequence[float]) -> None:
    """Check that there is a finite reward for each candidate.

    Raises:
        JobError: the number of rewards is another, or one is not finite, with its key.
    """
    if len(rewards) != len(keys):
        raise JobError(f"--reward: gives {len(rewards)} rewards for {len(keys)} samples; give one for each, in order")
    for key, reward in zip(keys, rewards, strict=True):
        if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
            raise JobError(f"--reward: the reward of {key} is {reward!r}, not a finite number; correct the reward")


def values_digest(keys: Sequence[str], rewards: Sequence[float]) -> str:
    """Digest of rewards of which nothing but their values is known."""
    digest = hashlib.sha256("\n".join(keys).encode())
    digest.update(struct.pack(f"<{len(rewards)}d", *rewards))
    return digest.hexdigest()[:32]


def _strata(class_indices: Sequence[int], among: str) -> list[list[int]]:
    """Places of the candidates whose groups are made together: of all, or of each class in order."""
    if among == "run":
        return [list(range(len(class_indices)))]
    strata: dict[int, list[int]] = {}
    for place, index in enumerate(class_indices):
        strata.setdefault(index, []).append(place)
    return [strata[index] for index in sorted(strata)]


def _groups(places: list[int], size: int, generator: torch.Generator) -> torch.Tensor:
    """Places [n] shuffled and cut into groups [n // K, K]; the rest is left over."""
    import torch

    order = torch.randperm(len(places), generator=generator)[: len(places) // size * size]
    return torch.tensor(places, dtype=torch.int64)[order].reshape(-1, size)
