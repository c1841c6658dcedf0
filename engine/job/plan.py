"""From requests to shards, lazily: a shard is five numbers, and its samples are computed where they are needed.

A request is a sequence of samples, index by index over its classes, so that a grown `count` only appends; or, where it
has quotas, a sequence for each class. A plan is a list of stages; each stage cuts new parts of these sequences into
shards, numbered on from the stage before. Planning takes memory for the requests, not for the samples.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from engine.errors import JobError
from engine.job.class_lookup import find_class
from engine.job.columns import SCHEMA_VERSION
from engine.job.json_values import digest_of
from engine.job.spec import CLASS_TEMPLATE, JOINT_SEPARATOR, MAX_SEED, JobSpec, RequestSpec
from engine.job.spec_messages import nearest
from engine.methods.config_values import is_number
from engine.methods.validity import ValidityModel

# Version of what a digest covers: raised only when an old plan would give other pixels or scores.
IDENTITY_VERSION = 1
# The class part of a key of a joint prompt, in place of a class index.
JOINT_CODE = "mix"
# Of a temperature that logits are divided by.
MIN_TEMPERATURE, MAX_TEMPERATURE = 1e-6, 1e6
MAX_COEFFICIENT = 1e6
# In an identity's `models`: the temperature of the target, where it has not its own.
TEMPERATURE = "temperature"
# There too: the estimate of the share of people who agree with a label, where the job names one.
VALIDITY = "validity"
# Digests that an identity has in each request, not in `models`.
_BY_REQUEST = ("diffusion", "conditioning", "starts", "given", "methods")
# In place of the number of a class: all classes of the request, in turn.
EVERY_CELL = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """What a sample is conditioned on: one class, or a subset of classes with a joint prompt.

    Attributes:
        classes: indices of the target's classes, one or several.
        names: their names, in the same order.
    """

    classes: tuple[int, ...]
    names: tuple[str, ...]

    @property
    def is_joint(self) -> bool:
        """Whether the prompt names several classes."""
        return len(self.classes) > 1

    @property
    def code(self) -> str:
        """The class part of a key: three digits or more, or `mix`."""
        return JOINT_CODE if self.is_joint else f"{self.classes[0]:03d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SampleSpec:
    """One sample to make: everything that decides it, before any model is loaded."""

    key: str
    request: str
    method: str
    cell: Cell
    prompt: str
    context: str
    seed: int
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardSpec:
    """One shard to make: positions `start` to `stop` of a request's sequence.

    Attributes:
        cell: number of the class in its request, whose indices the positions are; `EVERY_CELL` for the sequence over
            all classes.
    """

    number: int
    request: int
    start: int
    stop: int
    cell: int = EVERY_CELL

    @property
    def num_samples(self) -> int:
        """Samples in the shard."""
        return self.stop - self.start


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestPlan:
    """A request with its classes resolved against the target's labels.

    Attributes:
        where: it is in the job file, for messages.
    """

    number: int
    spec: RequestSpec
    job_name: str
    job_seed: int
    cells: tuple[Cell, ...]
    where: str

    @property
    def total(self) -> int:
        """Samples of the whole request, over all classes and contexts: accepted ones where there are quotas."""
        return self.spec.num_wanted * len(self.cells)

    @property
    def limit(self) -> int:
        """Attempts of the whole request at most."""
        return self.spec.attempts_limit * len(self.cells)

    def sample(self, position: int, cell: int = EVERY_CELL) -> SampleSpec:
        """The sample at a position of the request's sequence, or of a class's, `0 <= position`."""
        if cell == EVERY_CELL:
            index, which = divmod(position, len(self.cells))
            return self._sample(self.cells[which], index)
        return self._sample(self.cells[cell], position)

    def _sample(self, cell: Cell, index: int) -> SampleSpec:
        context = self.spec.contexts[index % len(self.spec.contexts)]
        return SampleSpec(
            key=f"{self.job_name}-{self.number:03d}-{cell.code}-{index:08d}",
            request=self.spec.name,
            method=self.spec.method,
            cell=cell,
            prompt=make_prompt(self.spec.prompt, cell, context),
            context=context,
            seed=sample_seed(self.job_seed, seed_name(self.spec), cell.classes, index),
            index=index,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """Positions `start` to `stop` of a request's sequence, or of a class's, cut into shards of `samples_per_shard`."""

    request: int
    start: int
    stop: int
    samples_per_shard: int
    cell: int = EVERY_CELL

    @property
    def num_shards(self) -> int:
        """Shards that the extent is cut into."""
        return -(-(self.stop - self.start) // self.samples_per_shard)


class Plan:
    """The shards of a job.

    Args:
        requests: the job's requests, resolved.
        identity: what decides pixels and scores (`plan_identity`).
        stages: lists of extents, one list for each time that the job was extended or rounds of a quota were added.
        schema_version: of the columns of its shards; a run keeps the version that it began with.
    """

    def __init__(
        self,
        requests: tuple[RequestPlan, ...],
        identity: dict[str, Any],
        stages: tuple[tuple[Extent, ...], ...],
        schema_version: int = SCHEMA_VERSION,
    ) -> None:
        self.requests = requests
        self.identity = identity
        self.stages = stages
        self.schema_version = schema_version
        self.extents = tuple(extent for stage in stages for extent in stage)
        self._first_shard = list(itertools.accumulate((extent.num_shards for extent in self.extents), initial=0))

    @property
    def digest(self) -> str:
        """Digest of everything that decides pixels or scores (contract: resume)."""
        return digest_of(self.identity)

    @property
    def num_shards(self) -> int:
        """Shards over all stages."""
        return self._first_shard[-1]

    @property
    def num_samples(self) -> int:
        """Samples over all stages."""
        return sum(extent.stop - extent.start for extent in self.extents)

    def shard(self, number: int) -> ShardSpec:
        """The shard of a number, `0 <= number < num_shards`.

        Raises:
            IndexError: there is no such shard.
        """
        if not 0 <= number < self.num_shards:
            raise IndexError(f"shard {number} is not in a plan of {self.num_shards}")
        place = bisect.bisect_right(self._first_shard, number) - 1
        extent = self.extents[place]
        start = extent.start + (number - self._first_shard[place]) * extent.samples_per_shard
        stop = min(start + extent.samples_per_shard, extent.stop)
        return ShardSpec(number=number, request=extent.request, cell=extent.cell, start=start, stop=stop)

    def shards(self) -> Iterator[ShardSpec]:
        """All shards in order, lazily."""
        return map(self.shard, range(self.num_shards))

    def samples(self, shard: ShardSpec) -> Iterator[SampleSpec]:
        """The samples of a shard in order, lazily."""
        request = self.requests[shard.request]
        return (request.sample(position, shard.cell) for position in range(shard.start, shard.stop))

    def grown(self, stage: tuple[Extent, ...]) -> Plan:
        """The plan with one more stage."""
        return Plan(self.requests, self.identity, (*self.stages, stage), self.schema_version)


def build_plan(job: JobSpec, labels: list[str], digests: dict[str, Any]) -> Plan:
    """Plan a job as a single stage.

    Args:
        labels: the target's class names in index order.
        digests: digest of each model by its role, as in `plan_identity`.

    Raises:
        JobError: classes that the target does not have, all of them at once.
    """
    requests = resolve_requests(job, labels)
    stage = next_stage(requests, (), job.output.samples_per_shard)
    return Plan(requests, plan_identity(job, requests, digests), (stage,))


def next_stage(
    requests: tuple[RequestPlan, ...], stages: tuple[tuple[Extent, ...], ...], samples_per_shard: int
) -> tuple[Extent, ...]:
    """The samples that requests ask for beyond the stages planned before; of quotas the first round.

    Raises:
        JobError: a request asks for less than was planned.
    """
    planned: Counter[tuple[int, int]] = Counter()
    for extent in itertools.chain.from_iterable(stages):
        place = (extent.request, extent.cell)
        planned[place] = max(planned[place], extent.stop)
    shrunk = [
        f"{request.where}.count: {request.spec.count} is below the"
        f" {planned[request.number, EVERY_CELL] // (request.total // request.spec.count)} already planned in this"
        " output; counts can only grow (or use another output)"
        for request in requests
        if not request.spec.has_quota and request.total < planned[request.number, EVERY_CELL]
    ]
    if shrunk:
        raise JobError(shrunk)
    wanted = itertools.chain.from_iterable(map(_wanted, requests))
    return tuple(
        Extent(request=request, cell=cell, start=start, stop=stop, samples_per_shard=samples_per_shard)
        for request, cell, stop in wanted
        if (start := planned[request, cell]) < stop and (cell == EVERY_CELL or not start)
    )


def _wanted(request: RequestPlan) -> Iterator[tuple[int, int, int]]:
    """Request, cell and end of the samples that are made whatever their outcome."""
    if not request.spec.has_quota:
        yield request.number, EVERY_CELL, request.total
        return
    # The first round of a class: fewer attempts than samples are wanted could not fill its quota.
    for cell in range(len(request.cells)):
        yield request.number, cell, request.spec.num_wanted


def resolve_requests(job: JobSpec, labels: list[str]) -> tuple[RequestPlan, ...]:
    """Resolve the classes of every request against the target's labels.

    Raises:
        JobError: unknown classes, with the nearest spelling, a line each.
    """
    problems: list[str] = []
    plans = []
    for number, request in enumerate(job.requests):
        where = job.where(number)
        cells = tuple(_cells(request, labels, where, problems))
        if request.fresh is True:
            problems.append(f"{where}.fresh: true has no date; `engine.commands.jobfile.dated` gives it one")
        plans.append(
            RequestPlan(number=number, spec=request, job_name=job.name, job_seed=job.seed, cells=cells, where=where)
        )
    if problems:
        raise JobError(problems)
    return tuple(plans)


def _cells(request: RequestSpec, labels: list[str], where: str, problems: list[str]) -> list[Cell]:
    field = "classes" if request.boundary is None else "boundary"
    wanted = getattr(request, field)
    if wanted == "all":
        return [Cell(classes=(index,), names=(label,)) for index, label in enumerate(labels)]
    indices: list[int] = []
    for place, name in enumerate(wanted):
        try:
            index = class_index(name, labels)
            if index in indices:
                problems.append(f"{where}.{field}.{place}: {name!r} is class {index}, named before; name each once")
            indices.append(index)
        except JobError as error:
            problems.append(f"{where}.{field}.{place}: {error}")
    if field == "boundary":
        return [Cell(classes=tuple(indices), names=tuple(labels[index] for index in indices))]
    return [Cell(classes=(index,), names=(labels[index],)) for index in indices]


def class_index(wanted: str | int, labels: list[str]) -> int:
    """Index of a class that is given by name (`engine.job.class_lookup.find_class`) or by index.

    Raises:
        JobError: no such class, or several.
    """
    if isinstance(wanted, int):
        if 0 <= wanted < len(labels):
            return wanted
        raise JobError(f"{wanted} is not a class index of the target; it has 0 to {len(labels) - 1}")
    indices = find_class(wanted, labels)
    if len(indices) > 1:
        raise JobError(f"{wanted!r} is the name of classes {', '.join(map(str, indices))}; give the index")
    if indices:
        return indices[0]
    raise JobError(f"{wanted!r} is not a class of the target" + nearest(wanted, labels))


def make_prompt(template: str | None, cell: Cell, context: str) -> str:
    """The text that conditions the diffusion model.

    Without a template: `a photo of a {class}` for one class, the class names joined by "and" for several (Gomes et
    al.); a context is appended after a comma.
    """
    names = JOINT_SEPARATOR.join(prompt_name(name) for name in cell.names)
    pattern = template or ("{class}" if cell.is_joint else CLASS_TEMPLATE)
    text = pattern.replace("{class}", names)
    if "{context}" in text:
        return text.replace("{context}", context)
    return f"{text}, {context}" if context else text


def class_prompt(name: str) -> str:
    """The prompt of a class for conformity: the class template alone, never the request's context."""
    return CLASS_TEMPLATE.replace("{class}", prompt_name(name))


