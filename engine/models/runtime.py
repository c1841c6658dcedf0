"""Device, precision and attention: what `runtime` means on the machine at hand."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.errors import JobError
from engine.spec import RuntimeSpec

# On a CPU a fixed number of rows in every model call makes a sample's bytes independent of its neighbours: kernels
# choose their order of summation by the shape. Big models are computed one by one there.
CPU_ROWS = 16
CPU_LATENT_ELEMENTS = 4096
# Above this image size guidance recomputes activations to save memory (`gradient_checkpointing: auto`).
CHECKPOINTING_PIXELS = 256


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a process runs its models on.

    Attributes:
        device: torch device name.
        dtype: name of the torch type of UNet and text encoder.
        attention: `sdpa` or `xformers`.
        gradient_checkpointing: `auto`, `on` or `off`.
    """

    device: str
    dtype: str
    attention: str
    gradient_checkpointing: str

    @property
    def is_cuda(self) -> bool:
        """Whether the models are on a GPU."""
        return self.device.startswith("cuda")


def hardware_problems(spec: RuntimeSpec, has_gpu: bool) -> list[str]:
    """What of `runtime` is impossible on a machine with or without a GPU; a line each."""
    problems: list[str] = []
    if spec.device == "cuda" and not has_gpu:
        problems.append("runtime.device: 'cuda' but no GPU is visible here; use auto or cpu")
    if spec.device == "cpu" or not has_gpu:
        if spec.attention == "xformers":
            problems.append("runtime.attention: 'xformers' has no kernels for a CPU; use auto or sdpa")
        if spec.precision in ("fp16", "bf16"):
            problems.append(f"runtime.precision: '{spec.precision}' saves nothing on a CPU; use auto or fp32")
    return problems


def choose_hardware(spec: RuntimeSpec) -> Hardware:
    """Settle `auto` values on this machine.

    Raises:
        JobError: what is asked for is impossible here.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    problems = hardware_problems(spec, has_gpu)
    if not problems and spec.attention == "xformers" and importlib.util.find_spec("xformers") is None:
        problems.append("runtime.attention: 'xformers' is not installed; install riskforge[xformers]")
    if problems:
        raise JobError(problems)
    on_gpu = has_gpu and spec.device != "cpu"
    dtypes = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "auto": "float16" if on_gpu else "float32"}
    return Hardware(
        device="cuda" if on_gpu else "cpu",
        dtype=dtypes[spec.precision],
        attention="sdpa" if spec.attention == "auto" else spec.attention,
        gradient_checkpointing=spec.gradient_checkpointing,
    )


@contextlib.contextmanager
def loading(address: str, kind: str) -> Iterator[None]:
    """Turn what the libraries raise on a missing, torn or foreign file into a message that names the model.

    Raises:
        JobError: in place of those errors.
    """
    import safetensors

    try:
        yield
    except JobError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, safetensors.SafetensorError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise JobError(f"'{address}' cannot be loaded as {kind} ({reason})") from error


def frozen(module: Any, device: str) -> Any:
    """A module on its device, in evaluation mode, its parameters without gradients."""
    module.requires_grad_(False)
    return module.to(device).eval()
