"""The attention of UNet and VAE: torch's own (SDPA), or xformers' kernels where they are faster."""

from __future__ import annotations

from typing import Any

from engine.errors import first_line

# Compute capabilities. From Ampere's predecessor on xformers has kernels; for Hopper and newer it brings those of
# FlashAttention 2 alone, which SDPA has too, next to newer ones of cuDNN.
TURING, HOPPER = (7, 5), (9, 0)


def automatic_attention(
    capability: tuple[int, int] | None, *, dtype: str, deterministic: bool, compiles: bool, has_xformers: bool
) -> str:
    """What `attention: auto` means: `auto` where xformers' kernels are worth a trial, else `sdpa`.

    Args:
        capability: compute capability of the GPU; None for a CPU.
        dtype: name of the torch type of the UNet.
        deterministic: whether equal batches must give equal bytes, which xformers' backward passes do not.
        compiles: whether the UNet is compiled, for which SDPA is part of the graph.
        has_xformers: whether xformers is installed.
    """
    is_faster = capability is not None and TURING <= capability < HOPPER and dtype != "float32"
    return "auto" if is_faster and has_xformers and not deterministic and not compiles else "sdpa"


def head_sizes(module: Any) -> set[int]:
    """The head dimensions of the attention layers of a diffusers model."""
    from diffusers.models.attention_processor import Attention

    return {layer.inner_dim // layer.heads for layer in module.modules() if isinstance(layer, Attention)}


def xformers_problem(sizes: set[int], dtype: str, device: str) -> str:
    """Why xformers' attention cannot run forward and backward with these head dimensions here; empty if it can."""
    import torch

    try:
        import xformers.ops

        for size in sorted(sizes):
            probe = torch.ones(1, 8, 1, size, device=device, dtype=getattr(torch, dtype), requires_grad=True)
            xformers.ops.memory_efficient_attention(probe, probe, probe).sum().backward()
    except (ImportError, OSError, RuntimeError, NotImplementedError, ValueError) as error:
        return first_line(error)
    return ""
