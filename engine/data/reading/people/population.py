"""The images that a design stands for, with what machines say of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from engine.data.review.answers import DESIGNS
from engine.data.run.outcomes import (
    errors,
    joint_rows,
    label_validity,
    oracle_agreement,
    predicts_asked,
    scored_rows,
)
from engine.data.run.summary import class_texts
from engine.data.stores.base import Store
from engine.errors import CorruptShardError, OutputError
from engine.job.class_names import distinct_names
from engine.job.columns import ASKED, BY_NAME, ERRS, GUIDES, NO_CLASS, UNKNOWN
from engine.job.records import REAL
from engine.job.spec import JOINT_SEPARATOR
from engine.methods.strict_json import parse_json
from engine.models.untrusted_files import MAX_DOCUMENT_BYTES

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from engine.data.reading.corpus import Corpus

# Thresholds that rules are listed for.
MIN_PROBABILITIES = (0.9, 0.99, 0.999)
MIN_ESTIMATES = (0.5, 0.8, 0.9, 0.95)
_COLUMNS = (
    "request", "method", "class_name", *ASKED, *ERRS, "oracle_class", "oracles", "oracle_p_label_min", "p_valid",
    "conformity_margin", "status", "scored",
)  # fmt: skip
# The code of the class in a key: its index, or that of a joint prompt.
CLASS_OF_KEY = r"-(?P<code>[^-]*)-[^-]*$"
SCORES = ("p_valid", "oracle_p_label_min", "conformity_margin")


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawnDesign:
    """What is stored of a design's draw.

    Attributes:
        population: in words.
        requests: that were reviewed; empty for all.
        condition: filter that the images pass; empty for none.
        is_all: whether rejected and surplus images are in the population.
        strata: by name, images and how many were drawn.
    """

    population: str
    requests: tuple[str, ...]
    condition: str
    is_all: bool
    strata: dict[str, tuple[int, int]]


def read_drawn(store: Store, digest: str) -> DrawnDesign | None:
    """The draw of a stored design; None where it is not there, or cannot be read."""
    name = f"{DESIGNS}/{digest}.json"
    try:
        if not store.exists(name):
            return None
        document = parse_json(store.read(name, MAX_DOCUMENT_BYTES))
        return DrawnDesign(
            population=str(document["population"]),
            requests=tuple(map(str, document.get("requests", ()))),
            condition=str(document.get("condition", "")),
            is_all=bool(document.get("is_all", False)),
            strata={
                str(part["name"]): (int(part["num_images"]), int(part["num_drawn"])) for part in document["strata"]
            },
        )
    except (OutputError, CorruptShardError, ValueError, KeyError, TypeError, AttributeError):
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class Population:
    """The images of a population, a column each, [N].

    Attributes:
        place: of each key.
        request: names.
        prefix: request and code of the class, as strata of a design begin.
        class_name: what was asked for, of a joint prompt all of its classes.
        target_errs: whether the target predicts none of it.
        rules: by name, whether a rule takes an image for valid; what is unknown is not taken.
        scores: by name, of each image; NaN where unknown.
        machine: the verdict that estimates are powered by, in [0, 1]; None without an oracle.
        machine_name: of that verdict.
    """

    place: Mapping[str, int]
    request: np.ndarray
    prefix: np.ndarray
    class_name: np.ndarray
    target_errs: np.ndarray
    rules: dict[str, np.ndarray]
    scores: dict[str, np.ndarray]
    machine: np.ndarray | None
    machine_name: str

    def __len__(self) -> int:
        return len(self.request)


def read_population(corpus: Corpus, drawn: DrawnDesign | None, origin: Corpus) -> Population:
    """The images that a design stands for; without a stored one, all accepted samples.

    Args:
        corpus: one run, without a filter.
        origin: the run that the design was drawn from; of a rescoring that whose images it scored. The images are those
            of its rows, and what machines say of them is that of the corpus.

    Raises:
        JobError: the condition of the design cannot be used with the rows any more.
        CorruptShardError: rows cannot be read.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    is_all = drawn is not None and drawn.is_all
    chosen = origin.with_images(rejected=is_all, surplus=is_all)
    if drawn is not None and drawn.condition:
        chosen = chosen.filter(drawn.condition, "the condition of the review's design")
    table = _table(chosen)
    if origin is not corpus:
        scored = _table(corpus)
        table = scored.filter(pc.is_in(scored["key"], value_set=table["key"].combine_chunks())).combine_chunks()
    wanted = pc.not_equal(table["method"], REAL)
    if is_all:
        wanted = pc.and_(wanted, pa.array(scored_rows(table)))
    if drawn is not None and drawn.requests:
        wanted = pc.and_(wanted, pc.is_in(table["request"], value_set=pa.array(drawn.requests, pa.string())))
    return make_population(table.filter(wanted).combine_chunks(), corpus.labels)


def _table(corpus: Corpus) -> pa.Table:
    known = set(corpus.metadata.schema.names)
    return corpus.run_table(0, [name for name in _COLUMNS if name in known]).combine_chunks()


