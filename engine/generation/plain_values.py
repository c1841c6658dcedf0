"""Numbers of tensors as they are recorded."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor


def plain(value: Tensor) -> Any:
    """A Python number; a float as the shortest decimal that gives the same float32."""
    if value.is_floating_point():
        return float(str(np.float32(value.item())))
    return value.item()
