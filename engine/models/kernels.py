"""The kernels that torch chooses in this process: TF32, cuDNN's search, determinism, the allocator of a GPU.

TF32 rounds the factors of float32 products and convolutions to 10 bits: several times as fast, and scores move in the
third decimal. Sampling and guidance may use it, scores never do. torch has two interfaces to it, `allow_tf32` and
`fp32_precision`; the older raises when it is read after the newer alone was set. Here both always say the same, for
whatever reads either: a library, a user's model, the guards of compiled code.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch

from engine.models.hardware import Hardware

# One of the two settings with which cuBLAS is deterministic.
CUBLAS_WORKSPACE = ":4096:8"
# Where a user sets torch's allocator; nothing is added to what they say.
ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
# Batches of many sizes leave fragments in segments of a fixed size.
ALLOCATOR_SETTINGS = "expandable_segments:True"


def fix_kernels(hardware: Hardware) -> None:
    """Choose the kernels of a process that samples on a GPU; nothing changes where the models are on a CPU.

    TF32 is on, but for `precision: fp32`. cuDNN searches the fastest convolution for each shape, unless equal bytes are
    asked for: then kernels have one order of summation, and an operator without such a form raises.

    Side effects: torch's global settings, and cuBLAS' workspace in the environment; must be called before the first
    tensor on a GPU, in the process of a worker.
    """
    if not hardware.is_cuda:
        return
    with _FULL.unused():
        _allow_tf32(hardware.dtype != "float32")
        torch.backends.cudnn.benchmark = not hardware.deterministic
    if not any(os.environ.get(name) for name in ALLOCATOR_VARIABLES):
        torch._C._accelerator_setAllocatorSettings(ALLOCATOR_SETTINGS)
    if hardware.deterministic:
        _fix_order()


def _fix_order() -> None:
    """Equal bytes from equal inputs; TF32 does not stand against it."""
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = CUBLAS_WORKSPACE
    torch.use_deterministic_algorithms(True)
    deterministic: Any = torch.utils.deterministic
    # Every new tensor would be filled with NaN, which shows reads of memory that nothing wrote, and takes most of the
    # time of a decoder.
    deterministic.fill_uninitialized_memory = False
    torch.backends.cudnn.deterministic = True
    # The backward passes of these two attention kernels have no fixed order of summation.
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def _allow_tf32(allowed: bool) -> None:
    """TF32 in products and convolutions on a GPU; the setters of the older interface set the newer too."""
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


@contextlib.contextmanager
def full_float32(device: str) -> Iterator[None]:
    """Within it, products and convolutions of float32 are computed in float32, whatever was set outside: for scores.

    TF32, the lower precisions of `set_float32_matmul_precision` (bfloat16 on some CPUs), autocast and cuDNN's search
    are off. All but autocast is of the whole process: a thread that samples meanwhile is slower, never less exact.

    Args:
        device: of the models, whose autocast is switched off.
    """
    _FULL.enter()
    try:
        with torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        _FULL.leave()


class _Counted:
    """Threads in `full_float32`: the first one switches, the last one restores what the first one found."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._count = 0
        self._restore: Callable[[], None]

    @contextlib.contextmanager
    def unused(self) -> Iterator[None]:
        """Wait until no thread is in it; none enters meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: self._count == 0)
            yield

    def enter(self) -> None:
        with self._changed:
            if self._count == 0:
                self._restore = _settings()
                _set_full_float32()
            self._count += 1

    def leave(self) -> None:
        with self._changed:
            self._count -= 1
            if self._count == 0:
                self._restore()
                self._changed.notify_all()


_FULL = _Counted()


def _operators() -> tuple[Any, ...]:
    """What the newer interface has a precision of float32 for."""
    backends: Any = torch.backends
    cuda, cudnn, mkldnn = backends.cuda, backends.cudnn, backends.mkldnn
    return cuda.matmul, cudnn.conv, cudnn.rnn, mkldnn.matmul, mkldnn.conv, mkldnn.rnn


def _settings() -> Callable[[], None]:
    """The settings as they are; calling the result restores them."""
    precisions = [operator.fp32_precision for operator in _operators()]
    # The older interface raises where the two contradict each other.
    older = _read(torch.get_float32_matmul_precision, "highest"), _read(lambda: torch.backends.cudnn.allow_tf32, False)
    benchmark = torch.backends.cudnn.benchmark

    def restore() -> None:
        torch.set_float32_matmul_precision(older[0])
        torch.backends.cudnn.allow_tf32 = older[1]
        for operator, precision in zip(_operators(), precisions, strict=True):
            operator.fp32_precision = precision
        torch.backends.cudnn.benchmark = benchmark

    return restore


def _read(setting: Callable[[], Any], otherwise: Any) -> Any:
    try:
        return setting()
    except RuntimeError:
        return otherwise


def _set_full_float32() -> None:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    for operator in _operators():
        operator.fp32_precision = "ieee"
    torch.backends.cudnn.benchmark = False
