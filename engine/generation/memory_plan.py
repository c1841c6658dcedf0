"""What of a job fits into a GPU's memory, by configurations alone: precision, checkpointing, tiny decoder, batch."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

from engine.errors import JobError
from engine.generation.batching import MEMORY_SHARE, useful_size
from engine.generation.decoder_advice import tiny_decoder
from engine.job.spec import JobSpec, RequestSpec
from engine.models.addresses import locate
from engine.models.configurations import part_classes, read_config
from engine.models.decoding import Decoder
from engine.models.hardware import Hardware
from engine.models.memory_model import META
from engine.models.peak_memory import StepParts, step_peak
from engine.models.pipelines.lookup import family_of, request_image_size
from engine.models.pipelines.parts import has_configurations

GIB = 2**30
MIB = 2**20
NUM_CHORDS = 4
DTYPES = {"fp16": "float16", "fp32": "float32"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """A way to sample a request.

    Attributes:
        precision: of the network, and of the decoder that guidance differentiates.
        checkpointing: whether activations are recomputed.
        tiny_decoder: whether guidance looks through a tiny decoder.
        weight_bytes: of text encoders, network and decoders; not of target and CLIP.
        row_bytes: at the peak of a batch of one, above the weights.
        batch: a batch that fits, no larger than is of use (`useful_size`); 0 where not even one sample does.
    """

    precision: str
    checkpointing: bool
    tiny_decoder: bool
    weight_bytes: int
    row_bytes: int
    batch: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What the memory of a request depends on, next to precision, checkpointing and decoder.

    Attributes:
        folder, address: of the pipeline.
        shape: of a sample's latents, C, h, w.
        num_halves: of classifier-free guidance.
        is_guided: whether images are decoded for gradients; through_network: whether these pass through the network.
        decoders: whether guidance looks through a tiny decoder, all that are possible.
    """

    folder: Path
    address: str
    shape: tuple[int, int, int]
    num_halves: int
    is_guided: bool
    through_network: bool
    decoders: tuple[bool, ...]


def memory_plan(job: JobSpec, request: RequestSpec, memory_bytes: int) -> list[Fit]:
    """What fits of a request, every combination of precision, checkpointing and decoder that its method can have.

    Raises:
        JobError: the configurations of its pipeline are not here, or its family is not estimated.
    """
    return _fits(_step_of(job, request), memory_bytes)


