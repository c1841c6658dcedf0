"""The run whose images a rescored folder is about, also where both have moved together."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from engine.data.run.file_names import MANIFEST, RESCORED_FROM
from engine.data.run.stored_plan import read_digest
from engine.data.stores.base import Store
from engine.data.stores.opening import open_store
from engine.errors import JobError, OutputError, StoreLostError
from engine.terminal import printable


def origin_address(store: Store, manifest: Mapping[str, Any]) -> str | None:
    """The address of the run that was scored; None of a folder that is not rescored.

    It is relative to the folder where that lies inside the run, so both can be moved together. Where it is not there,
    the run is looked for beside the folder, and recognised by its digest.

    Raises:
        JobError: the manifest has something else in its place.
        StoreLostError: an object store cannot be reached.
    """
    origin = manifest.get(RESCORED_FROM)
    if origin is None:
        return None
    address = origin.get("uri") if isinstance(origin, dict) else origin
    if not isinstance(address, str):
        raise JobError(f"RUN: {store.address(MANIFEST)}: {RESCORED_FROM} is not the address of a run ({address!r})")
    first, *others = _candidates(store, address)
    digest = origin.get("plan_digest") if isinstance(origin, dict) else None
    if _is_run(first, None):
        return first
    return next((other for other in others if digest and _is_run(other, digest)), first)


def _candidates(store: Store, address: str) -> Iterator[str]:
    """Without a scheme an address is relative to the folder, or else to the working directory."""
    yield store.absolute_address(address)
    name = address.rstrip("/").rsplit("/", 1)[-1]
    if name not in ("", ".", ".."):
        yield store.absolute_address(f"../{name}")


def _is_run(address: str, digest: str | None) -> bool:
    """Whether a run is there, by its digest where that is given; a merged data set is one here, too."""
    try:
        candidate = open_store(address)
        return candidate.is_there() if digest is None else read_digest(candidate) == digest
    except StoreLostError:
        raise
    except OutputError:
        return False


def find_origin(store: Store, manifest: Mapping[str, Any]) -> tuple[Store | None, str]:
    """The run that has the images of a rescored folder, or None and why there is none.

    Returns:
        The folder itself, if it is not rescored.
    """
    origin = manifest.get(RESCORED_FROM)
    if origin is None:
        return store, ""
    fields = origin if isinstance(origin, dict) else {"uri": origin}
    address, reason = str(fields.get("uri")), "it is not there"
    with contextlib.suppress(JobError, OutputError):
        address = origin_address(store, manifest) or address
        run = open_store(address)
        digest = read_digest(run)
        if digest is not None and digest == fields.get("plan_digest", digest):
            return run, ""
        if digest is not None:
            reason = "another run is there now"
    return None, f"no images: these scores are of the images of the run '{printable(address)}', and {reason}"
