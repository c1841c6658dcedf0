"""The tensors in a folder's safetensors, by the headers of the files; two models compared by what is in their tensors.

Memory stays small: headers, and a tensor of either model at a time. Imports no torch.
"""

from __future__ import annotations

import json
import math
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.errors import JobError
from engine.models.untrusted_files import MAX_DOCUMENT_BYTES, check_regular, read_whole
from engine.models.weight_files import is_left_out, weights_variant

if TYPE_CHECKING:
    from numpy.typing import NDArray

_MAX_HEADER = 100_000_000
# Bytes of a number of the types that weights have.
_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# What is counted while a network trains, and positions: no weights.
_COUNTERS = ("num_batches_tracked", "position_ids", "logit_scale")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file of safetensors: its type by their name for it, its shape, and the place of its bytes."""

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def read(self) -> bytes:
        """Its bytes."""
        with self.path.open("rb") as file:
            file.seek(self.start)
            return file.read(self.stop - self.start)


def stored_tensors(folder: Path) -> dict[str, StoredTensor]:
    """The tensors that are loaded from a folder, by name; of a pipeline's part that part's.

    Raises:
        JobError: a file is not whole.
    """
    variant = weights_variant(folder)
    paths = [path for path in sorted(folder.glob("*.safetensors")) if not is_left_out(path, variant)]
    whole = [path for path in paths if path.name in (_whole(variant), _whole(None))]
    # Other files beside the one that is whole are not loaded.
    chosen = whole[:1] or _listed(folder, paths)
    return {name: tensor for path in chosen for name, tensor in _header(path)}


def _whole(variant: str | None) -> str:
    return f"model.{variant}.safetensors" if variant else "model.safetensors"


def _listed(folder: Path, paths: list[Path]) -> list[Path]:
    """The shards that an index names, or all files where there is none."""
    names: set[str] = set()
    for index in folder.glob("*.safetensors.index*.json"):
        try:
            names |= {str(name) for name in json.loads(read_whole(index, MAX_DOCUMENT_BYTES))["weight_map"].values()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            continue
    return [path for path in paths if path.name in names] or paths


def _header(path: Path) -> Iterator[tuple[str, StoredTensor]]:
    """The entries of a file's header.

    Raises:
        JobError: it is none of safetensors, or shorter than its header says.
    """
    try:
        check_regular(path)
        total = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_MAX_HEADER, total - 8):
                raise ValueError("its header has no length that fits the file")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            start, stop = (8 + length + int(one) for one in entry["data_offsets"])
            if not 8 + length <= start <= stop <= total:
                raise ValueError("it is shorter than its header says")
            yield name, StoredTensor(path, str(entry["dtype"]), tuple(map(int, entry["shape"])), start, stop)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise JobError(f"{path.name} is not whole: {error}; fetch or save it again") from None


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
