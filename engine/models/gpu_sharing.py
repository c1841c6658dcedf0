"""Workers that share a GPU: how much of its memory each of them may use.

An executor states the share of a worker while it builds it, and `choose_hardware` reads it. Pure arithmetic: neither
torch nor a GPU is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

# What a process holds of a GPU outside of torch's allocator: CUDA's context, kernels and workspaces of libraries.
CONTEXT_BYTES = 2**30


@dataclass(frozen=True, slots=True)
class GpuShare:
    """A worker's share of a GPU.

    Attributes:
        memory: part of its memory.
        owns_process: whether no other worker is in its process, so that torch's allocator can enforce the share.
    """

    memory: float = 1.0
    owns_process: bool = False


WHOLE = GpuShare()
_SHARE: ContextVar[GpuShare] = ContextVar("share", default=WHOLE)


def gpu_share() -> GpuShare:
    """The share of the worker that this thread builds; the whole GPU where no executor says otherwise."""
    return _SHARE.get()


@contextlib.contextmanager
def sharing_gpu(share: GpuShare) -> Iterator[None]:
    """Workers that are built in the block have this share."""
    token = _SHARE.set(share)
    try:
        yield
    finally:
        _SHARE.reset(token)


def allowed_bytes(total: int, share: float) -> int:
    """Bytes of a GPU that a worker may hold: all, or its share without what its process holds besides.

    Args:
        total: bytes of the GPU.
        share: the worker's part of them.
    """
    return total if share >= 1 else max(0, int(share * total) - CONTEXT_BYTES)


def reachable_bytes(free: int, reserved: int, total: int, share: float) -> int:
    """Bytes of a GPU that a process holds already or could still get.

    Args:
        free: bytes that no process holds.
        reserved: bytes that torch's allocator holds for this process.
        total, share: as in `allowed_bytes`.
    """
    return min(free + reserved, allowed_bytes(total, share))
