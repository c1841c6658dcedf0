"""The selected samples as a map-style torch data set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from engine.data.images import decode_stored
from engine.data.run.tar_index import MemberPlace, TarReader, index_tars
from engine.data.stores.base import StoredFile
from engine.errors import JobError

if TYPE_CHECKING:
    import pyarrow as pa

Sample = tuple[Any, "int | Tensor", float]


class TorchSamples(Dataset[Sample]):
    """Image, label and weight by number, in the order of the runs and of their rows.

    Holds no image in memory, can be pickled, and every worker of a loader opens the tars for itself.

    Attributes:
        keys: of the samples, unique within a run.
        targets: classes [N].
        weights: [N], float64.
        class_names: in index order; empty where they are not known.
    """

    def __init__(
        self,
        reader: TarReader,
        places: np.ndarray,
        keys: list[str],
        targets: np.ndarray,
        soft_labels: np.ndarray | None,
        weights: np.ndarray,
        class_names: tuple[str, ...],
        transform: Callable[[Any], Any] | None,
    ) -> None:
        self.keys, self.targets, self.weights, self.class_names = keys, targets, weights, class_names
        self._reader, self._places, self._soft_labels, self._transform = reader, places, soft_labels, transform

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> Sample:
        data = self._reader.read(MemberPlace(*self._places[number].tolist()))
        image = decode_stored(data, f"the image of {self.keys[number]!r}")
        label = int(self.targets[number]) if self._soft_labels is None else torch.from_numpy(self._soft_labels[number])
        shown = as_tensor(np.asarray(image)) if self._transform is None else self._transform(image)
        return shown, label, float(self.weights[number])


def as_tensor(pixels: np.ndarray) -> Tensor:
    """8-bit pixels [H, W, 3] as floats [3, H, W] in [0, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


class RunSamples(NamedTuple):
    """The selected samples of one run.

    Attributes:
        tars: those of the run, which hold the images.
        table: a row for each sample, with `key`, `class_index` and, for soft labels, `soft_label`.
        weights: of the samples, [N] float64; None where each weighs 1.
    """

    tars: Sequence[StoredFile]
    table: pa.Table
    weights: np.ndarray | None


def make_samples(
    runs: Sequence[RunSamples],
    class_names: tuple[str, ...],
    transform: Callable[[Any], Any] | None,
    weights_text: str | None,
) -> TorchSamples:
    """The data set of the selected samples of some runs; see `Corpus.to_torch`.

    Args:
        weights_text: the expression of the weights, for messages.

    Raises:
        JobError: a weight is negative or not finite, or soft labels have different lengths.
        CorruptShardError: a tar is missing, torn, or lacks an image.
    """
    tars: list[StoredFile] = []
    places: list[tuple[int, int, int]] = []
    keys: list[str] = []
    for run in runs:
        run_keys = run.table["key"].to_pylist()
        index = index_tars(run.tars, run_keys)
        places += [(len(tars) + tar, offset, size) for tar, offset, size in (index[key].image for key in run_keys)]
        tars += run.tars
        keys += run_keys
    is_soft = "soft_label" in runs[0].table.column_names
    weights = [np.ones(len(run.table)) if run.weights is None else run.weights for run in runs]
    return TorchSamples(
        TarReader(tars),
        np.array(places, dtype=np.int64),
        keys,
        np.concatenate([run.table["class_index"].to_numpy() for run in runs]),
        _soft_labels([run.table["soft_label"] for run in runs], keys) if is_soft else None,
        _checked(np.concatenate(weights), weights_text, keys),
        class_names,
        transform,
    )


def _checked(weights: np.ndarray, text: str | None, keys: list[str]) -> np.ndarray:
    wrong = np.flatnonzero(~np.isfinite(weights) | (weights < 0))
    if len(wrong):
        first = wrong[0]
        raise JobError(
            f"weights {text!r}: is {weights[first]} for {keys[first]!r} ({len(wrong)} such samples); weights are finite"
            " and not negative"
        )
    return weights


def _soft_labels(columns: list[pa.ChunkedArray], keys: list[str]) -> np.ndarray:
    """Training targets [N, n]."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = pa.chunked_array([chunk for column in columns for chunk in column.chunks], type=columns[0].type)
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    odd = np.flatnonzero((lengths != lengths[0]) | (lengths == 0))
    if len(odd):
        raise JobError(
            f"labels: {keys[odd[0]]!r} has a soft label of {lengths[odd[0]]} classes, the first sample one of"
            f" {lengths[0]}; use labels='hard'"
        )
    return pc.list_flatten(column).to_numpy().astype(np.float32).reshape(len(keys), lengths[0])