def make_population(table: pa.Table, labels: tuple[str, ...]) -> Population:
    """The population of the rows of a table, of one run of any schema version."""
    import numpy as np
    import pyarrow.compute as pc

    keys = table["key"].to_pylist()
    request = table["request"].to_numpy()
    codes = pc.struct_field(pc.extract_regex(table["key"], CLASS_OF_KEY), [0])
    rules = _rules(table)
    scores = {name: _score(table, name) for name in SCORES if name in table.column_names}
    scores |= _oracle_scores(table)
    scores = {name: values for name, values in scores.items() if not np.isnan(values).all()}
    machine_name, machine = _machine(rules, scores)
    return Population(
        place={key: place for place, key in enumerate(keys)},
        request=request,
        prefix=pc.binary_join_element_wise(table["request"], codes, "/").to_numpy(),
        class_name=_class_names(table, labels),
        target_errs=errors(table),
        rules=rules,
        scores=scores,
        machine=machine,
        machine_name=machine_name,
    )


def _class_names(table: pa.Table, labels: tuple[str, ...]) -> np.ndarray:
    import numpy as np

    texts = np.array(class_texts(table, labels).to_pylist(), dtype=object)
    joint = np.flatnonzero(joint_rows(table))
    names = distinct_names(dict(enumerate(labels)))
    for row, classes in zip(joint, table["kldb_classes"].take(joint).to_pylist(), strict=True):
        texts[row] = JOINT_SEPARATOR.join(names.get(index, f"class {index}") for index in classes)
    return texts


def _score(table: pa.Table, name: str) -> np.ndarray:
    """A score of each row; NaN where it is unknown."""
    import numpy as np

    values = np.array(table[name].to_numpy(), dtype=float)
    values[~scored_rows(table)] = np.nan
    return np.where(values == UNKNOWN, np.nan, values) if BY_NAME[name].is_optional else values


def _oracle_entries(table: pa.Table) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By oracle the class that it predicts for each row, and its probability of the label; -1 and NaN where unknown."""
    import numpy as np
    import pyarrow.compute as pc

    if "oracles" not in table.column_names:
        return {}
    rows = pc.list_parent_indices(table["oracles"]).to_numpy()
    each = pc.list_flatten(table["oracles"])
    models, classes, probabilities = (
        pc.struct_field(each, name).to_numpy(zero_copy_only=False) for name in ("model", "predicted_class", "p_label")
    )
    entries: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for model in pc.unique(pc.struct_field(each, "model")).to_pylist():
        here = models == model
        predicted, probability = np.full(table.num_rows, NO_CLASS), np.full(table.num_rows, np.nan)
        predicted[rows[here]], probability[rows[here]] = classes[here], probabilities[here]
        entries[model] = predicted, probability
    return entries


def _oracle_scores(table: pa.Table) -> dict[str, np.ndarray]:
    entries = _oracle_entries(table)
    return {f"p of {model}": probability for model, (_, probability) in entries.items()} if len(entries) > 1 else {}


def _rules(table: pa.Table) -> dict[str, np.ndarray]:
    """The rules that the rows allow, from each oracle to the calibrated estimate."""
    import numpy as np

    rules: dict[str, np.ndarray] = {}
    entries = _oracle_entries(table)
    for model, (predicted, _) in entries.items():
        rules[f"{model} agrees"] = predicts_asked(table, predicted) & (predicted >= 0)
    independent = [model for model in entries if not model.endswith(GUIDES)]
    if len(independent) > 1:
        rules["all oracles agree"] = np.logical_and.reduce([rules[f"{model} agrees"] for model in independent])
    agrees = oracle_agreement(table)
    if not entries and (agrees >= 0).any():
        rules["oracle agrees"] = agrees > 0
    for name, bounds in (("oracle_p_label_min", MIN_PROBABILITIES), ("p_valid", MIN_ESTIMATES)):
        values = _score(table, name) if name in table.column_names else np.full(0, np.nan)
        if not np.isnan(values).all():
            rules |= {f"{name} >= {bound:g}": np.nan_to_num(values, nan=-1.0) >= bound for bound in bounds}
    valid = label_validity(table)
    if (valid >= 0).any():
        rules["label_is_valid"] = valid > 0
    return rules


def _machine(rules: dict[str, np.ndarray], scores: dict[str, np.ndarray]) -> tuple[str, np.ndarray | None]:
    """The verdict that is nearest to people's: the calibrated estimate, or agreement of all oracles."""
    import numpy as np

    if "p_valid" in scores:
        return "p_valid", np.nan_to_num(scores["p_valid"], nan=0.0)
    for name in ("all oracles agree", "oracle agrees"):
        if name in rules:
            return name, rules[name].astype(float)
    single = [name for name in rules if name.endswith(" agrees") and not name.endswith(f"{GUIDES} agrees")]
    return (single[0], rules[single[0]].astype(float)) if single else ("", None)
