"""Failures of CUDA where there is no GPU: a named call raises, at its n-th call or above a number of rows.

With them batches have any size, as on a GPU, and the models stay on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from engine.generation.worker import Worker, load_generator
from engine.job.plan import Plan
from engine.job.spec import JobSpec
from engine.models.classifier import Classifier
from engine.models.pipelines.stable_diffusion import StableDiffusion

ASYNCHRONOUS = "\nCUDA kernel errors might be asynchronously reported at some other API call"
# What torch 2.10 raises where memory does not suffice.
OUT_OF_MEMORY: dict[str, Callable[[], Exception]] = {
    "allocator": lambda: torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.2 GiB free"
    ),
    "runtime": lambda: torch.AcceleratorError(f"CUDA error: out of memory{ASYNCHRONOUS}"),
    "driver": lambda: RuntimeError("CUDA driver error: out of memory"),
    "cublas": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cudnn": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    "cudnn 9": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    "cusolver": lambda: RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED, when calling `cusolverDnCreate`"),
    "nvrtc": lambda: RuntimeError("CUDA NVRTC error: NVRTC_ERROR_OUT_OF_MEMORY"),
    "hip": lambda: RuntimeError("HIP error: out of memory"),
    "hipblas": lambda: RuntimeError("CUDA error: HIPBLAS_STATUS_ALLOC_FAILED when calling `hipblasCreate(handle)`"),
}
# What may be too little memory, or too many elements for a kernel; or a broken installation.
OF_SIZE: dict[str, Callable[[], Exception]] = {
    "engine": lambda: RuntimeError("GET was unable to find an engine to execute this computation"),
    "algorithm": lambda: RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    "handle": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    "grid": lambda: torch.AcceleratorError(f"CUDA error: invalid configuration argument{ASYNCHRONOUS}"),
    "not supported": lambda: RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if"),
}
# Nothing in them says that the size is at fault.
OTHER: dict[str, Callable[[], Exception]] = {
    "int max": lambda: RuntimeError(
        "upsample_nearest_nhwc only supports output tensors with less than INT_MAX elements"
    ),
    "assertion": lambda: RuntimeError("Expected grad_output.numel() <= std::numeric_limits<int32_t>::max() to be true"),
}
# After them every call of the process fails.
BROKEN: dict[str, Callable[[], Exception]] = {
    "access": lambda: torch.AcceleratorError(f"CUDA error: an illegal memory access was encountered{ASYNCHRONOUS}"),
    "assert": lambda: torch.AcceleratorError(f"CUDA error: device-side assert triggered{ASYNCHRONOUS}"),
    "ecc": lambda: torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered"),
    "launch": lambda: RuntimeError("CUDA error: unspecified launch failure"),
}
ERRORS = OUT_OF_MEMORY | OF_SIZE | OTHER | BROKEN
# Class, method, and the rows that a sample takes in a call of it.
CALLS: dict[str, tuple[type, str, int]] = {
    "decoder": (StableDiffusion, "decode", 1),
    # Both halves of classifier-free guidance are one call.
    "network": (StableDiffusion, "call_network", 2),
    "classifier": (Classifier, "score_pixels", 1),
}


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A call that fails.

    Attributes:
        call: one of `CALLS`.
        error: one of `ERRORS`.
        above: it fails with more samples than this.
        at: it fails at these calls, counted from 1.
        is_hidden: another exception is raised from it.
    """

    call: str
    error: str
    above: int | None = None
    at: Sequence[int] = ()
    is_hidden: bool = False

    def inject(self, replace: Callable[[type, str, Any], None] = setattr) -> list[int]:
        """Replace the call in this process.

        Returns:
            The number of samples of each call, filled as calls come.
        """
        replace(StableDiffusion, "rows", property(lambda model: None))
        kind, name, rows_per_sample = CALLS[self.call]
        call, sizes = getattr(kind, name), list[int]()

        def failing(owner: Any, batch: torch.Tensor, *inputs: Any, **more: Any) -> Any:
            sizes.append(len(batch) // rows_per_sample)
            if len(sizes) in self.at or (self.above is not None and sizes[-1] > self.above):
                self._raise()
            return call(owner, batch, *inputs, **more)

        replace(kind, name, failing)
        return sizes

    def _raise(self) -> None:
        try:
            raise ERRORS[self.error]()
        except Exception as error:
            if self.is_hidden:
                raise ValueError("no gradient") from error
            raise


def make_failing(job: JobSpec, plan: Plan, *, failures: Sequence[Failure], notices: str) -> Worker:
    """The engine's worker in a process in which calls fail, for `run_job` with `partial`.

    Args:
        notices: file to which its notices are appended.
    """
    generator = load_generator(job, plan)
    add = generator.notices.add  # type: ignore[attr-defined]

    def noted(text: str) -> None:
        with Path(notices).open("a") as file:
            file.write(f"{text}\n")
        add(text)

    generator.notices.add = noted  # type: ignore[attr-defined]
    # The trials of models at loading are no batches.
    for failure in failures:
        failure.inject()
    return Worker(job, plan, name="failing", load=lambda *_: generator)
