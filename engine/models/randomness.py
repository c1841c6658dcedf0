"""Detects user code that draws random numbers: samples would then depend on more than their seeds."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import torch

# Other threads of a worker may draw at the same time; code that draws does so in every attempt.
_TRIES = 3

Result = TypeVar("Result")


def _states() -> dict[str, Any]:
    """The states of all global generators, by the library that draws from them."""
    states: dict[str, Any] = {"torch": torch.get_rng_state().numpy().tobytes(), "random": random.getstate()}
    if "numpy.random" in sys.modules:
        kind, keys, *rest = sys.modules["numpy.random"].get_state()
        states["numpy.random"] = (kind, keys.tobytes(), *rest)
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["torch on the GPU"] = torch.cuda.get_rng_state().numpy().tobytes()
    return states


def watched(call: Callable[[], Result]) -> tuple[Result, list[str]]:
    """The result of a call, and the global generators that it draws from: torch, numpy.random, random."""
    for _ in range(_TRIES):
        before = _states()
        result = call()
        drawn = [name for name, state in _states().items() if before.get(name, state) != state]
        if not drawn:
            break
    return result, drawn
