"""Stable Diffusion 1.x and 2.x: one UNet, one CLIP text encoder, eps- or v-prediction."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from engine.errors import JobError
from engine.methods.config_values import is_integer, shown
from engine.methods.sampling.families import CONSISTENCY, ModelScheduler
from engine.methods.sampling.sampling_checks import sampling_problems
from engine.methods.sampling.training_checks import training_problems
from engine.models.configurations import part_classes, read_config, reading_configuration
from engine.models.hardware import Hardware
from engine.models.loading import frozen
from engine.models.pipelines.base import BareNetwork, LatentSpace, Pipeline
from engine.models.pipelines.checks import (
    IMAGE_PROCESSORS,
    Classes,
    Options,
    adapter_problem,
    class_problems,
    option_problems,
    part_problem,
    quantisation_problems,
    size_problems,
    tokenizer_problems,
    vae_problems,
)
from engine.models.pipelines.parts import FEATURE_EXTRACTOR, SAFETY_CHECKER, load_part, text_config
from engine.models.pipelines.registry import what_runs

if TYPE_CHECKING:
    from torch import Tensor

    from engine.methods.sampling.denoiser import Condition
    from engine.methods.sampling.noise import NoiseStream
    from engine.methods.sampling.schedulers import Sampler
    from engine.methods.sampling.spec import SamplingSpec
    from engine.models.pipelines.prompts import PromptEncoder

# Sizes of latents below this in a UNet of diffusers before 0.9 are taken for a mistake by its pipeline.
OLD_SAMPLE_SIZE = 64
TEXT = "encoder_hidden_states"
# The UNet's input for the embedding of the guidance scale, and the factor of the scale in it.
GUIDANCE, GUIDANCE_FACTOR = "timestep_cond", 1000.0
IMAGE_ENCODERS = ("CLIPVisionModelWithProjection",)
_UNET: Options = (
    ("addition_embed_type", (None, "text"), "it takes more than timestep and prompt, as Stable Diffusion XL does"),
    ("encoder_hid_dim_type", (None, "text_proj"), "it takes an image next to the prompt, as with an IP-adapter"),
    ("num_class_embeds", (None,), "it takes a class or a noise level, as an upscaler does"),
    ("attention_type", ("default", None), "it takes the places of objects, as GLIGEN does"),
    ("dual_cross_attention", (False, None), "it takes two kinds of prompts"),
    ("num_attention_heads", (None,), "no UNet of diffusers has it"),
)


class StableDiffusion(Pipeline):
    """Pipelines of diffusers' class `StableDiffusionPipeline`.

    Attributes:
        is_corrected: whether diffusers' pipeline corrects old configurations, of the scheduler (`ModelScheduler`) and
            of the UNet's size.
        required: parts that must be there, with their classes; optional: parts that may be there.
        unet_options: options of the UNet that ask for something, with the values that are sampled rightly.
    """

    class_name = "StableDiffusionPipeline"
    trained_part = "unet"
    lora_prefixes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "unet": ("unet.", "lora_unet_"),
        "text_encoder": ("text_encoder.", "lora_te_"),
    }
    embedding_encoder = "text_encoder"
    is_corrected: ClassVar[bool] = True
    required: ClassVar[Classes] = {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
    }
    unet_options: ClassVar[Options] = _UNET
    optional: ClassVar[Classes] = {
        SAFETY_CHECKER: ("StableDiffusionSafetyChecker",),
        FEATURE_EXTRACTOR: IMAGE_PROCESSORS,
        # Asked by IP-adapters alone, whose UNet is refused.
        "image_encoder": IMAGE_ENCODERS,
    }

    def __init__(
        self, *, text_encoder: Any, tokenizer: Any, scheduler: ModelScheduler, hardware: Hardware, **parts: Any
    ) -> None:
        super().__init__(hardware=hardware, **parts)
        self._scheduler = scheduler
        self.prompts = self.prompt_encoder(frozen(text_encoder, hardware.device), tokenizer)

    def prompt_encoder(self, encoder: Any, tokenizer: Any) -> PromptEncoder:
        """What a text encoder makes of prompts, by the names of the network's inputs."""
        from engine.models.pipelines.prompts import PromptEncoder

        return PromptEncoder(
            tokenizer,
            lambda tokens, mask: {TEXT: encoder(tokens, attention_mask=mask)[0]},
            device=self.hardware.device,
            uses_mask=getattr(encoder.config, "use_attention_mask", False),
        )

    @classmethod
    def check(cls, folder: Path, address: str, *, checks_safety: bool) -> None:
        """Check parts, files and options by their configurations; see `Pipeline.check`."""
        with reading_configuration(address):
            problem = part_problem(folder, cls.required, cls.optional, checks_safety=checks_safety)
            if problem := problem or adapter_problem(folder):
                raise JobError(f"'{address}' {problem}; {what_runs()}")
            if problems := list(cls.configuration_problems(folder)):
                raise JobError([f"'{address}': {problem}" for problem in problems])

    @classmethod
    def configuration_problems(cls, folder: Path) -> Iterator[str]:
        """Options of the parts that nothing here would act on, or that do not fit together; a line each."""
        parts = ("unet", "vae", *(name for name in cls.required if name.startswith("text_encoder")))
        configs = {name: read_config(folder / name / "config.json") for name in parts}
        unet, vae = configs["unet"], configs["vae"]
        for name, config in configs.items():
            yield from quantisation_problems(name, config)
            if not name.startswith("text_encoder"):
                yield from _with_remedy(class_problems(name, config, cls.required[name][0]))
        yield from _with_remedy(option_problems("unet", unet, cls.unet_options))
        yield from _with_remedy(cls.class_embedding_problems(unet))
        yield from _guidance_embedding_problems(unet)
        yield from _with_remedy(_channel_problems(unet, vae))
        yield from _with_remedy(vae_problems(vae))
        yield from size_problems("unet", unet.get("sample_size"), pixels_per_latent(vae))
        yield from cls.text_problems(folder, unet)
        yield from training_problems(cls.read_scheduler(folder))

    @classmethod
    def class_embedding_problems(cls, unet: dict[str, Any]) -> Iterator[str]:
        """Class embeddings that the UNet asks for and is not given."""
        embedding = unet.get("class_embed_type")
        if embedding is not None:
            yield (
                f"unet/config.json has class_embed_type: {shown(embedding)} (it takes a class, a noise level or an"
                " image)"
            )
        if unet.get("class_embeddings_concat"):
            yield "unet/config.json has class_embeddings_concat: True (it takes a class, a noise level or an image)"

    @classmethod
    def text_problems(cls, folder: Path, unet: dict[str, Any]) -> Iterator[str]:
        """Text encoder, tokenizer and UNet that do not fit together."""
        encoder = text_config(folder / "text_encoder")
        if (kind := encoder.get("model_type", "clip_text_model")) not in ("clip_text_model", "clip"):
            yield f"text_encoder/config.json is of type {shown(kind)}, not of CLIP; {what_runs()}"
            return
        width, asked = encoder.get("hidden_size", 512), unet.get("cross_attention_dim", 1280)
        if unet.get("encoder_hid_dim") is not None:
            asked = unet["encoder_hid_dim"]
        if any(entries != width for entries in (asked if isinstance(asked, list) else [asked])):
            yield (
                f"unet/config.json has cross_attention_dim: {shown(asked)}, the embeddings of the text encoder have"
                f" {shown(width)} entries; {what_runs()}"
            )
        yield from tokenizer_problems(folder, "tokenizer", encoder)

    @classmethod
    def sampling_problems(cls, folder: Path, spec: SamplingSpec, *, is_guided: bool) -> list[str]:
        """What is impossible about a job's sampling; see `Pipeline.sampling_problems`."""
        problems = sampling_problems(cls.read_scheduler(folder), spec, is_guided=is_guided)
        if not cls.embeds_guidance(folder):
            return problems
        for field in ("negative_prompt", "guidance_rescale"):
            if value := getattr(spec, field):
                reason = (
                    "the UNet takes the guidance scale itself (time_cond_proj_dim), so there is no unconditional half"
                )
                problems.append(f".{field}: {shown(value)}, but {reason}; leave it out")
        return problems

    @classmethod
    def embeds_guidance(cls, folder: Path) -> bool:
        """Whether the UNet was distilled with the guidance scale as an input; see `Pipeline.embeds_guidance`."""
        return read_config(folder / "unet" / "config.json").get("time_cond_proj_dim") is not None

    @classmethod
    def bare_network(cls, folder: Path) -> BareNetwork:
        """The UNet; see `Pipeline.bare_network`."""
        import torch
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

        config = read_config(folder / "unet" / "config.json")
        unet = UNet2DConditionModel.from_config(config).requires_grad_(False).eval()
        shapes = cls.input_shapes(folder, config)
        if dim := config.get("time_cond_proj_dim"):
            shapes |= {GUIDANCE: (dim,)}

        def inputs(rows: int, device: torch.device) -> Mapping[str, Any]:
            made = {name: torch.zeros(rows, *shape, device=device) for name, shape in shapes.items()}
            return cls.network_arguments(made)

        return BareNetwork(module=unet, inputs=inputs)

    @classmethod
    def input_shapes(cls, folder: Path, unet: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
        """Shapes of what `encode` and `conditions` give for a sample, by name."""
        encoder = text_config(folder / "text_encoder")
        return {TEXT: (encoder.get("max_position_embeddings", 77), encoder.get("hidden_size", 512))}

    @classmethod
    def training_problem(cls, folder: Path) -> str:
        """Models that are distilled to few steps; see `Pipeline.training_problem`."""
        if problem := super().training_problem(folder):
            return problem
        if cls.embeds_guidance(folder) or cls.read_scheduler(folder).name in CONSISTENCY:
            return (
                "is distilled to sample in few steps, which training on noise would undo; fine-tune the model that it"
                " was distilled from"
            )
        return ""

    @classmethod
    def read_scheduler(cls, folder: Path) -> ModelScheduler:
        """The scheduler of a pipeline's folder."""
        config = read_config(folder / "scheduler" / "scheduler_config.json")
        name = part_classes(folder).get("scheduler", "none")
        return ModelScheduler(config=config, name=name, is_corrected=cls.is_corrected)

    @classmethod
    def latent_space(cls, folder: Path) -> LatentSpace:
        """The latents of its `AutoencoderKL`."""
        vae = read_config(folder / "vae" / "config.json")
        return LatentSpace(
            channels=int(vae.get("latent_channels", 4)),
            pixels_per_latent=pixels_per_latent(vae),
            scaling_factor=vae.get("scaling_factor", 0.18215),
        )

    @classmethod
    def image_size(cls, folder: Path) -> tuple[int, int]:
        """Height and width of its images, in pixels."""
        height, width = cls._latent_size(read_config(folder / "unet" / "config.json"))
        scale = pixels_per_latent(read_config(folder / "vae" / "config.json"))
        return height * scale, width * scale

    @classmethod
    def _latent_size(cls, unet: Mapping[str, Any]) -> tuple[int, int]:
        size = OLD_SAMPLE_SIZE if cls.is_corrected and is_old_size(unet) else unet["sample_size"]
        height, width = (size, size) if isinstance(size, int) else size
        return int(height), int(width)

    @classmethod
    def load_parts(cls, folder: Path, hardware: Hardware, *, checks_safety: bool) -> dict[str, Any]:
        """The arguments of the constructor, from a folder."""
        import torch
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
        from transformers.models.clip.modeling_clip import CLIPTextModel
        from transformers.models.clip.tokenization_clip import CLIPTokenizer

        from engine.models.pipelines.safety import SafetyChecker

        dtype = getattr(torch, hardware.dtype)
        return {
            "network": load_part(UNet2DConditionModel, folder / "unet", torch_dtype=dtype),
            # The decoder stays in float32: in half precision some overflow, and gradients below 1e-7 vanish.
            "vae": load_part(AutoencoderKL, folder / "vae", torch_dtype=torch.float32),
            "text_encoder": load_part(CLIPTextModel, folder / "text_encoder", dtype=dtype),
            "tokenizer": CLIPTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True),
            "scheduler": cls.read_scheduler(folder),
            "safety_checker": SafetyChecker.load(folder, hardware) if checks_safety else None,
            "hardware": hardware,
            "folder": folder,
        }

    @property
    def own_latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a sample's latents in the model's own size."""
        return int(self._network.config.in_channels), *self._latent_size(self._network.config)

    @property
    def own_image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a decoded image in the model's own size."""
        _, height, width = self.own_latent_shape
        scale = pixels_per_latent(self._vae.config)
        return 3, height * scale, width * scale

    def sampler(self, spec: SamplingSpec, noise: NoiseStream | None = None) -> Sampler:
        """A fresh sampler, for one batch; see `Pipeline.sampler`."""
        from engine.methods.sampling.schedulers import make_sampler

        return make_sampler(spec, self._scheduler, self.hardware.device, noise)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that are too long; see `Pipeline.check_prompts`."""
        self.prompts.check(prompts)

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Text embeddings [B, tokens, width]; the last prompts are kept."""
        return self.prompts.encode(prompts)

    def guidance_inputs(self, guidance_scale: float, num_rows: int) -> dict[str, Tensor]:
        """The embedding of the guidance scale, [B, d], for a UNet that is conditioned on it."""
        dim = self._network.config.time_cond_proj_dim
        if dim is None:
            return {}
        embedding = guidance_embedding(guidance_scale, dim).expand(num_rows, dim)
        return {GUIDANCE: embedding.to(self.hardware.device, self._network.dtype)}

    def predict(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Output [B, C, H, W] of the UNet."""
        return self.call_network(latents, timestep, **self.network_arguments(condition.tensors))

    @classmethod
    def network_arguments(cls, inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        """The tensors of a condition as the UNet's forward pass takes them."""
        return dict(inputs)

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents [B, C, h, w] of images [B, 3, H, W] in [0, 1]: the mode of the autoencoder's posterior, scaled."""
        return self.decoder.in_slices(
            lambda part: self._vae.encode(part * 2 - 1).latent_dist.mode() * self._vae.config.scaling_factor,
            images,
            self.latent_shape,
        )


def guidance_embedding(guidance_scale: float, dim: int) -> Tensor:
    """Sinusoids [1, d] of `w = guidance_scale - 1` that a distilled UNet reads (Luo et al. 2023, section 4.1).

    In diffusers' order of operations: a thousand times w is an angle large enough for its rounding to be seen.
    """
    import torch

    half = dim // 2
    rate = torch.log(torch.tensor(10000.0)) / (half - 1)
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -rate)
    angles = (torch.tensor(guidance_scale - 1, dtype=torch.float32) * GUIDANCE_FACTOR)[None, None] * frequencies
    return torch.nn.functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def is_old_size(unet: Mapping[str, Any]) -> bool:
    """Whether diffusers' Stable Diffusion pipeline takes a UNet's `sample_size` for a mistake and uses 64 instead."""
    release = re.match(r"\D*0\.(\d+)", str(unet.get("_diffusers_version", "")))
    size = unet.get("sample_size")
    return release is not None and int(release[1]) < 9 and is_integer(size) and size < OLD_SAMPLE_SIZE


