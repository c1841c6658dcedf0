"""Time, memory, rates and profiles of an arm."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import PIL.Image
import torch
from torch import Tensor

from bench.arms import Arm
from bench.programs import Batch, Bench
from engine.data.images.encoding import quantise
from engine.methods.scores import kldb, risk
from engine.models.classifier import Classifier
from engine.models.pipelines.base import EMBEDDINGS, ImageConditioning

RATE_REPEATS = 10
# Parts of the names of operators and kernels, the first that is found decides.
KINDS = (
    ("attention", ("sdpa", "attention", "flash", "fmha", "softmax", "efficient")),
    ("conv", ("conv", "cudnn", "fprop", "dgrad", "wgrad", "implicit", "winograd", "mkldnn")),
    ("matmul", ("nvjet", "mm", "linear", "gemm", "matmul", "cutlass", "cublas", "einsum")),
    ("norm", ("norm", "moments", "welford")),
    (
        "copies",
        ("copy", "clone", "cat", "contiguous", "memcpy", "memset", "_to_copy", "upsample", "index", "pad", "nchw"),
    ),
    ("elementwise", ("mul", "add", "sub", "div", "silu", "gelu", "sigmoid", "exp", "pow", "sqrt", "clamp", "where")),
    ("elementwise", ("elementwise", "reduce", "sum", "mean", "fill", "triton", "relu", "neg", "foreach", "abs", "max")),
)


@dataclass(slots=True, kw_only=True)
class Measured:
    """What became of an arm.

    Attributes:
        seconds: wall clock of every repetition, over `num_samples`.
        cpu_seconds: the same of the processor, all threads and processes together.
        peak_bytes: of the GPU's memory, above what other loaded models hold; 0 on a CPU.
        score: median of KLDB, or of the risk for RiskyDiff, over the samples, on the target.
        transfer: the same on a classifier that guided nothing.
        reason: why it was not measured.
        is_broken: whether that is an error, not something that the machine lacks.
        profile: share of the time by kind of operator, and the costliest operators.
    """

    arm: Arm
    num_samples: int = 0
    batch_size: int = 0
    seconds: list[float] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    score: float | None = None
    transfer: float | None = None
    reason: str = ""
    is_broken: bool = False
    profile: dict[str, Any] = field(default_factory=dict)

    @property
    def seconds_per_image(self) -> float:
        """Of the fastest repetition: what the machine can do when nothing else is in the way."""
        return min(self.seconds) / self.num_samples

    @property
    def median_images_per_second(self) -> float:
        """Of the median repetition: what a run can count on."""
        return self.num_samples / statistics.median(self.seconds)

    @property
    def cpu_seconds_per_image(self) -> float:
        """Of the repetition that cost the processor least."""
        return min(self.cpu_seconds) / self.num_samples

    def note(self, seconds: float, cpu_seconds: float) -> None:
        """Take down a repetition."""
        self.seconds.append(seconds)
        self.cpu_seconds.append(cpu_seconds)

    def as_json(self) -> dict[str, Any]:
        """For the file of results."""
        found = {
            **dataclasses.asdict(self.arm),
            **{name: getattr(self, name) for name in self.__slots__ if name != "arm"},
        }
        if self.seconds:
            found |= {"seconds_per_image": self.seconds_per_image, "images_per_second": 1 / self.seconds_per_image}
            found |= {"cpu_seconds_per_image": self.cpu_seconds_per_image}
            found |= {"median_images_per_second": self.median_images_per_second}
        return found


def make(bench: Bench, arm: Arm, batch: Batch, batch_size: int) -> Tensor:
    """The images of an arm, batch by batch, on the CPU."""
    starts = range(0, len(batch), batch_size)
    made = [bench.images(arm, batch.part(start, start + batch_size)) for start in starts]
    return torch.cat([images.detach().float().cpu() for images in made])


def timed(call: Callable[[], Any], device: str) -> tuple[float, float]:
    """Seconds of a call to the end of what it started on the device, by the clock and of this process's processor."""
    synchronise(device)
    started, cpu_started = time.perf_counter(), time.process_time()
    call()
    synchronise(device)
    return time.perf_counter() - started, time.process_time() - cpu_started


