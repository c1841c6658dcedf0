"""The programs behind the arms: diffusers' pipeline, the published loops, the engine's generator and its parts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LMSDiscreteScheduler,
    StableDiffusionPipeline,
    StableUnCLIPImg2ImgPipeline,
)
from torch import Tensor

from bench.arms import METHODS, Arm, Family
from bench.naive import PAPER_ELEMENTS, RISKY_COLUMNS, Naive, sample_boundary, sample_risky
from bench.sizes import Setting
from engine.generation.conditioner import conditioning_digests, open_conditioner
from engine.generation.generator import Generator
from engine.generation.given_images import CheckedImages
from engine.generation.guidance import RequestGuides
from engine.generation.scorer import Scorer
from engine.job.parsing import parse_job
from engine.job.plan import Plan, RequestPlan, SampleSpec, build_plan, class_prompt
from engine.methods.boundary.guide import rule_of
from engine.methods.boundary.spec import BoundaryGuidanceSpec
from engine.methods.conditioning.screening import ScreenedDraw
from engine.methods.guidance.guided import ConditionalDenoiser, GuidedDenoiser
from engine.methods.guidance.rules import shifting
from engine.methods.registry import method_of
from engine.methods.sampling.denoiser import Denoiser, Prediction, Step
from engine.methods.sampling.loop import sample
from engine.methods.sampling.noise import draw_noise
from engine.methods.scores import kldb
from engine.models.addresses import resolve
from engine.models.classifier import Classifier
from engine.models.clip import Clip
from engine.models.decoding import EXACT
from engine.models.diffusion import load_pipeline
from engine.models.hardware import choose_hardware
from engine.models.kernels import fix_kernels
from engine.models.labels import read_labels
from engine.models.pipelines.base import LATENTS, ImageConditioning, Pipeline

# What a job says of its scheduler's timesteps, by diffusers' names.
SPACING = ("timestep_spacing", "use_karras_sigmas")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Samples that every arm of a family makes.

    Attributes:
        specs: what decides each sample.
        draws: the image embedding of each, for Stable unCLIP; else empty.
    """

    specs: tuple[SampleSpec, ...]
    draws: tuple[ScreenedDraw, ...] = ()

    def __len__(self) -> int:
        return len(self.specs)

    @property
    def seeds(self) -> list[int]:
        """One a sample."""
        return [spec.seed for spec in self.specs]

    def part(self, start: int, stop: int) -> Batch:
        """Some of the samples."""
        return Batch(specs=self.specs[start:stop], draws=self.draws[start:stop])


