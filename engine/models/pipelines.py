"""Which diffusion pipelines are known to be sampled rightly, by their configurations alone; all others are refused.

The list is one of what is allowed. Two classes of diffusers run, with the parts that these have; of a part's options
those are let through that its own forward pass reads, and those are not that its pipeline would have to act on.
`tests/test_pipelines.py` samples what is allowed beside diffusers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.errors import JobError
from engine.job.spec import JobSpec, RequestSpec
from engine.methods.sampling.families import (
    ModelScheduler,
    is_number,
    is_whole,
    sampling_problems,
    shown,
    training_problems,
)
from engine.models.configurations import PIPELINE_INDEX, need_file, part_classes, read_config, readable
from engine.models.processor_checks import check_processor
from engine.models.weight_files import conversion_line, weighted_parts, weights_problem

STABLE_DIFFUSION, UNCLIP = "StableDiffusionPipeline", "StableUnCLIPImg2ImgPipeline"
SAFETY_CHECKER = "safety_checker"
# Sizes of latents below this in a UNet of diffusers before 0.9 are taken for a mistake by its pipeline.
OLD_SAMPLE_SIZE = 64
_REMEDY = f"what runs: a {STABLE_DIFFUSION} or a {UNCLIP}, as docs/diffusion-models.md lists them"
_PROCESSORS = ("CLIPImageProcessor", "CLIPImageProcessorFast", "CLIPImageProcessorPil", "CLIPFeatureExtractor")
_ENCODER = ("CLIPVisionModelWithProjection",)
_REQUIRED: dict[str, tuple[str, ...]] = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
_OF_UNCLIP: dict[str, tuple[str, ...]] = {
    "image_encoder": _ENCODER,
    "feature_extractor": _PROCESSORS,
    "image_normalizer": ("StableUnCLIPImageNormalizer",),
    "image_noising_scheduler": ("DDPMScheduler",),
}
_OPTIONAL: dict[str, tuple[str, ...]] = {
    SAFETY_CHECKER: ("StableDiffusionSafetyChecker",),
    "feature_extractor": _PROCESSORS,
    # Asked by IP-adapters alone, whose UNet is refused.
    "image_encoder": _ENCODER,
}
_LIBRARIES = ("diffusers", "transformers", "stable_diffusion")
# Where the configuration of a part lies, if not in config.json.
_CONFIGURATIONS = {
    "tokenizer": "tokenizer_config.json",
    "scheduler": "scheduler_config.json",
    "image_noising_scheduler": "scheduler_config.json",
    "feature_extractor": "preprocessor_config.json",
}
_VOCABULARIES = (("tokenizer.json",), ("vocab.json", "merges.txt"))
# Weights beside a pipeline's own, which diffusers applies on request, and this engine never.
_ADAPTERS = re.compile(r"(pytorch_lora_weights.*|pytorch_custom_diffusion_weights.*|adapter_(config|model)\..*)")
# Options of a UNet that ask its pipeline for something: values that ask for nothing, what others ask for.
_UNET: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("addition_embed_type", (None, "text"), "it takes more than timestep and prompt, as Stable Diffusion XL does"),
    ("encoder_hid_dim_type", (None, "text_proj"), "it takes an image next to the prompt, as with an IP-adapter"),
    ("time_cond_proj_dim", (None,), "it takes the guidance scale, as a latent consistency model does"),
    ("num_class_embeds", (None,), "it takes a class or a noise level, as an upscaler does"),
    ("attention_type", ("default", None), "it takes the places of objects, as GLIGEN does"),
    ("dual_cross_attention", (False, None), "it takes two kinds of prompts"),
    ("num_attention_heads", (None,), "no UNet of diffusers has it"),
)


def check_pipeline(folder: Path, address: str, *, checks_safety: bool = True) -> None:
    """Check by its configurations that a pipeline is one of those that are known to be sampled rightly.

    Args:
        checks_safety: whether its safety checker is to be loaded, where it has one.

    Raises:
        JobError: saying what it is instead, and what runs.
    """
    need_file(folder, PIPELINE_INDEX, address, "a diffusers pipeline folder")
    with readable(address):
        if problem := _class_problem(folder) or _part_problem(folder, checks_safety) or _adapter_problem(folder):
            raise JobError(f"'{address}' {problem}; {_REMEDY}")
        if problems := list(_option_problems(folder)):
            raise JobError([f"'{address}': {problem}" for problem in problems])
        if is_unclip(folder):
            check_processor(folder / "feature_extractor", address)


def has_configurations(folder: Path) -> bool:
    """Whether a folder has the configurations of all parts of a pipeline: one of the hub may be here in part."""
    if not (folder / PIPELINE_INDEX).is_file():
        return False
    files = (folder / name / _CONFIGURATIONS.get(name, "config.json") for name in part_classes(folder))
    return all(file.is_file() for file in files) and _has_vocabulary(folder / "tokenizer")


def check_pipeline_weights(folder: Path, address: str, *, checks_safety: bool = True) -> None:
    """Check by their names that a pipeline's weights are there, as safetensors.

    Raises:
        JobError: naming the parts, with the command that converts them.
    """
    parts = [one for one in weighted_parts(folder) if checks_safety or one != SAFETY_CHECKER]
    conversion = conversion_line("diffusers.DiffusionPipeline", address, folder)
    problems = [weights_problem(folder / part, address, conversion) for part in parts]
    if found := list(dict.fromkeys(filter(None, problems))):
        raise JobError(found)


def is_unclip(folder: Path) -> bool:
    """Whether a pipeline's UNet is conditioned on image embeddings beside the text."""
    return "image_normalizer" in part_classes(folder)


