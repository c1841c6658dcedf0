"""The interface of a family of latent diffusion pipelines.

A family is one subclass of `Pipeline` in one file, and one line in `registry.py`. Its class methods read configurations
alone: they run where a job is checked, so that a family's module imports torch, diffusers and transformers in functions
only. Its instances hold loaded parts and are what a worker samples with.
"""

from __future__ import annotations

import contextlib
import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from engine.errors import JobError
from engine.models.attention import head_sizes, xformers_problem
from engine.models.compilation import compiled
from engine.models.hardware import CHECKPOINTING_PIXELS, CPU_LATENT_PIXELS, CPU_ROWS, Hardware
from engine.models.loading import frozen

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from engine.job.spec import ConditioningSpec
    from engine.methods.sampling.denoiser import ClassifierFreeDenoiser, Condition
    from engine.methods.sampling.noise import NoiseStream
    from engine.methods.sampling.schedulers import Sampler
    from engine.methods.sampling.spec import SamplingSpec
    from engine.models.decoding import Decoder
    from engine.models.memory_model import Footprint
    from engine.models.pipelines.image_encoder import ImageEncoder
    from engine.models.pipelines.safety import SafetyChecker

# Share of a GPU's memory that the network's graph of a batch may take before activations are recomputed.
NETWORK_GRAPH_SHARE = 0.5
ChangeParts = Callable[[dict[str, Any]], None]
# Names of noise: of the first latents, and on image embeddings.
LATENTS, EMBEDDINGS = "latents", "embeddings"


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentSpace:
    """The latents of a pipeline, as far as another decoder must know them.

    Attributes:
        channels: of the latents.
        pixels_per_latent: pixels of a side for each latent.
        scaling_factor: by which the autoencoder's latents are multiplied before they are noised.
        shift_factor: what is subtracted from them before that.
    """

    channels: int
    pixels_per_latent: int
    scaling_factor: float
    shift_factor: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageConditioning:
    """Image embeddings that condition a batch next to its prompts.

    Attributes:
        embeds: [B, d], of the pipeline's own image encoder, of any precision.
        noise: of the batch by name, from `Pipeline.draw_noise`.
        noise_level: of the noise that is added to the embeddings.
    """

    embeds: Tensor
    noise: Mapping[str, Tensor]
    noise_level: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BareNetwork:
    """A network without weights, whose arithmetic and memory are counted: within `torch.device("meta")` it takes none.

    Attributes:
        module: of diffusers.
        inputs: what its forward pass takes next to latents and timestep, for a number of rows on a device.
    """

    module: Any
    inputs: Callable[[int, torch.device], Mapping[str, Any]]

    def __call__(self, latents: Tensor) -> Tensor:
        """Output [B, C', h, w] for latents [B, C, h, w], in the module's precision."""
        rows, device, dtype = len(latents), latents.device, self.module.dtype
        inputs = _in_precision(self.inputs(rows, device), dtype)
        time = latents.new_zeros(rows)
        output: Tensor = self.module(latents.to(dtype), timestep=time, return_dict=False, **inputs)[0]
        return output