def pixels_per_latent(vae: Mapping[str, Any]) -> int:
    """Pixels of a side for each latent of an `AutoencoderKL`, by its configuration."""
    return int(2 ** (len(vae.get("block_out_channels", [64])) - 1))


def _with_remedy(problems: Iterator[str]) -> Iterator[str]:
    return (f"{problem}; {what_runs()}" for problem in problems)


def _guidance_embedding_problems(unet: dict[str, Any]) -> Iterator[str]:
    dim = unet.get("time_cond_proj_dim")
    # The sinusoids of two entries have no second frequency.
    if dim is not None and (not is_integer(dim) or dim < 4):
        yield f"unet/config.json has time_cond_proj_dim: {shown(dim)}, not the entries of an embedding; write 4 or more"


def _channel_problems(unet: dict[str, Any], vae: dict[str, Any]) -> Iterator[str]:
    latents, read, written = vae.get("latent_channels", 4), unet.get("in_channels", 4), unet.get("out_channels", 4)
    kinds = {9: "inpainting", 8: "instruct-pix2pix", 7: "an upscaler", 5: "depth2img"}
    if read != latents:
        kind = f" (as {kinds[read]} does)" if read in kinds and latents == 4 else ""
        yield f"unet/config.json has in_channels: {shown(read)}, the latents of the VAE have {shown(latents)}{kind}"
    elif written != read:
        more = f"the latents have {shown(read)}, so it predicts more than noise"
        yield f"unet/config.json has out_channels: {shown(written)}, {more}"