def read_scheduler(folder: Path) -> ModelScheduler:
    """What a pipeline's folder says of its scheduler."""
    config = read_config(folder / "scheduler" / "scheduler_config.json")
    name = part_classes(folder).get("scheduler", "none")
    return ModelScheduler(config=config, name=name, is_corrected=not is_unclip(folder))


def request_problems(job: JobSpec, request: RequestSpec, folder: Path, address: str) -> list[str]:
    """What of a request does not go with its pipeline; lines that go on after `requests.NUMBER.`.

    Args:
        folder: where the pipeline at `address` is; `check_pipeline` lets it through.
    """
    sampling, is_guided = job.sampling_of(request), request.method != "prompt"
    try:
        with readable(address):
            found = sampling_problems(read_scheduler(folder), sampling, is_guided=is_guided)
    except JobError as error:
        return [f"diffusion: {error}"]
    return [f"sampling{problem}" for problem in found] + _conditioning_problems(request, folder, address)


def _conditioning_problems(request: RequestSpec, folder: Path, address: str) -> list[str]:
    if not is_unclip(folder):
        if request.conditioning is None:
            return []
        return [
            f"conditioning: '{address}' has no image embeddings to condition on; name a Stable unCLIP pipeline in"
            " `diffusion`, or leave conditioning out"
        ]
    if request.conditioning is None:
        return [
            f"conditioning: missing; '{address}' is a Stable unCLIP pipeline, whose every sample is conditioned on an"
            " image embedding: give an artefact of `riskforge prepare`, or images to vary"
        ]
    config = read_config(folder / "image_noising_scheduler" / "scheduler_config.json")
    levels = config.get("num_train_timesteps", 1000)
    if is_whole(levels) and request.conditioning.noise_level >= levels:
        return [
            f"conditioning.noise_level: {request.conditioning.noise_level} is not below the {levels} of '{address}'"
        ]
    return []


def is_old_size(config: dict[str, Any]) -> bool:
    """Whether diffusers' Stable Diffusion pipeline takes a UNet's `sample_size` for a mistake, and 64 in its place."""
    release = re.match(r"\D*0\.(\d+)", str(config.get("_diffusers_version", "")))
    size = config.get("sample_size")
    return release is not None and int(release[1]) < 9 and is_whole(size) and size < OLD_SAMPLE_SIZE


def _class_problem(folder: Path) -> str:
    kind = read_config(folder / PIPELINE_INDEX).get("_class_name", "pipeline without a class")
    if kind not in (STABLE_DIFFUSION, UNCLIP):
        return f"is a {kind if isinstance(kind, str) else 'pipeline with code of its own'}"
    return ""