class Bench:
    """A group of arms on one runtime. Models are loaded when an arm needs them.

    Args:
        setting: the models and the samples.
        arms: of one group.
        device: `cpu` or `cuda`.
        num_samples: samples that an arm makes.
        runtime: in place of that of the arms.
        raw: a job of these models whose requests stand for the first arms, in place of one made for them.

    Raises:
        JobError: the machine lacks what the runtime asks for.
    """

    def __init__(
        self,
        setting: Setting,
        arms: Sequence[Arm],
        *,
        device: str,
        num_samples: int,
        runtime: dict[str, Any] | None = None,
        raw: dict[str, Any] | None = None,
    ) -> None:
        self.setting, self.arms, self.device = setting, list(arms), device
        self.family: Family = arms[0].family
        self.address = setting.pipeline_of(self.family)
        raw = raw or raw_job(setting, self.arms, num_samples)
        self._sampling: dict[str, Any] = raw["sampling"]
        self.job = parse_job(raw | {"runtime": {"device": device} | (arms[0].runtime if runtime is None else runtime)})
        self.hardware = choose_hardware(self.job.runtime)
        self.labels = read_labels(setting.target) or []
        # Bytes of a GPU's memory by program, noted when its models are loaded.
        self.weights: dict[str, int] = {}
        addresses = [one.artefact or one.images or "" for request in self.job.requests if (one := request.conditioning)]
        self._digests = dict.fromkeys(addresses, "")
        if addresses:
            requests = self._plan().requests
            self._digests = conditioning_digests(
                self.job, requests, CheckedImages(self.labels, _ignore, _ignore), _ignore
            )
        self.plan = self._plan()

    def _plan(self) -> Plan:
        # Contents of models are not looked at: nothing is stored that their digests would identify.
        models = {"clip": "", "target": "", "transfer": [], "oracle": "", "diffusion": {self.address: ""}}
        return build_plan(self.job, self.labels, models | {"conditioning": self._digests})

    @cached_property
    def generator(self) -> Generator:
        """The engine's, with all models of the job."""
        return Generator(self.job, self.plan)

    @cached_property
    def diffusion(self) -> Pipeline:
        """The engine's pipeline by itself."""
        return load_pipeline(self.address, self.hardware)

    @cached_property
    def target(self) -> Classifier:
        """The classifier by itself."""
        return Classifier.load(self.setting.target, self.device)

    @cached_property
    def transfer(self) -> Classifier | None:
        """A classifier that guides nothing."""
        return Classifier.load(self.setting.transfer, self.device) if self.setting.transfer else None

    @cached_property
    def clip(self) -> Clip:
        """CLIP by itself."""
        return Clip.load(self.setting.clip, self.device)

    @cached_property
    def guides(self) -> RequestGuides:
        """What guidance knows of target and CLIP."""
        return RequestGuides(self.job, self.plan, Scorer(self.target, self.clip), self.device)

    @cached_property
    def plain(self) -> Any:
        """diffusers' pipeline, as its users load it."""
        dtype = getattr(torch, self.hardware.dtype)
        return load_diffusers_pipeline(self.address, self.family, dtype, self._sampling).to(self.device)

    @cached_property
    def naive(self) -> Naive:
        """A pipeline with its decoder in float32, as gradients need it."""
        vae = AutoencoderKL.from_pretrained(resolve(self.address) / "vae", torch_dtype=torch.float32)
        return Naive(pipeline=self.plain, vae=vae.requires_grad_(False).to(self.device), device=self.device)

    def load(self, arm: Arm) -> None:
        """Load the models of an arm, which the first use would do."""
        needed = {
            "engine": ("generator",),
            "plain": ("plain",),
            "published": ("naive", "target", "clip"),
            "parts": ("diffusion", "target", "clip"),
        }
        for name in needed[arm.program]:
            getattr(self, name)
        # The engine does so for its process when it loads. For all programs alike, and not as another bench left it.
        fix_kernels(self.hardware)

    def batch_size(self, arm: Arm, rows: int) -> int:
        """Samples of a call: those of the published loop, or `rows`."""
        published = 1 if self.family == "boundary" else RISKY_COLUMNS
        return published if arm.program == "published" else rows

    def request_of(self, arm: Arm) -> RequestPlan:
        """The request of the job that stands for an arm."""
        return self.plan.requests[next(place for place, one in enumerate(self.arms) if one.name == arm.name)]

    def batch(self, num_samples: int) -> Batch:
        """The first samples, with their embeddings; the same for every arm."""
        request = self.plan.requests[0]
        specs = tuple(request.sample(position) for position in range(num_samples))
        if request.spec.conditioning is None:
            return Batch(specs=specs)
        digest = next(iter(self._digests.values()))
        conditioner = open_conditioner(request, self.address, self.labels, self.device, digest)
        return Batch(specs=specs, draws=tuple(conditioner.draw(spec) for spec in specs))

    def images(self, arm: Arm, batch: Batch) -> Tensor:
        """Images [B, 3, H, W] of an arm, nominally in [0, 1]."""
        if arm.program == "engine":
            return self.generator.sample(self.request_of(arm).number, batch.specs, batch.draws)[0]
        if arm.program == "plain":
            return self._plain_images(batch)
        with torch.no_grad():
            if arm.program == "parts":
                return self.diffusion.decode(self.latents(arm, batch))
            return self.naive.decode(self.published(arm, batch))

    def latents(self, arm: Arm, batch: Batch) -> Tensor:
        """Clean latents [B, C, h, w] of an arm by the engine's parts."""
        return self.trajectory(arm, batch)[-1]

    def trajectory(self, arm: Arm, batch: Batch) -> list[Tensor]:
        """Latents [B, C, h, w] after every step of an arm, by the engine's loop and guidance around its denoiser."""
        model, sampler, images = self.diffusion, self.diffusion.sampler(self.job.sampling), None
        noise = model.draw_noise(batch.seeds)
        if batch.draws:
            images = ImageConditioning(embeds=self._embeds(batch), noise=noise, noise_level=0)
        denoiser = model.denoiser([spec.prompt for spec in batch.specs], self.job.sampling, sampler, images)
        entered: list[Tensor] = []
        guided = denoiser if arm.guidance is None else self._guided(denoiser, arm, batch)
        clean = sample(_recording(guided, entered), sampler, noise[LATENTS])
        return [*entered[1:], clean]

    def gradients(self, arm: Arm, batch: Batch, place: int, precision: str = EXACT) -> Callable[[], Tensor]:
        """What computes the gradients [K, B, C, h, w] of an arm's criteria in the latents, at pure noise of a step.

        Args:
            place: of the step, from 0.
            precision: of the decoder: the name of a torch type.

        Returns:
            A function whose calls cost the gradients alone: the network's prediction is there already.
        """
        fix_kernels(self.hardware)
        model, sampler = self.diffusion, self.diffusion.sampler(self.job.sampling)
        denoiser = model.denoiser([spec.prompt for spec in batch.specs], self.job.sampling, sampler)
        guided, step = self._guided(denoiser, arm, batch, precision), list(sampler.steps())[place]
        latents = model.draw_noise(batch.seeds)[LATENTS] * math.hypot(step.scale, step.sigma)
        prediction = guided.predict(latents, step)
        return lambda: guided.gradients(prediction, step)[1]

    def published(self, arm: Arm, batch: Batch, trace: list[Tensor] | None = None) -> Tensor:
        """Clean latents [B, C, h, w] of the samples of one call of a published loop.

        Args:
            trace: takes the latents after every step.
        """
        guidance, sampling = arm.guidance or {}, self.job.sampling
        given: dict[str, Any] = {
            "num_steps": sampling.num_inference_steps,
            "guidance_scale": sampling.guidance_scale,
            "trace": trace,
        }
        if self.family == "boundary":
            (spec,) = batch.specs
            return sample_boundary(
                self.naive,
                self.target.logits,
                prompt=spec.prompt,
                seed=spec.seed,
                classes=spec.cell.classes,
                guidance_rescale=sampling.guidance_rescale,
                step=guidance["step"],
                alpha=guidance["alpha"],
                every=guidance["every"],
                through_unet=guidance["gradient"] == "unet",
                **given,
            )
        text = self.clip.text_embeds([class_prompt(spec.cell.names[0]) for spec in batch.specs]).to(self.device)
        # The engine's scale means the same at any size of the latents; the published one is for 4 x 64 x 64.
        rescaled = math.sqrt(math.prod(self.naive.latent_shape) / PAPER_ELEMENTS)
        return sample_risky(
            self.naive,
            self.target.logits,
            lambda image, row: (self.clip.embeds_of_tensor(image) * text[row]).sum(-1),
            prompts=[spec.prompt for spec in batch.specs],
            seeds=batch.seeds,
            labels=[spec.cell.classes[0] for spec in batch.specs],
            embeddings=[draw.embedding for draw in batch.draws],
            s=guidance["scale"] * rescaled,
            weight=guidance["conformity_weight"],
            **given,
        )

    def _plain_images(self, batch: Batch) -> Tensor:
        unet, prompts = self.plain.unet, [spec.prompt for spec in batch.specs]
        shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
        options: dict[str, Any] = {
            "num_inference_steps": self.job.sampling.num_inference_steps,
            "guidance_scale": self.job.sampling.guidance_scale,
            "output_type": "pt",
        }
        # In half precision diffusers would draw other noise, so that of the latents is given.
        if not batch.draws:
            latents = draw_noise(batch.seeds, shape, device=self.device)[0].to(unet.dtype)
            options |= {"guidance_rescale": self.job.sampling.guidance_rescale}
            return self.plain(prompts, latents=latents, **options).images
        embeds = self._embeds(batch)
        latents = draw_noise(batch.seeds, (embeds.shape[1],), shape, device=self.device)[1].to(unet.dtype)
        options |= {"generator": [torch.Generator().manual_seed(seed) for seed in batch.seeds]}
        return self.plain(prompt=prompts, image_embeds=embeds.to(unet.dtype), latents=latents, **options).images

    def _embeds(self, batch: Batch) -> Tensor:
        return torch.stack([draw.embedding for draw in batch.draws]).to(self.device)

    def _guided(self, denoiser: ConditionalDenoiser, arm: Arm, batch: Batch, precision: str = EXACT) -> GuidedDenoiser:
        spec = self.job.parameters_of(self.request_of(arm).spec)
        decoding = self.diffusion.decoder.decoding(self.diffusion.latent_shape, precision)
        scene = self.guides.scene([one.cell.classes for one in batch.specs], decoding)
        if not (arm.program == "parts" and isinstance(spec, BoundaryGuidanceSpec)):
            return method_of(METHODS[self.family]).load_guide()(denoiser, spec, scene)
        return GuidedDenoiser(
            denoiser,
            criteria=lambda images, rows: kldb(rows.logits(images), rows.classes[0])[None],
            scene=scene,
            update=shifting(rule_of(spec)),
            is_guided=lambda step: spec.is_guided(step.index, step.total),
            source="combined",
        )


