"""The registry of methods: one record each, which is all that the rest of the engine knows of them by name.

To add a method, write `methods/NAME/spec.py` (its parameters, without torch) and `methods/NAME/guide.py`, and add a
record to `METHODS`. Addresses are strings: a spec is imported when the schema of jobs is built, a guide when the first
sample is made.
"""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

    from engine.methods.custom.criterion import Criterion
    from engine.methods.guidance.guided import GuidedDenoiser
    from engine.methods.parameters import MethodParameters

# The fields of a request that name its classes: each class alone, or a subset with one joint prompt.
ClassField = Literal["classes", "boundary"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method of making samples.

    Attributes:
        name: value of `method` in a request, and key of its section of `guidance`; see `criterion`.
        title: in the description of `method` in the schema of jobs.
        caption: in the data card, after the method's name.
        spec: `module:class` of its parameters, a `MethodParameters`; empty for a method without guidance.
        guide: `module:function` of its `Guide`; empty for a method without guidance.
        class_fields: the fields of a request that may name its classes.
        measures_conformity: whether it may differentiate the CLIP model that measures conformity, which makes
            conformity circular.
        extremes: the score whose highest and lowest samples `evaluate` shows; None shows none.
        is_user_code: whether `method` is the address `package.module:factory` of a criterion of the user's own in
            place of `name`.
        criterion: `module:function` of the factory of a criterion that is built in; `method` is then its own name, and
            `name` that of its section.
        sees_images: whether it is of use to have images in its section (`guidance.custom.images`).
    """

    name: str
    title: str
    caption: str
    spec: str = ""
    guide: str = ""
    class_fields: tuple[ClassField, ...] = ("classes", "boundary")
    measures_conformity: bool = False
    extremes: Literal["kldb", "risk"] | None = None
    is_user_code: bool = False
    criterion: str = ""
    sees_images: bool = False

    @property
    def has_criterion(self) -> bool:
        """Whether it descends a criterion of its own, which its guide takes before the other arguments."""
        return self.is_user_code or bool(self.criterion)

    @property
    def is_guided(self) -> bool:
        """Whether the method guides at all."""
        return bool(self.guide)

    def load_spec(self) -> type[MethodParameters]:
        """Import the class of its parameters; of a guided method."""
        spec: type[MethodParameters] = _load(self.spec)
        return spec

    def load_criterion(self) -> Callable[..., Criterion]:
        """Import the factory of its criterion, without torch; of a criterion that is built in."""
        factory: Callable[..., Criterion] = _load(self.criterion)
        return factory

    def load_guide(self) -> Callable[..., GuidedDenoiser]:
        """Import its guide (`engine.methods.guidance.guided.Guide`), and torch; of a guided method."""
        guide: Callable[..., GuidedDenoiser] = _load(self.guide)
        return guide


METHODS = (
    Method(name="prompt", title="Prompt only", caption="sampled without guidance"),
    Method(
        name="boundary",
        title="KLDB boundary guidance",
        caption="guided by the target's KLDB, towards the decision boundary between the classes of the request",
        spec="engine.methods.boundary.spec:BoundaryGuidanceSpec",
        guide="engine.methods.boundary.guide:guide_to_boundary",
        class_fields=("boundary",),
        extremes="kldb",
    ),
    Method(
        name="risky",
        title="RiskyDiff guidance",
        caption="guided to risk for the target under conformity to the class",
        spec="engine.methods.risky.spec:RiskyGuidanceSpec",
        guide="engine.methods.risky.guide:guide_to_risk",
        class_fields=("classes",),
        measures_conformity=True,
        extremes="risk",
    ),
    Method(
        name="custom",
        title="a criterion of your own",
        caption="guided by a criterion of its own, whose code is not part of this data set",
        spec="engine.methods.custom.spec:CustomGuidanceSpec",
        guide="engine.methods.custom.guide:guide_by_criterion",
        measures_conformity=True,
        is_user_code=True,
        sees_images=True,
    ),
)
USER_CODE = next(method for method in METHODS if method.is_user_code)


def _criterion(name: str, title: str, caption: str, *, sees_images: bool = False) -> Method:
    """A criterion that is built in: it shares the section of the user's own ones. What sees images compares by CLIP."""
    return dataclasses.replace(
        USER_CODE,
        title=title,
        caption=caption,
        criterion=f"engine.methods.custom.criteria:{name}",
        is_user_code=False,
        measures_conformity=sees_images,
        sees_images=sees_images,
    )


# By the value of `method` in a request; none has a section of its own.
CRITERIA = {
    "entropy": _criterion("entropy", "guidance to uncertainty", "guided to a high entropy of the target's prediction"),
    "margin": _criterion(
        "margin",
        "guidance to a small margin",
        "guided to a small lead of the target's likeliest class over the second",
    ),
    "disagreement": _criterion(
        "disagreement", "guidance to disagreement", "guided to different predictions of two classifiers"
    ),
    "feature": _criterion(
        "feature",
        "guidance to given images",
        "guided by the CLIP embeddings of given images",
        sees_images=True,
    ),
}
BUILT_IN = {method.name: method for method in METHODS if not method.is_user_code} | CRITERIA
UNGUIDED = next(method for method in METHODS if not method.is_guided)


def find_method(name: object) -> Method | None:
    """The method that a request's `method` names, or None where it names none.

    Args:
        name: the name of a built-in method, or an address `package.module:factory`; of any type, as a job has it that
            was not checked yet.
    """
    if not isinstance(name, str):
        return None
    return USER_CODE if ":" in name else BUILT_IN.get(name)


def is_guided(name: object) -> bool:
    """Whether samples of a method are guided, by its name; one that is not known here is taken to."""
    method = find_method(name)
    return method is None or method.is_guided


def method_of(name: str) -> Method:
    """As `find_method`, for the `method` of a checked request.

    Raises:
        KeyError: there is no such method.
    """
    method = find_method(name)
    if method is None:
        raise KeyError(name)
    return method


def _load(address: str) -> Any:
    module, _, name = address.partition(":")
    return getattr(importlib.import_module(module), name)
