"""Partners: which requests of a job make the same images but for guidance, so that samples of equal noise compare.

All work on a job as plain data, as manifests have it, which may be of an earlier version.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

from engine.job.json_values import digest_of
from engine.job.spec import merge
from engine.methods.registry import find_method

Request = Mapping[str, Any]


def prompt_partners(requests: Sequence[Request]) -> list[tuple[str, str]]:
    """Each request that guidance or conditioning changes, with the first plain one of equal noise and start.

    Plain is a request that follows its prompt alone: no guidance, no image embeddings.

    Args:
        requests: of a job, as plain data.
    """
    plain = _partners(requests, lambda request: _is_unguided(request) and not request.get("conditioning"), lambda _: 0)
    return [(name, partners[0]) for name, partners in plain.items()]


def unguided_partners(job: Mapping[str, Any]) -> dict[str, list[str]]:
    """For each guided request the unguided ones that differ in guidance alone: their samples are true twins.

    Diffusion model, conditioning and sampling are equal, too. Two samples are twins where seed, prompt and start are.
    """

    def traits(request: Request) -> Hashable:
        model = request.get("diffusion") or job["models"]["diffusion"]
        sampling = merge(job.get("sampling", {}), request.get("sampling", {}))
        return model, digest_of(request.get("conditioning")), digest_of(sampling)

    return _partners(job["requests"], _is_unguided, traits)


def _partners(
    requests: Sequence[Request], is_partner: Callable[[Request], bool], traits: Callable[[Request], Hashable]
) -> dict[str, list[str]]:
    """For each request that cannot be a partner those that can, and share noise, start and traits with it."""

    def shared(request: Request) -> Hashable:
        return request.get("seed_group") or request["name"], _start(request), traits(request)

    partners = defaultdict[Hashable, list[str]](list)
    for request in requests:
        if is_partner(request):
            partners[shared(request)].append(request["name"])
    others = [request for request in requests if not is_partner(request)]
    return {request["name"]: partners[shared(request)] for request in others if partners[shared(request)]}


def _start(request: Request) -> tuple[str, float] | None:
    """Images and strength of a start; at strength 1 the images are left out."""
    start = request.get("start")
    return (start["images"], start["strength"]) if start and start["strength"] < 1 else None


def _is_unguided(request: Request) -> bool:
    method = find_method(request.get("method"))
    return method is not None and not method.is_guided
