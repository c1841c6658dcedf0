"""Whether two models have the same weights, by the values of their tensors.

Memory stays small: headers, and one tensor of either model at a time. Imports no torch.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.models.stored_tensors import stored_tensors

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Bytes of a number of the types that weights have.
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# What is counted while a network trains, and positions: no weights.
_COUNTERS = ("num_batches_tracked", "position_ids", "logit_scale")


def have_same_weights(first: Path, second: Path, part: tuple[str, ...] = ("",)) -> bool:
    """Whether all weights of one model are among those of the other, whatever else lies or stands beside them.

    Names of files and tensors, their order, precision and settings do not matter: tensors are compared by size and
    values; where the types differ, after rounding to the coarser one. Scalars and counters are no weights.

    Args:
        first, second: folders, or archives of TorchScript or torch.export.
        part: names of modules with a dot, such as `vision_model.`: only their tensors are compared, wherever these
            names stand in theirs.

    Raises:
        JobError: a file is not whole.
    """
    ours, theirs = sorted((_weights(first, part), _weights(second, part)), key=len)
    by_size: dict[int, list[_Values]] = {}
    for one in theirs:
        by_size.setdefault(one.count, []).append(one)
    if not ours or Counter(one.count for one in ours) - Counter(one.count for one in theirs):
        return False
    # The small ones first: biases and norms tell most models apart.
    return all(
        any(_is_same(one, other) for other in by_size[one.count]) for one in sorted(ours, key=lambda one: one.count)
    )


@dataclass(frozen=True, slots=True)
class _Values:
    """A flat tensor that is read when it is compared."""

    dtype: str
    count: int
    read: Callable[[], bytes]

    def floats(self) -> NDArray[Any]:
        """Its values in float32 or float64."""
        import numpy as np

        data = self.read()
        if self.dtype == "BF16":
            return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4")
        kind = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}[self.dtype]
        values = np.frombuffer(data, kind)
        return values if kind == "<f8" else values.astype("<f4")


def _weights(place: Path, part: tuple[str, ...]) -> list[_Values]:
    if place.is_file():
        # Of eight bytes and fewer are counters.
        return [one for one in _archived(place) if one.count > 2]
    return [
        _Values(tensor.dtype, math.prod(tensor.shape), tensor.read)
        for name, tensor in stored_tensors(place).items()
        if tensor.dtype in _SIZES
        and math.prod(tensor.shape) > 1
        and not name.endswith(_COUNTERS)
        # transformers loads `clip.vision_model.` as well.
        and any(f".{one}" in f".{name}" for one in part)
    ]


def _archived(path: Path) -> Iterator[_Values]:
    """The tensors of an archive of TorchScript or torch.export, which are plain bytes there, taken for float32."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if re.search(r"/(data|data/weights|data/constants|constants)/(weight_|tensor_)?\d+$", entry.filename):
                yield _Values("F32", entry.file_size // 4, partial(_member, path, entry.filename))


def _member(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        data = archive.read(name)
    return data[: len(data) // 4 * 4]


def _is_same(first: _Values, second: _Values) -> bool:
    """Whether two tensors are the same, or one is the other in another precision."""
    import numpy as np

    if first.dtype == second.dtype:
        return first.read() == second.read()
    one, other = first.floats(), second.floats()
    if {first.dtype, second.dtype} == {"F16", "BF16"}:
        # Neither holds the other: both are roundings of what is not here.
        return bool(np.allclose(one, other, rtol=2**-7, atol=1e-7))
    coarser = min(first.dtype, second.dtype, key=_SIZES.__getitem__)
    return bool(np.array_equal(_rounded(one, coarser), _rounded(other, coarser)))


def _rounded(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Values as a type has them, to nearest and ties to even."""
    import numpy as np

    if dtype == "BF16":
        bits = values.astype("<f4").view("<u4")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype("<u4").view("<f4")
    with np.errstate(over="ignore"):
        return values.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype])
