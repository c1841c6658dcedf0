"""The parts of a risky recipe, and the recipe without each of them: a request, and other requests."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from engine.errors import JobError
from engine.job.spec import JobSpec, RequestSpec
from engine.methods.registry import UNGUIDED
from engine.methods.risky.spec import RiskyGuidanceSpec
from engine.studies.ablate.spec import PARTS, AblateSpec, FixedStep, Part

RISKY = "risky"
WHOLE, NOTHING = "whole", "nothing"
# A prompt without a word: the template of the context alone, where there is none.
NO_TEXT = "{context}"
# As in "without screening".
TITLES: Mapping[Part, str] = {
    "screening": "screening",
    "conformity": "conformity",
    "text": "text",
    "embedding": "embedding",
    "mixture": "mixture",
    "risk-target": "risk target",
    "preset": "preset perceptible",
    "guidance": "guidance",
}


class AbsentError(Exception):
    """A recipe has no such part, or it cannot be taken away; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """A request whose parts are taken away.

    Attributes:
        request: as in the job.
        guidance: its parameters, with the job's.
        is_mixture: whether its embeddings are drawn from mixtures.
        needs_embeddings: whether its diffusion model cannot sample without.
        text_diffusion: a diffusion model on text alone; None where none is named.
        fixed_step: in place of a risk target.
        single: address of the artefact with one Gaussian a class, in place of the mixtures.
    """

    request: RequestSpec
    guidance: RiskyGuidanceSpec
    is_mixture: bool
    needs_embeddings: bool
    text_diffusion: str | None
    fixed_step: FixedStep
    single: str

    @property
    def whole(self) -> dict[str, Any]:
        """The request as plain data, with all parameters of its guidance named, of which every sample counts."""
        raw = self.request.model_dump(mode="json")
        return raw | {
            "seed_group": self.request.seed_group or self.request.name,
            "accept": {},
            "max_attempts": None,
            "fresh": False,
            "guidance": self._with(),
        }

    def _with(self, **changes: Any) -> dict[str, Any]:
        """The overrides of guidance with some parameters changed. All are named, so that no preset fills in others."""
        return {**self.request.guidance, RISKY: {**fields_of(self.guidance), **changes}}

    def without(self, part: Part) -> dict[str, Any]:
        """The request without a part.

        Raises:
            AbsentError: it has no such part, or the part cannot be taken away.
        """
        return {**self.whole, **_TAKEN[part](self)}

    def unguided(self) -> dict[str, Any]:
        """The request without guidance: the same embeddings, screened or not."""
        return {**self.whole, **_UNGUIDED}

    def with_artefact(self, address: str) -> dict[str, Any]:
        """The request with embeddings of another artefact, without twins: those of equal noise differ by it, too."""
        return {**self.whole, "twin": False, "conditioning": {**self.whole["conditioning"], "artefact": address}}

    def nothing(self) -> dict[str, Any]:
        """The prompt alone; where the model needs embeddings and no other is named, with unscreened ones."""
        try:
            return {**self.without("embedding"), **_UNGUIDED}
        except AbsentError:
            if not self.request.conditioning:
                return self.unguided()
            return {**self.without("screening"), **_UNGUIDED} if self.request.is_screened else self.unguided()

    @property
    def has_text_model(self) -> bool:
        """Whether it can be sampled by its prompt alone."""
        return not self.needs_embeddings or self.text_diffusion is not None


_UNGUIDED: dict[str, Any] = {"method": UNGUIDED.name, "guidance": {}, "twin": False}


def fields_of(parameters: RiskyGuidanceSpec) -> dict[str, Any]:
    """All parameters by name."""
    return {name: getattr(parameters, name) for name in type(parameters).model_fields}


def _screening(recipe: Recipe) -> dict[str, Any]:
    if not recipe.request.is_screened:
        raise AbsentError("its embeddings are not screened")
    unscreened = {**recipe.whole["conditioning"], "screening": False}
    # They have no effect without it, and are refused.
    return {"conditioning": {key: unscreened[key] for key in unscreened.keys() - {"threshold", "max_draws"}}}


