"""What an exception of a batch comes from: memory, the size of the batch, the machine, a network, or a sample."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Iterator

import torch

from engine.errors import RiskforgeError

# Of torch's allocator, of CUDA, cuBLAS, cuSOLVER, cuFFT, cuDNN, NVRTC, and of AMD's libraries.
_MEMORY_SIGNS = (
    "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED", "OUT_OF_MEMORY", "rocblas_status_memory_error",
    "miopenStatusAllocFailed",
)  # fmt: skip
# What too little memory looks like, or more elements than a kernel can count, where a library does not say so: cuDNN
# has no engine whose workspace fits, a handle cannot be made, a grid is too large. A broken installation does the same
# to a single sample.
_SIZE_SIGNS = (
    "unable to find an engine", "Unable to find a valid cuDNN algorithm", "CUBLAS_STATUS_NOT_INITIALIZED",
    "CUDNN_STATUS_NOT_INITIALIZED", "CUDNN_STATUS_NOT_SUPPORTED", "CUBLAS_STATUS_NOT_SUPPORTED",
    "CUBLAS_STATUS_INVALID_VALUE", "invalid configuration argument", "CUDA driver error: device not ready",
    "CUDACachingAllocator.cpp",
)  # fmt: skip
# Older device and allocator errors are plain RuntimeErrors.
_MACHINE_SIGNS = (
    "CUDA error", "CUDA driver error", "HIP error", "cuDNN error", "CUBLAS_STATUS", "can't allocate memory",
    "not enough memory",
)  # fmt: skip
# Memory of the machine, which smaller batches on a GPU do not spare.
_HOST_MEMORY = "DefaultCPUAllocator"
# Errors of the operating system that persist; others are transient.
_LASTING = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError)
# In the class names of the network errors of libraries.
_NETWORK_SIGNS = ("Timeout", "Connect", "Network", "Transport", "Protocol")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the memory of a device ran out, by an exception or by what caused it."""
    return not isinstance(error, RiskforgeError) and any(map(_has_no_memory, _chain(error)))


def is_of_size(error: BaseException) -> bool:
    """Whether an exception is one of the machine that a smaller batch may not raise."""
    if isinstance(error, RiskforgeError):
        return False
    return any(_has_no_memory(link) or _has(link, _SIZE_SIGNS) for link in _chain(error))


def is_fault_of_machine(error: Exception) -> bool:
    """Whether an exception comes from the job or the machine, whatever the samples and however many."""
    if isinstance(error, (RiskforgeError, MemoryError)):
        return True
    return not is_of_size(error) and (isinstance(error, torch.AcceleratorError) or _has(error, _MACHINE_SIGNS))


def may_pass(error: BaseException) -> bool:
    """Whether an exception, or what caused it, is of a transient kind: files and networks."""
    return any(
        (isinstance(link, OSError) and not isinstance(link, _LASTING))
        or any(sign in kind.__name__ for kind in type(link).__mro__ for sign in _NETWORK_SIGNS)
        for link in _chain(error)
    )


def release(error: BaseException) -> None:
    """Let go of the tensors that an exception holds through the frames it came through; their lines stay known."""
    for link in _chain(error):
        traceback.clear_frames(link.__traceback__)
    if is_of_size(error):
        # Autograd and exceptions in the code of others leave cycles.
        gc.collect()
        torch.cuda.empty_cache()


def _has_no_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or _HOST_MEMORY in str(error):
        return False
    return isinstance(error, torch.OutOfMemoryError) or _has(error, _MEMORY_SIGNS)


def _has(error: BaseException, signs: tuple[str, ...]) -> bool:
    text = str(error)
    return any(sign in text for sign in signs)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """An exception, what caused it, and so on."""
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__
