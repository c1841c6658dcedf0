"""Near duplicates among samples of one class, by the cosine of their CLIP embeddings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence, Set
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    import PIL.Image

BATCH = 64
# Rows of the two sides of a product: 1024 x 4096 floats are 16 MB.
ROWS = 1024
COLUMNS = 4096


class Duplicate(NamedTuple):
    """A dropped sample, the most similar kept one, and their cosine."""

    dropped: int
    kept: int
    similarity: float


def embed(images: Iterable[PIL.Image.Image], address: str, advance: Callable[[str], None]) -> np.ndarray:
    """Normalised CLIP embeddings [N, d], float32.

    Args:
        address: of the CLIP model.
        advance: progress callback.

    Raises:
        JobError: the model cannot be loaded, or gives an embedding that has no cosine with others.
    """
    import torch

    from engine.errors import JobError
    from engine.methods.finiteness import Faults
    from engine.models.clip import Clip

    clip = Clip.load(address, "cuda" if torch.cuda.is_available() else "cpu")
    parts: list[np.ndarray] = []
    left = iter(images)
    while batch := list(islice(left, BATCH)):
        advance(f"embedding image {len(parts) * BATCH}")
        embeds, faults = clip.image_embeds(batch), Faults(len(batch))
        faults.check_embeds(embeds, "the CLIP model", address)
        if fault := next((faults[row] for row in range(len(batch)) if faults[row]), ""):
            raise JobError(f"--deduplicate: {fault}, so near duplicates cannot be found; give another one with --clip")
        parts.append(torch.nn.functional.normalize(embeds, dim=1).numpy())
    return np.concatenate(parts)


def near_duplicates(embeddings: np.ndarray, classes: Sequence[int], threshold: float) -> list[Duplicate]:
    """The samples to drop so that no two of a class are as similar as the threshold; greedy, earlier samples are kept.

    Args:
        embeddings: normalised [N, d].
        classes: of the samples [N].
        threshold: cosine from which on two samples are duplicates.

    Returns:
        In the order of the dropped samples.
    """
    duplicates: list[Duplicate] = []
    labels = np.asarray(classes)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        duplicates += [
            Duplicate(int(rows[dropped]), int(rows[kept]), similarity)
            for dropped, kept, similarity in _greedy(embeddings[rows], threshold)
        ]
    return sorted(duplicates)


def replacements(
    embeddings: np.ndarray,
    classes: Sequence[int],
    cells: Sequence[Hashable],
    num_samples: int,
    dropped: Set[int],
    threshold: float,
) -> list[int]:
    """Spare samples that take the place of dropped ones: the first of each cell that resemble nothing that is kept.

    Args:
        embeddings: normalised [N, d], of the samples and then the spare ones, in the order in which they are taken.
        classes: of all of them [N].
        cells: of all of them [N], within which one takes the place of another.
        num_samples: how many of them are samples, not spare.
        dropped: numbers of the samples that go.
        threshold: as for `near_duplicates`.

    Returns:
        Numbers of the spare ones that are taken, in their order.
    """
    missing, taken = Counter(cells[number] for number in dropped), list[int]()
    stay: dict[int, list[int]] = {}
    for number in range(num_samples):
        if number not in dropped:
            stay.setdefault(classes[number], []).append(number)
    for number in range(num_samples, len(cells)):
        others = stay.setdefault(classes[number], [])
        if not missing[cells[number]] or (others and _largest(embeddings, number, others) >= threshold):
            continue
        missing[cells[number]] -= 1
        taken.append(number)
        others.append(number)
    return taken


def _largest(embeddings: np.ndarray, number: int, others: list[int]) -> float:
    """The largest cosine of a sample to some others."""
    chunks = (others[start : start + COLUMNS] for start in range(0, len(others), COLUMNS))
    return max(float((embeddings[chunk] @ embeddings[number]).max()) for chunk in chunks)


def _greedy(embeddings: np.ndarray, threshold: float) -> list[Duplicate]:
    """Block by block, so that memory does not grow with the square of the number of samples."""
    duplicates: list[Duplicate] = []
    kept: list[int] = []
    for start in range(0, len(embeddings), ROWS):
        block = embeddings[start : start + ROWS]
        best, nearest = _nearest_of(block, embeddings, np.array(kept, dtype=np.int64))
        inside, kept_rows = block @ block.T, list[int]()
        for row in range(len(block)):
            if kept_rows and (near := inside[row, kept_rows]).max() > best[row]:
                best[row], nearest[row] = near.max(), start + kept_rows[int(near.argmax())]
            if best[row] >= threshold:
                duplicates.append(Duplicate(start + row, int(nearest[row]), float(best[row])))
            else:
                kept_rows.append(row)
        kept += [start + row for row in kept_rows]
    return duplicates


def _nearest_of(block: np.ndarray, embeddings: np.ndarray, kept: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row the largest cosine to a kept sample, and which that is."""
    best = np.full(len(block), -np.inf, dtype=np.float32)
    nearest = np.full(len(block), -1)
    for start in range(0, len(kept), COLUMNS):
        rows = kept[start : start + COLUMNS]
        products = block @ embeddings[rows].T
        place = products.argmax(1)
        values = products[np.arange(len(block)), place]
        better = values > best
        best[better], nearest[better] = values[better], rows[place[better]]
    return best, nearest
