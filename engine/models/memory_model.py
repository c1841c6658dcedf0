"""What a model takes of a GPU's memory for each row of a batch, measured on the meta device: no weights, no arithmetic.

A model is built again from its configuration on `meta` and run forward with a graph; what autograd keeps for the
backward pass and the largest tensor are read off. Both are proportional to the rows.

Legend: B rows, C channels, h x w size of the latents.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from engine.models.hardware import Hardware

META = "meta"
# Kernels of CUDA index with 32 bits: a tensor, or a gradient, of more elements fails or wraps around.
MAX_ELEMENTS = 2**31 - 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """What a model takes.

    Attributes:
        weight_bytes: of its parameters and buffers.
        graph_bytes: what a forward pass of one row keeps for the backward pass, without checkpointing.
        largest_elements: elements of the largest tensor of one row; gradients are as large as what they are of.
        output_elements: of the output of one row.
    """

    weight_bytes: int
    graph_bytes: int
    largest_elements: int
    output_elements: int

    def rows_below(self, elements: int) -> int:
        """Most rows whose largest tensor has at most so many elements; at least one."""
        return max(1, elements // self.largest_elements)

    def rows_within(self, num_bytes: float) -> int:
        """Rows whose graph fits into so many bytes; possibly none."""
        return int(num_bytes // self.graph_bytes)


def on_meta(model: Any, dtype: torch.dtype) -> Any:
    """A model of diffusers without weights, by its configuration; frozen, without checkpointing, in the given type."""
    with torch.device(META):
        built = type(model).from_config(model.config)
    # diffusers' own `to` warns of parts that it would load in float32; here are no weights.
    return torch.nn.Module.to(built, dtype).requires_grad_(False).eval()


def decoder_footprint(
    autoencoder: Any, latent_shape: tuple[int, ...], dtype: torch.dtype, *, is_fused: bool = True
) -> Footprint:
    """Footprint of the decoder of an `AutoencoderKL` or `AutoencoderTiny`.

    Args:
        latent_shape: C, h, w.
        dtype: of weights and activations.
        is_fused: see `measured`.
    """
    model = on_meta(autoencoder, dtype)
    latents = torch.empty(1, *latent_shape, dtype=dtype, device=META)
    # The encoder has no part in it.
    del model.encoder
    return measured(model, lambda leaf: model.decode(leaf).sample, latents, is_fused=is_fused)


def network_footprint(
    network: Any, latents: Tensor, timestep: Tensor, inputs: Mapping[str, Any], *, is_fused: bool = True
) -> Footprint:
    """Footprint of a UNet, or of another network of diffusers that denoises.

    Args:
        latents: [B, C, h, w] of a call, as are the others; a row of each gives the shapes.
        inputs: further arguments of the forward pass, by name.
        is_fused: see `measured`.
    """
    model = on_meta(network, network.dtype)
    leaf = torch.empty_like(latents[:1], device=META, memory_format=torch.contiguous_format)
    time, more = (_shapes(rows_of(value, len(latents), slice(1))) for value in (timestep, inputs))
    return measured(
        model, lambda leaf: model(leaf, timestep=time, return_dict=False, **more)[0], leaf, is_fused=is_fused
    )


def measured(model: Any, forward: Callable[[Tensor], Tensor], inputs: Tensor, *, is_fused: bool = True) -> Footprint:
    """Footprint of a forward pass on the meta device.

    Args:
        model: on `meta`; its parameters and buffers do not count as kept for the backward pass.
        forward: of `inputs`, a single row.
        is_fused: whether attention is a fused kernel, which keeps no matrix of tokens by tokens.
    """
    weights = [*model.parameters(), *model.buffers()]
    own = {_storage(tensor) for tensor in weights}
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        if _storage(tensor) not in own:
            kept[_storage(tensor)] = tensor
        return tensor

    largest = LargestTensor()
    keeping = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with torch.enable_grad(), AttentionOnMeta(is_fused=is_fused), largest, keeping:
        output = forward(inputs.detach().requires_grad_(True))
    return Footprint(
        weight_bytes=sum(tensor.numel() * tensor.element_size() for tensor in weights),
        graph_bytes=sum(tensor.untyped_storage().nbytes() for tensor in kept.values()),
        largest_elements=largest.elements,
        output_elements=output.numel(),
    )


def device_memory(hardware: Hardware) -> int:
    """Bytes of a GPU's memory that this process may use.

    With `deterministic` those of the whole GPU: what is derived from it decides bytes, which must not depend on how
    many workers share the GPU.
    """
    if hardware.memory_bytes:
        return hardware.memory_bytes
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return total if hardware.deterministic else int(total * torch.cuda.get_per_process_memory_fraction())


def rows_of(value: Any, num_rows: int, part: slice) -> Any:
    """The rows of a part of a batch: of tensors [B, ...], also in mappings; other values are of every row."""
    if isinstance(value, Mapping):
        return {name: rows_of(inner, num_rows, part) for name, inner in value.items()}
    if isinstance(value, Tensor) and value.ndim and len(value) == num_rows:
        return value[part]
    return value


class LargestTensor(TorchDispatchMode):
    """The elements of the largest tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 1

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = operator(*args, **(kwargs or {}))
        for result in results if isinstance(results, (tuple, list)) else (results,):
            if isinstance(result, Tensor):
                self.elements = max(self.elements, result.numel())
        return results


class AttentionOnMeta(TorchFunctionMode):
    """Attention of a forward pass on `meta` as a GPU computes it: torch would choose the unfused form there.

    The fused kernels keep queries, keys, values, the result and a number for each query.
    """

    def __init__(self, *, is_fused: bool) -> None:
        super().__init__()
        self._is_fused = is_fused

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if function is functional.scaled_dot_product_attention and self._is_fused:
            return fused_attention(*args, **kwargs)
        return function(*args, **kwargs)


def fused_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, **options: Any
) -> Tensor:
    """As torch's `scaled_dot_product_attention` without dropout, by a kernel that has a form for `meta`."""
    is_causal, scale = options.get("is_causal", False), options.get("scale")
    result: Tensor = torch.ops.aten._scaled_dot_product_efficient_attention(
        query, key, value, attn_mask, True, 0.0, is_causal, scale=scale
    )[0]
    return result


def _shapes(value: Any) -> Any:
    """Tensors without content on the meta device, also in mappings."""
    if isinstance(value, Mapping):
        return {name: _shapes(inner) for name, inner in value.items()}
    return torch.empty_like(value, device=META) if isinstance(value, Tensor) else value


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
