"""The tensors in a folder's safetensors, by the headers of the files. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engine.errors import JobError
from engine.models.untrusted_files import MAX_DOCUMENT_BYTES, check_regular, read_whole
from engine.models.weight_files import is_left_out, weights_variant

_MAX_HEADER = 100_000_000


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file of safetensors.

    Attributes:
        dtype: its type by the name of safetensors, such as `BF16`.
        start, stop: of its bytes in the file.
    """

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
    """The tensors that are loaded from the folder of a model or of a pipeline's part, by name.

    Raises:
        JobError: a file is damaged.
    """
    variant = weights_variant(folder)
    paths = [path for path in sorted(folder.glob("*.safetensors")) if not is_left_out(path, variant)]
    unsharded = [path for path in paths if path.name in (_unsharded(variant), _unsharded(None))]
    # Files next to an unsharded one are not loaded.
    chosen = unsharded[:1] or _listed(folder, paths)
    return {name: tensor for path in chosen for name, tensor in _header(path)}


def tensors_in(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file of safetensors, by name.

    Raises:
        JobError: it is damaged.
    """
    return dict(_header(path))


def _unsharded(variant: str | None) -> str:
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
        JobError: the file is not of safetensors, or shorter than its header requires.
    """
    try:
        check_regular(path)
        total = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_MAX_HEADER, total - 8):
                raise ValueError("the length of its header does not fit the file")
            entries = json.loads(file.read(length))
        entries.pop("__metadata__", None)
        for name, entry in entries.items():
            start, stop = (8 + length + int(offset) for offset in entry["data_offsets"])
            if not 8 + length <= start <= stop <= total:
                raise ValueError("it is shorter than its header requires")
            yield name, StoredTensor(path, str(entry["dtype"]), tuple(map(int, entry["shape"])), start, stop)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise JobError(f"{path.name} is damaged: {error}; download or save it again") from None


def tensors_of(folder: Path, address: str, kind: str) -> dict[str, StoredTensor]:
    """`stored_tensors` with errors that name the model.

    Args:
        kind: what is expected of the folder, such as `a CLIP model`.

    Raises:
        JobError: a file is damaged.
    """
    try:
        return stored_tensors(folder)
    except JobError as error:
        raise JobError(f"'{address}' cannot be loaded as {kind} ({error})") from None
