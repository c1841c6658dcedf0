"""Class names for display: two classes of the same name, such as ImageNet's two cranes, are distinguished."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

from engine.job.columns import NO_CLASS
from engine.job.plan import Plan


def distinct_pairs(pairs: Iterable[tuple[int, str]]) -> dict[tuple[int, str], str]:
    """A text for each index and name: the name, and where another index has that name too, the index with it.

    The name of `NO_CLASS`, which is no class, stays unchanged.
    """
    pairs = list(pairs)
    indices: dict[str, set[int]] = defaultdict(set)
    for index, name in pairs:
        if index != NO_CLASS:
            indices[name].add(index)
    return {
        (index, name): f"{name} ({index})" if index != NO_CLASS and len(indices[name]) > 1 else name
        for index, name in pairs
    }


def distinct_names(names: Mapping[int, str]) -> dict[int, str]:
    """Names by class index all different: `crane (134)` and `crane (517)`."""
    texts = {index: text for (index, _), text in distinct_pairs(names.items()).items()}
    # A class may itself be called `crane (134)`.
    while double := {text for text, count in Counter(texts.values()).items() if count > 1}:
        texts = {index: f"{text} ({index})" if text in double else text for index, text in texts.items()}
    return texts


def label_names(labels: Sequence[str]) -> list[str]:
    """Names of all classes, all different, as `datasets` wants those of a `ClassLabel`.

    Args:
        labels: class names in index order.
    """
    return list(distinct_names(dict(enumerate(labels))).values())


def planned_names(plan: Plan) -> dict[int, str]:
    """Names by index of the classes that a plan asks for, all different."""
    cells = (cell for request in plan.requests for cell in request.cells)
    return distinct_names({index: name for cell in cells for index, name in zip(cell.classes, cell.names, strict=True)})
