"""The peak memory of a batch by configurations alone: the calls of a step on the meta device, without weights.

What operators make and nobody has let go of is counted as it comes and goes, forward and backward. Kernels' workspaces
and the allocator's rounding are not seen.

Legend: B rows, C channels, h x w size of the latents.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from engine.methods.guidance.slices import even_slices
from engine.models.memory_model import META, fused_attention
from engine.models.pipelines.base import BareNetwork


class AliveBytes(TorchDispatchMode):
    """Counts the bytes of what operators made and nobody has let go of.

    Args:
        known: tensors that were there before, such as weights: their views are not counted.

    Attributes:
        peak: the most at any time.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.peak = self._total = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = operator(*args, **(kwargs or {}))
        for tensor in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        self.peak = max(self.peak, self._total)
        return results

    def _note(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self._alive and key not in self._known:
            self._alive[key] = size
            self._total += size
            weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self._total -= self._alive.pop(key)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepParts:
    """The models of a denoising step.

    Attributes:
        network: what denoises, with inputs of its own.
        vae: its decoder makes the stored image.
        guide: its decoder is the one that guidance differentiates; None where nothing is guided.
        slice_rows: rows that are decoded at a time; None for all.
    """

    network: BareNetwork
    vae: Any
    guide: Any = None
    slice_rows: int | None = None

    @property
    def weights(self) -> list[Tensor]:
        """Parameters and buffers, each once."""
        models = [self.network.module, self.vae, *([self.guide] if self.guide is not None else [])]
        tensors = [tensor for model in models for tensor in (*model.parameters(), *model.buffers())]
        return list({id(tensor): tensor for tensor in tensors}.values())

    @property
    def weight_bytes(self) -> int:
        """Bytes of these."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.weights)


def step_peak(
    parts: StepParts, latent_shape: tuple[int, int, int], rows: int, *, num_halves: int, through_network: bool
) -> int:
    """Bytes at the peak of a step and of the decoding of a batch, above the weights; parts are on `meta`.

    Args:
        latent_shape: C, h, w.
        rows: samples B.
        num_halves: of classifier-free guidance.
        through_network: whether guidance's gradient passes through the network.
    """
    with fused_attention_everywhere(), AliveBytes(parts.weights) as alive:
        latents = torch.empty(rows, *latent_shape, device=META)
        denoising_step(parts, latents, num_halves=num_halves, through_network=through_network)
        with torch.no_grad():
            # The first slice is the largest.
            parts.vae.decode(latents[even_slices(rows, parts.slice_rows)[0]].to(parts.vae.dtype))
    return alive.peak


def denoising_step(parts: StepParts, latents: Tensor, *, num_halves: int, through_network: bool) -> Tensor:
    """The calls of a step in the order in which guidance makes them; with real weights it holds what it counts.

    Without a graph both halves of classifier-free guidance are one call; with one they are calls of their own. Images
    are decoded and differentiated in slices, while the graph of the network is that of the whole batch.
    """
    channels = latents.shape[1]

    def predict(values: Tensor) -> Tensor:
        # A variance that was learned comes after the prediction.
        return parts.network(values)[:, :channels].float()

    if parts.guide is None or not through_network:
        with torch.no_grad():
            output = predict(torch.cat([latents] * num_halves))[: len(latents)]
        return latents - output if parts.guide is None else latents - _gradients(parts, latents - output)
    leaf = latents.detach().requires_grad_(True)
    # Without weights only its result counts: the conditional half, which keeps a graph, takes more than it meanwhile.
    is_computed = num_halves > 1 and not latents.is_meta
    with torch.no_grad():
        unconditional = predict(leaf) if is_computed else torch.zeros_like(latents)
    clean = leaf - 2 * predict(leaf) + unconditional
    (gradient,) = torch.autograd.grad(clean, leaf, _gradients(parts, clean))
    return latents - gradient


def _gradients(parts: StepParts, clean: Tensor) -> Tensor:
    """Of a mean of the images, with respect to clean latents [B, C, h, w]; slice by slice."""
    gradients: list[Tensor] = []
    for number, part in enumerate(even_slices(len(clean), parts.slice_rows)):
        if number and clean.is_meta:
            # As large as the one before: what it takes is known.
            gradients.append(torch.empty_like(clean[part]))
            continue
        leaf = clean[part].detach().to(parts.guide.dtype).requires_grad_(True)
        (gradient,) = torch.autograd.grad(parts.guide.decode(leaf).sample.float().mean(), leaf)
        gradients.append(gradient.float())
    return torch.cat(gradients)


@contextlib.contextmanager
def fused_attention_everywhere() -> Iterator[None]:
    """Attention as a GPU computes it, also where a backward pass recomputes it, which no mode of torch reaches.

    Side effects: torch's own function is replaced meanwhile, for the whole process.
    """
    own = functional.scaled_dot_product_attention
    functional.scaled_dot_product_attention = fused_attention  # type: ignore[assignment]
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = own