def _part_problem(folder: Path, checks_safety: bool) -> str:
    """A part that is missing, of another class, without its configuration, or that nothing here would use."""
    parts, index = part_classes(folder), read_config(folder / PIPELINE_INDEX)
    kind = _class_of(folder)
    required = _REQUIRED | (_OF_UNCLIP if kind == UNCLIP else {})
    known = _REQUIRED | (_OF_UNCLIP if kind == UNCLIP else _OPTIONAL)
    for name in required.keys() | {"scheduler"}:
        if name not in parts:
            return f"is a {kind} without its {name}"
    for name, found in parts.items():
        if name == "scheduler" or (name == SAFETY_CHECKER and not checks_safety):
            continue
        if name not in known:
            return f"is a {kind} with the part {name} ({found}), which nothing here would use"
        if not str(index[name][0]).startswith(_LIBRARIES):
            return f"is a {kind} whose {name} is code of its own ({index[name][0]})"
        if found not in known[name]:
            return f"is a {kind} whose {name} is of class {found}, not {known[name][0]}{_hint(name, found)}"
    return _file_problem(folder, parts, checks_safety)


def _hint(name: str, found: str) -> str:
    if name == SAFETY_CHECKER:
        return "; models.safety_checker: off leaves it out"
    if found == "AutoencoderTiny":
        return "; keep the pipeline's own, and name the tiny one in models.guidance_decoder"
    return ""


def _file_problem(folder: Path, parts: dict[str, str], checks_safety: bool) -> str:
    asked = checks_safety and SAFETY_CHECKER in parts
    if asked and "feature_extractor" not in parts:
        return "has a safety_checker without its feature_extractor; models.safety_checker: off leaves it out"
    unread = set() if asked or _class_of(folder) == UNCLIP else {"feature_extractor", SAFETY_CHECKER}
    for name in parts.keys() - unread:
        file = _CONFIGURATIONS.get(name, "config.json")
        if not (folder / name / file).is_file():
            return f"has no {name}/{file}"
    return ""


def _class_of(folder: Path) -> str:
    return str(read_config(folder / PIPELINE_INDEX).get("_class_name"))


def _adapter_problem(folder: Path) -> str:
    for where in (folder, *(folder / name for name in part_classes(folder))):
        for path in sorted(where.iterdir()) if where.is_dir() else []:
            if _ADAPTERS.fullmatch(path.name):
                shown = path.relative_to(folder)
                return (
                    f"has the weights of an adapter ({shown}), which would not be applied; fuse them with diffusers"
                    " (load_lora_weights, fuse_lora, save_pretrained), or move the file elsewhere"
                )
    return ""


def _option_problems(folder: Path) -> Iterator[str]:
    """Options of the parts that nothing here would act on, or that do not fit together."""
    configs = {name: read_config(folder / name / "config.json") for name in ("unet", "vae", "text_encoder")}
    unet, vae = configs["unet"], configs["vae"]
    for name, config in configs.items():
        if config.get("quantization_config") is not None:
            yield f"{name}/config.json has quantization_config; only weights that are not quantised run"
        if name != "text_encoder" and config.get("_class_name", _REQUIRED[name][0]) != _REQUIRED[name][0]:
            yield f"{name}/config.json is of class {config['_class_name']}, not {_REQUIRED[name][0]}; {_REMEDY}"
    has_labels = _class_of(folder) == UNCLIP
    for problem in (*_unet_problems(unet, has_labels), *_channel_problems(unet, vae), *_vae_problems(vae)):
        yield f"{problem}; {_REMEDY}"
    yield from _size_problems(unet, vae)
    yield from _text_problems(folder, unet, configs["text_encoder"])
    yield from training_problems(read_scheduler(folder))
    if has_labels:
        yield from _embedding_problems(folder, unet)


def _unet_problems(unet: dict[str, Any], has_labels: bool) -> Iterator[str]:
    for option, known, meaning in _UNET:
        if option in unet and unet[option] not in known:
            yield f"unet/config.json has {option}: {shown(unet[option])} ({meaning})"
    embedding = unet.get("class_embed_type")
    if has_labels and embedding != "projection":
        yield f'unet/config.json has class_embed_type: {shown(embedding)}, not the "projection" of Stable unCLIP'
    if not has_labels and embedding is not None:
        yield f"unet/config.json has class_embed_type: {shown(embedding)} (it takes a class, a noise level or an image)"
    if not has_labels and unet.get("class_embeddings_concat"):
        yield "unet/config.json has class_embeddings_concat: True (it takes a class, a noise level or an image)"


