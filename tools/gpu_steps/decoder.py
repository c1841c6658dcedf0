"""The decoder's gradient at the size of Stable Diffusion 1.x: seconds, memory and direction, by batch and precision.

First by the engine, which decodes in slices: a boundary gradient at the detached prediction, its decoder in float32 and
in bfloat16, and the cosine between the two. Weights are random, so the cosine is that of rounding in this architecture,
not of a trained decoder. Then the autoencoder alone, all rows at once, to record where that fails and how.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from bench.arms import Arm
from bench.measure import timed
from bench.programs import Bench
from bench.sizes import Setting, random_setting
from diffusers import AutoencoderKL
from torch import Tensor
from torch.nn.functional import cosine_similarity

from engine.models.addresses import resolve
from engine.models.configurations import read_config
from gpu_steps.common import Figures, PeakMemory, attempt, exit_code, parser, rounded

ARM = Arm(name="kldb", family="boundary", guidance={"preset": "adversarial", "every": 1})
PRECISIONS = ("float32", "bfloat16")
BATCHES = {"sd1": (8, 16, 32, 64), "tiny": (2, 4)}
# 33 rows are the first whose upsampled activations no 32-bit index reaches.
WHOLE_BATCHES = {"sd1": (8, 31, 32, 33, 64), "tiny": (2, 4)}
# A step in the middle of the trajectory, where guidance matters most.
PLACE = {"sd1": 20, "tiny": 3}


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    given = parser(__doc__).parse_args(arguments)
    figures = Figures(given.output)
    setting = random_setting(given.size, given.models, given.device)
    failures = list[str]()
    exact: dict[int, Tensor] = {}
    opened = cache(partial(open_bench, setting, given.device, max(BATCHES[given.size])))
    for precision in PRECISIONS:
        for rows in BATCHES[given.size]:
            name = f"engine {precision} {rows}"
            found = attempt(partial(engine_gradient, opened, rows, PLACE[given.size], precision, exact))
            figures.note(name, found)
            failures += [f"{name}: {found}"] * isinstance(found, str)
            release()
    exact.clear()
    for layout in ("channels_last", "contiguous_format"):
        whole = WholeDecoder(setting, given.device, getattr(torch, layout))
        for rows in WHOLE_BATCHES[given.size]:
            figures.note(f"all rows at once, {layout} {rows}", attempt(partial(whole.gradient, rows)))
            release()
    return exit_code(failures)


def release() -> None:
    """Give memory back that nothing refers to."""
    gc.collect()
    torch.cuda.empty_cache()


def open_bench(setting: Setting, device: str, most: int) -> Bench:
    """The engine's parts, as `auto` has them on this device."""
    return Bench(setting, [ARM], device=device, num_samples=most)


def engine_gradient(
    opened: Callable[[], Bench], rows: int, place: int, precision: str, exact: dict[int, Tensor]
) -> dict[str, Any]:
    """Figures of one gradient by the engine.

    Args:
        opened: the engine's parts, always the same.
        exact: gradients by rows; takes those of the first precision, with which others are compared.
    """
    bench = opened()
    compute = bench.gradients(ARM, bench.batch(rows), place, precision)
    found, made = measured(compute, rows, bench.device)
    (gradients,) = made.float().cpu()
    cosines = cosine_similarity(gradients.flatten(1), exact.setdefault(rows, gradients).flatten(1))
    finite = torch.isfinite(gradients).flatten(1).all(1)
    return found | {
        "finite_samples": int(finite.sum()),
        "median_cosine": rounded(float(cosines.median())),
        "least_cosine": rounded(float(cosines.min())),
    }


def measured(compute: Callable[[], Tensor], rows: int, device: str) -> tuple[dict[str, float], Tensor]:
    """Seconds and memory of a call, and what the one before it, which warms up, returned."""
    made = compute()
    peak = PeakMemory(device)
    seconds, _ = timed(compute, device)
    return {"seconds": rounded(seconds), "seconds_a_sample": rounded(seconds / rows), "peak_gib": peak.gib()}, made


class WholeDecoder:
    """The autoencoder's decoder as diffusers has it, in float32, differentiated with all rows in one call."""

    def __init__(self, setting: Setting, device: str, layout: torch.memory_format) -> None:
        folder = resolve(setting.diffusion) / "vae"
        vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32).requires_grad_(False)
        self._vae = vae.to(device).to(memory_format=layout)
        # Only with recomputation a batch of 32 fits the memory, and reaches the limits of the kernels.
        self._vae.enable_gradient_checkpointing()
        self._side = read_config(resolve(setting.diffusion) / "unet" / "config.json")["sample_size"]
        self._device = device

    def gradient(self, rows: int) -> dict[str, float]:
        """Figures of the gradient of the images' mean in the latents.

        Raises:
            RuntimeError: memory or a kernel does not hold so many rows.
        """
        shape = (rows, self._vae.config.latent_channels, self._side, self._side)
        latents = torch.randn(shape, device=self._device, requires_grad=True)

        def compute() -> Tensor:
            return torch.autograd.grad(self._vae.decode(latents).sample.mean(), latents)[0]

        found, gradient = measured(compute, rows, self._device)
        return found | {"finite_samples": int(torch.isfinite(gradient).flatten(1).all(1).sum())}


if __name__ == "__main__":
    sys.exit(main())
