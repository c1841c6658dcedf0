"""Stable Diffusion XL and what is distilled from it: two text encoders, and the sizes of the image as an input.

The hidden states of both encoders, of the layer before the last, are side by side; the pooled embedding of the second
goes with six numbers (original size, corner of the crop, target size) into the embedding of the timestep.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from engine.methods.config_values import is_integer, shown
from engine.models.configurations import PIPELINE_INDEX, read_config
from engine.models.hardware import Hardware
from engine.models.loading import frozen
from engine.models.pipelines.base import ImageConditioning
from engine.models.pipelines.checks import IMAGE_PROCESSORS, Classes, Options, tokenizer_problems
from engine.models.pipelines.parts import FEATURE_EXTRACTOR, load_part, text_config
from engine.models.pipelines.registry import what_runs
from engine.models.pipelines.stable_diffusion import IMAGE_ENCODERS, TEXT, StableDiffusion

if TYPE_CHECKING:
    from torch import Tensor

    from engine.methods.sampling.denoiser import Condition
    from engine.models.pipelines.prompts import PromptEncoder

# Inputs of the UNet next to the hidden states, as diffusers names them.
POOLED, SIZES = "text_embeds", "time_ids"
NUM_SIZES = 6
_ZEROS = "force_zeros_for_empty_prompt"


class StableDiffusionXL(StableDiffusion):
    """Pipelines of diffusers' class `StableDiffusionXLPipeline`."""

    class_name = "StableDiffusionXLPipeline"
    lora_prefixes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "unet": ("unet.", "lora_unet_"),
        "text_encoder": ("text_encoder.", "lora_te1_"),
        "text_encoder_2": ("text_encoder_2.", "lora_te2_"),
    }
    # A word would need a vector of each encoder.
    embedding_encoder = ""
    is_corrected = False
    required: ClassVar[Classes] = {
        **StableDiffusion.required,
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    }
    # Asked by IP-adapters alone, whose UNet is refused.
    optional: ClassVar[Classes] = {"image_encoder": IMAGE_ENCODERS, FEATURE_EXTRACTOR: IMAGE_PROCESSORS}
    unet_options: ClassVar[Options] = (
        ("addition_embed_type", ("text_time",), "it takes no pooled embedding, as Stable Diffusion XL does"),
        *(option for option in StableDiffusion.unet_options if option[0] != "addition_embed_type"),
    )

    def __init__(self, *, text_encoder_2: Any, tokenizer_2: Any, zeroes_empty: bool, **parts: Any) -> None:
        super().__init__(**parts)
        self._second_prompts = self.prompt_encoder(frozen(text_encoder_2, self.hardware.device), tokenizer_2)
        self._zeroes_empty = zeroes_empty

    def prompt_encoder(self, encoder: Any, tokenizer: Any) -> PromptEncoder:
        """Hidden states [1, tokens, width] before the last layer, and of the second encoder the pooled embedding.

        As in diffusers' pipeline padding is not masked, whatever the configuration says.
        """
        from engine.models.pipelines.prompts import PromptEncoder

        def embed(tokens: Tensor, _mask: Tensor | None) -> dict[str, Tensor]:
            output = encoder(tokens, output_hidden_states=True)
            pooled = {POOLED: output[0]} if output[0].ndim == 2 else {}
            return {TEXT: output.hidden_states[-2], **pooled}

        return PromptEncoder(tokenizer, embed, device=self.hardware.device)

    @classmethod
    def text_problems(cls, folder: Path, unet: dict[str, Any]) -> Iterator[str]:
        """Text encoders, tokenizers and UNet that do not fit together."""
        encoders = {name: text_config(folder / name) for name in ("text_encoder", "text_encoder_2")}
        for name, encoder in encoders.items():
            if (kind := encoder.get("model_type", "clip_text_model")) not in ("clip_text_model", "clip"):
                yield f"{name}/config.json is of type {shown(kind)}, not of CLIP; {what_runs()}"
                return
        yield from _width_problems(unet, *encoders.values())
        tokenizers = ("tokenizer", "tokenizer_2")
        for tokenizer, encoder in zip(tokenizers, encoders.values(), strict=True):
            yield from tokenizer_problems(folder, tokenizer, encoder)
        limits = [read_config(folder / name / "tokenizer_config.json").get("model_max_length") for name in tokenizers]
        if limits[0] != limits[1]:
            yield (
                f"tokenizer_2/tokenizer_config.json has model_max_length: {shown(limits[1])}, that of tokenizer is"
                f" {shown(limits[0])}; their embeddings are put side by side, so make both the same"
            )
        zeros = read_config(folder / PIPELINE_INDEX).get(_ZEROS, True)
        if not isinstance(zeros, bool):
            yield f"model_index.json has {_ZEROS}: {shown(zeros)}, not true or false"

    @classmethod
    def load_parts(cls, folder: Path, hardware: Hardware, *, checks_safety: bool) -> dict[str, Any]:
        """The arguments of the constructor, from a folder."""
        import torch
        from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection
        from transformers.models.clip.tokenization_clip import CLIPTokenizer

        dtype = getattr(torch, hardware.dtype)
        return super().load_parts(folder, hardware, checks_safety=checks_safety) | {
            "text_encoder_2": load_part(CLIPTextModelWithProjection, folder / "text_encoder_2", dtype=dtype),
            "tokenizer_2": CLIPTokenizer.from_pretrained(folder / "tokenizer_2", local_files_only=True),
            "zeroes_empty": read_config(folder / PIPELINE_INDEX).get(_ZEROS, True),
        }

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that are too long for one of the encoders; see `Pipeline.check_prompts`."""
        for encoder in (self.prompts, self._second_prompts):
            encoder.check(prompts)

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Text embeddings [B, tokens, width + width 2], pooled ones [B, d], and the sizes of the image [B, 6]."""
        import torch

        from engine.methods.sampling.denoiser import Condition

        first, second = self.prompts.encode(prompts), self._second_prompts.encode(prompts)
        text = torch.cat([first[TEXT], second[TEXT]], dim=-1)
        _, height, width = self.image_shape
        sizes = torch.tensor([height, width, 0, 0, height, width], dtype=text.dtype, device=text.device)
        return Condition({TEXT: text, POOLED: second[POOLED], SIZES: sizes.expand(len(prompts), NUM_SIZES)})

    def conditions(
        self, prompts: Sequence[str], negative_prompt: str, images: ImageConditioning | None
    ) -> tuple[Condition, Condition]:
        """Without a negative prompt the unconditional half has embeddings of zeros, where the pipeline says so."""
        import torch

        from engine.methods.sampling.denoiser import Condition

        conditional, unconditional = super().conditions(prompts, negative_prompt, images)
        if not negative_prompt and self._zeroes_empty:
            zeros = {name: torch.zeros_like(unconditional[name]) for name in (TEXT, POOLED)}
            unconditional = Condition({**unconditional.tensors, **zeros})
        return conditional, unconditional

    @classmethod
    def network_arguments(cls, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """Pooled embedding and sizes in a mapping of their own."""
        added = {name: inputs[name] for name in (POOLED, SIZES)}
        return {**{name: tensor for name, tensor in inputs.items() if name not in added}, "added_cond_kwargs": added}

    @classmethod
    def input_shapes(cls, folder: Path, unet: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """As of Stable Diffusion, with the second encoder; see `StableDiffusion.input_shapes`."""
        [(tokens, width)] = super().input_shapes(folder, unet).values()
        second = text_config(folder / "text_encoder_2")
        text = (tokens, width + second.get("hidden_size", 512))
        return {TEXT: text, POOLED: (second.get("projection_dim", 512),), SIZES: (NUM_SIZES,)}


def _width_problems(unet: dict[str, Any], first: dict[str, Any], second: dict[str, Any]) -> Iterator[str]:
    """Embeddings of the text encoders that the UNet does not read."""
    width, asked = first.get("hidden_size", 512) + second.get("hidden_size", 512), unet.get("cross_attention_dim", 1280)
    if unet.get("encoder_hid_dim") is not None:
        asked = unet["encoder_hid_dim"]
    if any(entries != width for entries in (asked if isinstance(asked, list) else [asked])):
        yield (
            f"unet/config.json has cross_attention_dim: {shown(asked)}, the embeddings of the text encoders have"
            f" {shown(width)} entries; its parts are not of one model"
        )
    entries, pooled = unet.get("addition_time_embed_dim"), second.get("projection_dim", 512)
    if not is_integer(entries) or entries < 2:
        yield f"unet/config.json has addition_time_embed_dim: {shown(entries)}, not the entries of an embedding"
        return
    read = unet.get("projection_class_embeddings_input_dim")
    if read != NUM_SIZES * entries + pooled:
        kind = " (as the refiner does)" if read == (NUM_SIZES - 1) * entries + pooled else ""
        yield (
            f"unet/config.json has projection_class_embeddings_input_dim: {shown(read)}{kind}, the pooled embedding of"
            f" text_encoder_2 and six sizes have {pooled} + {NUM_SIZES} * {entries} entries; its parts are not of one"
            " model"
        )
