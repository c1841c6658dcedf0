"""Tests that need a GPU. Without one they skip themselves.

With RISKFORGE_GPU_REHEARSAL=1 those that do not need CUDA itself run on a CPU instead, at the smallest size: they show
that nothing in a test breaks, not that a GPU computes what it should.
"""

from __future__ import annotations

import os

import pytest

# Read when cuBLAS is opened; the deterministic mode insists on it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


IS_REHEARSAL = bool(os.environ.get("RISKFORGE_GPU_REHEARSAL"))


@pytest.fixture(scope="session", autouse=True)
def device():
    """`cuda`, or `cpu` in a rehearsal."""
    import torch

    if IS_REHEARSAL:
        return "cpu"
    if not torch.cuda.is_available():
        pytest.skip("no CUDA GPU is visible to torch here")
    return "cuda"


@pytest.fixture(scope="session")
def gpu(device):
    """The name of the GPU, for tests that make no sense without one."""
    import torch

    if device == "cpu":
        pytest.skip("a rehearsal without a GPU")
    return torch.cuda.get_device_name()


@pytest.fixture(scope="session")
def random_models(device, tmp_path_factory):
    """Models of Stable Diffusion 1.x' size with random weights; the tiny ones in a rehearsal."""
    from bench.sizes import random_setting

    return random_setting("tiny" if device == "cpu" else "sd1", tmp_path_factory.mktemp("models"), device)


@pytest.fixture
def restored_kernels():
    """torch's settings after a generator with `deterministic: true`, which owns them in a worker's process."""
    import torch

    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32
    filled = torch.utils.deterministic.fill_uninitialized_memory
    products, efficient, fused = cuda.matmul.allow_tf32, cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()
    yield
    torch.use_deterministic_algorithms(before[0])
    torch.utils.deterministic.fill_uninitialized_memory = filled
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = before[1:]
    cuda.matmul.allow_tf32 = products
    cuda.enable_mem_efficient_sdp(efficient)
    cuda.enable_cudnn_sdp(fused)


@pytest.fixture(scope="session")
def xformers_problem(gpu):
    """Why xformers' kernels cannot be used on this GPU; empty where they can."""
    import torch

    try:
        from xformers.ops import memory_efficient_attention

        queries = torch.randn(1, 64, 4, 32, device="cuda", dtype=torch.float16, requires_grad=True)
        memory_efficient_attention(queries, queries, queries).sum().backward()
    except ImportError:
        return "xformers is not installed here"
    except (NotImplementedError, RuntimeError) as error:
        return f"xformers has no kernels for {gpu} with torch {torch.__version__}: {str(error).splitlines()[0]}"
    return ""


@pytest.fixture(scope="session")
def xformers(xformers_problem):
    """A test that needs xformers' kernels."""
    if xformers_problem:
        pytest.skip(xformers_problem)
