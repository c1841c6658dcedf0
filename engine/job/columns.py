"""The columns of a sample's metadata, each defined once: what stores, reads or shows them follows this table.

A new score takes a formula in `engine.methods.scores`, a line in `engine.generation.scorer` and a row of
`RECORD_COLUMNS`, with `since` of the next schema version and the roles of `SCORE`. The Arrow schema, the records, the
rules of acceptance, filters, summaries, `inspect`, `verify --deep`, the card, the report and the documentation have it
by its row. Earlier versions lack later columns; all are read, and a run that began with one continues in it.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any, Literal

# The class index of a sample that has none, or that no model saw.
NO_CLASS = -1
# The class that another model than the target predicts where it is none of the target's (`models.label_map`).
OTHER_CLASS = -2
# The value of an optional score that was not measured: there is no second image, or no model that would measure it.
# Filters, conditions and medians take it for unknown.
UNKNOWN = -1.0
# Ends the name of a model in `transfer` that is a further target, and in `oracles` of one that is a floor of guidance:
# guidance saw it, so that it is no independent evidence.
GUIDES = " (guides)"
# A label is valid from this estimate of the share of people who would give it on; without an estimate, from this
# probability of it on under every oracle that guided nothing.
MIN_P_VALID = 0.9
MIN_ORACLE_P_LABEL = 0.99
# From this PSNR on, in dB, a change of an image is adversarial: its root mean square is 2.55 of 255 levels, 1 % of the
# range, which people hardly see side by side.
ADVERSARIAL_PSNR_DB = 40.0
# Below this one it is perceptible: attacks that are meant to be invisible, bounded by 8 levels, have more.
PERCEPTIBLE_PSNR_DB = 30.0
# That of equal images: nothing changed.
EQUAL_PSNR_DB = 100.0
_EMPTY: dict[str, Any] = {"int": 0, "float": 0.0, "bool": False, "str": ""}


class Role(enum.Flag):
    """What a column is used for. Every column that is no list can be filtered by, with or without a role.

    Attributes:
        ACCEPTS: is a condition of a request's `accept`.
        INSPECTED: `riskforge inspect` gives its quantiles.
        SUMMARISED: its median and quartiles per request and context are in manifest, card, report and on the terminal;
            of a part of an entry, its mean is.
        VERIFIED: `verify --deep` scores images again and compares it.
        COMPARED: `riskforge compare` compares its medians.
        SORTS: the report's gallery sorts by it.
        RANGES: the report's gallery limits it to a range.
        DRAWN: the report has its histogram and its change against prompt-only partners.
        QUARTILES: the report's summary shows quartiles below its median.
        SAMPLED: says how the sample was made; kept where an image is not scored again.
    """

    ACCEPTS = enum.auto()
    INSPECTED = enum.auto()
    SUMMARISED = enum.auto()
    VERIFIED = enum.auto()
    COMPARED = enum.auto()
    SORTS = enum.auto()
    RANGES = enum.auto()
    DRAWN = enum.auto()
    QUARTILES = enum.auto()
    SAMPLED = enum.auto()


NO_ROLE = Role(0)
# A score that is shown wherever scores are.
SCORE = (
    Role.ACCEPTS | Role.INSPECTED | Role.SUMMARISED | Role.VERIFIED | Role.SORTS | Role.RANGES | Role.DRAWN
)  # fmt: skip
# A score that a user can ask for, and that tables leave out.
DETAIL = Role.ACCEPTS | Role.SORTS
# A score that only some requests or jobs have.
OPTIONAL = (
    Role.ACCEPTS | Role.INSPECTED | Role.SUMMARISED | Role.VERIFIED | Role.COMPARED | Role.SORTS | Role.RANGES
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Unit:
    """The unit of a score: its name, and how a sentence continues after "risk is".

    Attributes:
        short: without where the figure comes from.
        full: with it.
    """

    name: str
    short: str = ""
    full: str = ""


NO_UNIT = Unit("")
NATS = Unit("nats", "in nats", "in nats under the target")
DECIBEL = Unit("decibels", "in dB", "in dB")
COSINE = Unit("cosine", "a cosine", "the cosine of CLIP embeddings of image and class prompt")


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """A field of the entries of a list column, of which there is one for each model.

    Attributes:
        name: that of the score's own column, where it is a score.
        type: "int", "float" or "str".
        is_class: whether it is a class index.
        alias: name by which conditions, filters and the gallery know it in the first entry; empty where they do not.
        label: what precedes its value in a line of text.
    """

    name: str
    type: str
    is_class: bool = False
    alias: str = ""
    label: str = ""
    roles: Role = NO_ROLE


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """A column.

    Attributes:
        type: "int", "float", "bool", "str", "ints", "floats", or with `parts` the plural of what the list holds.
        description: what a value means, for card, documentation and Arrow's field.
        since: the schema version that it came with.
        parts: fields of the entries, where the column is a list of entries.
        is_class: whether it holds class indices; its empty value is then `NO_CLASS`.
        measured_by: role of the model in the job that measured it, or `pixels` where no model is needed; empty of what
            the plan or the sampler knows. Of a row that is not scored it has the empty value, which means nothing.
        alias: its name as a condition of `accept`, where that is another.
        title: in tables and charts.
        meaning: what follows the title in the caption of its chart; the description where empty.
        axis: of its chart.
        rank: place among the scores of the report; those without follow in the order of the table.
        tolerance: how far it may be from its stored value when an image is scored again; a GPU and its batches move
            it a little.
        without: the value where the column does not apply, if that is not the empty one of its type.
    """

    name: str
    type: str
    description: str
    since: int = 1
    parts: tuple[Part, ...] = ()
    is_class: bool = False
    measured_by: Literal["", "target", "clip", "oracle", "transfer", "judge", "pixels"] = ""
    alias: str = ""
    title: str = ""
    meaning: str = ""
    unit: Unit = NO_UNIT
    axis: Literal["linear", "log"] = "linear"
    rank: int | None = None
    tolerance: float = 1e-3
    without: float | None = None
    roles: Role = NO_ROLE

    @property
    def empty(self) -> Any:
        """The value where the column does not apply; a list is a new one each time."""
        if self.without is not None:
            return self.without
        return NO_CLASS if self.type == "int" and self.is_class else _EMPTY.get(self.type, [])

    @property
    def is_optional(self) -> bool:
        """Whether rows may lack it, so that its empty value is no measurement: unknown wherever values are used."""
        return self.without == UNKNOWN

    def is_known(self, value: Any) -> bool:
        """Whether a value is known: of an optional score not the one that says that it was not measured."""
        return not self.is_optional or value != self.empty

    def known(self, values: Any) -> Any:
        """The known ones of an array of values."""
        return values[values != self.empty] if self.is_optional else values

    @property
    def is_list(self) -> bool:
        """Whether a value is a list, which cannot be compared."""
        return self.type not in _EMPTY

    @property
    def label(self) -> str:
        """The title within a sentence."""
        return self.title if self.title[:2].isupper() else self.title[:1].lower() + self.title[1:]


# In the json of a tar and in the parquet, in this order; decided by the plan alone, whatever the worker or the attempt.
RECORD_COLUMNS: tuple[Column, ...] = (
    Column(name="schema_version", type="int", description="version of these columns"),
    Column(
        name="key", type="str", description="name of the sample, unique in the data set; member name in the tar"
    ),
    Column(name="request", type="str", description="request of the job that asked for the sample"),
    Column(name="method", type="str", description="sampling method: prompt only, or the guidance"),
    Column(
        name="class_name", type="str", roles=Role.SAMPLED,
        description="conditioned class; of a joint prompt the class of the subset with the highest conformity",
    ),
    Column(
        name="class_index", type="int", is_class=True, roles=Role.SAMPLED,
        description="its index in the target's labels; content of the .cls member; -1 where unknown",
    ),
    Column(name="prompt", type="str", description="text that conditioned the diffusion model", roles=Role.SAMPLED),
    Column(name="context", type="str", description="context appended to the prompt, empty for none"),
    Column(name="seed", type="int", description="seed of the sample's first noise"),
    Column(name="index", type="int", description="index of the sample in its request and class"),
    Column(
        name="status", type="str",
        description="ok: image stored; rejected: sampled, not accepted; failed: no image",
    ),
    Column(name="error_message", type="str", description="why the sample failed, empty otherwise"),
    Column(
        name="scored", type="bool", since=3,
        description="whether models scored the image; false of failed samples and of real images, whose scores mean"
        " nothing",
    ),
    Column(
        name="risk", type="float", measured_by="target", title="Risk", unit=NATS, axis="log", rank=1,
        description="-log p of the conditioned class under the target, in nats",
        meaning="minus log p of the conditioned class", roles=SCORE | Role.COMPARED,
    ),
    Column(
        name="is_error", type="bool", measured_by="target", roles=Role.ACCEPTS,
        description="whether the target predicts another class than class_name; of a joint prompt errors are counted as"
        " predictions outside its classes (kldb_classes), which is the derived name target_errs",
    ),
    Column(
        name="predicted_class", type="int", is_class=True, measured_by="target", roles=Role.VERIFIED,
        description="class that the target predicts; -1 where it did not see the image",
    ),
    Column(
        name="p_label", type="float", measured_by="target", title="Probability of the label",
        description="the target's probability of the conditioned class", roles=DETAIL | Role.INSPECTED | Role.RANGES,
    ),
    Column(
        name="conformity", type="float", measured_by="clip", title="Conformity", unit=COSINE, rank=3,
        description="cosine of the CLIP embeddings of image and class prompt",
        meaning="image against the class's prompt", roles=SCORE | Role.COMPARED,
    ),
    Column(
        name="conformity_margin", type="float", measured_by="clip", title="Conformity margin", unit=COSINE,
        description="conformity minus the best conformity to any other class",
        roles=DETAIL | Role.INSPECTED | Role.VERIFIED,
    ),
    Column(
        name="kldb", type="float", measured_by="target", title="KLDB", unit=NATS, axis="log", rank=2,
        description="KL divergence from the uniform distribution over kldb_classes to the target's output, in nats",
        meaning="distance to the decision boundary; zero on it", roles=SCORE | Role.COMPARED | Role.QUARTILES,
    ),
    Column(
        name="kldb_classes", type="ints", is_class=True, measured_by="target",
        description="classes of kldb: the request's subset, or the class and its strongest rival",
    ),
    Column(
        name="kldb_balance", type="float", measured_by="target", title="KLDB, balance", unit=NATS, roles=DETAIL,
        description="part of kldb: imbalance within the subset",
    ),
    Column(
        name="kldb_mass", type="float", measured_by="target", title="KLDB, mass", unit=NATS, roles=DETAIL,
        description="part of kldb: probability outside the subset",
    ),
    Column(
        name="entropy", type="float", measured_by="target", title="Entropy", unit=NATS, rank=4,
        description="entropy of the target's output, in nats", meaning="of the target's output", roles=SCORE,
    ),
    Column(
        name="soft_label", type="floats",
        description="training target over all classes: uniform over the subset of a joint prompt, one-hot otherwise",
    ),
    Column(
        name="temperature", type="float", measured_by="target",
        description="calibration temperature of the target's logits",
    ),
    Column(
        name="screened", type="bool", description="whether the conditioning passed the error predictor",
        roles=Role.ACCEPTS | Role.SAMPLED,
    ),
    Column(
        name="guided_steps", type="int", description="number of denoising steps that were guided", roles=Role.SAMPLED
    ),
    Column(
        name="zero_gradients", type="int", description="number of guided steps whose gradient was zero",
        roles=Role.SAMPLED,
    ),
    Column(
        name="nonfinite_gradients", type="int", roles=Role.SAMPLED,
        description="number of guided steps whose gradient was not finite and was dropped",
    ),
    Column(
        name="oracle_class", type="int", is_class=True, measured_by="oracle", alias="oracle",
        description="class that the independent oracle predicts; -1 without an oracle",
        roles=Role.ACCEPTS | Role.VERIFIED,
    ),
    Column(
        name="accepted", type="bool", description="whether the sample meets the request's acceptance rule"
    ),
    Column(
        name="transfer", type="transfers", measured_by="transfer",
        description="predicted class and risk under each classifier that was scored and never guided on",
        parts=(
            Part(name="model", type="str"),
            Part(name="predicted_class", type="int", is_class=True),
            Part(name="risk", type="float", label="risk", roles=Role.VERIFIED),
        ),
    ),
    Column(
        name="judge", type="judges", since=2, measured_by="judge",
        description="conformity and its margin under an independent CLIP model that was never guided on; empty without"
        " one",
        parts=(
            Part(name="model", type="str"),
            Part(
                name="conformity", type="float", alias="judge_conformity", label="conformity",
                roles=DETAIL | Role.VERIFIED | Role.SUMMARISED,
            ),
            Part(
                name="conformity_margin", type="float", alias="judge_conformity_margin", label="margin",
                roles=DETAIL | Role.VERIFIED,
            ),
        ),
    ),
    Column(
        name="start_key", type="str", since=4, roles=Role.SAMPLED,
        description="name of the labelled image that the sample started from; empty without one",
    ),
    Column(
        name="start_sha256", type="str", since=4, roles=Role.SAMPLED,
        description="checksum of that image's pixels: SHA-256 of `WIDTHxHEIGHT:` and RGB bytes, before resizing",
    ),
    Column(
        name="strength", type="float", since=4, without=1.0, roles=Role.SAMPLED,
        description="share of the denoising steps that were taken from the start; 1 without one",
    ),
    Column(
        name="start_distance", type="float", since=4, measured_by="clip", without=UNKNOWN,
        title="Distance to the start",
        description="1 minus the cosine of the CLIP embeddings of start and sample; -1 without a start", roles=OPTIONAL,
    ),
    Column(
        name="twin_key", type="str", since=4, roles=Role.SAMPLED,
        description="key of the unguided twin: same noise, condition and start; empty without one",
    ),
    Column(
        name="twin_psnr_db", type="float", since=4, measured_by="pixels", without=UNKNOWN,
        title="PSNR to the twin", unit=DECIBEL,
        description="peak signal-to-noise ratio of sample and twin as stored, in dB, at most 100; -1 without a twin",
        roles=OPTIONAL,
    ),
    Column(
        name="twin_distance", type="float", since=4, measured_by="clip", without=UNKNOWN, title="Distance to the twin",
        description="1 minus the cosine of the CLIP embeddings of twin and sample; -1 without a twin", roles=OPTIONAL,
    ),
    Column(
        name="twin_predicted_class", type="int", since=4, is_class=True, measured_by="target", without=NO_CLASS,
        roles=Role.VERIFIED,
        description="class that the target predicts for the twin; -1 without one",
    ),
    Column(
        name="twin_risk", type="float", since=4, measured_by="target", without=UNKNOWN, title="Risk of the twin",
        unit=NATS,
        description="-log p of the conditioned class under the target, of the twin, in nats; -1 without one",
        roles=DETAIL | Role.INSPECTED | Role.VERIFIED,
    ),
    Column(
        name="oracles", type="oracles", since=5, measured_by="oracle",
        description="predicted class under each oracle and its probability of the conditioned class, of a joint prompt"
        " of all its classes together; empty without one",
        parts=(
            Part(name="model", type="str"),
            Part(name="predicted_class", type="int", is_class=True),
            Part(name="p_label", type="float", label="p", roles=Role.VERIFIED),
        ),
    ),
    Column(
        name="oracle_p_label_min", type="float", since=5, measured_by="oracle", without=UNKNOWN,
        title="Least p of the oracles",
        description="least p_label of the oracles that guided nothing; -1 without one",
        roles=OPTIONAL & ~Role.SUMMARISED,
    ),
    Column(
        name="p_valid", type="float", since=5, measured_by="oracle", without=UNKNOWN, title="Valid label",
        description="estimated share of people who would give the label, by models.validity; -1 without it",
        roles=OPTIONAL & ~Role.SUMMARISED,
    ),
)  # fmt: skip
# In the parquet alone: they depend on the run, and never enter the tar.
RUN_COLUMNS: tuple[Column, ...] = (
    Column(name="batch_size", type="int", description="number of samples sampled together"),
    Column(name="duration_seconds", type="float", description="sampling time of the batch divided by its size"),
    Column(name="attempt", type="int", description="number of the try that made the shard"),
    Column(name="worker", type="str", description="worker that made the shard"),
    Column(name="sha256", type="str", description="checksum of the image file, empty where none is stored"),
)
# In metadata.parquet alone, which has the rows of all shards.
SURPLUS = Column(name="surplus", type="bool", description="accepted, but beyond the quota of its request")

COLUMNS = (*RECORD_COLUMNS, *RUN_COLUMNS, SURPLUS)
BY_NAME = {column.name: column for column in COLUMNS}
# The version that new runs have.
SCHEMA_VERSION = max(column.since for column in COLUMNS)
MEASURED = frozenset(column.name for column in RECORD_COLUMNS if column.measured_by)


@dataclass(frozen=True, slots=True)
class EntryScore:
    """A score in the entries of a list column, which has a name of its own."""

    column: Column
    part: Part

    @property
    def score(self) -> Column:
        """The column of the same score under the first model."""
        return BY_NAME[self.part.name]

    @property
    def title(self) -> str:
        """In tables and charts."""
        return f"{self.score.title}, {self.column.name}"

    @property
    def heading(self) -> str:
        """In the tables of terminal and card."""
        return f"{self.column.name}'s {self.score.label}"


# By the name that conditions, filters and the gallery know.
ENTRY_SCORES: dict[str, EntryScore] = {
    part.alias: EntryScore(column, part) for column in RECORD_COLUMNS for part in column.parts if part.alias
}

# What a row has of its unguided twin.
TWIN_COLUMNS = tuple(column.name for column in RECORD_COLUMNS if column.name.startswith("twin_"))
# What says which rows have a start or a twin.
PAIR_COLUMNS = ("key", "start_key", *TWIN_COLUMNS)
# Columns that say what was asked for, and whether the target errs.
ASKED = ("key", "class_index", "kldb_classes")
ERRS = ("predicted_class", "is_error")


@dataclass(frozen=True, slots=True)
class DerivedName:
    """A name that filters and rules of acceptance know in addition to the columns.

    Attributes:
        needs: columns that it is computed from.
        kind: of its values, "flag" or "number".
    """

    name: str
    description: str
    needs: tuple[str, ...]
    kind: Literal["flag", "number"] = "flag"


DERIVED_NAMES: dict[str, DerivedName] = {
    derived.name: derived
    for derived in (
        DerivedName(
            "target_errs",
            "whether the target predicts another class than the conditioned one, for a joint prompt one outside its"
            " subset",
            (*ASKED, *ERRS),
        ),
        DerivedName(
            "oracle_agrees",
            "whether the oracle predicts the conditioned class, for a joint prompt any of its subset",
            (*ASKED, "oracle_class"),
        ),
        DerivedName(
            "valid_failure", "the target errs and the oracle agrees", (*ASKED, *ERRS, "oracle_class")
        ),
        DerivedName(
            "label_is_valid",
            f"whether p_valid is {MIN_P_VALID} or more; where it is unknown, whether every oracle that guided nothing"
            f" has the label at p >= {MIN_ORACLE_P_LABEL}; unknown without both",
            ("p_valid", "oracle_p_label_min"),
        ),
        DerivedName(
            "human_agreement",
            "share of the raters of `riskforge review` who say the label, of a joint prompt any of its classes; unknown"
            " where nobody answered",
            ("key",),
            "number",
        ),
        *(
            DerivedName(
                alias, f"{entry.part.name} under the {entry.column.name}; unknown without one", (entry.column.name,),
                "number",
            )
            for alias, entry in ENTRY_SCORES.items()
        ),
    )
}  # fmt: skip


def columns_with(role: Role) -> tuple[Column, ...]:
    """The columns that have a role, in the order of the table."""
    return tuple(column for column in COLUMNS if role in column.roles)


def by_rank(columns: Iterable[Column]) -> tuple[Column, ...]:
    """Columns in the order of reports."""
    return tuple(sorted(columns, key=lambda column: (column.rank is None, column.rank or 0)))


def target_first(columns: Iterable[Column]) -> tuple[Column, ...]:
    """Columns in the order of the summary tables of terminal and card: what the target measured, then all others."""
    return tuple(sorted(columns, key=lambda column: column.measured_by != "target"))


def entry_scores_with(role: Role) -> dict[str, EntryScore]:
    """The named scores of entries that have a role."""
    return {alias: entry for alias, entry in ENTRY_SCORES.items() if role in entry.part.roles}


def stored_names(names: Iterable[str], stored: Collection[str]) -> list[str]:
    """The names to read of a file: all but later columns that it lacks.

    Args:
        stored: the columns of the file.
    """
    return [name for name in names if name in stored or BY_NAME[name].since == 1]


def enumerated(names: Iterable[str]) -> str:
    """Names in a sentence: "risk, KLDB and entropy"."""
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def units_text(columns: Iterable[Column], *, is_full: bool) -> str:
    """What the figures of scores are, without the scores that have no unit: "risk is in nats, ...".

    Args:
        is_full: whether it says where the figures come from.
    """
    names: dict[Unit, list[str]] = {}
    for column in columns:
        names.setdefault(column.unit, []).append(column.label)
    clauses = ((labels, unit.full if is_full else unit.short) for unit, labels in names.items() if unit.name)
    return ", ".join(f"{enumerated(labels)} {'are' if len(labels) > 1 else 'is'} {text}" for labels, text in clauses)
