"""A study, as somebody would add it: which classes does the target confuse? `tests/test_extending.py` installs it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from engine.data.reading.corpus import open_run


@dataclass(frozen=True, slots=True, kw_only=True)
class Confusion:
    """How many samples of a class the target takes for another class."""

    class_name: str
    predicted: str
    count: int


def confusions(uri: str) -> list[Confusion]:
    """Count the errors of a run's target, most frequent first.

    Raises:
        RiskforgeError: there is no such run, or it cannot be read.
    """
    corpus = open_run(uri).filter("target_errs")
    rows = corpus.to_table(["class_name", "predicted_class"]).to_pylist()
    counts = Counter((row["class_name"], corpus.labels[row["predicted_class"]]) for row in rows)
    return [
        Confusion(class_name=class_name, predicted=predicted, count=count)
        for (class_name, predicted), count in counts.most_common()
    ]