def _conformity(recipe: Recipe) -> dict[str, Any]:
    if recipe.guidance.step == "paper":
        if not recipe.guidance.conformity_weight:
            raise AbsentError("its conformity_weight is 0")
        return {"guidance": recipe._with(conformity_weight=0.0)}
    if recipe.guidance.conformity_floor is None:
        raise AbsentError("it has no conformity_floor")
    return {"guidance": recipe._with(conformity_floor=None)}


def _text(recipe: Recipe) -> dict[str, Any]:
    request = recipe.request
    if request.conditioning is None:
        raise AbsentError("it has no embeddings, so that nothing but text says what to sample")
    return {"prompt": NO_TEXT, "contexts": [""], "count": request.num_wanted}


def _embedding(recipe: Recipe) -> dict[str, Any]:
    if recipe.request.conditioning is None:
        raise AbsentError("it has no embeddings")
    if not recipe.has_text_model:
        raise AbsentError("its diffusion model needs them; name one on text alone as text_diffusion")
    own = {"diffusion": recipe.text_diffusion} if recipe.needs_embeddings else {}
    return {"conditioning": None, **own}


def _mixture(recipe: Recipe) -> dict[str, Any]:
    if not recipe.is_mixture:
        raise AbsentError("its embeddings are not drawn from mixtures")
    return {"conditioning": {**recipe.whole["conditioning"], "artefact": recipe.single}}


def _risk_target(recipe: Recipe) -> dict[str, Any]:
    if recipe.guidance.step == "paper":
        raise AbsentError("its step is the paper's, which has none")
    has_floor = recipe.guidance.conformity_floor is not None
    weight = recipe.fixed_step.conformity_weight if has_floor else 0.0
    fixed = {"step": "paper", "scale": recipe.fixed_step.scale, "conformity_weight": weight, "oracle_floor": None}
    return {"guidance": recipe._with(**fixed)}


def _preset(recipe: Recipe) -> dict[str, Any]:
    if recipe.guidance.preset != "perceptible":
        raise AbsentError("its preset is adversarial")
    usual = fields_of(RiskyGuidanceSpec())
    named = {name: value for name, value in fields_of(recipe.guidance).items() if value != usual[name]}
    changed = fields_of(RiskyGuidanceSpec.model_validate({**named, "preset": "adversarial"}))
    if all(changed[name] == value for name, value in fields_of(recipe.guidance).items() if name != "preset"):
        raise AbsentError("it names every parameter that the preset would give")
    return {"guidance": recipe._with(**changed)}


def _guidance(recipe: Recipe) -> dict[str, Any]:
    return _UNGUIDED


_TAKEN: Mapping[Part, Callable[[Recipe], dict[str, Any]]] = {
    "screening": _screening,
    "conformity": _conformity,
    "text": _text,
    "embedding": _embedding,
    "mixture": _mixture,
    "risk-target": _risk_target,
    "preset": _preset,
    "guidance": _guidance,
}


def chosen_request(spec: AblateSpec, job: JobSpec) -> RequestSpec:
    """The request that is taken apart.

    Raises:
        JobError: there is none of method `risky`, none of that name, or several and none is named.
    """
    risky = {request.name: request for request in job.requests if request.method == RISKY}
    names = ", ".join(risky)
    if not risky:
        raise JobError("job.requests: none has method risky, whose parts the study takes away; name another job")
    if spec.request is not None and spec.request not in risky:
        raise JobError(f"request: the job has no risky request '{spec.request}'; it has {names}")
    if spec.request is None and len(risky) > 1:
        raise JobError(f"request: the job has {len(risky)} risky requests; name one of {names}")
    return risky[spec.request or names]


def taken_away(recipe: Recipe, parts: tuple[Part, ...] | None) -> tuple[dict[Part, dict[str, Any]], list[str]]:
    """The request without each part that it has, in the order of the table, and notes on the other ones."""
    requests, notes = {}, []
    for part in PARTS if parts is None else [part for part in PARTS if part in parts]:
        try:
            requests[part] = recipe.without(part)
        except AbsentError as reason:
            notes.append(f"{TITLES[part]} is not taken away from '{recipe.request.name}': {reason}")
    return requests, notes
