"""LoRA weights and textual inversions with random values, for tiny pipelines, as diffusers and kohya save them."""

from __future__ import annotations

from pathlib import Path

import torch
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from tests.tiny_pipelines import load_reference

UNET_LAYERS = ["to_q", "to_v", "to_out.0", "proj_in"]
# Without `out_proj` diffusers does not know kohya's names of attention for old ones.
TEXT_LAYERS = ["q_proj", "out_proj", "fc1"]


def save_lora(pipeline: Path, path: Path, seed: int = 0, rank: int = 2, parts: tuple[str, ...] = ("unet",)) -> Path:
    """LoRA weights of a pipeline's folder in diffusers' format, whose products are as large as the weights."""
    torch.manual_seed(seed)
    reference, layers = load_reference(pipeline), {}
    for part in parts:
        targets = UNET_LAYERS if part == "unet" else TEXT_LAYERS
        model = getattr(reference, part)
        model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=False))
        state = get_peft_model_state_dict(model)
        layers[f"{part}_lora_layers"] = {name: torch.randn_like(value) * 0.2 for name, value in state.items()}
    type(reference).save_lora_weights(path.parent, weight_name=path.name, **layers)
    return path


def as_kohya(lora: Path, path: Path, alpha: float = 1.0, text_prefixes: tuple[str, ...] = ("lora_te_",)) -> Path:
    """The same layers by the names of kohya's scripts, with a scale of their own.

    Args:
        text_prefixes: of the text encoders.
    """
    prefixes = dict(zip(("text_encoder", "text_encoder_2"), text_prefixes, strict=False)) | {"unet": "lora_unet_"}
    tensors = {}
    for name, value in load_file(lora).items():
        layer, _, end = name.removesuffix(".weight").rpartition(".lora_" if ".lora_" in name else ".lora.")
        part, _, layer = layer.partition(".")
        if part != "unet" and not layer.startswith("text_model"):
            layer = f"text_model.{layer}"
        layer = prefixes[part] + layer.replace(".", "_")
        kind = {"A": "down", "B": "up", "linear_layer.down": "down", "linear_layer.up": "up"}.get(end, end)
        tensors[f"{layer}.lora_{kind}.weight"] = value
        tensors[f"{layer}.alpha"] = torch.tensor(alpha)
    save_file(tensors, path)
    return path


def save_embedding(path: Path, token: str, vectors: int = 1, width: int = 16, seed: int = 0) -> Path:
    """A textual inversion in diffusers' format."""
    values = torch.randn(vectors, width, generator=torch.Generator().manual_seed(seed))
    save_file({token: values if vectors > 1 else values[0]}, path)
    return path
