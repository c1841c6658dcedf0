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

# Bytes per element of the types that weights have.
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# Buffers that are no weights: counters of training, and positions; and the scalars of CLIP's and SigLIP's loss.
_COUNTERS = ("num_batches_tracked", "position_ids", "logit_scale", "logit_bias")

# Tensors whose values have a larger correlation are alike; smaller ones than this correlate by chance.
_ALIKE, _MIN_ALIKE = 0.5, 64


def have_same_weights(first: Path, second: Path, part: tuple[str, ...] = ("",)) -> bool:
    """Whether all weights of one model are among those of the other, whatever else the two have.

    Names of files and tensors, their order, precision and settings do not matter: tensors are compared by size and
    values; where the types differ, after rounding to the coarser type. Scalars and counters are not weights.

    Args:
        first, second: folders, or archives of TorchScript or torch.export.
        part: prefixes of modules, such as `vision_model.`: only their tensors are compared, at any depth of the
            tensors' names.

    Raises:
        JobError: a file is damaged.
    """
    ours, theirs = sorted((_weights(first, part), _weights(second, part)), key=len)
    by_size: dict[int, list[_LazyTensor]] = {}
    for tensor in theirs:
        by_size.setdefault(tensor.count, []).append(tensor)
    if not ours or Counter(tensor.count for tensor in ours) - Counter(tensor.count for tensor in theirs):
        return False
    # Small tensors first: biases and norms distinguish most models.
    ours.sort(key=lambda tensor: tensor.count)
    return all(any(_is_same(tensor, other) for other in by_size[tensor.count]) for tensor in ours)


def alike_share(first: Path, second: Path) -> float:
    """Share of the weights of two models that are alike: equal, or trained from equal ones.

    Matrices and kernels of one name and shape are compared by the correlation of their values. Training from random
    weights leaves next to none between two networks; fine-tuning leaves nearly all of it. The share is of the smaller
    model's matrices and kernels, in [0, 1].

    Args:
        first, second: folders; of archives, whose tensors have no names, nothing is known: 0.

    Raises:
        JobError: a file is damaged.
    """
    if first.is_file() or second.is_file():
        return 0.0
    ours, theirs = _matrices(first), _matrices(second)
    common = [name for name, tensor in ours.items() if name in theirs and theirs[name].shape == tensor.shape]
    alike = sum(ours[name].count for name in common if _are_alike(ours[name].lazy, theirs[name].lazy))
    smaller = min(sum(tensor.count for tensor in side.values()) for side in (ours, theirs))
    return alike / smaller if smaller else 0.0


@dataclass(frozen=True, slots=True)
class _Matrix:
    lazy: _LazyTensor
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return self.lazy.count


def _matrices(folder: Path) -> dict[str, _Matrix]:
    """The weights of a folder that have two dimensions or more: biases and norms are much the same in any network."""
    return {
        name: _Matrix(_LazyTensor(tensor.dtype, math.prod(tensor.shape), tensor.read), tensor.shape)
        for name, tensor in stored_tensors(folder).items()
        if tensor.dtype in _SIZES and len(tensor.shape) > 1 and math.prod(tensor.shape) > _MIN_ALIKE
    }


def _are_alike(first: _LazyTensor, second: _LazyTensor) -> bool:
    import numpy as np

    ours, theirs = (tensor.floats().astype("<f8") for tensor in (first, second))
    ours, theirs = ours - ours.mean(), theirs - theirs.mean()
    scale = math.sqrt(float(ours @ ours) * float(theirs @ theirs))
    return bool(scale > 0 and np.isfinite(scale) and float(ours @ theirs) > _ALIKE * scale)


@dataclass(frozen=True, slots=True)
class _LazyTensor:
    """A flat tensor whose bytes are read only when it is compared.

    Attributes:
        dtype: its type by the name of safetensors.
        count: number of its elements.
    """

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


def _weights(path: Path, part: tuple[str, ...]) -> list[_LazyTensor]:
    if path.is_file():
        # At most eight bytes: a counter.
        return [tensor for tensor in _archived(path) if tensor.count > 2]
    return [
        _LazyTensor(tensor.dtype, math.prod(tensor.shape), tensor.read)
        for name, tensor in stored_tensors(path).items()
        if tensor.dtype in _SIZES
        and math.prod(tensor.shape) > 1
        and not name.endswith(_COUNTERS)
        # At any depth: transformers loads `clip.vision_model.` as well.
        and any(f".{prefix}" in f".{name}" for prefix in part)
    ]


def _archived(path: Path) -> Iterator[_LazyTensor]:
    """The tensors of an archive of TorchScript or torch.export, plain bytes that are taken for float32."""
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if re.search(r"/(data|data/weights|data/constants|constants)/(weight_|tensor_)?\d+$", entry.filename):
                yield _LazyTensor("F32", entry.file_size // 4, partial(_member, path, entry.filename))


def _member(path: Path, name: str) -> bytes:
    with zipfile.ZipFile(path) as archive:
        data = archive.read(name)
    return data[: len(data) // 4 * 4]


def _is_same(first: _LazyTensor, second: _LazyTensor) -> bool:
    """Whether two tensors are equal, in the coarser precision of the two."""
    import numpy as np

    if first.dtype == second.dtype:
        return first.read() == second.read()
    ours, theirs = first.floats(), second.floats()
    if {first.dtype, second.dtype} == {"F16", "BF16"}:
        # Neither type includes the other: both are roundings of values that are not stored here.
        return bool(np.allclose(ours, theirs, rtol=2**-7, atol=1e-7))
    coarser = min(first.dtype, second.dtype, key=_SIZES.__getitem__)
    return bool(np.array_equal(_rounded(ours, coarser), _rounded(theirs, coarser)))


def _rounded(values: NDArray[Any], dtype: str) -> NDArray[Any]:
    """Values rounded to a type, to nearest with ties to even."""
    import numpy as np

    if dtype == "BF16":
        bits = values.astype("<f4").view("<u4")
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype("<u4").view("<f4")
    with np.errstate(over="ignore"):
        return values.astype({"F64": "<f8", "F32": "<f4", "F16": "<f2"}[dtype])
