"""Does code of the user's own draw random numbers? Samples would then not be decided by their seeds."""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch


def _states() -> dict[str, Any]:
    """The states of all global generators, by what draws from them."""
    states: dict[str, Any] = {"torch": torch.get_rng_state().numpy().tobytes(), "random": random.getstate()}
    if "numpy.random" in sys.modules:
        kind, keys, *rest = sys.modules["numpy.random"].get_state()
        states["numpy.random"] = (kind, keys.tobytes(), *rest)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["torch on the GPU"] = torch.cuda.get_rng_state().numpy().tobytes()
    return states


@contextlib.contextmanager
def watch_generators() -> Iterator[list[str]]:
    """Gives a list that holds afterwards what was drawn from meanwhile: torch, numpy.random, random."""
    before, drawn = _states(), list[str]()
    yield drawn
    drawn += [name for name, state in _states().items() if before.get(name, state) != state]
