"""What an arm changes, context by context: differences with intervals over seeds and images, and which are losses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.methods.intervals import LEVEL, Estimate, wilson_interval
from engine.studies.compare.significance import holm
from engine.studies.crossed import Crossed, crossed_difference
from engine.studies.retrain.arm_records import BEFORE

Right = Mapping[str, Sequence[NDArray[np.bool_]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ContextChange:
    """What an arm changes on the test images of a context.

    Attributes:
        change: of accuracy, with its interval over seeds and images.
        p_worse: of an accuracy that is not lower, one-sided.
        p_holm: the same after Holm's correction over the contexts that are not weak; None for a weak one.
    """

    context: str
    num_images: int
    change: Estimate
    p_worse: float
    p_holm: float | None

    @property
    def is_weak(self) -> bool:
        """Whether it is one that was to gain."""
        return self.p_holm is None

    @property
    def is_worse(self) -> bool:
        """Whether it is no weak one, and significantly worse."""
        return self.p_holm is not None and self.p_holm < 1 - LEVEL


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmChange:
    """What an arm changes against another.

    Attributes:
        overall: on all test images.
        contexts: in the order in which they first occur.
        gain: mean over the weak contexts; None where there is none.
        others: mean over all other contexts; None where there is none.
    """

    arm: str
    base: str
    overall: Estimate
    contexts: tuple[ContextChange, ...]
    gain: Estimate | None
    others: Estimate | None

    @property
    def weak(self) -> tuple[ContextChange, ...]:
        """The contexts that were to gain."""
        return tuple(row for row in self.contexts if row.is_weak)

    @property
    def rest(self) -> tuple[ContextChange, ...]:
        """All other contexts."""
        return tuple(row for row in self.contexts if not row.is_weak)

    @property
    def worse(self) -> tuple[ContextChange, ...]:
        """Those that are significantly worse, the largest losses first."""
        return tuple(sorted((row for row in self.rest if row.is_worse), key=lambda row: row.change.value))


def weak_contexts(right: Right, contexts: Sequence[tuple[str, ...]]) -> tuple[str, ...]:
    """Contexts in which `before` is worse than on all images: Wilson's interval of its accuracy lies below that."""
    before = right[BEFORE][0]
    overall = float(before.mean())
    rows = rows_by_context(contexts)
    return tuple(
        name
        for name, members in rows.items()
        if wilson_interval(int(before[members].sum()), len(members)).high < overall
    )


def compare_arms(
    right: Right,
    contexts: Sequence[tuple[str, ...]],
    *,
    arm: str,
    base: str,
    weak: Sequence[str] | None = None,
    origins: Sequence[str] = (),
) -> ArmChange:
    """Accuracy of an arm less that of another, seeds paired.

    Args:
        right: by arm, seed by seed, whether the prediction of each test image is right, [N]; of an arm that was not
            trained, such as `before`, once.
        contexts: of each test image; an image without any only counts overall.
        weak: contexts that are to gain; those of `weak_contexts` where not given.
        origins: of each image, what it was made of, where that is known: images of one origin, such as one scan in
            several contexts, are drawn together.

    Raises:
        ValueError: the arms have different numbers of seeds.
    """
    values = _differences(right[arm], right[base])
    units = _numbered(np.array(origins)) if origins else np.arange(values.shape[1])
    rows = rows_by_context(contexts)
    chosen = set(weak_contexts(right, contexts) if weak is None else weak)
    changes = {name: _mean_over([members], values, units) for name, members in rows.items()}
    rest = [name for name in rows if name not in chosen]
    adjusted = dict(zip(rest, holm([changes[name].p_less for name in rest]), strict=True))
    of_weak, of_rest = ([rows[name] for name in rows if (name in adjusted) == is_rest] for is_rest in (False, True))
    return ArmChange(
        arm=arm,
        base=base,
        overall=crossed_difference(values, units=units).estimate,
        gain=_mean_over(of_weak, values, units).estimate if of_weak else None,
        others=_mean_over(of_rest, values, units).estimate if of_rest else None,
        contexts=tuple(
            ContextChange(
                context=name,
                num_images=len(members),
                change=changes[name].estimate,
                p_worse=changes[name].p_less,
                p_holm=adjusted.get(name),
            )
            for name, members in rows.items()
        ),
    )


def _differences(new: Sequence[NDArray[np.bool_]], old: Sequence[NDArray[np.bool_]]) -> NDArray[np.float64]:
    """New less old, [S, N], where one that was trained once stands for every seed."""
    counts = {len(new), len(old)}
    if len(counts) > 1 and min(counts) != 1:
        raise ValueError(f"{len(new)} and {len(old)} seeds cannot be paired")
    return np.stack(new).astype(float) - np.stack(old)


def _mean_over(parts: Sequence[NDArray[np.int64]], values: NDArray[np.float64], units: NDArray[np.int64]) -> Crossed:
    """The mean of the means of several contexts."""
    columns = np.concatenate(parts)
    strata = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    return crossed_difference(values[:, columns], strata, _numbered(units[columns]))


def rows_by_context(contexts: Sequence[tuple[str, ...]]) -> dict[str, NDArray[np.int64]]:
    """The images of each context."""
    rows: dict[str, list[int]] = defaultdict(list)
    for row, tags in enumerate(contexts):
        for tag in dict.fromkeys(tags):
            rows[tag].append(row)
    return {name: np.array(members) for name, members in rows.items()}


def _numbered(units: NDArray[Any]) -> NDArray[np.int64]:
    """Equal ones as equal numbers from 0 on."""
    return np.unique(units, return_inverse=True)[1]
