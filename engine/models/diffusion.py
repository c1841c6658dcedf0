"""Stable Diffusion and Stable unCLIP pipelines: their parts loaded one by one, and what sampling needs of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.errors import JobError
from engine.methods.sampling.denoiser import ClassifierFreeDenoiser, Condition
from engine.methods.sampling.families import ModelScheduler
from engine.methods.sampling.schedulers import Sampler
from engine.methods.sampling.spec import SamplingSpec
from engine.models.addresses import resolve
from engine.models.hardware import (
    CHECKPOINTING_PIXELS,
    CPU_LATENT_PIXELS,
    CPU_ROWS,
    Hardware,
    compiled,
    head_sizes,
    xformers_problem,
)
from engine.models.loading import frozen, loading, whole
from engine.models.pipelines import (
    OLD_SAMPLE_SIZE,
    check_pipeline,
    check_pipeline_weights,
    is_old_size,
    is_unclip,
    read_scheduler,
)
from engine.models.safety import SafetyChecker
from engine.models.unclip import EmbeddingNoiser
from engine.models.weight_files import weights_variant

# Prompts whose embeddings are kept on the device: 120 kB each for Stable Diffusion 1.x in half precision.
MAX_EMBEDDINGS = 1024


class Diffusion:
    """A text-to-image latent diffusion model.

    Attributes:
        latent_shape: (C, H, W) of a sample's latents.
        noiser: what prepares the image embeddings of a Stable unCLIP pipeline; None for others.
        safety_checker: flags images; None where the pipeline has none, or it is not wanted.
        hardware: where and how it runs.
    """

    def __init__(
        self,
        *,
        unet: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Any,
        scheduler: ModelScheduler,
        hardware: Hardware,
        noiser: EmbeddingNoiser | None = None,
        safety_checker: SafetyChecker | None = None,
    ) -> None:
        self._unet = frozen(unet, hardware.device)
        self._text_encoder = frozen(text_encoder, hardware.device)
        self._vae = frozen(vae, hardware.device)
        self._tokenizer = tokenizer
        self._scheduler = scheduler
        self._embeddings: dict[str, Tensor] = {}
        self.noiser = noiser
        self.safety_checker = safety_checker
        self.hardware = hardware
        self._layout = torch.channels_last if hardware.channels_last else torch.contiguous_format
        size = OLD_SAMPLE_SIZE if noiser is None and is_old_size(unet.config) else unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        self.latent_shape = (int(unet.config.in_channels), int(height), int(width))
        self._configure()

    @classmethod
    def load(cls, address: str, hardware: Hardware, *, checks_safety: bool = True) -> Diffusion:
        """Load a diffusers pipeline folder, `zoo:` part or hub id; safetensors only.

        Args:
            checks_safety: load the pipeline's safety checker, too, where it has one.

        Raises:
            JobError: it cannot be loaded, or is none that `engine.models.pipelines` lets through.
        """
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        from transformers.models.clip.modeling_clip import CLIPTextModel
        from transformers.models.clip.tokenization_clip import CLIPTokenizer

        folder = resolve(address)
        check_pipeline(folder, address, checks_safety=checks_safety)
        check_pipeline_weights(folder, address, checks_safety=checks_safety)
        options: dict[str, Any] = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
        dtype = getattr(torch, hardware.dtype)

        def part(kind: Any, name: str, **more: Any) -> Any:
            where = folder / name
            return whole(kind.from_pretrained(where, variant=weights_variant(where), **options, **more))

        with loading(address, "a diffusion pipeline"):
            return cls(
                unet=part(UNet2DConditionModel, "unet", torch_dtype=dtype),
                # The decoder stays in float32: in half precision some overflow, and gradients below 1e-7 vanish.
                vae=part(AutoencoderKL, "vae", torch_dtype=torch.float32),
                text_encoder=part(CLIPTextModel, "text_encoder", dtype=dtype),
                tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
                scheduler=read_scheduler(folder),
                hardware=hardware,
                noiser=EmbeddingNoiser.load(folder, hardware.device) if is_unclip(folder) else None,
                safety_checker=SafetyChecker.load(folder, hardware) if checks_safety else None,
            )

    @property
    def rows(self) -> int | None:
        """Rows of every model call on a CPU, whatever the batch; None on a GPU, where the batch decides."""
        if self.hardware.is_cuda:
            return None
        _, height, width = self.latent_shape
        return max(1, min(CPU_ROWS, CPU_LATENT_PIXELS // (height * width)))

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a decoded image."""
        _, height, width = self.latent_shape
        scale = self._pixels_per_latent
        return 3, height * scale, width * scale

    @property
    def _pixels_per_latent(self) -> int:
        return 2 ** (len(self._vae.config.block_out_channels) - 1)

    def sampler(self, spec: SamplingSpec) -> Sampler:
        """A fresh sampler, for one batch.

        Raises:
            ValueError: the combination is impossible with this model.
        """
        return Sampler(spec, self._scheduler, self.hardware.device)

    def denoiser(
        self, prompts: Sequence[str], spec: SamplingSpec, sampler: Sampler, class_labels: Tensor | None = None
    ) -> ClassifierFreeDenoiser:
        """A denoiser for a batch of prompts.

        Args:
            class_labels: [B, 2 d] from `noiser`, for a Stable unCLIP pipeline; its unconditional half has zeros.
        """
        without = None if class_labels is None else torch.zeros_like(class_labels)
        return ClassifierFreeDenoiser(
            self._predict,
            conditional=Condition(self.encode(prompts), class_labels),
            unconditional=Condition(self.encode([spec.negative_prompt] * len(prompts)), without),
            prediction=sampler.prediction,
            guidance_scale=spec.guidance_scale,
            guidance_rescale=spec.guidance_rescale,
        )

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that the text encoder would cut off without a word.

        Raises:
            JobError: naming the first prompt that is too long.
        """
        limit = self._tokenizer.model_max_length
        for prompt in prompts:
            if (length := len(self._tokenizer(self._expanded(prompt)).input_ids)) > limit:
                raise JobError(
                    f"prompt '{prompt[:80]}' has {length} tokens, the text encoder reads {limit}; shorten it"
                )

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> Tensor:
        """Text embeddings [B, tokens, width]; the last prompts are kept.

        Raises:
            JobError: a prompt is too long.
        """
        for prompt in prompts:
            # One by one: a prompt's embedding must not depend on the prompts beside it.
            if prompt not in self._embeddings:
                self.check_prompts([prompt])
                tokens = self._tokenizer(
                    [self._expanded(prompt)],
                    padding="max_length",
                    truncation=True,
                    max_length=self._tokenizer.model_max_length,
                    return_tensors="pt",
                )
                is_masked = getattr(self._text_encoder.config, "use_attention_mask", False)
                mask = tokens.attention_mask.to(self.hardware.device) if is_masked else None
                ids = tokens.input_ids.to(self.hardware.device)
                self._embeddings[prompt] = self._text_encoder(ids, attention_mask=mask)[0]
        embeddings = torch.cat([self._embeddings[prompt] for prompt in prompts])
        while len(self._embeddings) > MAX_EMBEDDINGS:
            del self._embeddings[next(iter(self._embeddings))]
        return embeddings

    def _expanded(self, prompt: str) -> str:
        """A prompt with every vector of its textual inversions, as diffusers' `maybe_convert_prompt` has it.

        A token `<cat>` with further vectors `<cat>_1`, `<cat>_2` stands for all of them.
        """
        known = self._tokenizer.added_tokens_encoder
        for token in dict.fromkeys(self._tokenizer.tokenize(prompt)):
            if token in known:
                more = itertools.takewhile(known.__contains__, (f"{token}_{place}" for place in itertools.count(1)))
                prompt = prompt.replace(token, " ".join([token, *more]))
        return prompt

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], nominally in [0, 1] and not clamped, of latents [B, C, h, w]; differentiable."""
        return self._vae.decode(latents / self._vae.config.scaling_factor).sample / 2 + 0.5

    def _predict(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        dtype = self._unet.dtype
        labels = None if condition.labels is None else condition.labels.to(dtype)
        # Compiled code with a backward pass has open bugs: what is differentiated stays as it is.
        unet = self._unet if torch.is_grad_enabled() else self._fast_unet
        return unet(
            latents.to(dtype=dtype, memory_format=self._layout),
            timestep,
            encoder_hidden_states=condition.text,
            class_labels=labels,
            return_dict=False,
        )[0]

    def _configure(self) -> None:
        self._unet.to(memory_format=self._layout)
        self._vae.to(memory_format=self._layout)
        if self.hardware.attention == "xformers":
            self._use_xformers()
        pixels = self.latent_shape[1] * self._pixels_per_latent
        wanted = self.hardware.gradient_checkpointing
        if wanted == "on" or (wanted == "auto" and pixels > CHECKPOINTING_PIXELS):
            self._unet.enable_gradient_checkpointing()
            self._vae.enable_gradient_checkpointing()
        self._fast_unet = compiled(self._unet) if self.hardware.compile else self._unet

    def _use_xformers(self) -> None:
        """xformers' attention in the UNet, and in the VAE where xformers can differentiate its head size.

        Raises:
            JobError: not in the UNet.
        """
        if problem := xformers_problem(head_sizes(self._unet), self.hardware.dtype, self.hardware.device):
            raise JobError(f"runtime.attention: 'xformers' cannot run here ({problem}); use auto or sdpa")
        self._unet.enable_xformers_memory_efficient_attention()
        if not xformers_problem(head_sizes(self._vae), "float32", self.hardware.device):
            self._vae.enable_xformers_memory_efficient_attention()
