"""What a batch used: its size, and the memory of the GPU that its process holds."""

from __future__ import annotations

import re
import sys
from typing import NamedTuple

NOT_FINITE = "not_finite"
OTHER = "other"
# `described` puts the class of an exception in front of its text.
_EXCEPTION = re.compile(r"([A-Za-z_]\w{0,59})(?:: |:?$)")
_UNUSABLE = re.compile(r"(^|; )\w+ '.*' gives .*not finite")


class BatchUsage(NamedTuple):
    """What a batch used.

    Attributes:
        size: its samples.
        allocated_bytes: what torch holds of the GPU now, 0 without a GPU.
        peak_bytes: the most that it held since its peak was measured last.
        total_bytes: memory of the GPU.
    """

    size: int
    allocated_bytes: int = 0
    peak_bytes: int = 0
    total_bytes: int = 0


def batch_usage(size: int) -> BatchUsage:
    """What this process uses right after a batch of so many samples; it loads no torch and starts no GPU."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return BatchUsage(size)
    return BatchUsage(
        size,
        allocated_bytes=torch.cuda.memory_allocated(),
        peak_bytes=torch.cuda.max_memory_allocated(),
        total_bytes=torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory,
    )


def failure_kind(message: str) -> str:
    """Why a sample failed, in a word: `not_finite`, the class of an exception, or `other`."""
    if _UNUSABLE.search(message):
        return NOT_FINITE
    match = _EXCEPTION.match(message)
    return match[1] if match else OTHER
