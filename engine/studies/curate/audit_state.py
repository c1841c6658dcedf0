"""The state of the monitor, kept from one curated run to the next: `curation/audit.safetensors`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from engine.data.run.file_names import AUDIT, STOPPED_AUDIT
from engine.data.stores.base import Store
from engine.data.stores.opening import open_store
from engine.errors import MAX_REASON_CHARS, JobError, OutputError, first_line
from engine.methods.curation.learning import Standardisation
from engine.methods.curation.monitor import AuditState, start_audit
from engine.methods.strict_json import parse_json
from engine.models.untrusted_files import read_whole

MAX_STATE_BYTES = 2**30
_VERSION = 1
# Bytes of the name of an audited pair.
_NAME_BYTES = 16
_ROW_TENSORS = ("first", "second")
_NUM_BETTORS = 3


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class StoredAudit:
    """The monitor of a series of curated runs.

    Attributes:
        state: after all audits so far; differences are standardised.
        first: [n, d] raw features of the first samples of the pairs audited so far, float32.
        second: [n, d] of the second ones.
        standardisation: of the first audit of the series, which all later ones use.
        names: of the pairs, `pair_name`.
        clip_digest: digest of the CLIP model that gave the features.
    """

    state: AuditState
    first: Tensor
    second: Tensor
    standardisation: Standardisation
    names: tuple[str, ...]
    clip_digest: str


def pair_name(first: str, second: str) -> str:
    """Name of a pair of images in no order, from their checksums; the same images in another run have the same."""
    text = "\0".join(sorted((first, second)))
    return hashlib.sha256(text.encode()).hexdigest()[: 2 * _NAME_BYTES]


def new_audit(standardisation: Standardisation, clip_digest: str) -> StoredAudit:
    """The state before the first audit."""
    num_features = len(standardisation.mean)
    nothing = torch.zeros(0, num_features, dtype=torch.float32)
    return StoredAudit(
        state=start_audit((), num_features),
        first=nothing,
        second=nothing,
        standardisation=standardisation,
        names=(),
        clip_digest=clip_digest,
    )


def audit_bytes(audit: StoredAudit) -> bytes:
    """The file of a state; equal states give equal bytes."""
    names = torch.tensor([list(bytes.fromhex(name)) for name in audit.names], dtype=torch.uint8)
    state, scale = audit.state, audit.standardisation
    tensors = {
        "log_wealth": state.log_wealth, "highest": state.highest, "num_differing": state.num_differing,
        "trusted": state.trusted, "first": audit.first, "second": audit.second, "mean": scale.mean,
        "scale": scale.scale, "names": names.reshape(-1, _NAME_BYTES),
    }  # fmt: skip
    # Copies: a new state has one zero for two of them, which safetensors refuses.
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    # A single key: the order of several is not fixed.
    return safetensors.torch.save(tensors, {"audit": f'{{"version": {_VERSION}, "clip": "{audit.clip_digest}"}}'})


def read_audit(uri: str, clip_digest: str) -> StoredAudit:
    """The state of the monitor in an earlier curated run, or in the output of one that its alarm stopped.

    Args:
        uri: of that run, `--after`.
        clip_digest: of the CLIP model that gives the features now.

    Raises:
        JobError: there is no such state, it is damaged, or its features are those of another CLIP model.
    """
    store = open_store(uri)
    if not store.is_there():
        raise JobError(f"--after: there is no folder '{uri}'; give an earlier curated run")
    for name in (AUDIT, STOPPED_AUDIT):
        if store.exists(name):
            return _checked_audit(store, name, clip_digest, "--after", "leave --after out")
    raise JobError(
        f"--after: '{uri}' has no {AUDIT}, since it was not curated with --trusted; give a run that was, or leave"
        " --after out to start a new monitor"
    )


def read_stopped_audit(output: Store, clip_digest: str) -> StoredAudit | None:
    """The state of a monitor whose alarm stopped an earlier curation into an output; None without one.

    Raises:
        JobError: it is damaged, or its features are those of another CLIP model.
    """
    if not output.exists(STOPPED_AUDIT):
        return None
    return _checked_audit(output, STOPPED_AUDIT, clip_digest, "--output", "choose another --output")


def _checked_audit(store: Store, name: str, clip_digest: str, option: str, remedy: str) -> StoredAudit:
    """The state in a file of an output; `remedy` starts a new monitor."""
    try:
        audit = parse_audit(read_whole(store.fetch(name), MAX_STATE_BYTES))
    except (ValueError, OSError, OutputError) as error:
        reason = first_line(error)[:MAX_REASON_CHARS]
        raise JobError(
            f"{option}: {name} of '{store.uri}' is damaged ({reason}); restore it, or {remedy} to start a new monitor"
        ) from None
    if audit.clip_digest != clip_digest:
        raise JobError(
            f"{option}: the monitor of '{store.uri}' has features of another CLIP model (digest {audit.clip_digest})"
            f" than models.clip of RUN (digest {clip_digest}); use the same model, or {remedy} to start a new monitor"
        )
    return audit


def parse_audit(data: bytes) -> StoredAudit:
    """The state in a file's bytes, checked: the file may come from anyone.

    Raises:
        ValueError: it is no state that `audit_bytes` could have written.
    """
    clip_digest = _clip_digest(data)
    tensors = _tensors(data)
    _check_shapes(tensors)
    standardisation = Standardisation(tensors["mean"], tensors["scale"])
    first, second = tensors["first"], tensors["second"]
    return StoredAudit(
        state=AuditState(
            log_wealth=tensors["log_wealth"],
            highest=tensors["highest"],
            differences=standardisation(first) - standardisation(second),
            trusted=tensors["trusted"],
            num_differing=tensors["num_differing"],
        ),
        first=first,
        second=second,
        standardisation=standardisation,
        names=tuple(bytes(row).hex() for row in tensors["names"].tolist()),
        clip_digest=clip_digest,
    )


def _clip_digest(data: bytes) -> str:
    length = int.from_bytes(data[:8], "little")
    header = parse_json(data[8 : 8 + length]) if 0 < length <= len(data) else None
    try:
        described: Any = parse_json(header["__metadata__"]["audit"])  # type: ignore[index]
        version, digest = described["version"], described["clip"]
    except (KeyError, TypeError):
        raise ValueError("it is no state of a monitor") from None
    if version != _VERSION:
        raise ValueError(f"it has version {version!r}, this engine reads {_VERSION}")
    if not isinstance(digest, str):
        raise ValueError("its digest of the CLIP model is no text")
    return digest


def _tensors(data: bytes) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load(data)
    except (safetensors.SafetensorError, RuntimeError, KeyError, TypeError) as error:
        raise ValueError(first_line(error)) from None


def _check_shapes(tensors: dict[str, Tensor]) -> None:
    expected = {"log_wealth", "highest", "num_differing", "trusted", "first", "second", "mean", "scale", "names"}
    if tensors.keys() != expected:
        raise ValueError(f"it holds {', '.join(sorted(tensors.keys() ^ expected))}, or lacks it")
    num_features = tensors["mean"].numel()
    num_pairs = tensors["trusted"].numel()
    shapes = {
        "log_wealth": (_NUM_BETTORS,), "highest": (), "num_differing": (), "trusted": (num_pairs,),
        "first": (num_pairs, num_features), "second": (num_pairs, num_features), "mean": (num_features,),
        "scale": (num_features,), "names": (num_pairs, _NAME_BYTES),
    }  # fmt: skip
    for name, shape in shapes.items():
        dtype = torch.uint8 if name == "names" else torch.float32 if name in _ROW_TENSORS else torch.float64
        if tensors[name].shape != shape or tensors[name].dtype != dtype:
            raise ValueError(f"its {name} is {list(tensors[name].shape)} of {tensors[name].dtype}")
        if not bool(tensors[name].isfinite().all()):
            raise ValueError(f"its {name} has a value that is not finite")
    _check_values(tensors)


def _check_values(tensors: dict[str, Tensor]) -> None:
    if not bool((tensors["scale"] > 0).all()):
        raise ValueError("its scale has a value that is not above 0")
    if not bool(((tensors["trusted"] == 0) | (tensors["trusted"] == 1)).all()):
        raise ValueError("its trusted has a choice that is neither 0 nor 1")
    if not 0 <= float(tensors["num_differing"]) <= len(tensors["trusted"]):
        raise ValueError("its num_differing is not a number of its records")
    # The wealth of no bettor exceeds the largest sum so far, and all start with a sum of 1.
    if float(tensors["highest"]) < max(0.0, float(tensors["log_wealth"].logsumexp(-1)) - 1e-9):
        raise ValueError("its highest wealth is below its wealth")
