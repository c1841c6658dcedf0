"""The rows of an ablation: requests of one job that share noise, and the artefacts that they are conditioned on."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from engine.errors import JobError
from engine.job.parsing import parse_job
from engine.job.plan import resolve_requests
from engine.job.spec import JobSpec, RequestSpec
from engine.models.artefacts import find_artefact
from engine.models.configurations import ARTEFACT_DOCUMENT, read_config
from engine.models.labels import target_labels
from engine.studies.ablate.parts import NOTHING, TITLES, WHOLE, Recipe, chosen_request, taken_away
from engine.studies.ablate.spec import AblateSpec, Part

Group = Literal["parts", "predictor", "components"]
# The artefact of one Gaussian a class that takes the place of mixtures.
SINGLE = "single"


@dataclass(frozen=True, slots=True, kw_only=True)
class Arm:
    """A row: a request of the study's run.

    Attributes:
        name: of the request.
        title: in tables.
        group: which table it is in; the whole recipe is in `parts`.
        part: that is taken away; empty of the others.
        step: number of the predictor, from 0, or of components; None of the others.
        is_guided: whether it is not of embeddings alone.
        raw: the request as plain data, without its name.
    """

    name: str
    title: str
    group: Group
    raw: dict[str, Any]
    part: Part | Literal[""] = ""
    step: int | None = None
    is_guided: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Design:
    """What a study makes.

    Attributes:
        job: the whole job of all arms.
        request: that is taken apart.
        arms: the whole recipe first.
        notes: what is left out, and why.
        num_samples: of each arm.
    """

    job: JobSpec
    request: RequestSpec
    arms: tuple[Arm, ...]
    notes: tuple[str, ...]
    num_samples: int

    def of(self, group: Group) -> list[Arm]:
        """The arms of a table."""
        return [arm for arm in self.arms if arm.group == group]


def weakened(step: int) -> str:
    """The name of the artefact with a predictor of some step, from 0."""
    return f"predictor-{step + 1}"


def of_components(number: int) -> str:
    """The name of the artefact with so many Gaussians a class."""
    return f"components-{number}"


def design(spec: AblateSpec, job: JobSpec, artefacts: Mapping[str, str] | None = None) -> Design:
    """The arms of a study and their job.

    Args:
        artefacts: addresses of those that the study makes, by name; the job's own stands in for what is not made yet.

    Raises:
        JobError: a field asks for what the request does not have, or nothing would be taken away.
    """
    request = chosen_request(spec, job)
    labels = target_labels(job)
    num_cells = sum(len(plan.cells) for plan in resolve_requests(_only(job, request), labels)) * len(request.contexts)
    own = request.conditioning.artefact if request.conditioning else None
    count = max(1, spec.count // num_cells)
    addresses = _Addresses(own or "", artefacts or {})
    recipe = Recipe(
        request=request.model_copy(update={"count": count}),
        guidance=job.guidance_of(request).risky,  # type: ignore[attr-defined]
        is_mixture=own is not None and _is_mixture(own),
        # A pipeline that takes embeddings samples nothing without.
        needs_embeddings=request.conditioning is not None,
        text_diffusion=spec.text_diffusion,
        fixed_step=spec.fixed_step,
        single=addresses[SINGLE],
    )
    parts, notes = taken_away(recipe, spec.parts)
    _check_asked(spec, recipe, bool(parts))
    arms = [*_part_arms(recipe, parts), *_predictor_arms(spec, recipe, addresses)]
    arms += _component_arms(spec, recipe, addresses)
    return Design(
        job=_job(job, arms, request),
        request=request,
        arms=tuple(arms),
        notes=(*notes, *_notes(spec, recipe, request, count * num_cells)),
        num_samples=count * num_cells,
    )


class _Addresses(dict[str, str]):
    """Addresses of artefacts by name, with one for those that are not made yet."""

    def __init__(self, stand_in: str, made: Mapping[str, str]) -> None:
        super().__init__(made)
        self._stand_in = stand_in

    def __missing__(self, name: str) -> str:
        return self._stand_in


def _only(job: JobSpec, request: RequestSpec) -> JobSpec:
    return job.model_copy(update={"requests": (request,)})


def _is_mixture(address: str) -> bool:
    """Whether an artefact has mixtures; of one that is not there the run says so."""
    folder = find_artefact(address)
    return folder is not None and read_config(folder / ARTEFACT_DOCUMENT).get("kind") == "mixtures"


def _check_asked(spec: AblateSpec, recipe: Recipe, has_parts: bool) -> None:
    """Check that the request has what fields of the study are about.

    Raises:
        JobError: it has not, a line each.
    """
    problems, name = list[str](), recipe.request.name
    has_artefact = bool(recipe.request.conditioning and recipe.request.conditioning.artefact)
    if spec.predictor_steps and not recipe.request.is_screened:
        problems.append(
            f"predictor_steps: request '{name}' screens no embeddings; leave it out, or choose another request"
        )
    if spec.components and not has_artefact:
        problems.append(f"components: request '{name}' draws no embeddings from an artefact; leave it out")
    asked = [field for field in ("predictor_steps", "components") if getattr(spec, field)]
    if asked and spec.data is None:
        problems.append(
            f"data: missing, and {' and '.join(asked)} need labelled images; name those that the artefact was prepared"
            " from, such as digits:validation (--data)"
        )
    if not asked and not has_parts:
        problems.append(f"parts: request '{name}' has none of those that are to be taken away; name others")
    if problems:
        raise JobError(problems)


def _part_arms(recipe: Recipe, parts: Mapping[Part, dict[str, Any]]) -> list[Arm]:
    """The whole recipe, the recipe without each part, and the prompt alone."""
    arms = [Arm(name=WHOLE, title="whole recipe", group="parts", raw=recipe.whole)]
    arms += [
        Arm(
            name=f"without-{part}", title=f"without {TITLES[part]}", group="parts", raw=raw, part=part,
            is_guided=part != "guidance",
        )
        for part, raw in parts.items()
    ]  # fmt: skip
    title = "prompt alone" if recipe.has_text_model else "nothing but unscreened embeddings"
    return [*arms, Arm(name=NOTHING, title=title, group="parts", raw=recipe.nothing(), is_guided=False)]


def _predictor_arms(spec: AblateSpec, recipe: Recipe, addresses: Mapping[str, str]) -> list[Arm]:
    """Screening alone and with guidance, by each predictor."""
    return [
        arm
        for step in range(spec.predictor_steps or 0)
        for arm in _both(recipe, weakened(step), f"predictor {step + 1}", "predictor", step, addresses)
    ]


def _component_arms(spec: AblateSpec, recipe: Recipe, addresses: Mapping[str, str]) -> list[Arm]:
    """Embeddings alone and with guidance, of each number of Gaussians a class."""
    return [
        arm
        for number in spec.components
        for arm in _both(recipe, of_components(number), _gaussians(number), "components", number, addresses)
    ]


def _both(
    recipe: Recipe, name: str, title: str, group: Group, step: int, addresses: Mapping[str, str]
) -> tuple[Arm, Arm]:
    """Embeddings of an artefact alone, and with guidance."""
    guided = recipe.with_artefact(addresses[name])
    alone = {**recipe.unguided(), "conditioning": guided["conditioning"]}
    return (
        Arm(name=f"{name}-alone", title=f"{title}, alone", group=group, raw=alone, step=step, is_guided=False),
        Arm(name=name, title=f"{title}, guided", group=group, raw=guided, step=step),
    )


def _gaussians(number: int) -> str:
    return f"{number} Gaussian{'s' * (number > 1)} a class"


def _job(job: JobSpec, arms: list[Arm], request: RequestSpec) -> JobSpec:
    """The job of all arms.

    Raises:
        JobError: an arm is not possible; the message names it in place of its number.
    """
    raw = job.model_dump(mode="json") | {"requests": [{**arm.raw, "name": arm.name} for arm in arms]}
    try:
        return parse_job(raw)
    except JobError as error:
        raise named(error, arms, request) from None


def named(error: JobError, arms: Sequence[Arm], request: RequestSpec) -> JobError:
    """Problems of arms, by what they are of what the user wrote; each once."""
    return JobError(list(dict.fromkeys(_named(line, arms, request) for line in error.problems)))


def _named(line: str, arms: Sequence[Arm], request: RequestSpec) -> str:
    if (place := re.match(r"requests\.(\d+)\.(\w+)", line)) is None:
        return line
    arm = arms[int(place[1])]
    if place[2] in ("diffusion", "conditioning") and arm.raw.get("diffusion") != request.diffusion:
        return f"text_diffusion{line[place.end() :]}"
    return f"request '{request.name}', {arm.title}: {line[place.start(2) :]}"


def _notes(spec: AblateSpec, recipe: Recipe, request: RequestSpec, num_samples: int) -> list[str]:
    """What the arms do not have of the request, and what is special of them."""
    notes = []
    if request.accept:
        notes.append("the rule of acceptance is left out: every sample counts, so that arms have the same noise")
    if num_samples != spec.count:
        notes.append(f"{num_samples} samples a row in place of {spec.count}: as many of each class and context")
    if not recipe.has_text_model:
        notes.append(
            "the last row keeps unscreened embeddings: the diffusion model needs some; name one on text alone as"
            " text_diffusion"
        )
    if recipe.guidance.sees_oracle and (spec.parts is None or "risk-target" in spec.parts):
        notes.append("without the risk target there is no oracle_floor either, as the fixed step has none")
    return notes