def raw_job(setting: Setting, arms: Sequence[Arm], num_samples: int) -> dict[str, Any]:
    """The job of a group of arms: a request an arm, all from the same noise."""
    family = arms[0].family
    boundary, method = family == "boundary", METHODS[family]
    models = {"diffusion": setting.pipeline_of(family), "clip": setting.clip}
    models |= {"target": setting.target} | ({"guidance_decoder": setting.tiny} if arms[0].tiny else {})
    what: dict[str, Any] = {"boundary": setting.boundary} if boundary else {"classes": setting.classes}
    conditioning = {"conditioning": setting.conditioning} if family == "risky" else {}
    return {
        "name": "bench",
        "models": models,
        "requests": [
            {
                "name": f"arm-{place}",
                "method": "prompt" if arm.guidance is None else method,
                "count": num_samples if boundary else -(-num_samples // len(setting.classes)),
                "seed_group": "bench",
                "guidance": {} if arm.guidance is None else {method: arm.guidance},
                **what,
                **conditioning,
            }
            for place, arm in enumerate(arms)
        ],
        "sampling": setting.sampling_of(family),
        "output": {"uri": "runs/bench"},
    }


def load_diffusers_pipeline(address: str, family: Family, dtype: torch.dtype, sampling: dict[str, Any]) -> Any:
    """diffusers' pipeline of a family, with the scheduler that the papers use with it.

    Args:
        sampling: of the job; how it spaces the timesteps is the scheduler's.
    """
    kinds = {
        "boundary": (StableDiffusionPipeline, LMSDiscreteScheduler),
        "risky": (StableUnCLIPImg2ImgPipeline, DDIMScheduler),
    }
    kind, scheduler = kinds[family]
    options: dict[str, Any] = {"safety_checker": None} if family == "boundary" else {}
    pipeline = kind.from_pretrained(resolve(address), torch_dtype=dtype, use_safetensors=True, **options)
    extra = {name: sampling[name] for name in SPACING if name in sampling}
    extra |= {"clip_sample": False} if family == "risky" else {}
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config, steps_offset=1, **extra)
    pipeline.set_progress_bar_config(disable=True)
    for part in ("unet", "vae", "text_encoder"):
        getattr(pipeline, part).requires_grad_(False)
    return pipeline


def _recording(denoiser: Denoiser, entered: list[Tensor]) -> Denoiser:
    """A denoiser that notes the latents that every step begins with."""

    def denoise(latents: Tensor, step: Step) -> Prediction:
        entered.append(latents.detach())
        return denoiser(latents, step)

    return denoise


def _ignore(*messages: object) -> None:
    """Notices about artefacts and images are of no interest here."""
