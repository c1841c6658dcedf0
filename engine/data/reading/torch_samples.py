"""The selected samples as a map-style torch data set."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from engine.data.images import UnusableImageError, decode_sample
from engine.data.run.tar_index import Place, TarReader, index_tars
from engine.data.stores.base import StoredFile
from engine.errors import CorruptShardError, JobError

if TYPE_CHECKING:
    import pyarrow as pa

    from engine.data.reading.corpus import Corpus

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
        data = self._reader.read(Place(*self._places[number].tolist()))
        try:
            image = decode_sample(data)
        except UnusableImageError as error:
            raise CorruptShardError(f"the image of {self.keys[number]!r} {error}") from None
        label = int(self.targets[number]) if self._soft_labels is None else torch.from_numpy(self._soft_labels[number])
        shown = as_tensor(np.asarray(image)) if self._transform is None else self._transform(image)
        return shown, label, float(self.weights[number])


def as_tensor(pixels: np.ndarray) -> Tensor:
    """8-bit pixels [H, W, 3] as floats [3, H, W] in [0, 1]."""
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).float() / 255


def make_samples(
    corpus: Corpus, transform: Callable[[Any], Any] | None, labels: str, weights: str | None
) -> TorchSamples:
    """The data set of a corpus of samples; see `Corpus.to_torch`."""
    tars: list[StoredFile] = []
    places: list[tuple[int, int, int]] = []
    keys: list[str] = []
    targets, soft, values = [], [], []
    if weights is not None:
        corpus = _weighable(corpus, weights)
    weigh = None if weights is None else corpus.numbers(weights, "weights")
    for number, source in enumerate(corpus.runs):
        columns = ["key", "class_index", *(["soft_label"] if labels == "soft" else [])]
        table = corpus.run_table(number, columns)
        own = table["key"].to_pylist()
        found = index_tars(source.tars, own)
        for tar, offset, size in (found[key].image for key in own):
            places.append((len(tars) + tar, offset, size))
        tars += source.tars
        keys += own
        targets.append(table["class_index"].to_numpy())
        values.append(np.ones(len(own)) if weigh is None else weigh(number))
        if labels == "soft":
            soft.append(table["soft_label"])
    return TorchSamples(
        TarReader(tars),
        np.array(places, dtype=np.int64),
        keys,
        np.concatenate(targets),
        _soft_labels(soft, keys) if labels == "soft" else None,
        _checked(np.concatenate(values), weights, keys),
        corpus.labels,
        transform,
    )


def _weighable(corpus: Corpus, weights: str) -> Corpus:
    """The samples that have a weight; what was not scored has none where the expression asks for a score."""
    known = corpus.has_number(weights, "weights")
    num_unknown = len(corpus) - len(known)
    about = f"weights {weights!r}: {num_unknown} of {len(corpus)} samples were not scored, such as real images"
    remedy = "write such as '1 + 3 * (scored and target_errs)' to keep them"
    if not len(known):
        raise JobError(f"{about}; {remedy}")
    if num_unknown:
        warnings.warn(f"{about}, and are left out; {remedy}", stacklevel=4)
    return known


def _checked(weights: np.ndarray, text: str | None, keys: list[str]) -> np.ndarray:
    wrong = np.flatnonzero(~np.isfinite(weights) | (weights < 0))
    if len(wrong):
        one = wrong[0]
        raise JobError(
            f"weights {text!r}: is {weights[one]} for {keys[one]!r} ({len(wrong)} such samples); weights are finite and"
            " not negative"
        )
    return weights


def _soft_labels(columns: list[pa.ChunkedArray], keys: list[str]) -> np.ndarray:
    """Training targets [N, n]."""
    import pyarrow as pa
    import pyarrow.compute as pc

    column = pa.chunked_array([chunk for one in columns for chunk in one.chunks], type=columns[0].type)
    lengths = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
    odd = np.flatnonzero((lengths != lengths[0]) | (lengths == 0))
    if len(odd):
        raise JobError(
            f"labels: {keys[odd[0]]!r} has a soft label of {lengths[odd[0]]} classes, the first sample one of"
            f" {lengths[0]}; use labels='hard'"
        )
    return pc.list_flatten(column).to_numpy().astype(np.float32).reshape(len(keys), lengths[0])
