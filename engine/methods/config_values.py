"""Values of a model's JSON configuration: of which kind they are, and how a message shows them. Without torch."""

from __future__ import annotations

import json
import math
from typing import Any, TypeGuard

MAX_SHOWN = 60


def shown(value: Any) -> str:
    """A value of a configuration as JSON, cut where it is long."""
    text = json.dumps(value)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether a value of a configuration is a whole number."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Whether a value of a configuration is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf
