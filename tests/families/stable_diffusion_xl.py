"""A third family, as somebody would add it: Stable Diffusion XL in one file. `tests/test_families.py` installs it.

It has a second text encoder, whose pooled embedding goes with the sizes of the image into the embedding of the
timestep. Negative prompts that are empty are encoded; diffusers takes zeros for them where none is given.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from engine.methods.config_values import shown
from engine.models.hardware import Hardware
from engine.models.loading import frozen
from engine.models.pipelines.checks import Classes, Options, tokenizer_problems
from engine.models.pipelines.parts import load_part
from engine.models.pipelines.registry import what_runs
from engine.models.pipelines.stable_diffusion import TEXT, StableDiffusion, text_config

if TYPE_CHECKING:
    from torch import Tensor

    from engine.methods.sampling.denoiser import Condition


class StableDiffusionXL(StableDiffusion):
    """Pipelines of diffusers' class `StableDiffusionXLPipeline`."""

    class_name = "StableDiffusionXLPipeline"
    is_corrected = False
    required: ClassVar[Classes] = {
        **StableDiffusion.required,
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
    }
    unet_options: ClassVar[Options] = (
        ("addition_embed_type", ("text_time",), "it takes no second text embedding"),
        *(option for option in StableDiffusion.unet_options if option[0] != "addition_embed_type"),
    )

    def __init__(self, *, text_encoder_2: Any, tokenizer_2: Any, **parts: Any) -> None:
        from engine.models.pipelines.prompts import PromptEncoder

        super().__init__(**parts)
        self._prompt_encoders = [
            PromptEncoder(tokenizer, _hidden_and_pooled(encoder), device=self.hardware.device)
            for encoder, tokenizer in (
                (parts["text_encoder"], parts["tokenizer"]),
                (frozen(text_encoder_2, self.hardware.device), tokenizer_2),
            )
        ]

    @classmethod
    def text_problems(cls, folder: Path, unet: dict[str, Any]) -> Iterator[str]:
        """Text encoders, tokenizers and UNet that do not fit together."""
        first, second = text_config(folder / "text_encoder"), text_config(folder / "text_encoder_2")
        width, asked = first.get("hidden_size", 512) + second.get("hidden_size", 512), unet.get("cross_attention_dim")
        if asked != width:
            yield (
                f"unet/config.json has cross_attention_dim: {shown(asked)}, the embeddings of the text encoders have"
                f" {shown(width)} entries; {what_runs()}"
            )
        yield from tokenizer_problems(folder, "tokenizer", first)
        yield from tokenizer_problems(folder, "tokenizer_2", second)

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
        }

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that are too long; see `Pipeline.check_prompts`."""
        for encoder in self._prompt_encoders:
            encoder.check(prompts)

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Text embeddings [B, tokens, width + width 2], pooled ones [B, d], and the sizes of the image [B, 6]."""
        import torch

        from engine.methods.sampling.denoiser import Condition

        first, second = (encoder.encode(prompts) for encoder in self._prompt_encoders)
        text = torch.cat([first["hidden"], second["hidden"]], dim=-1)
        _, height, width = self.image_shape
        sizes = torch.tensor([[height, width, 0, 0, height, width]] * len(prompts), device=text.device)
        return Condition({TEXT: text, "text_embeds": second["pooled"], "time_ids": sizes.to(text.dtype)})

    def predict(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Output [B, C, H, W] of the UNet."""
        more = {name: condition[name] for name in ("text_embeds", "time_ids")}
        return self.call_network(latents, timestep, encoder_hidden_states=condition[TEXT], added_cond_kwargs=more)


def _hidden_and_pooled(encoder: Any) -> Any:
    def embed(tokens: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
        output = encoder(tokens, attention_mask=mask, output_hidden_states=True)
        return {"hidden": output.hidden_states[-2], "pooled": output[0]}

    return embed
