"""What people's answers say of the samples of a run: of each key the share of raters who say its label."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from engine.data.review.answers import CHOICE, REPEAT, has_answers, last_answers, read_answers
from engine.data.stores.base import Store

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa


def answered_store(stores: Iterable[Store]) -> Store | None:
    """The first of some stores that has answers: of a rescoring they are those to the run whose images it scored."""
    return next((store for store in stores if has_answers(store)), None)


def choices(store: Store, notice: Callable[[str], None] = lambda text: None) -> pa.Table:
    """The answers to choices between classes that count, in the columns of `engine.data.review.answers`.

    Args:
        notice: receives a line for each file that is left out.

    Raises:
        OutputError: the store cannot be read.
    """
    import pyarrow.compute as pc

    table = last_answers(read_answers(store, notice))
    return table.filter(pc.equal(table["mode"], CHOICE)).combine_chunks()


def says_label(answers: pa.Table) -> np.ndarray:
    """For each answer whether it is the label of the item, of a joint prompt one of its classes, [N] booleans.

    "None of these" and "cannot tell" are not.
    """
    import numpy as np
    import pyarrow.compute as pc

    given = answers["answer_class"].to_numpy()
    parents = pc.list_parent_indices(answers["subset"]).to_numpy()
    members = pc.list_flatten(answers["subset"]).to_numpy()
    says = np.zeros(len(answers), dtype=bool)
    says[parents[(given[parents] == members) & (members >= 0)]] = True
    return says


def human_agreement(answers: pa.Table) -> dict[str, float]:
    """By key the share of raters who say the label, each by the last of the answers; of keys that nobody saw none.

    An item that is repeated as an attention check counts as it was answered first.

    Args:
        answers: as `choices` gives them.
    """
    import numpy as np
    import pyarrow.compute as pc

    first = answers.filter(pc.not_equal(answers["kind"], REPEAT)).combine_chunks()
    last: dict[tuple[str, str], bool] = dict(
        zip(
            zip(first["key"].to_pylist(), first["rater"].to_pylist(), strict=True),
            says_label(first).tolist(),
            strict=True,
        )
    )
    by_key: dict[str, list[bool]] = {}
    for (key, _), says in last.items():
        by_key.setdefault(key, []).append(says)
    return {key: float(np.mean(answered)) for key, answered in by_key.items()}
