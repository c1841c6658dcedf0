"""Tests that need a GPU. Without one they skip themselves."""

from __future__ import annotations

import os

import pytest

# Read when cuBLAS is opened; the deterministic mode insists on it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.fixture(scope="session", autouse=True)
def gpu():
    """The name of the GPU."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU is visible to torch here")
    return torch.cuda.get_device_name()


@pytest.fixture
def restored_kernels():
    """torch's settings after a generator with `deterministic: true`, which owns them in a worker's process."""
    import torch

    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
    products, efficient, fused = cuda.matmul.allow_tf32, cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()
    yield
    torch.use_deterministic_algorithms(before[0])
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = before[1:]
    cuda.matmul.allow_tf32 = products
    cuda.enable_mem_efficient_sdp(efficient)
    cuda.enable_cudnn_sdp(fused)


@pytest.fixture(scope="session")
def xformers(gpu):
    """xformers' kernels, tried once on this GPU."""
    import torch

    ops = pytest.importorskip("xformers.ops", reason="xformers is not installed here", exc_type=ImportError)
    queries = torch.randn(1, 64, 4, 32, device="cuda", dtype=torch.float16, requires_grad=True)
    try:
        ops.memory_efficient_attention(queries, queries, queries).sum().backward()
    except (NotImplementedError, RuntimeError) as error:
        pytest.skip(f"xformers has no kernels for {gpu} with torch {torch.__version__}: {str(error).splitlines()[0]}")
    return ops
