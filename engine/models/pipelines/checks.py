"""Checks of configurations that families of pipelines share: parts, files, adapters, VAE, text encoder, tokenizer.

A family lists what it allows; all else is refused. Of the options of a part those are let through that its own forward
pass reads, and those are not that the pipeline would have to act on. `tests/test_pipelines.py` compares samples of what
is allowed with those of diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.methods.config_values import is_integer, is_number, shown
from engine.models.configurations import PIPELINE_INDEX, part_classes, read_config
from engine.models.pipelines.parts import FEATURE_EXTRACTOR, SAFETY_CHECKER, configuration_file, has_vocabulary

# Names of parts with the classes that each may have, the plain one first.
Classes = Mapping[str, tuple[str, ...]]
# Name of an option, values that ask for nothing, what others ask for.
Options = tuple[tuple[str, tuple[Any, ...], str], ...]

IMAGE_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
# Weights next to a pipeline's own, which diffusers applies on request, and this engine never.
_ADAPTERS = re.compile(r"(pytorch_lora_weights.*|pytorch_custom_diffusion_weights.*|adapter_(config|model)\..*)")


def part_problem(folder: Path, required: Classes, optional: Classes, *, checks_safety: bool) -> str:
    """A part that is missing, of another class, without its configuration, or that nothing here would use.

    Args:
        folder: of the pipeline.
        required: parts that must be there.
        optional: parts that may be there.
        checks_safety: whether the safety checker is to be loaded, where there is one.

    Returns:
        A predicate of the pipeline; empty if there is no such part.
    """
    index = read_config(folder / PIPELINE_INDEX)
    parts, kind, known = part_classes(folder), index.get("_class_name"), {**optional, **required}
    for name in (*required, "scheduler"):
        if name not in parts:
            return f"is a {kind} without its {name}"
    for name, part_class in parts.items():
        if name == "scheduler" or (name == SAFETY_CHECKER and not checks_safety):
            continue
        if name not in known:
            return f"is a {kind} with the part {name} ({part_class}), which nothing here would use"
        if not str(index[name][0]).startswith(_LIBRARIES):
            return f"is a {kind} whose {name} is code of its own ({index[name][0]})"
        if part_class not in known[name]:
            remedy = _class_remedy(name, part_class)
            return f"is a {kind} whose {name} is of class {part_class}, not {known[name][0]}{remedy}"
    return _file_problem(folder, parts, required, checks_safety)


def _class_remedy(name: str, part_class: str) -> str:
    if name == SAFETY_CHECKER:
        return "; models.safety_checker: off leaves it out"
    if part_class == "AutoencoderTiny":
        return "; keep the pipeline's own, and name the tiny one in models.guidance_decoder"
    return ""


def _file_problem(folder: Path, parts: dict[str, str], required: Classes, checks_safety: bool) -> str:
    is_checked = checks_safety and SAFETY_CHECKER in parts
    if is_checked and FEATURE_EXTRACTOR not in parts:
        return "has a safety_checker without its feature_extractor; models.safety_checker: off leaves it out"
    # Only a safety checker, or image embeddings, need the preprocessing of images.
    unread = set() if is_checked or FEATURE_EXTRACTOR in required else {FEATURE_EXTRACTOR, SAFETY_CHECKER}
    for name in (name for name in parts if name not in unread):
        file = configuration_file(name)
        if not (folder / name / file).is_file():
            return f"has no {name}/{file}, which its index names: get the folder whole, or save the pipeline again"
    return ""


def adapter_problem(folder: Path) -> str:
    """Weights of an adapter in a pipeline's folder, as a predicate of the pipeline; empty if there are none."""
    for where in (folder, *(folder / name for name in part_classes(folder))):
        for path in sorted(where.iterdir()) if where.is_dir() else []:
            if _ADAPTERS.fullmatch(path.name):
                return (
                    f"has the weights of an adapter ({path.relative_to(folder)}), which would not be applied; move"
                    " the file elsewhere, and name LoRA weights in models.adapters"
                )
    return ""


def class_problems(part: str, config: dict[str, Any], class_name: str) -> Iterator[str]:
    """A model of diffusers whose own configuration names another class than the pipeline's index."""
    if config.get("_class_name", class_name) != class_name:
        yield f"{part}/config.json is of class {config['_class_name']}, not {class_name}"


