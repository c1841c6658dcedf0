"""Sets of composed digits that tests, studies and the training of the zoo use."""

from __future__ import annotations

import numpy as np

from engine.data.images.digits.contexts import plain_contexts, random_contexts, seen_share, single_contexts
from engine.data.images.digits.drawing import Composites, compose
from engine.data.images.digits.scans import SPLIT_SEED, load_sources


def compose_split(split: str, count: int, *, seed: int, plain: bool = False) -> Composites:
    """`count` composites of a split, every source as often as every other (to one), without augmentation."""
    rng = np.random.default_rng([SPLIT_SEED, seed])
    sources = load_sources(split)
    rows = np.resize(rng.permutation(len(sources)), count)
    contexts = plain_contexts(count) if plain else random_contexts(count, rng=rng)
    return compose(sources, rows, contexts, rng=rng)


def compose_single(split: str, *, seed: int) -> Composites:
    """Every source of a split once in each of `single_contexts`, source by source, without augmentation."""
    rng = np.random.default_rng([SPLIT_SEED, seed, 1])
    sources, contexts = load_sources(split), single_contexts()
    rows = np.repeat(np.arange(len(sources)), len(contexts))
    return compose(sources, rows, contexts.take(np.tile(np.arange(len(contexts)), len(sources))), rng=rng)


def compose_seen(count: int, *, seed: int, plain_share: float = 0.25) -> Composites:
    """`count` composites of train sources as the zoo's `classifier` was shown them: its holes are missing."""
    rng = np.random.default_rng([SPLIT_SEED, seed, 2])
    sources = load_sources("train")
    contexts = random_contexts(count * 4, rng=rng, plain_share=plain_share)
    kept = np.flatnonzero(rng.random(len(contexts)) < seen_share(contexts))
    rows = np.resize(rng.permutation(len(sources)), count)
    return compose(sources, rows, contexts.take(np.resize(kept, count)), rng=rng)


def training_batch(
    count: int, *, rng: np.random.Generator, plain_share: float = 0.2, shrunk_share: float = 0.0
) -> Composites:
    """`count` augmented composites of random train sources."""
    sources = load_sources("train")
    contexts = random_contexts(count, rng=rng, plain_share=plain_share, shrunk_share=shrunk_share)
    return compose(sources, rng.integers(len(sources), size=count), contexts, rng=rng, augment=True)
