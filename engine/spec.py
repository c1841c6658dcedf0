"""The job file: what a user may ask for, checked before any model is loaded.

Every class is frozen and refuses unknown keys. `parse_job` collects all problems of a job, a line each, and raises
them together; `apply_overrides` is the `--set` of the command line.
"""

from __future__ import annotations

import datetime
import json
import math
import re
from fractions import Fraction
from typing import Annotated, Any, Literal

import pydantic
from pydantic import BaseModel, ConfigDict, Field, StrictInt

from engine.acceptance import JUDGE_SCORES, rule_problems
from engine.errors import JobError
from engine.spec_messages import Location, explain, location_of
from engine.strict_json import parse_json

MAX_SEED = 2**53
MAX_REQUESTS = 1000
# Entries of lists by the name of their key, of all others, and keys of a mapping: counted before they are looked at.
LIST_LIMITS = {"requests": MAX_REQUESTS, "contexts": 10_000, "classes": 100_000, "boundary": 1000, "transfer": 100}
MAX_ENTRIES = 100_000
MAX_KEYS = 10_000
# Problems of a job that are put into words.
MAX_PROBLEMS = 100
MAX_INDEX = 10**8
JOINT_SEPARATOR = " and "
CLASS_TEMPLATE = "a photo of a {class}"

# Attempts for each sample that is wanted, where a request says nothing.
DEFAULT_FACTOR = "10x"

# Of a value of the user's own; in a stored plan it stands some levels down.
MAX_VALUE_DEPTH = 40