def quantisation_problems(part: str, config: dict[str, Any]) -> Iterator[str]:
    """Quantised weights."""
    if config.get("quantization_config") is not None:
        yield f"{part}/config.json has quantization_config; only weights that are not quantised run"


def option_problems(part: str, config: dict[str, Any], options: Options) -> Iterator[str]:
    """Options of a part that ask its pipeline for what it is not given."""
    for option, known, meaning in options:
        if option in config and config[option] not in known:
            yield f"{part}/config.json has {option}: {shown(config[option])} ({meaning})"


def vae_problems(vae: dict[str, Any], *, is_shifted: bool = False) -> Iterator[str]:
    """Options of an `AutoencoderKL` that the pipeline leaves out when it decodes.

    Args:
        is_shifted: whether the pipeline adds the `shift_factor`, next to dividing by the `scaling_factor`.
    """
    factor, shift = vae.get("scaling_factor", 0.18215), vae.get("shift_factor")
    if not is_number(factor) or factor <= 0:
        yield f"vae/config.json has scaling_factor: {shown(factor)}, not a positive number"
    if is_shifted and not is_number(shift):
        yield f"vae/config.json has shift_factor: {shown(shift)}, which the pipeline adds; write a number (0 is none)"
    for option in ("shift_factor", "latents_mean", "latents_std"):
        if vae.get(option) and not (is_shifted and option == "shift_factor"):
            yield f"vae/config.json has {option}: {shown(vae[option])}, which the pipeline leaves out"
    if vae.get("out_channels", 3) != 3:
        yield f"vae/config.json has out_channels: {shown(vae['out_channels'])}; images have 3"


def size_problems(network: str, size: Any, pixels_per_latent: int) -> Iterator[str]:
    """A `sample_size` that does not give the size of an image.

    Args:
        network: name of the part that has it.
        size: its value.
        pixels_per_latent: pixels of a side for each latent.
    """
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) == 2 and all(is_integer(side) and side > 0 for side in sides):
        return
    yield (
        f"{network}/config.json has sample_size: {shown(size)}, so the size of an image is not known; write the side"
        f" of an image in pixels divided by {pixels_per_latent} there, or [height, width]"
        f" ({512 // pixels_per_latent} for images of 512 pixels)"
    )


def tokenizer_problems(folder: Path, tokenizer: str, encoder: dict[str, Any]) -> Iterator[str]:
    """A tokenizer that gives its text encoder too many tokens, or tokens of another vocabulary.

    Args:
        folder: of the pipeline.
        tokenizer: name of the part.
        encoder: configuration of the CLIP text encoder that reads the tokens.
    """
    most = encoder.get("max_position_embeddings", 77)
    limit = read_config(folder / tokenizer / "tokenizer_config.json").get("model_max_length")
    if not isinstance(limit, int | float) or not 2 < limit <= most:
        yield (
            f"{tokenizer}/tokenizer_config.json has model_max_length: {shown(limit)}; write {most} there, the tokens"
            " that the text encoder reads"
        )
    yield from vocabulary_problems(folder / tokenizer, encoder.get("vocab_size", 49408))


def vocabulary_problems(tokenizer: Path, num_embeddings: int) -> Iterator[str]:
    """A tokenizer without a vocabulary, or with tokens that its text encoder has no embedding of."""
    if not has_vocabulary(tokenizer):
        yield f"its {tokenizer.name} has no vocabulary: neither tokenizer.json nor vocab.json with merges.txt"
        return
    if (highest := max(_token_ids(tokenizer))) >= num_embeddings:
        yield (
            f"its {tokenizer.name} has tokens up to number {highest}, its text encoder embeddings of {num_embeddings}"
            " (vocab_size); they are not of one model"
        )


def _token_ids(tokenizer: Path) -> list[int]:
    """The numbers of all tokens of a tokenizer, those that were added too."""
    if (tokenizer / "tokenizer.json").is_file():
        content = read_config(tokenizer / "tokenizer.json")
        vocabulary = content["model"]["vocab"]
        # That of a unigram model is a list.
        ids = [*vocabulary.values()] if isinstance(vocabulary, dict) else [*range(len(vocabulary))]
        return ids + [token["id"] for token in content.get("added_tokens") or []]
    ids = [*read_config(tokenizer / "vocab.json").values()]
    if (tokenizer / "added_tokens.json").is_file():
        ids += read_config(tokenizer / "added_tokens.json").values()
    return ids