def prompt_name(label: str) -> str:
    """A label as written in prompts: its first synonym, underscores as spaces."""
    return label.split(",")[0].strip().replace("_", " ")


def seed_name(request: RequestSpec) -> str:
    """The seed group of a request, with the date if it is fresh; the `@` can be in no group's name."""
    group = request.seed_group or request.name
    return f"{group}@{request.fresh}" if request.fresh else group


def sample_seed(job_seed: int, seed_group: str, classes: tuple[int, ...], index: int) -> int:
    """Seed of a sample: a non-negative integer below 2^53 from job seed, group, class or subset, and index."""
    text = json.dumps([job_seed, seed_group, sorted(classes), index], separators=(",", ":"))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) % MAX_SEED


def plan_identity(job: JobSpec, requests: tuple[RequestPlan, ...], digests: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides pixels, scores or the layout of shards; not counts, not `runtime`, not `output.uri`.

    Args:
        digests: `{"diffusion": {address: digest}, "clip": digest, "target": digest, "transfer": [digest],
            "oracle": digest, "conditioning": {address: digest}, "starts": {address: digest}, "given": {address:
            digest}, "methods": {address: digest}}`, and `"judge"` and `"guidance_decoder"` with a digest where there
            is one, `"further_targets": [digest]` and `"oracles": [digest]` where there are some, `"adapters":
            [{"digest", "weight"}]` and `"vae"` with a digest where there are some, `"safety_checker": "off"` where it
            is off, `"temperature"` where the target has not its own, `"validity": {"digest", "intercept", "weights"}`
            where the job names an estimate of the share of people who agree.
    """
    return {
        "schema_version": IDENTITY_VERSION,
        "name": job.name,
        "seed": job.seed,
        "models": {key: value for key, value in digests.items() if key not in _BY_REQUEST},
        # Runs from before images were marked as synthetic have no such key.
        "output": job.output.model_dump(
            mode="json", exclude={"uri"} if job.output.provenance else {"uri", "provenance"}
        ),
        "requests": [_request_identity(job, plan, digests) for plan in requests],
    }


def planned_temperature(identity: dict[str, Any]) -> float | None:
    """The temperature that a plan of an identity gives its target in place of its own; None for its own.

    Raises:
        ValueError: it is not one.
    """
    temperature = identity["models"].get(TEMPERATURE)
    return None if temperature is None else usable_temperature(temperature)


def planned_validity(identity: dict[str, Any]) -> ValidityModel | None:
    """The estimate of the share of people who agree that a plan of an identity has; None where it has none.

    Raises:
        ValueError: it is not one.
    """
    fields = identity["models"].get(VALIDITY)
    return None if fields is None else usable_validity(fields)


def usable_validity(fields: Any) -> ValidityModel:
    """The model in a mapping from a file, with the keys `intercept` and `weights`.

    Raises:
        ValueError: it is not one.
    """
    values = [fields.get("intercept"), *(fields.get("weights") or ())] if isinstance(fields, dict) else []
    numbers = [float(value) for value in values if is_number(value) and abs(value) < MAX_COEFFICIENT]
    if len(numbers) < max(len(values), 2) or min(numbers[1:]) < 0:
        raise ValueError("the estimate of validity is not an intercept with weights, none of them negative")
    return ValidityModel(intercept=numbers[0], weights=tuple(numbers[1:]))


def usable_temperature(temperature: Any) -> float:
    """A temperature from a file, if logits can be divided by it.

    Raises:
        ValueError: they cannot.
    """
    if not is_number(temperature) or not MIN_TEMPERATURE <= temperature < MAX_TEMPERATURE:
        raise ValueError("the temperature of the target is not a positive number")
    return float(temperature)


def _request_identity(job: JobSpec, plan: RequestPlan, digests: dict[str, Any]) -> dict[str, Any]:
    """The part of a request in an identity; keys that came later are left out where they change nothing."""
    request = plan.spec
    return (
        {
            "name": request.name,
            "method": request.method,
            "classes": [list(cell.classes) for cell in plan.cells],
            "contexts": list(request.contexts),
            "prompt": request.prompt or "",
            "seed_group": request.seed_group or request.name,
            "diffusion": digests["diffusion"][request.diffusion or job.models.diffusion],
            "sampling": _sampling(job, request),
            # Of the request's own method alone: a change to another method's does not change its samples.
            "guidance": job.parameters_of(request).identity(),
            "accept": request.accept,
        }
        | _ensemble(job, request)
        | _conditioning(request, digests.get("conditioning", {}))
        | _start(request, digests.get("starts", {}))
        | ({"twin": True} if request.twin else {})
        | _given_images(job, request, digests.get("given", {}))
        | _method_digest(request, digests.get("methods", {}))
        | ({"quota": True} if request.has_quota else {})
        | ({"fresh": request.fresh} if request.fresh else {})
    )


def _ensemble(job: JobSpec, request: RequestSpec) -> dict[str, str]:
    """How a guided request takes several targets; no key where there is one."""
    is_seen = job.models.further_targets and request.method_record.is_guided
    return {"ensemble": job.guidance_of(request).ensemble} if is_seen else {}


def _method_digest(request: RequestSpec, digests: dict[str, str]) -> dict[str, str]:
    """The digest of the user's own method; no key for a built-in one."""
    return {"method_digest": digests.get(request.method, "")} if request.method_record.is_user_code else {}


def _given_images(job: JobSpec, request: RequestSpec, digests: dict[str, str]) -> dict[str, str]:
    """The digest of the images that a request's criterion sees; no key where it sees none."""
    address = job.criterion_images(request)
    return {"given_images": digests.get(address, "")} if address else {}


def _sampling(job: JobSpec, request: RequestSpec) -> dict[str, Any]:
    """How a request is sampled; plans from before Karras sigmas could be chosen have no such key."""
    sampling = job.sampling_of(request)
    is_chosen = sampling.use_karras_sigmas is not None
    return sampling.model_dump(mode="json", exclude=set() if is_chosen else {"use_karras_sigmas"})


def _conditioning(request: RequestSpec, digests: dict[str, str]) -> dict[str, Any]:
    """What decides the embeddings, with digests of artefact or images in place of their addresses."""
    spec = request.conditioning
    if spec is None:
        return {}
    screening = {"threshold": spec.threshold, "max_draws": spec.max_draws} if spec.is_screened else {}
    source = {"images" if spec.artefact is None else "artefact": digests[spec.artefact or spec.images or ""]}
    return {"conditioning": source | {"noise_level": spec.noise_level, "screening": screening}}


def _start(request: RequestSpec, digests: dict[str, str]) -> dict[str, Any]:
    """What samples start from, with the digest of the images in place of their address; at strength 1 of none."""
    if request.start is None:
        return {}
    images = {"images": digests[request.start.images]} if request.used_start else {}
    return {"start": images | {"strength": request.start.strength}}
