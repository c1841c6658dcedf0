"""The fields of a job file: what a user may ask for. `engine.job.parsing` checks a file against them."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

import pydantic
from pydantic import Field, PrivateAttr, StrictBool, StrictInt

from engine.job.label_maps import checked_maps
from engine.job.resources import ResourcesSpec
from engine.methods.fields import Context, Number, Plains, Spec, Text
from engine.methods.parameters import Ensemble, MethodParameters
from engine.methods.registry import BUILT_IN, CRITERIA, METHODS, USER_CODE, Method, method_of
from engine.methods.sampling.spec import SamplingSpec, steps_of

MAX_SEED = 2**53
MAX_REQUESTS = 1000
# Entries of lists by the name of their key, counted before any of them is checked.
LIST_LIMITS = {
    "requests": MAX_REQUESTS,
    "contexts": 10_000,
    "classes": 100_000,
    "boundary": 1000,
    "transfer": 100,
    "strength": 100,
    "further_targets": 7,
    "oracles": 16,
    "adapters": 16,
}
# Targets of a job: the one whose scores are recorded, and those that guide beside it.
MAX_TARGETS = 1 + LIST_LIMITS["further_targets"]
MAX_INDEX = 10**8
JOINT_SEPARATOR = " and "
CLASS_TEMPLATE = "a photo of a {class}"

# Attempts for each wanted sample, where a request has no `max_attempts`.
DEFAULT_FACTOR = "10x"

NAME_PATTERN, MAX_NAME = r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", 64
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=MAX_NAME)]
Seed = Annotated[StrictInt, Field(ge=0, lt=MAX_SEED)]
Address = Annotated[str, Field(min_length=1, max_length=1000)]
# The names of the registry; a type checker takes no literals that are computed.
if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[tuple(BUILT_IN)]
# A criterion of the user's own: `package.module:factory`.
MethodAddress = Annotated[str, Field(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$", max_length=200)]
Classes = tuple[str | StrictInt, ...]
Date = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
Factor = Annotated[str, Field(pattern=r"^[0-9]{1,6}(\.[0-9]{1,3})?x$")]


def _or_list(most: int) -> Callable[[dict[str, Any]], None]:
    """Lets the JSON Schema of a value allow a list of different ones, which a job file may have in its place."""

    def allow(schema: dict[str, Any]) -> None:
        limits = ("type", "minimum", "maximum", "minLength", "maxLength")
        value = {key: schema.pop(key) for key in limits if key in schema}
        values = {"type": "array", "items": value, "minItems": 1, "uniqueItems": True, "maxItems": most}
        schema["anyOf"] = [value, values]

    return allow


class AdapterSpec(Spec):
    """Weights that change a pipeline: a LoRA, or an embedding of a new word (textual inversion)."""

    address: Address = Field(
        description="A file of safetensors, or the folder of one: LoRA weights as diffusers or kohya's scripts save"
        " them, or a learned embedding."
    )
    weight: Number = Field(default=1.0, ge=-100, le=100, description="Of a LoRA: its scale; of an embedding 1.")
    token: Annotated[str, Field(min_length=1, max_length=100, pattern=r"^\S+$")] | None = Field(
        default=None, description="Of an embedding: its word in prompts, in place of the one in the file."
    )

    @pydantic.field_validator("weight")
    @classmethod
    def _without_sign(cls, value: float) -> float:
        """-0 is 0, also in a digest."""
        return value or abs(value)


class ModelsSpec(Spec):
    """Addresses of the models: `zoo:NAME/PART`, a folder, or a hub id; of classifiers also a file or a factory."""

    diffusion: Address = Field(description="Stable Diffusion pipeline that samples.")
    clip: Address = Field(description="CLIP or SigLIP model that measures conformity.")
    target: Address = Field(
        description="Image classifier that is guided on and scored; this, `transfer` and `oracle` may also be a file of"
        " TorchScript or torch.export, or `package.module:factory`, which runs that code. A list is an ensemble:"
        " guidance sees all of them, scores are the first's, and the others go to `further_targets`.",
        json_schema_extra=_or_list(MAX_TARGETS),
    )
    further_targets: tuple[Address, ...] = Field(
        default=(),
        max_length=LIST_LIMITS["further_targets"],
        description="Classifiers that guidance sees beside the target, and that are scored as `transfer` ones are: what"
        " follows the first in a list of targets. Each has its own temperature.",
    )
    calibration: Address | None = Field(
        default=None,
        description="Temperature of the target in place of its own, wherever the job uses it: an artefact of `riskforge"
        " prepare`, a folder that holds one, or `zoo:NAME/PART`.",
    )
    transfer: tuple[Address, ...] = Field(
        default=(),
        max_length=LIST_LIMITS["transfer"],
        description="Classifiers that are scored and never guided on.",
    )
    oracle: Address | None = Field(
        default=None,
        description="Independent model whose prediction is recorded, and guided on by `oracle_floor` alone: a"
        " classifier, a CLIP model (zero-shot), or nearest neighbours among labelled images (an artefact of `riskforge"
        " prepare JOB --only neighbours`).",
    )
    oracles: tuple[Address, ...] = Field(
        default=(),
        max_length=LIST_LIMITS["oracles"],
        description="Several of them in place of `oracle`, of different families; `oracle_class` is the first one's,"
        " and with an `oracle_floor` the last one guides.",
    )
    validity: Address | None = Field(
        default=None,
        description="Estimate of the share of people who agree with a label, by the probabilities of these oracles: an"
        " artefact of `riskforge prepare JOB --answers FILE`, a folder that holds one, or `zoo:NAME/PART`.",
    )
    judge: Address | None = Field(
        default=None, description="Second, independent CLIP model: its conformity is recorded and never guided on."
    )
    label_map: dict[Address, dict[str, str | None]] = Field(
        default_factory=dict,
        description="Of an oracle, transfer model or further target with other class names than the target, by its"
        " address: its class names (or indices) to those of the target, such as `{models/net: {cats: cat}}`. Names that"
        " both have need no entry; nothing (`null`) stands for none of the target's.",
    )
    guidance_decoder: Address | None = Field(
        default=None,
        description="AutoencoderTiny whose decoder guidance differentiates, in place of the pipeline's own; the stored"
        " image always comes from the pipeline's.",
    )
    adapters: tuple[AdapterSpec, ...] = Field(
        default=(),
        max_length=LIST_LIMITS["adapters"],
        description="LoRA weights and textual inversions that every diffusion model of the job is loaded with.",
    )
    vae: Address | None = Field(
        default=None,
        description="AutoencoderKL in place of that of every diffusion model of the job, for latents of the same shape"
        " and scale.",
    )
    safety_checker: Literal["auto", "off"] = Field(
        default="auto",
        description="auto: a sample that the pipeline's safety checker flags is `failed`; off: it is not asked.",
    )

    @property
    def targets(self) -> tuple[str, ...]:
        """The classifiers that guidance sees; the first is the one whose scores are recorded."""
        return (self.target, *self.further_targets)

    @property
    def all_oracles(self) -> tuple[str, ...]:
        """The oracles in their order; empty without one."""
        return self.oracles or ((self.oracle,) if self.oracle else ())

    @property
    def mappable(self) -> tuple[str, ...]:
        """The models whose classes may be other than the target's."""
        return (*self.further_targets, *self.transfer, *self.all_oracles)

    @pydantic.field_validator("label_map", mode="before")
    @classmethod
    def _label_maps(cls, value: Any) -> Any:
        """Indices become texts."""
        return checked_maps(value)

    @pydantic.model_validator(mode="after")
    def _single_oracle(self) -> Self:
        """A list of one oracle is that one."""
        if len(self.oracles) == 1 and self.oracle is None:
            return self.model_copy(update={"oracle": self.oracles[0], "oracles": ()})
        return self

    @pydantic.model_serializer(mode="wrap")
    def _without_absent(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A job with one target, one oracle and no estimate is stored as it was before there could be more."""
        absent = {"further_targets": not self.further_targets, "oracles": not self.oracles}
        absent |= {
            "adapters": not self.adapters,
            "vae": self.vae is None,
            "validity": self.validity is None,
            "label_map": not self.label_map,
        }
        return {key: value for key, value in dump(self).items() if not absent.get(key)}


class ConditioningSpec(Spec):
    """Image embeddings that condition a Stable unCLIP pipeline: drawn from class statistics, or of given images."""

    artefact: Address | None = Field(
        default=None,
        description="Class statistics and error predictor: an artefact of `riskforge prepare`, a folder that holds one,"
        " or `zoo:NAME/PART`.",
    )
    images: Address | None = Field(
        default=None,
        description="Images to vary, read as `--data` of `riskforge prepare`; sample i of a class takes its image i,"
        " and begins again after the last.",
    )
    screening: bool | None = Field(
        default=None, description="Draw until the error predictor expects an error; default: true with an artefact."
    )
    threshold: Number = Field(default=0.5, ge=0, lt=1, description="Confidence of an error that a draw must exceed.")
    max_draws: StrictInt = Field(
        default=256,
        ge=1,
        le=100_000,
        description="Draws for a sample, at most; one that none of them gets through is"
        " made from the likeliest and has screened: false.",
    )
    noise_level: StrictInt = Field(default=0, ge=0, le=999, description="Noise on the embedding, as in diffusers.")

    @property
    def is_screened(self) -> bool:
        """Whether draws are screened."""
        return self.artefact is not None and self.screening is not False


class StartSpec(Spec):
    """Real images to start from in place of noise alone (SDEdit, Meng et al. 2022)."""

    images: Address = Field(
        description="Labelled images, read as `--data` of `riskforge prepare`; sample i of a class starts from its"
        " image i, and begins again after the last."
    )
    strength: Number = Field(
        ge=0,
        le=1,
        description="Share of the denoising steps that are taken: 0 gives the image as the autoencoder has it, 1 leaves"
        " it out. A list makes one request of each value, `NAME-s030` of 0.3, in one `seed_group`.",
        json_schema_extra=_or_list(LIST_LIMITS["strength"]),
    )

    @pydantic.field_validator("strength")
    @classmethod
    def _without_sign(cls, value: float) -> float:
        """-0 is 0, also in a digest."""
        return abs(value)


def _without(fields: dict[str, Any], name: str, *, when: bool) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key != name} if when else fields


def _section(method: Method) -> tuple[Any, Any]:
    """Type and field of a method's section of `guidance`."""
    spec = method.load_spec()
    own = f"methods {', '.join(f'`{name}`' for name in CRITERIA)}, and one of your own, `package.module:factory`"
    names = own if method.is_user_code else f"method `{method.name}`"
    return spec, Field(default=spec(), description=f"For {names}.")


if TYPE_CHECKING:
    _Sections = Spec
else:
    _Sections = pydantic.create_model(
        "_Sections", __base__=Spec, **{method.name: _section(method) for method in METHODS if method.is_guided}
    )


class GuidanceSpec(_Sections):
    """Parameters of the guidance methods."""

    ensemble: Ensemble = Field(
        default="mean",
        description="With several targets: what guidance descends of a sample's distances under each of them, their"
        " mean or the largest.",
    )

    @pydantic.model_serializer(mode="wrap")
    def _without_default(self, dump: pydantic.SerializerFunctionWrapHandler) -> dict[str, Any]:
        """A job that does not choose it is stored as it was before there was a choice."""
        return _without(dump(self), "ensemble", when=self.ensemble == "mean")

    @classmethod
    def overridden(cls, base: dict[str, Any], override: dict[str, Any]) -> dict[str, Any]:
        """The guidance of a job with a request's overrides, neither of them checked."""
        for method in METHODS:
            own, others = override.get(method.name), base.get(method.name)
            if isinstance(own, dict) and isinstance(others, dict):
                base = base | {method.name: method.load_spec().beneath(others, own)}
        return merge(base, override)

    def of(self, method: Method) -> MethodParameters:
        """The parameters of a method; without fields for a method without guidance."""
        parameters: MethodParameters = getattr(self, method.name, MethodParameters())
        return parameters


def _describe_methods() -> str:
    titles = ", ".join(method.title for method in BUILT_IN.values())
    return f"{titles}, or `package.module:factory`: {USER_CODE.title}, which runs that code."


class RequestSpec(Spec):
    """One class-conditional request: what to make, how much of it, by which method."""

    name: Name = Field(description="Unique in the job.")
    method: MethodName | MethodAddress = Field(description=_describe_methods())
    classes: Literal["all"] | Annotated[Classes, Field(max_length=LIST_LIMITS["classes"])] | None = Field(
        default=None, description="Class names or indices of the target, or `all`."
    )
    boundary: Annotated[Classes, Field(max_length=LIST_LIMITS["boundary"])] | None = Field(
        default=None, description="Subset of at least two classes that share one joint prompt."
    )
    count: StrictInt = Field(
        ge=1,
        le=MAX_INDEX,
        description="Samples per class (or subset) and context; with `accept` so many accepted ones, whatever their"
        " context.",
    )
    contexts: tuple[Context, ...] = Field(
        default=("",),
        min_length=1,
        max_length=LIST_LIMITS["contexts"],
        description="Each is appended to the prompt; '' is no context.",
    )
    prompt: Annotated[str, Field(min_length=1, max_length=1000)] | None = Field(
        default=None,
        description="Prompt template with `{class}` and optionally `{context}`; with `conditioning` also without"
        " `{class}`, and `{context}` alone is no text where there is no context.",
    )
    accept: Plains | Text = Field(
        default_factory=dict,
        description="Condition for a sample to be kept, such as 'is_error and risk >= 1'; or a mapping of conditions"
        " that must all hold, such as {is_error: true, oracle: agrees, risk: '>= 1'}.",
    )
    max_attempts: Annotated[StrictInt, Field(ge=1)] | Factor | None = Field(
        default=None,
        description="With `accept`: attempts per class at most, as a number or a multiple of what is wanted, such as"
        f" 4x; 1x makes `count` attempts, whatever is accepted. Default: {DEFAULT_FACTOR}.",
    )
    seed_group: Name | None = Field(default=None, description="Requests of one group share noise; default: the name.")
    fresh: bool | Date = Field(
        default=False,
        description="Other noise every day: true takes the date on which the output's run begins; or a date, such as"
        " 2026-11-21.",
    )
    diffusion: Address | None = Field(default=None, description="Another diffusion model for this request.")
    conditioning: ConditioningSpec | None = Field(
        default=None, description="Image embeddings for a Stable unCLIP pipeline; an artefact's address will do."
    )
    start: StartSpec | None = Field(
        default=None, description="Real images that samples start from, in place of noise alone."
    )
    twin: StrictBool = Field(
        default=False,
        description="Also make the unguided twin of every sample, from the same noise, condition and start, and store"
        " it in `twins`.",
    )
    sampling: Plains = Field(default_factory=dict, description="Overrides of the job's `sampling`.")
    guidance: Plains = Field(default_factory=dict, description="Overrides of the job's `guidance`.")

    @pydantic.field_validator("conditioning", mode="before")
    @classmethod
    def _bare_address(cls, value: Any) -> Any:
        return {"artefact": value} if isinstance(value, str) else value

    @pydantic.field_validator("fresh", mode="before")
    @classmethod
    def _yaml_date(cls, value: Any) -> Any:
        """YAML 1.1 reads a bare date as one."""
        return value.isoformat() if type(value) is datetime.date else value

    @pydantic.field_validator("fresh")
    @classmethod
    def _on_the_calendar(cls, value: bool | str) -> bool | str:
        if isinstance(value, str):
            try:
                datetime.date.fromisoformat(value)
            except ValueError:
                raise ValueError(f"'{value}' is not on the calendar; give a date such as 2026-11-21") from None
        return value

    @property
    def method_record(self) -> Method:
        """What the engine knows of the method."""
        return method_of(self.method)

    @property
    def num_wanted(self) -> int:
        """Samples of a class (or subset) over all contexts: accepted ones where there is a quota, else attempts."""
        return self.count * len(self.contexts)

    @property
    def attempts_limit(self) -> int:
        """Attempts of a class at most."""
        if not self.accept:
            return self.num_wanted
        limit = self.max_attempts or DEFAULT_FACTOR
        return limit if isinstance(limit, int) else math.ceil(Fraction(limit.removesuffix("x")) * self.num_wanted)

    @property
    def has_quota(self) -> bool:
        """Whether attempts are made until enough of them are accepted."""
        return self.attempts_limit > self.num_wanted

    @property
    def is_screened(self) -> bool:
        """Whether draws of its embeddings are screened."""
        return self.conditioning is not None and self.conditioning.is_screened

    @property
    def used_start(self) -> StartSpec | None:
        """The start, unless its strength is 1: then the images are left out."""
        return self.start if self.start is not None and self.start.strength < 1 else None

    def steps_taken(self, num_steps: int) -> range:
        """The steps that are taken of a sampling, counted from 1: all, or the last ones after a start."""
        start = self.used_start
        return range(1 + (0 if start is None else num_steps - steps_of(start.strength, num_steps)), num_steps + 1)


class OutputSpec(Spec):
    """Where and how the samples are stored."""

    uri: Annotated[str, Field(min_length=1, max_length=2000)] = Field(
        description="Folder of the run, or its address on an object store, `s3://BUCKET/NAME` or `gs://BUCKET/NAME`;"
        " `{date}` stands for today, such as 2026-11-21, and `{job}` for the job's name."
    )
    samples_per_shard: StrictInt = Field(default=256, ge=1, le=100_000, description="Attempts in a shard.")
    image_format: Literal["png", "jpg", "webp"] = Field(
        default="png", description="png and webp are lossless; jpg has quality 95."
    )
    store_rejected: bool = Field(default=False, description="Store the images of rejected samples too.")
    provenance: bool = Field(
        default=True,
        description="Say in every image file that it is synthetic: IPTC's trainedAlgorithmicMedia, as XMP.",
    )


class RuntimeSpec(Spec):
    """How the work is carried out, not which samples are made; precision and attention still move pixels a little."""

    workers: Annotated[StrictInt, Field(ge=1, le=100_000)] | Literal["auto"] = Field(
        default="auto",
        description="Number of actors; auto: one a GPU, or one a CPU core, up to sixteen a machine and one for 2 GB of"
        " its memory.",
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda)$")] = Field(default="auto", description="auto, cpu, cuda.")
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        default="auto",
        description="Of the UNet and text encoder; auto: fp16 on a GPU, fp32 on a CPU. With fp32 nothing is computed in"
        " TF32; scores never are.",
    )
    attention: Literal["auto", "sdpa", "xformers"] = Field(
        default="auto",
        description="Attention of the UNet; auto: xformers in half precision on a GPU of compute capability 7.5 to 8.9,"
        " where it is installed and has kernels for the model; else torch's own (sdpa).",
    )
    decoder_precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        default="auto",
        description="Of the decoder that guidance differentiates, never of stored images; auto: on a GPU the half"
        " precision that the first samples show to keep the gradient's direction, fp32 on a CPU, with precision fp32,"
        " and with deterministic.",
    )
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Recompute activations in guidance; auto: where a GPU's memory does not hold them, and on a CPU"
        " above 256 px.",
    )
    channels_last: Literal["auto", "on", "off"] = Field(
        default="auto", description="Memory layout of UNet and VAE; auto: on for a GPU in half precision."
    )
    compile: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Compile the UNet for calls without gradient, in batches of a fixed shape; auto: off.",
    )
    batch_size: Annotated[StrictInt, Field(ge=1, le=4096)] | Literal["auto"] = Field(
        default="auto",
        description="Samples a batch on a GPU, at most; auto: as many as its memory holds and keep it busy, found by"
        " measuring; fewer for a while after a batch failed. A CPU works in batches of a fixed size.",
    )
    deterministic: bool = Field(
        default=False,
        description="Equal bytes from equal GPUs: deterministic kernels, batches of a fixed shape; needs a number as"
        " batch_size there. On a CPU it changes nothing: every run is deterministic.",
    )

    resources: ResourcesSpec = Field(
        default=ResourcesSpec(), description="What a worker takes of a machine, with --executor ray."
    )

    @pydantic.model_validator(mode="after")
    def _gpus_fit_device(self) -> Self:
        num_gpus = self.resources.num_gpus
        if self.device == "cpu" and num_gpus not in (None, 0):
            raise ValueError(f"resources.num_gpus is {num_gpus}, and device 'cpu' uses none; leave one of them out")
        if self.device == "cuda" and num_gpus == 0:
            raise ValueError("resources.num_gpus is 0, and device 'cuda' needs one; leave num_gpus out")
        return self

    @pydantic.field_validator("gradient_checkpointing", "channels_last", "compile", mode="before")
    @classmethod
    def _yaml_booleans(cls, value: Any) -> Any:
        """YAML 1.1 reads bare `on` and `off` as booleans."""
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class JobSpec(Spec):
    """A job: models, requests and how to carry them out."""

    name: Name = Field(description="Prefix of shards and keys: lower case letters, digits, hyphens.")
    seed: Seed = Field(default=0, description="Seed of the job, a non-negative integer below 2^53.")
    models: ModelsSpec = Field(description="What samples, what is guided on, and what scores.")
    requests: tuple[RequestSpec, ...] = Field(
        min_length=1, max_length=LIST_LIMITS["requests"], description="What to make; the order gives each its number."
    )
    sampling: SamplingSpec = Field(default=SamplingSpec(), description="How the diffusion model samples.")
    guidance: GuidanceSpec = Field(default=GuidanceSpec(), description="Parameters of the guidance methods.")
    output: OutputSpec = Field(description="Where and how the samples are stored.")
    runtime: RuntimeSpec = Field(default=RuntimeSpec(), description="How the work is carried out.")
    # Of each request its number in the job file, where a list of strengths made several of one.
    _places: tuple[int, ...] | None = PrivateAttr(default=None)

    def placed(self, places: Sequence[int]) -> Self:
        """The job with the numbers that its requests have in the job file, for messages."""
        job = self.model_copy()
        job._places = tuple(places)
        return job

    def where(self, number: int) -> str:
        """Where a request is in the job file, for messages."""
        return f"requests.{number if self._places is None else self._places[number]}"

    def sampling_of(self, request: RequestSpec) -> SamplingSpec:
        """The job's sampling with the request's overrides, key by key."""
        return SamplingSpec.model_validate(merge(self.sampling.model_dump(), request.sampling))

    def guidance_of(self, request: RequestSpec) -> GuidanceSpec:
        """The job's guidance with the request's overrides, key by key."""
        return GuidanceSpec.model_validate(GuidanceSpec.overridden(self.guidance.model_dump(), request.guidance))

    @property
    def oracle_guides(self) -> bool:
        """Whether the last oracle is a floor of some request's guidance: then it is no evidence in any row."""
        return bool(self.models.all_oracles) and any(self.parameters_of(one).sees_oracle for one in self.requests)

    @property
    def independent_oracles(self) -> tuple[str, ...]:
        """The oracles that guide nothing, in their order."""
        return self.models.all_oracles[: -1 if self.oracle_guides else None]

    def criterion_images(self, request: RequestSpec) -> str:
        """The address of the images that the request's criterion sees; empty where it sees none."""
        images = getattr(self.parameters_of(request), "images", None)
        return images or "" if request.method_record.sees_images else ""

    def parameters_of(self, request: RequestSpec) -> MethodParameters:
        """The parameters of the request's own method, with its overrides."""
        return self.guidance_of(request).of(request.method_record)


def merge(base: dict[str, Any], override: Any) -> dict[str, Any]:
    """A mapping with the values of another, key by key at every level."""
    if not isinstance(override, dict):
        return override
    merged = dict(base)
    for key, value in override.items():
        inner = merged.get(key)
        merged[key] = merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged
