"""Stable Diffusion 3 and 3.5: flow matching, a transformer, two CLIP text encoders beside T5 (Esser et al. 2024).

The hidden states of both CLIP encoders, of the layer before the last, are side by side, filled up with zeros to the
width of T5's, and followed by them; where there is no T5, zeros are in its place. Both pooled embeddings go with the
timestep. The latents have 16 channels and a shift.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from engine.errors import JobError
from engine.methods.config_values import is_integer, shown
from engine.methods.sampling.families import ModelScheduler
from engine.methods.sampling.flow_checks import flow_sampling_problems, flow_training_problems
from engine.models.configurations import part_classes, read_config, reading_configuration
from engine.models.hardware import Hardware
from engine.models.loading import frozen
from engine.models.pipelines.base import BareNetwork, LatentSpace, Pipeline
from engine.models.pipelines.checks import (
    Classes,
    adapter_problem,
    class_problems,
    part_problem,
    quantisation_problems,
    tokenizer_problems,
    vae_problems,
)
from engine.models.pipelines.parts import load_part, text_config
from engine.models.pipelines.registry import what_runs
from engine.models.pipelines.stable_diffusion import TEXT, pixels_per_latent
from engine.models.pipelines.t5 import (
    T5_EMBEDDINGS,
    T5_ENCODERS,
    T5_TOKENIZERS,
    load_t5,
    t5_problems,
    tokenizer_file_problem,
)

if TYPE_CHECKING:
    from torch import Tensor

    from engine.methods.sampling.denoiser import Condition
    from engine.methods.sampling.noise import NoiseStream
    from engine.methods.sampling.schedulers import Sampler
    from engine.methods.sampling.spec import SamplingSpec
    from engine.models.pipelines.prompts import PromptEncoder

# Inputs of the transformer next to the hidden states, as diffusers names them.
POOLED = "pooled_projections"
# Tokens of T5 in diffusers' pipeline (`max_sequence_length`); those of zeros where there is no T5.
T5_TOKENS = 256
_CLIPS = (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2"))
_T5, _T5_TOKENIZER = "text_encoder_3", "tokenizer_3"
_TRANSFORMER = "transformer"
# Defaults of diffusers' transformer.
_DEFAULTS: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "joint_attention_dim": 4096,
    "pooled_projection_dim": 2048,
    "out_channels": 16,
    "pos_embed_max_size": 96,
}


class StableDiffusion3(Pipeline):
    """Pipelines of diffusers' class `StableDiffusion3Pipeline`."""

    class_name = "StableDiffusion3Pipeline"
    begins_without_signal = True
    required: ClassVar[Classes] = {
        _TRANSFORMER: ("SD3Transformer2DModel",),
        "vae": ("AutoencoderKL",),
        **{encoder: ("CLIPTextModelWithProjection",) for encoder, _ in _CLIPS},
        **{tokenizer: ("CLIPTokenizer", "CLIPTokenizerFast") for _, tokenizer in _CLIPS},
    }
    optional: ClassVar[Classes] = {_T5: T5_ENCODERS, _T5_TOKENIZER: T5_TOKENIZERS}

    def __init__(
        self, *, clips: Sequence[tuple[Any, Any]], t5: tuple[Any, Any] | None, scheduler: ModelScheduler, **parts: Any
    ) -> None:
        super().__init__(safety_checker=None, **parts)
        self._scheduler = scheduler
        self._clips = [self._clip(encoder, tokenizer, cuts=t5 is not None) for encoder, tokenizer in clips]
        self._t5 = None if t5 is None else self._long_prompts(*t5)

    def _clip(self, encoder: Any, tokenizer: Any, *, cuts: bool) -> PromptEncoder:
        """Hidden states [1, tokens, width] and the pooled embedding [1, d]; padding is not masked."""
        from engine.models.pipelines.prompts import PromptEncoder

        model = frozen(encoder, self.hardware.device)

        def embed(tokens: Tensor, _mask: Tensor | None) -> dict[str, Tensor]:
            output = model(tokens, output_hidden_states=True)
            return {TEXT: output.hidden_states[-2], POOLED: output[0]}

        return PromptEncoder(tokenizer, embed, device=self.hardware.device, cuts=cuts)

    def _long_prompts(self, encoder: Any, tokenizer: Any) -> PromptEncoder:
        """Hidden states [1, 256, width] of T5; padding is not masked."""
        from engine.models.pipelines.prompts import PromptEncoder

        model = frozen(encoder, self.hardware.device)
        return PromptEncoder(
            tokenizer,
            lambda tokens, _mask: {TEXT: model(tokens)[0]},
            device=self.hardware.device,
            num_tokens=T5_TOKENS,
            max_embeddings=T5_EMBEDDINGS,
        )

    @classmethod
    def check(cls, folder: Path, address: str, *, checks_safety: bool) -> None:
        """Check parts, files and options by their configurations; see `Pipeline.check`."""
        with reading_configuration(address):
            problem = part_problem(folder, cls.required, cls.optional, checks_safety=checks_safety)
            if problem := problem or adapter_problem(folder) or _t5_problem(folder):
                raise JobError(f"'{address}' {problem}; {what_runs()}")
            if problems := list(cls.configuration_problems(folder)):
                raise JobError([f"'{address}': {problem}" for problem in problems])

    @classmethod
    def configuration_problems(cls, folder: Path) -> Iterator[str]:
        """Options of the parts that nothing here would act on, or that do not fit together; a line each."""
        transformer, vae = _transformer(folder), read_config(folder / "vae" / "config.json")
        for name, config in ((_TRANSFORMER, transformer), ("vae", vae)):
            yield from class_problems(name, config, cls.required[name][0])
        for name in part_classes(folder):
            if name in (_TRANSFORMER, "vae") or name.startswith("text_encoder"):
                yield from quantisation_problems(name, read_config(folder / name / "config.json"))
        yield from vae_problems(vae, is_shifted=True)
        yield from _channel_problems(transformer, vae)
        yield from _size_problems(transformer)
        yield from _text_problems(folder, transformer)
        yield from flow_training_problems(cls.read_scheduler(folder))

    @classmethod
    def sampling_problems(cls, folder: Path, spec: SamplingSpec, *, is_guided: bool) -> list[str]:
        """What is impossible about a job's sampling; see `Pipeline.sampling_problems`."""
        factor, (height, width) = cls.size_factor(folder), spec.image_size(cls.image_size(folder))
        num_tokens = (height // factor) * (width // factor)
        return flow_sampling_problems(cls.read_scheduler(folder), spec, num_tokens=num_tokens, is_guided=is_guided)

    @classmethod
    def read_scheduler(cls, folder: Path) -> ModelScheduler:
        """The scheduler of a pipeline's folder."""
        config = read_config(folder / "scheduler" / "scheduler_config.json")
        return ModelScheduler(config=config, name=part_classes(folder).get("scheduler", "none"), is_corrected=False)

    @classmethod
    def latent_space(cls, folder: Path) -> LatentSpace:
        """The latents of its `AutoencoderKL`."""
        vae = read_config(folder / "vae" / "config.json")
        return LatentSpace(
            channels=int(vae.get("latent_channels", 4)),
            pixels_per_latent=pixels_per_latent(vae),
            scaling_factor=vae.get("scaling_factor", 0.18215),
            shift_factor=vae["shift_factor"],
        )

    @classmethod
    def image_size(cls, folder: Path) -> tuple[int, int]:
        """Height and width of its images, in pixels."""
        side = _transformer(folder)["sample_size"] * pixels_per_latent(read_config(folder / "vae" / "config.json"))
        return side, side

    @classmethod
    def size_factor(cls, folder: Path) -> int:
        """Pixels of a side for each patch; see `Pipeline.size_factor`."""
        patch: int = _transformer(folder)["patch_size"]
        return patch * super().size_factor(folder)

    @classmethod
    def size_problems(cls, folder: Path, spec: SamplingSpec) -> list[str]:
        """As of every family, and sides with more patches than there are positions; see `Pipeline.size_problems`."""
        most = _transformer(folder)["pos_embed_max_size"] * cls.size_factor(folder)
        return super().size_problems(folder, spec) + [
            f".{side}: {value} is above {most}, the largest side that the transformer has positions for"
            " (pos_embed_max_size)"
            for side, value in (("height", spec.height), ("width", spec.width))
            if value is not None and value > most
        ]

    @classmethod
    def bare_network(cls, folder: Path) -> BareNetwork:
        """The transformer; see `Pipeline.bare_network`."""
        import torch
        from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

        config = _transformer(folder)
        transformer = SD3Transformer2DModel.from_config(config).requires_grad_(False).eval()
        num_tokens = T5_TOKENS + text_config(folder / "text_encoder").get("max_position_embeddings", 77)
        shapes = {TEXT: (num_tokens, config["joint_attention_dim"]), POOLED: (config["pooled_projection_dim"],)}

        def inputs(rows: int, device: torch.device) -> Mapping[str, Any]:
            return {name: torch.zeros(rows, *shape, device=device) for name, shape in shapes.items()}

        return BareNetwork(module=transformer, inputs=inputs)

    @classmethod
    def load_parts(cls, folder: Path, hardware: Hardware, *, checks_safety: bool) -> dict[str, Any]:
        """The arguments of the constructor, from a folder."""
        import torch
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel
        from transformers.models.clip.modeling_clip import CLIPTextModelWithProjection
        from transformers.models.clip.tokenization_clip import CLIPTokenizer

        dtype = getattr(torch, hardware.dtype)
        return {
            "network": load_part(SD3Transformer2DModel, folder / _TRANSFORMER, torch_dtype=dtype),
            # The decoder stays in float32: in half precision some overflow, and gradients below 1e-7 vanish.
            "vae": load_part(AutoencoderKL, folder / "vae", torch_dtype=torch.float32),
            "clips": [
                (
                    load_part(CLIPTextModelWithProjection, folder / encoder, dtype=dtype),
                    CLIPTokenizer.from_pretrained(folder / tokenizer, local_files_only=True),
                )
                for encoder, tokenizer in _CLIPS
            ],
            "t5": load_t5(folder, _T5, _T5_TOKENIZER, dtype) if _T5 in part_classes(folder) else None,
            "scheduler": cls.read_scheduler(folder),
            "hardware": hardware,
            "folder": folder,
        }

    @property
    def own_latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a sample's latents in the model's own size."""
        config = self._network.config
        return int(config.in_channels), int(config.sample_size), int(config.sample_size)

    @property
    def own_image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a decoded image in the model's own size."""
        _, height, width = self.own_latent_shape
        scale = pixels_per_latent(self._vae.config)
        return 3, height * scale, width * scale

    def sampler(self, spec: SamplingSpec, noise: NoiseStream | None = None) -> Sampler:
        """A fresh sampler, for one batch; see `Pipeline.sampler`."""
        from engine.methods.sampling.flow import make_flow_sampler

        _, height, width = self.latent_shape
        num_tokens = (height // self._network.config.patch_size) * (width // self._network.config.patch_size)
        return make_flow_sampler(spec, self._scheduler, num_tokens, self.hardware.device)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that no encoder reads whole: with T5 the CLIP encoders read the first tokens, as in diffusers.

        Raises:
            JobError: naming the first prompt that is too long.
        """
        for encoder in [*self._clips, *([self._t5] if self._t5 else [])]:
            encoder.check(prompts)

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Text embeddings [B, tokens of CLIP + 256, width], and pooled ones [B, d + d 2]."""
        import torch

        from engine.methods.sampling.denoiser import Condition

        first, second = (encoder.encode(prompts) for encoder in self._clips)
        clip = torch.cat([first[TEXT], second[TEXT]], dim=-1)
        width = self._network.config.joint_attention_dim
        clip = torch.nn.functional.pad(clip, (0, width - clip.shape[-1]))
        t5 = self._t5.encode(prompts)[TEXT] if self._t5 else clip.new_zeros(len(prompts), T5_TOKENS, width)
        pooled = torch.cat([first[POOLED], second[POOLED]], dim=-1)
        return Condition({TEXT: torch.cat([clip, t5], dim=-2), POOLED: pooled})

    def predict(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """The velocity [B, C, H, W] that the transformer predicts."""
        return self.call_network(latents, timestep.expand(len(latents)), **condition.tensors)

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents [B, C, h, w] of images [B, 3, H, W] in [0, 1]: the mode of the posterior, shifted and scaled."""
        config = self._vae.config
        return self.decoder.in_slices(
            lambda part: (
                (self._vae.encode(part * 2 - 1).latent_dist.mode() - config.shift_factor) * config.scaling_factor
            ),
            images,
            self.latent_shape,
        )


def _transformer(folder: Path) -> dict[str, Any]:
    """The configuration of the transformer, with diffusers' defaults for what it leaves out."""
    return _DEFAULTS | read_config(folder / _TRANSFORMER / "config.json")


def _t5_problem(folder: Path) -> str:
    """A T5 whose tokenizer is missing, or would have to be converted; as a predicate of the pipeline."""
    if _T5 not in part_classes(folder):
        return ""
    if _T5_TOKENIZER not in part_classes(folder):
        return f"has a {_T5} without its {_T5_TOKENIZER}; to do without T5, write [null, null] for both"
    return tokenizer_file_problem(folder, _T5_TOKENIZER)


def _channel_problems(transformer: dict[str, Any], vae: dict[str, Any]) -> Iterator[str]:
    latents, read = vae.get("latent_channels", 4), transformer["in_channels"]
    written = read if transformer["out_channels"] is None else transformer["out_channels"]
    if read != latents or written != read:
        yield (
            f"transformer/config.json has in_channels: {shown(read)} and out_channels: {shown(written)}, the latents of"
            f" the VAE have {shown(latents)}; {what_runs()}"
        )


def _size_problems(transformer: dict[str, Any]) -> Iterator[str]:
    size, patch, most = (transformer[name] for name in ("sample_size", "patch_size", "pos_embed_max_size"))
    if not all(is_integer(value) and value > 0 for value in (size, patch, most)) or size % patch:
        yield (
            f"transformer/config.json has sample_size: {shown(size)}, patch_size: {shown(patch)} and"
            f" pos_embed_max_size: {shown(most)}, so the size of an image is not known; sample_size is the side of an"
            " image in latents, a multiple of patch_size"
        )
    elif size // patch > most:
        yield (
            f"transformer/config.json has sample_size: {size}, {size // patch} patches a side, and positions of {most}"
            " (pos_embed_max_size)"
        )


def _text_problems(folder: Path, transformer: dict[str, Any]) -> Iterator[str]:
    """Text encoders, tokenizers and transformer that do not fit together."""
    clips = [text_config(folder / encoder) for encoder, _ in _CLIPS]
    for (name, tokenizer), clip in zip(_CLIPS, clips, strict=True):
        if (kind := clip.get("model_type", "clip_text_model")) not in ("clip_text_model", "clip"):
            yield f"{name}/config.json is of type {shown(kind)}, not of CLIP; {what_runs()}"
            return
        yield from tokenizer_problems(folder, tokenizer, clip)
    limits = [read_config(folder / name / "tokenizer_config.json").get("model_max_length") for _, name in _CLIPS]
    if limits[0] != limits[1]:
        yield (
            f"tokenizer_2/tokenizer_config.json has model_max_length: {shown(limits[1])}, that of tokenizer is"
            f" {shown(limits[0])}; their embeddings are put side by side, so make both the same"
        )
    asked, width = transformer["joint_attention_dim"], sum(clip.get("hidden_size", 512) for clip in clips)
    if width > asked:
        yield (
            f"transformer/config.json has joint_attention_dim: {shown(asked)}, the embeddings of both CLIP encoders"
            f" have {width} entries; its parts are not of one model"
        )
    pooled, read = sum(clip.get("projection_dim", 512) for clip in clips), transformer["pooled_projection_dim"]
    if pooled != read:
        yield (
            f"transformer/config.json has pooled_projection_dim: {shown(read)}, the pooled embeddings of both CLIP"
            f" encoders have {pooled} entries; its parts are not of one model"
        )
    if _T5 in part_classes(folder):
        yield from t5_problems(folder, _T5, _T5_TOKENIZER, "joint_attention_dim", asked)
