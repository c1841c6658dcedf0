"""Guidance methods that are criteria: built in, or the user's own by `package.module:factory` in a request's `method`.

The factory is called with `guidance.custom.parameters` and returns a criterion (`engine.methods.custom.criterion`). The
user's own code runs as such, like the factory of a target. Torch is imported only where a method is loaded.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import JobError
from engine.job.spec import JobSpec, RequestSpec
from engine.methods.custom.criteria import DEFAULT_OTHER
from engine.methods.custom.spec import CustomGuidanceSpec
from engine.methods.registry import CRITERIA
from engine.models.factories import call_with_files, find_factory, module_of, reason_of

if TYPE_CHECKING:
    from engine.methods.custom.criterion import Criterion

EXAMPLE = "def criterion(images, scene): ..., a distance [B] of images [B, 3, H, W]"


def custom_methods(job: JobSpec) -> list[str]:
    """The addresses of the user's own methods in a job, without duplicates."""
    return sorted({request.method for request in job.requests if request.method_record.is_user_code})


def method_problems(job: JobSpec) -> Iterable[str]:
    """What is wrong with the criteria of a job, built in or the user's own, a line each.

    Side effects: imports their modules and calls their factories.
    """
    for number, request in enumerate(job.requests):
        record = request.method_record
        if record.has_criterion:
            try:
                if record.is_user_code:
                    method_digest(request.method)
                load_method(request.method, factory_arguments(job, request))
                _check_needs(job, request)
            except JobError as error:
                where = f"{job.where(number)}.method"
                yield from (f"{where}: {problem}" for problem in error.problems)


def scorer_names(job: JobSpec, request: RequestSpec) -> list[str]:
    """The classifiers that the criterion of a request may ask, by their names in `Scene.scorers`."""
    further = [f"target.{place}" for place in range(1, len(job.models.targets))]
    return ["target", *further, *(["oracle"] if job.parameters_of(request).sees_oracle else [])]


def _check_needs(job: JobSpec, request: RequestSpec) -> None:
    """Refuse a built-in criterion without the images or the second classifier that it compares with.

    Raises:
        JobError: what is missing, with the field that gives it.
    """
    method = request.method
    if method == "feature" and not job.criterion_images(request):
        raise JobError("'feature': guidance.custom.images: names no images to be near to; give labelled ones")
    if method != "disagreement":
        return
    other, known = factory_arguments(job, request).get("other", DEFAULT_OTHER), scorer_names(job, request)
    if other not in known[1:]:
        named = ", ".join(known[1:]) or "none"
        raise JobError(
            f"'disagreement': {other!r} is no second classifier that may guide (there are: {named}); give a list in"
            " models.target, whose second one is 'target.1', or an oracle with guidance.custom: {with_oracle: true,"
            " parameters: {other: oracle}}"
        )


def factory_arguments(job: JobSpec, request: RequestSpec) -> dict[str, Any]:
    """The arguments of the factory that a request's `method` names: `guidance.custom.parameters`."""
    parameters = job.parameters_of(request)
    assert isinstance(parameters, CustomGuidanceSpec)
    return parameters.parameters


def method_digests(job: JobSpec) -> dict[str, dict[str, str]]:
    """Digest of each of the user's own methods of a job, as `engine.job.plan.plan_identity` takes them.

    Empty without any: plans of such jobs keep the digest that they had before methods had digests.

    Raises:
        JobError: as `method_digest`.
    """
    methods = custom_methods(job)
    return {"methods": {address: method_digest(address) for address in methods}} if methods else {}


@functools.cache
def method_digest(address: str) -> str:
    """Digest of the file of a method's module: read once in each process, as the module is imported once.

    Raises:
        JobError: there is no such module or function, or it has no file.
    """
    find_factory(address)
    file = getattr(sys.modules[module_of(address)[0]], "__file__", None)
    if file is None:
        raise JobError(f"'{address}': its module has no file, so a change of it could not be noticed; put it into one")
    return hashlib.sha256(Path(file).read_bytes()).hexdigest()[:32]


def load_method(address: str, parameters: dict[str, Any]) -> Criterion:
    """The criterion that a method's factory returns for its parameters; a method may be one that is built in.

    Raises:
        JobError: no such module or factory, other parameters than it takes, it fails, or it returns no criterion.
    """
    if address in CRITERIA:
        return _load_built_in(address, parameters)
    factory = find_factory(address)
    _check_parameters(address, factory, parameters)
    try:
        criterion = call_with_files(address, lambda: factory(**parameters))
    except (Exception, SystemExit) as error:
        raise JobError(f"'{address}' failed: {reason_of(error)}") from error
    if not callable(criterion):
        raise JobError(f"'{address}' gave a {type(criterion).__name__}; return a function, such as {EXAMPLE}")
    try:
        inspect.signature(criterion).bind(None, None)
    except (TypeError, ValueError) as error:
        raise JobError(f"'{address}' gave a function that cannot be called so ({error}); return {EXAMPLE}") from None
    return criterion


def _load_built_in(name: str, parameters: dict[str, Any]) -> Criterion:
    factory = CRITERIA[name].load_criterion()
    _check_parameters(name, factory, parameters)
    try:
        criterion: Criterion = factory(**parameters)
    except ValueError as error:
        raise JobError(f"'{name}': guidance.custom.parameters.{error}") from None
    return criterion


def _check_parameters(address: str, factory: Any, parameters: dict[str, Any]) -> None:
    try:
        inspect.signature(factory).bind(**parameters)
    except TypeError as error:
        known = ", ".join(inspect.signature(factory).parameters) or "none"
        raise JobError(f"'{address}': guidance.custom.parameters: {error}; it takes {known}") from None
    except ValueError:
        # A callable without a signature raises by itself when it is called with wrong arguments.
        return