def _step_of(job: JobSpec, request: RequestSpec) -> _Step:
    address = request.diffusion or job.models.diffusion
    folder = locate(address).folder
    if folder is None or not has_configurations(folder):
        raise JobError(f"--memory: the configurations of '{address}' are not on this machine; download them first")
    family, is_guided = family_of(folder, address), request.method_record.is_guided
    sampling, parameters = job.sampling_of(request), job.parameters_of(request)
    latents, (height, width) = family.latent_space(folder), request_image_size(job, request, folder, address)
    steps = sampling.num_inference_steps
    return _Step(
        folder=folder,
        address=address,
        shape=(latents.channels, height // latents.pixels_per_latent, width // latents.pixels_per_latent),
        num_halves=2 if sampling.guidance_scale > 1 and not family.embeds_guidance(folder) else 1,
        is_guided=is_guided,
        through_network=any(parameters.is_through_unet(index, steps) for index in request.steps_taken(steps)),
        decoders=((True,) if job.models.guidance_decoder else (False, True)) if is_guided else (False,),
    )


def _fits(step: _Step, memory_bytes: int) -> list[Fit]:
    switches = [False, True] if step.is_guided else [False]
    return [
        _fit(step, memory_bytes, precision, checkpointing, tiny)
        for precision, checkpointing, tiny in itertools.product(DTYPES, switches, step.decoders)
    ]


def _fit(step: _Step, memory_bytes: int, precision: str, checkpointing: bool, tiny: bool) -> Fit:
    hardware = Hardware(
        device=META, dtype=DTYPES[precision], attention="sdpa", memory_bytes=memory_bytes,
        gradient_checkpointing="on" if checkpointing else "off",
    )  # fmt: skip
    parts = _parts(step, hardware, tiny=tiny)
    if checkpointing:
        parts.network.module.enable_gradient_checkpointing()

    def peak(rows: int) -> int:
        return step_peak(parts, step.shape, rows, num_halves=step.num_halves, through_network=step.through_network)

    weights = parts.weight_bytes + text_encoder_bytes(step.folder, getattr(torch, DTYPES[precision]))
    one, available, most = peak(1), MEMORY_SHARE * memory_bytes - weights, useful_size(step.shape[1] * step.shape[2])
    return Fit(
        precision=precision, checkpointing=checkpointing, tiny_decoder=tiny, weight_bytes=weights,
        row_bytes=one, batch=_batch(peak, one, available, parts.slice_rows or 1, most),
    )  # fmt: skip


def _batch(peak: Callable[[int], int], one: int, available: float, slice_rows: int, most: int) -> int:
    """The largest batch found to fit; peaks are nearly affine up to a slice of the decoder, and beyond.

    Args:
        peak: bytes for a number of rows.
        one: the same of a single row.
        slice_rows: rows that are decoded at a time.
        most: largest batch that is of use.
    """
    if one > available:
        return 0
    low, high, low_bytes, high_bytes = 1, most, one, peak(most)
    if high_bytes <= available:
        return most
    if 1 < slice_rows < most:
        if (slice_bytes := peak(slice_rows)) <= available:
            low, low_bytes = slice_rows, slice_bytes
        else:
            high, high_bytes = slice_rows, slice_bytes
    for _ in range(NUM_CHORDS):
        guess = low + int((available - low_bytes) / (high_bytes - low_bytes) * (high - low))
        if guess <= low:
            break
        if (guess_bytes := peak(guess)) <= available:
            low, low_bytes = guess, guess_bytes
        else:
            high, high_bytes = guess, guess_bytes
    return low


def _parts(step: _Step, hardware: Hardware, *, tiny: bool) -> StepParts:
    folder, dtype = step.folder, getattr(torch, hardware.dtype)
    family = family_of(folder, step.address)
    with torch.device(META):
        network = family.bare_network(folder)
    if network is None:
        raise JobError(f"--memory: the memory of a {family.class_name} is not estimated; run a small job instead")
    # diffusers' own `to` warns of parts that it would load in float32; here are no weights.
    torch.nn.Module.to(network.module, dtype)
    vae = _on_meta(AutoencoderKL, read_config(folder / "vae" / "config.json"), torch.float32)
    if not step.is_guided:
        return StepParts(network=network, vae=vae, slice_rows=Decoder(vae, hardware).forward_rows(step.shape))
    guide = vae
    if tiny:
        guide = _on_meta(AutoencoderTiny, tiny_decoder(step.address, folder)[1], dtype)
    elif dtype != torch.float32:
        guide = _on_meta(AutoencoderKL, read_config(folder / "vae" / "config.json"), dtype)
        # As the engine's copy in half precision, which has no encoder.
        del guide.encoder
    if hardware.gradient_checkpointing == "on" and not tiny:
        guide.enable_gradient_checkpointing()
    rows = Decoder(guide if tiny else vae, hardware).decoding(step.shape, hardware.dtype).slice_rows
    return StepParts(network=network, vae=vae, guide=guide, slice_rows=rows)


def text_encoder_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of the weights of a pipeline's text encoders, which stay on the GPU next to the network.

    What transformers keeps in float32 where the rest is in half precision, a part of each layer of T5, is counted so.
    """
    total = 0
    for name, kind in part_classes(folder).items():
        if name.startswith("text_encoder"):
            encoder_class = getattr(transformers, kind)
            # Its own kind of configuration, as in loading: that of a text encoder may be within that of a whole CLIP.
            config = encoder_class.config_class.from_pretrained(folder / name, local_files_only=True)
            with torch.device(META):
                encoder = encoder_class._from_config(config)
            single = set(encoder._keep_in_fp32_modules or ()) if dtype == torch.float16 else set()
            for path, tensor in encoder.named_parameters():
                kept = torch.float32 if single.intersection(path.split(".")) else dtype
                total += tensor.numel() * kept.itemsize
    return total


def _on_meta(kind: Any, config: dict[str, Any], dtype: torch.dtype) -> Any:
    with torch.device(META):
        model = kind.from_config(config)
    return torch.nn.Module.to(model, dtype).requires_grad_(False).eval()


def memory_fields(job: JobSpec, memory_bytes: int) -> list[dict[str, Any]]:
    """The estimates of all requests, as `plan --memory --json` has them; equal ones are computed once."""

    @functools.cache
    def fits(step: _Step) -> list[dict[str, Any]]:
        return [dataclasses.asdict(fit) for fit in _fits(step, memory_bytes)]

    return [{"request": request.name, "fits": fits(_step_of(job, request))} for request in job.requests]


def memory_lines(fields: list[dict[str, Any]], memory_bytes: int) -> list[str]:
    """The estimates in words."""
    lines = [f"a GPU of {_amount(memory_bytes, '.4g')}, of which {MEMORY_SHARE:.0%} are used; nothing was run"]
    for entry in fields:
        for fit in entry["fits"]:
            switches = [fit["precision"], f"checkpointing {'on' if fit['checkpointing'] else 'off'}"]
            switches += ["tiny decoder"] if fit["tiny_decoder"] else []
            batch = f"batch {fit['batch']}" if fit["batch"] else "does not fit"
            lines.append(
                f"{entry['request']}: {', '.join(switches)}: {batch} ({_amount(fit['weight_bytes'])} of weights,"
                f" {_amount(fit['row_bytes'])} for a batch of 1)"
            )
    return lines


def _amount(num_bytes: int, places: str = ".2f") -> str:
    """Bytes in GiB, below a tenth of one in MiB."""
    if num_bytes < GIB / 10:
        return f"{num_bytes / MIB:{places}} MiB"
    return f"{num_bytes / GIB:{places}} GiB"