def _channel_problems(unet: dict[str, Any], vae: dict[str, Any]) -> Iterator[str]:
    latents, read, written = vae.get("latent_channels", 4), unet.get("in_channels", 4), unet.get("out_channels", 4)
    kinds = {9: "inpainting", 8: "instruct-pix2pix", 7: "an upscaler", 5: "depth2img"}
    if read != latents:
        kind = f" (as {kinds[read]} does)" if read in kinds and latents == 4 else ""
        yield f"unet/config.json has in_channels: {shown(read)}, the latents of the VAE have {shown(latents)}{kind}"
    elif written != read:
        more = f"the latents have {shown(read)}, so it predicts more than noise"
        yield f"unet/config.json has out_channels: {shown(written)}, {more}"


def _vae_problems(vae: dict[str, Any]) -> Iterator[str]:
    factor = vae.get("scaling_factor", 0.18215)
    if not is_number(factor) or factor <= 0:
        yield f"vae/config.json has scaling_factor: {shown(factor)}, not a positive number"
    for option in ("shift_factor", "latents_mean", "latents_std"):
        if vae.get(option):
            yield f"vae/config.json has {option}: {shown(vae[option])}, which Stable Diffusion's pipelines leave out"
    if vae.get("out_channels", 3) != 3:
        yield f"vae/config.json has out_channels: {shown(vae['out_channels'])}; images have 3"


def _size_problems(unet: dict[str, Any], vae: dict[str, Any]) -> Iterator[str]:
    size, scale = unet.get("sample_size"), 2 ** (len(vae.get("block_out_channels", [64])) - 1)
    sides = size if isinstance(size, list) else [size, size]
    if len(sides) == 2 and all(is_whole(side) and side > 0 for side in sides):
        return
    yield (
        f"unet/config.json has sample_size: {shown(size)}, so the size of an image is not known; write the side of an"
        f" image in pixels divided by {scale} there, or [height, width] ({512 // scale} for images of 512 pixels)"
    )


def _text_problems(folder: Path, unet: dict[str, Any], encoder: dict[str, Any]) -> Iterator[str]:
    kind = encoder.get("model_type", "clip_text_model")
    if kind not in ("clip_text_model", "clip"):
        yield f"text_encoder/config.json is of type {shown(kind)}, not of CLIP; {_REMEDY}"
        return
    encoder = encoder["text_config"] if isinstance(encoder.get("text_config"), dict) else encoder
    width, asked = encoder.get("hidden_size", 512), unet.get("cross_attention_dim", 1280)
    if unet.get("encoder_hid_dim") is not None:
        asked = unet["encoder_hid_dim"]
    if any(one != width for one in (asked if isinstance(asked, list) else [asked])):
        yield (
            f"unet/config.json has cross_attention_dim: {shown(asked)}, the embeddings of the text encoder have"
            f" {shown(width)} entries; {_REMEDY}"
        )
    read = encoder.get("max_position_embeddings", 77)
    limit = read_config(folder / "tokenizer" / "tokenizer_config.json").get("model_max_length")
    if not isinstance(limit, int | float) or not 2 < limit <= read:
        yield (
            f"tokenizer/tokenizer_config.json has model_max_length: {shown(limit)}; write {read} there, the tokens that"
            " the text encoder reads"
        )
    yield from _vocabulary_problems(folder / "tokenizer", encoder.get("vocab_size", 49408))


def _has_vocabulary(tokenizer: Path) -> bool:
    return any(all((tokenizer / name).is_file() for name in names) for names in _VOCABULARIES)


def _vocabulary_problems(tokenizer: Path, num_embeddings: int) -> Iterator[str]:
    """A vocabulary that is missing, where transformers would make an empty one, or that the text encoder has not."""
    if not _has_vocabulary(tokenizer):
        yield "its tokenizer has no vocabulary: neither tokenizer.json nor vocab.json with merges.txt"
        return
    if (tokenizer / "tokenizer.json").is_file():
        content = read_config(tokenizer / "tokenizer.json")
        ids = [*content["model"]["vocab"].values(), *(one["id"] for one in content.get("added_tokens") or [])]
    else:
        ids = [*read_config(tokenizer / "vocab.json").values()]
        if (tokenizer / "added_tokens.json").is_file():
            ids += read_config(tokenizer / "added_tokens.json").values()
    if max(ids) >= num_embeddings:
        yield (
            f"its tokenizer has tokens up to number {max(ids)}, its text encoder embeddings of {num_embeddings}"
            " (vocab_size); they are not of one model"
        )


