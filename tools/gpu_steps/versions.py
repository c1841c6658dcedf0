"""What is there: versions, the GPU, which attention kernels run forward and backward, and how fast it multiplies."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from bench.measure import matmul_rate, timed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from engine.data.run.manifest import software_versions
from engine.job.spec import RuntimeSpec
from engine.models.hardware import choose_hardware
from engine.models.kernels import full_float32
from gpu_steps.common import Figures, PeakMemory, attempt, exit_code, parser, rounded

# Head sizes of the UNets of Stable Diffusion 1.x (40, 80, 160) and 2.x (64), and of the autoencoder of both.
HEAD_SIZES = (40, 64, 80, 160, 512)
DTYPES = ("float16", "bfloat16", "float32")
KERNELS = (
    SDPBackend.FLASH_ATTENTION,
    SDPBackend.EFFICIENT_ATTENTION,
    SDPBackend.CUDNN_ATTENTION,
    SDPBackend.MATH,
)
TOKENS = 256
SIDES = {"cuda": 8192, "cpu": 256}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    options = parser(__doc__).parse_args(arguments)
    figures = Figures(options.output)
    figures.note("versions", versions())
    if options.device == "cuda" and not torch.cuda.is_available():
        return exit_code(["no GPU is visible to torch"])
    figures.note("device", device_facts(options.device))
    figures.note("auto", attempt(lambda: repr(choose_hardware(RuntimeSpec(device=options.device)))))
    found = {f"{size} {name}": attempt(partial(xformers, size, name, options.device)) for size, name in pairs()}
    figures.note("xformers", found)
    figures.note("sdpa", {f"{size} {name}": running_kernels(size, name, options.device) for size, name in pairs()})
    chosen = {name: attempt(partial(decoder_attention, name, options.device)) for name in DTYPES[1:]}
    figures.note("decoder_attention", chosen)
    figures.note("teraflops", rates(options))
    return 0


def pairs() -> list[tuple[int, str]]:
    """Every head size in every precision."""
    return [(size, dtype) for size in HEAD_SIZES for dtype in DTYPES]


def versions() -> dict[str, Any]:
    """Of Python, torch and what it was built with, and of the packages that a run records."""
    cudnn = torch.backends.cudnn.version()
    return {"python": sys.version.split()[0], "cuda": torch.version.cuda, "cudnn": cudnn} | software_versions()


def device_facts(device: str) -> dict[str, Any]:
    """Name, memory and generation of the GPU."""
    if device == "cpu":
        return {"name": "CPU", "threads": torch.get_num_threads()}
    found = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info()
    return {
        "name": found.name,
        "capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
        "total_gib": round(total / 2**30, 2),
        "free_gib": round(free / 2**30, 2),
        "count": torch.cuda.device_count(),
    }


def xformers(head_size: int, dtype: str, device: str) -> str:
    """`runs` if xformers' attention runs forward and backward here.

    Raises:
        ImportError: it is not installed, or was built for another torch.
        NotImplementedError, RuntimeError, ValueError: it has no kernel for this.
    """
    from xformers.ops import memory_efficient_attention

    inputs = torch.randn(3, 1, TOKENS, 2, head_size, device=device, dtype=getattr(torch, dtype), requires_grad=True)
    memory_efficient_attention(inputs[0], inputs[1], inputs[2]).sum().backward()
    return "runs"


def running_kernels(head_size: int, dtype: str, device: str) -> list[str]:
    """torch's attention kernels that run forward and backward here."""
    inputs = torch.randn(3, 1, 2, TOKENS, head_size, device=device, dtype=getattr(torch, dtype), requires_grad=True)

    def backward(kernel: SDPBackend) -> bool:
        with sdpa_kernel(kernel):
            scaled_dot_product_attention(inputs[0], inputs[1], inputs[2]).sum().backward()
        return True

    return [kernel.name.lower() for kernel in KERNELS if attempt(partial(backward, kernel)) is True]


def decoder_attention(dtype: str, device: str) -> dict[str, float]:
    """Seconds and memory of the autoencoder's attention, forward and backward, as torch chooses its kernel."""
    rows, tokens = (8, 4096) if device == "cuda" else (1, TOKENS)
    inputs = torch.randn(3, rows, 1, tokens, 512, device=device, dtype=getattr(torch, dtype), requires_grad=True)

    def backward() -> None:
        scaled_dot_product_attention(inputs[0], inputs[1], inputs[2]).sum().backward()

    backward()
    peak = PeakMemory(device)
    seconds, _ = timed(backward, device)
    return {"seconds": rounded(seconds), "peak_gib": peak.gib()}


def rates(options: argparse.Namespace) -> dict[str, float]:
    """Matrix products: 10^12 operations a second in each precision, of float32 with and without TF32."""
    side = SIDES[options.device]
    found = {name: matmul_rate(options.device, getattr(torch, name), side) for name in DTYPES[:2]}
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    found["tf32"] = matmul_rate(options.device, torch.float32, side)
    torch.backends.cuda.matmul.allow_tf32 = before
    with full_float32(options.device):
        found["float32"] = matmul_rate(options.device, torch.float32, side)
    return {name: rounded(rate / 1e12) for name, rate in found.items()}


if __name__ == "__main__":
    sys.exit(main())
