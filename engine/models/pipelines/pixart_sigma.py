"""PixArt-Sigma: a transformer that reads T5 alone, with its mask, and predicts a variance beside the noise.

The schedulers are those of Stable Diffusion. As diffusers does without its optional cleaning of captions, prompts are
read in lower case (Chen et al. 2024).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from engine.errors import JobError
from engine.methods.config_values import is_integer, shown
from engine.methods.sampling.families import ModelScheduler
from engine.methods.sampling.sampling_checks import sampling_problems
from engine.methods.sampling.training_checks import training_problems
from engine.models.configurations import part_classes, read_config, reading_configuration
from engine.models.hardware import Hardware
from engine.models.loading import frozen
from engine.models.pipelines.base import BareNetwork, LatentSpace, Pipeline
from engine.models.pipelines.checks import (
    Classes,
    Options,
    adapter_problem,
    class_problems,
    option_problems,
    part_problem,
    quantisation_problems,
    vae_problems,
)
from engine.models.pipelines.parts import load_part
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

# The mask of the tokens, as diffusers names it.
MASK = "encoder_attention_mask"
# `max_sequence_length` of diffusers' pipeline.
NUM_TOKENS = 300
_TRANSFORMER = "transformer"
# Defaults of diffusers' transformer.
_DEFAULTS: dict[str, Any] = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 4,
    "out_channels": 8,
    "use_additional_conditions": None,
    "caption_channels": None,
}
_OPTIONS: Options = (
    ("attention_type", ("default", None), "it takes the places of objects"),
    ("norm_type", ("ada_norm_single",), "no PixArt of diffusers has it"),
)


class PixArtSigma(Pipeline):
    """Pipelines of diffusers' class `PixArtSigmaPipeline`."""

    class_name = "PixArtSigmaPipeline"
    required: ClassVar[Classes] = {
        _TRANSFORMER: ("PixArtTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": T5_ENCODERS,
        "tokenizer": T5_TOKENIZERS,
    }

    def __init__(self, *, text_encoder: Any, tokenizer: Any, scheduler: ModelScheduler, **parts: Any) -> None:
        from engine.models.pipelines.prompts import PromptEncoder

        super().__init__(safety_checker=None, **parts)
        self._scheduler = scheduler
        encoder = frozen(text_encoder, self.hardware.device)

        def embed(tokens: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
            assert mask is not None
            return {TEXT: encoder(tokens, attention_mask=mask)[0], MASK: mask}

        self._prompts = PromptEncoder(
            tokenizer,
            embed,
            device=self.hardware.device,
            uses_mask=True,
            num_tokens=NUM_TOKENS,
            max_embeddings=T5_EMBEDDINGS,
        )

    @classmethod
    def check(cls, folder: Path, address: str, *, checks_safety: bool) -> None:
        """Check parts, files and options by their configurations; see `Pipeline.check`."""
        with reading_configuration(address):
            problem = part_problem(folder, cls.required, {}, checks_safety=checks_safety)
            if problem := problem or adapter_problem(folder) or tokenizer_file_problem(folder, "tokenizer"):
                raise JobError(f"'{address}' {problem}; {what_runs()}")
            if problems := list(cls.configuration_problems(folder)):
                raise JobError([f"'{address}': {problem}" for problem in problems])

    @classmethod
    def configuration_problems(cls, folder: Path) -> Iterator[str]:
        """Options of the parts that nothing here would act on, or that do not fit together; a line each."""
        transformer, vae = _transformer(folder), read_config(folder / "vae" / "config.json")
        for name, config in ((_TRANSFORMER, transformer), ("vae", vae)):
            yield from class_problems(name, config, cls.required[name][0])
        for name in (_TRANSFORMER, "vae", "text_encoder"):
            yield from quantisation_problems(name, read_config(folder / name / "config.json"))
        yield from option_problems(_TRANSFORMER, transformer, _OPTIONS)
        yield from vae_problems(vae)
        yield from _transformer_problems(transformer, vae)
        yield from t5_problems(folder, "text_encoder", "tokenizer", "caption_channels", transformer["caption_channels"])
        yield from training_problems(cls.read_scheduler(folder))

    @classmethod
    def sampling_problems(cls, folder: Path, spec: SamplingSpec, *, is_guided: bool) -> list[str]:
        """What is impossible about a job's sampling; see `Pipeline.sampling_problems`."""
        return sampling_problems(cls.read_scheduler(folder), spec, is_guided=is_guided)

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
    def bare_network(cls, folder: Path) -> BareNetwork:
        """The transformer; see `Pipeline.bare_network`."""
        import torch
        from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

        config = _transformer(folder)
        transformer = PixArtTransformer2DModel.from_config(config).requires_grad_(False).eval()

        def inputs(rows: int, device: torch.device) -> Mapping[str, Any]:
            text = torch.zeros(rows, NUM_TOKENS, config["caption_channels"], device=device)
            mask = torch.ones(rows, NUM_TOKENS, device=device)
            return {TEXT: text, MASK: mask, "added_cond_kwargs": _no_conditions()}

        return BareNetwork(module=transformer, inputs=inputs)

    @classmethod
    def load_parts(cls, folder: Path, hardware: Hardware, *, checks_safety: bool) -> dict[str, Any]:
        """The arguments of the constructor, from a folder."""
        import torch
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
        from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel

        dtype = getattr(torch, hardware.dtype)
        encoder, tokenizer = load_t5(folder, "text_encoder", "tokenizer", dtype)
        return {
            "network": load_part(PixArtTransformer2DModel, folder / _TRANSFORMER, torch_dtype=dtype),
            # The decoder stays in float32: in half precision some overflow, and gradients below 1e-7 vanish.
            "vae": load_part(AutoencoderKL, folder / "vae", torch_dtype=torch.float32),
            "text_encoder": encoder,
            "tokenizer": tokenizer,
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
        from engine.methods.sampling.schedulers import make_sampler

        return make_sampler(spec, self._scheduler, self.hardware.device, noise)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that are too long; see `Pipeline.check_prompts`."""
        self._prompts.check(_read(prompts))

    def encode(self, prompts: Sequence[str]) -> Condition:
        """Text embeddings [B, 300, width], and the mask of their tokens [B, 300]."""
        return self._prompts.encode(_read(prompts))

    def predict(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """The noise [B, C, H, W] that the transformer predicts, without the variance."""
        output = self.call_network(
            latents, timestep.expand(len(latents)), **condition.tensors, added_cond_kwargs=_no_conditions()
        )
        return output[:, : latents.shape[1]]

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents [B, C, h, w] of images [B, 3, H, W] in [0, 1]: the mode of the autoencoder's posterior, scaled."""
        return self.decoder.in_slices(
            lambda part: self._vae.encode(part * 2 - 1).latent_dist.mode() * self._vae.config.scaling_factor,
            images,
            self.latent_shape,
        )


def _read(prompts: Sequence[str]) -> list[str]:
    """Prompts as diffusers' pipeline gives them to the tokenizer."""
    return [prompt.lower().strip() for prompt in prompts]


def _no_conditions() -> dict[str, None]:
    """Resolution and aspect ratio, which PixArt-Alpha takes and this transformer ignores."""
    return {"resolution": None, "aspect_ratio": None}


def _transformer(folder: Path) -> dict[str, Any]:
    """The configuration of the transformer, with diffusers' defaults for what it leaves out."""
    return _DEFAULTS | read_config(folder / _TRANSFORMER / "config.json")


def _transformer_problems(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Iterator[str]:
    latents, read = vae.get("latent_channels", 4), transformer["in_channels"]
    written = read if transformer["out_channels"] is None else transformer["out_channels"]
    if read != latents or written not in (read, 2 * read):
        yield (
            f"transformer/config.json has in_channels: {shown(read)} and out_channels: {shown(written)}, the latents of"
            f" the VAE have {shown(latents)}; {what_runs()}"
        )
    size, patch = transformer["sample_size"], transformer["patch_size"]
    if not all(is_integer(value) and value > 0 for value in (size, patch)) or size % patch:
        yield (
            f"transformer/config.json has sample_size: {shown(size)} and patch_size: {shown(patch)}, so the size of an"
            " image is not known; sample_size is the side of an image in latents, a multiple of patch_size"
        )
    asked = transformer["use_additional_conditions"]
    if asked or (asked is None and size == _DEFAULTS["sample_size"]):
        yield (
            f"transformer/config.json has use_additional_conditions: {shown(asked)}, so it takes resolution and aspect"
            " ratio, as PixArt-Alpha does"
        )