def _embedding_problems(folder: Path, unet: dict[str, Any]) -> Iterator[str]:
    """What of a Stable unCLIP pipeline does not fit its image embeddings."""
    width = read_config(folder / "image_normalizer" / "config.json").get("embedding_dim", 768)
    encoded = read_config(folder / "image_encoder" / "config.json").get("projection_dim", 512)
    read = unet.get("projection_class_embeddings_input_dim")
    if encoded != width or not is_whole(width) or read != 2 * width:
        yield (
            f"its image embeddings have {shown(encoded)} entries, image_normalizer takes {shown(width)} and the UNet"
            f" {shown(read)}, not twice as many; its parts are not of one model"
        )
    noising = folder / "image_noising_scheduler" / "scheduler_config.json"
    config = read_config(noising)
    schedules = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid")
    if config.get("_class_name", "DDPMScheduler") != "DDPMScheduler":
        yield f"its image_noising_scheduler is a {config['_class_name']}, not a DDPMScheduler; {_REMEDY}"
    elif config.get("beta_schedule", "linear") not in schedules:
        yield f"its image_noising_scheduler has beta_schedule: {shown(config['beta_schedule'])}, not one of {schedules}"


def check_decoder(folder: Path, address: str) -> None:
    """Check by its configuration that a folder is an `AutoencoderTiny` that makes images of latents.

    Raises:
        JobError: saying what it is instead.
    """
    need_file(folder, "config.json", address, "a diffusers model folder")
    config = read_config(folder / "config.json")
    kind = config.get("_class_name", "transformers model")
    if kind != "AutoencoderTiny":
        raise JobError(f"'{address}' is of class {kind}; an AutoencoderTiny is needed")
    with readable(address):
        _tiny_shape(config)
    if config.get("out_channels", 3) != 3:
        raise JobError(f"'{address}' makes images of {shown(config['out_channels'])} channels; three are needed")


def check_decoder_weights(folder: Path, address: str) -> None:
    """Check by their names that a decoder's weights are there, as safetensors.

    Raises:
        JobError: they are not; with the command that converts them.
    """
    if problem := weights_problem(folder, address, conversion_line("diffusers.AutoencoderTiny", address, folder)):
        raise JobError(problem)


def decoder_problem(address: str, decoder: Path, pipeline: Path, of: str) -> str | None:
    """What of an `AutoencoderTiny` does not fit the latents or the images of a pipeline, or None.

    Args:
        address: of the decoder.
        decoder: its folder.
        pipeline: folder of the pipeline.
        of: address of the pipeline.
    """
    tiny, vae = read_config(decoder / "config.json"), read_config(pipeline / "vae" / "config.json")
    found, wanted = _tiny_shape(tiny), _vae_shape(vae)
    if found != wanted:
        return (
            f"'{address}' makes images {found[1]} times the size of latents of {found[0]} channels; those of"
            f" '{of}' have {wanted[0]} channels, and {wanted[1]} times"
        )
    factor, shift = tiny.get("scaling_factor", 1.0), tiny.get("shift_factor", 0.0)
    if factor not in (1, vae.get("scaling_factor", 0.18215)) or shift:
        return (
            f"'{address}' has scaling_factor {shown(factor)} and shift_factor {shown(shift)}, so it decodes latents of"
            f" another scale than those of '{of}'; 1 and 0 are those of a decoder for Stable Diffusion"
        )
    return None


def _vae_shape(config: dict[str, Any]) -> tuple[int, int]:
    """Channels of an AutoencoderKL's latents, and pixels of a side for each latent."""
    return int(config.get("latent_channels", 4)), 2 ** (len(config.get("block_out_channels", [64])) - 1)


def _tiny_shape(config: dict[str, Any]) -> tuple[int, int]:
    """The same of an AutoencoderTiny."""
    stages, factor = config.get("num_decoder_blocks", [3, 3, 3, 1]), config.get("upsampling_scaling_factor", 2)
    return int(config.get("latent_channels", 4)), int(factor) ** (len(stages) - 1)
