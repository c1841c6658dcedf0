"""Device, precision and attention: what the job's `runtime` means on this machine."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass

from engine.errors import JobError
from engine.job.spec import RuntimeSpec
from engine.models.attention import automatic_attention
from engine.models.gpu_sharing import GpuShare, gpu_share

# On a CPU a fixed number of rows makes a sample's bytes independent of its neighbours: kernels choose their order of
# summation by the shape. Fewer rows where they show no difference: see `engine.generation.row_shapes`. Large models
# compute samples one by one there.
CPU_ROWS = 16
CPU_LATENT_PIXELS = 1024
# Above this image size guidance recomputes activations on a CPU to save memory (`gradient_checkpointing: auto`).
CHECKPOINTING_PIXELS = 256
# Samples of a batch that memory is planned for where the job says `batch_size: auto`.
PLANNED_ROWS = 16
# Names of torch types.
DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a process runs its models on.

    Attributes:
        device: torch device name.
        dtype: name of the torch type of UNet and text encoder.
        attention: `sdpa`, `xformers`, or `auto`: xformers where it has kernels for the model.
        gradient_checkpointing: `auto`, `on` or `off`.
        channels_last: whether UNet and VAE keep their tensors in that layout.
        compile: whether the UNet is compiled for calls without gradient.
        deterministic: whether equal batches must give equal bytes on a GPU.
        memory_share: part of the GPU's memory that this worker may use; others share the GPU.
        decoder_precision: of the decoder that guidance differentiates: the name of a torch type, or `auto`.
        batch_size: samples of a batch that memory is planned for.
        memory_bytes: that this process may use of the device; 0 asks the device.
    """

    device: str
    dtype: str
    attention: str
    gradient_checkpointing: str
    channels_last: bool = False
    compile: bool = False
    deterministic: bool = False
    memory_share: float = 1.0
    decoder_precision: str = "auto"
    batch_size: int = PLANNED_ROWS
    memory_bytes: int = 0

    @property
    def is_cpu(self) -> bool:
        """Whether the models are on a CPU, where the rows of a call decide bytes; `meta` is treated as a GPU."""
        return self.device == "cpu"

    @property
    def is_cuda(self) -> bool:
        """Whether the models are on a GPU."""
        return self.device.startswith("cuda")


def hardware_problems(spec: RuntimeSpec, has_gpu: bool) -> list[str]:
    """Which values of `runtime` are impossible on a machine with or without a GPU; one line each."""
    problems: list[str] = []
    if spec.device == "cuda" and not has_gpu:
        problems.append("runtime.device: 'cuda' but no GPU is visible here; use auto or cpu")
    if spec.device == "cpu" or not has_gpu:
        if spec.attention == "xformers":
            problems.append("runtime.attention: 'xformers' has no kernels for a CPU; use auto or sdpa")
        if spec.precision in ("fp16", "bf16"):
            problems.append(f"runtime.precision: '{spec.precision}' saves nothing on a CPU; use auto or fp32")
        if spec.decoder_precision in ("fp16", "bf16"):
            problems.append(
                f"runtime.decoder_precision: '{spec.decoder_precision}' saves nothing on a CPU; use auto or fp32"
            )
    return problems + (_determinism_problems(spec, has_gpu and spec.device != "cpu") if spec.deterministic else [])


def _determinism_problems(spec: RuntimeSpec, on_gpu: bool) -> list[str]:
    problems: list[str] = []
    if on_gpu and spec.batch_size == "auto":
        problems.append(
            "runtime.batch_size: 'auto' depends on free memory, and rounding makes pixels depend on the batch size;"
            " with deterministic give a number, such as 32"
        )
    if spec.compile == "on":
        problems.append("runtime.compile: 'on' generates other kernels on other machines; with deterministic use off")
    if on_gpu and spec.attention == "xformers":
        problems.append("runtime.attention: 'xformers' has no deterministic backward pass; with deterministic use sdpa")
    return problems


def _sharing_problems(spec: RuntimeSpec, share: GpuShare) -> list[str]:
    """What is impossible where other workers are in this worker's process, on the same GPU."""
    if spec.deterministic and share.memory < 1 and not share.owns_process:
        return [
            f"runtime.workers: {round(1 / share.memory)} threads of one process share the GPU, and torch's settings, so"
            " that bytes would depend on what the others do; with deterministic use 1, or --executor ray"
        ]
    return []


def choose_hardware(spec: RuntimeSpec) -> Hardware:
    """The hardware that `runtime` asks for, with `auto` resolved on this machine.

    Raises:
        JobError: a value is impossible here.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    on_gpu, share = has_gpu and spec.device != "cpu", gpu_share()
    problems = hardware_problems(spec, has_gpu) + (_sharing_problems(spec, share) if on_gpu else [])
    has_xformers = importlib.util.find_spec("xformers") is not None
    if not problems and spec.attention == "xformers" and not has_xformers:
        problems.append("runtime.attention: 'xformers' is not installed; install riskforge[xformers]")
    if problems:
        raise JobError(problems)
    is_half = spec.precision != "fp32"
    dtypes = DTYPES | {"auto": "float16" if on_gpu else "float32"}
    attention: str = spec.attention
    if attention == "auto":
        attention = automatic_attention(
            torch.cuda.get_device_capability() if on_gpu else None,
            dtype=dtypes[spec.precision],
            deterministic=spec.deterministic,
            compiles=spec.compile == "on",
            has_xformers=has_xformers,
        )
    return Hardware(
        device="cuda" if on_gpu else "cpu",
        dtype=dtypes[spec.precision],
        attention=attention,
        gradient_checkpointing=spec.gradient_checkpointing,
        channels_last=spec.channels_last == "on" or (spec.channels_last == "auto" and on_gpu and is_half),
        # `auto` is off: compiled kernels differ from machine to machine, and with them the bytes.
        compile=spec.compile == "on",
        deterministic=spec.deterministic,
        memory_share=share.memory,
        decoder_precision=DTYPES.get(spec.decoder_precision, "auto"),
        batch_size=PLANNED_ROWS if spec.batch_size == "auto" else spec.batch_size,
    )


def fix_threads(hardware: Hardware) -> None:
    """Let this process compute with one thread where its models are on a CPU.

    The order of summation depends on the number of threads. There are as many workers as cores, so no core is idle.

    Side effects: torch's global setting.
    """
    import torch

    if not hardware.is_cuda:
        torch.set_num_threads(1)
