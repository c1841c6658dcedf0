"""LoRA weights and textual inversions, applied to the parts of a pipeline as diffusers applies them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors.torch import load_file

from engine.errors import JobError
from engine.job.spec import AdapterSpec
from engine.models.adapters import adapter_file, embedding_of, lora_pairs
from engine.models.configurations import part_classes
from engine.models.pipelines.base import Pipeline
from engine.models.stored_tensors import tensors_in


def apply_adapters(
    family: type[Pipeline], folder: Path, parts: Mapping[str, Any], adapters: Sequence[AdapterSpec]
) -> None:
    """Change parts of a pipeline by adapters that `adapter_problems` lets through.

    The sum of all LoRA products is added to the weights (diffusers' `fuse_lora`), in their precision: sampling takes no
    longer than without, and nothing behind it knows of adapters.

    Args:
        folder: of the pipeline.
        parts: loaded, by their names, the network as `network`.

    Raises:
        JobError: values that are not finite, or layers that diffusers did not find.

    Side effects: words are added to the tokenizer, embeddings and LoRA products to the weights of parts.
    """
    pipeline, scales = _assembled(family, folder, parts), dict[str, float]()
    for number, adapter in enumerate(adapters):
        path = adapter_file(adapter.address)
        header, where = tensors_in(path), f"models.adapters.{number}: '{adapter.address}'"
        tensors = load_file(path)
        if broken := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
            raise JobError(f"{where} has values in {broken[0]} that are not finite; get the file again")
        if embedding := embedding_of(header, adapter.token):
            # Diffusers takes a word that is given for a change of the file's, with the same result.
            pipeline.load_textual_inversion({embedding.token: tensors[embedding.name]})
            continue
        name = f"adapter_{number}"
        pipeline.load_lora_weights(tensors, adapter_name=name)
        _check_layers(pipeline, family, name, len(lora_pairs(header)[0]), where)
        scales[name] = adapter.weight
    if scales:
        pipeline.set_adapters(list(scales), list(scales.values()))
        pipeline.fuse_lora(adapter_names=list(scales))
        pipeline.unload_lora_weights()


def _assembled(family: type[Pipeline], folder: Path, parts: Mapping[str, Any]) -> Any:
    """The parts in diffusers' own pipeline, which has the loaders; it is not called."""
    loaded = {name: parts.get(name) for name in part_classes(folder) if name != "scheduler"}
    loaded[family.trained_part or next(iter(family.lora_prefixes))] = parts["network"]
    return getattr(diffusers, family.class_name).from_pretrained(folder, local_files_only=True, **loaded)


def _check_layers(pipeline: Any, family: type[Pipeline], name: str, wanted: int, where: str) -> None:
    """Check that as many layers have the adapter as its file has pairs: diffusers only warns of others."""
    models = [getattr(pipeline, part) for part in family.lora_prefixes]
    modules = [module for model in models if isinstance(model, torch.nn.Module) for module in model.modules()]
    found = sum(name in getattr(module, "lora_A", ()) for module in modules)
    if found != wanted:
        raise JobError(
            f"{where} has {wanted} layers, of which the pipeline takes {found}; it was made for another model"
        )