Name = Annotated[str, Field(pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?$", max_length=64)]
Seed = Annotated[StrictInt, Field(ge=0, lt=MAX_SEED)]
Context = Annotated[str, Field(max_length=400)]
Address = Annotated[str, Field(min_length=1, max_length=1000)]
Number = Annotated[float, Field(strict=True)]
# A criterion of the user's own: `package.module:factory`.
Method = Annotated[str, Field(pattern=r"^[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*$", max_length=200)]
Classes = tuple[str | StrictInt, ...]
Identifier = Annotated[str, Field(pattern=r"^[^\W\d]\w*$", max_length=100)]
Date = Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")]
Factor = Annotated[str, Field(pattern=r"^[0-9]{1,6}(\.[0-9]{1,3})?x$")]


def _storable(value: Any) -> Any:
    """A plain value, if JSON in UTF-8 holds it as every reader understands it: a job is stored as such."""
    try:
        parse_json(json.dumps(value, ensure_ascii=False).encode(), MAX_VALUE_DEPTH)
    except UnicodeEncodeError:
        raise ValueError("it holds half a character, which no text in UTF-8 has") from None
    return value


# Whatever JSON has: what a job is read with must be what it is stored with.
Plain = Annotated[pydantic.JsonValue, pydantic.AfterValidator(_storable)]
Plains = dict[Annotated[str, pydantic.AfterValidator(_storable)], Plain]


class _Spec(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class ModelsSpec(_Spec):
    """Addresses of the models: `zoo:NAME/PART`, a folder, or a hub id; of classifiers also a file or a factory."""

    diffusion: Address = Field(description="Stable Diffusion pipeline that samples.")
    clip: Address = Field(description="CLIP model that measures conformity.")
    target: Address = Field(
        description="Image classifier that is guided on and scored; this, `transfer` and `oracle` may also be a file of"
        " TorchScript or torch.export, or `package.module:factory`, which runs that code."
    )
    transfer: tuple[Address, ...] = Field(
        default=(),
        max_length=LIST_LIMITS["transfer"],
        description="Classifiers that are scored and never guided on.",
    )
    oracle: Address | None = Field(default=None, description="Independent classifier whose reading is recorded.")
    judge: Address | None = Field(
        default=None, description="Second, independent CLIP model: its conformity is recorded and never guided on."
    )
    guidance_decoder: Address | None = Field(
        default=None,
        description="AutoencoderTiny whose decoder guidance differentiates, in place of the pipeline's own; the stored"
        " image always comes from the pipeline's.",
    )
    safety_checker: Literal["auto", "off"] = Field(
        default="auto",
        description="auto: a sample that the pipeline's safety checker flags is `failed`; off: it is not asked.",
    )


class SamplingSpec(_Spec):
    """How the diffusion model samples. All schedulers are deterministic given the first noise."""

    scheduler: Literal["lms", "ddim", "euler", "dpmsolver++", "model"] = Field(
        default="lms",
        description="Sampler: k-LMS, DDIM with eta 0, Euler, DPM-Solver++ (2M), or the model's own, where that draws no"
        " noise.",
    )
    num_inference_steps: StrictInt = Field(default=40, ge=1, le=1000, description="Number of denoising steps T.")
    guidance_scale: Number = Field(default=7.5, ge=1, le=100, description="Classifier-free guidance scale; 1 is off.")
    guidance_rescale: Number = Field(default=0.0, ge=0, le=1, description="Rescale of classifier-free guidance.")
    timestep_spacing: Literal["leading", "linspace", "trailing"] | None = Field(
        default=None, description="Spacing of the timesteps; the model's own when empty."
    )
    use_karras_sigmas: bool | None = Field(
        default=None,
        description="Noise levels of Karras et al. (2022), for lms, euler and dpmsolver++; as the model has it when"
        " empty.",
    )
    rescale_betas_zero_snr: bool = Field(default=False, description="Zero terminal SNR; v-prediction models only.")
    negative_prompt: Context = Field(default="", description="Prompt of the unconditional half.")


class BoundaryGuidanceSpec(_Spec):
    """KLDB guidance toward the decision boundary of the request's classes."""

    step: Literal["polyak", "norm", "paper"] = Field(
        default="polyak", description="Step rule: Polyak (no step size), |g|_2-normalised, or the paper's max|g|."
    )
    alpha: Number | None = Field(
        default=None,
        ge=0,
        le=100,
        description="Step size; 0 switches guidance off. Default: 1 for polyak (a factor), 0.05 for norm and paper.",
    )
    cap: Number = Field(default=0.1, gt=0, le=10, description="Polyak only: largest step as a fraction of |z|_2.")
    every: StrictInt = Field(
        default=5, ge=1, le=1000, description="Guide at steps i with i % every == 0, i counted from 1."
    )
    gradient: Literal["detached", "unet"] = Field(
        default="detached", description="Gradient at the detached x0 prediction, or through the UNet."
    )
    skip_last: bool = Field(default=True, description="Do not guide at the last step, which is never denoised again.")

    @property
    def step_size(self) -> float:
        """`alpha`, or the default of the step rule."""
        if self.alpha is not None:
            return self.alpha
        return 1.0 if self.step == "polyak" else 0.05


class RiskyGuidanceSpec(_Spec):
    """RiskyDiff guidance: risk under conformity constraints (Yu et al. 2025)."""

    step: Literal["polyak", "paper"] = Field(
        default="polyak", description="Risk as a dial with a conformity floor, or the paper's fixed step on s, lambda."
    )
    scale: Number = Field(
        default=10.0, ge=0, le=1000, description="paper: step size s, at 4 x 64 x 64 latents; rescaled to any size."
    )
    conformity_weight: Number = Field(default=1e-4, ge=0, le=1e6, description="paper: lambda, weight of conformity.")
    conformity: Literal["cosine", "raw"] = Field(
        default="cosine", description="Cosine of CLIP embeddings, or the paper's raw inner product."
    )
    target_risk: Number = Field(
        default=1.5, ge=0, le=50, description="polyak: risk to reach, in nats, from both sides."
    )
    tolerance: Number = Field(default=0.1, ge=0, le=10, description="polyak: a risk this near the dial has arrived.")
    conformity_floor: Number | None = Field(
        default=None, ge=-1, le=1, description="polyak: lowest conformity; guidance lifts a sample that is below."
    )
    cap: Number = Field(default=0.1, gt=0, le=10, description="polyak: largest step as a fraction of |z|_2.")
    every: StrictInt = Field(
        default=1, ge=1, le=1000, description="Guide at steps i with i % every == 0, i counted from 1."
    )
    gradient_range: Number = Field(default=1.0, gt=0, le=1, description="Guide only in this last fraction of steps.")
    skip_last: bool = Field(default=True, description="Do not guide at the last step, which is never denoised again.")


class CustomGuidanceSpec(BoundaryGuidanceSpec):
    """Guidance by a criterion of the user's own; steps and schedule are those of `boundary`."""

    parameters: dict[Identifier, Plain] = Field(
        default_factory=dict,
        description="Arguments of the function that `method` names: plain values, or lists of them.",
    )


class ConditioningSpec(_Spec):
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


class GuidanceSpec(_Spec):
    """Parameters of the guidance methods."""

    boundary: BoundaryGuidanceSpec = Field(default=BoundaryGuidanceSpec(), description="For method `boundary`.")
    risky: RiskyGuidanceSpec = Field(default=RiskyGuidanceSpec(), description="For method `risky`.")
    custom: CustomGuidanceSpec = Field(
        default=CustomGuidanceSpec(), description="For a method of your own, `package.module:factory`."
    )


class RequestSpec(_Spec):
    """One class-conditional request: what to make, how much of it, by which method."""

    name: Name = Field(description="Unique in the job.")
    method: Literal["prompt", "boundary", "risky"] | Method = Field(
        description="Prompt only, KLDB boundary guidance, RiskyDiff guidance, or `package.module:factory`: a criterion"
        " of your own, which runs that code."
    )
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
        default=None, description="Prompt template with `{class}` and optionally `{context}`."
    )
    accept: Plains = Field(
        default_factory=dict,
        description="Conditions for a sample to be kept, such as {is_error: true, oracle: agrees, risk: '>= 1'}.",
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
    def is_custom(self) -> bool:
        """Whether the method is a criterion of the user's own."""
        return ":" in self.method

    @property
    def guidance_section(self) -> str:
        """The section of `guidance` that the method reads; `prompt` reads none."""
        return "custom" if self.is_custom else self.method

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


class OutputSpec(_Spec):
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


class RuntimeSpec(_Spec):
    """How the work is carried out, not which samples are made; precision and attention still move pixels a little."""

    workers: Annotated[StrictInt, Field(ge=1, le=100_000)] | Literal["auto"] = Field(
        default="auto",
        description="Number of actors; auto: one a GPU, or one a CPU core, up to sixteen a machine and one for 2 GB of"
        " its memory.",
    )
    device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda)$")] = Field(default="auto", description="auto, cpu, cuda.")
    precision: Literal["auto", "fp32", "fp16", "bf16"] = Field(
        default="auto", description="Of the UNet and text encoder; auto: fp16 on a GPU, fp32 on a CPU."
    )
    attention: Literal["auto", "sdpa", "xformers"] = Field(default="auto", description="Attention of the UNet.")
    gradient_checkpointing: Literal["auto", "on", "off"] = Field(
        default="auto", description="Recompute activations in guidance; auto: on for images above 256 px."
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
        description="Samples a batch on a GPU; auto: as many as its memory holds, found by measuring; halved on"
        " out-of-memory. A CPU works in batches of a fixed size.",
    )
    deterministic: bool = Field(
        default=False,
        description="Equal bytes from equal GPUs: deterministic kernels, no TF32, batches of a fixed shape; needs a"
        " number as batch_size there. On a CPU it changes nothing: every run is deterministic.",
    )

    @pydantic.field_validator("gradient_checkpointing", "channels_last", "compile", mode="before")
    @classmethod
    def _yaml_booleans(cls, value: Any) -> Any:
        """YAML 1.1 reads bare `on` and `off` as booleans."""
        return {True: "on", False: "off"}.get(value, value) if isinstance(value, bool) else value


class JobSpec(_Spec):
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

    def sampling_of(self, request: RequestSpec) -> SamplingSpec:
        """The job's sampling with the request's overrides, key by key."""
        return SamplingSpec.model_validate(_merge(self.sampling.model_dump(), request.sampling))

    def guidance_of(self, request: RequestSpec) -> GuidanceSpec:
        """The job's guidance with the request's overrides, key by key."""
        return GuidanceSpec.model_validate(_merge(self.guidance.model_dump(), request.guidance))


OVERRIDABLE: dict[str, type[BaseModel]] = {"sampling": SamplingSpec, "guidance": GuidanceSpec}


def job_schema() -> dict[str, Any]:
    """The JSON Schema of a job file."""
    return JobSpec.model_json_schema()


def parse_job(raw: Any) -> JobSpec:
    """Check a job as read from YAML.

    Raises:
        JobError: with every problem found, a line each.
    """
    if not isinstance(raw, dict):
        raise JobError(f"job: a mapping of keys is expected, not {type(raw).__name__}; see `riskforge schema`")
    if oversized := _oversized(raw, ()):
        raise JobError([f"{_path(where)}: {text}" for where, text in oversized[:MAX_PROBLEMS]])
    job, problems = _validate(JobSpec, raw, ())
    known = [where for where, _ in problems]
    # What is checked between fields is checked without the wrong ones, whose absence says nothing new.
    problems += [
        (where, text)
        for where, text in _between_fields(raw)
        if not any(where == one or _is_below(one, where) for one in known)
    ]
    if problems:
        raise JobError(_limited([f"{_path(where)}: {text}" for where, text in problems]))
    return job


def _limited(lines: list[str]) -> list[str]:
    """The first of many lines, and how many more there are."""
    more = len(lines) - MAX_PROBLEMS
    return [*lines[:MAX_PROBLEMS], f"job: has {more} more problems like these"] if more > 0 else lines


Problem = tuple[Location, str]


def list_limit(key: object) -> int:
    """Entries that a list below a key of a job may have."""
    return LIST_LIMITS.get(key, MAX_ENTRIES) if isinstance(key, str) else MAX_ENTRIES


def _oversized(value: Any, where: Location) -> list[Problem]:
    """Lists and mappings with more entries than any job has use for; what is in them is not looked at."""
    if isinstance(value, dict):
        if len(value) > MAX_KEYS:
            return [(where, f"has {len(value)} keys; a mapping has {MAX_KEYS} at most")]
        return [found for key, inner in value.items() for found in _oversized(inner, (*where, _key(key)))]
    if isinstance(value, (list, tuple)):
        limit = list_limit(where[-1] if where else None)
        if len(value) > limit:
            return [(where, f"has {len(value)} entries; give {limit} or fewer")]
        nested = ((place, inner) for place, inner in enumerate(value) if isinstance(inner, (dict, list, tuple)))
        return [found for place, inner in nested for found in _oversized(inner, (*where, place))]
    return []


def _key(key: Any) -> str | int:
    return key if isinstance(key, (str, int)) else str(key)


def _between_fields(raw: dict[str, Any]) -> list[Problem]:
    """Problems between the fields of each request, found also where another part of the job is wrong."""
    base = {section: _base(spec, raw.get(section)) for section, spec in OVERRIDABLE.items()}
    problems = _sampling_problems(base["sampling"], ("sampling",)) + _decoder_problems(raw)
    names: dict[str, int] = {}
    requests = raw.get("requests")
    for number, item in enumerate(requests if isinstance(requests, list) else []):
        where: Location = ("requests", number)
        name = item.get("name") if isinstance(item, dict) else None
        if isinstance(name, str) and names.setdefault(name, number) != number:
            problems.append(((*where, "name"), f"'{name}' is also the name of request {names[name]}; rename one"))
        request = _lenient(RequestSpec, item)
        if request is not None:
            problems += [((*where, *at), text) for at, text in _request_problems(request)]
            problems += _absent_models(request, raw.get("models"), where)
            problems += _override_problems(request, base, where)
    return problems


def _absent_models(request: RequestSpec, models: Any, where: Location) -> list[Problem]:
    """Conditions of `accept` whose model the job does not name."""
    named = models if isinstance(models, dict) else {}
    asked = [(name, "judge" if name in JUDGE_SCORES else name) for name in request.accept]
    return [
        ((*where, "accept", name), f"there is no {role}; name one in models.{role}")
        for name, role in asked
        if role in ("oracle", "judge") and not named.get(role)
    ]


def _decoder_problems(raw: dict[str, Any]) -> list[Problem]:
    models, requests = raw.get("models"), raw.get("requests")
    if not isinstance(models, dict) or not isinstance(models.get("guidance_decoder"), str):
        return []
    methods = [one.get("method") for one in requests if isinstance(one, dict)] if isinstance(requests, list) else []
    if any(method != "prompt" for method in methods):
        return []
    text = "no request is guided, so nothing would go through it; leave it out, or guide a request"
    return [(("models", "guidance_decoder"), text)]


def _override_problems(request: RequestSpec, base: dict[str, dict[str, Any]], where: Location) -> list[Problem]:
    problems: list[Problem] = []
    for section, spec in OVERRIDABLE.items():
        merged = _merge(base[section], getattr(request, section))
        found = _validate(spec, merged, (*where, section))[1]
        if not found and section == "sampling" and request.sampling:
            found = _sampling_problems(merged, (*where, section))
        problems += found
    if not problems and request.method != "prompt":
        problems += _schedule_problems(request, base, where)
    return problems


def _schedule_problems(request: RequestSpec, base: dict[str, dict[str, Any]], where: Location) -> list[Problem]:
    sampling = SamplingSpec.model_validate(_merge(base["sampling"], request.sampling))
    guidance = _merge(base["guidance"], request.guidance)[request.guidance_section]
    first = int(sampling.num_inference_steps * (1 - guidance.get("gradient_range", 1.0))) + 1
    stop = sampling.num_inference_steps + (not guidance["skip_last"])
    if any(index % guidance["every"] == 0 for index in range(first, stop)):
        return []
    widen = ", widen `gradient_range`" if guidance.get("gradient_range", 1.0) < 1 else ""
    text = f"leaves none of {sampling.num_inference_steps} steps guided; lower `every`{widen} or add steps"
    return [((*where, "guidance", request.guidance_section), text)]


def noise_problem(prediction_type: str, zero_snr: bool) -> str | None:
    """What is impossible about a model's prediction type, or None."""
    if prediction_type not in ("epsilon", "v_prediction"):
        return f"the model predicts '{prediction_type}'; only epsilon and v_prediction are supported"
    if zero_snr and prediction_type == "epsilon":
        return "eps-prediction has no signal at zero terminal SNR; switch that off, or use a v-prediction model"
    return None


def _sampling_problems(sampling: dict[str, Any], where: Location) -> list[Problem]:
    problems: list[Problem] = []
    if sampling["rescale_betas_zero_snr"] and sampling["scheduler"] == "lms":
        text = "zero terminal SNR is not defined for lms; use ddim, euler or dpmsolver++"
        problems.append(((*where, "rescale_betas_zero_snr"), text))
    if sampling["use_karras_sigmas"] and sampling["scheduler"] == "ddim":
        text = "ddim has no sigmas to choose; leave it out, or use lms, euler or dpmsolver++"
        problems.append(((*where, "use_karras_sigmas"), text))
    return problems


def _base(spec: type[BaseModel], raw: Any) -> dict[str, Any]:
    checked = _lenient(spec, raw) if raw is not None else None
    return (checked or spec()).model_dump()


def _lenient(spec: type[BaseModel], raw: Any) -> Any:
    """The spec without its wrong values, or None where it does not stand without them."""
    if not isinstance(raw, dict):
        return None
    checked, problems = _validate(spec, raw, ())
    return checked or _validate(spec, _without(raw, [where for where, _ in problems]), ())[0]


def _request_problems(request: RequestSpec) -> list[Problem]:
    problems: list[Problem] = []
    if request.method == "boundary" and request.boundary is None:
        problems.append((("boundary",), "method 'boundary' needs the classes between which to sample, two or more"))
    if request.method == "risky" and request.boundary is not None:
        problems.append((("boundary",), "method 'risky' makes samples of single classes; give `classes`"))
    elif request.boundary is not None:
        if request.classes is not None:
            problems.append((("classes",), "give either `classes` or `boundary`, not both"))
        if len(set(request.boundary)) != len(request.boundary):
            problems.append((("boundary",), f"{list(request.boundary)} names a class twice; name each once"))
        if len(request.boundary) < 2:
            problems.append((("boundary",), f"{list(request.boundary)} has fewer than two classes; name two or more"))
    elif request.method != "boundary" and request.classes is None:
        joint = " (or `boundary: [A, B]`)" if request.method != "risky" else ""
        problems.append((("classes",), f"missing; give class names or `all`{joint}"))
    if isinstance(request.classes, tuple) and len(set(request.classes)) != len(request.classes):
        problems.append((("classes",), f"{list(request.classes)} names a class twice; name each once"))
    if request.classes == ():
        problems.append((("classes",), "empty; give class names or `all`"))
    if len(set(request.contexts)) != len(request.contexts):
        problems.append((("contexts",), "a context stands twice; name each once"))
    if request.count * len(request.contexts) > MAX_INDEX:
        problems.append(
            (("count",), f"{request.count} x {len(request.contexts)} contexts is above {MAX_INDEX} a class")
        )
    problems += [(("accept", name), text) for name, text in rule_problems(request.accept)]
    problems += [(("max_attempts",), text) for text in _quota_problems(request)]
    problems += [(("conditioning", *at), text) for at, text in _conditioning_problems(request)]
    return problems + _template_problems(request)


def _quota_problems(request: RequestSpec) -> list[str]:
    if request.max_attempts is None:
        return []
    if not request.accept:
        return ["has no effect without `accept`: every sample counts; leave it out"]
    wanted, limit = request.num_wanted, request.attempts_limit
    if limit < wanted:
        return [f"{request.max_attempts!r} is {limit} attempts a class, fewer than the {wanted} samples wanted of it"]
    if limit > MAX_INDEX:
        return [f"{request.max_attempts!r} is {limit} attempts a class, above {MAX_INDEX}"]
    return []


def _conditioning_problems(request: RequestSpec) -> list[Problem]:
    conditioning, problems = request.conditioning, list[Problem]()
    if request.accept.get("screened") is True and not (conditioning and conditioning.is_screened):
        problems.append(((), "no sample is screened without an artefact to screen by; `accept` would reject them all"))
    if conditioning is None:
        return problems
    if request.boundary is not None:
        problems.append(((), "the embeddings are of single classes; give `classes` in place of `boundary`"))
    if (conditioning.artefact is None) == (conditioning.images is None):
        problems.append(((), "give either `artefact` (class statistics) or `images` (to vary)"))
    elif conditioning.images is not None and conditioning.screening:
        problems.append((("screening",), "given images are not screened; leave it out, or give an artefact"))
    elif not conditioning.is_screened:
        problems += [
            ((name,), "has no effect without screening; leave it out") for name in _changed_screening(conditioning)
        ]
    return problems


def _changed_screening(conditioning: ConditioningSpec) -> list[str]:
    """What would steer screening and is not at its default; a stored job has the defaults written out."""
    fields = ConditioningSpec.model_fields
    return [name for name in ("threshold", "max_draws") if getattr(conditioning, name) != fields[name].default]


def _template_problems(request: RequestSpec) -> list[Problem]:
    if request.prompt is None:
        return []
    fields = set(re.findall(r"\{([^{}]*)\}", request.prompt))
    if unknown := sorted(fields - {"class", "context"}):
        return [(("prompt",), f"unknown field {{{unknown[0]}}}; use {{class}} and {{context}}")]
    if "class" not in fields and request.boundary is None:
        return [(("prompt",), "has no {class}, so every class would have the same prompt; add {class}")]
    return []


def _validate(spec: type[BaseModel], raw: dict[str, Any], where: Location) -> tuple[Any, list[Problem]]:
    try:
        return spec.model_validate(raw), []
    except pydantic.ValidationError as error:
        found: dict[Location, str] = {}
        for item in error.errors(include_url=False)[: 2 * MAX_PROBLEMS]:
            location = location_of(item)
            found.setdefault((*where, *location), explain(spec, item, location))
        # A list that loses its wrong items is called too short, which says nothing new.
        return None, [(at, text) for at, text in found.items() if not any(_is_below(other, at) for other in found)]


def _is_below(location: Location, above: Location) -> bool:
    return len(location) > len(above) and location[: len(above)] == above


def _path(location: Location) -> str:
    return ".".join(str(part) for part in location) or "job"


def _merge(base: dict[str, Any], override: Any) -> dict[str, Any]:
    if not isinstance(override, dict):
        return override
    merged = dict(base)
    for key, value in override.items():
        inner = merged.get(key)
        merged[key] = _merge(inner, value) if isinstance(inner, dict) and isinstance(value, dict) else value
    return merged


def _without(raw: Any, locations: list[Location]) -> Any:
    """A copy of `raw` without the values at `locations`."""
    heads = {location[0] for location in locations if len(location) == 1}
    rest: dict[str | int, list[Location]] = {}
    for location in locations:
        if len(location) > 1:
            rest.setdefault(location[0], []).append(location[1:])
    if isinstance(raw, dict):
        return {key: _without(value, rest.get(key, [])) for key, value in raw.items() if key not in heads}
    if isinstance(raw, list):
        return [_without(value, rest.get(place, [])) for place, value in enumerate(raw) if place not in heads]
    return raw


def apply_overrides(raw: dict[str, Any], overrides: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a copy of a raw job with `--set a.0.b=value` applied.

    Raises:
        JobError: a path leads through something that is not a mapping or a list, or past the end of a list.
    """
    problems: list[str] = []
    result: Any = _without(raw, [])
    for path, value in overrides:
        parts = path.split(".")
        if not all(parts):
            problems.append(f"--set {path}: no such place in the job; paths look like requests.0.count")
            continue
        current: Any = result
        try:
            for part in parts[:-1]:
                if part == "conditioning" and isinstance(current.get(part), str):
                    current[part] = {"artefact": current[part]}
                current = current[_place(part)] if isinstance(current, list) else current.setdefault(part, {})
            if isinstance(current, list):
                current[_place(parts[-1])] = value
            else:
                current[parts[-1]] = value
        except (IndexError, ValueError, TypeError, AttributeError):
            problems.append(f"--set {path}: no such place in the job; paths look like requests.0.count")
    if problems:
        raise JobError(problems)
    return result


def _place(part: str) -> int:
    """Number of an item of a list.

    Raises:
        ValueError: it is none, such as -1.
    """
    if not part.isdecimal():
        raise ValueError(part)
    return int(part)