def synchronise(device: str) -> None:
    """Wait for a GPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def warm_up(bench: Bench, measured: Measured, batch: Batch) -> None:
    """Load the models of an arm, and make its images once on a GPU, which compiles; notes the memory of the models."""
    before = _allocated(bench.device)
    bench.load(measured.arm)
    if bench.device == "cuda":
        make(bench, measured.arm, batch, measured.batch_size)
    loaded = _allocated(bench.device) - before
    # The published loops use the network that diffusers' pipeline has loaded.
    shared = bench.weights.get("plain", 0) if measured.arm.program == "published" else 0
    bench.weights.setdefault(measured.arm.program, loaded + shared)


def repeat(bench: Bench, measured: Measured, batch: Batch) -> None:
    """Time one more repetition of an arm, and its peak memory; the images of the first one are scored."""
    base = _allocated(bench.device)
    if bench.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    made: list[Tensor] = []
    taken = timed(lambda: made.append(make(bench, measured.arm, batch, measured.batch_size)), bench.device)
    if bench.device == "cuda":
        own = torch.cuda.max_memory_allocated() - base + bench.weights[measured.arm.program]
        measured.peak_bytes = max(measured.peak_bytes, own)
    if not measured.seconds:
        score(bench, measured, batch, made[0])
    measured.note(*taken)


def _allocated(device: str) -> int:
    return int(torch.cuda.memory_allocated()) if device == "cuda" else 0


def score(bench: Bench, measured: Measured, batch: Batch, images: Tensor) -> None:
    """Medians over the 8-bit images, on the target and on a classifier that guided nothing."""
    shown = [PIL.Image.fromarray(pixels) for pixels in quantise(images)]
    measured.score = statistics.median(scores_of(bench, bench.target, batch, shown))
    if bench.transfer is not None:
        measured.transfer = statistics.median(scores_of(bench, bench.transfer, batch, shown))


def scores_of(bench: Bench, classifier: Classifier, batch: Batch, images: Sequence[PIL.Image.Image]) -> list[float]:
    """KLDB of every image, or its risk for RiskyDiff."""
    logits = classifier.score(images)
    if bench.family == "boundary":
        found = kldb(logits, batch.specs[0].cell.classes)
    else:
        found = risk(logits, torch.tensor([spec.cell.classes[0] for spec in batch.specs]))
    return [float(one) for one in found]


def matmul_rate(device: str, dtype: torch.dtype, side: int = 8192) -> float:
    """Operations a second of a product of two random square matrices: the best of some."""
    first, second = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    first @ second
    best = min(timed(lambda: first @ second, device)[0] for _ in range(RATE_REPEATS))
    return 2 * side**3 / best


@torch.no_grad()
def unet_rate(bench: Bench, batch: Batch, unet_operations: int) -> float:
    """Operations a second of the UNet in a step without guidance, both halves of classifier-free guidance."""
    sampler = bench.diffusion.sampler(bench.job.sampling)
    images, noise = None, bench.diffusion.draw_noise(batch.seeds)
    if EMBEDDINGS in noise:
        images = ImageConditioning(embeds=torch.zeros_like(noise[EMBEDDINGS]), noise=noise, noise_level=0)
    prompts = [spec.prompt for spec in batch.specs]
    denoiser = bench.diffusion.denoiser(prompts, bench.job.sampling, sampler, images)
    latents = torch.randn(len(batch), *bench.diffusion.latent_shape, device=bench.device)
    step = next(iter(sampler.steps()))
    for _ in range(3):
        denoiser(latents, step)
    best = min(timed(lambda: denoiser(latents, step), bench.device)[0] for _ in range(RATE_REPEATS))
    return 2 * len(batch) * unet_operations / best


def profile(bench: Bench, arm: Arm, batch: Batch, top: int = 12) -> dict[str, Any]:
    """Where the time of a batch goes: seconds by kind of operator, and the costliest operators, by their own time."""
    from torch.profiler import ProfilerActivity

    on_gpu = bench.device == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with torch.profiler.profile(activities=activities) as profiler:
        make(bench, arm, batch, len(batch))
        synchronise(bench.device)
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = profiler.key_averages()
    if on_gpu:
        # An operator and the kernels that it launches carry the same time: count the kernels.
        events = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    found = [(event.key, getattr(event, own) / 1e6, event.count) for event in events]
    kinds: dict[str, float] = defaultdict(float)
    for name, seconds, _ in found:
        kinds[kind_of(name)] += seconds
    total = sum(kinds.values()) or 1.0
    found.sort(key=lambda one: -one[1])
    return {
        "seconds": total,
        "shares": {kind: seconds / total for kind, seconds in sorted(kinds.items(), key=lambda one: -one[1])},
        "top": [{"name": name, "seconds": seconds, "calls": calls} for name, seconds, calls in found[:top]],
    }


def kind_of(name: str) -> str:
    """What an operator or kernel is for, by its name."""
    lower = name.lower()
    return next((kind for kind, parts in KINDS if any(part in lower for part in parts)), "other")
