"""What the signal of a round needs of the rounds before it, as a file of the lane."""

from __future__ import annotations

from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from engine.data.stores.opening import open_store
from engine.errors import OutputError, first_line
from engine.methods.curation.learning import Standardisation
from engine.methods.curation.monitor import AuditState
from engine.models.untrusted_files import read_whole
from engine.studies.loop.signal import Memory

MAX_BYTES = 2**30
_AUDIT = ("log_wealth", "highest", "trusted", "num_differing", "first", "second")


def write_memory(path: Path, memory: Memory) -> None:
    """Store the memory, atomically; equal ones give equal bytes."""
    tensors = {"mean": memory.standardisation.mean, "scale": memory.standardisation.scale}
    if memory.audit is not None and memory.first is not None and memory.second is not None:
        audit = memory.audit
        values = (audit.log_wealth, audit.highest, audit.trusted, audit.num_differing, memory.first, memory.second)
        tensors |= dict(zip(_AUDIT, values, strict=True))
    data = safetensors.torch.save({name: value.double().contiguous() for name, value in tensors.items()})
    open_store(str(path.parent)).replace(path.name, data)


def read_memory(path: Path) -> Memory:
    """The memory of a lane.

    Raises:
        OutputError: the file is missing or damaged.
    """
    try:
        tensors = safetensors.torch.load(read_whole(path, MAX_BYTES))
        _check(tensors)
    except (OSError, ValueError, KeyError, RuntimeError, safetensors.SafetensorError) as error:
        raise OutputError(
            f"{path}: is missing or damaged ({first_line(error)}); remove round.json of its round, and the same command"
            " makes that round again"
        ) from None
    standardisation = Standardisation(tensors["mean"], tensors["scale"])
    if "trusted" not in tensors:
        return Memory(standardisation)
    first, second = tensors["first"], tensors["second"]
    audit = AuditState(
        log_wealth=tensors["log_wealth"],
        highest=tensors["highest"],
        differences=first - second,
        trusted=tensors["trusted"],
        num_differing=tensors["num_differing"],
    )
    return Memory(standardisation, audit, first, second)


def _check(tensors: dict[str, Tensor]) -> None:
    """Check names, shapes and values.

    Raises:
        ValueError: they are not those of a memory.
    """
    names = set(tensors)
    if names not in ({"mean", "scale"}, {"mean", "scale", *_AUDIT}):
        raise ValueError(f"it holds {', '.join(sorted(names))}")
    size = tensors["mean"].numel()
    shapes: dict[str, tuple[int, ...]] = {"mean": (size,), "scale": (size,)}
    if "trusted" in tensors:
        count = tensors["trusted"].numel()
        shapes |= {"trusted": (count,), "first": (count, size), "second": (count, size)}
        shapes |= {"log_wealth": (3,), "highest": (), "num_differing": ()}
    for name, shape in shapes.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != torch.float64 or not bool(tensor.isfinite().all()):
            raise ValueError(f"its {name} is not as it should be")