def _in_precision(inputs: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Inputs, also nested ones, in the precision of a network; those that are left out as they are."""
    return {
        name: _in_precision(value, dtype) if isinstance(value, Mapping) else value if value is None else value.to(dtype)
        for name, value in inputs.items()
    }


class Pipeline(ABC):
    """A family of pipelines: its class methods check a folder, its instances sample.

    Args:
        network: what denoises: a UNet or a transformer of diffusers.
        vae: autoencoder of diffusers.
        hardware: where and how they run.
        folder: of the pipeline.
        safety_checker: flags images; None where there is none, or it is switched off.

    Attributes:
        class_name: the pipeline's class in diffusers.
        embedding_parts: the parts that decide the image embeddings which it is conditioned on; empty if it takes none.
        trained_part: the part that holds the network, which fine-tuning replaces; empty where it cannot be fine-tuned.
        begins_without_signal: whether the first latents are noise alone, in which no image is predicted to be guided.
        lora_prefixes: parts that LoRA weights may change, and how the names of these begin; none where it takes none.
        embedding_encoder: the text encoder whose words textual inversions add to those of `tokenizer`; empty where it
            takes none.
        decoder: of latents to images, for stored images and for guidance.
    """

    class_name: ClassVar[str]
    embedding_parts: ClassVar[tuple[str, ...]] = ()
    trained_part: ClassVar[str] = ""
    begins_without_signal: ClassVar[bool] = False
    lora_prefixes: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    embedding_encoder: ClassVar[str] = ""

    def __init__(
        self, *, network: Any, vae: Any, hardware: Hardware, folder: Path, safety_checker: SafetyChecker | None
    ) -> None:
        import torch

        from engine.models.decoding import Decoder

        self.hardware = hardware
        self.folder = folder
        self.safety_checker = safety_checker
        self._layout = torch.channels_last if hardware.channels_last else torch.contiguous_format
        self._network = frozen(network, hardware.device).to(memory_format=self._layout)
        self._vae = frozen(vae, hardware.device).to(memory_format=self._layout)
        self.decoder: Decoder = Decoder(self._vae, hardware)
        self._footprint: Footprint | None = None
        self._size: tuple[int, int] | None = None
        self._configure()

    # From configurations alone, without torch.

    @classmethod
    @abstractmethod
    def check(cls, folder: Path, address: str, *, checks_safety: bool) -> None:
        """Check that a folder of this class is sampled here as diffusers samples it.

        Args:
            checks_safety: whether its safety checker is to be loaded, where it has one.

        Raises:
            JobError: naming part, option and value, with the remedy.
        """

    @classmethod
    @abstractmethod
    def sampling_problems(cls, folder: Path, spec: SamplingSpec, *, is_guided: bool) -> list[str]:
        """What is impossible about a job's sampling with a folder that `check` lets through.

        Args:
            is_guided: whether a method moves the latents.

        Returns:
            Lines that go on after `sampling`: `.scheduler: ...`, or `: ...` where no field alone is at fault.
        """

    @classmethod
    def conditioning_problems(cls, folder: Path, address: str, spec: ConditioningSpec | None) -> list[str]:
        """What is impossible about a request's `conditioning`; lines that go on after that word."""
        if spec is None:
            return []
        return [
            f": '{address}' has no image embeddings to condition on; name a Stable unCLIP pipeline in `diffusion`, or"
            " leave conditioning out"
        ]

    @classmethod
    @abstractmethod
    def latent_space(cls, folder: Path) -> LatentSpace:
        """The latents of a folder that `check` lets through."""

    @classmethod
    @abstractmethod
    def image_size(cls, folder: Path) -> tuple[int, int]:
        """Height and width of the images of a folder that `check` lets through, in pixels."""

    @classmethod
    def size_factor(cls, folder: Path) -> int:
        """Pixels that the sides of an image must be multiples of, of a folder that `check` lets through."""
        return cls.latent_space(folder).pixels_per_latent

    @classmethod
    def size_problems(cls, folder: Path, spec: SamplingSpec) -> list[str]:
        """Sides of an image that the model cannot have; lines that go on after `sampling`."""
        if spec.height is spec.width is None:
            return []
        factor, own = cls.size_factor(folder), cls.image_size(folder)
        return [
            f".{side}: {value} is not a multiple of {factor}, the pixels of a side for each latent or patch; use"
            f" {max(1, round(value / factor)) * factor}, or leave it out for the model's own {default}"
            for side, value, default in zip(("height", "width"), (spec.height, spec.width), own, strict=True)
            if value is not None and value % factor
        ]

    @classmethod
    def num_noise_levels(cls, folder: Path) -> int:
        """Levels of the noise on image embeddings of a folder that `check` lets through; 0 if it takes none."""
        return 0

    @classmethod
    def embeds_guidance(cls, folder: Path) -> bool:
        """Whether the network takes the guidance scale as an input, in place of two halves; see `guidance_inputs`."""
        return False

    @classmethod
    def bare_network(cls, folder: Path) -> BareNetwork | None:
        """The network of a folder without its weights, on torch's default device; None where it is not counted."""
        return None

    @classmethod
    def training_problem(cls, folder: Path) -> str:
        """Why a folder that `check` lets through cannot be fine-tuned, as a predicate with the remedy; else empty."""
        if cls.trained_part:
            return ""
        return f"is a {cls.class_name}, which can be sampled but not fine-tuned here; give a Stable Diffusion pipeline"

    # Loading.

    @classmethod
    def load(cls, folder: Path, hardware: Hardware, *, checks_safety: bool, change: ChangeParts | None = None) -> Self:
        """Load a folder that `check` lets through, from safetensors.

        Args:
            change: changes the parts that were loaded, by their names, before they are put together.

        Raises:
            ValueError: weights are missing; or what the libraries raise on a broken file.
        """
        parts = cls.load_parts(folder, hardware, checks_safety=checks_safety)
        if change is not None:
            change(parts)
        return cls(**parts)

    @classmethod
    @abstractmethod
    def load_parts(cls, folder: Path, hardware: Hardware, *, checks_safety: bool) -> dict[str, Any]:
        """The arguments of the constructor, from a folder: parts by their names, but for `network`."""

    @classmethod
    def load_image_encoder(cls, folder: Path, device: str) -> ImageEncoder:
        """Load what makes the image embeddings that the pipeline is conditioned on.

        Raises:
            JobError: it is conditioned on none.
        """
        raise JobError(f"'{folder}' is a {cls.class_name}, which has no image embeddings to condition on")

    @property
    def network(self) -> Any:
        """What denoises, for fine-tuning; `predict` calls it."""
        return self._network

    # Sampling.

    @property
    @abstractmethod
    def own_latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a sample's latents in the model's own size."""

    @property
    @abstractmethod
    def own_image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a decoded image in the model's own size."""

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a sample's latents."""
        channels, height, width = self.own_latent_shape
        if self._size is None:
            return channels, height, width
        _, image_height, image_width = self.own_image_shape
        return channels, height * self._size[0] // image_height, width * self._size[1] // image_width

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a decoded image."""
        return self.own_image_shape if self._size is None else (self.own_image_shape[0], *self._size)

    def in_size(self, spec: SamplingSpec) -> Self:
        """The same parts for images of another size; this pipeline itself where a job leaves the size to it."""
        own = self.own_image_shape[1:]
        size = spec.image_size((own[0], own[1]))
        if size == own:
            return self
        sized = copy.copy(self)
        sized._size, sized._footprint = size, None
        sized._recompute_large()
        return sized

    @property
    def noise_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The noise of a sample by name, in the order in which its generator draws it."""
        return {LATENTS: self.latent_shape}

    @property
    def rows(self) -> int | None:
        """Rows of every model call on a CPU, whatever the batch; None on a GPU, where the batch decides."""
        return self._rows(self.latent_shape) if self.hardware.is_cpu else None

    @staticmethod
    def _rows(latent_shape: tuple[int, int, int]) -> int:
        _, height, width = latent_shape
        return max(1, min(CPU_ROWS, CPU_LATENT_PIXELS // (height * width)))

    @property
    def takes_fewer_rows(self) -> bool:
        """Whether calls of fewer than `rows` can be given the kernels of whole ones: see `make_steady`."""
        # Other kernels are given to the parts by their own size alone, whatever sizes a worker meets first.
        return self.rows == self._rows(self.own_latent_shape) == CPU_ROWS and not self.hardware.compile

    def make_steady(self) -> None:
        """Let calls of fewer than `rows` take the kernels of whole ones, where they can be given them.

        Side effects: as those of `engine.models.steady.make_steady`.
        """
        from engine.models.steady import make_steady

        if self.takes_fewer_rows:
            make_steady(self._network)
            make_steady(self._vae)

    def noise_stream(self, seeds: Sequence[int]) -> NoiseStream:
        """The noise of a batch; of each sample a function of its seed alone.

        Args:
            seeds: one per sample, non-negative, below 2^63.
        """
        from engine.methods.sampling.noise import NoiseStream

        return NoiseStream(seeds, self.hardware.device)

    def first_noise(self, stream: NoiseStream) -> dict[str, Tensor]:
        """Standard normal noise [B, ...] by name, which a fresh stream gives before that of the steps."""
        return {name: stream.draw(shape) for name, shape in self.noise_shapes.items()}

    def draw_noise(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """The same of samples whose steps draw none."""
        return self.first_noise(self.noise_stream(seeds))

    @abstractmethod
    def sampler(self, spec: SamplingSpec, noise: NoiseStream | None = None) -> Sampler:
        """A fresh sampler, for one batch.

        Args:
            noise: of the batch, after `first_noise`, for a scheduler that draws noise at its steps.

        Raises:
            ValueError: the combination is impossible with this model.
        """

    @abstractmethod
    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that a text encoder would cut off without notice.

        Raises:
            JobError: naming the first prompt that is too long.
        """

    @abstractmethod
    def encode(self, prompts: Sequence[str]) -> Condition:
        """The inputs of the network that B prompts give.

        Raises:
            JobError: a prompt is too long.
        """

    def conditions(
        self, prompts: Sequence[str], negative_prompt: str, images: ImageConditioning | None
    ) -> tuple[Condition, Condition]:
        """The conditional and the unconditional half of classifier-free guidance for a batch.

        Args:
            prompts: B of them.
            negative_prompt: of the unconditional half.
            images: image embeddings, for a family with `embedding_parts`.
        """
        if images is not None:
            raise ValueError(f"a {self.class_name} is not conditioned on image embeddings")
        return self.encode(prompts), self.encode([negative_prompt] * len(prompts))

    def denoiser(
        self, prompts: Sequence[str], spec: SamplingSpec, sampler: Sampler, images: ImageConditioning | None = None
    ) -> ClassifierFreeDenoiser:
        """A denoiser for a batch of prompts.

        Args:
            sampler: knows what the network predicts.
            images: image embeddings, for a family with `embedding_parts`.
        """
        from engine.methods.sampling.denoiser import ClassifierFreeDenoiser, Condition

        conditional, unconditional = self.conditions(prompts, spec.negative_prompt, images)
        scale = spec.guidance_scale
        if inputs := self.guidance_inputs(scale, len(prompts)):
            # The network itself guides: there is no unconditional half.
            conditional = unconditional = Condition({**conditional.tensors, **inputs})
            scale = 1.0
        return ClassifierFreeDenoiser(
            self.predict,
            conditional=conditional,
            unconditional=unconditional,
            prediction=sampler.prediction,
            guidance_scale=scale,
            guidance_rescale=spec.guidance_rescale,
        )

    def guidance_inputs(self, guidance_scale: float, num_rows: int) -> Mapping[str, Tensor]:
        """Inputs of the network [B, ...] by name that tell it the guidance scale; none where it does not take that."""
        return {}

    @abstractmethod
    def predict(self, latents: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """Output [B, C, H, W] of the network, in its precision; differentiable in the latents [B, C, H, W]."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents [B, C, h, w] of images [B, 3, H, W] in [0, 1], as the network denoises them; nothing is drawn."""

    def decode(self, latents: Tensor) -> Tensor:
        """Images [B, 3, H, W], nominally in [0, 1] and not clamped, of latents [B, C, h, w]; differentiable."""
        return self.decoder.decode(latents)

    def call_network(self, latents: Tensor, timestep: Tensor, **inputs: Any) -> Tensor:
        """The network's output for latents [B, C, H, W] in its precision and layout.

        Side effects: the first call on a GPU decides whether activations are recomputed, where that is `auto`.

        Args:
            inputs: what else its forward pass takes.
        """
        import torch

        from engine.methods.guidance.slices import even_slices
        from engine.models.memory_model import MAX_ELEMENTS, rows_of

        # Compiled code with a backward pass has open bugs: what is differentiated stays as it is.
        network = self._network if torch.is_grad_enabled() or self._is_plain else self._fast_network
        latents = latents.to(dtype=self._network.dtype, memory_format=self._layout)
        if self.hardware.is_cpu:
            output: Tensor = network(latents, timestep=timestep, return_dict=False, **inputs)[0]
            return output
        rows, most = len(latents), self._measured(latents, timestep, inputs).rows_below(MAX_ELEMENTS)
        outputs = [
            network(latents[part], return_dict=False, **rows_of({"timestep": timestep, **inputs}, rows, part))[0]
            for part in even_slices(rows, most)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _measured(self, latents: Tensor, timestep: Tensor, inputs: Mapping[str, Any]) -> Footprint:
        """What the network takes for a row; measured at the first call, whose inputs have the shapes of all."""
        from engine.models.memory_model import device_memory, network_footprint

        if self._footprint is None:
            # Only flash attention is deterministic, which has no form in single precision.
            is_fused = not (self.hardware.deterministic and self.hardware.dtype == "float32")
            self._footprint = network_footprint(self._network, latents, timestep, inputs, is_fused=is_fused)
            fitting = self._footprint.rows_within(NETWORK_GRAPH_SHARE * device_memory(self.hardware))
            if self.hardware.gradient_checkpointing == "auto" and fitting < self.hardware.batch_size:
                self._network.enable_gradient_checkpointing()
        return self._footprint

    @contextlib.contextmanager
    def uncompiled(self) -> Iterator[None]:
        """Within it nothing is compiled: a shape that comes once is not worth it."""
        self._is_plain = True
        try:
            yield
        finally:
            self._is_plain = False

    def _configure(self) -> None:
        """Attention kernels, recomputation of activations, compilation: as `runtime` asks for them."""
        if self.hardware.attention != "sdpa":
            self._use_xformers()
        self._recompute_large()
        self._fast_network = compiled(self._network) if self.hardware.compile else self._network
        self._is_plain = False

    def _recompute_large(self) -> None:
        """Recompute activations where the job asks for it, or the images are large and nothing is measured."""
        wanted, is_large = self.hardware.gradient_checkpointing, max(self.image_shape[1:]) > CHECKPOINTING_PIXELS
        # On a GPU `auto` goes by what is measured: see `_measured` and `Decoder.decoding`.
        if wanted == "on" or (wanted == "auto" and self.hardware.is_cpu and is_large):
            self._network.enable_gradient_checkpointing()
            self._vae.enable_gradient_checkpointing()

    def _use_xformers(self) -> None:
        """xformers' attention in the network, and in the VAE where xformers can differentiate its head size.

        Raises:
            JobError: not in the network, and the job asks for it.
        """
        if problem := xformers_problem(head_sizes(self._network), self.hardware.dtype, self.hardware.device):
            if self.hardware.attention == "auto":
                return
            raise JobError(f"runtime.attention: 'xformers' cannot run here ({problem}); use auto or sdpa")
        self._network.enable_xformers_memory_efficient_attention()
        if not xformers_problem(head_sizes(self._vae), "float32", self.hardware.device):
            self._vae.enable_xformers_memory_efficient_attention()
